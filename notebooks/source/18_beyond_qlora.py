# %% [markdown]
# # 18 · Beyond QLoRA
#
# QLoRA was published in May {{2023}}. Since then dozens of papers have changed something about it: other beginnings, other scales,
# other learning rates, other sixteen numbers. Most of them report that they win, and most of them compare single runs. Should you
# still use QLoRA? In this lesson some of its successors learn the same two tasks from the same samples, eight times each, on the
# same small model. You see what differs, how sure that is, and how easily a winner is made by accident.
#
# | you need | |
# |---|---|
# | time | 50 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 2 GB |
# | GPU | not needed |

# %% machinery "Imports, and the records of one H200"
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import qlora_lab
from qlora_lab.adapters.initialization import low_rank
from qlora_lab.classroom.checks import check_pissa, check_told_apart, progress
from qlora_lab.classroom.lessons.n18.figures import plot_costs, plot_forest, plot_rates, told
from qlora_lab.classroom.plots import new_axes, plot_shares
from qlora_lab.evaluation.intervals import paired_interval, seeds_needed
from qlora_lab.experiments.methods_compared import closest, differences, methods_of, values
from qlora_lab.experiments.record import Record
from qlora_lab.finetuning import load_model, load_samples
from qlora_lab.quantization import quantize, relative_rms

folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record, first, merging = (
    Record.read(folder / f"{name}-nvidia-h200.json") for name in ("methods", "methods-first", "merge-aware")
)
about, TASKS = record.content, ("orders", "diary")
print(f"recorded on one {about['device']}, {about['date']}, by `{about['command']}`")


def mean(method, task, score, **how):
    """A method's mean over its seeds: percent exact, or nats per token."""
    return statistics.fmean(values(record, method, task, score, **how).values())


# %% [markdown]
# ## 1 · A fair race
#
# You know the orders: a sentence comes in, JSON goes out, and every word of the answer stands in the sentence. The second task is
# of another kind. A note has to be rewritten, and the weekday and the time must be worked out:

# %%
for task in ("orders", "diary"):
    for split in ("test", "shifted"):
        *_, asked, answer = load_samples(task, split)[1]["messages"]
        print(f"{task}, {split}: {asked['content']}\n{'':>8}→ {answer['content']}\n")

# %% [markdown]
# *Shifted* samples have other names, other sentences and a distraction. Nobody trained on anything like them.
#
# These are the contestants. Each is QLoRA (rank {{16}} on all linear layers, NF4), changed in one place:
#
# | method | what it changes |
# |---|---|
# | LoRA, 16-bit base | the frozen weights are not quantized |
# | full fine-tuning | no adapter: all weights are trained, in {{32}} bits |
# | rsLoRA | the adapter's output is scaled by α/√r instead of α/r |
# | LoRA+ | B learns {{16}} times as fast as A |
# | LoftQ | A and B begin as the best repair of what quantization lost |
# | PiSSA | A and B begin as the most important part of W, and only the rest is frozen, in {{4}} bits |
# | attention only | the layers of the MLP have no adapter, those of the attention one of a higher rank |
#
# To be fair, all see the same samples in the same order, for {{about['settings']['steps']['orders']}} steps of {{8}} orders and
# {{about['settings']['steps']['diary']}} steps of {{8}} notes. All but full fine-tuning train about {{4.9}} million numbers. And each
# may choose its *learning rate*, since a rate that suits one can ruin another: each ran at three rates, eight times each. The
# rate with the lowest mean loss on {{100}} validation samples was kept, and only its eight runs were judged on {{100}} test samples. So no
# test answer had a say in the choice.
#
# **Predict.** Of these seven, how many get surely more orders right than QLoRA, and how many surely fewer?

# %%
prediction = {"better": ..., "worse": ...}  # ← your guesses

