# %% [markdown]
# # 07 · What happens when the base is 4-bit?
#
# In lesson 01 you trained an adapter on a base in {{4}} bits, and it learned. Should that not surprise you? Gradients
# had to find their way back through weights that had been *rounded*. Rounding is a staircase, and the slope of a stair is zero.
#
# Here you find out how anything can learn through it, and write a 4-bit layer that trains. Then QLoRA made of such layers runs beside
# the QLoRA of bitsandbytes and PEFT.
#
# | you need | |
# |---|---|
# | time | 32 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 4 GB |
# | GPU | not used: in float32 on a CPU, results can be compared to the last digit |

# %% machinery "Imports"
import warnings

import matplotlib.pyplot as plt
import torch
from transformers.utils.logging import disable_progress_bar

from qlora_lab.classroom.checks import check_frozen_matmul, check_naive, progress
from qlora_lab.classroom.lessons.n07.figures import plot_megabytes, plot_stairs, plot_together
from qlora_lab.classroom.lessons.n07.machinery import (
    kept_bytes,
    naive_layers,
    nudge,
    of_an_order,
    race,
    sent_back,
    short_orders,
    twin_of,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.finetuning import (
    QuantizedLinear,
    add_lora,
    collate,
    fetch,
    load_model,
    quantize_linears,
)
from qlora_lab.quantization import double_quantize, quantize, relative_rms
from qlora_lab.training.loss import token_loss_sum

disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · The slope of a staircase
#
# Start with a layer of four weights, y = x Wᵀ as in `nn.Linear`, and round them to multiples of {{0.25}}:

# %%
W = torch.tensor([[0.31, -0.82], [0.55, 0.12]])
Q = (W / 0.25).round() * 0.25
x = torch.tensor([2.0, 1.0])
print(f"rounded: {Q.tolist()}, output: {(x @ Q.T).tolist()}")

# %% [markdown]
# In the backward pass, the later layers report how the loss changes with the two outputs: dL/dy = ({{1}}, {{2}}). Autograd passes this on,
# through the rounding, to the input and to the unrounded weights.
#
# **Predict.** Take the true slopes of this rounded layer. Will the gradient that reaches the input be zero, roughly right, or exactly right?

# %%
vote = ...  # "zero", "roughly right" or "exactly right"

# %% alt="Left, the rounded weight over the weight: a staircase of flat steps; a dot marks the weight {{W[0][0]:.2f}} on the step at {{Q[0][0]:.2f}}. Right, the first output over the first input: a straight line with the slope {{Q[0][0]:.2f}}."
x.requires_grad_()
W.requires_grad_()
y = x @ ((W / 0.25).round() * 0.25).T
y.backward(torch.tensor([1.0, 2.0]))
print("dL/dx:", x.grad.tolist())
print("dL/dW:", W.grad.tolist())
print(told(vote))
_, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
_ = plot_stairs(axes, step=0.25, weight=0.31, others=-0.75)

# %% claims
assert x.grad.tolist() == [1.25, -0.75] and not W.grad.any()

# %% [markdown]
# **What happened?** Check dL/dx by hand: raise the first input by {{0.1}}. The first output rises by {{0.1}} × {{Q[0][0]:.2f}}, the second by {{0.1}} × {{Q[1][0]:.2f}}. Weighted
# with dL/dy, the loss rises by {{0.1}} × ({{1}} × {{Q[0][0]:.2f}} + {{2}} × {{Q[1][0]:.2f}}), so the true slope is {{Q[0][0] + 2 * Q[1][0]:.2f}}. It is *exactly right*.
#
# How does the loss change with a *weight*? The weight moves along a stair, so the answer is zero: this gradient
# cannot train the weights. How does it change with
# an *input*? Then the rounded weight is a constant, and the output is a straight line over the input, whose slope is that constant.
#
# LoRA asks the second question only. The base is frozen, so nobody needs dL/dW. The adapters of *earlier* layers need dL/dx, which is exact. So QLoRA trains
# with right gradients, but another model: its weights were changed once, before training. By how much? Here is a real layer, in NF4 with double
# quantization. To multiply by it, `dequantize` makes a **dense** matrix of its codes and scales: an ordinary one of floating-point numbers.

# %%
W = bundled_weight("model.layers.0.mlp.up_proj.weight").float()
q = double_quantize(quantize(W))
print(
    f"{tuple(W.shape)}: {q.bits_per_parameter:.3f} bits per weight, {q.nbytes / 1e6:.2f} MB; in float32 {W.nbytes / 1e6:.2f} MB"
)
x, gradient = of_an_order("model.layers.0.mlp.up_proj")  # its inputs for an order of lesson 01, and dL/dy
of_4_bits = sent_back(lambda x: x @ q.dequantize().T, x, gradient)  # dL/dx
of_original = sent_back(lambda x: x @ W.T, x, gradient)
print(f"rounding changed the weights by {relative_rms(W, q.dequantize()):.1%}")
print(f"and the gradient dL/dx by {relative_rms(of_original, of_4_bits):.1%}")

# %% claims
assert f"{relative_rms(W, q.dequantize()):.2f}" == "0.09" and 0.05 < relative_rms(of_original, of_4_bits) < 0.2
stretch = [(gradient @ M).norm() * len(M) ** 0.5 / (gradient.norm() * M.norm()) for M in (W, q.dequantize() - W)]
assert stretch[0] > 1.2 and abs(stretch[1] - 1) < 0.05  # 1 would be a random direction's
assert x.shape[1] == 576 and gradient.shape[1] == 1536 and len(x) == len(gradient) > 50

# %% [markdown]
# So the gradient is exact for the rounded model, and {{100 * relative_rms(of_original, of_4_bits):.0f ±1}} % off for the original. (That is less than the weights' error, because this gradient favours directions in which W is large. The original was rounded
# before: lesson 04.) Does it harm? The adapter learns on the rounded model, and
# is judged on it. But that model is slightly worse. Lesson 11 measures whether the adapter makes up for it.
#
# ## 2 · Right numbers, wrong price
#
# So `x @ q.dequantize().T` *is* a 4-bit layer: output and gradient are right, and it takes one line. Call it the **naive layer**.
# Why does nobody use it? Between forward and backward pass, autograd keeps what it will need on the way back.
#
# **Predict.** How many MB (a million bytes) does autograd keep of the naive layer until the backward pass?

# %%
prediction = {"naive layer": ...}  # ← your guess, in MB

# %% alt="One horizontal bar: MB kept for the backward pass. The naive layer keeps {{megabytes['naive layer']:.1f}} MB."
inputs = x.clone().requires_grad_()
megabytes = {"naive layer": kept_bytes(lambda: inputs @ q.dequantize().T) / 1e6}
_ = plot_megabytes(new_axes(height=1.4), megabytes, "kept for the backward pass (MB, 10$^6$ bytes)", prediction)
print(told(prediction))

# %% claims
assert megabytes == {"naive layer": 1536 * 576 * 4 / 1e6}

# %% [markdown]
# **What happened?** Autograd kept the dense matrix, in float32. The way back needs W, and autograd does not know that W can be made again from {{4}} bits.
# Every layer would leave such a matrix behind, until the whole dense model is in memory, beside the {{4}} bits. With gradient checkpointing (lesson 02)
# it is less bad: then only the layers of one transformer block (not of {{64}} weights) leave theirs at a time.
#
# To keep less, you write the way back yourself, as an `autograd.Function`. Its `forward` computes the output, and notes on `ctx` (the context) what the way back will need. Its `backward` gets the
# same `ctx` and dL/dy, and returns a gradient for each argument of `forward`: None where nobody needs one. Here is y = factor · x, whose dL/dx is factor · dL/dy:


# %%
class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx, gradient):  # gradient is dL/dy
        return ctx.factor * gradient, None  # dL/dx, and None for factor


