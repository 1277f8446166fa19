# %% [markdown]
# # Dive C · Is that difference real?
#
# [Lesson 11](11_accuracy_comparison.ipynb) compared adapters with an interval that a function computed. Here you
# compute one by hand, see how it goes wrong, plan how many seeds you need, and read a famous table with it. All of it
# answers one question: when two methods differ by a little, is it the methods or luck?
#
# | you need | |
# |---|---|
# | time | 63 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used: its results are recorded |

# %% machinery "Imports, and the record of lesson 11"
import json
import math
import statistics

import ipywidgets
import matplotlib.pyplot as plt

from qlora_lab.classroom.checks import (
    check_by_hand,
    check_coin,
    check_finds_something,
    check_my_pilot,
    check_paired_difference,
    check_seeds_for_margin,
    progress,
)
from qlora_lab.classroom.lessons.dive_c.figures import plot_experiments, plot_looks, plot_repairs, plot_seeds
from qlora_lab.classroom.lessons.dive_c.machinery import (
    fair_coins,
    false_alarms,
    made_up,
    read_record,
    redraw,
    seeds_within,
    share_held,
    shorter_of_two,
    unpaired_interval,
)
from qlora_lab.classroom.plots import new_axes, plot_intervals, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.evaluation.intervals import by_group, paired_interval, seeds_needed, share_excluding_zero, t_quantile
from qlora_lab.experiments.accuracy import METHODS
from qlora_lab.finetuning import load_samples

record = read_record()
runs = record["runs"]
scores = {
    "test": lambda run: run["exact"]["test"].count("1") / 2,
    "shifted": lambda run: run["exact"]["shifted"].count("1") / 2,
    "validation": lambda run: run["after"]["validation"],
    "prose": lambda run: run["after"]["prose"],
}
units = {"test": "points", "shifted": "points", "validation": "nats", "prose": "nats"}
values = {name: {m: [of(run) for run in runs if run["method"] == m] for m in METHODS} for name, of in scores.items()}
others = [name for name in METHODS if name != "lora-bf16"]
four_bits = [name for name, method in METHODS.items() if method.bits < 5]
labels = {name: f"{name}\n{method.bits:g} bits" for name, method in METHODS.items()}


def compare(method, base, score, seeds=range(8)):
    """Score of one method less that of another, at each seed."""
    return [values[score][method][seed] - values[score][base][seed] for seed in seeds]


def says(mean, half):
    """What an interval of a score says, if higher is better."""
    return "worse" if mean + half < 0 else "better" if mean - half > 0 else "open"


# %% claims
assert [(run["method"], run["seed"]) for run in runs] == [(m, seed) for seed in range(8) for m in METHODS]

# %% [markdown]
# ## 1 · Four numbers by hand
#
# Four seeds, two methods; at each seed the new method does worse by {{3}}, {{1}}, {{4}} and {{0}} points. So the
# differences are −{{3}}, −{{1}}, −{{4}} and {{0}}, with the mean −{{2}}. Is the new method worse?

# %%
d = [-3, -1, -4, 0]
off = [x - (-2) for x in d]  # how far each is off the mean
squares = [x**2 for x in off]
variance = sum(squares) / 3  # not 4: see below
spread = variance**0.5
error = spread / 4**0.5
print(f"off {off}, squares {squares}, sum {sum(squares)}, variance {variance:.2f}, spread {spread:.2f}")
print(f"standard error {error:.2f}, times t {t_quantile(3):.2f} is {t_quantile(3) * error:.2f}")
print(f"from {-2 - t_quantile(3) * error:+.1f} to {-2 + t_quantile(3) * error:+.1f}")

# %% claims
assert paired_interval(d) == (-2, t_quantile(3) * error) and f"{t_quantile(3) * error:.2f}" == "2.91"

# %% [markdown]
# The interval holds {{0}}, so four seeds leave it open. Each step has its reason:
#
# - **Why squares?** The deviations themselves add up to zero. Squares do not, and for independent luck they simply add
#   up: (a + b)² is a² + b² + {{2}}ab, and ab is as often negative as positive.
# - **Why divide by {{3}}?** The deviations are taken from these four numbers' *own* mean, and from any other number, the
#   true mean included, their squares add up to more. So the squares come out too small, and dividing by n − {{1}} in
#   place of n makes up for it.
# - **Why √{{4}}?** Four variances add up to four times one, so the sum spreads √{{4}} times as wide as one
#   number. The mean is a quarter of the sum: √{{4}}/{{4}} = {{1}}/√{{4}} as wide.
# - **Why t?** Because the spread is an estimate from four numbers. Let us see what happens without it.
#
# **Exercise C.1 ●○○ (3 minutes).** Three seeds gave the differences {{1}}, {{2}} and {{6}}. Compute the {{95}} %
# interval by hand or with a calculator (for three numbers, t is {{4.30:.2f}}).

# %%
### BEGIN SOLUTION
### STUB: ends = (..., ...)  # low, high
half = 4.30 * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)
ends = (3 - half, 3 + half)
### END SOLUTION