# %% [markdown]
# ## 2 · The forest plot
#
# Seed {{3}} of QLoRA and seed {{3}} of rsLoRA have seen the same samples in the same order, so we compare them with each other. That gives
# eight *paired differences*. You know their interval from the [accuracy lesson](09_accuracy_comparison.ipynb). A plot with such
# an interval in each row is called a *forest plot*.
#
# There is a catch. A {{95}} % interval misses the truth once in twenty times. If all methods were equal and you compared many of
# them, one would probably "win" by luck. So each row has a second, longer interval, the thin line. Its level is raised so far
# that in {{95}} % of such experiments *all* thin lines of a panel hold the truth. (A filled dot is told apart from QLoRA by Holm's test,
# which corrects for the number of comparisons as well, and loses a little less by it.)

# %% machinery "Compare the exact answers"
exact = {task: differences(record, task, "test") for task in TASKS}
verdicts = [d.verdict for d in exact["orders"]]

# %% alt="Forest plot of two panels, exact answers minus QLoRA's in points, with {{95}} % and corrected intervals. Orders: rsLoRA {{exact['orders'][2].mean:+.1f}} and attention only {{exact['orders'][5].mean:+.1f}}, both told apart; LoRA on {{16}} bits {{exact['orders'][0].mean:+.1f}}, PiSSA {{exact['orders'][6].mean:+.1f}}, full fine-tuning {{exact['orders'][1].mean:+.1f}}, LoftQ {{exact['orders'][4].mean:+.1f}} and LoRA+ {{exact['orders'][3].mean:+.1f}}, not told apart. Diary: PiSSA {{exact['diary'][5].mean:+.1f}}, rsLoRA {{exact['diary'][1].mean:+.1f}}, the others within {{3}} points, none told apart."
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
_ = plot_forest(axes, exact, "exact answers minus QLoRA's (points)")

# %%
for task in TASKS:
    print(f"QLoRA, {task}: {mean('QLoRA', task, 'test'):.1f} % exact, shifted {mean('QLoRA', task, 'shifted'):.1f} %")
better, worse = verdicts.count("better"), verdicts.count("worse")
print(
    f"orders: {better} surely better ({told(prediction['better'])}), {worse} surely worse ({told(prediction['worse'])})"
)
pissa_gains = next(d.each for d in exact["diary"] if d.method == "PiSSA")
print("PiSSA minus QLoRA on the diary, seed by seed:", *(f"{gain:+.0f}" for gain in pissa_gains))

# %% claims
assert {d.method: d.verdict for d in exact["orders"]} == {
    "LoRA, 16-bit base": "not told apart",
    "full fine-tuning": "not told apart",
    "rsLoRA": "better",
    "LoRA+": "not told apart",
    "LoftQ": "not told apart",
    "attention only": "worse",
    "PiSSA": "not told apart",
}
assert {d.verdict for d in exact["diary"]} == {"not told apart"} and len(exact["diary"]) == 6
gain = {task: {d.method: d.mean for d in exact[task]} for task in TASKS}
assert gain["orders"]["PiSSA"] > gain["orders"]["LoRA, 16-bit base"] > gain["orders"]["rsLoRA"]
assert f"{gain['diary']['PiSSA']:.2f}" == "14.75" and min(pissa_gains) == -15 and max(pissa_gains) == 43

# %% [markdown]
# **What happened?** On the orders one method is surely better, rsLoRA, and one is surely worse, attention only. (Its diary was
# not run.) On the diary nobody is told apart, not even PiSSA, which gets {{gain['diary']['PiSSA']:.0f}} points more on average. The
# printed line shows why. On one seed it gains {{max(pissa_gains):.0f}} points, on another it loses {{-min(pissa_gains):.0f}}. After {{60}} steps a run may or may not have found
# out how to count weekdays, and that swings the score more than the method does. A paper that showed you the fourth seed, or the
# last, would have a sensation.
#
# Look also at rsLoRA and PiSSA on the orders. PiSSA's mean is higher, but it is rsLoRA that is told apart, since its eight
# differences agree better with each other. The size of a difference and how sure it is are two things.
#
# What else has changed in the model? Here is its loss on plain English, which nobody trained on:

