# %% [markdown]
# # 11 · What did four bits cost?
#
# *"The loss of accuracy is usually under {{2}} %."* Many tutorials say so. They do not say {{2}} % of *what*, nor how
# anybody could know. Train the same model twice, with nothing changed but the seed, and the answers differ by more than
# that.
#
# In this lesson you train four adapters and look at {{48}} that were trained on a GPU. You learn to say what such runs
# show, what they refute and what they leave open, and then you judge a comparison of your own.
#
# | you need | |
# |---|---|
# | time | 28 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 3 GB |
# | GPU | not used: its results are recorded |

# %% machinery "Imports"
import json
import math
import statistics

import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import check_claims, check_my_share, check_paired_difference, progress
from qlora_lab.classroom.lessons.n11.checks import CLAIMS, VERDICTS
from qlora_lab.classroom.lessons.n11.figures import plot_answers, plot_coins, plot_runs
from qlora_lab.classroom.lessons.n11.machinery import race, read_record
from qlora_lab.classroom.plots import new_axes, plot_intervals, told
from qlora_lab.evaluation.intervals import by_group, paired_interval, t_quantile
from qlora_lab.experiments.accuracy import METHODS
from qlora_lab.finetuning import load_samples

# %% [markdown]
# ## 1 · The same race, twice
#
# Two ways to train the same small model: *LoRA* on a base in float32, and *QLoRA* on that base in NF4. All else is
# equal: four steps on the orders of lesson 01, and the **seed**, the number that decides how the adapter begins and in
# which order the samples come. Then we take the **loss** on six orders that were held out: minus the natural logarithm
# of the probability that the right next token gets, averaged over tokens. Its unit is called *nats per token*, and zero
# would be perfect.
#
# **Predict.** By how many per cent is the loss of QLoRA higher, at each seed?

# %%
prediction = {"seed 0": ..., "seed 1": ...}  # ← your guesses, in %

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
lora, qlora = ([race(method, seed) for seed in (0, 1)] for method in ("lora-fp32", "nf4"))
for (seed, guess), a, b in zip(prediction.items(), lora, qlora):
    print(f"{seed}: loss {a:.3f} and {b:.3f} nats per token, {b / a - 1:+.0%} ({told(guess)}),", end=" ")
    print(f"perplexity {math.exp(b - a) - 1:+.0%}")

# %% claims
assert all(0.03 < a < 0.15 and 0.08 < b < 0.4 for a, b in zip(lora, qlora)), (lora, qlora)
assert all(b / a - 1 > 3 * (math.exp(b - a) - 1) for a, b in zip(lora, qlora))

# %% [markdown]
# **What happened?** Two seeds gave two answers, and each answer has two faces. In per cent of the *loss* the difference
# is huge, because the loss is close to zero by now, and any difference is a large part of a very small number.
# *Perplexity* is e to the power of the loss. Its change depends on the difference alone: a tenth of a nat more is
# always about {{10}} % more perplexity.
#
# So say *what* you compare, and never trust a single race.
#
# ## 2 · Forty-eight races
#
# On a GPU, six kinds of base were trained at eight seeds each, for longer, and with all else equal. Each adapter then
# answered {{200}} new orders (`test`), and we count those that are exactly right. We also take its loss on `prose`:
# plain English that has nothing to do with orders.

# %% machinery "Read the record"
record = read_record()
runs = record["runs"]
score = {"test": lambda run: run["exact"]["test"].count("1") / 2, "prose": lambda run: run["after"]["prose"]}
values = {name: {m: [of(run) for run in runs if run["method"] == m] for m in METHODS} for name, of in score.items()}
means = {name: {m: statistics.fmean(v) for m, v in by_method.items()} for name, by_method in values.items()}
four_bits = [name for name, method in METHODS.items() if method.bits < 5]
labels = {name: f"{name}\n{method.bits:g} bits" for name, method in METHODS.items()}
titles = {"test": "orders (test): exactly right, %", "prose": "prose: loss, nats per token"}
settings = record["settings"]
print(f"{record['device']}: {settings['steps']} steps of {settings['batch_size']} orders, rank {settings['rank']}")
for name, method in METHODS.items():
    print(f"{name:<11} {method.bits:>6} bits per parameter of a linear layer: {method.what}")

# %% claims
assert [(run["method"], run["seed"]) for run in runs] == [(m, seed) for seed in range(8) for m in METHODS]
assert len(runs) == 48 and all(len(run["exact"]["test"]) == 200 for run in runs)

