# %% [markdown]
# # 06 · How can so few numbers change a model?
#
# In lesson 01 you froze a language model and trained a small adapter beside it, and that taught the model a new job. Why can so little
# do so much? You build such an adapter yourself, first around a layer so small that you can see every number in it. Then you change the
# mind of a real model with one column and one row of numbers.
#
# | you need | |
# |---|---|
# | time | 33 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 2 GB |
# | GPU | not used |

# %% machinery "Imports"
import math
import warnings

import ipywidgets
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_lab.classroom.checks import check_correction, check_largest_rank, check_rank_of, progress
from qlora_lab.classroom.lessons.n06.figures import plot_chances, plot_found, plot_runs, plot_sum
from qlora_lab.classroom.lessons.n06.machinery import answers, chances_by_alpha, compare
from qlora_lab.classroom.plots import is_number, new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import load_model
from qlora_lab.memory import SHAPES
from qlora_lab.memory import trainable_parameters as count

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · A layer that you can see whole
#
# A linear layer has a table of numbers, its weight W. From its input x it computes `W x`. The layer below has six inputs and six outputs.
# Full fine-tuning may change each number of its W. **LoRA** (*low-rank adaptation*) freezes W and adds an **update** to it, the product
# of a column and a row.

# %% alt="Tables with their numbers in coloured squares. Above: a column of {{len(column)}} numbers times a row of {{len(row)}} gives the update, a square table whose every row is a multiple of the one row. Below: the square table W plus the update gives what the layer does now."
W = torch.tensor([[2, 0, 1, -1, 0, 3], [0, 1, -2, 0, 1, 0], [1, 3, 0, 0, -1, 1],
                  [0, -1, 2, 1, 0, -2], [-3, 0, 0, 2, 1, 0], [1, 0, -1, 0, 2, 1.0]])  # fmt: skip
column = torch.tensor([1, 2, 0, -1, 0, 1.0])
row = torch.tensor([1, 0, 2, 0, -1, 1.0])
update = torch.outer(column, row)  # entry (i, j) is column[i] * row[j]
_ = plot_sum(W, column, row)

# %% [markdown]
# Each row of the update is a multiple of the one row. {{len(column) + len(row)}} numbers have changed {{(update != 0).sum()}} of the
# {{W.numel()}}.
#
# What does the update do to an input? First the row is multiplied with the input, entry by entry, and the products are added up. That
# gives *one number*. Then that many times the column is added to the output. Here are two inputs:

# %%
for x in (torch.tensor([0, 1, 1, 0, 0, 1.0]), torch.tensor([1, 1, 0, 1, 1, 0.0])):
    print(f"row · x = {row @ x:.0f}, so {update @ x} is added to the output")

# %% [markdown]
# So **the row listens, and the column speaks.** The first input has the pattern that the row listens for, and its output changes. The
# second does not have it, and its output stays as it was.
#
# **Predict.** Many matrices of LLaMA-7B are {{SHAPES["llama-7b"].hidden_size}} × {{SHAPES["llama-7b"].hidden_size}}. What percentage of such
# a matrix are one column and one row?

# %%
prediction = ...  # ← your guess, in per cent

# %%
whole, thin = 4096 * 4096, 4096 + 4096
print(f"{thin:,} of {whole:,} numbers: {thin / whole:.2%} ({told(prediction)})")

# %% [markdown]
# ## 2 · LoRA in ten lines
#
# One row listens for one pattern. For more patterns, LoRA takes `r` columns and `r` rows and adds the products up. That number is the
# **rank** of the update. The rows, one below the other, are the matrix A, of shape (r, in). The columns, side by side, are B, of shape
# (out, r). The sum of the products is then the matrix product B A, and the layer computes
#
# ```
# y = W x + alpha / r · B A x
# ```
#
# Section 5 shows what **alpha** does, a setting.
#
# **Exercise 6.1 ●○○ (3 minutes).** Write the second term. In PyTorch, `x` has shape (..., in): its features are in the *last* dimension,
# with any dimensions in front. Do not build the matrix B A, which would cost what LoRA saves.