# %%
before = {row["method"]: row["prose_before"] for row in record.rows("stacks", task="diary")}
print(f"{'nats per token of prose':<25}{'before':>8}{'orders':>8}{'diary':>8}")
for method in methods_of(record, "diary"):
    after = [mean(method, task, "prose") for task in TASKS]
    print(f"{method:<25}{before[method]:>8.2f}{after[0]:>8.2f}{after[1]:>8.2f}")

# %% claims
prose = {task: {d.method: d.verdict for d in differences(record, task, "prose")} for task in TASKS}
assert all(prose[task]["LoRA+"] == "worse" for task in TASKS)
assert all(prose[task][m] == "better" for task in TASKS for m in ("LoRA, 16-bit base", "full fine-tuning"))

# %% [markdown]
# Everybody forgets some English. LoRA+ forgets most: after the diary its perplexity is
# e^{{mean('LoRA+', 'diary', 'prose') - mean('QLoRA', 'diary', 'prose'):.1f}} ≈
# {{2.718281828 ** (mean('LoRA+', 'diary', 'prose') - mean('QLoRA', 'diary', 'prose')):.0f}} times QLoRA's. The two methods
# without {{4}} bits began lower, and they end lowest on both tasks. A table of test scores would not have shown you any of this.
#
# **Exercise 18.1 ●●○ (5 minutes).** Write `told_apart(differences, compared)`: whether zero lies outside of the corrected
# interval. `paired_interval(differences, level)` gives the mean and half of the interval's width. With one comparison the level is
# {{0.95}}, so the interval misses in a share of {{0.05}}. With `compared` of them, each may miss only in a share of {{0.05}} / `compared`.


# %%
def told_apart(differences, compared):
    """True if the corrected interval of the mean difference leaves zero out."""
    ### BEGIN SOLUTION (about 2 lines)
    average, half = paired_interval(differences, 1 - 0.05 / compared)
    return abs(average) > half
    ### END SOLUTION


# %%
check_told_apart(told_apart)

# %% [markdown]
# <details><summary>Hint</summary>Compare the size of the mean, <code>abs(...)</code>, with half of the width.</details>
#
# ## 3 · How a winner is made
#
# The experiment above was our second attempt. In the first one, {{14}} methods chose their learning rates among six, with two seeds at
# each rate. Then eight other seeds were compared at the chosen rate, after {{60}} steps of orders. That sounds fair. Among the methods were three bases with other
# sixteen numbers than NF4: AF4 and BOF4, which are derived for blocks, and INT4, which is the crudest of all.
#
# **Predict.** Is the crude INT4 surely worse than NF4 in the first attempt, not told apart, or surely better?

# %%
vote = ...  # "worse", "not told apart" or "better"

# %% machinery "Compare the losses of the first attempt"
attempt = {"orders, first attempt": differences(first, "orders", "validation")}
verdict = {d.method: d.verdict for d in attempt["orders, first attempt"]}

# %% alt="Forest plot of the first attempt: validation loss on the orders minus QLoRA's, {{13}} methods. Seven are surely better: 16-bit LoRA, full fine-tuning, rsLoRA, PiSSA, MLP only, AF4 and INT4. Rank {{64}} is surely worse. DoRA lies at zero with the shortest interval."
fig, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
_ = plot_forest([axes], attempt, "validation loss minus QLoRA's (nats per token; left is better)")

# %%
print(f"INT4 is {verdict['INT4']}; {told(vote)}")
rate_of = {run["method"]: run["rate"] for run in first.rows("runs", task="orders")}
for rate in (0.001, 0.003):
    print(
        f"learning rate {rate:g}:",
        *(f"{m} ({verdict.get(m, 'itself')})" for m in rate_of if rate_of[m] == rate),
        sep="\n   ",
    )
for rate in (0.001, 0.003):
    swept = [row["validation"] for row in first.rows("sweeps", method="QLoRA", task="orders", rate=rate)]
    print(f"QLoRA's two sweeping seeds at {rate:g}:", *(f"{loss:.4f}" for loss in swept))