# %%
check_by_hand(ends)

# %% [markdown]
# <details><summary>Hint</summary>Follow the cell above, line by line. There are three numbers now: what becomes of the {{3}} and the {{4}} in it?</details>

# %% [markdown]
# ### What does {{95}} % promise?
#
# It promises something about *many* experiments: of {{100}} such intervals, {{95}} hold the true value. We can test
# that where the truth is known. Below, each bar is an experiment with four made-up numbers, whose true mean is {{0}}.
#
# **Predict.** Take {{1.96}} standard errors, as for hundreds of seeds. What share of the intervals holds the truth if
# there are four seeds?

# %%
guess = ...  # ← your guess, in %


# %% alt="Fifty vertical bars around a line at {{0}}, the truth: intervals of {{1.96}} standard errors from four numbers. They are of very different length. Most cross the line; a few of the fifty, drawn dashed and mostly short, miss it."
def draw_experiments(seeds, student):
    x = made_up(50, seeds)
    half = (t_quantile(seeds - 1) if student else 1.96) * x.std(dim=1) / seeds**0.5
    return plot_experiments(new_axes(height=3.2), list(zip(x.mean(dim=1).tolist(), half.tolist())), 0, 4)


explore(
    draw_experiments,
    seeds=ipywidgets.IntSlider(min=2, max=20, value=4, description="seeds"),
    student=ipywidgets.Checkbox(value=False, description="Student's t in place of 1.96"),
)

# %%
for factor in (1.96, t_quantile(3)):
    print(f"four seeds, {factor:.2f} standard errors: {share_held(4, factor):.0%} of 20,000 intervals hold the truth")
print(told(guess))

# %% claims
assert abs(share_held(4, 1.96) - 0.855) < 0.01 and abs(share_held(4, t_quantile(3)) - 0.95) < 0.01

# %% [markdown]
# **What happened?** The bars that miss are mostly *short*: their four numbers happened to lie close together, and the
# interval believed it. Student's t makes all intervals longer, just enough to bring the share back to {{95}} %.
#
# ## 2 · Why subtract at each seed?
#
# If a lucky seed is lucky for both methods, the luck cancels in the difference. The **correlation** says whether it is:
# {{1}} if two lists of numbers rise and fall together, {{0}} if they have nothing to do with each other, negative if one
# rises where the other falls.
#
# **Predict.** How strongly do the eight `test` scores of lesson 11 go together?

# %%
prediction = {"fp32 and bf16": ..., "bf16 and NF4": ...}  # ← your guesses

# %% alt="Lines join the scores of one seed with two methods. From fp32 to bf16 base they are nearly level and keep their order (correlation {{correlations[0]:+.2f}}). From bf16 to NF4 most fall, and they cross (correlation {{correlations[1]:+.2f}})."
test = values["test"]
pairs = {"lora-fp32 | lora-bf16": (test["lora-fp32"], test["lora-bf16"])}
pairs["lora-bf16 | nf4"] = (test["lora-bf16"], test["nf4"])
_, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
_ = plot_seeds(axes, pairs, "test: exactly right (%)")
correlations = [statistics.correlation(a, b) for a, b in pairs.values()]
for (name, guess), correlation in zip(prediction.items(), correlations):
    print(f"{name}: correlation {correlation:+.2f} ({told(guess)})")

# %%
for m in others:
    _, half = paired_interval(compare(m, "lora-bf16", "test"))
    _, apart = unpaired_interval(test[m], test["lora-bf16"])
    together = statistics.correlation(test[m], test["lora-bf16"])
    print(f"{m:<11} ± {half:.2f} paired, ± {apart:.2f} as if the runs were no pairs, correlation {together:+.2f}")

# %% claims
assert [f"{correlation:+.2f}" for correlation in correlations] == ["+0.89", "-0.17"]
shorter = {
    m: paired_interval(compare(m, "lora-bf16", "test"))[1] < unpaired_interval(test[m], test["lora-bf16"])[1]
    for m in others
}
assert shorter == {"lora-fp32": True, "nf4": False, "nf4-double": False, "fp4": True, "int4": True}
of_int4 = statistics.correlation(test["int4"], test["lora-bf16"])
assert of_int4 > 0.75 > 0.65 > statistics.correlation(test["fp4"], test["lora-bf16"])

# %% [markdown]
# **What happened?** float32 and bf16 are so close that both trainings take nearly the same path, and share their luck.
# There, pairing shortens the interval a lot. With NF4 it even lengthens it a little: no luck cancels, and a paired
# interval has fewer degrees of freedom. Is that because NF4 is another base? Then INT4, which is even farther from bf16
# on prose (section 8), should share least of all. But its luck goes with bf16's. We know no reason, and eight seeds are
# too few to be sure of a correlation.
#
# You pair because the runs *are* pairs, and you decide that beforehand. Why not take the shorter interval afterwards?
# Here are two methods that are equal in truth, compared {{20000:,}} times:

# %%
pleased = shorter_of_two()
for way, share in pleased.items():
    print(f'{way}: "a difference" in {share:.1%} of experiments')

