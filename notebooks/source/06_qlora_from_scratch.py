# %% [markdown]
# # 06 · What happens when the base is 4-bit?
#
# LoRA trains two thin matrices beside a frozen one. QLoRA does one thing more: it rounds the frozen one to 4 bits. But
# rounding is a staircase, and the slope of a stair is zero. How can anything learn *through* it? You write the answer in
# ten lines, put it on a real language model, and hold it, step by step, against bitsandbytes and PEFT. Then you turn the
# bits down until the model breaks, and find out what LoRA can repair.
#
# | you need | |
# |---|---|
# | time | 40 minutes, 2 of them computing on two CPU cores |
# | memory | 4 GB |
# | GPU | not used: this notebook is about equality, and float32 on a CPU is where one can demand it |

# %%
import copy
import tempfile
import warnings
from unittest import mock

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import linear

from qlora_lab.classroom.checks import (
    check_ill_layers,
    check_input_gradient,
    check_quantizable,
    check_short_version,
    ill_layers,
    progress,
)
from qlora_lab.classroom.checks.n06 import DISEASES
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.plots.n06 import plot_bases, plot_layer, plot_megabytes, plot_repairs, plot_together
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.quantization import (
    double_quantize,
    quantize,
    quantize_absmax,
    quantize_affine,
    relative_rms,
)

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · The slope of a staircase
#
# A real layer, 576 features in and 1,536 out, its weight `W` and the same in 4 bits, `q`. `x` goes in; `gradient` is
# what comes back from the layers above, dL/dy.

# %%
draw = torch.Generator().manual_seed(0)
W = bundled_weight("model.layers.0.mlp.up_proj.weight").float()
q = double_quantize(quantize(W))
x, gradient = torch.randn(8, 576, generator=draw), torch.randn(8, 1536, generator=draw)
print(f"W: {tuple(W.shape)}, {q.bits_per_parameter:.3f} bits per parameter, rounded by {relative_rms(W, q.dequantize()):.3f}")


def sent_back(layer):
    """dL/dx for y = layer(x)."""
    inputs = x.clone().requires_grad_()
    layer(inputs).backward(gradient)
    return inputs.grad


# %% [markdown]
# **Predict.** The gradient goes back through `x @ q.dequantize().T`. By how much, relative to its size, does it differ from
# that of a dense layer with the *rounded* weights? And from that of one with the *original* weights?

# %%
prediction = {"rounded": 0.05, "original": 0.1}  # ← your guesses; 0 would be equal

# %%
through_4_bits = sent_back(lambda x: x @ q.dequantize().T)
dense = {"rounded": q.dequantize().requires_grad_(), "original": W.clone().requires_grad_()}
for name, weight in dense.items():
    difference = relative_rms(sent_back(lambda x: x @ weight.T), through_4_bits)
    print(f"dense layer with the {name} weights: {difference:.3f}, your guess {prediction[name]}")
assert torch.equal(sent_back(lambda x: x @ dense["rounded"].T), through_4_bits)
assert abs(difference - relative_rms(W, q.dequantize())) < 0.01

# %% [markdown]
# **What happened?** It is equal to the last bit. The rounding happened *once*, before training; it is no part of the
# graph. Of what is left, a constant matrix, y = x Wᵀ is a linear function of x, and its gradient is exact. Nothing
# "approximates the gradient of the rounding" in QLoRA. Only whoever trains the rounded weights themselves meets the
# staircase. The model is another one than before (the second line), and the gradients are exact for *that* model.
#
# **Exercise 6.1 ●○○ (3 minutes).** So write the way back, in one line. y = x Wᵀ; given dL/dy, what is dL/dx? Multiply in
# the gradient's dtype: it may be bfloat16.


# %%
def input_gradient(gradient, q):
    """dL/dy, Tensor[..., out], and W, in 4 bits, (out, in) -> dL/dx, Tensor[..., in]."""
    ### BEGIN SOLUTION (about 1 line)
    return gradient @ q.dequantize().to(gradient.dtype)
    ### END SOLUTION