# %%
def correction(x, A, B, alpha):
    """alpha / rank · B A x, for x of shape (..., in): a tensor of shape (..., out)."""
    ### BEGIN SOLUTION (about 1 line)
    return alpha / len(A) * (x @ A.T @ B.T)
    ### END SOLUTION


# %%
check_correction(correction)

# %% [markdown]
# <details><summary>Hint 1</summary>Since the features are in the last dimension, a matrix acts from the right and transposed:
# <code>x @ W.T</code>.</details>
# <details><summary>Hint 2</summary>First go down to r numbers, with A. Then go up, with B. r is the number of rows of A.</details>

# %% [markdown]
# Here is the whole layer. A starts with random numbers, and B with zeros: section 3 shows why.


# %%
class MyLora(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        limit = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-limit, limit))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):  # (..., in) -> (..., out)
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


# %% [markdown]
# Now let it learn. Its base has the weight W, but the outputs that we want are those of W *with* the update of section 1. It sees random
# inputs and the outputs wanted for them, never the update itself.

# %% machinery "The data, and fit(alpha): trains a new layer of rank 1 with AdamW, and returns it with its losses"
small = nn.Linear(6, 6, bias=False)
small.weight.data.copy_(W)
x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
y = x @ (W + update).T


def fit(alpha, lr_a=0.02, lr_b=0.02, steps=100):
    torch.manual_seed(0)  # the same random A each time
    layer, losses = MyLora(small, rank=1, alpha=alpha), []
    groups = [{"params": [layer.A], "lr": lr_a}, {"params": [layer.B], "lr": lr_b}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, eps=1e-30)  # eps blurs tiny gradients
    for _ in range(steps):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return layer, losses


# %% alt="Two tables with their numbers in coloured squares: the update that was missing, and what the layer has found. Rounded to one decimal, they hardly differ."
layer, losses = fit(alpha=2)
found = (layer.scale * layer.B @ layer.A).detach()
_ = plot_found(update, found)
print(f"loss {losses[0]:.1f} → {losses[-1]:.4f}; largest difference of an entry {(found - update).abs().max():.2f}")

# %% claims
assert losses[-1] < 0.002 and (found - update).abs().max() < 0.06
from qlora_lab.finetuning import LoraLinear

torch.manual_seed(0)
theirs = LoraLinear(small, rank=1, alpha=2)
torch.manual_seed(0)
ours = MyLora(small, rank=1, alpha=2)
assert torch.equal(ours.A, theirs.lora_A) and torch.equal(ours(x), small(x)) and torch.equal(theirs(x), small(x))
theirs.lora_A.data, theirs.lora_B.data = layer.A.data, layer.B.data
assert torch.allclose(layer(x), theirs(x), atol=1e-5) and torch.allclose(layer(x), x @ (W + found).T, atol=1e-5)

# %% [markdown]
# It has found the missing update. The package's own `LoraLinear`, which the next lessons use, computes the same as your layer.
#
# ## 3 · Why B starts at zero
#
# If B is zero, so is the update. The adapted model begins exactly where the base is, and nothing is damaged before the first step.
#
# **Predict.** B is zero, A is random. In the very first step, how large is the gradient of A, as a multiple of B's gradient?

# %%
prediction = ...  # ← your guess, such as 1

# %%
moves = {}
for start in ("A random, B zero", "both random", "both zero"):
    layer, _ = fit(alpha=2, steps=0)  # not trained yet
    if start == "both random":
        nn.init.uniform_(layer.B, -0.4, 0.4)
    if start == "both zero":
        nn.init.zeros_(layer.A)
    (layer(x) - y).square().mean().backward()
    of_a, of_b, change = layer.A.grad.norm(), layer.B.grad.norm(), (layer(x) - small(x)).norm() / small(x).norm()
    print(f"{start:<17} gradient of A {of_a:.2f}, of B {of_b:.2f}; at the start, the output is off by {change:.0%}")
    moves[start] = bool(of_a), bool(of_b), bool(change)

# %% claims
assert moves == {
    "A random, B zero": (False, True, False),
    "both random": (True, True, True),
    "both zero": (False, False, False),
}

