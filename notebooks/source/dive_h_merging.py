# %% [markdown]
# # Dive H · Which merge keeps what was trained?
#
# In [lesson 12](12_ship_it.ipynb) you merged an adapter in three ways, and one of them lost most of it. Here you measure *how much* is
# left, and why. You also see an adapter that was trained to survive, take one off again, put two together, and find out
# which models suit QLoRA at all.
#
# | you need | |
# |---|---|
# | time | 50 minutes |
# | computing | up to 3 minutes on two CPU cores |
# | memory | 5 GB |
# | GPU | not needed |

# %% machinery "Imports, and a folder for adapters"
import tempfile
import warnings
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_joined,
    check_verdicts,
    check_which_base,
    progress,
)
from qlora_lab.classroom.lessons.dive_h.checks import unseen_configs
from qlora_lab.classroom.lessons.dive_h.figures import plot_left, plot_plans, plot_preflight, plot_snapped
from qlora_lab.classroom.lessons.dive_h.machinery import (
    as_label,
    bases_alone,
    chance_of_first,
    exact_after,
    left_in,
    merge_aware_record,
    merged_into,
    orders,
    train_adapter,
    validation_loss,
    weights_of,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore, show_answers
from qlora_lab.finetuning import dequantize_linears, generate, load_model, lora_layers, preflight
from qlora_lab.quantization import NF4, dequantize, quantize

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name
temporary = tempfile.TemporaryDirectory()  # it is removed when the kernel ends
folder = Path(temporary.name)

# %% [markdown]
# ## 1 · Two adapters
#
# You train two adapters beside the same 4-bit base, for a few steps each. *json* turns an order into JSON. *label* gets the very same
# prompts and learns to answer with a label for the parcel. (This is a shorter training than lesson 12's, so the losses differ. The files are
# removed when this notebook's kernel ends: to keep them, set `folder` to a path of your own.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
labels = [as_label(chat) for chat in orders("train")[:100]]
print("label:", labels[0][-1]["content"])
*_, losses = train_adapter(labels, folder / "label", steps=10, seed=1)
print(f"loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print("json:", orders("train")[0][-1]["content"])
model, tokenizer, losses = train_adapter(orders("train")[:100], folder / "json", steps=24)
print(f"loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
rounded, deltas = weights_of(model)  # by layer: what its 4 bits stand for, what the adapter adds

# %% [markdown]
# ## 2 · What is left of an adapter?
#
# A merge changes weights. How much of the adapter is in this change? Take four weights, to which an adapter adds {{2}}, {{-1}}, {{0}} and
# {{2}} (thousandths, say), and three changes. `kept` is the multiple of the adapter that comes nearest to the change (in linear algebra,
# a projection), and `rest` is what that multiple does not explain:


# %%
def left(change, delta):
    """How much of delta is in a change, and how large the rest is; both as multiples of delta."""
    kept = (change @ delta) / (delta @ delta)
    rest = (change - kept * delta).norm() / delta.norm()
    return kept, rest


delta = torch.tensor([2.0, -1.0, 0.0, 2.0])
for change in ([2, -1, 0, 2], [0.2, -0.1, 0.3, 0.2], [5, 5, 10, 2]):
    kept, rest = left(torch.tensor(change, dtype=torch.float32), delta)
    print(f"{change!s:<22} adapter left {kept:.2f}, rest {rest:.2f}")

# %% claims
big = left(torch.tensor([5.0, 5, 10, 2]), delta)
assert abs(big[0] - 1) < 1e-6 and big[1] > 4

# %% [markdown]
# The first change is the adapter itself. The second holds a tenth of it. The third is large, but the whole adapter is in it. (It is the adapter
# plus [{{3}}, {{6}}, {{10}}, {{0}}], which is at a right angle to it: their product is
# {{(torch.tensor([2.0, -1, 0, 2]) @ torch.tensor([3.0, 6, 10, 0])).item():.0f}}.)
#
# Now the same two numbers for the merges of lesson 12, with the weights of all layers as one long list. *Dequantized* adds the adapter to what the 4 bits stand for, and
# *pristine* to the checkpoint's own weights. *Requantized* rounds the dequantized sum to NF4 again, and *Q4_0* rounds it to Q4_0.
#
# **Predict.** How much of the adapter is left after each, from {{0}} to {{1}}?

# %%
prediction = {"dequantized": ..., "requantized": ..., "pristine": ..., "Q4_0": ...}  # ← your guesses

# %% alt="Four arrows that start at {{0}}: their height is what is left of the adapter, their length to the right is everything else that changed. Dequantized goes up to {{1}} and hardly to the right. Requantized is a stub near {{0}}. Pristine and Q4_0 go seven times as far to the right, pristine up to {{1}} and Q4_0 a little higher."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
found, loss = {}, {}
for way in prediction:
    merged = merged_into(way, folder / "json")
    found[way], loss[way] = left_in(merged, rounded, deltas), validation_loss(merged, tokenizer)
    print(f"{way:<12} adapter left {found[way][0]:.2f} ({told(prediction[way])}), rest {found[way][1]:.2f}")
_ = plot_left(new_axes(height=2.6), found, prediction)

# %% [markdown]
# And the losses? Here are also bases *without* an adapter, and the NF4 base with the adapter turned down to a share of itself. (In
# lesson 06, alpha was a volume knob.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
volume = {}
for share in (0.02, 0.1, 1):
    for layer in lora_layers(model).values():
        layer.alpha = 32 * share
    volume[share] = validation_loss(model, tokenizer)
alone = bases_alone(deltas, tokenizer)
print("merged:         ", ", ".join(f"{way} {value:.2f}" for way, value in loss.items()))
print("bases alone:    ", ", ".join(f"{base} {value:.2f}" for base, value in alone.items()))
print("NF4 and a share:", ", ".join(f"{share:.0%} {value:.2f}" for share, value in volume.items()))

# %% claims
import math

assert found["dequantized"][0] > 0.95 and found["dequantized"][1] < 0.4
assert found["requantized"][0] < 0.1 and found["requantized"][1] < 0.8
assert 0.9 < math.hypot(1 - found["requantized"][0], found["requantized"][1]) < 1.3  # its error
in_each = [
    left((dequantize(quantize(rounded[n] + d)) - rounded[n]).flatten(), d.flatten())[0] for n, d in deltas.items()
]
assert abs(torch.stack(in_each).median() * 64 - 1) < 0.2
assert abs(found["pristine"][0] - 1) < 0.05 and 5 < found["pristine"][1] < 10
assert found["Q4_0"][0] > 1.1 and abs(found["Q4_0"][1] / found["pristine"][1] - 1) < 0.15
assert max(loss["dequantized"], loss["pristine"]) < volume[1] + 0.03 and loss["Q4_0"] > 1.5 * loss["dequantized"]
assert alone["checkpoint"] < alone["NF4"] - 0.2 and alone["NF4"] < alone["NF4, then Q4_0"] - 0.2
assert volume[0.02] > loss["requantized"] > volume[0.1] and volume[0.1] - volume[1] < 0.5 * (alone["NF4"] - volume[1])

# %% [markdown]
# **What happened?**
#
# - *Dequantized* keeps all. Its rest is the rounding of the sum to 16 bits.
# - *Requantized* keeps {{found["requantized"][0]:.0%}}. Its error, which is its change less the adapter, is about as large as the adapter and points
#   *against* it. (Why is the loss not worse still? Small shares of an adapter do much of its work. But {{2}} % of it, beside the base, leave a
#   higher loss than this merge does. So the rest must help, and we do not know how.)
# - *Pristine* keeps all, beside a change {{found["pristine"][1]:.0f}} times as large as the adapter. That is NF4's rounding error, taken away
#   again. It has nothing of the adapter's direction, and leads to a *better* base. (No perfect one: lesson 04 found that this
#   checkpoint had been in 4 bits before.)
# - *Q4_0* keeps the adapter as well, beside a change of the same size. But this one leads to a *worse* base.
#
# So the size of an error says little. Ask whether it points against what was learned, and whether the base that it leads to is better or worse.
#
# ## 3 · Why 4 bits swallow an adapter
#
# Here is one block of {{64}} weights with its correction, and the sum rounded to NF4. What if the correction were larger than yours? Move the
# slider.

# %% machinery "What is left of a larger correction, and a block to look at"
name = "model.layers.12.mlp.up_proj"
base, correction = rounded[name].cpu(), deltas[name].cpu()
factors = (1, 2, 3, 5, 7, 10, 14, 20, 30)  # times the correction that was trained


def survives(factor):
    """How much of the correction, `factor` times as large, is left after rounding to 4 bits."""
    wanted = factor * correction
    return left((dequantize(quantize(base + wanted)) - base).flatten(), wanted.flatten())[0].item()


survival = {factor: survives(factor) for factor in factors}
block = slice(640, 704)  # 64 weights that share a scale
scale = base.flatten()[block].abs().max()


def draw(factor):
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", width_ratios=(2, 1))
    before = base.flatten()[block]
    wanted = before + factor * correction.flatten()[block]
    stored = dequantize(quantize(wanted))
    values = [(values / scale).tolist() for values in (before, wanted, stored, NF4 * wanted.abs().max())]
    return plot_snapped(axes, *values, survival, factor)


# %% claims
assert survival[1] < 0.15 and survival[30] > 0.9
wanted = (base + correction).view(-1, 64)
stored = dequantize(quantize(wanted))
largest = wanted.abs().argmax(dim=1, keepdim=True)
assert torch.allclose(stored.gather(1, largest), wanted.gather(1, largest))  # these move freely
from qlora_lab.classroom.rounded_twice import base_alone

once, twice = base_alone("Q4_0"), base_alone("Q4_0 from NF4")
assert twice.loss > 5 * once.loss and abs(once.size / twice.size - 1) < 0.05
assert base_alone("Q4_0 from NF4, errors shuffled").loss > twice.loss  # what moves the average weight does the harm

# %% alt="Left, the {{64}} weights of a block: base, wanted (rings) and stored in 4 bits (squares), grey lines at the levels. At × {{1}}, where the slider starts, all three nearly coincide. Right, the share of the correction that survives over its size, × {{1}} to × {{30}}: hardly any at first, nearly all at the end."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
explore(draw, factor=ipywidgets.SelectionSlider(options=factors, value=1, description="correction, times yours"))

# %% [markdown]
# The weights of a base in NF4 lie *on* the levels (grey lines), and only what moves a weight by more than half a step to its neighbour reaches
# another level. Your corrections are too small for that, except one: the block's scale follows its largest weight, which therefore moves
# freely. That is one weight in {{64}}, and about this share of the adapter is left in the median layer. The scale takes the
# other weights of the block along. Q4_0 has other levels. Many weights lie near the middle between two, where a little moves
# a weight by a whole step.
#
# **Once or twice?** Lesson 12's Q4_0 file is rounded once, from *pristine* weights, which lie anywhere between two levels. A correction of
# {{0.2}} steps (made up) takes a weight from {{0.4}} to {{0.6}}, which is rounded to {{1}} instead of {{0}}: it moves five times too far. But
# only one in five does so, from {{0.3}} to {{0.5}}. The others stay, so on average the adapter survives.
#
# It survives in section 2's *Q4_0*, rounded to NF4 before. What suffers is the base. [Measured alone](../docs/export.md) on ten
# other orders, its loss is {{base_alone("Q4_0").loss:.1f}} rounded once, and {{base_alone("Q4_0 from NF4").loss:.1f}} rounded twice. Q4_0's errors are as large
# once as twice: {{base_alone("Q4_0").size:.2f}} and {{base_alone("Q4_0 from NF4").size:.2f}} of a step. But after NF4, a block's weights lie on a few
# levels, and all on one level go to the same side. So errors do not cancel: rounded twice, they move an average weight up by
# {{base_alone("Q4_0 from NF4").shift:.2f}} of a step, once by {{abs(base_alone("Q4_0").shift):.2f}}.
#
# **Exercise H.1 ●●○ (5 minutes).** You find a merged checkpoint in bf16, and nobody remembers how it was made. You have the
# adapter (`delta`, what it adds), the 16-bit weight (`original`), and what its 4 bits stand for (`rounded`). Which of the
# three ways was it? `quantize` and `dequantize` are at hand.


# %%
def which_base(merged, delta, original, rounded):
    """Tensors of shape (out, in) -> "dequantized", "requantized" or "pristine"."""
    ### BEGIN SOLUTION (about 6 lines)
    candidates = {
        "dequantized": rounded + delta,
        "requantized": dequantize(quantize(rounded + delta)),
        "pristine": original + delta,
    }
    distance = {name: (merged.float() - candidate).norm().item() for name, candidate in candidates.items()}
    return min(distance, key=distance.get)
    ### END SOLUTION


# %%
check_which_base(which_base)

# %% [markdown]
# <details><summary>Hint 1</summary>What would you have got, had you merged yourself?</details>
# <details><summary>Hint 2</summary>bf16 keeps {{8}} significant bits, so no candidate is <em>equal</em>. Which one is nearest?</details>

# %% [markdown]
# ## 4 · Trained to survive
#
# The slider shows the way out: corrections must grow until they reach the next level. In *merge-aware training* the forward pass
# uses each weight as it will be after the merge, W = round(base + alpha / rank · B A). A correction that is too small
# then changes no answer, the loss stays high, and its gradient tends to push on until the weight crosses over. The backward pass leaves the rounding
# out, because its own slope is zero nearly everywhere, and nothing would ever move. (This is called a *straight-through estimator*.)
#
# An H200 trained the bundled model on the orders both ways, with three seeds, beside the base in NF4. Both merges round what the 4 bits of NF4
# stand for, plus the adapter.
#
# **Predict.** Of {{100}} orders, how many are exactly right after {{120}} steps of merge-aware training and a merge into NF4? (After the usual
# training, with the adapter beside the base, it is {{min(exact_after("plain, 120 steps", "beside"))}} or more.)

# %%
prediction = ...  # ← your guess

# %% machinery "Read the record"
print(f"{merge_aware_record().content['device']}: exactly right of 100, three seeds")
for steps in (30, 120):
    for training, where in [("plain", "beside"), ("plain", "nf4"), ("nf4", "nf4"), ("plain", "q4_0"), ("q4_0", "q4_0")]:
        right = exact_after(f"{training}, {steps} steps", where)
        trained = "usual" if training == "plain" else "merge-aware"
        place = "beside the base" if where == "beside" else f"merged into {where.upper()}"
        print(f"{steps:>3} steps, {trained:<12}{place:<17}", *(f"{n:>4}" for n in right))
print(told(prediction))

# %% claims
from qlora_lab.classroom.lessons.dive_h.machinery import prose_after

assert all(exact_after(f"plain, {steps} steps", "nf4") == [0, 0, 0] for steps in (30, 120))
assert exact_after("nf4, 120 steps", "nf4") == [100, 99, 100] and max(exact_after("nf4, 30 steps", "nf4")) == 62
assert min(prose_after("nf4, 120 steps", "nf4")) > max(prose_after("plain, 120 steps", "beside")) + 1
assert max(prose_after("q4_0, 120 steps", "q4_0")) < max(prose_after("plain, 120 steps", "q4_0")) + 0.1
assert exact_after("plain, 120 steps", "q4_0")[2] < exact_after("plain, 30 steps", "q4_0")[2]
assert all(
    min(exact_after(f"q4_0, {steps} steps", "q4_0")) > min(exact_after(f"plain, {steps} steps", "q4_0"))
    for steps in (30, 120)
)

# %% [markdown]
# **What happened?** Merged into NF4, the usual training leaves no right answer. Merge-aware training survives, in part after {{30}} steps and nearly
# whole after {{120}}. Q4_0 is milder, and merge-aware training makes it safer: without it, one seed gets worse with more
# steps. For NF4 there is a price: what crosses so many
# levels also changes the model's English ([dive E](dive_e_beyond_qlora.ipynb) has the numbers). For Q4_0 the record shows none. In a terminal,
# `qlora_lab.train_qlora --merge-aware nf4` trains like this.
#
# ## 5 · Take it off again
#
# On a dense layer, PEFT's `unmerge` subtracts what was added. But bf16 keeps {{8}} significant bits, so the sum was rounded.
#
# **Predict.** What share of a layer's weights is not what it was?

# %%
prediction = ...  # ← your guess, in per cent

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
before, added = base.to(torch.bfloat16), correction.to(torch.bfloat16)
weight = before.clone()
for swaps in range(1, 101):
    weight = (weight + added) - added  # merged, and taken off again; each result is rounded to bf16
    if swaps in (1, 2, 100):
        off = (weight.float() - before.float()).norm() / correction.norm()
        print(
            f"{swaps:>3} ×: {(weight != before).float().mean():.1%} of the weights changed, off by {off:.3f} × adapter"
        )
print(told(prediction))

# %% claims
once = (before + added) - added
assert 0.001 < (once != before).float().mean() < 0.05
assert torch.equal((once + added) - added, once) and torch.equal(weight, once)

# %% [markdown]
# **What happened?** Nearly all weights are what they were. Rounding moved the sum by at most half a step, so after the subtraction the old weight is
# the nearest number again. Sums that have passed a power of two are the exception, because bf16 has coarser steps there. Such a weight
# changes once, to a number that comes back, so a hundred times are no worse than once. (This course's `unmerge` keeps the old weight and
# puts it back.)
#
# ## 6 · Two adapters beside one base
#
# An adapter that is never merged can be changed with each request. PEFT loads both under names. (The base is made dense here, which is faster
# on a CPU; the numbers are the same.) Beside any other base of the same shapes, an adapter runs without complaint and may talk
# nonsense.


# %%
from peft import PeftModel

base_4bit, _ = load_model(quantization="nf4")
served = PeftModel.from_pretrained(dequantize_linears(base_4bit), folder / "json", adapter_name="json")
served.load_adapter(folder / "label", adapter_name="label")


def serve(adapter, chat):
    """Answer one request with one of the adapters."""
    served.set_adapter(adapter)
    return generate(served, tokenizer, [chat[:-1]], 44, dtype=model.dtype)[0]


# %% [markdown]
# One adapter can also do the work of two: its change is the *sum* of both changes.
#
# **Exercise H.2 ●●○ (4 minutes).** Write it for one layer. Both adapters are triples (A, B, scale), with A of shape (rank, in), B of shape
# (out, rank), and a change of scale · B A. Their ranks may differ. Return A and B of an adapter whose scale is {{1}}.


# %%
def joined(first, second):
    """A and B of one adapter, so that B @ A is what both add together."""
    ### BEGIN SOLUTION (about 2 lines)
    (A1, B1, scale1), (A2, B2, scale2) = first, second
    return torch.cat([A1, A2]), torch.cat([scale1 * B1, scale2 * B2], dim=1)
    ### END SOLUTION


# %%
check_joined(joined)

# %% [markdown]
# <details><summary>Hint 1</summary>Lesson 06: B A is a sum of columns times rows. Which columns and rows do both adapters have together?</details>
# <details><summary>Hint 2</summary><code>torch.cat</code> puts matrices below each other, and with <code>dim=1</code> beside each other.</details>

# %% [markdown]
# PEFT's name for this is `cat`. Its `linear` adds A to A and B to B instead: (B₁ + B₂)(A₁ + A₂) also holds B₁ A₂ and
# B₂ A₁, in which the column of one adapter says what the row of the other has heard.
#
# **Predict.** The same order goes to *json*, to *label*, and to both together. What does the sum answer?

# %%
vote = ...  # "JSON", "a label", "something of both" or "nonsense"

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
for way in ("cat", "linear"):
    served.add_weighted_adapter(["json", "label"], [1.0, 1.0], way, combination_type=way)
order = orders("test")[0]
rows = []
for name in ("json", "label", "cat", "linear"):
    answer = serve(name, order)
    chance = chance_of_first(served, tokenizer, order, '{"')
    rows.append((name, f"{chance:.2f}", answer))
print(order[-2]["content"], told(vote), sep="\n")
show_answers(rows, ("adapter", 'chance of {"', "answer"))

# %% claims
assert float(rows[0][1]) > 0.9 > 0.1 > float(rows[1][1]) and float(rows[1][1]) < float(rows[2][1]) < float(rows[0][1])
assert rows[0][2].startswith('{"') and " x " in rows[1][2]

# %% [markdown]
# **What happened?** No mixture comes out here. JSON begins with `{"`: *json* is sure about that, and *label* is sure about the contrary. In their
# sum (*cat*) one pushes for it and one against it. The stronger push decides the first token and, with it, the kind of answer. With *linear*
# the cross terms change the balance; why towards JSON, we cannot say. In our run both answers have a fault: look for it. So judge a sum like a
# new model.
#
# What does keeping adapters apart save? Here are the weights alone, at LLaMA-7B's size, with rank {{16}} on all linear layers:

# %% machinery "Memory of both plans"
import transformers

report = preflight(transformers.LlamaConfig())
merged_gb, base_gb, adapter_gb = report.dense_bytes / 1e9, report.nbytes / 1e9, 39_976_960 * 4 / 1e9
counts = [1, 2, 5, 10, 20, 50, 100]
memory = {
    "a merged model each": [n * merged_gb for n in counts],
    "one 16-bit base, adapters in float32": [merged_gb + n * adapter_gb for n in counts],
    "one 4-bit base, adapters in float32": [base_gb + n * adapter_gb for n in counts],
}

# %% alt="Three rising lines: GB of weights over {{1}} to {{100}} adapters served, both axes logarithmic. With a merged model each, {{2}} are above the line at {{24}} GB and {{6}} above that at {{80}}. One 16-bit base with adapters rises from {{merged_gb + adapter_gb:.0f}} to {{merged_gb + 100 * adapter_gb:.0f}} GB, one 4-bit base from {{base_gb + adapter_gb:.0f}} to {{base_gb + 100 * adapter_gb:.0f}} GB, below both lines."
_ = plot_plans(new_axes(height=3.0), counts, memory, {"24 GB": 24, "80 GB": 80})

# %% claims
from qlora_lab.memory import SHAPES, trainable_parameters

assert trainable_parameters(SHAPES["llama-7b"], 16, "all-linear") == 39_976_960
assert 2 * merged_gb > 24 > merged_gb and 5 * merged_gb < 80 < 6 * merged_gb and base_gb + 100 * adapter_gb < 24

# %% [markdown]
# Each further task costs a whole model, or only its A and B.
#
# **Exercise H.3 ●○○ (2 minutes).** How many adapters can each plan keep ready on a card? All sizes are in bytes. Then ask about *your* card and
# model. (Section 7 has models' sizes, and the folded cell above those of this figure.)


# %%
def adapters_that_fit(card, merged, base, adapter):
    """How many with a merged model each, and how many on one 4-bit base; the others are the sizes of one of each."""
    ### BEGIN SOLUTION (about 3 lines)
    plan_a = card // merged
    plan_b = max(0, (card - base) // adapter)
    return plan_a, plan_b
    ### END SOLUTION


# %%
check_adapters_that_fit(adapters_that_fit)

# %% [markdown]
# <details><summary>Hint</summary>The second plan pays for the base once, even if nothing else fits. <code>//</code> rounds down.</details>

# %% [markdown]
# ## 7 · Which models suit QLoRA?
#
# Merged or not, an adapter needs a base, and not every model gets small. Its config is enough to tell: `preflight` builds the model without
# memory, lets transformers and PEFT do to it what they would do, and counts. It has three verdicts. *fits*: at most half of the loaded bytes
# are in 16 bits. *works, but*: more than half of the bytes are. *hardly pays*: more than half of the *parameters* are.
#
# **Predict.** 4 bits are a quarter of {{16}}. How large are these models after loading, in per cent of their size in 16 bits?

# %%
prediction = {"LLaMA-7B": ..., "GPT-2": ..., "T5-large": ..., "Mixtral-8x7B": ...}  # ← your guesses, in %

# %% machinery "Four configs, and what preflight says"
configs = {
    "LLaMA-7B": transformers.LlamaConfig(),
    "GPT-2": transformers.GPT2Config(),
    "T5-large": transformers.T5Config(
        d_model=1024, d_ff=4096, num_layers=24, num_heads=16, architectures=["T5ForConditionalGeneration"]
    ),
    "Mixtral-8x7B": transformers.MixtralConfig(architectures=["MixtralForCausalLM"]),
}
reports = {name: preflight(config) for name, config in configs.items()}
shares = {}
for name, report in reports.items():
    whole, rest = 100 * report.nbytes / report.dense_bytes, report.share_of_bytes_left
    text = f"{whole:.0f} %: {report.nbytes / 1e9:.3g} of {report.dense_bytes / 1e9:.3g} GB"
    shares[name] = (whole * (1 - rest), whole * rest, text)
experts = sum(w.numel for w in reports["Mixtral-8x7B"].left if "experts" in w.name) / reports["Mixtral-8x7B"].parameters
percent = {name: four + rest for name, (four, rest, _) in shares.items()}

# %% alt="Four stacked horizontal bars: bytes after loading in per cent of the model in 16 bits, split into 4 bits and left in 16 bits or more. LLaMA-7B {{percent['LLaMA-7B']:.0f}} %, GPT-2 {{percent['GPT-2']:.0f}} %, T5-large {{percent['T5-large']:.0f}} %, Mixtral-8x7B {{percent['Mixtral-8x7B']:.0f}} %, almost all of it in 16 bits."
_ = plot_preflight(new_axes(height=2.8), shares, prediction)
for name, report in reports.items():
    print(f"{name:<14}{report.verdict}")

# %% claims
assert "(Conv1D, transposed)" in str(reports["GPT-2"])
assert transformers.T5ForConditionalGeneration._keep_in_fp32_modules == ["wo"]

# %% [markdown]
# **What happened?** Only linear layers get 4 bits, and a model may keep its weights elsewhere:
#
# - *GPT-2* has a large vocabulary for its size. The table of its embeddings is also the output head (they are *tied*), and stays.
# - *T5's* class names a part, `wo`, that is never rounded to 4 bits.
# - *Mixtral* has eight MLPs in each layer, its *experts*, of which each token uses two. They hold {{experts:.0%}} of the parameters. Since transformers {{5}} they lie in three-dimensional tensors, which its 4-bit
#   loading leaves alone. (bitsandbytes can pack them: `replace_parameter_4bit`.)
#
# Try a model that you have in mind. This downloads its config only:
#
# ```
# python -m qlora_lab.models preflight Qwen/Qwen2.5-7B-Instruct
# ```
#
# (Do not count a 4-bit model's parameters with `numel()`, which counts bytes, and two weights share one: of LLaMA-7B's
# {{reports["LLaMA-7B"].parameters / 1e9:.2f}} billion it finds
# {{(reports["LLaMA-7B"].parameters - sum(w.numel for w in reports["LLaMA-7B"].weights if w.quantized) / 2) / 1e9:.2f}}.)
#
# **Exercise H.4 ●●○ (5 minutes).** Predict the verdicts. `preflight` would tell you, but these numbers suffice:

# %%
for name, config in unseen_configs().items():
    facts = f"{preflight(config).parameters / 1e9:5.2f} billion parameters, vocabulary {config.vocab_size:>7,} × width"
    tied = "tied" if config.tie_word_embeddings else "and a head of that size"
    print(f"{name:<14}{facts} {config.hidden_size} {tied}, {getattr(config, 'num_experts', 0)} experts")

# %%
### BEGIN SOLUTION
### STUB: verdicts = {"Qwen2.5-1.5B": ..., "Gemma-2-2B": ..., "Llama-3-8B": ..., "Qwen3-30B-A3B": ...}
verdicts = {
    "Qwen2.5-1.5B": "fits",
    "Gemma-2-2B": "works, but",
    "Llama-3-8B": "fits",
    "Qwen3-30B-A3B": "hardly pays",
}
### END SOLUTION

# %%
check_verdicts(verdicts)

# %% [markdown]
# <details><summary>Hint 1</summary>Vocabulary × width is one table, with {{2}} bytes a number. A head of that size counts again. What
# remains of the parameters are, nearly all, linear layers, with about half a byte a number.</details>
# <details><summary>Hint 2</summary>Where do experts lie, in transformers' newer versions?</details>

# %% [markdown]
# ## Recap
#
# - A merge can lose the adapter, as rounding to its base's own levels does, or it can make the base worse. Measure both.
# - An adapter survives a merge into 4 bits if it was trained to, at a price.
# - Kept apart, adapters can be changed, added and taken off, and one base serves them all.
# - Ask `preflight` what of a model would be in 4 bits before you download it.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
