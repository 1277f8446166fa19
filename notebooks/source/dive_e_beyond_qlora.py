# %% [markdown]
# # Dive E · Beyond QLoRA
#
# QLoRA was published in May {{2023}}. Since then dozens of papers have changed something about it: how the adapter begins, its scale,
# its learning rate, the sixteen numbers. Many report a win. Even PEFT's [careful comparison](https://github.com/huggingface/peft/tree/main/method_comparison)
# has one run for each setting. Should you still use QLoRA? Here sixteen other ways learn the same two tasks on the same small model,
# eight times each.
#
# | you need | |
# |---|---|
# | time | 60 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the records of one H200"
import dataclasses
import statistics

import matplotlib.pyplot as plt
import torch

from qlora_lab.adapters.initialization import low_rank
from qlora_lab.classroom.checks import check_other_choices, check_pissa, progress
from qlora_lab.classroom.lessons.dive_e.figures import plot_forest, plot_rates
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
about, TASKS, METHODS = record.content, ("orders", "diary"), record.named("methods")
print(f"recorded on one {about['device']}, {about['date']}, by `{about['command']}`")


def mean(method, task, score, **how):
    """A method's mean over its seeds: percent exact, or nats per token."""
    return statistics.fmean(values(record, method, task, score, **how).values())


def beside_qlora(task, score):
    """The others' differences from QLoRA, without merge-aware training, whose adapter is not beside its base."""
    return [d for d in differences(record, task, score) if d.method != "merge-aware"]


# %% [markdown]
# ## 1 · A fair race
#
# You know the orders: a sentence comes in, JSON goes out. In the second task a note is rewritten, and the weekday and the time must be
# worked out:

# %%
for task in TASKS:
    *_, asked, answer = load_samples(task, "test")[1]["messages"]
    print(f"{task}: {asked['content']}\n{'':>7}→ {answer['content']}\n")

# %% [markdown]
# Each contestant is QLoRA (rank {{16}} and α = {{32}} on all linear layers, NF4) with one idea changed:
#
# | method | what it changes |
# |---|---|
# | LoRA, 16-bit base | the frozen weights are not quantized |
# | full fine-tuning | no adapter, nothing quantized: all weights are trained, in {{32}} bits |
# | rsLoRA | the adapter's output is scaled by α/√r instead of α/r |
# | LoRA+ | B learns {{16}} times as fast as A |
# | LoftQ | B A begins as the best repair of the weights' rounding errors (one round; the paper has several) |
# | PiSSA | B A begins as the most important part of W, and only the rest is frozen, in {{4}} bits |
# | DoRA | a trained number sets the length of each row of W + B A; A and B change only its direction |
# | attention only, MLP only | the other layers have no adapter; the rank is {{42}} or {{26}}, so that about as many numbers are trained |
# | rank {{4}}, rank {{64}} | the rank, and so the scale α/r: α stays |
# | AF4, BOF4, INT4 | sixteen other numbers than NF4's: AF4's and BOF4's are meant to round better ([dive A](dive_a_better_codebooks.ipynb)), INT4's have equal steps |
# | scales in {{32}} bits | no double quantization |
# | merge-aware | it is trained as it will be merged into {{4}} bits (section 6) |
#
# All see the same samples in the same order, for {{about['settings']['steps']['orders']}} steps of {{8}} orders and
# {{about['settings']['steps']['diary']}} steps of {{8}} notes. A *learning rate* that suits one method can ruin another, so each
# chose among three, with eight seeds at each:

# %%
trained = {row["method"]: row["trainable"] for row in record.rows("stacks", task="orders")}
tried = {method: tuple(losses_by_rate(record, method, "orders")) for method in methods_of(record, "orders")}
for three in sorted(set(tried.values())):
    print(*(f"{rate:g}" for rate in three), sep=", ", end=" (in brackets: millions of trained numbers)\n   ")
    print(*(f"{m} ({trained[m] / 1e6:.1f})" for m in tried if tried[m] == three), sep=", ")
# %% [markdown]
# The rate with the lowest mean loss on {{100}} validation samples was kept, and its eight runs were judged on {{100}} test samples.
#
# **Predict.** Merge-aware training waits for section 6. Of the other fifteen, how many get surely more orders right than QLoRA, and how many surely fewer?

# %%
prediction = {"better": ..., "worse": ...}  # ← your guesses

# %% [markdown]
# ## 2 · The forest plot
#
# Seed {{3}} of QLoRA and seed {{3}} of rsLoRA saw the same samples, so we subtract. Eight seeds give
# eight *paired differences*. You know the interval of their mean from [lesson 11](11_accuracy_comparison.ipynb). A
# *forest plot* has such an interval in each row.
#
# There is a catch. A {{95}} % interval misses the truth once in twenty times. Of many equal methods, one would probably "win" by luck. So
# each row has a second, longer interval, the thin line. With k methods in a panel, each
# thin line may miss only in a share of {{0.05}} / k of all experiments. Then *all* of them hold the truth in at least {{95}} % (Bonferroni's correction;
# k is {{16}}, section 6's comparison included). In this lesson *surely* means that the thin line leaves zero out.

