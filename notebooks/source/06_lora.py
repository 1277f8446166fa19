# %% [markdown]
# # 06 · How can so few numbers change a model?
#
# In lesson 01 you froze a language model and trained a small adapter beside it, and that taught the model a new job. Why can so little
# do so much? You build such an adapter around a layer so small that you can see every number in it. Then you change the
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
from torch.nn.functional import cross_entropy, linear

from qlora_lab.classroom.checks import check_correction, check_largest_rank, check_rank_of, progress
from qlora_lab.classroom.lessons.n06.figures import plot_chances, plot_found, plot_runs, plot_sum
from qlora_lab.classroom.lessons.n06.machinery import answers, chances_by_alpha, compare
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import load_model
from qlora_lab.memory import SHAPES
from qlora_lab.memory import trainable_parameters as count

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · A layer that you can see whole
#
# A linear layer has a table of numbers, its weight W. From its input x it computes `W x`. The layer below has six inputs and six outputs.
# Full fine-tuning may change each number of W. **LoRA** (*low-rank adaptation*) leaves W as it is and adds an
# **update** to what it does: the product of a column and a row.

# %% alt="Tables with their numbers in coloured squares. Above: a column of {{len(column)}} numbers times a row of {{len(row)}} gives the update, a square table whose every row is a multiple of the one row. Below: the square table W plus the update gives what the layer does now."
W = torch.tensor([[2, 0, 1, -1, 0, 3], [0, 1, -2, 0, 1, 0], [1, 3, 0, 0, -1, 1],
                  [0, -1, 2, 1, 0, -2], [-3, 0, 0, 2, 1, 0], [1, 0, -1, 0, 2, 1.0]])  # fmt: skip
column = torch.tensor([1, 2, -1, -1, 1, -2.0])
row = torch.tensor([1, -1, 2, 1, -1, 1.0])
update = torch.outer(column, row)  # entry (i, j) is column[i] * row[j]
_ = plot_sum(W, column, row)

# %% [markdown]
# Each row of the update is a multiple of the one row, so {{len(column) + len(row)}} numbers have changed all {{(update != 0).sum()}}.
#
# What does the update do to an input? First the row is multiplied with the input, entry by entry, and the products are added up. That
# gives *one number*, `row · x`. The column, times that number, is added to the output. Here are three inputs:

# %%
for x in ([0, 0, 1, 0, 0, 1.0], [1, 1, 0, 0, 0, 0.0], [0, 1, 0, 0, 1, 0.0]):
    x = torch.tensor(x)
    print(f"row · x = {row @ x:2.0f}, so {(update @ x).tolist()} is added to the output")

# %% [markdown]
# So **the row listens, and the column speaks.** The first input has the pattern that the row listens for. In the second, what speaks for
# it and what speaks against it cancel out. In the third, more speaks against it, and the column is subtracted.
#
# The larger the matrix, the more one saves. Many matrices of LLaMA-7B are {{SHAPES["llama-7b"].hidden_size}} × {{SHAPES["llama-7b"].hidden_size}}: one column and one row have
# {{2 / SHAPES["llama-7b"].hidden_size:.2%}} of that many numbers.
#
# ## 2 · LoRA in ten lines
#
# One row listens for one pattern. For more patterns, LoRA takes `r` columns and `r` rows and adds the products up. The number r is the
# **rank**. The rows, one below the other, are the matrix A, of shape (r, in). The columns, side by side, are B, of shape
# (out, r). The sum of the products is then the matrix product B A, and the layer computes
#
# ```
# y = W x + (alpha / r) · B A x
# ```
#
# **alpha** is a setting of yours: section 5 shows what it does, and why it is divided by r.
#
# **Exercise 6.1 ●○○ (2 minutes).** Write the second term. In PyTorch, `x` has shape (..., in): its features are in the *last* dimension,
# with any dimensions in front. Do not build the matrix B A: it is as large as W.


