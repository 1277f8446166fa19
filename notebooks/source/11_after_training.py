# %% [markdown]
# # 11 · How do I use it?
#
# The training is over. What you have is a 4-bit base and a small file beside it, and tomorrow somebody wants to *run*
# it. There are two plans:
#
# - **Plan A: merge.** Add the adapter to the weights, once and for all. One ordinary model, no extra work per token.
# - **Plan B: keep both.** The base stays in 4 bits, the adapter beside it; several adapters can share one base.
#
# Plan A has a trap that the most natural line of code walks into: *which* weights do you add it to? You train a small
# adapter, merge it three ways, and measure what is left of it. Then you serve two adapters from one base, and learn to
# tell before any download whether a model suits QLoRA at all.
#
# | you need | |
# |---|---|
# | time | 25 minutes, 2 of them computing on two CPU cores |
# | memory | 4 GB |
# | GPU | optional |

# %%
import json
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_merged_weight,
    check_verdicts,
    check_which_base,
    progress,
    unseen_configs,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.plots.n11 import plot_losses, plot_plans, plot_preflight, plot_snapped
from qlora_lab.finetuning import (
    Batches,
    add_lora,
    dequantize_linears,
    generate,
    is_exact,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    lora_parameters,
    merge,
    save_lora,
    text_loss,
    tokenize,
    train_steps,
    unload,
)
from qlora_lab.finetuning.models import pick_compute_dtype, pick_device
from qlora_lab.finetuning.quantized_linear import dense_weight
from qlora_lab.quantization import NF4, dequantize, quantize

device = pick_device()
compute_dtype = pick_compute_dtype(device)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1 · Two short trainings
#
# The orders of [notebook 07](07_qlora_run.ipynb), but only 64 of them: 16 steps of 4. You train two adapters, each on a
# fresh copy of the same 4-bit base. The first turns an order into JSON. The second gets *the very same prompts*, and
# learns to answer with a label for the parcel: `15 x purple bottle > Budapest`.

# %%
orders = {split: load_samples("orders", split)["messages"] for split in ("train", "validation", "test")}


def as_label(chat):
    """The same order, answered with a parcel label."""
    order = json.loads(chat[-1]["content"])
    label = f"{order['quantity']} x {order['colour']} {order['item']} > {order['city']}"
    return [*chat[:-1], {"role": "assistant", "content": label}]


def train_adapter(chats, name):
    """Train an adapter on the 4-bit base, write its files, return the model with it."""
    model, tokenizer = load_model(quantization="nf4")
    samples, _ = tokenize({"messages": chats}, tokenizer, max_length=256)
    add_lora(model, rank=16, alpha=32)
    settings = {"learning_rate": 3e-3, "compute_dtype": compute_dtype, "pad_token_id": tokenizer.pad_token_id}
    records = list(train_steps(model, Batches(samples, batch_size=4, seed=0), steps=16, **settings))
    save_lora(model, folder / name)
    print(f"{name}: loss {records[0].loss:.2f} at the first step, {records[-1].loss:.2f} at the last")
    return model, tokenizer


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
_ = train_adapter([as_label(chat) for chat in orders["train"][:100]], "label")
model, tokenizer = train_adapter(orders["train"][:100], "json")

# %% [markdown]
# ## 2 · What is in the files?
#
# **Predict.** The bundled model has 134.5 million parameters. How many MB (10⁶ bytes) does the folder `json` take?

# %%
prediction = {"MB": 70}  # ← your guess

# %%
from safetensors import safe_open

files = {path.name: path.stat().st_size for path in sorted((folder / "json").iterdir())}
for name, size in files.items():
    print(f"{name:<28}{size:>12,} bytes")
with safe_open(folder / "json" / "adapter_model.safetensors", "pt") as adapter:
    names = sorted(adapter.keys())
    for name in names[:2]:
        print(name, tuple(adapter.get_tensor(name).shape))