# %% machinery "Compare the exact answers"
exact = {task: beside_qlora(task, "test") for task in TASKS}
of = {task: {d.method: d for d in exact[task]} for task in TASKS}
verdicts = [d.verdict for d in exact["orders"]]

# %% claims
rest = {task: [d.mean for d in exact[task] if d.verdict == "not told apart"] for task in TASKS}
assert (METHODS["attention only"]["rank"], METHODS["MLP only"]["rank"]) == (42, 26)

# %% alt="Forest plot of two panels, exact answers minus QLoRA's in points, {{15}} rows with {{95}} % and corrected intervals. Orders: rank {{4}} at {{of['orders']['rank 4'].mean:+.1f}} in blue with the shortest line and attention only at {{of['orders']['attention only'].mean:+.1f}} in vermilion; the other thirteen, from {{min(rest['orders']):+.1f}} to {{max(rest['orders']):+.1f}}, are grey. Diary: all are grey, from {{min(rest['diary']):+.0f}} to {{max(rest['diary']):+.0f}}, and most lines are much longer."
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
for task, method in (("diary", "PiSSA"), ("orders", "PiSSA"), ("orders", "rank 4")):
    ours, theirs = ([*values(record, m, task, "test").values()] for m in ("QLoRA", method))
    print(f"{task}, {method} minus QLoRA:", *(f"{gain:+.0f}" for gain in of[task][method].each), end="   ")
    print(f"correlation of their runs {statistics.correlation(ours, theirs):+.2f}")
rs = of["orders"]["rsLoRA"]
for compared in (1, 7, 16):
    line = paired_interval(rs.each, 1 - 0.05 / compared)[1]
    print(f"rsLoRA's orders: {rs.mean:+.1f} points, line ± {line:.1f} if {compared} methods are compared")
chance = 2 / 2**8
print(f"eight equal signs by luck: {chance:.1%}; at least one such row of sixteen: up to {16 * chance:.1%}")

# %% claims
told_apart = {task: {d.method: d.verdict for d in exact[task] if d.verdict != "not told apart"} for task in TASKS}
assert told_apart == {"orders": {"rank 4": "better", "attention only": "worse"}, "diary": {}}
assert {len(exact[task]) for task in TASKS} == {15} and {d.compared for d in exact["orders"]} == {16}
gains, qloras = of["diary"]["PiSSA"].each, values(record, "QLoRA", "diary", "test")
assert max(gains) == 43 and min(gains) == -15 and min(of["orders"]["rank 4"].each) > 0
assert all(max(of[task], key=lambda m: of[task][m].mean) == "PiSSA" for task in TASKS)
for task in TASKS:  # pairing lengthens PiSSA's line
    ours, theirs = (values(record, m, task, "test").values() for m in ("QLoRA", "PiSSA"))
    assert statistics.variance(of[task]["PiSSA"].each) > statistics.variance(ours) + statistics.variance(theirs)
assert paired_interval(rs.each, 1 - 0.05 / 7)[1] < rs.mean < rs.corrected

# %% [markdown]
# **What happened?** On the orders only rank {{4}} is surely better, and attention only surely worse. On the diary nothing is told apart,
# not even PiSSA's {{of['diary']['PiSSA'].mean:.0f}} points. On one seed PiSSA gains {{max(gains):.0f}}, on another it loses {{-min(gains):.0f}}. A paper with one run could report either.
#
# Rank {{4}} has a smaller mean on the orders than PiSSA. But its eight differences there agree: its runs rise and
# fall with QLoRA's (a *correlation* of {{1}} would be in step, {{0}} not at all), so subtracting removes the luck that both had. PiSSA's
# rather fall where QLoRA's rise, and there pairing makes the line longer.
#
# rsLoRA would be surely better among seven methods. With sixteen, luck has more chances. (Rank {{4}} joined late: repeat such a find
# before you trust it.)
#
# "Surely" covers the luck of the seeds only. And it assumes that differences are roughly normal. Without that, only signs count.
# If a method equals QLoRA, its eight differences have one sign in {{100 * chance:.1f}} % of experiments. Times sixteen that is {{1600 * chance:.1f}} %, so by
# signs alone eight seeds could make no row sure.
#
# An exact answer is a blunt score. The loss on validation samples that chose no rate is finer:

# %% machinery "Compare the losses"
losses = {task: beside_qlora(task, "validation") for task in TASKS}
lost = {task: {d.method: d for d in losses[task]} for task in TASKS}

# %% alt="Forest plot of two panels, validation loss minus QLoRA's, {{15}} rows. Orders: {{16}}-bit LoRA and full fine-tuning are surely lower, in blue, attention only surely higher, in vermilion. rsLoRA's corrected line just reaches zero, and rank {{4}} lies close to it. Diary: only attention only, surely higher, has a colour, and the lines are long."
fig, axes = plt.subplots(1, 2, figsize=(8, 5), layout="constrained", sharey=True)
_ = plot_forest(axes, losses, "validation loss minus QLoRA's\n(nats per token; left is better)")

# %%
for task in TASKS:
    print(f"{task}: QLoRA {mean('QLoRA', task, 'validation'):.3f} nats per token, and in addition")
    for d in (lost[task][m] for m in ("LoRA, 16-bit base", "full fine-tuning", "rsLoRA", "rank 4", "INT4")):
        print(f"   {d.method:<18} {d.mean:+.4f}, thin line ± {d.corrected:.4f}")

