# %% [markdown]
# # 02 · Why can I not just fine-tune a 7B model?
#
# LLaMA-7B has 6.7 billion parameters. In 16 bits its weights take 13.5 GB, and on a card of 24 GB it answers questions with
# room to spare. Start to fine-tune it on that card, and the first step ends in *CUDA out of memory*. What is it that fills
# 24 GB? And how can QLoRA need 7 for the same model? It is all arithmetic, and you can do it before you rent a card.
#
# | you need | |
# |---|---|
# | time | 20 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports"
import json
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch

import qlora_lab
from qlora_lab.classroom.checks import check_12_gb, check_largest_model, check_logits, check_model_bytes, progress
from qlora_lab.classroom.lessons.n02.figures import MEMORY_STYLES, plot_growth, plot_memory
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES, bits_per_parameter, estimate, layer_activation_bytes, trainable_parameters

# %%
CARDS = [8, 16, 24, 40, 80]  # GB, 10^9 bytes

# %% [markdown]
# GB is 10⁹ bytes here, GiB 2³⁰. Many a card "of 24 GB" has 24 GiB, 25.8 GB. We count it as 24 GB: the difference is a
# reserve for what no sum foresees, such as gaps between tensors. (Not every card has it: Colab's T4 "of 16 GB" shows 15.6.)
#
# ## 1 · The wall
#
# You may have been taught this sum for fine-tuning all of LLaMA-7B in 16 bits:
#
# > 14 GB weights + 28 GB Adam + 14 GB gradients + about 10 GB activations = 66 GB
#
# **Predict.** How many GB does it take, activations aside? By that sum, 56.

# %%
prediction = {"full fine-tuning": 56}  # ← your guess, in GB

# %% [markdown]
# Count the parameters first. A layer has four attention matrices and three of the feed-forward part:

# %%
shape = SHAPES["llama-7b"]
hidden, mlp, layers, vocabulary = 4096, 11008, 32, 32000

linears = layers * (4 * hidden * hidden + 3 * hidden * mlp)
embeddings = 2 * vocabulary * hidden  # input embeddings and output head
norms = (2 * layers + 1) * hidden
parameters = linears + embeddings + norms
print(f"{parameters:,} parameters, {linears / parameters:.1%} of them in the layers' linears")

# %% claims
assert parameters == shape.parameters() == 6_738_415_616

# %% [markdown]
# Then what each of them brings along in *mixed precision*, the usual way to train:

# %% alt="Two stacked horizontal bars of memory in GB, with lines at card sizes. Taught: 56.0, from weights 14, gradients 14, optimizer states 28. Full fine-tuning: {{sum(full.values()) / 1e9:.1f}}, past the 80 GB line; half of it is optimizer states, a quarter an fp32 copy of the weights. A diamond is your guess."
full = {
    "weights": 2 * parameters,  # bytes: bf16
    "gradients": 2 * parameters,  # bf16
    "optimizer states": (4 + 4) * parameters,  # Adam's mean and mean square of the gradients, fp32
    "fp32 copy": 4 * parameters,  # the weights again, for the update
}
taught = {"weights": 14, "gradients": 14, "optimizer states": 28}
rows = {"taught": taught, "full fine-tuning": {part: size / 1e9 for part, size in full.items()}}
_ = plot_memory(new_axes(height=2.9), rows, CARDS, prediction)

# %% claims
ours = estimate(shape, "full", full_precision="mixed", optimizer="adamw_torch")
for name, part in {
    "gradients": "gradients",
    "optimizer states": "optimizer states",
    "master weights": "fp32 copy",
}.items():
    assert ours.parts[name] == full[part]
assert f"{2 * parameters / 1e9:.1f}" == "13.5" and f"{24 * 2**30 / 1e9:.1f}" == "25.8"

# %% [markdown]
# **What happened?** {{sum(full.values()) / 1e9:.1f}} GB: {{sum(full.values()) / parameters:.0f}} bytes for each parameter, where the taught sum has 8. It holds Adam's two numbers in 16 bits
# (4 bytes for both, not 8), and no fp32 copy. Can one not leave those out? Adam moves a weight by about the learning rate,
# often 0.00001 in full fine-tuning. Do that a thousand times:

# %%
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.tensor(0.02, dtype=dtype)
    for _ in range(1000):
        weight -= 1e-5
    print(f"{str(dtype):<15} from 0.02 to {weight.item():.4f}")

# %% claims
assert f"{weight.item():.4f}" == "0.0200" and weight == torch.tensor(0.02, dtype=torch.bfloat16)

# %% [markdown]
# bf16 keeps eight significant bits. A step smaller than half the distance to the next number is rounded away, a thousand
# times in a row. The fp32 copy collects such steps. So there are several recipes, and which one a sum means, it seldom says:

# %%
RECIPES = {  # bytes a parameter: weights, gradients, Adam, fp32 copy
    "all in bf16": (2, 2, 4, 0),
    "bf16, Adam in fp32": (2, 2, 8, 0),
    "mixed precision": (2, 2, 8, 4),
    "all in fp32": (4, 4, 8, 0),
}
sizes = {"7B": parameters, "65B": SHAPES["llama-65b"].parameters()}
print(f"{'':<20}bytes" + "".join(f"{size:>12}" for size in sizes))
for recipe, each in RECIPES.items():
    print(f"{recipe:<20}{sum(each):>5}" + "".join(f"{sum(each) * n / 1e9:>9,.1f} GB" for n in sizes.values()))

# %% claims
assert f"{12 * sizes['65B'] / 1e9:.0f} {12 * parameters / 1e9:.1f} {ours.total / 1e9:.1f}" == "783 80.9 109.4"

# %% [markdown]
# The taught sum is the first line, with a round 7 billion. QLoRA's paper says "more than 780 GB" for 65B: that is the second, {{12 * sizes['65B'] / 1e9:.0f}} GB. And mixed
# precision saves nothing over fp32 here; it is faster. None of the lines fits 7B on a card of 40 GB. (In full, with the driver's
# share and what Adam needs while it updates one tensor after the other, `estimate` says {{ours.total / 1e9:.1f}} GB.)
#
# **Exercise 2.1 ●○○ (3 minutes).** The other way round: how many parameters may a model have, so that its full fine-tuning
# fits a card, activations aside?


# %%
def largest_model(card, bits, moment_bits, copy):
    """Parameters that fit into `card` GB (10^9 bytes).

    bits: of a weight, and of its gradient. moment_bits: of each of Adam's two numbers. copy: is there an fp32 copy?
    """
    ### BEGIN SOLUTION (about 2 lines)
    bits_each = 2 * bits + 2 * moment_bits + (32 if copy else 0)
    return card * 1e9 / (bits_each / 8)
    ### END SOLUTION


# %%
check_largest_model(largest_model)

# %% [markdown]
# <details><summary>Hint 1</summary>How many bits does one parameter take in all? Weight, gradient, two moments, and
# perhaps a copy of 32 bits.</details>
# <details><summary>Hint 2</summary>Bits → bytes: divide by 8. Then the card's bytes by that.</details>

# %% [markdown]
# ## 2 · LoRA: train something small beside it
#
# **LoRA** freezes the model and puts a pair of thin matrices, an *adapter*, beside each linear: `rank` × inputs and outputs ×
# `rank`. What is frozen needs no gradient, no Adam and no fp32 copy. You may have been taught:
#
# > 14 GB frozen weights + 40 MB adapter + 80 MB optimizer = 14.2 GB
#
# **Predict.** How many GB are there on top of the weights, at rank 16, one sample of 512 tokens at a time?

# %%
prediction = {"rank 16": 0.12}  # ← your guess, in GB: 40 MB + 80 MB

# %%
rank, tokens = 16, 512
adapter = layers * sum(rank * inputs + outputs * rank for inputs, outputs in shape.linears().values())

lora = {  # bytes, at the step's peak
    "base weights": 2 * linears,
    "embeddings and head": 2 * embeddings,
    "norms": 2 * norms,
    "adapters": 4 * adapter,  # fp32
    "optimizer states": (4 + 4) * adapter,
    "bf16 copies": 2 * adapter,  # of the adapters, to multiply with
    "activations": layers * tokens * 2 * hidden,  # each layer's input, with gradient checkpointing
    "logits and loss": (2 + 4 + 4) * (tokens - 1) * vocabulary,  # logits in bf16 and fp32, and their log-softmax
    "cuBLAS workspace": 2 * 32 * 2**20,  # for matrix products
}
ours = estimate(shape, "lora", rank=rank, sequence_length=tokens, optimizer="adamw_torch")