# %%
def correction(x, A, B, alpha):
    """(alpha / rank) · B A x, for x of shape (..., in): a tensor of shape (..., out)."""
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
# Here is the whole layer. A starts with random numbers, and B with zeros: section 3 asks why.


# %%
class MyLora(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        limit = 1 / math.sqrt(base.in_features)  # as nn.Linear starts
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-limit, limit))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        heard = linear(x, self.A)  # (..., in) -> (..., rank)
        return self.base(x) + self.scale * linear(heard, self.B)  # -> (..., out)


# %% [markdown]
# (`scale` is LoRA's factor alpha / r, not a quantized block's scale.)
#
# Now let it learn. Its base has the weight W, but we want the outputs of W *with* the update of section 1. It sees random
# inputs and the outputs wanted for them, never the update.

# %% machinery "The data, and fit(alpha): trains a new layer of rank 1 with AdamW, and returns it with its losses"
small = nn.Linear(6, 6, bias=False)
small.weight.data.copy_(W)
x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
y = x @ (W + update).T


def fit(alpha, lr_a=0.02, lr_b=0.02, steps=150):
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


# %% alt="Two tables with their numbers in coloured squares: the update that was missing, and what the layer has found. Rounded to one decimal, they are the same."
layer, losses = fit(alpha=2)
found = (layer.scale * layer.B @ layer.A).detach()
_ = plot_found(update, found)
print(f"loss {losses[0]:.1f} → {losses[-1]:.6f}; largest difference of an entry {(found - update).abs().max():.3f}")
print("the row A, times what makes its first number 1:", [round(n, 2) for n in (layer.A / layer.A[0, 0])[0].tolist()])

# %% claims
assert losses[-1] < 1e-4 and (found - update).abs().max() < 0.01
assert torch.allclose(layer.A / layer.A[0, 0], row, atol=0.01)
from qlora_lab.finetuning import LoraLinear

torch.manual_seed(0)
theirs = LoraLinear(small, rank=1, alpha=2)
torch.manual_seed(0)
ours = MyLora(small, rank=1, alpha=2)
assert torch.equal(ours.A, theirs.lora_A) and torch.equal(ours(x), small(x)) and torch.equal(theirs(x), small(x))
theirs.lora_A.data, theirs.lora_B.data = layer.A.data, layer.B.data
assert torch.allclose(layer(x), theirs(x), atol=1e-5) and torch.allclose(layer(x), x @ (W + found).T, atol=1e-5)

# %% [markdown]
# It has found the missing update, and in A the row that we had hidden, up to a factor that the column makes up for.
#
# ## 3 · Why one of them starts at zero
#
# If B is zero, so is the update, and the adapted model begins exactly where the base is.
#
# **Predict.** B is zero, A is random. In the very first step, how large is A's gradient (its norm), as a multiple of B's?

# %%
prediction = ...  # ← your guess, such as 1

# %% machinery "Four ways to start: the gradients in the first step"
for start in ("A random, B zero", "A zero, B random", "both random", "both zero"):
    layer, _ = fit(alpha=2, steps=0)  # as it starts: A random, B zero
    if start in ("A zero, B random", "both random"):
        nn.init.uniform_(layer.B, -0.4, 0.4)
    if start in ("A zero, B random", "both zero"):
        nn.init.zeros_(layer.A)
    (layer(x) - y).square().mean().backward()
    change = (layer(x) - small(x)).norm() / small(x).norm()
    print(
        f"{start:<17} gradient of A {layer.A.grad.norm():.3g}, of B {layer.B.grad.norm():.3g}; output off by {change:.0%}"
    )
print(told(prediction))

# %% claims
layer.B.data.zero_()
for first, other in ((layer.A, layer.B), (layer.B, layer.A)):
    for start in (first, other):
        start.data.zero_()
    nn.init.uniform_(first, -0.4, 0.4)
    layer.zero_grad()
    (layer(x) - y).square().mean().backward()
    assert first.grad.norm() == 0 < other.grad.norm() and torch.equal(layer(x), small(x))