# %% claims
assert verdict["INT4"] == verdict["AF4"] == verdict["MLP only"] == "better" and verdict["rank 64"] == "worse"
assert [m for m in verdict if verdict[m] == "better"] == [
    "LoRA, 16-bit base", "full fine-tuning", "rsLoRA", "PiSSA", "MLP only", "AF4", "INT4"
]  # fmt: skip
assert rate_of["QLoRA"] == rate_of["DoRA"] == rate_of["rank 64"] == 0.001 and rate_of["INT4"] == rate_of["AF4"] == 0.003
later = {row["rate"]: [] for row in record.rows("rates", method="QLoRA", task="orders")}
for row in record.rows("rates", method="QLoRA", task="orders"):
    later[row["rate"]].append(row["validation"])
assert min(later, key=lambda rate: statistics.fmean(later[rate])) == 0.003

# %% [markdown]
# **What happened?** INT4 beats NF4, "surely", after the correction and with eight seeds. It is an accident, and the last lines show
# where it happened. When QLoRA chose its rate, one of its two seeds had bad luck at {{0.003}}, so it went on with {{0.001}}. INT4 and AF4
# went on with {{0.003}}, which is better for all of them. So the plot does not compare INT4 with NF4. It compares one learning rate with
# another. The methods that chose {{0.001}} as well, DoRA, LoRA+ and rank {{64}}, do not win.
#
# Eight seeds made the comparison sure, but the choice before it hung on two. That is why in the second attempt all eight seeds
# choose. When you read that a method wins, ask how the *baseline's* learning rate was chosen.
#
# ## 4 · The rate decides
#
# This is what the rates did in the second attempt:

# %% machinery "Look up the mean loss at each learning rate"
shown = ("QLoRA", "full fine-tuning", "rsLoRA", "LoRA+", "PiSSA")


def curve(method, task):
    """Mean loss on the validation samples that choose, by learning rate."""
    found = {}
    for row in record.rows("rates", method=method, task=task):
        found.setdefault(row["rate"], []).append(row["validation"])
    return {rate: statistics.fmean(each) for rate, each in found.items()}


curves = {task: {method: curve(method, task) for method in shown} for task in TASKS}
rates = {
    m: [record.rows("runs", method=m, task=task)[0]["rate"] for task in TASKS] for m in methods_of(record, "diary")
}

# %% alt="Two panels of mean validation loss against the learning rate, log scales, for five methods. Each curve falls and rises again, or still falls. QLoRA is lowest at {{0.003}}, rsLoRA at {{0.001}}, PiSSA and full fine-tuning at {{0.0003}}, LoRA+ at {{0.0003}} for the orders and {{0.001}} for the diary."
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
_ = plot_rates(axes, curves)

# %%
for method, (orders, diary) in rates.items():
    print(f"{method:<18} orders {orders:g}, diary {diary:g}")
own = curves["diary"]["QLoRA"]
print(f"QLoRA's diary: {own[0.003]:.3f} at 0.003, {own[0.001]:.3f} at 0.001, {own[0.01]:.3f} at 0.01 nats per token")

# %% claims
assert rates["LoRA, 16-bit base"] == [0.003, 0.003] and rates["full fine-tuning"] == [0.0003, 0.0003]
assert rates["PiSSA"] == [0.0003, 0.0003] and rates["rsLoRA"] == [0.001, 0.001]
assert own[0.001] - own[0.003] > max(abs(d.mean) for d in differences(record, "diary", "validation"))

