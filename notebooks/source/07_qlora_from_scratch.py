# %% [markdown]
# # 07 · What happens when the base is 4-bit?
#
# In lesson 01 you trained an adapter on a base that was held in {{4}} bits, and it learned. Should that not surprise you? Gradients
# had to find their way back through weights that had been *rounded*. Rounding is a staircase, and the slope of a stair is zero.
#
# Here you find out how anything can learn through it, write a 4-bit layer in ten lines, and build QLoRA from it. At the end
# your QLoRA runs beside the one of bitsandbytes and PEFT, and you see whether they differ.
#
# | you need | |
# |---|---|
# | time | 30 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 4 GB |
# | GPU | not used: in float32 on a CPU, results can be compared to the last digit |

# %% machinery "Imports"
import warnings

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import linear
from transformers.utils.logging import disable_progress_bar

from qlora_lab.classroom.checks import check_ill_layers, check_input_gradient, check_short_version, progress
from qlora_lab.classroom.lessons.n07.checks import DISEASES, ill_layers
from qlora_lab.classroom.lessons.n07.figures import plot_megabytes, plot_stairs, plot_together
from qlora_lab.classroom.lessons.n07.machinery import (
    examine,
    kept_bytes,
    sent_back,
    short_orders,
    short_version,
    twin_of,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.finetuning import (
    Batches,
    QuantizedLinear,
    add_lora,
    collate,
    fetch,
    load_model,
    quantize_linears,
    train,
)
from qlora_lab.quantization import double_quantize, quantize, relative_rms
from qlora_lab.training.loss import token_loss_sum

disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · The slope of a staircase
#
# Start with a layer of four weights, and round them to multiples of {{0.25}}:

# %%
W = torch.tensor([[0.31, -0.82], [0.55, 0.12]])
Q = (W / 0.25).round() * 0.25
x = torch.tensor([2.0, 1.0])
print(f"rounded: {Q.tolist()}, output y = Qx: {(Q @ x).tolist()}")

# %% [markdown]
# **Predict.** In the backward pass, the layers above report how the loss changes with the two outputs: dL/dy = ({{1}}, {{2}}). Autograd passes this on, through
# the rounded weights, to the input x. Will the gradient dL/dx be zero, roughly right, or exactly right?

# %%
vote = ...  # "zero", "roughly right" or "exactly right"

# %% [markdown]
# By hand: raise the first input by {{0.1}}. The first output rises by {{0.1}} × {{Q[0][0]:.2f}}, the second by {{0.1}} × {{Q[1][0]:.2f}}. Weighted with
# {{1}} and {{2}}, the loss rises by {{0.1}} × ({{1}} × {{Q[0][0]:.2f}} + {{2}} × {{Q[1][0]:.2f}}), so the slope is {{Q[0][0] + 2 * Q[1][0]:.2f}}. For the second input it is
# {{1}} × ({{Q[0][1]:.2f}}) + {{2}} × {{Q[1][1]:.2f}} = {{Q[0][1] + 2 * Q[1][1]:.2f}}. Ask autograd, and ask it for the gradient of the *unrounded* weights as well:

# %% alt="Left, the rounded weight over the weight: a staircase of flat steps; a dot marks the weight {{W[0][0]:.2f}} on the step at {{Q[0][0]:.2f}}. Right, the first output over the first input: a straight line with the slope {{Q[0][0]:.2f}}."
x.requires_grad_()
W.requires_grad_()
y = ((W / 0.25).round() * 0.25) @ x
y.backward(torch.tensor([1.0, 2.0]))
print("dL/dx:", x.grad.tolist())
print("dL/dW:", W.grad.tolist())
print(told(vote))
_, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
_ = plot_stairs(axes, step=0.25, weight=0.31, others=-0.75)

# %% claims
assert x.grad.tolist() == [1.25, -0.75] and not W.grad.any()

# %% [markdown]
# **What happened?** These are two questions, with two answers. How does the loss change with a *weight*? The weight moves along a stair, so the
# answer is zero, and nobody could train these weights. How does it change with an *input*? The rounded weight is then a constant, the
# output is a straight line over the input, and the slope of a straight line is exact.
#
# LoRA asks the second question only. The base is frozen, so nobody needs dL/dW. The adapter beside this layer needs dL/dy and x, and no W. The adapters of
# *earlier* layers lie before this layer's input, and dL/dx is what reaches them. So the gradients are exact, for a model whose weights were changed a little, once, before
# training. How little? Here is a real layer in NF4 with double quantization. With the original weights, the
# gradient would be another one:

# %%
W = bundled_weight("model.layers.0.mlp.up_proj.weight").float()  # 1536 out, 576 in
q = double_quantize(quantize(W))
draw = torch.Generator().manual_seed(0)
x, gradient = torch.randn(8, 576, generator=draw), torch.randn(8, 1536, generator=draw)
of_4_bits = sent_back(lambda x: x @ q.dequantize().T, x, gradient)  # dL/dx, where gradient is dL/dy
of_original = sent_back(lambda x: x @ W.T, x, gradient)
print(f"rounding changed the weights by {relative_rms(W, q.dequantize()):.1%}")
print(f"and the gradient dL/dx by {relative_rms(of_original, of_4_bits):.1%}")

# %% claims
assert f"{relative_rms(of_original, of_4_bits):.2f}" == f"{relative_rms(W, q.dequantize()):.2f}" == "0.09"

# %% [markdown]
# **Exercise 7.1 ●○○ (2 minutes).** Write the way back without autograd, in one line. The layer is y = x Wᵀ, and dL/dy is given; what is dL/dx?
# Multiply in the gradient's dtype, which may be bfloat16.


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
# <details><summary>Hint 2</summary>In the example by hand, which entries of Q belonged to the first input: a row or a column?</details>

# %% [markdown]
# ## 2 · Right numbers, wrong price
#
# So `x @ q.dequantize().T` *is* a 4-bit layer: the output is right, the gradient is right, and it takes one line. Call it the short version.
# Why does nobody write it?
#
# Between forward and backward pass, autograd keeps what it will need on the way back. Our layer's weights take {{q.nbytes / 1e6:.2f}} MB (a million bytes) in
# {{4}} bits.
#
# **Predict.** How many MB does autograd keep of the short version until the backward pass?

# %%
prediction = {"short version": ...}  # ← your guess, in MB

# %% [markdown]
# To keep less, you write the way back yourself. That is what `torch.autograd.Function` is for. `forward` computes the output and leaves a note in
# `ctx`, the context. `backward` gets the note and dL/dy, and returns a gradient for each argument of `forward`.


# %%
class FrozenMatmul(torch.autograd.Function):
    """x Wᵀ for a frozen W in 4 bits."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q  # 4 bits, which are in memory anyway
        return linear(x, q.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.q.dequantize().to(gradient.dtype), None  # none for q: it is frozen


# %% alt="Two horizontal bars: MB kept for the backward pass. The short version keeps {{megabytes['short version']:.1f}} MB, FrozenMatmul {{megabytes['FrozenMatmul']:.1f}}."
inputs = x.clone().requires_grad_()
megabytes = {
    "short version": kept_bytes(lambda: inputs @ q.dequantize().T) / 1e6,
    "FrozenMatmul": kept_bytes(lambda: FrozenMatmul.apply(inputs, q)) / 1e6,
}
_ = plot_megabytes(new_axes(height=1.9), megabytes, "kept for the backward pass (MB, 10$^6$ bytes)", prediction)
print(told(prediction))

# %% claims
assert megabytes == {"short version": 1536 * 576 * 4 / 1e6, "FrozenMatmul": 0}
layer = QuantizedLinear(q)
assert torch.equal(FrozenMatmul.apply(x, q), layer(x)) and kept_bytes(lambda: layer(inputs)) == 0
assert torch.equal(sent_back(layer, x, gradient), of_4_bits)
assert torch.equal(sent_back(lambda x: FrozenMatmul.apply(x, q), x, gradient), of_4_bits)

# %% [markdown]
# **What happened?** Autograd kept the dense matrix, in float32. The way back needs W, and autograd does not know that W can be made again from {{4}} bits.
# Every layer would leave such a matrix behind, and at the end of the forward pass the whole dense model would be in memory, beside
# the {{4}} bits. `FrozenMatmul` makes W twice instead, once in each direction, and frees it at once: it pays with time, not with memory.
#
# **Exercise 7.2 ●●○ (3 minutes).** Do the sum for a model that *you* would like to train. How many GB (a billion bytes) do its
# weights take at the end of the forward pass, with `FrozenMatmul` and with the short version, if both compute in bfloat16? In {{4}} bits a weight takes
# {{q.bits_per_parameter:.3f}} bits, scales included (lesson 05). Count as if all parameters were in linear layers; in a large model nearly all are.

# %%
### BEGIN SOLUTION
### STUB: mine = {"parameters": ..., "FrozenMatmul": ..., "short version": ...}  # such as 8e9, then two numbers of GB
mine = {"parameters": 8e9, "FrozenMatmul": 8e9 * 4.127 / 8 / 1e9, "short version": 8e9 * (4.127 + 16) / 8 / 1e9}
### END SOLUTION

# %%
check_short_version(mine)

# %% [markdown]
# <details><summary>Hint</summary>In the short version, two things lie in memory side by side. How many bits does each take for a weight?</details>

# %% [markdown]
# **Exercise 7.3 ●●○ (4 minutes).** Four people wrote a 4-bit layer, and three of the four made a mistake. `examine` holds a layer against the dense one with the same
# weights. In the examination below, all four look right. Choose better ones, until you know what each has.

# %%
square = double_quantize(quantize(bundled_weight("model.layers.0.self_attn.q_proj.weight").float()))  # 576 × 576
patients = ill_layers(square)
for name, patient in patients.items():
    print(name, end=": ")
    examine(patient, square, tokens=576, dtype=torch.bfloat16)
print("What may be wrong:", *[f"{key!r}: {disease}" for key, disease in DISEASES.items()], sep="\n")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ...}  # one of the six keys above for each
diagnosis = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W"}
### END SOLUTION

# %%
check_ill_layers(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>W has {{576}} × {{576}} numbers. How many has x, for {{576}} tokens? Then choose another number of tokens.</details>
# <details><summary>Hint 2</summary>In bfloat16 the dense layer rounds, too. In which dtype would you see who rounds for no reason?</details>

# %% [markdown]
# ## 3 · QLoRA is one line
#
# The package's `QuantizedLinear` is a module around `FrozenMatmul`. `quantize_linears` puts one in the place of each linear layer, except the output
# head, whose matrix is the embedding at the same time. Then `add_lora` puts A and B beside each, exactly as in lesson 06: LoRA does not care what its
# base is made of.

# %%
model, tokenizer = load_model(device="cpu", compute_dtype=torch.float32)
model = add_lora(quantize_linears(model), rank=16, alpha=32)
print(model.model.layers[0].self_attn.q_proj)

# %% claims
linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
parameters = sum(module.in_features * module.out_features for module in linears)
assert (len(linears), parameters) == (210, 106_168_320)
assert model.lm_head.weight is model.model.embed_tokens.weight

# %% [markdown]
# That *is* QLoRA. What does `FrozenMatmul` save in the whole model? Two orders of lesson 01 go forward:

# %% alt="Two horizontal bars: MB kept for the backward pass in the whole model. The short version keeps {{kept['short version']:.0f ±10%}}, FrozenMatmul {{kept['FrozenMatmul']:.0f ±15%}}."
# NBVAL_IGNORE_OUTPUT
# because the activations that are kept depend on the versions of torch and transformers
samples = short_orders(tokenizer)  # 100 of them
batch = collate([[sample] for sample in samples[:2]], tokenizer.pad_token_id)
there = list(model.parameters())  # these are in memory anyway
with short_version():
    kept = {"short version": kept_bytes(lambda: token_loss_sum(model, batch), there) / 1e6}
kept["FrozenMatmul"] = kept_bytes(lambda: token_loss_sum(model, batch), there) / 1e6
_ = plot_megabytes(new_axes(height=1.9), kept, "kept for the backward pass (MB, 10$^6$ bytes)")
more = kept["short version"] - kept["FrozenMatmul"]
print(f"the short version keeps {more:.0f} MB more")

# %% claims
assert abs(more - 4 * (parameters - 576 * (576 + 192 + 192)) / 1e6) < 1e-6

# %% [markdown]
# What `FrozenMatmul` keeps are activations, and both versions keep those. The {{more:.0f}} MB more are the linear layers in float32, all but three
# of {{210}}. (What comes before the q, k and v of the first layer is frozen, so no gradient has to pass through these three.)
#
# ## 4 · Beside the libraries
#
# Outside this course you write the same in three statements. The first has the settings that you know from lesson 01. The second loads the model, and bitsandbytes puts a
# `Linear4bit`, with a function like yours inside, in the place of each linear layer. With the third, PEFT adds A and B.

# %%
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(fetch(), quantization_config=four_bits, dtype=torch.float32)
torch.manual_seed(0)  # PEFT draws A at random
theirs = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

# %% [markdown]
# Is it the same? A comparison is fair only if both start from the same numbers. So `twin_of` builds *our* model with *their* numbers: the 4-bit codes and scales of
# bitsandbytes, and PEFT's A and B. What differs is the code that computes with them.
#
# **Predict.** Both train for twenty steps, at a high learning rate. Each step builds on the one before, so small differences tend to grow. How far apart do the two losses
# get, relatively? A float32 number is rounded by about {{6e-8:.0e}} of its size.

# %%
prediction = ...  # ← your guess, such as 0.01

# %% alt="Above, the loss (log scale) over {{20}} steps: a line for ours, rings for bitsandbytes and PEFT. The loss falls, with bumps, and every ring is on the line. Below, their relative difference at each step: all dots lie at the bottom."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
ours = twin_of(theirs)
batches = Batches(samples, batch_size=1, seed=0)
settings = {"steps": 20, "learning_rate": 2e-3, "schedule": "constant", "warmup_steps": 3, "progress": False}
losses = {
    name: [record.loss for record in train(trained, batches, **settings)]
    for name, trained in {"ours": ours, "bitsandbytes + PEFT": theirs}.items()
}
differences = [abs(a / b - 1) for a, b in zip(*losses.values())]
_, axes = plt.subplots(2, 1, figsize=(8, 4.4), layout="constrained", sharex=True, gridspec_kw={"height_ratios": [2, 1]})
plot_together(axes, losses, differences, prediction)
print(f"loss: {losses['ours'][0]:.2f} in the first step, {losses['ours'][-1]:.2f} in the last")
print(f"largest relative difference: {max(differences):.0e}; {told(prediction)}")

# %% claims
assert max(differences) < 1e-4 and losses["ours"][-1] < 0.5 * losses["ours"][0]

# %% [markdown]
# **What happened?** It is one curve, drawn twice. (It has bumps because each step sees a single order, and some orders are easier.) Small differences do grow, but equal numbers that are added in the same order leave no difference that could grow. (If yours is
# not exactly zero, your processor adds in another order.) So the libraries have no secret: what they do is what you have built. What they add is fast GPU code, and hundreds of
# model families.
#
# ## Recap
#
# ```
#         ┌── W in 4 bits, made dense for a moment ──┐
#   x ────┤                                          ├─(+)──► y      forward
#         └── A ──► B ──► × alpha / r ───────────────┘
#
#   dL/dx ◄── through W, made dense once more, and through B and A    backward
#             A and B get gradients, W gets none
# ```
#
# - Rounding happens once, before training. The gradient through a frozen 4-bit layer is exact for the rounded model.
# - Left to itself, autograd keeps every dense W. An `autograd.Function` makes W again, and keeps {{4}} bits only.
# - QLoRA is LoRA around such layers. From the same numbers, your layers and those of bitsandbytes and PEFT train alike.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [08 · Your data](08_your_data.ipynb)