# %% claims
assert all(0.045 < pleased[way] < 0.055 for way in ("paired", "not paired")) and pleased["either"] > 0.06

# %% [markdown]
# Each interval alone is wrong in {{5}} % of experiments, as promised. But they are not wrong in the *same* ones. Both
# have the same middle, so the shorter one excludes {{0}} whenever either does, and whoever may choose is wrong that
# often. That is what makes choosing afterwards cheating: you still say {{95}} %, and it is no longer true.
#
# **Exercise C.2 ●●○ (4 minutes).** Write the comparison for a list of `runs` like the record's: the mean of the
# differences, and *half* the width of its interval. The runs come in any order, and a seed that only one of the methods
# has does not count.


# %%
def paired_difference(runs, method, score):
    """score(run) of `method` less that of lora-bf16 at the same seed: mean, and half the width of its 95 % interval."""
    ### BEGIN SOLUTION (about 6 lines)
    mine = {run["seed"]: score(run) for run in runs if run["method"] == method}
    base = {run["seed"]: score(run) for run in runs if run["method"] == "lora-bf16"}
    differences = [mine[seed] - base[seed] for seed in mine if seed in base]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), t_quantile(len(differences) - 1) * error
    ### END SOLUTION


# %%
check_paired_difference(paired_difference)

# %% [markdown]
# <details><summary>Hint 1</summary>Make two dicts from <code>run["seed"]</code> to score, one for each method.</details>
# <details><summary>Hint 2</summary>Half the width is t times the standard error. Which n counts here?</details>

# %% [markdown]
# ## 3 · Looking too often
#
# The same goes for seeds. Train two; open; train a third; still open; a fourth, and there it is, a difference! It
# sounds like diligence.
#
# **Predict.** Two methods that are equal in truth, and a look after each seed, from two to eight. In what share of
# experiments does one of the looks find "a difference"?

# %%
guess = ...  # ← your guess, in %

# %% alt="The share of experiments with a false alarm so far rises from {{5}} % with two seeds to {{alarms[-1]:.0%}} with eight, while a single look stays at {{5}} %."
alarms = false_alarms(8)
_ = plot_looks(new_axes(height=2.8), alarms, guess)
print(" · ".join(f"{seeds} seeds: {share:.0%}" for seeds, share in enumerate(alarms, 2)), "·", told(guess))

# %% claims
assert f"{alarms[0]:.0%} {alarms[-1]:.0%}" == "5% 18%"

# %% [markdown]
# **What happened?** Every look is another chance to be wrong, and you stop at the first that is. Looks that come out
# open do no harm, but you never stop there. So {{5}} % becomes {{alarms[-1]:.0%}}, and it goes on rising with every look.
# Fix the number of seeds first, train them all, and look once.
#
# **Exercise C.3 ●●○ (4 minutes).** Write that impatient researcher: True if the {{95}} % interval of the first two,
# three, ... or all of the differences excludes {{0}}.


# %%
def finds_something(differences):
    """Whether any look, after 2, 3, ... seeds, excludes 0."""
    ### BEGIN SOLUTION (about 5 lines)
    for count in range(2, len(differences) + 1):
        mean, half = paired_interval(differences[:count])
        if abs(mean) > half:
            return True
    return False
    ### END SOLUTION


# %%
check_finds_something(finds_something)

# %% [markdown]
# <details><summary>Hint 1</summary><code>differences[:count]</code>, for which counts?</details>
# <details><summary>Hint 2</summary>{{0}} lies outside if the mean is farther from {{0}} than half the width.</details>

# %% [markdown]
# ### The verdicts of lesson 11, seed by seed
#
# Lesson 11's experiment trains all eight seeds in one go, and compares afterwards. Had somebody looked earlier, they would
# have seen this:

# %% machinery "Differences and verdicts from the first few seeds"
LIMITS = {"test": (-8, 5.5), "shifted": (-22, 26), "validation": (-0.004, 0.019), "prose": (-0.3, 0.95)}


def draw_seeds(seeds, score):
    rows = {labels[m]: compare(m, "lora-bf16", score, range(seeds)) for m in others}
    found = {name: paired_interval(row) for name, row in rows.items()}
    sign = -1 if score in ("validation", "prose") else 1
    notes = [says(sign * mean, half) for mean, half in found.values()]
    band = (-2, 2) if sign == 1 else None
    xlabel = f"{score}: {units[score]}, less lora-bf16"
    return plot_intervals(new_axes(height=3.6), found, rows, xlabel, LIMITS[score], band, notes)


# %% alt="Differences to the bf16 base on test from three seeds: all five intervals are wide and reach across both -{{2}} and {{0}}, and the verdict beside each is open."
explore(
    draw_seeds,
    seeds=ipywidgets.IntSlider(min=2, max=8, value=3, description="seeds"),
    score=ipywidgets.Dropdown(options=list(scores), value="test", description="score"),
)