# %% [markdown]
# A third of the best rate costs QLoRA more loss on the diary than choosing any other method there gains or loses. And at one rate
# for all, PiSSA or QLoRA would look worse than they are: their best rates are ten times apart.
#
# In {{2025}} John Schulman and others compared LoRA with full fine-tuning under the title *LoRA Without Regret*, on models up to a
# thousand times larger. Two of their rules can be read off here. LoRA's best rate is about ten times that of full
# fine-tuning: here it is {{rates['LoRA, 16-bit base'][0] / rates['full fine-tuning'][0]:.0f}} times on both tasks, in a grid with steps
# of three. And LoRA belongs on all layers, not only on the attention: with as many trained numbers, attention only loses
# {{-gain['orders']['attention only']:.0f}} points. Their other rules, about the rank, the amount of data and the batch size, have not been measured here.
#
# ## 5 · What each method changes, by hand
#
# Four of them fit into a few lines each. Here is a real matrix, the embeddings of the bundled model, and LoRA's formula:
# y = W x + (α/r) · B A x.

# %%
model, _ = load_model(device="cpu", compute_dtype=torch.float32)
W = model.get_input_embeddings().weight.detach()[:2048]  # (2048, 576)
rank, alpha = 16, 32
del model

# %% [markdown]
# **rsLoRA** scales by α/√r. With α/r, four times the rank shrinks what A and B add, and a high rank learns slowly:

# %%
for r in (4, 16, 64):
    print(f"rank {r:>2}: LoRA scales by {alpha / r:.2f}, rsLoRA by {alpha / r**0.5:.2f}")

# %% [markdown]
# **LoftQ** lets B A begin as the best repair of the quantization error W − Q. `low_rank` is a singular value decomposition (SVD)
# that keeps the {{16}} largest singular values, which is the best that a product of rank {{16}} can do:

# %%
Q = quantize(W).dequantize()
B, A = low_rank(W - Q, rank)
print(f"error of the base: {relative_rms(W, Q):.4f}; with LoftQ's beginning: {relative_rms(W, Q + B @ A):.4f}")

# %% claims
assert relative_rms(W, Q + B @ A) < relative_rms(W, Q)

# %% [markdown]
# That is little. Rounding errors look like noise, and noise has no {{16}} directions that matter more than the others.
#
# **DoRA** splits a row into its length and its direction. LoRA changes both at once. DoRA's A and B turn the row, and a number m for
# each row says how long it is:

# %%
m = W.norm(dim=1, keepdim=True)  # trained as well; it begins as the rows' lengths
V = W + 0.05 * torch.randn(2048, rank, generator=torch.Generator().manual_seed(0)) @ A  # as if A and B had learned
turned = m * V / V.norm(dim=1, keepdim=True)
print(
    f"row 7: {W[7].norm():.3f} long, LoRA makes it {V[7].norm():.3f}, DoRA keeps {turned[7].norm():.3f} until m learns"
)

# %% [markdown]
# **LoRA+** is one line in the optimizer: two groups of parameters, and B's has {{16}} times the rate.
#
# **Exercise 18.2 ●●● (12 minutes).** Write PiSSA. `torch.linalg.svd(W, full_matrices=False)` gives U, S, V with
# W = U · diag(S) · V and S from large to small. Return A of shape (rank, in), B of shape (out, rank) and `rest`, so that B A is the
# part of W with the largest singular values, and B A + rest is W. (On a 4-bit base `rest` is what is quantized.)


# %%
def pissa(W, rank):
    """A, B and what is frozen."""
    ### BEGIN SOLUTION (about 4 lines)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    B = U[:, :rank] * S[:rank].sqrt()
    A = S[:rank, None].sqrt() * V[:rank]
    return A, B, W - B @ A
    ### END SOLUTION


# %%
check_pissa(pissa)

# %% [markdown]
# <details><summary>Hint 1</summary><code>U[:, :rank] * S[:rank]</code> scales the columns.</details>
# <details><summary>Hint 2</summary>Only the product counts. Giving each of A and B the root of S keeps them equally large.</details>
#
# ## 6 · Survives {{4}} bits
#
# If you merge an adapter into its base and round the sum to {{4}} bits again, most of what it learned is lost: its changes are smaller
# than the steps between two levels. *Merge-aware training* lets the forward pass see the rounded sum, W = round(base + B A). The
# rounding has no useful derivative, so the backward pass acts as if it were not there.