# %% [markdown]
# **Predict.** Of {{100}} orders, how many fewer does NF4 get right than a bf16 base? Which of the four 4-bit bases does
# best on orders, and which on prose?

# %%
prediction = {"points lost": ..., "best on orders": ..., "best on prose": ...}  # ← your guesses

# %% alt="Two panels with a row for each of six bases: eight seeds as rings, their mean as a diamond. Orders exactly right: the two dense bases are a little ahead ({{means['test']['lora-bf16']:.1f}} % for bf16, {{means['test']['nf4']:.1f}} % for NF4), but the rings of all six overlap widely. Loss on prose: the rows are apart, from {{means['prose']['lora-fp32']:.2f}} for fp32 over {{means['prose']['nf4']:.2f}} for NF4 to {{means['prose']['int4']:.2f}} for INT4."
_, axes = plt.subplots(1, 2, figsize=(8, 4.6), layout="constrained", sharey=True)
_ = plot_runs(axes, {titles[name]: values[name] for name in titles}, labels)
lost = means["test"]["lora-bf16"] - means["test"]["nf4"]
best = [max(four_bits, key=means["test"].get), min(four_bits, key=means["prose"].get)]
for (what, guess), found in zip(prediction.items(), [f"{lost:.2f}", *best]):
    print(f"{what}: {found} ({told(guess)})")
spreads = [max(each) - min(each) for each in values["test"].values()]
print(f"on orders, seeds of one method are {min(spreads):.0f} to {max(spreads):.0f} points apart")

# %% claims
assert (f"{lost:.2f}", *best) == ("2.19", "int4", "nf4-double")
assert [f"{means['test'][m]:.1f}" for m in METHODS] == ["96.4", "96.8", "94.6", "94.3", "94.1", "95.1"]
assert (min(spreads), max(spreads)) == (4, 8) and max(means["test"].values()) - min(means["test"].values()) < 3
assert all(means["test"][m] < means["test"]["lora-bf16"] for m in four_bits)
assert all(means["prose"][m] > means["prose"]["lora-bf16"] for m in four_bits)
assert max(four_bits, key=means["prose"].get) == "int4"

# %% [markdown]
# **What happened?** Look at the rings on the left. Eight seeds of one and the same method are farther apart than the
# means of any two methods. Whoever compares one run with one run compares mostly luck.
#
# Still there is a pattern: every 4-bit base ends behind bf16, in both panels. And INT4, the plainest of the formats,
# does best of the four on orders and worst on prose. An adapter repairs what it is trained on, here the orders. On
# other text the base's rounding error stays, and there NF4 wins, whose error is smaller.
#
# ### {{2}} % of what?
#
# Here is one and the same cost, NF4 against bf16, in five ways. From now on we count *points*: of {{100}} orders, how
# many fewer are exactly right.

# %% machinery "One cost in five ways"
wrong = [100 - means["test"][m] for m in ("lora-bf16", "nf4")]
ratio = means["prose"]["nf4"] / means["prose"]["lora-bf16"] - 1
nats = means["prose"]["nf4"] - means["prose"]["lora-bf16"]
ways = {
    "points of exact answers": f"{-lost:+.1f} points",
    "right answers": f"{-lost / means['test']['lora-bf16']:+.1%}",
    "wrong answers": f"{wrong[1] / wrong[0] - 1:+.0%}",
    "loss on prose": f"{ratio:+.1%}",
    "perplexity on prose": f"{math.exp(nats) - 1:+.0%}",
}
for name, change in ways.items():
    print(f"{name:<25}{change:>12}")

# %% claims
assert list(ways.values()) == ["-2.2 points", "-2.3%", "+69%", "+3.5%", "+14%"]

# %% [markdown]
# ## 3 · How sure is that?
#
# Both methods had the same eight seeds. At seed `3`, say, both adapters begin with the same numbers and see the same
# orders in the same sequence. So subtract at each seed: luck that both had cancels out. This is called **pairing**.


# %%
def compare(method, base, name):
    """Score of one method less that of another, seed by seed."""
    return [a - b for a, b in zip(values[name][method], values[name][base])]


differences = compare("nf4", "lora-bf16", "test")
mean, spread = statistics.fmean(differences), statistics.stdev(differences)
print("NF4 less bf16, in points, by seed:", *differences)
print(f"mean {mean:+.2f}, spread {spread:.2f}, spread / √8 = {spread / math.sqrt(8):.2f}")