# %% machinery "The verdicts by the number of seeds"
print(f"{'seeds':<8}" + "".join(f"{m:>12}" for m in four_bits))
verdicts = {}
for n in range(2, 9):
    verdicts[n] = [says(*paired_interval(compare(m, "lora-bf16", "test", range(n)))) for m in four_bits]
    print(f"{n:<8}" + "".join(f"{verdict:>12}" for verdict in verdicts[n]))

# %% claims
assert all(verdict == "open" for n in (2, 3) for verdict in verdicts[n])
assert set(verdicts[8]) == {"worse"} and [n for n in verdicts if verdicts[n][0] == "worse"] == [6, 7, 8]

# %% [markdown]
# With three seeds, nothing is shown about any format.
#
# ## 4 · How many seeds?
#
# There are two questions, with different answers. The first: how many until I know the difference to within a
# **margin**?
#
# **Exercise C.4 ●●○ (4 minutes).** Differences spread by `spread`. Find the smallest n, at least {{2}}, with which half
# the width of the {{95}} % interval is at most `margin`.


# %%
def seeds_for_margin(spread, margin):
    """Smallest n whose half width is at most `margin`."""
    ### BEGIN SOLUTION (about 4 lines)
    n = 2
    while t_quantile(n - 1) * spread / math.sqrt(n) > margin:
        n += 1
    return n
    ### END SOLUTION


# %%
check_seeds_for_margin(seeds_for_margin)

# %% [markdown]
# <details><summary>Hint 1</summary>Try n = {{2}}, {{3}}, {{4}}, … in turn: both t and √n depend on n.</details>
# <details><summary>Hint 2</summary>Half the width is t · spread / √n, and t has n − {{1}} degrees of freedom.</details>

# %% [markdown]
# The second question: how many until the interval *excludes* a value, such as {{0}}? That depends on luck, too. If the
# true difference is as far from {{0}} as half the width, the measured one falls short of it in half of all experiments,
# and the verdict is "open". So one asks for more: enough seeds to succeed in {{80}} of {{100}} experiments. That is
# called a **power** of {{80}} %, and `seeds_needed` computes it. ([Dive E](dive_e_beyond_qlora.ipynb) uses it, too.)
#
# **Predict.** NF4 lost {{2.19}} points. How many seeds would show that the loss is more than {{0}}? And more than {{2}}
# points?

# %%
prediction = {"0": ..., "-2": ...}  # ← your guesses: seeds

# %%
nf4 = compare("nf4", "lora-bf16", "test")
print(f"spread {statistics.stdev(nf4):.2f}, mean {statistics.fmean(nf4):+.2f}")
needed = {bound: seeds_needed([x - int(bound) for x in nf4]) for bound in prediction}
for bound, seeds in needed.items():
    print(f"to exclude {bound} in 80 of 100 experiments: {seeds:,} seeds ({told(prediction[bound])})")
print(f"to know it to within 1 point: {seeds_within(statistics.stdev(nf4), 1)} seeds")
effect = abs(statistics.fmean(nf4)) / statistics.stdev(nf4)
print(f"with eight seeds, 0 is excluded in {share_excluding_zero(effect, 8):.0%} of experiments")

# %% claims
assert (needed["0"], needed["-2"]) == (10, 1006) and f"{share_excluding_zero(effect, 8):.2f}" == "0.71"
assert seeds_within(statistics.stdev(nf4), 1) == 20

# %% [markdown]
# **What happened?** The second distance, from {{-statistics.fmean(nf4):.2f}} to {{2}}, is less than a tenth of the
# first and takes a hundred times the seeds, because the standard error shrinks only with √n. (All this takes the
# measured mean and spread for the true ones. They are rough, so the numbers of seeds are rougher.) If the truth lies
# near the boundary, "under {{2}} points?" is not a question that an experiment answers. Ask for a margin instead: to
# within one point takes {{seeds_within(statistics.stdev(nf4), 1)}} seeds. (Eight seeds show a loss like this in
# {{100 * share_excluding_zero(effect, 8):.0f}} of {{100}} experiments, so lesson 11 was a bit lucky.)
#
# **Exercise C.5 ●●○ (3 minutes).** Train two methods of your own at two or three seeds each, or take
# scores that you have. Give the differences and how many minutes a run takes, and see what a verdict would cost. (Such
# runs are for planning. If their mean decides how you go on, count only the seeds that you train afterwards.)

# %%
### BEGIN SOLUTION
### STUB: mine = {"differences": ..., "minutes": ...}  # a list of two or more numbers, and minutes for one run
mine = {"differences": [-1.0, 2.0, 3.0], "minutes": 4}
### END SOLUTION

# %%
check_my_pilot(mine)

# %% [markdown]
# <details><summary>Hint</summary>Two runs of <code>train_qlora</code> for each seed, with <code>--seed 0</code>, <code>1</code> and <code>2</code>, one with and one without
# what you want to try. No time today? <code>[-1.0, 2.0, 3.0]</code>, {{4}} minutes each.</details>