# %% claims
apart = {task: {m: d.verdict for m, d in lost[task].items() if d.verdict != "not told apart"} for task in TASKS}
assert apart["orders"] == {"LoRA, 16-bit base": "better", "full fine-tuning": "better", "attention only": "worse"}
assert apart["diary"] == {"attention only": "worse"}

# %% [markdown]
# The two methods without {{4}} bits have surely less loss on the orders, which the exact answers did not show. Rank {{4}}'s loss is *not* told apart.
#
# Here is the model's loss on plain English, which nobody trained on, before and after:

# %% machinery "Look up the loss on prose before, and what each run added"
before = {row["method"]: row["prose_before"] for row in record.rows("stacks", task="diary")}


def added(method, task):
    """What the eight runs added to the loss on prose, on average."""
    return mean(method, task, "prose") - before[method]


def added_more(method, task, compared=16):
    """What they added, minus what QLoRA's runs added: the mean, and half the width of its corrected interval."""
    (found,) = (d for d in differences(record, task, "prose") if d.method == method)
    moved = before[method] - before["QLoRA"]
    return found.mean - moved, paired_interval(found.each, 1 - 0.05 / compared)[1]


# %%
few = ("QLoRA", "LoRA, 16-bit base", "full fine-tuning", "rsLoRA", "LoRA+", "LoftQ", "PiSSA", "INT4", "merge-aware")
print("nats per token: before; after orders, after diary (added)")
for method in few:
    start, orders, diary = before[method], added(method, "orders"), added(method, "diary")
    print(f"{method:<18} {start:.2f}   {start + orders:.2f} ({orders:+.2f})   {start + diary:.2f} ({diary:+.2f})")
for task in TASKS:
    ends = {method: start + added(method, task) for method, start in before.items()}
    least, lowest = min(added(method, task) for method in before), " and ".join(sorted(ends, key=ends.get)[:2])
    print(f"{task}: each of {len(before)} methods added {least:.2f} or more; {lowest} end lowest;")
    for method in ("PiSSA", "LoRA+", "merge-aware"):
        (more, line), (_, longer) = added_more(method, task), added_more(method, task, 96)
        print(f"   {method} {more:+.2f} from what QLoRA added, thin line ± {line:.2f} (of 96: ± {longer:.2f})")

# %% claims
for task in TASKS:
    prose = {d.method: d for d in differences(record, task, "prose")}
    assert prose["LoRA+"].verdict == prose["merge-aware"].verdict == "worse"
    assert min(before, key=lambda m: added(m, task)) == "PiSSA"
    assert sorted(before, key=lambda m: added(m, task))[-2:] == ["LoRA+", "merge-aware"]
    ends = {method: start + added(method, task) for method, start in before.items()}
    assert {"LoRA, 16-bit base", "full fine-tuning"} == set(sorted(ends, key=ends.get)[:2])
    moved = {method: added_more(method, task) for method in before if method != "QLoRA"}
    assert [method for method, (more, line) in moved.items() if more < -line] == ["PiSSA"] and len(prose) == 16
    assert {method for method, (more, line) in moved.items() if more > line} == {"LoRA+", "merge-aware"}
assert sorted(before, key=before.get)[-2:] == ["PiSSA", "INT4"] and before["LoftQ"] > before["QLoRA"]

# %% [markdown]
# Every method forgets some English. On the diary LoRA+ and merge-aware training break it: {{mean('LoRA+', 'diary', 'prose'):.2f}} and {{mean('merge-aware', 'diary', 'prose'):.2f}} nats. The two
# without {{4}} bits began lowest and end lowest on average. PiSSA surely added less than QLoRA, LoRA+ and merge-aware training more. Whether the method or its
# rate is to blame has not been measured: PiSSA chose {{0.0003}}, a tenth
# of QLoRA's, and on the diary LoRA+ chose {{0.001}}, so its B learned at {{0.016}}, five times QLoRA's.
#
# These were six panels, and a thin line counts only those of its own. What stays sure if all {{96}} are to hold together?

# %%
for score, panels in (("exact", exact), ("loss", losses)):
    for d in (d for task in TASKS for d in panels[task] if d.verdict != "not told apart"):
        line = paired_interval(d.each, 1 - 0.05 / 96)[1]
        print(f"{d.task}, {score}: {d.method} {d.mean:+.3g} ± {line:.3g}", "" if abs(d.mean) > line else "(no longer)")

# %% claims
stays = {
    (d.task, d.score, d.method)
    for panels in (exact, losses)
    for task in TASKS
    for d in panels[task]
    if abs(d.mean) > paired_interval(d.each, 1 - 0.05 / 96)[1]
}
assert stays == {("orders", "test", "rank 4")} | {
    ("orders", "validation", method) for method in ("full fine-tuning", "attention only")
}
strict = {(m, task): added_more(m, task, 96) for m in before if m != "QLoRA" for task in TASKS}
assert {which for which, (more, line) in strict.items() if abs(more) > line} == {
    ("LoRA+", "diary"), ("merge-aware", "orders"), ("merge-aware", "diary")
}  # fmt: skip
assert sum(len(differences(record, task, s)) for task in TASKS for s in ("test", "validation", "prose")) == 96