# %% claims
assert adapter == trainable_parameters(shape, rank) == 39_976_960
small = ours.parts["activations"] - lora.pop("activations")  # such as the last norm's input
assert lora.items() <= ours.parts.items() and 0 <= small < 0.02e9 and ours.outside["CUDA context"] == 0.5e9

# %%
WEIGHTS = ("base weights", "quantization constants", "embeddings and head", "norms", "biases")
WORKSPACE = ("bf16 copies", "dequantized weight", "update", "cuBLAS workspace")
SHORT = {"master weights": "fp32 copy", "paged optimizer states": "paged states"}
SHORT |= dict.fromkeys(WEIGHTS, "weights") | dict.fromkeys(WORKSPACE, "workspace")


def grouped(memory):
    """GB by part, some parts taken together."""
    groups = {}
    for part, size in (memory.parts | memory.outside).items():
        group = SHORT.get(part, part)
        groups[group] = groups.get(group, 0) + size / 1e9
    return {group: size for group, size in groups.items() if size}


# %% alt="Two stacked horizontal bars: memory on top of the weights in GB. Taught: 0.12, adapters and optimizer states. Rank 16: 1.44, with 0.5 for the CUDA context, 0.32 for optimizer states and about 0.15 each for adapters, activations, logits and loss, and workspace. A diamond is your guess."
on_top = {group: size for group, size in grouped(ours).items() if group != "weights"}
rows = {"taught": {"adapters": 0.04, "optimizer states": 0.08}, "rank 16": on_top}
ends = {name: f"{sum(parts.values()):.2f} GB" for name, parts in rows.items()}
plot_memory(new_axes(height=2.9), rows, guess=prediction, ends=ends).set_xlabel("memory on top of the weights (GB)")
print(f"in all: {ours.total / 1e9:.1f} GB")

# %% claims
assert 11.5 < sum(on_top.values()) / 0.12 < 12.5 and f"{ours.total / 1e9:.1f}" == "14.9"
assert f"{4 * adapter / 1e6:.0f} {8 * adapter / 1e6:.0f}" == "160 320"  # MB

# %% [markdown]
# **What happened?** Twelve times as much as the sum says. It counted 40 million *parameters* as 40 MB; in fp32 they are 160 MB,
# and Adam's two numbers 320. The rest it left out: activations, the logits over 32,000 words for each token, workspaces, and
# the **CUDA context**, which the driver takes before your first tensor. (Here it counts as half a GB; on the H100 of notebook 10
# it was 0.65.)
#
# Gradients are missing in the bar for a reason: a step has several moments that may be its peak, and this one's comes at the
# end of the forward pass, when there are no gradients yet. `estimate` takes the largest moment.
#
# So LoRA breaks the wall: from 108 to 15 GB. Nine tenths of what is left are weights that never change.

# %% claims
share = grouped(ours)["weights"] / (ours.total / 1e9)
assert f"{share:.0%}" == "90%"

# %% [markdown]
# ## 3 · QLoRA: what never changes can be stored in 4 bits
#
# > 7B × 0.5 bytes = 3.5 GB, + 40 MB + 80 MB = 3.7 GB
#
# **Predict.** How many GB does QLoRA take, with the same adapter and the same 512 tokens?

# %%
prediction = {"QLoRA": 3.7}  # ← your guess, in GB

# %% alt="Two stacked horizontal bars of memory in GB. Taught: 3.6, nearly all of it weights. QLoRA: {{qlora.total / 1e9:.1f}}; its weights alone, {{at_rest:.2f}}, exceed the taught sum, the CUDA context adds 0.5, and six small parts share the rest. A diamond is your guess."
qlora = estimate(shape, "qlora", rank=16)
rows = {"taught": {"weights": 3.5, "adapters": 0.04, "optimizer states": 0.08}, "QLoRA": grouped(qlora)}
plot_memory(new_axes(height=2.9), rows, CARDS, prediction)
print(qlora.table())
at_rest = grouped(qlora)["weights"]
print(f"\nweights and constants alone: {at_rest:.2f} GB")