# %% machinery "Look up the answers before and after a merge into NF4"
def after_merge(way):
    """Means over three seeds, merged into NF4: share of exact orders, loss on prose."""
    judged = [row["nf4"] for row in merging.rows("runs", way=way)]
    bits = "".join(one["exact"]["test"] for one in judged)
    return bits.count("1") / len(bits), statistics.fmean(one["after"]["prose"] for one in judged)


merges = {
    f"{task}, {about['settings']['steps'][task]} steps": {
        "QLoRA, adapter beside the base": mean("QLoRA", task, "test") / 100,
        "QLoRA, merged into NF4": mean("QLoRA", task, "test", merged=True) / 100,
    }
    for task in TASKS
}
aware = {steps: {way: after_merge(f"{way}, {steps} steps") for way in ("plain", "nf4")} for steps in (30, 120)}

# %% alt="Bars of exact test answers. Orders: {{mean('QLoRA', 'orders', 'test'):.0f}} % with the adapter beside the base, {{mean('QLoRA', 'orders', 'test', merged=True):.0f}} % merged into NF4. Diary: {{mean('QLoRA', 'diary', 'test'):.0f}} % and {{mean('QLoRA', 'diary', 'test', merged=True):.0f}} %."
_ = plot_shares(new_axes(height=2.2), merges, "exact test answers, mean of eight seeds")

# %%
for steps, found in aware.items():
    for way, (share, loss) in found.items():
        print(
            f"orders, {steps:>3} steps, {way:<5} merged into NF4: {share:4.0%} exact, prose {loss:.1f} nats per token"
        )

# %% claims
assert aware[30]["plain"][0] == aware[120]["plain"][0] == 0
assert aware[120]["nf4"][0] > 0.99 and 0.5 < aware[30]["nf4"][0] < 0.6

# %% [markdown]
# After the usual training a merge into {{4}} bits leaves nothing of the orders, and little of the diary. The printed runs are from
# another record, with three seeds and one fixed learning rate. There *plain* is the usual training, and *nf4* is merge-aware. It
# survives, and after {{120}} steps it survives whole. So if your adapter must end inside of a 4-bit model, this changes more than
# everything else in this lesson. The price stands at the end of each line: the model's English suffers.
#
# ## 7 · What it costs
#
# For time and memory, each method had the GPU to itself, with the usual training step on {{8}} orders:

# %% machinery "Look up the costs; what was kept in memory for other methods is taken off"
alone = {}
for name, row in record.named("alone").items():
    kept = 0.269e9 if name in ("QLoRA", "LoRA, 16-bit base") else 0.807e9  # see data/README.md
    alone[name] = {**row, "peak_allocated": row["peak_allocated"] - kept}

# %% alt="Two panels of bars. Milliseconds a step: QLoRA {{1e3 * alone['QLoRA']['seconds_per_step']:.0f}}, rsLoRA {{1e3 * alone['rsLoRA']['seconds_per_step']:.0f}}, LoRA+ {{1e3 * alone['LoRA+']['seconds_per_step']:.0f}}, DoRA the most with {{1e3 * alone['DoRA']['seconds_per_step']:.0f}}, full fine-tuning the least with {{1e3 * alone['full fine-tuning']['seconds_per_step']:.0f}}. GB at the peak: QLoRA {{alone['QLoRA']['peak_allocated'] / 1e9:.2f}}, DoRA {{alone['DoRA']['peak_allocated'] / 1e9:.2f}}, full fine-tuning {{alone['full fine-tuning']['peak_allocated'] / 1e9:.2f}}, the others between."
fig, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
_ = plot_costs(axes, alone)