# %% [markdown]
# ## 5 · One run, two hundred answers
#
# Can a single run do, since it has {{200}} answers? At each seed, both adapters answer the same orders, and an order
# that both get right, or both wrong, says nothing about the difference. What counts are the orders that NF4 *lost* or
# *gained*. If the base made no difference, each would be a fair coin. Four lost and none gained: four coins fall all to
# one side, and one side is as good as the other, so {{2}} · (½)⁴ = {{2 / 2**4:.3f}}. That happens easily.
#
# **Exercise C.6 ●●○ (4 minutes).** Write it for any numbers: how probable is it that lost + gained fair coins fall *at
# least* so unevenly, to either side? (This is McNemar's test, in its exact form.)


# %%
def coin(lost, gained):
    """Probability that lost + gained fair coins fall at least as unevenly, to either side."""
    ### BEGIN SOLUTION (about 3 lines)
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)
    ### END SOLUTION


# %%
check_coin(coin)

# %% [markdown]
# <details><summary>Hint 1</summary>k of n coins fall to one side with probability <code>math.comb(n, k) / 2**n</code>.</details>
# <details><summary>Hint 2</summary>Add this for all k up to the rarer of the two, double it, and think of {{3}} and {{3}}.</details>

# %% [markdown]
# **Predict.** In how many of the eight seeds is that probability below {{5}} %, so that the run alone would count as
# proof?

# %%
guess = ...  # ← your guess

# %% machinery "Lost, gained, and the coins' probability, for each seed"
bits = {(run["method"], run["seed"]): [int(bit) for bit in run["exact"]["test"]] for run in runs}
changes = [[bits["nf4", s][i] - bits["lora-bf16", s][i] for i in range(200)] for s in range(8)]
counts = [(each.count(-1), each.count(1)) for each in changes]
chances = [fair_coins(lost, gained) for lost, gained in counts]
for seed, ((lost, gained), chance) in enumerate(zip(counts, chances)):
    print(f"seed {seed}: lost {lost:>2}, gained {gained}, probability {chance:.3f}" + " *" * (chance < 0.05))
print(f"below 5 %: {sum(chance < 0.05 for chance in chances)} ({told(guess)})")

# %% claims
assert counts[2] == (14, 2) and counts[4] == (1, 2) and sum(chance < 0.05 for chance in chances) == 2
assert [f"{chances[s]:.3f}" for s in (2, 4)] == ["0.004", "1.000"]

# %% [markdown]
# **What happened?** Seed `2` alone looks like proof: {{counts[2][0]}} lost, {{counts[2][1]}} gained. Seed `4`
# alone leaves everything open. Both are right about *those two adapters*. The coins know nothing of the next
# training. (They also count Leipzig's six orders as six coins, see lesson 11.)
#
# ## 6 · Cities, by another recipe
#
# Lesson 11 took cities for the luck, with `by_group`. By hand: three orders changed by {{1}}, {{6}} and {{2}} points,
# with the mean {{3}}. The first and the last go to the same city, and together they are −{{2}} − {{1}} = −{{3}} off the
# mean. The other city is {{3}} off. Such sums would be larger only because a city has several orders, so they are divided
# by an average city's number of orders, {{1.5}}. That makes the cities' numbers {{3}} − {{3}}/{{1.5}} = {{1}} and {{3}} +
# {{3}}/{{1.5}} = {{5}}. Their mean is {{3}} again, and what is off in the same direction has added up instead of
# cancelling.
#
# There is another recipe, the **bootstrap**. The {{50}} cities stand in for all cities, so drawing {{50}} out of them,
# some twice and some not at all, imitates another sample. Take the mean of the drawn cities' orders, {{4000:,}} times,
# and see how far the means spread.

# %%
city = [json.loads(chat[-1]["content"])["city"] for chat in load_samples("orders", "test")["messages"]]
by_order = [100 * statistics.fmean(each[i] for each in changes) for i in range(200)]
mean, half = paired_interval(by_group(by_order, city))
low, high = redraw(by_order, city)
print(f"Student's interval over cities: from {mean - half:.2f} to {mean + half:+.2f} points")
print(f"95 % of the redrawn means: from {low:.2f} to {high:+.2f} points")

# %% claims
assert f"{mean - half:.2f} {mean + half:+.2f}" == "-4.85 +0.47" and -5.2 < low < -4.7 and -0.3 < high < 0

# %% [markdown]
# One recipe includes {{0}} and the other excludes it, by a hair. Which is right? Both are approximations, and neither
# is good with one city that outweighs all others. A verdict that hangs on the recipe is no verdict, so lesson 11 says
# "no longer sure". What both recipes agree on is worth more: anything from next to nothing to nearly five points.
#
# Each of these intervals lets *one* kind of luck vary. Other seeds *and* other orders would make it wider still.
#
# ## 7 · Cities that nobody trained on
#
# The orders of `shifted` go to such cities. You can let either the seeds or the cities vary:

# %% machinery "NF4 on shifted, over seeds and over cities"
there = [json.loads(chat[-1]["content"])["city"] for chat in load_samples("orders", "shifted")["messages"]]
exact = {(run["method"], run["seed"]): run["exact"]["shifted"] for run in runs}
by_shifted = [
    100 * statistics.fmean(int(exact["nf4", s][i]) - int(exact["lora-bf16", s][i]) for s in range(8))
    for i in range(len(there))
]
shifted = {
    "8 seeds": paired_interval(compare("nf4", "lora-bf16", "shifted")),
    f"{len(set(there))} cities": paired_interval(by_group(by_shifted, there)),
}
for luck, (mean, half) in shifted.items():
    print(f"NF4 less bf16 on shifted, luck of {luck}: {mean:.1f} ± {half:.1f} points")

# %% claims
assert all(mean + half < -2 for mean, half in shifted.values())

# %% [markdown]
# Both exclude {{0}}. So NF4 loses there, if this was the question from the start. The next section says what changes if
# it was not.
#
# ## 8 · Twenty intervals
#
# Five methods against bf16, by four scores (`validation` is the loss on held-out orders):

# %% machinery "The table"
table = {name: {m: paired_interval(compare(m, "lora-bf16", name)) for m in others} for name in scores}
columns = dict(zip(scores, [(16, 2), (18, 1), (20, 4), (18, 3)]))
print(f"{'less bf16':<11}" + "".join(f"{name + ', ' + units[name]:>{wide}}" for name, (wide, _) in columns.items()))
for m in others:
    cells = {name: (table[name][m], digits) for name, (_, digits) in columns.items()}
    texts = [f"{mean:+.{digits}f} ± {half:.{digits}f}" for (mean, half), digits in cells.values()]
    print(f"{m:<11}" + "".join(f"{text:>{wide}}" for text, (wide, _) in zip(texts, columns.values())))
strict = {(m, name): paired_interval(compare(m, "lora-bf16", name), 1 - 0.05 / 20) for name in scores for m in others}
excluding = sum(abs(mean) > half for row in table.values() for mean, half in row.values())
still = sum(abs(mean) > half for mean, half in strict.values())
print(f"\n{excluding} of 20 exclude 0, and {still} if each is one of twenty, such as:")
for m, name in [("lora-fp32", "prose"), ("int4", "test"), ("nf4", "test"), ("nf4", "shifted")]:
    print(f"{m:<11}{name:<9}{strict[m, name][0]:+.3f} ± {strict[m, name][1]:.3f}")

# %% claims
assert "{:.3f} {:.3f}".format(*table["prose"]["lora-fp32"]) == "-0.054 0.025" and len(others) * len(scores) == 20
assert [f"{mean:.2f} {half:.2f}" for mean, half in table["test"].values()][1] == "-2.19 1.77"
assert [m for m in others if abs(strict[m, "test"][0]) > strict[m, "test"][1]] == ["int4"]
assert not [m for m in others if abs(strict[m, "shifted"][0]) > strict[m, "shifted"][1]]
assert (excluding, still) == (16, 8) and abs(strict["lora-fp32", "prose"][0]) > strict["lora-fp32", "prose"][1]

# %% [markdown]
# The float32 base ends better on prose than bf16, and the interval excludes {{0}}. Is that real? If nothing at all were
# going on, each of the twenty intervals would have its {{5}} %, and one of them would be expected to exclude {{0}}. Here
# {{excluding}} do, so something is going on. But which of them are luck? The usual cure is **Bonferroni's**: share the
# {{5}} % among the twenty, {{0.25}} % each, which makes every interval longer. Then {{still}} are left. float32 still ends
# better on prose, if narrowly. On `test` only INT4's loss is left, and not because it is the largest of the four,
# but because its eight differences spread least. On `shifted` all is open.
#
# Is that fair to NF4? It is, if you went through the twenty to see what comes out. If NF4 on `test`, or on `shifted`, was
# your one question from the start, it needs no correction. So write your main question down before you look.
#
# And the opposite mistake: "no difference was found". Double quantization, compared with plain NF4:

# %%
double = {name: paired_interval(compare("nf4-double", "nf4", name)) for name in scores}
for name, (mean, half) in double.items():
    d = 1 if units[name] == "points" else 3
    print(f"{name:<11}{mean:+.{d}f} ± {half:.{d}f} {units[name]}: from {mean - half:+.{d}f} to {mean + half:+.{d}f}")

# %% claims
assert all(abs(mean) < half for mean, half in double.values())

# %% [markdown]
# All four hold {{0}}. Not seen is not the same as not there, so say how much may hide: on `test`, anything from
# {{double['test'][1] - double['test'][0]:.1f}} points lost to {{double['test'][0] + double['test'][1]:.1f}} gained.
#
# ## 9 · What adapters repair
#
# In lesson 11, the four formats came out close together on orders and far apart on prose. Look at the losses before any
# training, and after training on orders: how far above the bf16 base is each?
#
# **Predict.** What part of NF4's distance is gone after training, on orders and on prose?

# %%
prediction = {"orders": ..., "prose": ...}  # ← your guesses in %: 0 nothing, 100 all, negative: it grew