# %% claims
assert f"{at_rest:.2f} {qlora.total / 1e9:.1f} {bits_per_parameter():.6f}" == "3.87 5.3 4.126953"

# %% [markdown]
# **What happened?** The weights alone take more than the whole taught sum: {{at_rest:.2f}} GB. Only the linears are quantized.
# Embeddings and output head keep 16 bits, and every block of 64 codes has a scale (notebook 05). The rest is what LoRA has too.
#
# The table ends in three sizes that people call "the memory". They are not the same:
#
# - **peak allocated** is the most that PyTorch's tensors occupied at once; `torch.cuda.max_memory_allocated()` reports it.
# - The **CUDA context** lies outside PyTorch. `nvidia-smi` counts it.
# - **Paged optimizer states** lie outside as well, in memory that the driver moves between GPU and CPU. They stay on the card while
#   there is room, and move out when there is none. The total counts them as if they stayed.
#
# **Exercise 2.2 ●●○ (5 minutes).** Your colleague wants to know what *her* model takes in NF4 with double quantization, before any
# training. Half a byte × parameters is far off for some. Write it for any shape: a linear's parameter takes 4.126953 bits
# (4, and 8/64 + 32/(64 · 256) for its scales), any other 16.


# %%
def model_bytes(shape):
    """Bytes of a 4-bit model at rest.

    shape has num_hidden_layers, hidden_size, vocab_size, tie_word_embeddings (True: embeddings and head are one
    matrix), and linears(), one layer's {name: (inputs, outputs)}.
    """
    ### BEGIN SOLUTION (about 4 lines)
    quantized = shape.num_hidden_layers * sum(inputs * outputs for inputs, outputs in shape.linears().values())
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    return quantized * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (embeddings + norms)
    ### END SOLUTION


# %%
check_model_bytes(model_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>Section 1 counted linears, embeddings and norms of LLaMA-7B: the same three, from
# <code>shape</code>.</details>
# <details><summary>Hint 2</summary><code>shape.linears()</code> is one layer's. There are
# <code>shape.num_hidden_layers</code>.</details>
# <details><summary>Hint 3</summary>Linears: bits / 8. Everything else: 2 bytes.</details>

# %% [markdown]
# ## 4 · The three, side by side
#
# From here on with the paper's settings: rank 64 on all linears, batch 1, 512 tokens, gradient checkpointing, paged AdamW.

# %% alt="Stacked horizontal bars of memory in GB, with lines at card sizes. Full fine-tuning takes {{needed['full'].total / 1e9:.1f}}, past the 80 GB line; LoRA {{needed['LoRA'].total / 1e9:.1f}}, just past the 16 GB line; QLoRA 7.2, below the 8 GB line. The last two, enlarged below: the weights shrink by 71 %, the other parts stay nearly the same."
METHODS = {"full": "full", "LoRA": "lora", "QLoRA": "qlora"}
needed = {name: estimate(shape, method, full_precision="mixed") for name, method in METHODS.items()}
bars = {name: grouped(memory) for name, memory in needed.items()}

_, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.8), height_ratios=[3, 2], layout="constrained")
plot_memory(top, bars, CARDS, legend=False)
plot_memory(bottom, {name: bars[name] for name in ("LoRA", "QLoRA")}, CARDS, limit=20, legend=False)
for ax in (top, bottom):
    ax.spines[["top", "right"]].set_visible(False)
top.figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
_ = bottom.set_xlabel("the lower two, enlarged (GB, 10$^9$ bytes)")

# %% claims
assert [f"{memory.total / 1e9:.0f}" for memory in needed.values()] == ["109", "17", "7"]

# %% [markdown]
# LoRA takes away gradients, Adam and the copy of the frozen weights; QLoRA then takes {{100 * (1 - bars['QLoRA']['weights'] / bars['LoRA']['weights']):.0f}} % of the weights themselves. Is it true?
# Here is what one H100 measured, beside the sum. (109 GB are more than it has: *full* is a model of 1.7B, with 2 × 1024 tokens and
# Adam's states not paged.)