print(f"... {len(names)} tensors, {lora_parameters(model):,} numbers of 4 bytes; your guess: {prediction['MB']} MB")
assert f"{sum(files.values()) / 1e6:.1f}" == "19.6" and len(names) == 2 * 210 and lora_parameters(model) == 4_884_480

# %% [markdown]
# **What happened?** A and B of 210 layers, 4 bytes a number, and *nothing else*: 19.6 MB. The base is not in there. The
# other file names it, with rank, alpha and the layers meant. An adapter without its base is worthless, and on another
# base of the same shapes it runs without complaint and talks nonsense. (Ours carry a fingerprint of the base, and
# `load_lora` refuses another. PEFT reads these files too; its own have no fingerprint.)

# %%
print((folder / "json" / "adapter_config.json").read_text())

# %% [markdown]
# ## 3 · Plan A: merge it
#
# A layer computes *W x + alpha / rank · B A x*. That is one matrix, if you add them up first.
#
# **Exercise 11.1 ●○○ (4 minutes).** Merge one layer. `weight` is (out, in), `A` is (rank, in), `B` is (out, rank). Leave
# `weight` itself as it is.


# %%
def merged_weight(weight, A, B, alpha):
    """The one matrix that does what the layer and its adapter do together."""
    ### BEGIN SOLUTION (about 2 lines)
    rank = A.shape[0]
    return weight + alpha / rank * B @ A
    ### END SOLUTION


# %%
check_merged_weight(merged_weight)

# %% [markdown]
# <details><summary>Hint 1</summary>Which product of A and B has the weight's shape?</details>
# <details><summary>Hint 2</summary>The rank is the number of rows of A: <code>len(A)</code>.</details>

# %% [markdown]
# ### But which W?
#
# There are two: the original of the checkpoint, in 16 bits, and what its 4 bits stand for. Three things can be done:
#
# | | added to | stored as |
# |---|---|---|
# | *dequantized* | the 4-bit weights, made dense | 16 bits |
# | *requantized* | the 4-bit weights, made dense | rounded to 4 bits again |
# | *pristine* | the original checkpoint's weights | 16 bits |
#
# *Requantized* is what PEFT's `merge_and_unload()` does on a 4-bit model. *Pristine* is what you get if you load the
# 16-bit checkpoint, put the adapter on it, and merge.
#
# **Predict.** The model with its adapter, unmerged, has the validation loss printed below. What will the three have?

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
validation, _ = tokenize({"messages": orders["validation"][:24]}, tokenizer, max_length=256)


def loss_of(model):
    """Validation loss, nats per token."""
    loss = text_loss(model, validation, pad_token_id=tokenizer.pad_token_id, dtype=compute_dtype)
    return loss.total / loss.tokens


@torch.no_grad()
def scores_of(model):
    """The model's logits for all answer tokens of three orders."""
    ids = [torch.tensor([sample.ids], device=device) for sample in validation[:3]]
    return torch.cat([model(one).logits[0, -40:].float() for one in ids])


trained_loss, trained_scores = loss_of(model), scores_of(model)
print(f"trained: {trained_loss:.3f} nats per token")

# %%
prediction = {"dequantized": 0.06, "requantized": 0.07, "pristine": 0.06}  # ← your guesses


# %%
def merged_into(which):
    """A model that has the adapter merged in, in one of the three ways."""
    if which == "requantized":
        from peft import PeftModel

        base, _ = load_model(quantization="nf4")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT does warn: "may get different generations due to rounding errors"
            return PeftModel.from_pretrained(base, folder / "json").merge_and_unload()
    base, _ = load_model(quantization=None if which == "pristine" else "nf4")
    if which == "dequantized":
        base = dequantize_linears(base)
    return unload(merge(load_lora(base, folder / "json")))


def weights_of(model):
    """The linear layers' weights by name, dense, in float32."""
    modules = {name: module for name, module in model.named_modules() if name in adapted}
    return {
        name: dense_weight(m).float() if hasattr(m, "quant_state") else m.weight.float() for name, m in modules.items()
    }