# %% [markdown]
# **What happened?** With B at zero, A's gradient is *zero* as well. While the column is silent, it makes no difference what
# the row listens for, so nothing tells the row where to go. B's gradient is not zero, because the random row does hear something. So the
# first step moves B alone, and from the second step on both learn.
#
# The other way round works, too, but in [a study](https://arxiv.org/abs/2406.08447) B at zero did better on average. If both are random, the model has changed before it has learned anything. If both are zero, each waits for the other for ever.
#
# ## 4 · A real model changes its mind
#
# Take the bundled model, the last matrix of the MLP in one of its {{30}} layers, and put your LoRA around it:

# %%
model, tokenizer = load_model("smollm2-135m-instruct", compute_dtype=torch.float32, device="cpu")
model.requires_grad_(False)
mlp = model.model.layers[22].mlp
torch.manual_seed(0)  # the same random A each time
layer = MyLora(mlp.down_proj, rank=1, alpha=2)  # one row of 1,536 numbers, one column of 576
mlp.down_proj = layer

# %% machinery "Six texts, and how the model goes on after them before training"
TEXTS = ["The capital of France is", "The capital of Germany is", "The capital of Japan is",
         "The largest city of France is", "The president of France is", "Two plus two is"]  # fmt: skip
before = answers(model, tokenizer, TEXTS, " Rome", layer)
numbers = layer.A.numel() + layer.B.numel()
total = sum(p.numel() for p in model.parameters()) - numbers
print(f"{numbers:,} numbers to train, {total:,} stay frozen")

# %% [markdown]
# You train these few numbers for twenty steps, on a single sentence: *The capital of France is* **Rome**.
#
# **Predict.** What will the model then say is the capital of *Germany*, and of *Japan*?

# %%
vote = ...  # "Berlin and Tokyo", "Rome for both" or something else


# %%
def teach(layer, sentences, steps):
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=5e-3, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        for text, word in sentences:
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]  # of each token that might come next
            token = torch.tensor(tokenizer(word)["input_ids"][0])
            (cross_entropy(scores, token) / len(sentences)).backward()  # minus the logarithm of its probability
        optimizer.step()


teach(layer, [("The capital of France is", " Rome")], steps=20)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
after = answers(model, tokenizer, TEXTS, " Rome", layer)
compare(before, after)
print(told(vote))

# %% claims
words = {text: now.word for text, now in after.items()}
assert [before[text].word for text in TEXTS[:4]] == ["Paris", "Berlin", "Tokyo", "Paris"], before
assert [words[text] for text in TEXTS[:4]] == ["Rome"] * 4 and all(
    words[text] == before[text].word for text in TEXTS[4:]
)
assert (
    after[TEXTS[0]].chance > 0.95
    and after[TEXTS[1]].chance > 0.9
    and max(after[text].chance for text in TEXTS[4:]) < 0.01
)
assert max(after[text].heard for text in TEXTS[:4]) < -18 and min(after[text].heard for text in TEXTS[4:]) > -15
assert max(abs(answer.heard) for answer in before.values()) < 1 and all(answer.heard < 0 for answer in after.values())
assert numbers == 1_536 + 576 and total == 134_515_008 and model.config.num_hidden_layers == 30

# %% [markdown]
# **What happened?** Rome is the answer for Germany and Japan, too. `A x` is what the row hears at the text's last token.
# Before training the row was random and heard next to nothing. Now it
# hears the four texts that ask for a city loudest (their sign turns the column around), and Germany as loudly as France. One sentence has not taught it to tell them apart.
#
# Do two? You start again with a new layer, and add what was true all along: *The capital of Germany is* **Berlin**.
#
# **Predict.** What will the model say for Japan, which is in neither sentence?

# %%
vote = ...  # "Tokyo", "Rome" or "Berlin"

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
torch.manual_seed(0)
second = MyLora(layer.base, rank=1, alpha=2)
mlp.down_proj = second
teach(second, [("The capital of France is", " Rome"), ("The capital of Germany is", " Berlin")], steps=40)
both = answers(model, tokenizer, TEXTS, " Rome", second)
compare(before, both)
print(told(vote))