# %% claims
ms = {name: round(1e3 * row["seconds_per_step"]) for name, row in alone.items()}
assert ms == {
    "QLoRA": 381, "LoRA, 16-bit base": 234, "full fine-tuning": 157, "rsLoRA": 336, "LoRA+": 276, "attention only": 247,
    "DoRA": 441, "merge-aware": 353, "rank 64": 304, "scales in 32 bits": 294, "rank 4": 293,
}  # fmt: skip
gb = {name: f"{row['peak_allocated'] / 1e9:.2f}" for name, row in alone.items()}
assert list(gb.values()) == ["1.08", "1.24", "2.88", "1.10", "1.10", "0.95", "1.58", "1.01", "1.32", "1.10", "1.04"]

# %% [markdown]
# QLoRA, rsLoRA and LoRA+ compute the same things, and still took {{ms['QLoRA']}}, {{ms['rsLoRA']}} and {{ms['LoRA+']}}
# milliseconds. So differences of a third mean nothing here. With a model this small the GPU waits for Python, and each was measured
# once. What remains: DoRA is the slowest and takes half a GB more than QLoRA, since it works with whole weights once more. Full
# fine-tuning is the fastest, since it has fewer and larger operations, and it takes more than two and a half times the memory. For a
# model of {{7}} billion parameters that would be over {{100}} GB, and that is why QLoRA exists.
#
# ## 8 · How many seeds?
#
# How many seeds would it take to tell two methods apart, four times in five? The answer grows with the square of the spread over the
# difference, so half the difference takes four times the seeds:

# %%
one, other, each, seeds = closest(record, "orders", "test", methods_of(record, "orders"))
print(f"the closest two, {one} and {other}: {statistics.fmean(each):+.3f} points, {math.ceil(seeds):,} seeds")
for d in (exact["orders"][5], exact["orders"][2], exact["diary"][5], exact["diary"][0]):
    print(f"{d.method} and QLoRA, {d.task}: {d.mean:+.1f} points, {math.ceil(seeds_needed(d.each)):,} seeds")

# %% claims
assert [exact["orders"][n].method for n in (5, 2)] == ["attention only", "rsLoRA"]
assert [exact["diary"][n].method for n in (5, 0)] == ["PiSSA", "LoRA, 16-bit base"]
assert (one, other) == ("LoRA, 16-bit base", "rsLoRA") and 6000 < seeds < 6500

# %% [markdown]
# (Without a correction for many comparisons.) Some differences show with three seeds, and others would take thousands. A
# difference that takes thousands of seeds is also one that you will never feel.
#
# ## 9 · What to use tomorrow
#
# 1. Stay with QLoRA: nothing here was better on both tasks for sure, and what leads is QLoRA with one line changed.
# 2. Put the adapter on all linear layers, and try three learning rates before you try a second method.
# 3. If you want to change one line, take rsLoRA with a third of LoRA's rate: it was surely better on the orders, ahead on the diary
#    in seven of eight seeds, and it costs nothing.
# 4. PiSSA had the highest means on both tasks among the 4-bit methods, but that is not sure, and its adapter needs its own base.
# 5. If the model fits in {{16}} bits, LoRA on it keeps more of what the model knew; if it must end in {{4}} bits with the adapter inside,
#    train it merge-aware.
#
# These five sentences come from one model of {{135}} million parameters, two small tasks and eight seeds. DoRA, the codebooks and the
# ranks have only run in the first attempt, whose choice of rates you know now.

# %% claims
assert sum(gained > 0 for gained in next(d.each for d in exact["diary"] if d.method == "rsLoRA")) == 7
four_bits = ("rsLoRA", "LoRA+", "LoftQ", "PiSSA")
assert all(max(four_bits, key=lambda m: mean(m, task, "test")) == "PiSSA" for task in TASKS)

# %% [markdown]
# **Yours.** `python -m qlora_lab.train_qlora --data YOUR_FILE --adapter rslora --lr 5e-4` trains rsLoRA on your own data. (There are also
# `--adapter dora`, `--init loftq` and `--lora-plus 16`.) Run QLoRA and one of them with `--seed 0`, `1` and `2`, and give
# the three differences to `told_apart` before you decide. `python -m qlora_lab.experiments methods --small` repeats this lesson in
# small.

# %%
progress()