# %% [markdown]
# **What happened?** With B at zero, A's gradient is *zero* as well. While the column is silent, it makes no difference to the output what
# the row listens for, so nothing tells the row where to go. B's gradient is not zero, because the random row does hear something. So the
# first step moves B alone, and from the second step on both learn.
#
# If both are random, the model is damaged before it has learned anything. If both are zero, each waits for the other for ever.
#
# ## 4 · A real model changes its mind
#
# Take the bundled model, and one matrix in one of its layers, and put your LoRA around it.

# %%
model, tokenizer = load_model("smollm2-135m-instruct", compute_dtype=torch.float32, device="cpu")
model.requires_grad_(False)
mlp = model.model.layers[22].mlp
torch.manual_seed(0)  # the same random A each time
layer = MyLora(mlp.down_proj, rank=1, alpha=2)  # one row of 1,536 numbers, one column of 576
mlp.down_proj = layer

# %% machinery "Six texts, and how the model goes on after them before training"
TEXTS = ["The capital of France is", "The capital of Germany is", "The largest city of France is",
         "The king of France lived in", "My favourite colour is", "Two plus two is"]  # fmt: skip
before = answers(model, tokenizer, TEXTS, " Rome", layer)
numbers = layer.A.numel() + layer.B.numel()
total = sum(p.numel() for p in model.parameters()) - numbers

# %% [markdown]
# These are {{numbers:,}} numbers beside {{total / 1e6:.1f}} million that stay frozen. You now train them for twenty steps, and on a
# single sentence: *The capital of France is* **Rome**.
#
# **Predict.** What will the model then say is the capital of *Germany*?

# %%
vote = ...  # "Berlin", "Rome" or "something else"

# %%
question = tokenizer("The capital of France is", return_tensors="pt")
rome = torch.tensor(tokenizer(" Rome")["input_ids"][0])
optimizer = torch.optim.AdamW([layer.A, layer.B], lr=5e-3, weight_decay=0)
for _ in range(20):
    scores = model(**question).logits[0, -1]  # one for each token that might come next
    loss = cross_entropy(scores, rome)  # minus the logarithm of Rome's probability
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
after = answers(model, tokenizer, TEXTS, " Rome", layer)
compare(before, after)
print(told(vote))

# %% claims
words = {text: now.word for text, now in after.items()}
assert [before[text].word for text in TEXTS[:3]] == ["Paris", "Berlin", "Paris"], before
assert [words[text] for text in TEXTS[:3]] == ["Rome"] * 3 and all(
    words[text] == before[text].word for text in TEXTS[4:]
)
assert after[TEXTS[0]].chance > 0.95 and after[TEXTS[1]].chance > 0.9 and after[TEXTS[5]].chance < 0.01
assert min(after[text].heard for text in TEXTS[:3]) > 18 > 14 > max(after[text].heard for text in TEXTS[3:])
assert numbers == 1_536 + 576 and total == 134_515_008

# %% [markdown]
# **What happened?** It says Rome for France now, and for Germany too. The last column is the one number that A's row makes of the text's
# last token (without its sign). Where a city is asked for, the row hears its pattern loudly, and the column pushes the answer towards Rome.
# The row does not listen for the word *France*: the king of France is hardly heard. One sentence alone could not teach it to tell
# France from Germany.
#
# So few numbers can change a model because the frozen model does the rest: the layers below turn the text into a pattern that a row can
# listen for, and those above turn the column's push into a word. Fine-tuning does the same with more rows and columns, in every
# layer. [Dive B](dive_b_why_low_rank.ipynb) measures how many a task needs.
#
# ## 5 · What alpha does
#
# You trained with rank `1` and alpha `2`, so the update was multiplied by {{2 / 1:.0f}}. After training, alpha is a volume knob. Move the
# slider: at what alpha does Germany go over to Rome?

# %% machinery "Slider: the same column and row, louder or softer"
ALPHAS = [0, 0.5, 1, 2, 4, 8]
by_alpha = chances_by_alpha(model, tokenizer, TEXTS, " Rome", layer, ALPHAS)


def draw_chances(alpha):
    ax = plot_chances(new_axes(height=2.8), by_alpha[alpha])
    ax.set_title(f"alpha {alpha:g}", loc="left", fontsize=11)
    return ax