# %%
check_input_gradient(input_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>Look at the shapes: (..., out) and (out, in) must give (..., in).</details>
# <details><summary>Hint 2</summary><code>tensor.to(gradient.dtype)</code> casts.</details>

# %% [markdown]
# ## 2 · Right numbers, wrong price
#
# `x @ q.dequantize().T` is a 4-bit layer then: right output, right gradient, one line. Why does nobody write it like
# that?
#
# **Predict.** How many MB (10⁶ bytes) does autograd keep of that line until the backward pass? In 4 bits, W takes 0.46 MB.

# %%
prediction = {"short version": 0.46}  # ← your guess, in MB


# %%
def kept_bytes(compute, but=()):
    """Bytes that autograd keeps of compute() for the backward pass, without those of the tensors in `but`."""
    kept, there = {}, {tensor.data_ptr() for tensor in but}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    del result  # only now may what was kept go
    return sum(kept.values())


# %% [markdown]
# Whoever knows that W can be made again need not keep it. That is what `torch.autograd.Function` is for: you say what
# is kept (here, the 4 bits that are in memory anyway) and write the way back yourself.


# %%
class FrozenMatmul(torch.autograd.Function):
    """x Wᵀ for a frozen W, held in 4 bits."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return linear(x, q.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.q.dequantize().to(gradient.dtype), None  # q gets no gradient


# %%
inputs = x.clone().requires_grad_()
megabytes = {
    "short version": kept_bytes(lambda: inputs @ q.dequantize().T) / 1e6,
    "FrozenMatmul": kept_bytes(lambda: FrozenMatmul.apply(inputs, q)) / 1e6,
}
_ = plot_megabytes(new_axes(height=1.9), megabytes, "kept for the backward pass (MB, 10$^6$ bytes)", prediction)
assert megabytes == {"short version": 1536 * 576 * 4 / 1e6, "FrozenMatmul": 0}
assert f"{q.nbytes / 1e6:.2f}" == "0.46"

# %% [markdown]
# **What happened?** Autograd kept the dense matrix, in float32: the way back needs W, and autograd does not know where W
# came from. Every layer would leave its dense copy behind, and by the end of the forward pass the whole 16 or 32-bit
# model would be there again. `FrozenMatmul` makes W a second time instead: time for memory. bitsandbytes does the same.
#
# The package's `QuantizedLinear` is a module around this function. From here on we use that.

# %%
from qlora_lab.finetuning import QuantizedLinear

layer = QuantizedLinear(q)
assert torch.equal(FrozenMatmul.apply(x, q), layer(x))
assert torch.equal(sent_back(lambda x: FrozenMatmul.apply(x, q)), sent_back(layer))
assert torch.equal(sent_back(layer), through_4_bits) and kept_bytes(lambda: layer(inputs)) == 0
print("same output, same gradient, nothing kept")

# %% [markdown]
# **Exercise 6.2 ●●○ (4 minutes).** Somebody trains LLaMA-7B with the short version, in bfloat16. How many GB (10⁹ bytes) do
# the linear layers' weights take when the forward pass is over? Count the 4-bit codes, their double-quantized scales
# (notebook 04) and what autograd keeps.


# %%
def short_version_gb(parameters):
    """GB of weights in memory at the end of the forward pass."""
    ### BEGIN SOLUTION (about 2 lines)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return parameters * (bits + 16) / 8 / 1e9
    ### END SOLUTION


# %%
check_short_version(short_version_gb)

# %% [markdown]
# <details><summary>Hint</summary>Two things lie in memory side by side: 4.127 bits, and 16 bits, for each parameter.</details>

# %% [markdown]
# **Exercise 6.3 ●●● (7 minutes).** Four functions, each a 4-bit layer; three are ill. `examine` holds one against
# the dense layer: error of the output, error of the gradient, bytes kept. Vary the number of tokens and the dtype
# until you can name what each has. (This weight is square, so a wrong product may run.)

# %%
square = double_quantize(quantize(bundled_weight("model.layers.0.self_attn.q_proj.weight").float()))
patients = ill_layers(square)


def examine(layer, tokens, dtype=torch.float32):
    a = torch.randn(1, tokens, 576, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = layer(a), linear(b, square.dequantize().to(dtype))
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(y))
    errors = relative_rms(expected.float(), y.float()), relative_rms(b.grad.float(), a.grad.float())
    kept = kept_bytes(lambda: layer(a))
    print(f"{tokens:>4} tokens: errors of output {errors[0]:.3f}, gradient {errors[1]:.3f}; keeps {kept:>9,} bytes")


for name, patient in patients.items():
    print(name)
    examine(patient, tokens=2)
for key, disease in DISEASES.items():
    print(f"{key!r}: {disease}")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ...}  # one of the six keys above for each
diagnosis = {"A": "keeps x", "B": "transposed", "C": "healthy", "D": "keeps W"}
### END SOLUTION

# %%
check_ill_layers(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary><code>examine(patients["A"], tokens=200)</code>: does what it keeps grow?</details>
# <details><summary>Hint 2</summary>W has 576 × 576 numbers of 4 bytes, x has 576 for each token.</details>

# %% [markdown]
# ## 3 · On a real model
#
# Which layers? Codes are for matrices that a layer multiplies by. An embedding is looked up, and in many models
# (this one too) the output head *is* the embedding matrix: two modules, one tensor.
#
# **Exercise 6.4 ●●○ (5 minutes).** Name the layers that may be quantized: every `nn.Linear` but those whose weight an
# `nn.Embedding` holds too. Models call their heads differently: do not go by the name.


# %%
def quantizable(model):
    """Names of modules, as `model.named_modules()` gives them."""
    ### BEGIN SOLUTION (about 3 lines)
    modules = dict(model.named_modules())
    embeddings = [m.weight for m in modules.values() if isinstance(m, torch.nn.Embedding)]
    linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    return [name for name, m in linears.items() if not any(m.weight is e for e in embeddings)]
    ### END SOLUTION


# %%
check_quantizable(quantizable)

# %% [markdown]
# <details><summary>Hint 1</summary><code>isinstance(module, torch.nn.Linear)</code>, and the same for Embedding.</details>
# <details><summary>Hint 2</summary><code>a is b</code> asks whether two names mean one tensor. <code>==</code> compares
# element by element.</details>

# %% [markdown]
# `quantize_linears` does that, then puts a `QuantizedLinear` in each layer's place. And LoRA around it: **QLoRA is one
# line.**

# %%
from qlora_lab.finetuning import (
    Batches,
    add_adapter,
    add_lora,
    collate,
    from_bitsandbytes,
    load_lora,
    load_model,
    load_prose,
    load_samples,
    nf4_double,
    quantize_linears,
    text_loss,
    tokenize,
    train,
)
from qlora_lab.finetuning.data import tokenize_text
from qlora_lab.finetuning.train import token_loss_sum

cpu = {"device": "cpu", "compute_dtype": torch.float32}
pristine, tokenizer = load_model(**cpu)
model = add_lora(quantize_linears(copy.deepcopy(pristine)), rank=16, alpha=32)

# %%
linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
parameters = sum(module.in_features * module.out_features for module in linears)
packed = sum(module.weight.nbytes - 1092 for module in linears)  # without the tables, which all could share
assert model.lm_head.weight is model.model.embed_tokens.weight
sizes = {"float32": 4 * parameters, "bfloat16": 2 * parameters, "NF4, double": packed}
_ = plot_megabytes(
    new_axes(height=2.1), {name: size / 1e6 for name, size in sizes.items()}, "linear layers (MB, 10$^6$ bytes)"
)
print(f"{len(linears)} layers, {parameters:,} parameters, {8 * packed / parameters:.3f} bits each; the head stays dense")
assert (len(linears), parameters, f"{8 * packed / parameters:.3f}") == (210, 106_168_320, "4.127")

# %% [markdown]
# And what would the short version keep, in the whole model? Two orders go forward; the rest of what waits for the
# backward pass are activations, the same for both.

# %%
# NBVAL_IGNORE_OUTPUT
# because the activations that are kept depend on the versions of torch and transformers
orders = load_samples("orders", "train")
samples, _ = tokenize(orders.select(range(400)), tokenizer, 256)
samples = sorted(samples, key=lambda sample: len(sample.ids))[:100]  # short ones: quicker
batch = collate([[sample] for sample in samples[:2]], tokenizer.pad_token_id)

there = list(model.parameters())
kept = {"ours": kept_bytes(lambda: token_loss_sum(model, batch), there)}
with mock.patch.object(QuantizedLinear, "forward", lambda self, x: linear(x, self.weight.dequantize())):
    kept["short version"] = kept_bytes(lambda: token_loss_sum(model, batch), there)
_ = plot_megabytes(
    new_axes(height=1.9), {name: size / 1e6 for name, size in kept.items()}, "kept for the backward pass (MB, 10$^6$ bytes)"
)
more = kept["short version"] - kept["ours"]
assert more == 4 * (parameters - 576 * (576 + 192 + 192))

# %% [markdown]
# The difference is all linear layers in float32, but for three of 210: what comes before q, k and v of the first layer
# is frozen, so no gradient has to pass through *them*.
#
# ## 4 · The same as bitsandbytes?
#
# Same model, same 4 bits, twice: by us and by bitsandbytes. An adapter starts as zero, so the first loss is that of the
# base alone.
#
# **Predict.** By how much do the two first losses differ, relatively: with plain NF4 (float32 scales), and with double
# quantization? 1e-7 is float32's rounding.

# %%
prediction = {"plain": 1e-6, "double": 1e-6}  # ← your guesses

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
targets = sum(len(sample.ids) - sample.prompt_length for sample in samples[:2])


@torch.no_grad()
def first_loss(model):
    model.train()  # in eval mode, processors with bf16 instructions take another path in bitsandbytes
    return token_loss_sum(model, batch).item() / targets


ours, theirs, apart = {}, {}, {}
for name, quantizer in {"plain": quantize, "double": nf4_double}.items():
    theirs[name], _ = load_model(quantization="nf4", double_quant=name == "double", **cpu)
    ours[name] = quantize_linears(copy.deepcopy(pristine), quantizer=quantizer)
    losses = first_loss(ours[name]), first_loss(theirs[name])
    apart[name] = abs(losses[0] / losses[1] - 1)
    print(f"{name}: ours {losses[0]:.6f}, theirs {losses[1]:.6f}, apart {apart[name]:.0e}; your guess {prediction[name]:.0e}")
assert apart["plain"] < 1e-5 and 1e-4 < apart["double"] < 1e-2

# %% [markdown]
# **What happened?** Plain NF4 agrees. Double quantization does not, by far more than rounding, and both "implement the
# paper". Compare the scales, in all 210 layers:

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
taken_over = from_bitsandbytes(copy.deepcopy(theirs["double"]))  # their codes and scales, byte by byte, in our layers
count = different = 0
worst, errors = 0.0, {"ours": 0.0, "theirs": 0.0}
for (name, mine), other in zip(ours["double"].named_modules(), taken_over.modules(), strict=True):
    if isinstance(mine, QuantizedLinear):
        assert torch.equal(mine.weight.codes, other.weight.codes)
        a, b = mine.weight.absmax, other.weight.absmax
        count, different = count + a.codes.numel(), different + (a.codes != b.codes).sum().item()
        worst = max(worst, (a.dequantize() / b.dequantize() - 1).abs().max().item())
        plain = ours["plain"].get_submodule(name).weight.absmax
        errors["ours"] += (a.dequantize() - plain).double().square().sum().item()
        errors["theirs"] += (b.dequantize() - plain).double().square().sum().item()
print(f"4-bit codes: all equal. Scales: {different:,} of {count:,} differ ({different / count:.2%}), one by {worst:.0%}")
print(f"squared error of the scales, theirs over ours: {errors['theirs'] / errors['ours']:.5f}")
assert 0.001 < different / count < 0.004 and 0.05 < worst < 0.3
assert abs(errors["theirs"] / errors["ours"] - 1) < 1e-3

# %% [markdown]
# Where a scale lies half-way between two of the 256 levels, bitsandbytes' table (notebook 04, section 7) now and then names the
# other one, and a whole step between levels can be a good part of a small scale. Neither is better: the scales' error is
# the same to three digits. But weights that differ a little give a loss that differs a little.
#
# So "almost the same" is what one sees whether there is a bug or not. Who tests an implementation must first make the
# inputs *equal*: `from_bitsandbytes` takes over their bytes, and then we may demand equality again.

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
same_bytes = abs(first_loss(taken_over) / losses[1] - 1)
print(f"their bytes in our layers: first losses {same_bytes:.0e} apart")
assert same_bytes < 1e-5

# %% [markdown]
# ## 5 · Twenty steps
#
# Now train both: bitsandbytes with PEFT's adapter, and our two files with an adapter that `load_lora` reads from PEFT's
# save at step 0. First the gradients of all 420 matrices A and B:

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
stack = add_adapter(theirs["double"], rank=16, alpha=32)
folder = tempfile.mkdtemp()
stack.save_pretrained(folder)
model = load_lora(taken_over, folder)
del ours, theirs


def adapter_gradients(model):
    model.train()
    token_loss_sum(model, batch).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    return gradients


pairs = list(zip(adapter_gradients(model), adapter_gradients(stack), strict=True))
largest = max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
equal = sum(torch.equal(a, b) for a, b in pairs)
print(f"{equal} of {len(pairs)} gradients equal bit for bit; largest relative difference {largest:.0e}")
assert len(pairs) == 420 and largest < 1e-5

# %% [markdown]
# **Predict.** Twenty steps of AdamW, each with 2 orders, at a high learning rate; small differences tend to grow. How far
# apart, relatively, do the two losses get?

# %%
prediction = 1e-3  # ← your guess

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
settings = {"learning_rate": 2e-3, "schedule": "constant", "warmup_steps": 3, "progress": False}
batches = Batches(samples, batch_size=2, seed=0)
losses = {
    name: [record.loss for record in train(trained, batches, steps=20, **settings)]
    for name, trained in {"ours": model, "bitsandbytes + PEFT": stack}.items()
}
differences = [abs(a / b - 1) for a, b in zip(*losses.values(), strict=True)]
_, axes = plt.subplots(
    2, 1, figsize=(8, 4.4), layout="constrained", sharex=True, gridspec_kw={"height_ratios": [2, 1]}
)
plot_together(axes, losses, differences, prediction)
print(f"largest relative difference in 20 steps: {max(differences):.0e}")
assert max(differences) < 1e-4 and losses["ours"][-1] < 0.5 * losses["ours"][0]

# %% [markdown]
# **What happened?** One curve, drawn twice. Given equal bytes, both stacks do the same sums: rounding has nothing to
# work on, or hardly anything. So there is no secret in the libraries. QLoRA *is* `add_lora(quantize_linears(model))`, and
# what bitsandbytes adds is speed on a GPU.
#
# ## 6 · How few bits?
#
# Our layer takes any numbers that can be dequantized. Here is one layer (the fifth block's `up_proj`, with what really
# flows into it): choose bits, block size and scheme, and see what is left of the weights (left) and of the
# output (right). Where does the output's error pass 20 %? (Needs a running kernel.)

# %%
import ipywidgets

from qlora_lab.classroom.widgets import explore

caught = []
up_proj = pristine.model.layers[4].mlp.up_proj
with up_proj.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
    first_loss(pristine)
weight, flowing = up_proj.weight.detach(), caught[0].flatten(0, 1)
schemes = {"affine": quantize_affine, "absmax": quantize_absmax}
block_sizes = [32, 64, 128, 256, 576, "tensor"]
settings_of, histograms = {}, {}
edges = torch.linspace(-0.6, 0.6, 242)
for scheme, function in schemes.items():
    for size in block_sizes:
        for bits in (2, 3, 4, 5, 6, 8):
            tensor = function(weight, bits, None if size == "tensor" else size)
            restored = tensor.dequantize()
            error = relative_rms(linear(flowing, weight), linear(flowing, restored))
            settings_of[scheme, size, bits] = tensor.bits_per_parameter, error
            histograms[scheme, size, bits] = (torch.histogram(restored, edges).hist / weight.numel()).tolist()
original = (torch.histogram(weight, edges).hist / weight.numel()).tolist()

# %%
dots = {
    scheme: [pair for (name, size, bits), pair in settings_of.items() if name == scheme] for scheme in schemes
}


def draw_layer(bits, block, scheme):
    _, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    chosen = settings_of[scheme, block, bits]
    edge = edges.tolist()
    plot_layer(axes, (original, edge), (histograms[scheme, block, bits], edge), dots, chosen)
    axes[0].set(xlim=(-0.5, 0.5), ylim=(1e-6, 1))
    axes[1].set(xlim=(1.8, 9.2), ylim=(2e-3, 2))
    axes[1].set_title(f"{chosen[0]:.2f} bits, error {chosen[1]:.3f}", fontsize=10)
    return axes[0]


explore(
    draw_layer,
    bits=ipywidgets.SelectionSlider(options=[2, 3, 4, 5, 6, 8], value=4, description="bits of a code"),
    block=ipywidgets.SelectionSlider(options=block_sizes, value=64, description="weights that share a scale"),
    scheme=ipywidgets.ToggleButtons(options=list(schemes), value="absmax", description="scheme"),
)

# %% [markdown]
# Now the whole model, not trained at all: loss on plain English, for seven bases.
#
# **Predict.** Without quantization the loss is LOSSDENSE. What is it with 4 bits and *one scale for each tensor* (which
# some tutorials teach)? And with 2 bits, affine, in blocks of 64? A model that guesses at random among its 49,152
# tokens has ln 49,152 = 10.8.

# %%
prediction = {"INT4, one scale": 3.5, "2 bits": 5.0}  # ← your guesses

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
prose = [tokenize_text(text, tokenizer) for text in load_prose()[:5]]
quantizers = {
    "NF4, double": nf4_double,
    "INT4 affine": lambda weight: quantize_affine(weight, 4, 64),
    "INT4 absmax": lambda weight: quantize_absmax(weight, 4, 64),
    "INT4, one scale": lambda weight: quantize_absmax(weight, 4, None),
    "3 bits affine": lambda weight: quantize_affine(weight, 3, 64),
    "3 bits absmax": lambda weight: quantize_absmax(weight, 3, 64),
    "2 bits affine": lambda weight: quantize_affine(weight, 2, 64),
}


def prose_loss(model):
    loss = text_loss(model, prose)
    return loss.total / loss.tokens


def base(quantizer):
    """The model with all its linear layers quantized, and what that costs: bits, error of the weights, loss."""
    model = quantize_linears(copy.deepcopy(pristine), quantizer=quantizer)
    bits = error = size = 0.0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = pristine.get_submodule(name).weight.detach()
            bits += module.weight.bits_per_parameter * weight.numel() / parameters
            error += (module.weight.dequantize() - weight).square().sum().item()
            size += weight.square().sum().item()
    return model, (bits, (error / size) ** 0.5, prose_loss(model))


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
results, broken = {}, {}
for name, quantizer in quantizers.items():
    candidate, results[name] = base(quantizer)
    if name in ("INT4, one scale", "3 bits affine", "2 bits affine"):
        broken[name] = candidate  # for section 7
dense_loss = prose_loss(pristine)
_, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1, 1.2]})
plot_bases(axes, results, dense_loss, "loss on prose (nats per token)")
for name, guess in prediction.items():
    print(f"{name:<16} loss {results[name][2]:.1f}, your guess {guess}")

# %% [markdown]
# TEXT6
#
# ## 7 · What LoRA can repair
#
# The base is damaged, and LoRA may add to it. Can it mend what rounding broke?
#
# **Predict.** Three of the broken bases get the same adapter, the same orders and 8 steps, as NF4 did in section 5. What
# is the loss of the eighth step? NF4 starts at STARTNF4 and is at ENDNF4 then.

# %%
prediction = {"3 bits affine": 0.3, "2 bits affine": 1.0}  # ← your guesses

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
repairs = {"NF4, double": losses["ours"][:8]}
for name, damaged in broken.items():
    load_lora(damaged, folder)  # the same A and B as in section 5
    repairs[name] = [record.loss for record in train(damaged, batches, steps=8, **settings)]
_ = plot_repairs(new_axes(), repairs, prediction)
for name, guess in prediction.items():
    print(f"{name}: {repairs[name][0]:.1f} at step 1, {repairs[name][-1]:.2f} at step 8, your guess {guess}")

# %% [markdown]
# TEXT7
#
# How much of the rounding error itself could an adapter take back? The best matrix of rank 16 is given by the singular
# values (notebook 05):

# %%
damage = weight - quantize_affine(weight, 2, 64).dequantize()
energy = torch.linalg.svdvals(damage).square()
share = (energy[:16].sum() / energy.sum()).item()
print(f"the best rank-16 matrix takes back {share:.0%} of the squared error")

# %% [markdown]
# ## Recap
#
# - Rounding happens once, before training. The gradient through a frozen 4-bit layer is exact: `gradient @ W`, W made anew.
# - Left to itself, autograd keeps every dense W. An `autograd.Function` keeps nothing but the 4 bits.
# - QLoRA is `add_lora(quantize_linears(model))`. From equal bytes it trains as bitsandbytes + PEFT do, step by step.
# - Two right implementations may differ in a scale's last bit. Make inputs equal before you compare.
# - LAST
#
# The exercises serve the item *train a QLoRA model successfully*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [07 · Can I train a real LLM here, now?](07_qlora_run.ipynb)
