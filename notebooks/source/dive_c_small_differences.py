# %% [markdown]
# # Dive C · Is that difference real?
#
# [Lesson 11](11_accuracy_comparison.ipynb) compared adapters with an interval that a function computed. Here you
# compute one by hand, see how it goes wrong, plan how many seeds you need, and read a famous table with it. All of it
# answers one question: when two methods differ by a little, is it the methods or luck?
#
# | you need | |
# |---|---|
# | time | 60 minutes |
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
    false_alarms,
    made_up,
    read_record,
    redraw,
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
# - **Why squares?** The deviations themselves add up to zero. Squares do not, and squares of independent luck simply
#   add up.
# - **Why divide by {{3}}?** The deviations are taken from these four numbers' *own* mean, which always lies closer to
#   them than the true mean does. So the squares come out too small, and dividing by n − {{1}} in place of n makes up
#   for it.
# - **Why √{{4}}?** Four variances add up to four times one, so the sum spreads √{{4}} = {{2}} times as wide as one
#   number. The mean is a quarter of the sum: {{2}}/{{4}} = {{1}}/√{{4}} as wide.
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
# <details><summary>Hint</summary>The mean is {{3}}, and the squares of the deviations add up to {{14}}.</details>

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
# If a lucky seed is lucky for both methods, the luck cancels in the difference. Whether it is, the **correlation**
# tells: {{1}} if two lists of numbers rise and fall together, {{0}} if they have nothing to do with each other.
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
    print(f"{m:<11} ± {half:.2f} paired, ± {apart:.2f} as strangers")

# %% claims
assert [f"{correlation:+.2f}" for correlation in correlations] == ["+0.89", "-0.17"]
shorter = {
    m: paired_interval(compare(m, "lora-bf16", "test"))[1] < unpaired_interval(test[m], test["lora-bf16"])[1]
    for m in others
}
assert shorter == {"lora-fp32": True, "nf4": False, "nf4-double": False, "fp4": True, "int4": True}

# %% [markdown]
# **What happened?** float32 and bf16 are so close that both trainings take nearly the same path, and share their luck.
# There, pairing shortens the interval a lot. NF4 is another base, and its luck is its own (as far as eight points can
# tell). There, pairing even lengthens the interval a little.
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
# Each interval alone is wrong in {{5}} % of experiments, as promised. But they are not wrong in the *same* ones.
# Whoever may choose is wrong whenever either is. That is what makes choosing afterwards cheating: you still say
# {{95}} %, and it is no longer true.
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
# open do no harm, but you never stop there. So {{5}} % becomes {{alarms[-1]:.0%}}. Fix the number of seeds first, train
# them all, and look once.
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
# Take seeds away from the real runs and watch verdicts come and go. (Needs a running kernel.)

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

# %%
print(f"{'seeds':<8}" + "".join(f"{m:>12}" for m in four_bits))
verdicts = {}
for n in range(2, 9):
    verdicts[n] = [says(*paired_interval(compare(m, "lora-bf16", "test", range(n)))) for m in four_bits]
    print(f"{n:<8}" + "".join(f"{verdict:>12}" for verdict in verdicts[n]))

# %% claims
assert all(verdict == "open" for n in (2, 3) for verdict in verdicts[n])
assert set(verdicts[8]) == {"worse"} and [n for n in verdicts if verdicts[n][0] == "worse"] == [6, 7, 8]

# %% [markdown]
# With three seeds, a common number in papers, nothing is shown about any format.
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
effect = abs(statistics.fmean(nf4)) / statistics.stdev(nf4)
print(f"with eight seeds, 0 is excluded in {share_excluding_zero(effect, 8):.0%} of experiments")

# %% claims
assert (needed["0"], needed["-2"]) == (10, 1006) and f"{share_excluding_zero(effect, 8):.2f}" == "0.71"