# %% [markdown]
# Half of it stays, and of the prose (the last brackets above) merge-aware training's, and LoRA+'s on the diary.
#
# ## 3 · The first attempt
#
# That was our second attempt. In the first one, fourteen of these methods trained on the orders for {{60}} steps. Two seeds chose among six
# learning rates, and then eight others were compared at the chosen one.
#
# **Predict.** Is the crude INT4 surely worse than NF4 in the first attempt, not told apart, or surely better?

# %%
vote = ...  # "worse", "not told apart" or "better"

# %% machinery "Compare the losses of the first attempt"
verdict = {d.method: d.verdict for d in differences(first, "orders", "validation")}
points = {d.method: d for d in differences(first, "orders", "test")}
rate_of = {run["method"]: run["rate"] for run in first.rows("runs", task="orders")}
title = f"orders, first attempt (QLoRA's rate: {rate_of['QLoRA']:g})"
attempt = {
    title: [
        dataclasses.replace(d, method=f"{d.method} · {rate_of[d.method]:g}")
        for d in differences(first, "orders", "validation")
    ]
}

# %% alt="Forest plot of the first attempt: validation loss on the orders minus QLoRA's, {{13}} methods with their rates. Six are surely better: 16-bit LoRA, full fine-tuning, rsLoRA, PiSSA, AF4 and INT4. Rank {{64}} is surely worse. DoRA, at QLoRA's rate, lies at zero with the shortest interval."
fig, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
_ = plot_forest([axes], attempt, "validation loss minus QLoRA's (nats per token; left is better)")

# %%
print(f"INT4 is {verdict['INT4']}; {told(vote)}")
settings = first.content["settings"]
print(f"{settings['steps']['orders']} steps, {len(settings['learning_rate'])} rates. Losses of the two that chose:")
for method in ("QLoRA", "INT4"):
    for rate in (0.001, 0.003):
        chose = [row["validation"] for row in first.rows("sweeps", method=method, task="orders", rate=rate)]
        print(f"   {method} at {rate:g}:", *(f"{loss:.4f}" for loss in chose))
right = statistics.fmean(values(first, "QLoRA", "orders", "test").values())
print(f"exact: QLoRA {right:.1f} %, INT4 {points['INT4'].mean:+.1f} points, thin line ± {points['INT4'].corrected:.1f}")

# %% claims
assert verdict["INT4"] == verdict["AF4"] == "better" and verdict["rank 64"] == "worse"
assert [m for m in verdict if verdict[m] == "better"] == [
    "LoRA, 16-bit base", "full fine-tuning", "rsLoRA", "PiSSA", "AF4", "INT4"
]  # fmt: skip
assert rate_of["QLoRA"] == 0.001 and rate_of["INT4"] == 0.003 and points["INT4"].verdict == "not told apart"
assert [m for m in rate_of if rate_of[m] == 0.001] == ["QLoRA", "DoRA", "LoRA+", "rank 64"]
apart_first = {d.method: d.mean for d in differences(first, "orders", "validation")}
fast = [m for m in rate_of if rate_of[m] == 0.003]
assert [m for m in fast if apart_first[m] > 0] == ["attention only"] and len(fast) == 7
for task in TASKS:
    assert {record.rows("runs", method=m, task=task)[0]["rate"] for m in ("QLoRA", "INT4")} == {0.003}
    assert {found[task][m].verdict for found in (of, lost) for m in ("INT4", "AF4", "BOF4")} == {"not told apart"}

# %% [markdown]
# **What happened?** INT4 beats NF4 "surely". But one of QLoRA's two seeds did badly at {{0.003}}, so
# QLoRA went on with {{0.001}}. INT4's two did well there, and it took {{0.003}}. Look at the rates beside the names: of seven methods with
# {{0.003}}, six lie left of QLoRA. Of three at QLoRA's {{0.001}}, only LoRA+ does, whose B is faster. So
# perhaps the rate won, and not INT4. (Not all is the rate: rank {{64}} is surely worse at QLoRA's own.) It is a suspicion: no eight seeds of QLoRA were trained at {{0.003}} there. And the
# losses are near zero, where {{right:.0f}} % of the answers are right anyway.
#
# In the second attempt all eight seeds chose, and both chose {{0.003}}. There INT4 is not told apart from QLoRA, in loss or answers, on
# either task. But the steps changed as well, from {{60}} to {{about['settings']['steps']['orders']}}. So why the win came is not proved. When you read that a method wins, ask how the *baseline's* learning rate was chosen.
#
# ## 4 · The rate decides
#
# The rates of the second attempt, on the samples that choose:

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
best = {task: {m: min(map(statistics.fmean, by.values())) for m, by in swept[task].items()} for task in TASKS}
for task in TASKS:
    for method in ("QLoRA", "full fine-tuning"):
        print(f"{task}, {method}:", ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in curves[task][method].items()))
    gaps = sorted((best[task][m] - best[task]["QLoRA"], m) for m in best[task] if m not in ("QLoRA", "merge-aware"))
    print("   from QLoRA's best to the others':", *(f"{gap:+.4f} ({m})" for gap, m in (*gaps[:2], *gaps[-2:])))