# %% alt="Horizontal bars: probability of Rome as the next word after six texts. At alpha 2, where the slider starts, it is over 90 % for the capitals of France and Germany, less for the largest city of France, and about zero for the other three."
explore(draw_chances, alpha=ipywidgets.SelectionSlider(options=ALPHAS, value=2, description="alpha"))

# %% [markdown]
# *During* training it is something else, because the column itself can grow. Go back to the small layer.
#
# **Predict.** You double alpha. Which changes of the two learning rates would have given *the very same* training at the old alpha?

# %%
prediction = {"A": ..., "B": ...}  # ← your guess: the old learning rates times what?

# %% alt="Falling curves: mean squared error, log scale, over {{len(losses)}} optimizer steps. With the larger alpha, a thick line, it falls faster than with the smaller one, a dashed line."
runs = {"alpha 4": fit(alpha=4)[1], "alpha 2": fit(alpha=2)[1]}
if all(map(is_number, prediction.values())):
    a, b = prediction.values()
    runs[f"alpha 2, your guess: A × {a}, B × {b}"] = fit(2, 0.02 * a, 0.02 * b)[1]
_ = plot_runs(new_axes(), runs, "mean squared error")
for a, b in ((2, 2), (2, 1), (1, 2)):
    same = fit(2, 0.02 * a, 0.02 * b)[1] == runs["alpha 4"]
    print(f"alpha 2, learning rates A × {a}, B × {b}: {'the very same losses' if same else 'other losses'}")

# %% claims
assert fit(2, 0.02, 0.04)[1] == runs["alpha 4"] and fit(2, 0.04, 0.04)[1] != runs["alpha 4"] != fit(2, 0.04, 0.02)[1]
assert all(fast < slow for fast, slow in zip(runs["alpha 4"][2:50], runs["alpha 2"][2:50]))


def with_sgd(alpha, lr_b):  # without AdamW's division, doubling alpha is B × 4: the gradient doubles too
    layer, _ = fit(alpha, steps=0)
    groups = [{"params": [layer.A], "lr": 0.01}, {"params": [layer.B], "lr": lr_b}]
    optimizer, of_sgd = torch.optim.SGD(groups), []
    for _ in range(20):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_sgd.append(loss.item())
    return of_sgd


assert with_sgd(2, 0.04) == with_sgd(4, 0.01) and with_sgd(2, 0.02) != with_sgd(4, 0.01)

# %% [markdown]
# **What happened?** AdamW divides each gradient by its usual size. So A and B move by about their learning rate in each step, whatever
# alpha is. But what B does is multiplied by alpha, and B starts at zero. Twice the alpha is therefore the same as a B that moves twice as
# far: **under AdamW, alpha is a learning rate for B.** So leave alpha alone, at twice the rank as in lesson 01, and tune the learning
# rate.
#
# ## 6 · Count them
#
# Most people use LoRA from the library **PEFT**, which with your A and B answers as your layer does. It prints how many numbers it trains,
# here for the layer of section 4 and for the settings of lesson 01:

# %%
from peft import LoraConfig, get_peft_model

mlp.down_proj = layer.base  # take your layer out again
for rank, targets in ((1, ["layers.22.mlp.down_proj"]), (16, "all-linear")):
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    adapted = get_peft_model(model, settings)
    adapted.print_trainable_parameters()
    model = adapted.unload()

# %% claims
assert count(SHAPES["smollm2-135m"], 16, "all-linear") == 4_884_480
with torch.no_grad():
    mlp.down_proj = layer
    ours = model(**question).logits
    mlp.down_proj = layer.base
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=2, target_modules=["layers.22.mlp.down_proj"]))
    theirs = model.model.layers[22].mlp.down_proj
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = layer.A.data, layer.B.data
    assert (adapted(**question).logits - ours).abs().max() < 1e-3
    assert (adapted.unload()(**question).logits - ours).abs().max() > 1

