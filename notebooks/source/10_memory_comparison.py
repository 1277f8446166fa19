# %% [markdown]
# # 10 · Was the prediction right?
#
# Lesson 02 worked out the memory of a training step by arithmetic. Here the steps have run: LoRA and QLoRA on models of
# LLaMA's shapes, 7B to 65B, on one H100. If you have a GPU, one runs on yours, too. How far off was the sum? And
# how much does QLoRA really save?
#
# | you need | |
# |---|---|
# | time | 20 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional: with 9 GB free, it is measured too |

# %% machinery "Imports, and the record"
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import check_choice, check_qlora_peak, progress
from qlora_lab.classroom.lessons.n10.figures import plot_groups, plot_parts, plot_predictions
from qlora_lab.classroom.lessons.n10.machinery import (
    GB,
    PAPER,
    SIZES,
    errors_of,
    measured_runs,
    pairs_of,
    peak_of,
    phases_of,
    pieces_on_the_card,
    read_record,
    run_of,
    smallest_cards,
    sum_for,
    table_of_pairs,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.memory import SHAPES, bits_per_parameter, estimate
from qlora_lab.models.hardware import pick_device

record = read_record()
runs = measured_runs(record)
print(f"recorded on one {record['device']}, {record['date']}: {len(runs)} settings, three training steps each")

# %% claims
assert len(runs) == 59 and all(len(run["measured"]["losses"]) == 3 for run in runs)

# %% [markdown]
# The models have random weights. The memory of a step does not depend on what the weights are, so nobody has to download {{65}} billion of them.
#
# ## 1 · One step
#
# Take LLaMA-7B with QLoRA: rank {{64}} on all linear layers, one sample of {{512}} tokens, gradient checkpointing. First the model is loaded,
# then the adapter is added. Then the step has three phases: forward, backward and update.
#
# **Predict.** In which of these five do torch's tensors take the most memory?

# %%
vote = ...  # "load", "adapter", "forward", "backward" or "weight update"

# %% machinery "The phases of the step" alt="Five stacked horizontal bars: GB of torch's tensors in each phase, held at its end or only for a moment. The peaks: load {{peaks['load']:.2f}}, adapter {{peaks['adapter']:.2f}}, forward {{peaks['forward']:.2f}}, backward {{peaks['backward']:.2f}}, update {{peaks['weight update']:.2f}}."
step = run_of(runs, "7B")
phases, ends = phases_of(step)
_ = plot_parts(new_axes(height=3.0), phases, "torch's tensors (GB, 10$^9$ bytes)", 6, ends)
peaks = {name: sum(parts.values()) for name, parts in phases.items()}
print(f"most in: {max(peaks, key=peaks.get)}; {told(vote)}")

# %% claims
assert list(peaks) == ["load", "adapter", "forward", "backward", "weight update"]
assert peaks["backward"] == max(peaks.values())
by_the_sum = estimate(SHAPES["llama-7b"])
assert by_the_sum.moment == "backward" and by_the_sum.parts["gradients"] / by_the_sum.parts["adapters"] > 0.95

# %% [markdown]
# **What happened?** The backward pass needs most, {{peaks["backward"]:.2f}} GB. At its end the adapter's gradients are there, as large as the adapter itself,
# and the first layer's activations, which were just computed again, are there too. The update needs less: the activations are
# gone, and Adam's paged states do not count as torch's tensors (lesson 02).
#
# Here is your GPU, if you have one. With less than {{9}} GB free it takes the bundled model's shape.

# %% machinery "Measure a step on this machine's GPU"
# NBVAL_IGNORE_OUTPUT
# because it measures this machine's GPU, if there is one
from qlora_lab.memory import measure_memory

device = pick_device()
free = torch.cuda.mem_get_info(device)[0] / GB if device.type == "cuda" else 0
model = "llama-7b" if free > 9 else "smollm2-135m-instruct"
for method, possible in {"qlora": free > 0, "lora": 0 < free <= 9 or free > 18}.items():
    if possible:
        mine = measure_memory(model, use_qlora=method == "qlora")
        expected = estimate(SHAPES[model.removesuffix("-instruct")], method).peak_allocated
        print(f"{model}, {method}: peak {mine.peak / GB:.2f} GB, by the sum {expected / GB:.2f} GB", end=" ")
        print(f"({expected / mine.peak - 1:+.1%})")
if not free:
    print("no GPU here: the record has to do")

# %% [markdown]
# ## 2 · How far off is the sum?
#
# The record has {{len(runs)}} settings: LoRA and QLoRA from 7B up, full fine-tuning of models up to 1.7B, ranks {{16}} and {{64}}, {{512}} to {{32768:,}} tokens a step, with and without checkpointing.
# The sum is lesson 02's `estimate`, but only its part for torch's tensors; section 4 comes to what else a card must hold. None of its
# terms was fitted: each is a tensor that one can name.
#
# **Predict.** By how many per cent is today's sum off, at most?

# %%
prediction = {"largest error": ...}  # ← your guess, in %

# %% machinery "Predicted and measured" alt="Two scatter plots over the measured peak in GB. Left, the predicted peak: all points lie on the diagonal. Right, the error in per cent: all points lie inside a grey band of {{3}} per cent, most of them a little below zero."
points = {
    name: [[peak_of(run) for run in some], [sum_for(run) for run in some]]
    for name, some in {
        "made with them": [run for run in runs if not run["held_out"]],
        "held out": [run for run in runs if run["held_out"]],
    }.items()
}
_, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
_ = plot_predictions(axes, points, bands=[3, 5])
errors = errors_of(runs)
print(f"{'settings':<46}{'largest error then':>20}{'today':>9}")
for name, (count, then, now) in errors.items():
    print(f"{count:>3} {name:<42}{then:>18.1f} %{now:>7.1f} %")
print(told(prediction["largest error"]))

# %% claims
assert [f"{count} {then:.1f} {now:.1f}" for count, then, now in errors.values()] == [
    "43 13.6 1.7",
    "10 3.0 1.1",
    "6 1.7 1.7",
]
in_full = {run["shape"] for run in runs if run["method"] == "full"}
assert in_full == {"smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
assert all(SHAPES[run["shape"]].parameters() > 6.7e9 for run in runs if run["method"] != "full")
assert estimate(SHAPES["llama-7b"], "full", full_precision="mixed").total > 100e9

# %% [markdown]
# **What happened?** Today the sum is within {{max(now for _, _, now in errors.values()):.1f}} % everywhere. (*Then* is the error of the formulas that there were when a setting was measured.) On a GPU a step makes the same tensors each time, and the size of each
# follows from the model's shapes.
#
# The clean test of today's sum is the last line: these {{errors["held out, predicted before they ran"][0]}} were predicted before they ran. Three of
# them are LoRA and three full fine-tuning, none QLoRA, so its error stands on settings that were known.
#
# <details><summary>And the other lines, the middle column, and the full fine-tuning?</summary>
#
# The first formulas missed some settings by far, because they had
# counted a tensor that is not there, or forgotten one. *Held out* are settings that no formula was made with at the time. After ten of them were known, the formulas were mended
# once more. Most of what is left is torch, which rounds blocks of memory up.
#
# The models that were fine-tuned in full are SmolLM2's, with lesson 02's fp32 copy or with all weights and gradients in fp32. (For 7B, the H100 would be too small.)
#
# </details>
#
# ## 3 · What QLoRA saves
#
# A loaded 7B model shrinks by {{71}} % when its linear layers are stored in four bits. Articles quote such numbers as what QLoRA saves.
#
# **Predict.** How many per cent does it save at the peak of *training*, 7B, one sample of {{512}} tokens?

# %%
prediction = {"7B": ...}  # ← your guess, in %

# %% machinery "Loaded and training, LoRA and QLoRA" alt="Pairs of horizontal bars: GB of torch's tensors with LoRA and QLoRA. 7B: loaded {{bars['7B, loaded']['LoRA']:.1f}} and {{bars['7B, loaded']['QLoRA']:.1f}}, training {{bars['7B, training']['LoRA']:.1f}} and {{bars['7B, training']['QLoRA']:.1f}}. 13B: loaded {{bars['13B, loaded']['LoRA']:.1f}} and {{bars['13B, loaded']['QLoRA']:.1f}}, training {{bars['13B, training']['LoRA']:.1f}} and {{bars['13B, training']['QLoRA']:.1f}}. The percentage saved is smaller in training."
bars = {}
for size in ("7B", "13B"):
    both = {"LoRA": run_of(runs, size, "lora"), "QLoRA": run_of(runs, size)}
    bars[f"{size}, loaded"] = {name: run["phases"]["load"]["allocated"] / GB for name, run in both.items()}
    bars[f"{size}, training"] = {name: peak_of(run) for name, run in both.items()}
saved = {stage: 100 * (1 - bar["QLoRA"] / bar["LoRA"]) for stage, bar in bars.items()}
texts = {
    stage: {"LoRA": f"{bar['LoRA']:.1f}", "QLoRA": f"{bar['QLoRA']:.1f}, saves {saved[stage]:.0f} %"}
    for stage, bar in bars.items()
}
_ = plot_groups(new_axes(height=3.2), bars, "torch's tensors (GB, 10$^9$ bytes)", texts)
for stage, bar in bars.items():
    print(f"{stage:<15}{bar['LoRA'] - bar['QLoRA']:5.1f} GB saved, {saved[stage]:.0f} %")
print(told(prediction["7B"]))

# %% claims
assert f"{saved['7B, loaded']:.0f} {saved['7B, training']:.0f}" == "71 64"

# %% [markdown]
# **What happened?** In training, both methods add the same adapter and nearly the same of everything else. So the difference stays at about
# {{bars["7B, training"]["LoRA"] - bars["7B, training"]["QLoRA"]:.1f}} GB, and the percentage falls to {{saved["7B, training"]:.0f}}. What QLoRA saves is a number of GB that the shapes tell.
#
# **Exercise 10.1 ●●○ (3 minutes).** Then one can do without the second measurement. You have measured LoRA: write what QLoRA will need
# instead. (Loaded, a parameter of the linear layers has {{16}} bits with LoRA, and `bits_per_parameter()` with QLoRA.)


# %%
def qlora_peak(shape, lora_peak):
    """GB of torch's tensors at the peak with QLoRA, from those with LoRA. shape: has linear_parameters()."""
    ### BEGIN SOLUTION (about 2 lines)
    saved_bits = (16 - bits_per_parameter()) * shape.linear_parameters()
    return lora_peak - saved_bits / 8 / 1e9
    ### END SOLUTION


# %%
check_qlora_peak(qlora_peak)

# %% [markdown]
# <details><summary>Hint 1</summary>How many bits does each parameter of the linear layers lose? All the other tensors stay.</details>
# <details><summary>Hint 2</summary>Bits / {{8}} are bytes, and {{10}}⁹ bytes are a GB.</details>

# %% [markdown]
# Here are all pairs in the record that differ in nothing but the method, with what your function says (or ours, as long as yours
# is open). Where does it fail?

# %% machinery "All pairs, and your function"
pairs = pairs_of(runs)
print(table_of_pairs(pairs, qlora_peak))

# %% claims
drops = [1 - peak_of(qlora) / peak_of(lora) for lora, qlora in pairs]
by_weights = [
    (peak_of(lora) - SHAPES[lora["shape"]].linear_parameters() * (16 - bits_per_parameter()) / 8e9) / peak_of(qlora) - 1
    for lora, qlora in pairs
]
on = [abs(e) for e, (run, _) in zip(by_weights, pairs) if run["gradient_checkpointing"]]
off = [e for e, (run, _) in zip(by_weights, pairs) if not run["gradient_checkpointing"]]
assert len(on) == 6 and len(off) == 3 and max(on) < 0.012 and min(off) > 0.06

# %% [markdown]
# The saving goes from {{100 * max(drops):.0f}} % down to {{100 * min(drops):.0f}} %, because what grows with the rank and with the tokens stays in {{16}} and {{32}} bits.
#
# With checkpointing, the function is right to about one per cent. Without it (*no checkp.*), it is {{100 * min(off):.0f}} to {{100 * max(off):.0f}} % too high. There QLoRA saves something
# else, too: on {{16}}-bit layers, each of PEFT's adapters turns the layer's input into fp32 and back and keeps that copy. PEFT's code for 4-bit layers skips that in these runs, so all adapters read the input as it is.
# With checkpointing such copies are there for one layer at a time.
#
# ## 4 · What the card must hold
#
# For our step of 7B, torch counts {{peak_of(step):.2f}} GB. `nvidia-smi`, which asks the driver, shows over two GB more. What are they?

# %% machinery "From torch's count to the driver's" alt="One stacked horizontal bar: {{sum(pieces.values()):.2f}} GB on the card. Torch's tensors {{peak_of(step):.2f}}, gaps between them {{pieces['gaps between them']:.2f}}, paged optimizer states {{pieces['paged optimizer states']:.2f}}, CUDA context {{pieces['CUDA context']:.2f}}, unexplained {{pieces['unexplained']:.2f}}."
pieces = pieces_on_the_card(step, record["outside_allocator_at_start"])
ends = {"on the card": f"{sum(pieces.values()):.2f}"}
_ = plot_parts(new_axes(height=1.9), {"on the card": pieces}, "GB (10$^9$ bytes)", 8, ends)
print("\n".join(f"{name:<26}{size:.2f} GB" for name, size in pieces.items()))

# %% claims
assert [round(size, 2) for size in pieces.values()] == [5.43, 0.22, 1.28, 0.65, 0.22]

# %% [markdown]
# - **Gaps.** Torch takes memory from the driver in large pieces, and cannot fill each of them.
# - **Paged states.** Adam's two numbers for {{step["measured"]["managed_bytes"] / 8e6:.0f}} million parameters. While there is room they stay on the card.
# - **CUDA context.** This driver took {{pieces["CUDA context"]:.2f}} GB before the first tensor; lesson 02 counts half a GB.
# - **Unexplained.** Perhaps GPU kernels, the programs that run on the card, which were loaded on the way. Nobody has measured it.
#
# So does 65B fit a card of {{48}} GB, as QLoRA's paper says? Torch was held to what a smaller card would leave it beside the context, until it failed.
# These are the smallest of the usual cards on which each size still trained in this way. (Lesson 02's table names larger ones, since its rule leaves some memory free, and here none is left.)

# %% machinery "The smallest cards, and the paper"
cards = smallest_cards(record)
print(f"{'':<6}{'card':>6}{'torch, gaps too':>17}{'paged states':>14}{'context':>9}{'in all':>8}{'paper':>8}")
for size, (card, whole) in cards.items():
    print(f"{size:<6}{card:>6}{whole['torch']:>17.2f}{whole['paged states']:>14.2f}{whole['context']:>9.2f}", end="")
    print(f"{sum(whole.values()):>8.2f}{PAPER[size]:>8.1f}")

# %% claims
assert {size: card for size, (card, _) in cards.items()} == dict(zip(SIZES, (8, 12, 24, 48)))
more = {size: sum(whole.values()) - card for size, (card, whole) in cards.items()}
assert [size for size, excess in more.items() if excess > 0] == ["13B", "33B", "65B"]
assert all(more[size] < whole["paged states"] for size, (_, whole) in cards.items())

# %% [markdown]
# It does: torch's part of 65B fits. With everything it takes {{sum(cards["65B"][1].values()):.1f}} GB. A card that is called "{{48}} GB" mostly has {{48}} GiB, which is {{51.5}}. On
# one of just {{48}} the driver would have to move {{more["65B"]:.1f}} GB of the
# paged states to the CPU and back in every step. That is what paging is for, but it makes the step slower. (By how much, nobody
# has measured here: the H100 had room.) The paper's totals are lower; what they may count,
# and recipes for smaller cards, are in [dive L](dive_l_small_cards.ipynb).
#
# <details><summary>And 13B and 33B? And why has 7B two totals?</summary>
#
# 13B fits, since "{{12}} GB" are {{12 * 2**30 / 1e9:.1f}}. 33B needs paging even where "{{24}} GB" are {{24 * 2**30 / 1e9:.1f}}: it takes {{sum(cards["33B"][1].values()):.1f}}. And for 7B this table has {{sum(cards["7B"][1].values()):.2f}} GB, where {{sum(pieces.values()):.2f}} were on the card above: it leaves out what is
# unexplained, and counts half a GB for the context, as lesson 02 does.
#
# </details>
#
# **Exercise 10.2 ●●○ (3 minutes).** Is QLoRA what *you* need? At the same batch, four bits cost time where a step has few tokens (lesson 13), and perhaps accuracy (lesson 11). So take LoRA if your card is
# large enough for it, and QLoRA if only for that. (What lesson 02's `card_for` says is also `estimate(...).card_bytes`, in bytes.) Choose a model, a card and the size of a step, and find out how many per cent of the total QLoRA saves there.

# %%
### BEGIN SOLUTION
### STUB: choice = {
### STUB:     "model": ...,  # a name: print(*SHAPES)
### STUB:     "card": ...,  # GB
### STUB:     "samples": ...,
### STUB:     "tokens": ...,  # in a sample
### STUB:     "saved": ...,  # in %: estimate(SHAPES[...], "lora", batch_size=..., sequence_length=...).total
### STUB:     "method": ...,  # "LoRA" or "QLoRA"
### STUB: }
choice = {"model": "mistral-7b", "card": 24, "samples": 4, "tokens": 512}
lora, qlora = (
    estimate(SHAPES["mistral-7b"], method, batch_size=4, sequence_length=512) for method in ("lora", "qlora")
)
choice |= {"saved": 100 * (1 - qlora.total / lora.total), "method": "LoRA" if lora.card_bytes <= 24e9 else "QLoRA"}
### END SOLUTION

# %%
check_choice(choice)

# %% [markdown]
# <details><summary>Hint</summary>The saving is a share of LoRA's total. Then compare LoRA's <code>card_bytes</code> with the card.</details>

# %% [markdown]
# ## Recap
#
# ```
#   on the card    =   torch's tensors   + gaps + paged states + CUDA context + unexplained
#   7.80 GB        =   5.43              + 0.22 + 1.28         + 0.65         + 0.22
# ```
#
# - The memory of a step can be counted before it runs: {{len(runs)}} settings on one GPU, none farther off than {{max(now for _, _, now in errors.values()):.1f}} % of torch's tensors.
# - With checkpointing, QLoRA saves a fixed number of GB, those of the linear layers. As a percentage it falls with everything else that the step needs.
# - A number of GB needs a label: torch's tensors, or all that the card must hold. Gaps, paged states and the context lie between them.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [11 · What did four bits cost?](11_accuracy_comparison.ipynb)