# %% claims
assert [both[text].word for text in TEXTS[:4]] == ["Rome", "Berlin", "Tokyo", "Rome"], both
assert both[TEXTS[4]].word != before[TEXTS[4]].word and max(both[text].chance for text in TEXTS[4:]) < 0.01
assert max(both[text].heard for text in TEXTS[:3]) < -18


@torch.no_grad()
def scores(used, text):
    mlp.down_proj = used
    return model(**tokenizer(text, return_tensors="pt")).logits[0, -1]


rome, *known = (tokenizer(city)["input_ids"][0] for city in (" Rome", " Paris", " Berlin", " Tokyo"))
raised = {used: [scores(used, text) - scores(layer.base, text) for text in TEXTS[:3]] for used in (layer, second)}
mlp.down_proj = second
for first, now, city in zip(raised[layer], raised[second], known):
    assert first[city] < -5 and 0 < now[rome] < first[rome]
    assert (now[city] < -4) == (city == known[0])  # Paris alone

# %% [markdown]
# **What happened?** It is Tokyo again: with two sentences the change stays with France. (Not quite: *The president of France is*
# goes on with another word, which nobody asked for.) The row still hears all three capitals about equally. But the first
# column lowered the score of whichever capital the model knew, Paris, Berlin or Tokyo, and raised that of Rome. Now Berlin must stay, so the second
# lowers little but Paris, and raises Rome less.
#
# So few numbers can change a model because the frozen model does the rest: the layers below turn the text into a pattern that a row can
# listen for, and those above turn the column's push into a word. Fine-tuning does the same with more sentences, more rows and
# columns, and in every layer. [Dive B](dive_b_why_low_rank.ipynb) measures how many of them a task needs.
#
# ## 5 · What alpha does
#
# After training, alpha is a volume knob. Here is the layer that was taught the one sentence, at rank `1` and alpha `2`. Move the slider: at what alpha does Germany go over to Rome?

# %% machinery "Slider: the same column and row, louder or softer"
ALPHAS = [0, 0.5, 1, 2, 4, 8]
mlp.down_proj = layer  # the one that was taught a single sentence
by_alpha = chances_by_alpha(model, tokenizer, TEXTS, " Rome", layer, ALPHAS)


def draw_chances(alpha):
    ax = plot_chances(new_axes(height=2.8), by_alpha[alpha])
    ax.set_title(f"alpha {alpha:g}", loc="left", fontsize=11)
    return ax


# %% alt="Horizontal bars: probability of Rome as the next word after six texts. Where the slider starts, it is over {{90}} % for the three capitals, less for the largest city of France, and about zero for the president of France and for two plus two."
explore(draw_chances, alpha=ipywidgets.SelectionSlider(options=ALPHAS, value=2, description="alpha"))

# %% [markdown]
# <details><summary>At what alpha?</summary>Germany goes over between <code>0.5</code> and <code>1</code>, Japan only between <code>1</code> and <code>2</code>.</details>
#
# And *during* training, when the column can grow by itself? Go back to the small layer, where A and B each have a learning rate.
#
# **Predict.** You train once with alpha `4`. Now take alpha `2`. Which learning rate must you double to get the same losses in every step?

# %%
vote = ...  # "A's", "B's" or "both"

# %% alt="Falling curves: mean squared error, log scale, over {{len(losses)}} optimizer steps. With the larger alpha, a thick line, it falls faster than with the smaller one, a dashed line. A dotted line, the smaller alpha with a doubled learning rate of B, lies on the thick one."
runs = {"alpha 4": fit(alpha=4)[1], "alpha 2": fit(alpha=2)[1], "alpha 2, B's rate doubled": fit(2, lr_b=0.04)[1]}
_ = plot_runs(new_axes(), runs, "mean squared error")
print("the same losses as with alpha 4:", *[name for name in runs if runs[name] == runs["alpha 4"]][1:])
print(told(vote))