# %%
folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record = json.loads((folder / "memory-nvidia-h100-80gb-hbm3.json").read_text())
KNOBS = ("rank", "targets", "batch_size", "sequence_length", "gradient_checkpointing", "optimizer", "adapter_dtype",
         "full_precision")  # fmt: skip
MEASURED = {
    "full": {"shape": "smollm2-1.7b", "full_precision": "mixed", "optimizer": "adamw_torch"},
    "LoRA": {"shape": "llama-7b", "rank": 64, "batch_size": 1, "sequence_length": 512},
    "QLoRA": {"shape": "llama-7b", "rank": 64, "batch_size": 1, "sequence_length": 512},
}
errors = {}
print(f"recorded on {record['device']}, {record['date']}: peak allocated")
for name, which in MEASURED.items():
    run = next(r for r in record["runs"] if (which | {"method": METHODS[name]}).items() <= r.items())
    sum_of = estimate(SHAPES[run["shape"]], run["method"], **{knob: run[knob] for knob in KNOBS})
    was, said = run["measured"]["peak_allocated"], sum_of.peak_allocated
    errors[name] = said / was - 1
    print(f"{name:<6}{run['shape']:<13}{was / 1e9:>6.2f} GB on the GPU,", end=" ")
    print(f"{said / 1e9:>5.2f} GB by the sum ({errors[name]:+.1%})")

# %% claims
assert all(abs(error) < 0.01 for error in errors.values())
driver = run["measured"]["peak_reserved"] + run["measured"]["outside_allocator"]

# %% [markdown]
# Within 1 %, for what torch allocates. {{16 * SHAPES['smollm2-1.7b'].parameters() / 1e9:.1f}} GB of the first line are those 16 bytes, for each of 1.7 billion parameters. Paged
# states and the context lie beside it; with them the driver saw {{driver / 1e9:.1f}} GB for QLoRA, where the figure says {{needed['QLoRA'].total / 1e9:.1f}}. Notebook 10 looks for
# the rest, and compares dozens of settings, up to 65B.
#
# ## 5 · What grows with the batch
#
# Activations are what the forward pass keeps for the backward pass. **Gradient checkpointing** keeps only the input of each
# layer, and computes the rest again when it is needed. You may have been taught: *it halves the memory*.
#
# **Predict.** QLoRA, 16 samples of 512 tokens, about 12 GB with checkpointing. And without?

# %%
prediction = {"without": 24}  # ← your guess, in GB: twice 12

# %% alt="Two lines: memory in GB over tokens in a step, 512 to 8,192. With checkpointing it rises from 7.2 to 11.8; without, from 9.7 to 54.6, past the lines of the 16, 24 and 40 GB cards. So the saving grows from 26 to 78 %. A diamond at 8,192 tokens is your guess."
BATCHES = [1, 2, 4, 8, 16]

curves = {}
for name, on in {"with": True, "without": False}.items():
    steps_of = [estimate(shape, batch_size=batch, gradient_checkpointing=on) for batch in BATCHES]
    curves[name] = [memory.total / 1e9 for memory in steps_of]
steps = [512 * batch for batch in BATCHES]
plot_growth(new_axes(), curves, steps, CARDS, (steps[-1], prediction["without"]))
saved = [1 - kept / everything for kept, everything in zip(*curves.values())]
for batch, kept, everything, share in zip(BATCHES, *curves.values(), saved):
    print(f"batch {batch:>2}: {kept:5.1f} GB with checkpointing, {everything:5.1f} GB without: {share:.0%} saved")

# %% claims
assert 0.24 < saved[0] < 0.27 and 0.76 < saved[-1] < 0.8 and f"{curves['with'][-1]:.0f}" == "12"

# %% [markdown]
# **What happened?** The saving is not one number: a quarter at batch 1, nearly four fifths at batch 16. Activations grow with the tokens; weights,
# adapters and optimizer do not. How much is it for each token? And were the taught "about 10 GB" right?

# %%
kept = layers * layer_activation_bytes(shape, "qlora", 64)
print(f"without checkpointing {kept / 1e6:.1f} MB a token, layers' inputs alone {layers * 2 * hidden / 1e6:.2f} MB")
each = layers * layer_activation_bytes(shape, "full", autocast=False)  # in 16 bits, as the sum has it
print(f"full fine-tuning without checkpointing: 10 GB are {10e9 / each:,.0f} tokens")