print("dL/dx:", sent_back(lambda x: Times.apply(x, 3.0), torch.ones(2), torch.tensor([1.0, 2.0])).tolist())

# %% claims
assert sent_back(lambda x: Times.apply(x, 3.0), torch.ones(2), torch.tensor([1.0, 2.0])).tolist() == [3.0, 6.0]

# %% [markdown]
# **Exercise 7.1 ●●○ (6 minutes).** Write the 4-bit layer that keeps nothing dense, in the same form. Nobody needs dL/dW here. x may be bfloat16; then the output and dL/dx are as well.


# %%
class FrozenMatmul(torch.autograd.Function):
    """x Wᵀ, for x of shape (..., in) and a frozen W in 4 bits of shape (out, in)."""

    ### BEGIN SOLUTION
    ### STUB: @staticmethod
    ### STUB: def forward(ctx, x, q):
    ### STUB:     ...  # note what backward will need; return x Wᵀ
    ### STUB: @staticmethod
    ### STUB: def backward(ctx, gradient):
    ### STUB:     ...  # gradient is dL/dy; return dL/dx, and None for q
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q  # 4 bits, which are in memory anyway
        return x @ q.dequantize().to(x.dtype).T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.q.dequantize().to(gradient.dtype), None

    ### END SOLUTION