# %% claims
assert rates["orders"]["LoRA, 16-bit base"] == rates["diary"]["LoRA, 16-bit base"] == 0.003
assert rates["orders"]["full fine-tuning"] == rates["diary"]["full fine-tuning"] == 0.0003
assert rates["diary"]["LoRA+"] == max(swept["diary"]["LoRA+"]) == 0.001
for task, larger in (("orders", {"full fine-tuning", "attention only"}), ("diary", set())):
    cost, ours = curves[task]["QLoRA"][0.001] - curves[task]["QLoRA"][0.003], best[task]["QLoRA"]
    assert {m for m, loss in best[task].items() if abs(loss - ours) > cost} - {"merge-aware"} == larger
full = curves["orders"]["full fine-tuning"]
assert 0 < full[0.0001] - full[0.0003] < 0.0004

# %% [markdown]
# A third of the best rate costs QLoRA {{curves['diary']['QLoRA'][0.001] - curves['diary']['QLoRA'][0.003]:.3f}} on the diary, more than any other method but merge-aware training gains or
# loses there. On the
# orders it costs {{curves['orders']['QLoRA'][0.001] - curves['orders']['QLoRA'][0.003]:.3f}}; full fine-tuning gains more, and attention only loses more. LoRA+ took its largest rate on the diary: it may be undervalued.
#
# In {{2025}} John Schulman and others compared LoRA with full fine-tuning on much larger models (*LoRA Without Regret*). Three of their rules
# can be held against our measurements. LoRA belongs on all layers, above all the MLP's: attention only is surely worse in three of our four panels of
# answers and losses, MLP only in none. LoRA's best rate is about ten times that of full fine-tuning, or fifteen in short runs: the
# chosen rates differ by {{rates['orders']['LoRA, 16-bit base'] / rates['orders']['full fine-tuning']:.0f}}. But on the orders full fine-tuning did nearly as well at {{0.0001}}, so it may be {{30}}. And a rank must suit
# the amount of data: we tried this on the diary, with a 16-bit base and {{100}} steps of {{8}}, which see at most {{800}} of {{"2,000"}} samples:

# %%
grid = best_of_grid(record)["samples"]
print("loss of both seeds on the samples that choose, at the best of three rates")
print("samples:  ", *(f"{count:>14,}" for count in (50, 200, 2000)))
for who, by_count in grid.items():
    print(f"{who:<9}", *("   ".join(f"{loss:.3f}" for loss in by_count[count]).rjust(15) for count in (50, 200, 2000)))

# %% claims
most = [loss for each in grid.values() for loss in each[2000]]
assert max(most) < 0.04 and all(min(each[50]) > 3 * max(most) for each in grid.values())
assert min(grid["rank 64"][200]) > max(*grid["rank 1"][200], *grid["rank 4"][200])
assert max(grid["rank 1"][2000]) < min(grid["rank 64"][2000])
means = {who: {count: statistics.fmean(each) for count, each in by.items()} for who, by in grid.items()}
assert all(max(each[200]) < min(each[50]) for each in grid.values())
assert [who for who in means if means[who][2000] > means[who][200]] == ["rank 1", "rank 4"]
ranks = [who for who in means if who != "full"]
assert all(min(ranks, key=lambda who: means[who][count]) == "rank 1" for count in (50, 200, 2000))
assert min(means, key=lambda who: means[who][2000]) == "full"
assert {panel["attention only"].verdict for panel in (of["orders"], *lost.values())} == {"worse"}

# %% [markdown]
# From {{50}} to {{200}} samples every loss falls. From there to {{"2,000"}}, the means of ranks {{1}} and {{4}} rise, and the others fall. No higher rank
# helps: rank {{1}} has the lowest mean of the four in each column. At {{"2,000"}} full fine-tuning's is lower still. But two seeds can mislead.
#
# **Exercise E.1 ●●○ (10 minutes).** What if two seeds had chosen here, too? For each learning rate, `losses` has a list with one loss for each seed, always in the same order. Let every pair of seeds choose the rate with the lowest mean of its two
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
# <details><summary>Hint 1</summary>Write a helper first: the best rate of some seeds.</details>
# <details><summary>Hint 2</summary><code>itertools.combinations</code> gives each pair once.</details>

# %% [markdown]
# Applied to the second attempt:

# %%
for task in TASKS:
    shares = {method: chosen_otherwise(each) for method, each in swept[task].items()}
    print(f"{task}, pairs that would choose otherwise:", *(f"{m} {share:.0%}," for m, share in shares.items() if share))
    print(f"   no pair: QLoRA and {sum(not share for share in shares.values()) - 1} others")

# %% claims
otherwise = {(task, m): chosen_otherwise(swept[task][m]) for task in TASKS for m in swept[task]}
assert otherwise["orders", "QLoRA"] == otherwise["diary", "QLoRA"] == 0
assert max(otherwise.values()) == otherwise["orders", "full fine-tuning"] == 12 / 28

# %% [markdown]
# For QLoRA any two seeds would have done in this attempt; in the first, two were too few. For others, up to {{100 * max(otherwise.values()):.0f}} % of the pairs would
# have chosen another rate: full fine-tuning's two lower rates are nearly equal on the orders. (Our eight chose and were then compared, so such a method also gets the
# luckier rate.)
#
# ## 5 · What they change, by hand
#
# LoRA's formula is y = W x + (α/r) · B A x. Here is a W, a real matrix of the bundled model:

# %%
W = bundled_weight("model.layers.14.mlp.gate_proj.weight").float()  # (1536, 576)
rank, alpha = 16, 32

# %% [markdown]
# **rsLoRA** scales by α/√r. Why the root? B begins at zero, so the first step makes all of B. Let h = A x be what A hears of an input. With
# plain gradient descent (SGD), each row of B becomes h times a number. So B h adds up r products hⱼ · hⱼ, all of *one* sign, and grows
# like r. The scale acts twice, in B's gradient and in the output. With Adam every entry of B moves by the learning rate, and only the
# gradient's sign counts. So B h adds up r numbers |hⱼ|, and the scale acts once:

# %%
dice = torch.Generator().manual_seed(0)
x, fresh = torch.randn(2, 576, 200, generator=dice)  # 200 inputs, and 200 that have nothing in common with them
print("what the first step adds to the output, per unit of the learning rate, with α/r and with α/√r")
for r in (4, 16, 64):
    A = torch.randn(r, 576, generator=dice) / 24  # 24 = √576
    h, other = A @ x, A @ fresh
    sgd, adam = h.square().sum(0).mean(), h.abs().sum(0).mean()
    off = (h.sign() * other).sum(0).square().mean().sqrt()
    for name, k in (("α/r", alpha / r), ("α/√r", alpha / r**0.5)):
        print(f"rank {r:>2}, {name:<4}  SGD {k * k * sgd:>4.0f}   Adam {k * adam:>3.0f}   fresh inputs {k * off:>2.0f}")

# %%
for method in ("QLoRA", "rank 4", "rank 64", "rsLoRA"):
    how, rate = METHODS[method], rates["orders"][method]
    scale = how["alpha"] / how["rank"] ** (0.5 if how["rank_stabilized"] else 1)
    step = rate * scale * how["rank"]
    print(f"{method:<8} rate {rate:g} x scale {scale:g} x rank {how['rank']} = {step:.3f}", end="   ")
    print("losses at 0.001:", *(f"{statistics.fmean(swept[task][method][0.001]):.3f}" for task in TASKS))

# %% claims
moved = {m: rates[task][m] * METHODS[m]["alpha"] for m in ("QLoRA", "rank 4", "rank 64") for task in TASKS}
at_third = {
    task: {m: statistics.fmean(swept[task][m][0.001]) for m in ("rank 4", "QLoRA", "rank 64")} for task in TASKS
}
assert all(list(each.values()) == sorted(each.values()) for each in at_third.values())
assert len(set(moved.values())) == 1 and all(rates[task]["rsLoRA"] == 0.001 for task in TASKS)

# %% [markdown]
# The root keeps *SGD's* step equal at all ranks. With Adam, which trains here, α/r does, and with α/√r a high rank takes larger steps. (On
# fresh inputs the signs are random, products cancel, and the sum grows like √r. There the root is right.) And our runs? Ranks {{4}}, {{16}} and {{64}} chose the same rate; SGD's column would have them {{16}}-fold apart. But at a third of it, where a longer step
# helps, rank {{4}} is ahead and rank {{64}} behind on both tasks, as in the last column and not in Adam's.
#
# At rank {{16}}, rsLoRA *is* LoRA with an α of {{128}}. By lesson 06 that is B's learning rate times four, as in LoRA+ with a factor of {{4}}. (It was made for high ranks; we tried it at none.)
# Rank {{4}} has the same scale, {{8}}, but a quarter as many products: its step is as long as QLoRA's by Adam's column, and twice as long on
# fresh inputs. (In [dive D](dive_d_training_tricks.ipynb) rank {{4}} was worse: α fell with it.) If its win is more than luck, it may be the low rank's or the longer step's.
#
# **LoftQ** lets B A begin as the best repair of the rounding error W − Q. `low_rank` is a singular value decomposition (SVD)
# that keeps the {{16}} largest singular values, and no product of rank {{16}} comes closer. **PiSSA** takes W itself instead of its error:

# %%
Q = quantize(W).dequantize()
repair, part = (B @ A for B, A in (low_rank(W - Q, rank), low_rank(W, rank)))
print(f"error of the 4-bit base  {relative_rms(W, Q):.4f}")
print(f"with LoftQ's beginning   {relative_rms(W, Q + repair):.4f}")
print(f"with PiSSA's beginning   {relative_rms(W, quantize(W - part).dequantize() + part):.4f}")
noise = torch.randn(W.shape, generator=dice)
for name, whole in (("the rounding error", W - Q), ("W", W), ("noise of this shape", noise)):
    B, A = low_rank(whole, rank)
    share = (B @ A).square().sum() / whole.square().sum()
    print(f"{rank} of {min(W.shape)} directions hold {share:.0%} of the squares of {name}")

# %% claims
errors = relative_rms(W, Q), relative_rms(W, Q + repair), relative_rms(W, quantize(W - part).dequantize() + part)
assert errors[0] > errors[1] > errors[2] > 0.9 * errors[0]
held = float(repair.square().sum() / (W - Q).square().sum())
assert abs((1 - held) ** 0.5 - errors[1] / errors[0]) < 1e-3