# %% claims
assert f"{kept / layers / (2 * hidden):.0f} {10e9 / each:,.0f}" == "21 1,676"

# %% [markdown]
# A layer keeps {{kept / layers / (2 * hidden):.0f}} times its input: what its norms, linears, attention and products need to go back. The 10 GB are right for some
# number of tokens, which the sum did not say.
#
# With checkpointing on, something else grows most:

# %%
long = estimate(shape, batch_size=16)
print(f"at the peak ({long.moment}): activations {long.parts['activations'] / 1e9:.1f} GB", end=", ")
print(f"logits and loss {long.parts['logits and loss'] / 1e9:.1f} GB")

# %% claims
assert long.parts["logits and loss"] == 16 * 511 * vocabulary * (4 + 4 + 4)
assert long.parts["activations"] < long.parts["logits and loss"]

# %% [markdown]
# The model gives a number for each word of its vocabulary, at each token. When the backward pass begins, three of them stand
# there in fp32: the log-softmax, its gradient, and the gradient of the logits.
#
# **Exercise 2.3 ●●○ (3 minutes).** 8 GB are free for logits and loss. How many tokens fit into one step, with LLaMA's vocabulary of
# 32,000? Guess, then with Llama 3's, 128,256. (Batch 1 of a long document is one step, too.)