# %% [markdown]
# On average NF4 gets {{-mean:.1f}} of {{100}} orders fewer. Eight *other* seeds would have given another mean. How far
# off may ours be?
#
# 1. A single difference is typically {{spread:.1f}} points off the mean. That is the **spread**, or standard deviation.
# 2. In a mean of eight, some seeds are too high and some too low, and most of their luck cancels. That makes the mean
#    √{{8}} times as steady as a single difference: typically {{spread / math.sqrt(8):.2f}} points off. That is the
#    **standard error**.
# 3. A **{{95}} % interval** reaches so many standard errors to both sides of the mean that in {{95}} of {{100}}
#    experiments it holds the true value. How many does that take?
#
# **Predict.** With hundreds of seeds it takes {{1.96}}. How many with eight seeds, and with two?

# %%
prediction = {"eight": ..., "two": ...}  # ← your guesses, in standard errors

# %%
for seeds, guess in {200: "1.96", 8: told(prediction["eight"]), 2: told(prediction["two"])}.items():
    print(f"{seeds:>3} seeds: {t_quantile(seeds - 1):.2f} standard errors ({guess})")

# %% claims
assert [f"{t_quantile(n - 1):.2f}" for n in (200, 8, 2)] == ["1.97", "2.36", "12.71"]
assert f"{mean:.4f} {spread:.2f} {spread / 8**0.5:.2f}" == "-2.1875 2.12 0.75"

# %% [markdown]
# **What happened?** The spread is only an estimate, too. Two seeds can agree by accident, and then it comes out far too
# small. So the fewer the seeds, the longer the interval must be to be right all the same. These factors are called
# Student's *t*.
#
# **Exercise 11.1 ●●○ (3 minutes).** Write the comparison for a list of `runs` like the record's: the mean of the
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
# From here on, `paired_interval(differences)` does the same. All methods against bf16:

# %% alt="Differences to the bf16 base in points of test, seed by seed, with mean and {{95}} % interval, and a grey band from -{{2}} to +{{2}}. NF4's interval goes from {{ends['nf4'][0]:.1f}} to {{ends['nf4'][1]:.1f}} and crosses the band's edge, as do those of the other 4-bit bases; all lie below {{0}}. That of the fp32 base lies around {{0}}, within the band."
others = [name for name in METHODS if name != "lora-bf16"]
points = {labels[m]: compare(m, "lora-bf16", "test") for m in others}
table = {m: paired_interval(each) for m, each in zip(others, points.values())}
ends = {m: (mean - half, mean + half) for m, (mean, half) in table.items()}
axis = "points of test, less lora-bf16"
_ = plot_intervals(new_axes(height=3.6), dict(zip(points, table.values())), points, axis, (-7, 3), band=(-2, 2))
for m, (mean, half) in table.items():
    print(f"{m:<11}{mean:+.2f} ± {half:.2f}: from {ends[m][0]:+.2f} to {ends[m][1]:+.2f}")

# %% claims
assert [f"{mean:.2f} {half:.2f}" for mean, half in table.values()] == [
    "-0.44 0.69",
    "-2.19 1.77",
    "-2.50 1.67",
    "-2.69 1.69",
    "-1.75 0.87",
]
assert all(low < -2 < high < 0 for low, high in (ends[m] for m in four_bits))

# %% [markdown]
# **Under {{2}} points?** NF4's interval reaches from a loss of {{-ends['nf4'][0]:.1f}} to one of
# {{-ends['nf4'][1]:.1f}}. A cost of {{1}} point fits the data, and so does one of {{3}}. That NF4 costs *something* on
# these {{200}} orders is shown. That it costs less than {{2}} points is neither shown nor refuted. The same holds for
# the other three formats.
#
# ## 4 · Six orders
#
# There is a second source of luck: *which* orders were asked. Each mark is an order that bf16 or NF4, or both, got
# wrong:

# %% alt="For each of eight seeds, a row of marks for the orders that at least one of two adapters gets wrong, hardest first: lost with NF4, gained with NF4, or wrong with both. At the places {{1}} to {{6}} a row has a mark at all six or at none; the rest is scattered, more of it lost than gained."
bits = {(run["method"], run["seed"]): [int(bit) for bit in run["exact"]["test"]] for run in runs}
bf16, nf4 = ([bits[method, seed] for seed in range(8)] for method in ("lora-bf16", "nf4"))
failures = [sum(1 - answers[i] for answers in bf16 + nf4) for i in range(200)]
hardest = sorted((i for i in range(200) if failures[i]), key=lambda i: -failures[i])
_ = plot_answers(new_axes(height=3.4), bf16, nf4, hardest)