# %%
check_frozen_matmul(FrozenMatmul)

# %% [markdown]
# <details><summary>Hint 1</summary>By hand, dL/dx was a sum over the <i>outputs</i>. Which shapes must be multiplied, so that (..., out) becomes (..., in)?</details>
# <details><summary>Hint 2</summary>What you hang on <code>ctx</code> stays in memory until the backward pass. Which is smaller, <code>q</code> or what <code>dequantize</code> makes of it?</details>

# %% [markdown]
# Such a layer makes W twice, once in each direction, and frees it at once: it pays with time, not with memory. (In a step with many tokens it is hardly any time. For few tokens, one of bitsandbytes' **GPU kernels**, small programs that run on the GPU, reads the 4 bits itself.)
#
# <details><summary>How much time?</summary>Making W takes as long for many tokens as for few. At the same batch, a step with few tokens took up to {{54}} % longer than with a bf16 base, and one with {{8192:,}} no longer: see lesson 13.</details>
#
# **Exercise 7.2 ●●○ (2 minutes).** Do the sum for a model that *you* would like to train in bfloat16. How many GB (a billion bytes) do its
# weights take at the end of a forward pass without checkpointing: in 4-bit layers like yours, in naive ones, and if the base is not quantized at all? Take {{q.bits_per_parameter:.3f}} bits for a quantized weight,
# and count as if all parameters were in linear layers. Which of the three is worst?

# %%
### BEGIN SOLUTION
### STUB: mine = {"parameters": ..., "FrozenMatmul": ..., "naive": ..., "bfloat16": ...}  # a number, then GB
mine = {"parameters": 8e9, "FrozenMatmul": 8 * 4.127 / 8, "naive": 8 * (4.127 + 16) / 8, "bfloat16": 8 * 16 / 8}
### END SOLUTION

# %%
check_naive(mine)

# %% [markdown]
# <details><summary>Hint</summary>In the naive layers, two things lie in memory side by side. How many bits does each take for a weight?</details>

# %% [markdown]
# ## 3 · QLoRA is two calls
#
# `QuantizedLinear` is a module around such a function. `quantize_linears` puts one in the place of each linear layer but the output head. (transformers leaves
# the head as it is "for numerical stability reasons", as its code says; here it is the embeddings' matrix, too.) Then `add_lora` puts A and B beside each, as in lesson 06. LoRA does not care what its base is made of.

# %%
model, tokenizer = load_model(device="cpu", compute_dtype=torch.float32)
model = add_lora(quantize_linears(model), rank=16, alpha=32)
print(model.model.layers[0].self_attn.q_proj)
layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
print(f"{len(layers)} such layers, {sum(layer.weight.nbytes for layer in layers) / 1e6:.0f} MB in all")

# %% claims
parameters = sum(module.in_features * module.out_features for module in layers)
assert (len(layers), parameters) == (210, 106_168_320)
assert model.lm_head.weight is model.model.embed_tokens.weight
assert kept_bytes(lambda: layers[0](inputs)) == 0

# %% [markdown]
# That is QLoRA's layer. How much would the model keep with naive ones? Two short orders of lesson 01 go forward. LoRA, attention and the MLP keep their activations in any case.

# %% alt="Two horizontal bars: MB kept for the backward pass in the whole model. Naive layers keep {{kept['naive layers']:.0f ±10%}}, ours {{kept['ours']:.0f ±15%}}."
# NBVAL_IGNORE_OUTPUT
# because the activations that are kept depend on the versions of torch and transformers
samples = short_orders(tokenizer)
batch = collate([[sample] for sample in samples[:2]], tokenizer.pad_token_id)
weights = list(model.parameters())  # in memory anyway: not counted
with naive_layers():  # until the end of this block, each layer computes x @ q.dequantize().T
    kept = {"naive layers": kept_bytes(lambda: token_loss_sum(model, batch), weights) / 1e6}
kept["ours"] = kept_bytes(lambda: token_loss_sum(model, batch), weights) / 1e6
_ = plot_megabytes(new_axes(height=1.9), kept, "kept for the backward pass (MB, 10$^6$ bytes)")
more = kept["naive layers"] - kept["ours"]
print(f"{kept['naive layers']:.1f} - {kept['ours']:.1f} = {more:.1f} MB")