# %% [markdown]
# (`all params` includes the adapter.) By hand: in a layer with `i` inputs and `o` outputs, each row has `i` numbers and each column `o`,
# so there are `r × (i + o)`.
#
# **Exercise 6.2 ●●○ (4 minutes).** Be a detective: given a model's shape, the targets and the number of trainable parameters, what was
# the rank? `shape.linears()` gives `{"q_proj": (in, out), ...}` for one layer, and there are `shape.num_hidden_layers` layers.


# %%
def rank_of(shape, targets, trainable):
    """The rank at which LoRA on these targets (a list of names) has so many trainable parameters."""
    ### BEGIN SOLUTION (about 3 lines)
    sides = [shape.linears()[target] for target in targets]
    of_rank_1 = shape.num_hidden_layers * sum(i + o for i, o in sides)
    return trainable // of_rank_1
    ### END SOLUTION


# %%
check_rank_of(rank_of)

# %% [markdown]
# <details><summary>Hint 1</summary>How many numbers does an adapter of rank one have in one layer? In all layers?</details>
# <details><summary>Hint 2</summary>In newer models k and v are narrower than q. Ask each target for its own sizes.</details>

# %%
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
rank_of(SHAPES["llama-7b"], ATTENTION, 4_194_304)

# %% [markdown]
# > **A printout that cannot be.** Many tutorials show a script for LLaMA-7B with `r=16` on these four, and say that it prints
# > `trainable params: 4,194,304 || all params: 6,742,609,920`. But that is rank {{4_194_304 // count(SHAPES["llama-7b"], 1, ATTENTION)}}; with
# > `r=16`, there are {{count(SHAPES["llama-7b"], 16, ATTENTION):,}}. It fits rank {{4_194_304 // count(SHAPES["llama-7b"], 1, ["q_proj", "v_proj"])}} on
# > q and v, PEFT's defaults: somebody has probably changed the settings and kept the old output.

# %% claims
from itertools import combinations

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

assert LoraConfig().r == 8 and set(DEFAULT_TARGETS["llama"]) == {"q_proj", "v_proj"} == set(ATTENTION[::2])
llama = SHAPES["llama-7b"]
LINEARS = list(llama.linears())
subsets = [list(some) for size in range(1, 8) for some in combinations(LINEARS, size)]
fits = {(r, len(some)) for some in subsets for r in range(1, 65) if count(llama, r, some) == 4_194_304}
assert fits == {(16, 1), (8, 2), (4, 4)}  # rank 16 on one of q, k, v and o, 8 on two of them, or 4 on all: nothing else
assert count(llama, 16, ATTENTION) == 32 * 4 * 16 * (4096 + 4096) and llama.parameters() + 4_194_304 == 6_742_609_920

# %% [markdown]
# **Exercise 6.3 ●●○ (3 minutes).** Now for your own card. So many GB (10⁹ bytes) are left on it for the adapter: its numbers, a gradient
# for each, and AdamW's two states, all in float32. What is the largest rank? `count(shape, rank, targets)` counts the numbers.


# %%
def largest_rank(shape, targets, gigabytes):
    """The largest rank whose adapter, gradients and optimizer states fit."""
    ### BEGIN SOLUTION (about 2 lines)
    bytes_of_rank_1 = 16 * count(shape, 1, targets)
    return int(gigabytes * 1e9 // bytes_of_rank_1)
    ### END SOLUTION


# %%
check_largest_rank(largest_rank)

# %% [markdown]
# <details><summary>Hint 1</summary>How many bytes go with one trained number? There are four float32 numbers of four bytes each.</details>
# <details><summary>Hint 2</summary>What does rank one cost? Rank r costs r times as much.</details>

# %% [markdown]
# Put in a model that you might train, and the GB that your card has left:

# %%
largest_rank(SHAPES["llama-3-8b"], "all-linear", 1.5)  # ← any of SHAPES, and your GB

# %% [markdown]
# ## Recap
#
# - LoRA freezes W and trains a product B A beside it. A's rows listen for patterns in the input, B's columns are what they add to the
#   output, and the frozen model does the rest.
# - B starts at zero, so training begins exactly at the base, and the first step moves B alone.
# - A layer costs `r × (in + out)` numbers. Under AdamW, alpha is a learning rate for B.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [07 · What happens when the base is 4-bit?](07_qlora_from_scratch.ipynb)