# %% [markdown]
# Three measures of each, all against the model as trained: the weights (relative to the size of what the adapter adds),
# the logits, and the loss.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
adapted = lora_layers(model)
delta = {name: layer.delta() for name, layer in adapted.items()}
rounded = {name: dense_weight(layer.base).float() for name, layer in adapted.items()}


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def loss_without_adapter():
    model, _ = load_model(quantization="nf4")
    return loss_of(model)


size = norm(delta.values())
losses, kept = {}, {}
print(f"the adapter adds {size / norm(rounded.values()):.1%} of the weights' size")
print(f"{'merged into':<14}{'weights off':>13}{'logits off':>12}{'loss':>8}{'exact of 12':>13}")
for which in ("dequantized", "requantized", "pristine"):
    merged = merged_into(which)
    weights = weights_of(merged)
    off = norm(weights[name] - rounded[name] - delta[name] for name in delta) / size
    scores = scores_of(merged)
    logits_off = ((scores - trained_scores).norm() / trained_scores.norm()).item()
    losses[which] = loss_of(merged)
    print(f"{which:<14}{off:>13.2f}{logits_off:>12.3f}{losses[which]:>8.3f}")
    kept[which] = {name: weights[name].to(torch.bfloat16) for name in list(delta)[:4]}
    del merged, weights
untrained = loss_without_adapter()

# %% [markdown]
# ### Which base, again?
#
# SECTION4

# %%
name = "model.layers.12.mlp.up_proj"
base, correction = rounded[name], delta[name]
factors = (1, 2, 3, 5, 7, 10, 14, 20, 30)


def survives(factor):
    """Share of the correction, `factor` times as large, that is still there after rounding to 4 bits."""
    wanted = factor * correction
    got = dequantize(quantize(base + wanted)) - base
    return ((got * wanted).sum() / wanted.square().sum()).item()


survival = {factor: survives(factor) for factor in factors}
print(", ".join(f"× {factor}: {share:.0%}" for factor, share in survival.items()))

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
import ipywidgets

from qlora_lab.classroom.widgets import explore

block = slice(640, 704)  # 64 weights that share a scale
scale = base.flatten()[block].abs().max()


def draw(factor):
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", width_ratios=(2, 1))
    wanted = base.flatten()[block] + factor * correction.flatten()[block]
    stored = dequantize(quantize(wanted))
    levels = NF4 * wanted.abs().max() / scale
    return plot_snapped(axes, (wanted / scale).tolist(), (stored / scale).tolist(), levels.tolist(), survival, factor)


explore(draw, factor=ipywidgets.SelectionSlider(options=factors, value=1, description="correction, times yours"))

# %% [markdown]
# **Exercise 11.2 ●●● (8 minutes).** You find a merged checkpoint, in bf16, and nobody remembers how it was made. You still
# have the adapter (`delta`, what it adds to this weight), the 16-bit weight (`original`) and what its 4 bits stand for
# (`rounded`). Which of the three ways was it? `quantize` and `dequantize` are at hand.


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
# <details><summary>Hint 1</summary>You can make all three candidates yourself.</details>
# <details><summary>Hint 2</summary>bf16 keeps 8 significant bits: no candidate is <em>equal</em>. Take the nearest.</details>

# %% [markdown]
# ## 4 · Plan B: keep 4 bits, change adapters
#
# The base is the same for everybody, and it is never written to. So one copy of it can serve any number of adapters,
# each request with its own. PEFT loads the files of section 2 under names:

# %%
from peft import PeftModel

base, _ = load_model(quantization="nf4")
served = PeftModel.from_pretrained(base, folder / "json", adapter_name="json")
served.load_adapter(folder / "label", adapter_name="label")
requests = [("json", 0), ("label", 0), ("label", 1), ("json", 1)]  # which adapter, which order

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
from qlora_lab.classroom.widgets import show_answers

rows = []
for adapter, which in requests:
    served.set_adapter(adapter)
    chat = orders["test"][which]
    rows.append((chat[-2]["content"], adapter, generate(served, tokenizer, [chat[:-1]], 44, dtype=compute_dtype)[0]))
show_answers(rows, ("order", "adapter", "answer"))
