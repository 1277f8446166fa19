# %% [markdown]
# # Dive E · Beyond QLoRA
#
# QLoRA was published in May {{2023}}. Since then dozens of papers have changed something about it: how the adapter begins, its scale,
# its learning rate, the sixteen numbers. Many report that they win. Even PEFT's [careful public
# comparison](https://github.com/huggingface/peft/tree/main/method_comparison) has only one run for each setting. Should you still
# use QLoRA? In this lesson sixteen other ways learn the same two tasks from the same samples on the same small model, eight
# times each. You see what differs and how sure that is. And you see how much hangs on a choice that papers mention in passing.
#
# | you need | |
# |---|---|
# | time | 60 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the records of one H200"
import statistics

import matplotlib.pyplot as plt
import torch

from qlora_lab.adapters.initialization import low_rank
from qlora_lab.classroom.checks import check_other_choices, check_pissa, progress
from qlora_lab.classroom.lessons.dive_e.figures import plot_forest, plot_grid, plot_rates
from qlora_lab.classroom.plots import new_axes, plot_shares, told
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.evaluation.intervals import paired_interval, seeds_needed, share_excluding_zero
from qlora_lab.experiments.methods_compared import (
    best_of_grid,
    chosen_otherwise,
    closest,
    differences,
    losses_by_rate,
    methods_of,
    values,
)
from qlora_lab.experiments.record import Record
from qlora_lab.finetuning import load_samples
from qlora_lab.places import RECORDS
from qlora_lab.quantization import quantize, relative_rms