# %% machinery "Distances before and after"
before = {name: {r["method"]: r["before"][name] for r in runs} for name in ("validation", "prose")}
start = {name: {m: before[name][m] - before[name]["lora-bf16"] for m in four_bits} for name in before}
end = {name: {m: table[name][m][0] for m in four_bits} for name in before}
texts = {"orders": "validation", "prose": "prose"}
gaps = {text: {labels[m]: (start[name][m], end[name][m]) for m in four_bits} for text, name in texts.items()}

# %% alt="Arrows from before to after training: how far above the bf16 base each 4-bit base lies. On orders all four fall to about {{0}} (NF4 from {{start['validation']['nf4']:.2f}} to {{end['validation']['nf4']:.3f}} nats). On prose NF4 and double quantization fall from {{start['prose']['nf4']:.2f}} to {{end['prose']['nf4']:.2f}}, FP4 from {{start['prose']['fp4']:.2f}} to {{end['prose']['fp4']:.2f}}, and INT4 rises from {{start['prose']['int4']:.2f}} to {{end['prose']['int4']:.2f}}."
_, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
plot_repairs(axes, gaps)
for text, name in texts.items():
    print(
        f"{text}: {1 - end[name]['nf4'] / start[name]['nf4']:.0%} of NF4's distance is gone ({told(prediction[text])})"
    )

# %% machinery "The losses behind it"
print("mean loss in nats " + " " * 8 + "".join(f"{m:>12}" for m in ["lora-bf16", *four_bits]))
finished = {name: {m: statistics.fmean(values[name][m]) for m in METHODS} for name in before}
for text, name in texts.items():
    for when, losses, digits in (("before", before[name], 2), ("after", finished[name], 4 if text == "orders" else 2)):
        print(f"{text:<7}{when:<18}" + "".join(f"{losses[m]:>12.{digits}f}" for m in ["lora-bf16", *four_bits]))
print()
for a, b, score in [("int4", "nf4", "validation"), ("int4", "fp4", "validation"), ("nf4", "fp4", "prose")]:
    mean, half = paired_interval(compare(a, b, score))
    print(f"after training, {a} less {b} on {'orders' if score == 'validation' else score}: {mean:+.4f} ± {half:.4f}")
grown = paired_interval([x - start["prose"]["int4"] for x in compare("int4", "lora-bf16", "prose")])
print(f"by how much INT4's distance on prose grew: {grown[0]:+.3f} ± {grown[1]:.3f}")

# %% claims
repaired = {n: {m: f"{100 * (1 - end[n][m] / start[n][m]):.0f}" for m in four_bits} for n in end}
assert list(repaired["validation"].values()) == ["99", "99", "99", "99"]
assert list(repaired["prose"].values()) == ["31", "33", "27", "-28"]
orders = [sorted(four_bits, key=side["validation"].get) for side in (start, end)]
assert orders == [["fp4", "nf4-double", "nf4", "int4"], ["int4", "fp4", "nf4-double", "nf4"]]
repairs = [
    ("int4", "nf4", "validation"),
    ("nf4", "fp4", "prose"),
    ("nf4", "int4", "prose"),
    ("int4", "fp4", "validation"),
]
shown_ = [abs(mean) > half for mean, half in (paired_interval(compare(*which)) for which in repairs)]
assert shown_ == [True, True, True, False] and 0 < grown[0] - grown[1] < 0.005
worse = {m: finished["prose"][m] - before["prose"][m] for m in ["lora-bf16", *four_bits]}
assert all(more > 0.1 for more in worse.values()) and max(worse, key=worse.get) == "int4"
assert worse["lora-bf16"] > max(worse[m] for m in ("nf4", "nf4-double", "fp4"))
validation = load_samples("orders", "validation")["messages"]
assert sum(json.loads(chat[-1]["content"])["city"] == "Leipzig" for chat in validation) == 5 and len(validation) == 200

# %% [markdown]
# **What happened?** On the orders, nearly all that rounding had done is gone, with every format. Even the ranking is
# another one: INT4 began as the worst and ends ahead of NF4. (Ahead of FP4, too? That pair is open.) We know no reason
# for the order.
#
# On prose, which nobody trained on, nothing was repaired: *every* base got worse, because training on orders has side
# effects. bf16 lost {{finished["prose"]["lora-bf16"] - before["prose"]["lora-bf16"]:.2f}} nats and NF4 {{finished["prose"]["nf4"] - before["prose"]["nf4"]:.2f}}. So NF4's distance shrank only
# because bf16 fell farther. INT4 lost the most, {{finished["prose"]["int4"] - before["prose"]["int4"]:.2f}}, and its distance grew, if only just.
#
# So an adapter repairs what it is trained on, and a benchmark near your training data says least about the base. "QLoRA
# loses nothing" is a statement about the benchmark.
#
# <details><summary>Is it Leipzig again?</summary>Five of the {{200}} held-out orders go there. Whether they make the difference, the record cannot say: it keeps one
# sum for each run.</details>
#
# ## 10 · The paper's table
#
# The QLoRA paper fine-tuned LLaMA with {{7}}, {{13}}, {{33}} and {{65}} billion parameters on two data sets each, Alpaca
# and FLAN v2, both of them instructions with answers. It reports the accuracy on MMLU, a test of knowledge with four
# answers to choose from (its table {{4}}). It concludes that NF4 with double quantization (DQ) matches bf16, and that FP4
# "is consistently one percentage point behind". It prints no intervals. You can make them, for the methods stand in
# pairs:

# %% machinery "The paper's table: MMLU, in %"
sizes = ["7B", "7B", "13B", "13B", "33B", "33B", "65B", "65B"]
mmlu = {
    "bf16": [38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5],  # 7B Alpaca, 7B FLAN v2, 13B Alpaca, ... 65B FLAN v2
    "FP4": [37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3],
    "NF4 + DQ": [39.0, 44.5, 47.5, 50.7, 57.3, 59.2, 61.8, 63.9],
}
print(f"{'':<10}" + "".join(f"{size:>7}" for size in sizes))
for name, row in mmlu.items():
    print(f"{name:<10}" + "".join(f"{score:>7}" for score in row))

# %% [markdown]
# How many differences are there, eight or four? Two columns share a model, so they share the rounding errors of one base:
# a base that lost something lost it in both. They fall together, like lesson 11's orders of one city. So `by_group` makes
# one number of each model.
#
# **Predict.** What do the eight differences show, each taken for itself? And the four?

# %%
prediction = {"eight columns": ..., "four models": ...}  # ← FP4 less bf16: "better", "worse" or "open"

# %% alt="The paper's MMLU differences, one dot for each of four models, with mean and {{95}} % interval. NF4 with double quantization less bf16: {{paper['NF4 + DQ less bf16'][0]:+.2f}}, its interval around {{0}}. FP4 less bf16: {{paper['FP4 less bf16'][0]:+.2f}}, its interval wide and holding {{0}}. NF4 less FP4: {{paper['NF4 + DQ less FP4'][0]:+.2f}}, above {{0}}."
pairs = [("NF4 + DQ", "bf16"), ("FP4", "bf16"), ("NF4 + DQ", "FP4")]
columns = {f"{a} less {b}": [x - y for x, y in zip(mmlu[a], mmlu[b])] for a, b in pairs}
models = {name: by_group(each, sizes) for name, each in columns.items()}
paper, by_column = ({name: paired_interval(each) for name, each in of.items()} for of in (models, columns))
_ = plot_intervals(new_axes(height=2.4), paper, models, "MMLU (points)", (-3, 3), (-2, 2))
for name in columns:
    found = {"eight columns": by_column[name], "four models": paper[name]}
    print(f"{name:<20}" + ", ".join(f"{of} {m:+.2f} ± {half:.2f}: {says(m, half)}" for of, (m, half) in found.items()))
print(told(prediction))

# %% claims
assert [f"{mean:+.2f} {half:.2f}" for mean, half in by_column.values()] == ["-0.05 0.74", "-0.85 0.82", "+0.80 0.44"]
assert [f"{mean:+.2f} {half:.2f}" for mean, half in paper.values()] == ["-0.05 1.05", "-0.85 1.53", "+0.80 0.56"]
assert [statistics.fmean(v) for v in mmlu.values()] == [53.0375, 52.1875, 52.9875]
assert sum(difference > 0 for difference in columns["FP4 less bf16"]) == 2
assert sum(each > 0 for each in models["FP4 less bf16"]) == 1
assert -2 < paper["NF4 + DQ less bf16"][0] - paper["NF4 + DQ less bf16"][1] < -0.02 * 53.04

# %% [markdown]
# **What happened?** Eight columns say that FP4 is worse. By model it is open: two of the four models lose much, one a
# little, and one gains. NF4 is ahead of FP4 either way, since all four models agree on that. And NF4 with double
# quantization is within about a point of bf16, so *there* "under {{2}} points" is shown. (Under {{2}} % of {{53}} points
# would be {{0.02 * 53.04:.2f}}, and the interval reaches a bit farther.)
#
# <details><summary>A misprint?</summary>The paper prints {{53.1}} as the mean for NF4 with double quantization. Its eight columns give {{53.0}}.</details>
#
# Why does the paper find no loss where we find two points? Much differs, and nobody has tested what makes the difference:
#
# | | here | the paper |
# |---|---|---|
# | model | SmolLM2, 0.135B | LLaMA, 7B to 65B |
# | judged by | exact JSON, all or nothing | one letter of four |
# | trained on | one narrow task, {{record['settings']['steps']}} steps | two sets of instructions |
#
# It cannot be that MMLU is near the training data: it asks what the base knows, and by section 9 that is where rounding
# should show most.
#
# ## Recap
#
# - An interval is mean ± t · spread / √n. With few seeds the spread may come out too small by accident, and t makes up
#   for it.
# - Decide before you look: which seeds, how many, paired or not. Every choice made afterwards is another chance to be
#   wrong.
# - "Open" is a result. Say how much may hide in it, and count what falls together as one.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