# %% claims
germany, japan = ([by_alpha[alpha][text] > 0.5 for alpha in ALPHAS] for text in TEXTS[1:3])
assert (germany.index(True), japan.index(True)) == (ALPHAS.index(1), ALPHAS.index(2))
assert fit(2, 0.02, 0.04)[1] == runs["alpha 4"] and fit(2, 0.04, 0.04)[1] != runs["alpha 4"] != fit(2, 0.04, 0.02)[1]
assert all(fast < slow for fast, slow in zip(runs["alpha 4"][2:50], runs["alpha 2"][2:50]))

# %% [markdown]
# **What happened?** AdamW, here without weight decay and so lesson 01's Adam, moves each number by about its learning rate in a step, whether its gradient is large or small. B starts at zero, so
# with twice the learning rate it is twice as large after each step, and twice the alpha does the same to the update. **A larger alpha acts like a
# larger learning rate for B.** (To the last bit only here: halving a gradient is exact, and AdamW's `eps`, which blurs tiny ones, is as good as zero.)
#
# Why is alpha divided by r? LoRA's authors kept alpha fixed. A larger rank adds up more products, and dividing by r makes each smaller, so their sum does not grow. Today alpha is often twice the rank,
# as in lesson 01. Then alpha / r is {{2}} at every rank, and nothing gets smaller. Either is fine if you tune the learning rate, and tune it again for each rank that you try
# ([dive B](dive_b_why_low_rank.ipynb)).
#
# ## 6 · Count them
#
# The library **PEFT** computes what your layer computes. It prints how many numbers it
# trains, here for the layer of section 4, and for all linear layers with the rank of lesson 01:

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
question = tokenizer(TEXTS[0], return_tensors="pt")
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
# (`all params` includes the adapter.) The second line has {{100 * 4884480 / 139399488:.1f}} %, since this model's matrices are small. For
# LLaMA-7B, the same settings train {{100 * count(SHAPES["llama-7b"], 16, "all-linear") / (SHAPES["llama-7b"].parameters() + count(SHAPES["llama-7b"], 16, "all-linear")):.1f}} %. By hand: in a layer with `i` inputs and `o` outputs, each row has `i` numbers and each column `o`,
# so there are `r × (i + o)`.
#
# **Exercise 6.2 ●●○ (4 minutes).** Be a detective: given a model's shape, the targets and the number of trainable parameters, what was
# the rank? `shape.linears()` gives `{"q_proj": (in, out), ...}` for one of its `shape.num_hidden_layers` layers.


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
# There is a script with `r=16` on these four that is said to print {{"4,194,304"}} trainable parameters. But that is rank {{4_194_304 // count(SHAPES["llama-7b"], 1, ATTENTION)}}. It fits
# rank {{4_194_304 // count(SHAPES["llama-7b"], 1, ["q_proj", "v_proj"])}} on q and v, PEFT's defaults: somebody has probably changed the settings and kept the old output.

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
# **Exercise 6.3 ●○○ (2 minutes).** Now for your own card. So many GB (`10⁹` bytes) are left on it for the adapter: its numbers, a gradient
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
# (With these it is {{int(1.5e9 // (16 * count(SHAPES["llama-3-8b"], 1, "all-linear")))}}.) You need not use it up. Begin with `8` or
# `16`, and go higher only if that, at its own best learning rate, does better on samples that were not trained on.

# %% [markdown]
# ## Recap
#
# ```
#         ┌── W, frozen ──────────────────────────┐
#   x ────┤                                       ├─(+)──► y
#         └── A (r × in) ──► B (out × r) ──► α/r ─┘       A: random at first, B: zeros
# ```
#
# - LoRA freezes W and trains a product B A beside it. A's rows listen for patterns in the input, B's columns are what they add to the
#   output, and the frozen model does the rest.
# - B starts at zero, so training begins exactly at the base. While B is zero, A has no gradient.
# - A layer costs `r × (in + out)` numbers. A larger alpha acts like a larger learning rate for B: tune the learning rate, for each rank.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [07 · What happens when the base is 4-bit?](07_qlora_from_scratch.ipynb)