# %% claims
assert abs(more - 4 * (parameters - 576 * (576 + 192 + 192)) / 1e6) < 1e-6

# %% [markdown]
# The {{more:.1f}} MB are the dense matrices of {{len(layers) - 3}} of the {{len(layers)}} layers, in float32, nearly eight times the model's 4-bit weights.
#
# <details><summary>Why not all of them?</summary>The other three are q, k and v of the first attention. What comes before them is frozen, so no gradient has to pass through them.</details>
#
# ## 4 · Beside the libraries
#
# Outside this course, three statements write QLoRA. The first has lesson 01's settings. The second loads the model, with a
# `Linear4bit` of bitsandbytes' in the place of each linear layer but the head. With the third, PEFT adds A and B beside each of these.

# %%
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

torch.manual_seed(0)  # PEFT draws A at random
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(fetch(), quantization_config=four_bits, dtype=torch.float32)
theirs = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

# %% [markdown]
# (`fetch()` is the folder of the course's model.) Is it the same? A comparison is fair only if both start from the same numbers. So `twin_of` builds *our* layers, copies bitsandbytes' codes and scales into
# them, and reads A and B from PEFT's files.
#
# A tiny difference may grow from step to step. To see that, a third model runs along: our twin, with every number of A larger by a millionth.
#
# **Predict.** After twenty steps, how far apart, relatively, do the losses get: bitsandbytes and PEFT from ours, and the nudged twin from ours?

# %%
prediction = {"bitsandbytes + PEFT": ..., "ours, nudged": ...}  # ← your guesses, such as 0.01

# %% alt="Above, the loss (log scale) over {{20}} steps: a line for ours, rings for bitsandbytes and PEFT. The loss falls, with bumps, and every ring is on the line. Below, the relative difference from ours at each step (log scale): dots of bitsandbytes and PEFT at the bottom, triangles of the nudged twin far above them, rising."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
models = {"ours": twin_of(theirs), "ours, nudged": nudge(twin_of(theirs)), "bitsandbytes + PEFT": theirs}
losses = race(models, samples, steps=20)
apart = {
    name: [abs(loss / ours - 1) for loss, ours in zip(losses[name], losses["ours"])]
    for name in ("bitsandbytes + PEFT", "ours, nudged")
}
_, axes = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True, gridspec_kw={"height_ratios": [3, 2]})
plot_together(axes, losses, apart, prediction)
for name, differences in apart.items():
    print(f"{name}: up to {max(differences):.1g} from ours; {told(prediction[name])}")
print(f"loss of ours: {losses['ours'][0]:.2f} in the first step, {losses['ours'][-1]:.2f} in the last")

# %% claims
assert max(apart["bitsandbytes + PEFT"]) < 1e-6 and losses["ours"][-1] < 0.5 * losses["ours"][0]
assert max(apart["ours, nudged"]) > 1e-6

# %% [markdown]
# **What happened?** It is one curve, drawn twice. (Its bumps come from the data: some samples are easier.) A millionth in A grew from the second step on (in the first, B is zero), but between the two programs there was nothing
# to grow. On a CPU, bitsandbytes does in training what your function does: it makes W dense and calls PyTorch's own matrix product, so the same numbers are added in the same
# order. (If you do not get exactly zero, bitsandbytes has other code for your processor.)
#
# So, in float32 on a CPU, the libraries compute what stands above. What they add is fast GPU code, and many more kinds of models. (Here the scales were copied. If each program quantizes, a few scales
# get another 8-bit code, which bitsandbytes looks up in a coarse table: [dive K](dive_k_to_the_last_bit.ipynb).)
#
# ## Recap
#
# ```
# forward
#         ┌── W in 4 bits, made dense for a moment ──┐
#   x ────┤                                          ├─(+)──► y
#         └── A ──► B ──► × alpha / r ───────────────┘
# backward
#   dL/dx ◄── through W, made dense once more  ◄── dL/dy
#         ◄── through A and B, which get gradients
# ```
#
# - Rounding happens once, before training. The gradient through a frozen 4-bit layer is the right one for the rounded model.
# - Left to itself, autograd keeps every dense W, which without checkpointing is worse than no quantization. An `autograd.Function` makes W again instead.
# - QLoRA is LoRA around such layers. From the same numbers, they train as those of bitsandbytes and PEFT do.
#
# How few bits can the base have, and can LoRA repair what rounding broke? That is [dive J](dive_j_how_few_bits.ipynb).

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [08 · Your data](08_your_data.ipynb)