# %% [markdown]
# Both make the error a little smaller: {{16}} directions hold {{100 * held:.0f}} % of its squares, so its length, the root, is {{100 * (1 - errors[1] / errors[0]):.0f}} % shorter without them.
#
# Yet LoftQ and PiSSA began with a *higher* loss on prose than QLoRA, PiSSA by {{before['PiSSA'] - before['QLoRA']:.1f}}. A likely reason, not measured: the error of the
# weights treats all directions alike, but a model's inputs do not.
#
# **Exercise E.2 ●●○ (5 minutes).** Write PiSSA without `low_rank`. `torch.linalg.svd(W, full_matrices=False)` gives U, S, Vh with
# W = U · diag(S) · Vh and S from large to small. Return A of shape (rank, in), B of shape (out, rank) and `rest`. B A is to be the part
# of W with the largest singular values, and B A + rest is W. (The scale is {{1}} here. In our race it is {{2}}, so A and B are each divided by
# its root. On a 4-bit base `rest` is quantized.)


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
# If you merge an adapter into its base and round the sum to {{4}} bits again, most of what it learned is lost: its changes are mostly smaller than
# the steps between two levels ([lesson 12](12_ship_it.ipynb)). *Merge-aware training* lets the forward pass see the rounded sum, W = round(base + (α/r) · B A). Rounding has
# no useful derivative, so the backward pass acts as if nothing had been rounded (a straight-through estimator).
#
# **Predict.** After a merge into NF4, what share of the orders does usual QLoRA get right, and what share after merge-aware training, in
# the {{about['settings']['steps']['orders']}} steps of our race?

# %%
left = {"usual": ..., "merge-aware": ...}  # ← your guesses, in %


# %% machinery "Look up the answers before and after a merge into NF4"
def judged(way, where):
    """Of the three seeds: exact answers of 100, and loss on prose."""
    found = [row[where] for row in merging.rows("runs", way=way)]
    return [one["exact"]["test"].count("1") for one in found], [one["after"]["prose"] for one in found]


merges = {
    f"{task}, {about['settings']['steps'][task]} steps": {
        "QLoRA, beside the base": mean("QLoRA", task, "test") / 100,
        "QLoRA, merged": mean("QLoRA", task, "test", merged=True) / 100,
        "merge-aware, merged": mean("merge-aware", task, "test") / 100,
    }
    for task in TASKS
}
both_merged = {}
for task in TASKS:
    usual = values(record, "QLoRA", task, "test", merged=True)
    both_merged[task] = [share - usual[seed] for seed, share in values(record, "merge-aware", task, "test").items()]
WAYS = {
    "usual, adapter beside": ("plain", "beside"), "usual, merged": ("plain", "nf4"), "merge-aware, merged": ("nf4", "nf4")
}  # fmt: skip
aware = {(n, way): judged(f"{how}, {n} steps", where) for n in (30, 120) for way, (how, where) in WAYS.items()}

# %% alt="Bars of exact test answers. Orders: QLoRA {{mean('QLoRA', 'orders', 'test'):.0f}} % with the adapter beside the base and {{mean('QLoRA', 'orders', 'test', merged=True):.0f}} % merged into NF4, merge-aware training {{mean('merge-aware', 'orders', 'test'):.0f}} %. Diary: {{mean('QLoRA', 'diary', 'test'):.0f}} %, {{mean('QLoRA', 'diary', 'test', merged=True):.0f}} % and {{mean('merge-aware', 'diary', 'test'):.0f}} %."
_ = plot_shares(new_axes(height=2.6), merges, "exact test answers, mean of eight seeds")

# %%
print(told(left))
for task, gained in both_merged.items():
    (more, line), (_, longer) = (paired_interval(gained, 1 - 0.05 / compared) for compared in (16, 96))
    print(f"{task}, merge-aware minus QLoRA, both merged: {more:+.1f} points", end=", ")
    print(f"thin line ± {line:.1f} (of 96: ± {longer:.1f})")
for (steps, way), (right, prose) in aware.items():
    print(
        f"{steps:>3} steps, {way:<21} exact", *(f"{n:>3}" for n in right), "  prose", *(f"{loss:.2f}" for loss in prose)
    )

# %% claims
for steps in (30, 120):
    assert aware[steps, "usual, merged"][0] == [0, 0, 0]
    assert min(aware[steps, "merge-aware, merged"][1]) > max(aware[steps, "usual, adapter beside"][1])
assert min(aware[120, "merge-aware, merged"][0]) == 99 and max(aware[30, "merge-aware, merged"][0]) == 62
for gained in both_merged.values():
    more, line = paired_interval(gained, 1 - 0.05 / 16)
    assert more > line and len(gained) == 8
assert [paired_interval(both_merged[task], 1 - 0.05 / 96)[1] < statistics.fmean(both_merged[task]) for task in TASKS] == [
    True, False
]  # fmt: skip