record, first, merging = (
    Record.read(RECORDS / f"{name}-nvidia-h200.json") for name in ("methods", "methods-first", "merge-aware")
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
# These are the contestants. Each is QLoRA (rank {{16}} on all linear layers, NF4), changed in one place. Section 5 takes four of
# these changes apart:
#
# | method | what it changes |
# |---|---|
# | LoRA, 16-bit base | the frozen weights are not quantized |
# | full fine-tuning | no adapter: all weights are trained, in {{32}} bits |
# | rsLoRA | the adapter's output is scaled by α/√r instead of α/r |
# | LoRA+ | B learns {{16}} times as fast as A |
# | LoftQ | B A begins as the best repair of the weights' rounding errors |
# | PiSSA | B A begins as the most important part of W, and only the rest is frozen, in {{4}} bits |
# | DoRA | each row of W + B A gets a trained length, and A and B only turn it |
# | attention only, MLP only | the other layers have no adapter; the rank is higher, so that as many numbers are trained |
# | rank {{4}}, rank {{64}} | the rank, and α stays |
# | AF4, BOF4, INT4 | sixteen other numbers than NF4's ([dive A](dive_a_better_codebooks.ipynb)); INT4, with equal steps, is the crudest |
# | scales in {{32}} bits | no double quantization |
# | merge-aware | the model is trained as it will be after a merge into {{4}} bits, see section 6 |
#
# All see the same samples in the same order, for {{about['settings']['steps']['orders']}} steps of {{8}} orders and
# {{about['settings']['steps']['diary']}} steps of {{8}} notes. A *learning rate* that suits one method can ruin another, so each may choose its own. All ran
# at three rates, with eight seeds at each:

# %%
trained = {row["method"]: row["trainable"] for row in record.rows("stacks", task="orders")}
for method in methods_of(record, "orders"):
    tried = ", ".join(f"{rate:g}" for rate in losses_by_rate(record, method, "orders"))
    print(f"{method:<18} {trained[method] / 1e6:>6.1f} million trained, rates {tried}")

# %% [markdown]
# The rate with the lowest mean loss on {{100}} validation samples was kept. Only its eight runs were then judged, on {{100}} test
# samples. So no test answer had a say in the choice.
#
# **Predict.** Of these sixteen, how many get surely more orders right than QLoRA, and how many surely fewer?

# %%
prediction = {"better": ..., "worse": ...}  # ← your guesses

# %% [markdown]
# ## 2 · The forest plot
#
# Seed {{3}} of QLoRA and seed {{3}} of rsLoRA have seen the same samples in the same order, so we compare them with each other. Eight
# seeds give eight *paired differences*. You know the interval of their mean from [lesson 11](11_accuracy_comparison.ipynb). A plot
# with such an interval in each row is called a *forest plot*.
#
# There is a catch. A {{95}} % interval misses the truth once in twenty times. If all methods were equal and you compared many of
# them, one would probably "win" by luck. So each row has a second, longer interval, the thin line. With k methods in a panel, each
# thin line may miss only in a share of {{0.05}} / k of all experiments. Then *all* of them hold the truth in at least {{95}} %. (This is
# called Bonferroni's correction.) In this lesson *surely* means that the thin line leaves zero out. Such rows have a colour.

# %% machinery "Compare the exact answers"
exact = {task: differences(record, task, "test") for task in TASKS}
of = {task: {d.method: d for d in exact[task]} for task in TASKS}
verdicts = [d.verdict for d in exact["orders"]]
rest = {task: [d.mean for d in exact[task] if d.verdict == "not told apart"] for task in TASKS}

# %% alt="Forest plot of two panels, exact answers minus QLoRA's in points, {{16}} rows with {{95}} % and corrected intervals. Orders: rank {{4}} at {{of['orders']['rank 4'].mean:+.1f}} in blue with the shortest line, attention only at {{of['orders']['attention only'].mean:+.1f}} and, far to the left, merge-aware at {{of['orders']['merge-aware'].mean:+.0f}} in vermilion; the other thirteen, from {{min(rest['orders']):+.1f}} to {{max(rest['orders']):+.1f}}, are grey. Diary: only merge-aware, at {{of['diary']['merge-aware'].mean:+.0f}}, has a colour; the others lie from {{min(rest['diary']):+.0f}} to {{max(rest['diary']):+.0f}}, and their lines are much longer."
fig, axes = plt.subplots(1, 2, figsize=(8, 5.2), layout="constrained", sharey=True)
_ = plot_forest(axes, exact, "exact answers minus QLoRA's (points)")

# %%
for task in TASKS:
    print(f"{task}: QLoRA gets {mean('QLoRA', task, 'test'):.1f} % right, and the others, in points from that:")
    print(*(f"   {d.method:<18} {d.mean:+5.1f}, thin line ± {d.corrected:.1f}" for d in exact[task]), sep="\n")
better, worse = verdicts.count("better"), verdicts.count("worse")
print(
    f"orders: {better} surely better ({told(prediction['better'])}), {worse} surely worse ({told(prediction['worse'])})"
)

# %%
for method in ("PiSSA", "rank 4"):
    print(f"{method} minus QLoRA on the diary, seeds 0 to 7:", *(f"{gain:+.0f}" for gain in of["diary"][method].each))
print("QLoRA itself, in %:", *(f"{share:.0f}" for share in values(record, "QLoRA", "diary", "test").values()))
rs = of["orders"]["rsLoRA"]
for compared in (1, 7, 16):
    line = paired_interval(rs.each, 1 - 0.05 / compared)[1]
    print(f"rsLoRA's orders: {rs.mean:+.1f} points, line ± {line:.1f} if {compared} methods are compared")

# %% claims
told_apart = {task: {d.method: d.verdict for d in exact[task] if d.verdict != "not told apart"} for task in TASKS}
assert told_apart["orders"] == {"rank 4": "better", "attention only": "worse", "merge-aware": "worse"}
assert told_apart["diary"] == {"merge-aware": "worse"} and len(exact["diary"]) == len(exact["orders"]) == 16
gains, qloras = of["diary"]["PiSSA"].each, values(record, "QLoRA", "diary", "test")
assert max(gains) == 43 and min(gains) == -15
assert (
    max(of["orders"], key=lambda m: of["orders"][m].mean)
    == "PiSSA"
    == max(of["diary"], key=lambda m: of["diary"][m].mean)
)
assert paired_interval(rs.each, 1 - 0.05 / 7)[1] < rs.mean < rs.corrected

# %% [markdown]
# **What happened?** On the orders, only rank {{4}} is surely better, attention only is surely worse, and merge-aware training is far
# behind. (What it is for comes in section 6.) On the diary nothing else is told apart, not even PiSSA, which gets {{of['diary']['PiSSA'].mean:.0f}} points more on
# average. The lines of single seeds show why. On one seed PiSSA gains {{max(gains):.0f}} points, on another it loses {{-min(gains):.0f}}, and QLoRA's own
# runs reach from {{min(qloras.values()):.0f}} to {{max(qloras.values()):.0f}} %. A paper with one run could have reported either.
#
# Rank {{4}} has a smaller mean than PiSSA or rsLoRA. It is told apart because its eight differences agree. How large a difference is
# and how sure it is are two things.
#
# Now read rsLoRA's last lines. An earlier version of this plot had seven rows, and there rsLoRA *was* surely better. Nothing about its runs has
# changed. But whoever looks at sixteen methods gives luck sixteen chances, so each needs better evidence.
#
# Rank {{4}} and rsLoRA have something in common. With α = {{32}}, LoRA's scale α/r is {{32 // 16}} at rank {{16}} and {{32 // 4}} at rank {{4}}, and rsLoRA's α/√r at rank {{16}}
# is {{32 // 4}}, too. So perhaps what helps here is the larger scale, which LoRA gets with a larger α as well. That has not been tried alone. And "surely" covers
# the luck of the seeds only, for one model, {{100}} test samples, and rates tried in steps of three.
#
# What else has changed in the model? Here is its loss on plain English, which nobody trained on: before the training, and after it.

# %% machinery "Look up the loss on prose before, and what each run added"
before = {row["method"]: row["prose_before"] for row in record.rows("stacks", task="diary")}


def added(method, task):
    """What the eight runs added to the loss on prose: the mean, and half of its 95 % interval."""
    return paired_interval([loss - before[method] for loss in values(record, method, task, "prose").values()])


# %%
print("nats per token: before; after orders, after diary (added, ± half of the 95 % interval)")
for method, start in before.items():
    (orders, half), (diary, wide) = added(method, "orders"), added(method, "diary")
    after = f"{start + orders:.2f} ({orders:+.2f} ± {half:.2f})   {start + diary:.2f} ({diary:+.2f} ± {wide:.2f})"
    print(f"{method:<18} {start:.2f}   {after}")

# %% claims
for task in TASKS:
    prose = {d.method: d for d in differences(record, task, "prose")}
    assert prose["LoRA+"].verdict == prose["merge-aware"].verdict == "worse"
    assert min(before, key=lambda m: added(m, task)[0]) == "PiSSA"
    assert sorted(before, key=lambda m: added(m, task)[0])[-2:] == ["LoRA+", "merge-aware"]
    ends = {method: start + added(method, task)[0] for method, start in before.items()}
    assert {"LoRA, 16-bit base", "full fine-tuning"} == set(sorted(ends, key=ends.get)[:2])
    change = [after - before["PiSSA"] + before["QLoRA"] for after in prose["PiSSA"].each]
    shift, width = paired_interval(change, 1 - 0.05 / len(prose))
    assert shift < -width
assert sorted(before, key=before.get)[-2:] == ["PiSSA", "INT4"] and before["LoftQ"] > before["QLoRA"]

# %% [markdown]
# Every method forgets some English. The two methods without {{4}} bits began lowest and end lowest. PiSSA, which began higher than all
# but INT4, forgets least on average. LoRA+ and merge-aware training forget most. But each has the rate that suits the task, and a high rate may be what
# makes a model forget. On the diary LoRA+ chose {{0.001}}, so its B learned at {{0.016}}, five times QLoRA's rate. Whether the method or the
# rate is to blame has not been measured. A table of test scores would have shown you none of this.
#
# ## 3 · The first attempt
#
# The experiment above was our second attempt. In the first one, fourteen of these methods trained on the orders for {{60}} steps. They chose
# among six learning rates, with two seeds at each, and then eight other seeds were compared at the chosen rate.
#
# **Predict.** Is the crude INT4 surely worse than NF4 in the first attempt, not told apart, or surely better?

# %%
vote = ...  # "worse", "not told apart" or "better"

# %% machinery "Compare the losses of the first attempt"
attempt = {"orders, first attempt": differences(first, "orders", "validation")}
verdict = {d.method: d.verdict for d in attempt["orders, first attempt"]}
points = {d.method: d for d in differences(first, "orders", "test")}
rate_of = {run["method"]: run["rate"] for run in first.rows("runs", task="orders")}

# %% alt="Forest plot of the first attempt: validation loss on the orders minus QLoRA's, {{13}} methods. Six are surely better: 16-bit LoRA, full fine-tuning, rsLoRA, PiSSA, AF4 and INT4. Rank {{64}} is surely worse. DoRA lies at zero with the shortest interval."
fig, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
_ = plot_forest([axes], attempt, "validation loss minus QLoRA's (nats per token; left is better)")

# %%
print(f"INT4 is {verdict['INT4']}; {told(vote)}")
print(f"exact test answers: QLoRA {statistics.fmean(values(first, 'QLoRA', 'orders', 'test').values()):.1f} %,")
print(f"   INT4 {points['INT4'].mean:+.1f} points, thin line ± {points['INT4'].corrected:.1f}")
for method in ("QLoRA", "INT4"):
    print(f"{method} chose {rate_of[method]:g}. Losses of the two seeds that chose, at each rate:")
    for rate in (0.001, 0.003):
        swept = [row["validation"] for row in first.rows("sweeps", method=method, task="orders", rate=rate)]
        print(f"   {rate:g}:", *(f"{loss:.4f}" for loss in swept))

# %% claims
assert verdict["INT4"] == verdict["AF4"] == "better" and verdict["rank 64"] == "worse"
assert [m for m in verdict if verdict[m] == "better"] == [
    "LoRA, 16-bit base", "full fine-tuning", "rsLoRA", "PiSSA", "AF4", "INT4"
]  # fmt: skip
assert rate_of["QLoRA"] == 0.001 and rate_of["INT4"] == 0.003 and points["INT4"].verdict == "not told apart"
for task in TASKS:
    assert {record.rows("runs", method=m, task=task)[0]["rate"] for m in ("QLoRA", "INT4")} == {0.003}
    assert {of[task][m].verdict for m in ("INT4", "AF4", "BOF4")} == {"not told apart"}

# %% [markdown]
# **What happened?** INT4 beats NF4 "surely", with eight seeds and after the correction. Before you change your base, read the last
# lines. When QLoRA chose its rate, one of its two seeds did badly at {{0.003}}, so it went on with {{0.001}}. INT4's two seeds did well
# there, and it went on with {{0.003}}. So the plot compares two things at once, sixteen numbers and a learning rate.
#
# In the second attempt all eight seeds choose, and both chose {{0.003}}. INT4 is {{of['orders']['INT4'].mean:+.1f}} ± {{of['orders']['INT4'].corrected:.1f}} points from QLoRA on the orders and
# {{of['diary']['INT4'].mean:+.0f}} ± {{of['diary']['INT4'].corrected:.0f}} on the diary. It is not told apart, and neither are AF4 and BOF4. At equal rates nothing is left of the sure win.
# When you read that a method wins, ask how the *baseline's* learning rate was chosen.
#
# ## 4 · The rate decides
#
# This is what the rates did in the second attempt:

# %% machinery "Look up the mean loss at each learning rate"
shown = ("QLoRA", "full fine-tuning", "rsLoRA", "LoRA+", "PiSSA")
swept = {task: {m: losses_by_rate(record, m, task) for m in methods_of(record, task)} for task in TASKS}
curves = {
    task: {m: {rate: statistics.fmean(each) for rate, each in swept[task][m].items()} for m in shown} for task in TASKS
}
rates = {
    task: {m: record.rows("runs", method=m, task=task)[0]["rate"] for m in methods_of(record, task)} for task in TASKS
}

# %% alt="Two panels of mean validation loss against the learning rate, log scales, for five methods. Each curve falls and rises again, or still falls. QLoRA is lowest at {{0.003}}, rsLoRA at {{0.001}}, PiSSA and full fine-tuning at {{0.0003}}, LoRA+ at {{0.0003}} for the orders and {{0.001}} for the diary."
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
_ = plot_rates(axes, curves)

# %%
for task in TASKS:
    for chosen in sorted(set(rates[task].values())):
        print(f"{task}, rate {chosen:g}:", ", ".join(m for m, rate in rates[task].items() if rate == chosen))
own = curves["diary"]["QLoRA"]
others = [d.mean for d in differences(record, "diary", "validation") if d.method != "merge-aware"]
print(f"QLoRA's diary: {own[0.003]:.3f} at 0.003, {own[0.001]:.3f} at 0.001, {own[0.01]:.3f} at 0.01 nats per token")
print(
    f"the other methods' diary (without merge-aware), each at its best rate: {min(others):+.3f} to {max(others):+.3f} from QLoRA's"
)

# %% claims
assert rates["orders"]["LoRA, 16-bit base"] == rates["diary"]["LoRA, 16-bit base"] == 0.003
assert rates["orders"]["full fine-tuning"] == rates["diary"]["full fine-tuning"] == 0.0003
assert rates["diary"]["LoRA+"] == max(swept["diary"]["LoRA+"]) == 0.001
assert own[0.001] - own[0.003] > max(
    abs(d.mean) for d in differences(record, "diary", "validation") if d.method != "merge-aware"
)

# %% [markdown]
# A third of the best rate costs QLoRA more loss on the diary than any other method gains or loses there, merge-aware training apart. And at
# one rate for all, PiSSA or QLoRA would look worse than they are. LoRA+ chose the largest of its rates for the diary, so it may be
# undervalued here.
#
# In {{2025}} John Schulman and others compared LoRA with full fine-tuning on much larger models, under the title *LoRA Without Regret*.
# Four of their rules can be held against our measurements. LoRA's best rate is about ten times that of full fine-tuning: here it is
# {{rates['orders']['LoRA, 16-bit base'] / rates['orders']['full fine-tuning']:.0f}} times on both tasks, in a grid with steps of about three. LoRA belongs on all layers: attention only loses
# {{-of['orders']['attention only'].mean:.0f}} points. (Its rank is higher at the same α, so its scale is smaller.) A rank must suit the amount of data, and large batches hurt
# LoRA more than full fine-tuning: these were measured on the diary, on a 16-bit base, with two seeds at three rates.

# %% alt="Two panels of validation loss at the best of three rates, log scales, two dots for each mean. Left, over {{50}}, {{200}} and {{2_000}} samples: ranks {{1}}, {{4}}, {{16}}, {{64}} and full fine-tuning fall together from about {{0.2}} to about {{0.02}}, and their dots overlap. Right, over batches of {{4}}, {{16}} and {{64}}: rank {{16}} and full fine-tuning rise together, rank {{16}} a little above."
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
grid = best_of_grid(record)
_ = plot_grid(axes, grid)

# %%
ratios = []
for batch in (4, 16, 64):
    lora, full = (statistics.fmean(grid["batch size"][who][batch]) for who in ("rank 16", "full"))
    ratios.append(lora / full)
    print(f"batch {batch:>2}: rank 16 {lora:.3f}, full fine-tuning {full:.3f}")

# %% claims
at_most = [loss for each in grid["samples"].values() for loss in each[2000]]
assert max(at_most) < 0.04 and all(min(each[50]) > 3 * max(at_most) for each in grid["samples"].values())
assert all(1 < ratio < 1.25 for ratio in ratios)

# %% [markdown]
# How much data there is decides here, and the rank does not: rank {{1}} ends as low as one of full fine-tuning's two seeds. So this task does not
# fill even one rank, and says nothing about the rule. Rank {{16}} ends a little above full fine-tuning at each batch size, by {{100 * (min(ratios) - 1):.0f}} to {{100 * (max(ratios) - 1):.0f}} % and with
# no trend. Two seeds could not show a small one. (Larger batches take fewer steps here, since each run sees {{512}} samples.)
#
# **Exercise E.1 ●●○ (10 minutes).** What if two seeds had chosen here, too? For each learning rate, `losses` has a list with one loss for
# each seed. The seeds stand in the same order everywhere. Let every pair of seeds choose the rate with the lowest mean of its two
# losses. Write `other_choices(losses)`: the share of pairs that would choose another rate than all the seeds together.


# %%
def other_choices(losses):
    """Share of pairs of seeds, from 0 to 1, whose best learning rate is not that of all the seeds."""
    ### BEGIN SOLUTION (about 7 lines)
    count = len(next(iter(losses.values())))

    def best(seeds):
        return min(losses, key=lambda rate: sum(losses[rate][seed] for seed in seeds))

    pairs = [(a, b) for a in range(count) for b in range(a)]
    return sum(best(pair) != best(range(count)) for pair in pairs) / len(pairs)
    ### END SOLUTION


# %%
check_other_choices(other_choices)

# %% [markdown]
# <details><summary>Hint 1</summary>Write a helper first: given some seeds, it returns the best rate. It serves the pairs and all seeds alike.</details>
# <details><summary>Hint 2</summary><code>itertools.combinations</code> gives each pair once.</details>

# %% [markdown]
# Applied to the second attempt:

# %%
for task in TASKS:
    shares = {method: chosen_otherwise(losses) for method, losses in swept[task].items()}
    print(
        f"{task}, pairs that would choose otherwise:", *(f"{m} {share:.0%}" for m, share in shares.items()), sep="\n   "
    )

# %% claims
otherwise = {(task, m): chosen_otherwise(swept[task][m]) for task in TASKS for m in swept[task]}
assert otherwise["orders", "QLoRA"] == otherwise["diary", "QLoRA"] == 0
assert max(otherwise.values()) == otherwise["orders", "full fine-tuning"] == 12 / 28

# %% [markdown]
# For QLoRA any two seeds would have done. For others, up to {{100 * max(otherwise.values()):.0f}} % of the pairs would have chosen another rate, since
# two rates are nearly equally good there. So two seeds do not always mislead, but you cannot know beforehand where they do.
#
# ## 5 · What they change, by hand
#
# Here is a real matrix of the bundled model, and LoRA's formula: y = W x + (α/r) · B A x.

# %%
W = bundled_weight("model.layers.14.mlp.gate_proj.weight").float()  # (1536, 576)
rank, alpha = 16, 32

# %% [markdown]
# **rsLoRA** scales by α/√r. Why the root? B A x is a sum of r products. If they point in random directions, they partly cancel, and
# the sum grows only like √r. Divided by r, it shrinks when the rank grows, and a high rank learns slowly:

# %%
dice = torch.Generator().manual_seed(0)
x = torch.randn(576, 100, generator=dice)
for r in (4, 16, 64):
    A, B = torch.randn(r, 576, generator=dice) / 24, torch.randn(1536, r, generator=dice)  # 24 = √576
    size = (B @ A @ x).square().mean().sqrt()
    print(f"rank {r:>2}: B A x {size:.1f}, times α/r {alpha / r * size:>4.1f}, times α/√r {alpha / r**0.5 * size:.1f}")

# %% [markdown]
# **LoRA+** is one line in the optimizer: A and B are two groups with two rates. Its authors show that in very wide layers, one rate
# for both lets B learn too slowly. The factor of {{16}} worked in their experiments.
#
# **LoftQ** lets B A begin as the best repair of the rounding error W − Q. `low_rank` is a singular value decomposition (SVD)
# that keeps the {{16}} largest singular values, and no product of rank {{16}} comes closer. **PiSSA** takes W itself instead of its error:

# %%
Q = quantize(W).dequantize()
repair, part = (B @ A for B, A in (low_rank(W - Q, rank), low_rank(W, rank)))
print(f"error of the 4-bit base  {relative_rms(W, Q):.4f}")
print(f"with LoftQ's beginning   {relative_rms(W, Q + repair):.4f}")
print(f"with PiSSA's beginning   {relative_rms(W, quantize(W - part).dequantize() + part):.4f}")
print(
    f"PiSSA trains {part.square().sum() / W.square().sum():.0%} of W's squares with {rank} of {min(W.shape)} directions"
)

# %% claims
errors = relative_rms(W, Q), relative_rms(W, Q + repair), relative_rms(W, quantize(W - part).dequantize() + part)
assert errors[0] > errors[1] > errors[2] > 0.9 * errors[0]

# %% [markdown]
# Both make the error a little smaller. LoftQ cannot gain much, because rounding errors look like noise, and noise has no {{16}}
# directions that matter more than the others.
#
# Now look back at the table of prose. LoftQ and PiSSA began with a *higher* loss than QLoRA, PiSSA by
# {{before['PiSSA'] - before['QLoRA']:.2f}}. Yet LoftQ's error is smaller in every matrix by construction, and PiSSA's is in this one. How can that be? The error of
# the weights treats all directions alike, but a model's inputs do not. What a small error does to the loss depends on its direction.
# Which directions matter here, we have not measured. But a smaller error is not yet a better model.
#
# **Exercise E.2 ●●○ (10 minutes).** Write PiSSA without `low_rank`. `torch.linalg.svd(W, full_matrices=False)` gives U, S, Vh with
# W = U · diag(S) · Vh and S from large to small. Return A of shape (rank, in), B of shape (out, rank) and `rest`. B A is to be the part
# of W with the largest singular values, and B A + rest is W. (On a 4-bit base `rest` is what is quantized.)


# %%
def pissa(W, rank):
    """A, B and what is frozen."""
    ### BEGIN SOLUTION (about 4 lines)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    B = U[:, :rank] * S[:rank].sqrt()
    A = S[:rank, None].sqrt() * Vh[:rank]
    return A, B, W - B @ A
    ### END SOLUTION


# %%
check_pissa(pissa)

# %% [markdown]
# <details><summary>Hint 1</summary>Which columns of U, and which rows of Vh, belong to the largest singular values?</details>
# <details><summary>Hint 2</summary>Only the product counts, so S may go into B, into A, or partly into both.</details>

# %% [markdown]
# ## 6 · Survives {{4}} bits
#
# If you merge an adapter into its base and round the sum to {{4}} bits again, most of what it learned is lost. Its changes are smaller
# than the steps between two levels. *Merge-aware training* lets the forward pass see the rounded sum, W = round(base + B A). The
# rounding has no useful derivative, so the backward pass acts as if there were none.


# %% machinery "Look up the answers before and after a merge into NF4"
def judged(way, where):
    """Of the three seeds: exact answers of 100, and loss on prose."""
    found = [row[where] for row in merging.rows("runs", way=way)]
    return [one["exact"]["test"].count("1") for one in found], [one["after"]["prose"] for one in found]


merges = {
    f"{task}, {about['settings']['steps'][task]} steps": {
        "QLoRA, adapter beside the base": mean("QLoRA", task, "test") / 100,
        "QLoRA, merged into NF4": mean("QLoRA", task, "test", merged=True) / 100,
    }
    for task in TASKS
}
WAYS = {
    "usual, adapter beside": ("plain", "beside"), "usual, merged": ("plain", "nf4"), "merge-aware, merged": ("nf4", "nf4")
}  # fmt: skip
aware = {(n, way): judged(f"{how}, {n} steps", where) for n in (30, 120) for way, (how, where) in WAYS.items()}

# %% alt="Bars of exact test answers. Orders: {{mean('QLoRA', 'orders', 'test'):.0f}} % with the adapter beside the base, {{mean('QLoRA', 'orders', 'test', merged=True):.0f}} % merged into NF4. Diary: {{mean('QLoRA', 'diary', 'test'):.0f}} % and {{mean('QLoRA', 'diary', 'test', merged=True):.0f}} %."
_ = plot_shares(new_axes(height=2.2), merges, "exact test answers, mean of eight seeds")

# %%
for (steps, way), (right, prose) in aware.items():
    print(
        f"{steps:>3} steps, {way:<21} exact", *(f"{n:>3}" for n in right), "  prose", *(f"{loss:.2f}" for loss in prose)
    )

# %% claims
for steps in (30, 120):
    assert aware[steps, "usual, merged"][0] == [0, 0, 0]
    assert min(aware[steps, "merge-aware, merged"][1]) > max(aware[steps, "usual, adapter beside"][1])
assert min(aware[120, "merge-aware, merged"][0]) == 99 and max(aware[30, "merge-aware, merged"][0]) == 62

# %% [markdown]
# After the usual training, a merge into {{4}} bits leaves nothing of the orders, and little of the diary. The printed runs are from
# another record, with three seeds and one fixed learning rate. Each number is one run. With merge-aware training, the adapter
# survives in part after {{30}} steps, and nearly whole after {{120}}. The price is the model's English. (Compare its prose with that of the
# adapter beside the base. The usual run has forgotten nothing after the merge, since it is nearly the base again.) With three seeds
# and one rate we can say that the adapter survives, but not how large the price must be.
#
# ## 7 · Memory, and how many seeds
#
# What a step on {{8}} orders needs at its peak, measured once for each method:

# %% machinery "Look up the peaks"
alone = record.named("alone")
peaks = {
    method: alone[method]["peak_allocated"] / 1e9
    for method in ("QLoRA", "LoRA, 16-bit base", "full fine-tuning", "DoRA")
}

# %%
for method, peak in peaks.items():
    print(f"{method:<18} {peak:.1f} GB")
print(f"full fine-tuning of 7 billion weights, 16 bytes each: {7e9 * 16 / 1e9:.0f} GB before the first activation")

# %% claims
assert {m: f"{peak:.1f}" for m, peak in peaks.items()} == {
    "QLoRA": "1.1", "LoRA, 16-bit base": "1.2", "full fine-tuning": "2.9", "DoRA": "1.6"
}  # fmt: skip

# %% [markdown]
# DoRA needs more than QLoRA, since it also computes with whole weights to find the rows' lengths. A model this small hides the great
# difference. A weight that is trained takes {{16}} bytes: itself, its gradient and Adam's two averages, in {{32}} bits each. A frozen one in
# NF4 takes about half a byte. We show no times, since so small a model keeps the GPU waiting for Python, and one measurement of
# that ranks nothing ([dive F](dive_f_why_is_it_slow.ipynb)).
#
# How many seeds would it take to tell two methods apart in four of five experiments? The number grows with the square of the
# spread divided by the difference. So half the difference takes about four times the seeds:


# %% machinery "Round a number of seeds"
def rough(seeds):
    """As text, rounded to one digit: more is not known."""
    return f"roughly {float(f'{seeds:.1g}'):,.0f} seeds"


# %%
one, other, each, seeds = closest(record, "orders", "test", methods_of(record, "orders"))
print(f"the closest two, {one} and {other}: {statistics.fmean(each):+.3f} points, {rough(seeds)}")
orders, diary = of["orders"], of["diary"]
for d in (orders["attention only"], orders["rsLoRA"], diary["PiSSA"], diary["LoRA, 16-bit base"]):
    print(f"{d.method} and QLoRA, {d.task}: {d.mean:+.1f} points, {rough(seeds_needed(d.each))}")
for spreads in (1, 3):
    found = share_excluding_zero(spreads, 3)
    print(f"three seeds find a difference of {spreads} x its spread in {found:.0%} of experiments")

# %% claims
assert (one, other) == ("LoRA, 16-bit base", "rsLoRA") and 5500 < seeds < 6500
assert share_excluding_zero(1, 3) < 0.25 < 0.6 < share_excluding_zero(3, 3)

# %% [markdown]
# These are rough numbers, without a correction for many comparisons. They take the measured difference and spread for the true ones.
# Many seeds do not mean that a difference is small. 16-bit LoRA's points on the diary might matter to you, but its runs differ so
# much that it would take hundreds to be sure.
#
# ## 8 · What to use tomorrow
#
# 1. Stay with QLoRA. Nothing here was surely better on both tasks.
# 2. Put the adapter on all linear layers, and try three learning rates before you try a second method.
# 3. If you want to try one more thing, scale the adapter up: a larger α, or rsLoRA, with a third of the rate. Both ways to a scale of {{8}} had
#    the higher mean on both tasks, and one of the four differences is sure.
# 4. PiSSA had the highest means on both tasks, which is not sure, and surely added less to the loss on English than QLoRA did. Its
#    adapter needs its own base.
# 5. Do not choose a base by its sixteen numbers. Four of them, and the scales' bits, made no sure difference to either task.
# 6. If the model fits in {{16}} bits, leave it there: its English began better than QLoRA's, and ended better on average.
# 7. If it must end in {{4}} bits with the adapter inside, train it merge-aware, longer than here, and measure what it forgets.
#
# These sentences come from one model of {{135}} million parameters, two small tasks and eight seeds.

# %% claims
for task in TASKS:
    assert max(methods_of(record, task), key=lambda m: mean(m, task, "test")) == "PiSSA"
    assert (
        of[task]["rsLoRA"].mean > 0 < of[task]["rank 4"].mean
        and of[task]["scales in 32 bits"].verdict == "not told apart"
    )
assert [of[task][m].verdict for task in TASKS for m in ("rsLoRA", "rank 4")].count("better") == 1

# %% [markdown]
# **Yours.** `python -m qlora_lab.train_qlora --data YOUR_FILE --adapter rslora --lr 5e-4` trains rsLoRA on your own data, with a third of
# that command's usual rate. There are also `--adapter dora`, `--init loftq` and `--lora-plus 16`. Run QLoRA and one of them with
# `--seed 0`, `1` and `2`. Give the three differences to `paired_interval` and to `seeds_needed`. If the interval holds zero, you
# know how many more seeds to plan. `python -m qlora_lab.experiments methods --small` repeats this lesson in small.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