# %% [markdown]
# **What happened?** The second distance, from {{-statistics.fmean(nf4):.2f}} to {{2}}, is less than a tenth of the
# first and takes a hundred times the seeds, because the standard error shrinks only with √n. (All this takes the
# measured mean and spread for the true ones. They are rough, so the numbers of seeds are rougher.) If the truth lies
# near the boundary, "under {{2}} points?" is not a question that an experiment answers. Ask for a margin instead.
#
# **Exercise C.5 ●●○ (3 minutes).** Yours: train two methods of your own at two or three seeds each, or take scores that
# you have. Give the differences and how many minutes a run takes, and see what a verdict would cost.

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
chances = [min(1.0, 2 * sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)) for a, b in counts]
for seed, ((lost, gained), chance) in enumerate(zip(counts, chances)):
    print(f"seed {seed}: lost {lost:>2}, gained {gained}, probability {chance:.3f}" + " *" * (chance < 0.05))
print(f"below 5 %: {sum(chance < 0.05 for chance in chances)} ({told(guess)})")

# %% claims
assert counts[2] == (14, 2) and counts[4] == (1, 2) and sum(chance < 0.05 for chance in chances) == 2
assert [f"{chances[s]:.3f}" for s in (2, 4)] == ["0.004", "1.000"]

# %% [markdown]
# **What happened?** Seed `2` alone is a publishable result: {{counts[2][0]}} lost, {{counts[2][1]}} gained. Seed `4`
# alone says that NF4 costs nothing. Both are right about *those two adapters*. The coins know nothing of the next
# training. (They also count Leipzig's six orders as six coins, see lesson 11.)
#
# ## 6 · Cities, by another recipe
#
# Lesson 11 took cities for the luck, with `by_group`. By hand: three orders changed by {{1}}, {{6}} and {{2}} points,
# with the mean {{3}}. The first and the last go to the same city, and together they are −{{2}} − {{1}} = −{{3}} off the
# mean; the other city is {{3}} off. An average city has {{1.5}} orders, so the cities' numbers are {{3}} −
# {{3}}/{{1.5}} = {{1}} and {{3}} + {{3}}/{{1.5}} = {{5}}. Their mean is {{3}} again, and what is off in the same
# direction adds up instead of cancelling.
#
# There is another recipe, the **bootstrap**: draw {{50}} cities out of the {{50}}, some of them twice and some not at
# all, take the mean of their orders, and do it {{4000:,}} times.

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
# "open". What both recipes agree on is worth more: anything from next to nothing to nearly five points.
#
# And each of these intervals lets *one* kind of luck vary. Other seeds *and* other orders would make it wider still.
#
# ## 7 · Twenty intervals
#
# Five methods against bf16, by four scores:

# %% machinery "The table"
table = {name: {m: paired_interval(compare(m, "lora-bf16", name)) for m in others} for name in scores}
columns = dict(zip(scores, [(16, 2), (18, 1), (20, 4), (18, 3)]))
print(f"{'less bf16':<11}" + "".join(f"{name + ', ' + units[name]:>{wide}}" for name, (wide, _) in columns.items()))
for m in others:
    cells = {name: (table[name][m], digits) for name, (_, digits) in columns.items()}
    texts = [f"{mean:+.{digits}f} ± {half:.{digits}f}" for (mean, half), digits in cells.values()]
    print(f"{m:<11}" + "".join(f"{text:>{wide}}" for text, (wide, _) in zip(texts, columns.values())))
strict = {
    "fp32 on prose": paired_interval(compare("lora-fp32", "lora-bf16", "prose"), 1 - 0.05 / 20),
    "NF4 on test": paired_interval(compare("nf4", "lora-bf16", "test"), 1 - 0.05 / 20),
}
for name, (mean, half) in strict.items():
    print(f"{name}, one of twenty: {mean:+.3f} ± {half:.3f}")

# %% claims
assert "{:.3f} {:.3f}".format(*table["prose"]["lora-fp32"]) == "-0.054 0.025" and len(others) * len(scores) == 20
assert [f"{mean:.2f} {half:.2f}" for mean, half in table["test"].values()][1] == "-2.19 1.77"
assert [abs(mean) > half for mean, half in strict.values()] == [True, False]

# %% [markdown]
# The float32 base ends better on prose than bf16, and the interval excludes {{0}}. Is that real? If nothing at all were
# going on, each of the twenty intervals would have its {{5}} %, and one of them would be expected to exclude {{0}}. The
# usual cure is **Bonferroni's**: share the {{5}} % among the twenty, {{0.25}} % each, which makes every interval longer
# (below the table). Then float32 still ends better on prose, if narrowly, but NF4's loss on `test` is open.
#
# Is that fair to NF4? It is, if you went through the twenty to see what comes out. If NF4 on `test` was your one
# question from the start, it needs no correction, so write your main question down before you look.
#
# And the opposite mistake: "no difference was found". Double quantization, compared with plain NF4:

# %%
double = {name: paired_interval(compare("nf4-double", "nf4", name)) for name in scores}
for name, (mean, half) in double.items():
    print(f"{name:<11}{mean:+.4f} ± {half:.4f} {units[name]}: from {mean - half:+.4f} to {mean + half:+.4f}")

# %% claims
assert all(abs(mean) < half for mean, half in double.values())

# %% [markdown]
# All four hold {{0}}. Not seen is not the same as not there, so say how much may hide: on `test`, anything from
# {{double['test'][1] - double['test'][0]:.1f}} points lost to {{double['test'][0] + double['test'][1]:.1f}} gained.
#
# ## 8 · What adapters repair
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
for a, b, score in [("int4", "nf4", "validation"), ("nf4", "fp4", "prose"), ("nf4", "int4", "prose")]:
    mean, half = paired_interval(compare(a, b, score))
    print(f"{a} less {b} on {score}: {mean:+.4f} ± {half:.4f} nats")

# %% claims
repaired = {n: {m: f"{100 * (1 - end[n][m] / start[n][m]):.0f}" for m in four_bits} for n in end}
assert list(repaired["validation"].values()) == ["99", "99", "99", "99"]
assert list(repaired["prose"].values()) == ["31", "33", "27", "-28"]
orders = [sorted(four_bits, key=side["validation"].get) for side in (start, end)]
assert orders == [["fp4", "nf4-double", "nf4", "int4"], ["int4", "fp4", "nf4-double", "nf4"]]
repairs = [("int4", "nf4", "validation"), ("nf4", "fp4", "prose"), ("nf4", "int4", "prose")]
assert all(abs(mean) > half for mean, half in (paired_interval(compare(*which)) for which in repairs))
validation = load_samples("orders", "validation")["messages"]
assert sum(json.loads(chat[-1]["content"])["city"] == "Leipzig" for chat in validation) == 5 and len(validation) == 200

# %% [markdown]
# **What happened?** On the orders, nearly all that rounding had done is gone, with every format, and the ranking is
# turned about: INT4 began as the worst and ends as the best. On prose, which nobody trained on, most of the distance
# stays, and INT4's *grew*.
#
# An adapter repairs what it is trained on. The rest keeps the rounding error, and gets the training's side effects on
# top. So a benchmark near your training data says least about the base, and "QLoRA loses nothing" is a statement about
# the benchmark.
#
# <details><summary>Is it Leipzig again?</summary>Five of the {{200}} held-out orders go there. Whether they make the difference, the record cannot say: it keeps one
# sum for each run.</details>
#
# ## 9 · What you get for the points
#
# Here each method had the GPU to itself, for a few steps:

# %% machinery "Memory and speed beside the score"
print(f"{'':<12}{'bits':>6}{'peak GB':>9}{'tokens/s':>10}{'test %':>8}")
for m, alone in record["alone"].items():
    print(f"{m:<12}{METHODS[m].bits:>6}{alone['peak_allocated'] / 1e9:>9.2f}", end="")
    print(f"{alone['tokens_per_second']:>10.0f}{statistics.fmean(test[m]):>8.1f}")
peak = {m: alone["peak_allocated"] / 1e9 for m, alone in record["alone"].items()}
stored = 106_168_320 * (16 - 4.5) / 8 / 1e9  # 210 linear layers
print(f"bf16 less NF4: {peak['lora-bf16'] - peak['nf4']:.2f} GB at the peak, {stored:.2f} GB of stored weights")

# %% claims
assert [f"{gigabytes:.2f}" for gigabytes in peak.values()] == ["2.00", "1.24", "1.09", "1.15", "1.21", "1.27"]
speed = {m: alone["tokens_per_second"] for m, alone in record["alone"].items()}
assert max(speed, key=speed.get) == "lora-fp32"