# %% [markdown]
# After the usual training, a merge leaves nothing of the orders, and little of the diary. Merged, merge-aware training is surely better on
# both, but not on the diary if {{96}} are to hold. The last lines are from another record of the orders, with three seeds and one rate. After {{120}} steps the adapter survives nearly whole. The price, at the same rate, is the model's English: compare the prose.
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
# DoRA also computes with whole weights to find the rows' lengths. A model this small hides the great difference: in NF4 a frozen
# weight takes half a byte.
#
# How many seeds would tell two methods apart in four of five experiments? Half the difference takes about four times as many:


# %% machinery "Round a number of seeds"
def rough(seeds):
    """As text, rounded to one digit: more is not known."""
    return f"roughly {float(f'{seeds:.1g}'):,.0f} seeds"


# %%
one, other, each, seeds = closest(record, "orders", "test", methods_of(record, "orders"))
print(f"the closest two that differ, {one} and {other}: {statistics.fmean(each):+.3f} points, {rough(seeds)}")
orders, diary = of["orders"], of["diary"]
for d in (orders["attention only"], orders["rsLoRA"], diary["PiSSA"], diary["LoRA, 16-bit base"]):
    print(f"{d.method} and QLoRA, {d.task}: {d.mean:+.1f} points, {rough(seeds_needed(d.each))}")
for spreads in (1, 3):
    found = share_excluding_zero(spreads, 3)
    print(f"three seeds find a difference of {spreads} x its spread in {found:.0%} of experiments")

# %% claims
assert (one, other) == ("LoRA, 16-bit base", "rsLoRA") and 5500 < seeds < 6500
averages = {m: mean(m, "orders", "test") for m in methods_of(record, "orders")}
apart_by = [abs(averages[a] - averages[b]) for a in averages for b in averages if a < b]
assert averages["AF4"] == averages["rank 4"] and (apart_by.count(0), apart_by.count(0.125)) == (4, 3)
assert share_excluding_zero(1, 3) < 0.25 < 0.6 < share_excluding_zero(3, 3)

# %% [markdown]
# These numbers are rough, as if the measured values were the true ones, and uncorrected.
# Means come in steps of {{0.125}} (eight runs, {{100}} answers): three pairs on the orders are one step apart, and four tie.
# With the usual three, you would miss a
# difference as large as its spread four times of five.
#
# ## 8 · What to use tomorrow
#
# 1. Stay with QLoRA. With {{4}} bits and the adapter beside them, no method's answers were surely better on both tasks, and no method's loss on either. But the diary's thin lines reach from ±{{min(d.corrected for d in exact['diary']):.1f}} to ±{{max(d.corrected for d in exact['diary']):.1f}} points.
# 2. Adapt more than the attention, and try three learning rates before a second method.
# 3. Or try rank {{4}} at the same α and rate. It got surely more orders right and trains a quarter of the
#    numbers. Its loss was not told apart.
# 4. PiSSA had the highest means on both tasks, not surely. It surely forgot less English, at a tenth of QLoRA's rate. Its adapter fits only
#    its own base, the rest of W.
# 5. Other sixteen numbers made no sure difference to a task, not even AF4's {{of['diary']['AF4'].mean:+.0f}} ± {{of['diary']['AF4'].corrected:.0f}} on the diary.
# 6. If the model fits in {{16}} bits, leave it there: its loss on the orders was surely lower, and its English ended better on average.
# 7. If it must end in {{4}} bits with the adapter inside, train it merge-aware, longer than {{20}} steps, and measure what it forgets.
#
# These sentences come from one model of {{135}} million parameters, two small tasks and eight seeds, and each *surely* is meant for its own panel.

# %% claims
for task in TASKS:
    assert max(methods_of(record, task), key=lambda m: mean(m, task, "test")) == "PiSSA"
    assert of[task]["rsLoRA"].mean > 0 > lost[task]["rsLoRA"].mean and rates[task]["PiSSA"] == 0.0003
    assert {found[task]["rsLoRA"].verdict for found in (of, lost)} == {"not told apart"}
    assert {found[task]["MLP only"].verdict for found in (of, lost)} == {"not told apart"}
    assert {of[task][m].verdict for m in ("AF4", "BOF4", "INT4", "scales in 32 bits")} == {"not told apart"}
four_bits = set(of["orders"]) - {"LoRA, 16-bit base", "full fine-tuning"}
assert [m for m in four_bits for task in TASKS if of[task][m].verdict == "better"] == ["rank 4"]
assert not [m for m in four_bits for task in TASKS if lost[task][m].verdict == "better"]
assert 3.9 < trained["QLoRA"] / trained["rank 4"] < 4.1

# %% [markdown]
# **Yours.** `python -m qlora_lab.train_qlora --data YOUR_FILE --rank 4 --alpha 32` trains rank {{4}} on your own data. There are also `--adapter rslora` and `dora`, `--init loftq` and `pissa`, and `--lora-plus 16`. Run QLoRA and one of them with
# `--seed 0`, `1` and `2`. Give the three differences to `paired_interval` and to `seeds_needed`.
#
# <details><summary>Repeat the experiment of this lesson?</summary>
#
# `python -m qlora_lab.experiments methods` takes some {{13}} minutes of one H200. On two CPU cores, `!python -m qlora_lab.experiments methods --small`
# in a cell trains four of its methods for {{3}} steps, with two seeds, in less than three minutes: enough to see how it works, and too little to judge.
#
# </details>

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