# %% [markdown]
# At the places {{1}} to {{6}} the marks go together: at each seed, NF4 has either all six wrong or none. What do these
# six orders have in common?

# %%
chats = load_samples("orders", "test")["messages"]
for i in hardest[1:7]:
    print(chats[i][-2]["content"].splitlines()[-1])
city = [json.loads(chat[-1]["content"])["city"] for chat in chats]
print("Leipzig in all 200:", city.count("Leipzig"))

# %% claims
six = sorted(hardest[1:7])
assert six == [i for i in range(200) if city[i] == "Leipzig"]
assert all(len({answers[i] for i in six}) == 1 for answers in nf4)  # all six or none
assert sum(answers[six[0]] for answers in nf4) == 2

# %% [markdown]
# They all go to Leipzig, and no other order does. One word decides six answers.
#
# **Predict.** Leave these six of {{200}} orders out. What remains of NF4's {{table['nf4'][0]:.2f}} points?

# %%
guess = ...  # ← your guess, in points

# %%
changes = [sum(b[i] - a[i] for a, b in zip(bf16, nf4)) for i in range(200)]  # of each order, in all eight seeds
at_leipzig = sum(changes[i] for i in range(200) if city[i] == "Leipzig")
print(f"answers lost, less those gained: {-sum(changes)}; to Leipzig alone: {-at_leipzig}")
kept = [i for i in range(200) if city[i] != "Leipzig"]
without = [100 * statistics.fmean(b[i] - a[i] for i in kept) for a, b in zip(bf16, nf4)]
left, half = paired_interval(without)
print(f"without Leipzig: {left:+.2f} ± {half:.2f} points ({told(guess)})")

# %% claims
assert (-sum(changes), -at_leipzig) == (35, 19) and f"{left:.2f} {half:.2f}" == "-1.03 1.34"

# %% [markdown]
# **What happened?** More than half of what NF4 loses, {{-at_leipzig}} of {{-sum(changes)}} answers, is one word.
# Without it, a loss is no longer shown. (That is no result: whoever leaves out data after having looked can find
# anything. It tells what the result *hangs on*. Why Leipzig, the record cannot say, since it keeps only right and
# wrong.)
#
# ### Coins that are glued together
#
# How should answers count that fall together? Toss {{60}} coins, and you get about {{30}} heads: good and bad luck
# mostly cancel. Now glue them into ten stacks of six. A stack falls as a whole, six heads or none. There are still
# {{60}} coins, but only ten pieces of luck, and among ten there is less cancelling.

# %% alt="Two histograms of the number of heads among sixty coins, both around {{30}}. Sixty single coins: a narrow hill, from {{min(heads['60 single coins'])}} to {{max(heads['60 single coins'])}}. Ten stacks of six: a low and wide one, from {{min(heads['10 stacks of 6'])}} to {{max(heads['10 stacks of 6'])}}."
draw = torch.Generator().manual_seed(0)
single = torch.randint(2, (10_000, 60), generator=draw).sum(dim=1)
glued = 6 * torch.randint(2, (10_000, 10), generator=draw).sum(dim=1)
heads = {"60 single coins": single.tolist(), "10 stacks of 6": glued.tolist()}
_ = plot_coins(new_axes(height=2.8), heads)
print({name: f"spread {statistics.stdev(counts):.1f} heads" for name, counts in heads.items()})

# %% claims
assert statistics.stdev(heads["10 stacks of 6"]) / statistics.stdev(heads["60 single coins"]) - 6**0.5 < 0.1
assert sum(20 <= count <= 40 for count in heads["60 single coins"]) > 9_900
assert min(heads["10 stacks of 6"]) <= 6 and max(heads["10 stacks of 6"]) >= 54

# %% [markdown]
# Cities are such stacks, though few are as firmly glued as Leipzig. `by_group` makes one number of each city, so that
# {{200}} orders become {{len(set(city))}} pieces of luck. NF4's same mean, with three intervals:

# %% alt="Three {{95}} % intervals for the same mean of {{table['nf4'][0]:.2f}} points, NF4 less bf16. If seeds are the luck, or single orders, they lie below {{0}}. If cities are, it goes from {{luck['cities'][0] - luck['cities'][1]:.1f}} to {{luck['cities'][0] + luck['cities'][1]:+.1f}} and includes {{0}}."
by_order = [100 * change / 8 for change in changes]
pieces = {"seeds": differences, "orders": by_order, "cities": by_group(by_order, city)}
luck = {name: paired_interval(numbers) for name, numbers in pieces.items()}
axis = "points of test, NF4 less bf16"
_ = plot_intervals(new_axes(height=2.4), luck, dict.fromkeys(luck, []), axis, (-7, 3), band=(-2, 2))
for name, (mean, half) in luck.items():
    print(f"if {len(pieces[name]):>3} {name} are the luck: from {mean - half:+.1f} to {mean + half:+.1f} points")

# %% claims
assert [f"{mean:.2f} {half:.2f}" for mean, half in luck.values()] == ["-2.19 1.77", "-2.19 1.54", "-2.19 2.66"]

# %% [markdown]
# - **Seeds**: if we trained again and asked *these* orders, NF4 would lose something, too.
# - **Orders**: this takes them for single coins, which they are not. So it is too short.
# - **Cities**: if we asked for orders to *other* cities, perhaps without Leipzig, even a loss is not shown.
#
# So ask what you want to know about, and count by what falls together.
#
# ## 5 · What can be said
#
# **Exercise 11.2 ●●● (3 minutes).** Six claims about the {{48}} runs. Do the runs show each, refute it, or leave it
# open? Compute what you need with `paired_interval(compare("...", "...", "prose"))`, or `"test"`. On prose the scores
# are losses.

# %%
for name, what in (CLAIMS | {f"{name!r}": meaning for name, meaning in VERDICTS.items()}).items():
    print(f"{name}: {what}")

# %%
### BEGIN SOLUTION
### STUB: verdict = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ..., "F": ...}  # "shown", "refuted" or "open"
verdict = dict.fromkeys("AC", "shown") | {"F": "refuted"} | dict.fromkeys("BDE", "open")
### END SOLUTION

# %%
check_claims(verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>Compare the two methods of the claim with each other, not both with bf16.</details>
# <details><summary>Hint 2</summary>"Costs less than {{2}} points" means that the difference lies above −{{2}}. On which side is the
# interval?</details>

# %% [markdown]
# And what can these runs not say? Nothing about **large models**: in the QLoRA paper, from 7B up, no loss is seen
# ([dive C](dive_c_small_differences.ipynb) makes intervals of its table). Nothing about **other tasks** or longer
# training. Nor **which format is best**: this model's weights had been in {{4}} bits before, on small uniform grids
# ([lesson 04](04_nf4.ipynb)), and that may flatter INT4.
#
# ## 6 · Yours
#
# **Exercise 11.3 ●●○ (2 minutes).** You judged an adapter of your own in lesson 08: of `asked` answers, `right` were
# right. How well is that share known? Write half the width of its {{95}} % interval, in points. (Let a right answer be
# {{100}} and a wrong one {{0}}. Such numbers have a mean and a spread like any others.) Then describe *your* test set:
# how many answers, how many right, and how many groups (customers, documents, days) they come from.


# %%
def known_to(right, asked):
    """Half the width of the 95 % interval of a share of right answers, in points."""
    ### BEGIN SOLUTION (about 2 lines)
    answers = [100.0] * right + [0.0] * (asked - right)
    return paired_interval(answers)[1]
    ### END SOLUTION


### BEGIN SOLUTION
### STUB: mine = {"asked": ..., "right": ..., "groups": ...}  # whole numbers, from your own run
mine = {"asked": 16, "right": 9, "groups": 9}
### END SOLUTION

# %%
check_my_share(known_to, mine)

# %% [markdown]
# <details><summary>Hint 1</summary>Make the list of numbers. Which function that you have already gives half the width?</details>
# <details><summary>Hint 2</summary>No run of your own yet? Take sixteen answers, nine of them right, from nine customers.</details>

# %% [markdown]
# ## Recap
#
# - Say of *what* a percentage is. Here four bits cost {{lost:.1f}} points of exact answers, which is
#   {{wrong[1] / wrong[0] - 1:.0%}} more wrong ones.
# - One run proves nothing. Take several seeds, the same for both methods, subtract at each seed, and give the interval,
#   also where you found nothing.
# - Look at the failures, and count what falls together as one. Six orders to one city were more than half of the
#   effect.
#
# This serves *analyse the loss of accuracy, LoRA against QLoRA*. [Dive C](dive_c_small_differences.ipynb) has the rest:
# how many seeds you need, and what goes wrong if you look too often.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [12 · How do I ship it?](12_ship_it.ipynb)