# %%
def tokens_that_fit(vocabulary, gigabytes):
    """Whole tokens whose logits and loss take `gigabytes` (10^9 bytes) at most."""
    ### BEGIN SOLUTION (about 1 line)
    return int(gigabytes * 1e9 // (vocabulary * 3 * 4))
    ### END SOLUTION


# %%
check_logits(tokens_that_fit)

# %% [markdown]
# <details><summary>Hint</summary>Bytes of one token: words × numbers for each word × bytes of an fp32 number.</details>

# %% [markdown]
# ## 6 · All the knobs
#
# Every move asks `estimate` again. Find the knob that helps most, for a small batch and for a large one. (For *full*, rank and
# targets do nothing.)

# %%
TARGETS = {
    "all linears": "all-linear",
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "q, v": ("q_proj", "v_proj"),
}


def draw(model, method, targets, **knobs):
    mixed = {"targets": TARGETS[targets], "full_precision": "mixed"}
    memory = estimate(SHAPES[model], METHODS[method], **mixed, **knobs)
    limit = next((size for size in (26, 104, 420, 1650) if memory.total < 0.88e9 * size), 6400)
    bar = dict.fromkeys(MEMORY_STYLES, 0.0) | grouped(memory)
    ax = plot_memory(new_axes(height=2.7), {"": bar}, CARDS, limit=limit)
    title = (
        f"{model} · {method}: peak allocated {memory.peak_allocated / 1e9:.1f} GB, in all {memory.total / 1e9:.1f} GB"
    )
    ax.set_title(title, fontsize=11, pad=18)
    return ax


def pick(name, options, value):
    return ipywidgets.SelectionSlider(options=options, value=value, description=name)


# %% alt="One stacked horizontal bar: memory in GB of the settings that you choose, part by part, with lines at card sizes. At the start, LLaMA-7B with QLoRA and batch 1 takes 7.2 GB in all, below the 8 GB line; more than half of it are weights, and 5.4 GB are the peak allocated."
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
explore(
    draw,
    model=ipywidgets.Dropdown(options=list(SHAPES), value="llama-7b", description="model"),
    method=ipywidgets.ToggleButtons(options=list(METHODS), value="QLoRA", description="method"),
    targets=ipywidgets.Dropdown(options=list(TARGETS), description="targets"),
    optimizer=ipywidgets.Dropdown(options=OPTIMIZERS, value="paged_adamw_32bit", description="optimizer"),
    rank=pick("rank", [4, 8, 16, 32, 64, 128, 256], 64),
    batch_size=pick("batch size", [1, 2, 4, 8, 16, 32], 1),
    sequence_length=pick("tokens in each", [128, 256, 512, 1024, 2048, 4096], 512),
    gradient_checkpointing=ipywidgets.Checkbox(value=True, description="gradient checkpointing"),
)

# %% [markdown]
# **Exercise 2.4 ●●○ (5 minutes).** You have a card of 12 GB and want LLaMA-13B: QLoRA, rank 64 on all linears, 3,072 tokens a step
# (three samples of 1,024, say). Nothing may page out: the total must fit. The optimizers are those of the slider; adapters are
# `"float32"`, or `"bfloat16"`, which halves them and their gradients.

# %%
settings = {
    ### BEGIN SOLUTION
    ### STUB: "batch_size": ...,
    ### STUB: "sequence_length": ...,
    ### STUB: "gradient_checkpointing": ...,
    ### STUB: "optimizer": ...,
    ### STUB: "adapter_dtype": ...,
    "batch_size": 3,
    "sequence_length": 1024,
    "gradient_checkpointing": True,
    "optimizer": "paged_adamw_8bit",
    "adapter_dtype": "bfloat16",
    ### END SOLUTION
}

# %%
check_12_gb(settings)

# %% [markdown]
# <details><summary>Hint 1</summary>Try it: the check tells how much is too much, and the largest part that you can
# change.</details>
# <details><summary>Hint 2</summary>Adam's states in 8 bits are a quarter of those in 32. That alone just fails.</details>

# %% [markdown]
# ## 7 · Which card for which model?
#
# For each model and card, the first of *full*, *LoRA*, *QLoRA* whose total fits: no more squeezing than needed. Paper's settings.

# %%
MODELS = ["smollm2-1.7b", "llama-7b", "llama-3-8b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b"]
SIZES = [8, 16, 24, 40, 48, 80]
best = {}
print(f"{'':<12}" + "".join(f"{card:>5} GB" for card in SIZES) + "  QLoRA needs")
for model in MODELS:
    totals = {n: estimate(SHAPES[model], m, full_precision="mixed").total / 1e9 for n, m in METHODS.items()}
    for card in SIZES:
        best[model, card] = next((name for name, size in totals.items() if size <= card), "–")
    print(f"{model:<12}" + "".join(f"{best[model, card]:>8}" for card in SIZES) + f"{totals['QLoRA']:>10.1f} GB")

# %% claims
big = estimate(SHAPES["llama-65b"])
assert "full" not in {best[m, c] for m in MODELS[1:] for c in SIZES}
assert best["llama-7b", 8] == "QLoRA" and best["llama-7b", 24] == "LoRA"
middle = estimate(SHAPES["llama-33b"])
eight_bits = estimate(shape, "full", full_precision="mixed", optimizer="adamw_8bit")
for memory, expected in ((big, "48.4 6.4"), (middle, "26.2 3.9"), (eight_bits, "68.7 0.0")):
    assert f"{memory.total / 1e9:.1f} {memory.outside['paged optimizer states'] / 1e9:.1f}" == expected

# %% [markdown]
# No card here holds full fine-tuning of 7B with Adam in 32 bits. (With Adam in 8 bits it takes {{eight_bits.total / 1e9:.1f}} GB.) 8 GB are enough for QLoRA, a
# laptop's card; LoRA wants 24.
#
# And the paper's headline, 65B on one card of 48 GB? {{big.total / 1e9:.1f}} GB: {{big.total / 1e9 - 48:.1f}} too many. 33B misses 24 GB by 2.2; the paper, too, found that it
# "does not quite fit". But 6.4 GB of the one and 3.9 of the other are paged optimizer states, which may move out. That is what paging
# is for: it turns a near miss into a slower step. Notebook 10 puts both to the test.
#
# ## Recap
#
# - Full fine-tuning in mixed precision takes 16 bytes a parameter: weights and gradients 2 each, Adam 8, an fp32 copy 4.
# - LoRA pays that price for the adapters only; the frozen weights remain, 2 bytes each.
# - QLoRA stores the linears among them in 4.127 bits. Embeddings, head, activations and logits do not shrink with them.
# - Activations and logits grow with the tokens of a step. Checkpointing saves a quarter at batch 1, much more at batch 16.
# - Say which memory you mean: allocated, with the CUDA context, with paged states; and GB or GiB.
#
# This serves *measure and compare memory, LoRA against QLoRA*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [03 · What is lost with fewer bits?](03_number_formats.ipynb)