# %% [markdown]
# This model has {{135}} million parameters, so four bits save next to nothing. And each of these numbers is *one*
# measurement. The float32 base comes out fastest, which no arithmetic explains: such small steps keep the GPU waiting
# for its next task, and the waiting varies. Peaks vary less, but not only with the stored weights: what else lies in
# memory at the worst moment differs from method to method, and INT4 saves nothing. That NF4's saving equals that of its
# stored weights may be chance. [Lesson 10](10_memory_comparison.ipynb) measures at 7B, where there is something to
# gain.
#
# ## 10 · The paper's table
#
# The QLoRA paper fine-tuned LLaMA with {{7}}, {{13}}, {{33}} and {{65}} billion parameters on two data sets each, and
# reports the accuracy on MMLU, a test of knowledge with four answers to choose from (its table {{4}}). It concludes
# that NF4 with double quantization matches bf16, and that FP4 "is consistently one percentage point behind". It prints
# no intervals. You can make them, for the eight columns are pairs.
#
# **Predict.** What will the eight differences show, against bf16?

# %%
prediction = {"NF4 + DQ": ..., "FP4": ...}  # ← "better", "worse" or "open"

# %% machinery "The paper's table: MMLU, in %"
mmlu = {
    "bf16": [38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5],  # 7B Alpaca, 7B FLAN v2, 13B Alpaca, ... 65B FLAN v2
    "FP4": [37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3],
    "NF4 + DQ": [39.0, 44.5, 47.5, 50.7, 57.3, 59.2, 61.8, 63.9],
}
for name, row in mmlu.items():
    print(f"{name:<10}" + "".join(f"{score:>7}" for score in row))

# %% alt="The paper's eight MMLU differences for each comparison, with mean and {{95}} % interval. NF4 with double quantization less bf16: {{paper['NF4 + DQ'][0]:+.2f}}, its interval around {{0}}. FP4 less bf16: {{paper['FP4'][0]:+.2f}}, below {{0}}. NF4 less FP4: {{paper['NF4 + DQ less FP4'][0]:+.2f}}, above {{0}}."
points = {m: [a - b for a, b in zip(mmlu[m], mmlu["bf16"])] for m in prediction}
points["NF4 + DQ less FP4"] = [a - b for a, b in zip(mmlu["NF4 + DQ"], mmlu["FP4"])]
paper = {m: paired_interval(numbers) for m, numbers in points.items()}
_ = plot_intervals(new_axes(height=2.4), paper, points, "MMLU (points), less bf16 (or FP4)", (-3, 3), (-2, 2))
for m, guess in prediction.items():
    print(f"{m:<9}{paper[m][0]:+.2f} ± {paper[m][1]:.2f} points: {says(*paper[m])} ({told(guess)})")

# %% claims
assert [f"{mean:+.2f} {half:.2f}" for mean, half in paper.values()] == ["-0.05 0.74", "-0.85 0.82", "+0.80 0.44"]
assert [statistics.fmean(v) for v in mmlu.values()] == [53.0375, 52.1875, 52.9875]
assert sum(difference > 0 for difference in points["FP4"]) == 2
low_end, high_end = (paper["NF4 + DQ"][0] + sign * paper["NF4 + DQ"][1] for sign in (-1, 1))
assert f"{low_end:+.1f} {high_end:+.1f}" == "-0.8 +0.7" and -low_end / 53.04 < 0.02

# %% [markdown]
# **What happened?** At 7B to 65B, on MMLU, the claim stands: NF4 with double quantization is within one point of bf16,
# so *there* "under {{2}} %" is shown. FP4 is behind, if only just, and behind NF4 more clearly. "Consistently" is a bit
# much, since in two of the eight columns FP4 is ahead of bf16. With one run a column, these intervals mix seeds, sizes
# and data sets, and speak of such columns on average.
#
# <details><summary>A misprint?</summary>The paper prints {{53.1}} as the mean for NF4 with double quantization. Its eight columns give {{53.0}}.</details>
#
# Why does the paper lose nothing where we lose about two points? There is no contradiction:
#
# | | here | the paper |
# |---|---|---|
# | model | SmolLM2, 0.135B | LLaMA, 7B to 65B |
# | judged by | exact JSON, all or nothing | one letter of four |
# | trained on | one narrow task, {{record['settings']['steps']}} steps | two sets of instructions |
# | the task needs | what the adapter learns | what the base knows |
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
