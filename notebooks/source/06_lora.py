# %% [markdown]
# # 06 · Why does a low rank suffice?
#
# LoRA freezes a weight matrix of 576 × 576 = 331,776 numbers and trains two thin ones beside it, 9,216 numbers at
# rank 8. It works, and the usual explanation is: *updates of weights are of low rank.* Are they? You train real
# matrices in full, take the update apart, and find the explanation wrong and the method right. Then you build LoRA,
# see what its `alpha` really is, and catch a famous printout that cannot be true.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 3 minutes on two CPU cores |
# | memory | 3 GB |
# | GPU | not used |

# %% machinery "Imports"
import math
import tempfile
import warnings

import ipywidgets
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_lab.classroom.checks import (
    check_correction,
    check_largest_rank,
    check_lora_suspects,
    check_rank_of,
    progress,
)
from qlora_lab.classroom.lessons.n06.checks import LORA_BUGS, lora_suspects
from qlora_lab.classroom.lessons.n06.figures import plot_by_rank, plot_energy, plot_runs, plot_truncation
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import collate, load_model, load_samples, lora_layers, tokenize, trainable_parameters
from qlora_lab.memory import SHAPES

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% claims
assert 576 * 576 == 331_776 and 8 * (576 + 576) == 9_216

# %% [markdown]
# ## 1 · A real update
#
# Take the bundled model and train three kinds of matrices in its last 10 of 30 layers, *in full*: no adapter, every
# number may move. The 20 layers below are frozen, so what they compute is computed once. The task is that of
# notebook 01: orders into JSON.

# %%
model, tokenizer = load_model("smollm2-135m-instruct", compute_dtype=torch.float32, device="cpu")
model.requires_grad_(False)
model.config.use_cache = False


@torch.no_grad()
def prepared(samples):
    """What the upper layers read, and which tokens they should predict."""
    batch = collate([[sample] for sample in samples], tokenizer.pad_token_id)
    positions, targets = batch["position_ids"], batch["labels"][:, 1:]
    columns = (targets != -100).any(dim=0).nonzero().squeeze(1)  # where some row has a target
    hidden = model.model(input_ids=batch["input_ids"], position_ids=positions).last_hidden_state
    return {"inputs_embeds": hidden, "position_ids": positions, "logits_to_keep": columns}, targets[:, columns]


# %%
train, unseen = (
    tokenize(load_samples("orders", split).select(range(count)), tokenizer, max_length=256)[0]
    for split, count in {"train": 40, "validation": 6}.items()
)
layers, norm = model.model.layers, model.model.norm
model.model.layers, model.model.norm = layers[:20], nn.Identity()
batches, unseen = [prepared(train[i : i + 4]) for i in range(0, 40, 4)], prepared(unseen)
model.model.layers, model.model.norm = layers[20:], norm  # from here on, the model is its last 10 layers


def loss_of(batch):
    inputs, targets = batch
    return cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())  # -100 is ignored


@torch.no_grad()
def loss_on_unseen():
    return loss_of(unseen).item()


# %% [markdown]
# Ten steps of AdamW, 4 orders each. The **update** of a matrix is what it is afterwards minus what it was before.

# %%
TARGETS = ["q_proj", "v_proj", "down_proj"]
trained = {name: p for name, p in model.named_parameters() if any(target in name for target in TARGETS)}
before = {name: p.detach().clone() for name, p in trained.items()}
gradients = {name: torch.zeros_like(p) for name, p in trained.items()}  # summed over the steps
untrained_loss = loss_on_unseen()

adamw = torch.optim.AdamW([p.requires_grad_() for p in trained.values()], lr=3e-4, weight_decay=0)
for batch in batches:
    adamw.zero_grad()
    loss_of(batch).backward()
    for name, p in trained.items():
        gradients[name] += p.grad
    adamw.step()
model.requires_grad_(False)
update = {name: p.detach() - before[name] for name, p in trained.items()}

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
full_loss = loss_on_unseen()
print(f"{len(trained)} matrices, {sum(p.numel() for p in trained.values()):,} numbers trained")
print(f"loss on 6 unseen orders: {untrained_loss:.2f} before, {full_loss:.2f} after, nats per token")

# %% claims
assert len(trained) == 30 and 1 < untrained_loss < 1.2 and full_loss < 0.12

# %% [markdown]
# Ten steps did the job. How much is in these updates? The **singular value decomposition** (SVD) writes a matrix as
# a sum of outer products, *directions*, from the largest to the smallest. A matrix of rank 8 is a sum of eight. The
# sum of the squared singular values is the squared norm, so each direction has its share of it.
#
# **Predict.** A 576 × 576 matrix has 576 directions. What share of the updates' squared norm do the 8 largest hold?

# %%
prediction = {"8 directions hold": 99}  # ← your guess, in %


# %% alt="Four rising curves: share of the squared norm in the r largest directions, r from 1 to 576 (log scale). At r = 8 the gradients have nearly all of it, AdamW's update about two thirds, the weights themselves far less, random numbers hardly any. A diamond at 8 is your guess."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
def cumulative(matrices):
    """Share of the squared norm that the r largest directions hold, r = 1, 2, ...; over all the matrices."""
    squares = torch.stack([torch.linalg.svdvals(matrix) ** 2 for matrix in matrices]).sum(0)
    return (squares.cumsum(0) / squares.sum()).tolist()


queries = [name for name in trained if "q_proj" in name]  # ten matrices of 576 × 576
draw = torch.Generator().manual_seed(0)
shares = {
    "gradients, summed": cumulative([gradients[name] for name in queries]),
    "update by AdamW": cumulative([update[name] for name in queries]),
    "the weights themselves": cumulative([before[name] for name in queries]),
    "random numbers": cumulative([torch.randn(576, 576, generator=draw) for _ in queries]),
}
_ = plot_energy(new_axes(), shares, (8, prediction["8 directions hold"] / 100))
at_8 = {name: values[7] for name, values in shares.items()}
print(", ".join(f"{name} {share:.0%}" for name, share in at_8.items()), "in 8 of 576 directions")

# %% claims
assert at_8["gradients, summed"] > 0.9 and 0.6 < at_8["update by AdamW"] < 0.75
assert 0.1 < at_8["the weights themselves"] < 0.3 and at_8["random numbers"] < 0.06
rank_of_update = min(torch.linalg.matrix_rank(update[name]).item() for name in queries)
assert rank_of_update > 500

# %% [markdown]
# **What happened?** The update is far from random, and far from rank 8: about a third of it lies elsewhere, spread
# over more than 500 directions. The *gradients* are nearly of low rank, over 90 %: each token adds one direction, and
# tokens want similar things. What AdamW makes of them is not. It divides every entry by that entry's usual size, so a
# tiny one moves as far as a large one. Take that to the end, and all that is left of a gradient is its signs:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
signs = cumulative([gradients[name].sign() for name in queries])[7]
print(f"8 directions hold {at_8['gradients, summed']:.0%} of the gradients, {signs:.0%} of their signs")

# %% claims
assert 0.4 < signs < 0.7 and signs < at_8["update by AdamW"]

# %% [markdown]
# ## 2 · What the loss needs
#
# So by its norm the update is not of low rank. Truncate it all the same: in all 30 matrices keep the 8 largest
# directions and throw the rest away.
#
# **Predict.** The loss was about 1.1 before training, and is below 0.1 with the whole update. What is it with 8
# directions?

# %%
prediction = {"loss": 0.4}  # ← your guess: 0.4 if a third of the update is a third of the gain

# %%
directions = {name: torch.linalg.svd(delta, full_matrices=False) for name, delta in update.items()}
total = sum((delta**2).sum().item() for delta in update.values())


@torch.no_grad()
def put(part):
    """Base plus a part of each update's directions (a slice); returns its share of the squared norm."""
    for name, (u, s, v) in directions.items():
        trained[name].copy_(before[name] + (u[:, part] * s[part]) @ v[part])
    return sum((s[part] ** 2).sum().item() for _, s, _ in directions.values()) / total


RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
kept, alone, rest = [], [], []
for rank in RANKS:
    kept.append(put(slice(None, rank)))
    alone.append(loss_on_unseen())
    put(slice(rank, None))
    rest.append(loss_on_unseen())

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
by_rank = dict(zip(RANKS, zip(kept, alone, rest)))
gain = {rank: (untrained_loss - loss) / (untrained_loss - full_loss) for rank, (_, loss, _) in by_rank.items()}
print(f"rank 8: {kept[3]:.0%} of the squared norm, loss {alone[3]:.2f}, {gain[8]:.0%} of the gain", end="")
print(f" (your guess: {prediction['loss']})")
print(f"rank 1: {kept[0]:.0%} of the squared norm, {gain[1]:.0%} of the gain")
print(f"without the first 32 directions: {1 - kept[5]:.0%} of the squared norm, loss {rest[5]:.2f}")

# %% claims
assert 0.5 < kept[3] < 0.72 and gain[8] > 0.9 and gain[1] > 0.5 and kept[0] < 0.3
assert 0.125 < 1 - kept[5] < 0.25 and rest[5] > 0.8 * untrained_loss

# %% [markdown]
# **What happened?** Norm is not what the loss cares about. Eight directions hold less than three quarters of the
# squared norm and bring more than 90 % of the gain. What comes after the 32nd holds more than an eighth of it, and
# alone it does next to nothing: AdamW moved those numbers because it moves everything, not because the loss had
# asked.
#
# Move the slider. Orange is the other half of the experiment: *without* the largest directions.

# %% alt="Left, two bars: share of the squared norm kept and thrown away at the chosen rank, at the start 8. Right, loss over rank 1 to 128, dotted lines before and after training. The largest directions alone: falls almost to the trained loss. The others alone: lower at rank 1, then rises to the untrained."
LOSSES = {"the largest directions alone": alone, "all the others alone": rest}


def draw_truncation(rank):
    here = RANKS.index(rank)
    ax = plot_truncation(RANKS, kept, LOSSES, (untrained_loss, full_loss), here)
    ax.set_title(f"rank {rank}: loss {alone[here]:.2f} · without them {rest[here]:.2f}", loc="left", fontsize=11)
    return ax


explore(draw_truncation, rank=ipywidgets.SelectionSlider(options=RANKS, value=8, description="rank"))

# %% claims
assert rest[0] < alone[0] and (untrained_loss - rest[0]) / (untrained_loss - full_loss) > 0.8

# %% [markdown]
# Did you see the left end? The largest direction alone does more than half of the job, and *without* it the others
# do over 80 %. So there is more than one way to the same loss. That is why a method may restrict the update from the
# start: it need not find the update that full training would have found, only one that does as well.
#
# ## 3 · LoRA
#
# An update of rank r is a product: B A, with A of shape (r, in) and B of shape (out, r). LoRA trains these two, and
# scales what they do:
#
# ```
# y = W x + alpha / r · B A x
# ```
#
# **Exercise 6.1 ●○○ (4 minutes).** Write the second term. `x` has shape (..., in), with any number of dimensions in
# front. Do not build the matrix B A: at 4096 × 4096 it would cost what LoRA saves.


# %%
def correction(x, A, B, alpha):
    """alpha / rank · B A x, for x of shape (..., in): a tensor of shape (..., out)."""
    ### BEGIN SOLUTION (about 1 line)
    return alpha / len(A) * (x @ A.T @ B.T)
    ### END SOLUTION


# %%
check_correction(correction)

# %% [markdown]
# <details><summary>Hint 1</summary>x has its features in the <i>last</i> dimension, so a matrix acts from the right and
# transposed: <code>x @ W.T</code>.</details>
# <details><summary>Hint 2</summary>First down to r numbers, with A; then up, with B. r is the number of rows of A.</details>

# %% [markdown]
# The whole layer:


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

    def merged(self):  # the one matrix that does the same
        return self.base.weight + self.scale * self.B @ self.A


# %% [markdown]
# The package's `LoraLinear` does the same and more (dropout, dtypes, merging that can be undone). From the same
# seed:

# %%
from qlora_lab.finetuning import LoraLinear, add_lora, unload

base = model.model.layers[0].mlp.down_proj  # 1536 in, 576 out
x = torch.randn(2, 5, 1536, generator=draw)
torch.manual_seed(0)
mine = MyLora(base, rank=8, alpha=16)
torch.manual_seed(0)
theirs = LoraLinear(base, rank=8, alpha=16)

# %% claims
assert torch.equal(mine.A, theirs.lora_A)
assert torch.equal(mine(x), base(x)) and torch.equal(theirs(x), base(x))  # B is zero: not one bit differs

# %%
mine.B.data.normal_(std=0.02, generator=draw)  # as if it had learned
theirs.lora_B.data.copy_(mine.B)
torch.testing.assert_close(mine(x), theirs(x))
torch.testing.assert_close(mine(x), x @ mine.merged().T)
torch.testing.assert_close(mine.merged(), base.weight + theirs.delta())

# %% [markdown]
# Because B starts at zero, an adapted model begins exactly where the base is, bit for bit: adding a zero changes
# nothing.
#
# **Predict.** B is zero, A is random. In the very first step, how large is the norm of A's gradient, as a multiple
# of B's?

# %%
prediction = {"A's gradient / B's": 1.0}  # ← your guess

# %%
moves = {}
for start in ("A random, B zero", "both random", "both zero"):
    torch.manual_seed(0)
    layer = MyLora(base, rank=8, alpha=16)
    if start == "both random":
        nn.init.kaiming_uniform_(layer.B, a=math.sqrt(5))  # as A is
    if start == "both zero":
        layer.A.data.zero_()
    (layer(x) - base(x) - 1).square().mean().backward()  # any loss that the base does not solve
    a, b, change = layer.A.grad.norm(), layer.B.grad.norm(), (layer(x) - base(x)).norm() / base(x).norm()
    print(f"{start:<17} gradient of A {a:.3f}, of B {b:.3f}; output changed by {change:.0%} at the start")
    moves[start] = bool(a), bool(b), bool(change)
print(f"your guess: {prediction[next(iter(prediction))]} times")

# %% claims
assert moves == {
    "A random, B zero": (False, True, False),
    "both random": (True, True, True),
    "both zero": (False, False, False),
}

# %% [markdown]
# **What happened?** A's gradient is *zero*. The chain rule puts B in front of it: whatever A does, B = 0 wipes it
# out. B's gradient has A in front, and A is random. So the first step moves B alone, and from the second on both
# learn. With both random, the model starts damaged; with both zero, each waits for the other for ever.
#
# Now train LoRA on the ten batches that the full training had. It wants a larger learning rate: 0.005 here, 0.0003
# above.


# %%
def loss_with_lora(rank):
    """Train LoRA on the base: how many numbers, the loss, and A and B of every layer."""
    add_lora(model, rank, alpha=2 * rank, targets=TARGETS)
    adapters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(adapters, lr=5e-3, weight_decay=0)
    for batch in batches:
        adamw.zero_grad()
        loss_of(batch).backward()
        adamw.step()
    loss, layers = loss_on_unseen(), lora_layers(model)
    unload(model)
    parts = {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in layers.items()}
    return sum(p.numel() for p in adapters), loss, parts


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
put(slice(0, 0))  # no direction at all: the base again
results = {"before training": (0, untrained_loss), "in full": (sum(p.numel() for p in trained.values()), full_loss)}
for rank in (1, 8):
    numbers, loss, adapter = loss_with_lora(rank)
    results[f"LoRA, rank {rank}"] = (numbers, loss)
for name, (numbers, loss) in results.items():
    print(f"{name:<16}{numbers:>11,} numbers trained, loss {loss:.2f}")

# %% claims
for rank in (1, 8):
    add_lora(model, rank, alpha=2 * rank, targets=TARGETS)
    assert loss_on_unseen() == untrained_loss  # to the last bit
    unload(model)
assert [numbers for numbers, _ in results.values()] == [0, 13_271_040, 40_320, 322_560]
assert results["LoRA, rank 8"][1] < 1.5 * full_loss and results["LoRA, rank 1"][1] < alone[0]

# %% [markdown]
# {{results['LoRA, rank 8'][0]:,}} numbers instead of {{results['in full'][0] / 1e6:.0f}} million, and about the loss of full training. (LoRA's learning rate was the better of
# two, the full training's the first that was tried: read this as "as good", not "better".) Rank 1, {{results['LoRA, rank 1'][0]:,}} numbers,
# does better than the largest single direction of the full update did: trained as rank 1 from the start, it finds a
# direction that pays more.
#
# Do not overdo it. This is one easy task and ten steps. Where there is much to learn that the base has never seen, a
# higher rank or full training can win. That a low rank suffices is an experiment, to be repeated on your task.
#
# **Exercise 6.2 ●●○ (8 minutes).** Five LoRA layers around the same base, rank 4, alpha 32, dropout 0.1 on the
# correction's input. Four have a bug, and none of the bugs raises an error. Look at each, and name what it has.

# %%
square = nn.Linear(576, 576, bias=False)
square.weight.data.copy_(before[queries[0]])
suspects = lora_suspects(square.requires_grad_(False))
print("\n".join(f"{name!r}: {bug}" for name, bug in LORA_BUGS.items()))

# %%
layer = suspects["A"]  # ← look at another one
x = torch.randn(100, 576, generator=draw)
layer.B.data.zero_()  # as at the start
layer.zero_grad()
torch.manual_seed(0)
started = layer.train()(x)
print(f"training mode, B zero: the output differs from the base's by {(started - square(x)).norm():.1f}")
started.square().sum().backward()
print(f"norms of the gradients: A {layer.A.grad.norm():.2g}, B {layer.B.grad.norm():.2g}")
layer.B.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))  # as if it had learned
trained_output, expected = layer.eval()(x) - square(x), x @ (layer.B @ layer.A).T * 32 / 4
print(f"correction, B random: {trained_output.norm():.1f}, expected {expected.norm():.1f}")
by_merging = x @ (layer.merged_weight() - square.weight).T
print(f"merged minus computed: {(by_merging - trained_output).norm():.1f}")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ...}  # one of the five keys above for each
diagnosis = {"A": "transposed", "B": "healthy", "C": "wet base", "D": "both zero", "E": "upside down"}
### END SOLUTION

# %%
check_lora_suspects(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>Go line by line: what should a sound layer print? The base's output at first; a gradient
# for B and none for A; the expected correction; and what it merges is what it computes.</details>
# <details><summary>Hint 2</summary>Each bug breaks one line only.</details>

# %% [markdown]
# ## 4 · What alpha does
#
# Many recipes have it: `alpha = 2 * rank`. (QLoRA's authors take 16 at rank 64, PEFT's defaults are 8 and 8.) It scales the
# correction by alpha / rank, which sounds like a volume knob. But B is *trained*: if you turn the knob up, B could just stay smaller.
#
# Here is a small problem: 64 inputs and outputs, and a base that is wrong by a matrix of rank 4.

# %%
draw = torch.Generator().manual_seed(0)
small = nn.Linear(64, 64, bias=False)
small.weight.data = torch.randn(64, 64, generator=draw) / 8
x = torch.randn(512, 64, generator=draw)
wrong_by = torch.randn(64, 4, generator=draw) @ torch.randn(4, 64, generator=draw) / 64
y = x @ (small.weight.data + wrong_by).T


def losses_of(rank, alpha, lr_a=1e-3, lr_b=1e-3, steps=60, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    layer, losses = MyLora(small, rank, alpha), []
    optimizer = optimizer([{"params": [layer.A], "lr": lr_a}, {"params": [layer.B], "lr": lr_b}], **options)
    for _ in range(steps):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% [markdown]
# **Predict.** You double alpha. With which changes of the two learning rates would you have had *the very same*
# training at the old alpha?

# %%
prediction = {"learning rate of A": 2, "learning rate of B": 2}  # ← your guess: times what?

# %% alt="Three falling curves: mean squared error (log scale) over 60 optimizer steps. Alpha 16 stays above alpha 32, a thick line. The third, dotted, is alpha 16 with the learning rates that you guessed: it is the same training only if it lies on the thick line. With both rates doubled it falls far below."
adamw = {"weight_decay": 0, "eps": 1e-30}  # AdamW's eps blurs tiny gradients: switched off to compare bit by bit
a, b = prediction.values()
runs = {
    "alpha 32": losses_of(8, 32, **adamw),
    "alpha 16": losses_of(8, 16, **adamw),
    f"alpha 16, your guess: A × {a}, B × {b}": losses_of(8, 16, a * 1e-3, b * 1e-3, **adamw),
}
_ = plot_runs(new_axes(), runs, "mean squared error")
same = "yes" if list(runs.values())[2] == runs["alpha 32"] else "no"
print(f"your guess gives the same training: {same}")

# %% claims
assert losses_of(8, 16, 1e-3, 2e-3, **adamw) == runs["alpha 32"]  # all 60 losses, every bit
sgd = {"optimizer": torch.optim.SGD}
assert losses_of(8, 16, 0.1, 0.4, **sgd) == losses_of(8, 32, 0.1, 0.1, **sgd)

# %% [markdown]
# **What happened?** A × 1, B × 2. AdamW's steps do not depend on the size of the gradient, so B moves as far as
# before, and all that it does counts double. It starts at zero, so that is all. Under AdamW without weight decay and
# clipping, **alpha is a learning rate for B**, and nothing else. (Under plain SGD doubling alpha is B × 4: the
# gradient doubles too.)
#
# What, then, of the rule? With alpha = 2 × rank, the scale is 2 at every rank. Compare ranks at one learning rate,
# as many tutorials do.
#
# **Predict.** Now let each of the ranks 2, 4, 8, 16 and 64 train at its *own* best learning rate. From which rank on
# is the loss after 60 steps within a factor of 4 of rank 64's?

# %%
prediction = {"good from rank": 64}  # ← your guess

# %% alt="Two lines: mean squared error after 60 steps (log scale) over rank 2 to 64. With learning rate 0.001 for all, rank 64 is about a hundred times better than rank 8. With each rank at its best of six rates, rank 2 alone is bad; from 4 on all are within a factor of 4. A dotted line is your guess."
ranks, rates = [2, 4, 8, 16, 64], [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
final = {r: [losses_of(r, 2 * r, rate, rate, weight_decay=0)[-1] for rate in rates] for r in ranks}
lines = {
    "learning rate 0.001 for all": [final[r][0] for r in ranks],
    "each rank at its best of six": [min(final[r]) for r in ranks],
}
ax = plot_by_rank(new_axes(), ranks, lines, "mean squared error after 60 steps")
ax.set(yscale="log")
ax.axvline(prediction["good from rank"], color="0.5", linestyle=":", label="your guess")
_ = ax.legend(frameon=False)

# %% claims
assert 90 < final[8][0] / final[64][0] < 110  # at one learning rate: about a hundred times
best = {r: min(final[r]) for r in ranks}
assert best[4] < 4 * best[64] and best[8] < 2 * best[64] and best[2] > 200 * best[4]
first_gain = {r: first - second for r in (8, 64) for first, second in [losses_of(r, 2 * r, steps=2)]}
assert 7.5 < first_gain[64] / first_gain[8] < 8.5

# %% [markdown]
# **What happened?** At one learning rate, rank 64 beats rank 8 a hundredfold, and it looks as if rank had done it.
# But at scale 2 a larger rank takes larger steps, since more rows of A pull in the same direction: already the first
# step of rank 64 gains 8 times as much as that of rank 8. Give each its own learning rate, and rank 4 is within a
# factor of 4 of rank 64, rank 8 within 2. Only rank 2 fails for good, because the base is wrong by rank 4. Before you
# believe that a rank is better, tune the learning rate of the other.
#
# ## 5 · A printout that cannot be
#
# A script of the kind that one finds everywhere: LLaMA-7B, `r=16`, `target_modules=["q_proj", "k_proj", "v_proj",
# "o_proj"]`, and the line that it is said to print:
#
# > `trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.06`
#
# **Predict.** Count before you run: each of the four is 4096 × 4096, and there are 32 layers.

# %%
prediction = {"trainable": 4_194_304}  # ← your count

# %%
from qlora_lab.memory import trainable_parameters as count

llama = SHAPES["llama-7b"]
attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
adapter_numbers = count(llama, 16, attention)
whole = llama.parameters() + adapter_numbers
print(
    f"trainable params: {adapter_numbers:,} || all params: {whole:,} || trainable%: {100 * adapter_numbers / whole:.4f}"
)
print(f"your count: {prediction['trainable']:,}")

# %% claims
assert (
    adapter_numbers == 32 * 4 * 16 * (4096 + 4096) == 16_777_216 and f"{100 * adapter_numbers / whole:.4f}" == "0.2484"
)
assert llama.parameters() + 4_194_304 == 6_742_609_920

# %% [markdown]
# **What happened?** It is {{adapter_numbers:,}}, four times as many. The quoted line agrees with itself, though: its total is
# LLaMA-7B and an adapter of 4,194,304. It looks like the output of another run. Which?
#
# **Exercise 6.3 ●●○ (6 minutes).** Given a shape, the targets and the number of trainable parameters, find the rank.
# `shape.linears()` gives `{"q_proj": (in, out), ...}` for one layer, `shape.num_hidden_layers` how many layers there
# are.


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
# <details><summary>Hint 1</summary>How many numbers does an adapter of rank 1 have in one layer? In all layers?</details>
# <details><summary>Hint 2</summary>In newer models k and v are narrower than q. Ask each target for its own sizes.</details>

# %%
from itertools import combinations

from qlora_lab.memory import LINEARS

subsets = [list(s) for size in range(1, 8) for s in combinations(LINEARS, size)]
fits = [(r, s) for s in subsets for r in range(1, 65) if count(llama, r, s) == 4_194_304]
for r in sorted({r for r, _ in fits}, reverse=True):
    examples = [s for rank, s in fits if rank == r]
    print(f"rank {r:>2}: {len(examples[0])} of q, k, v, o")

# %% claims
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

assert LoraConfig().r == 8 and set(DEFAULT_TARGETS["llama"]) == {"q_proj", "v_proj"}
assert {(r, len(s)) for r, s in fits} == {(16, 1), (8, 2), (4, 4)} and all(set(s) <= set(attention) for _, s in fits)

# %% [markdown]
# Of all sets of targets and all ranks up to 64, only three kinds fit. `r=8` on q and v is what PEFT does with LLaMA if
# you set neither. The likeliest story: somebody changed the settings and kept the old output. Count before you quote.
#
# **Exercise 6.4 ●●○ (5 minutes).** Now the other way. Your card has some GB (10⁹ bytes) left for the adapter: its
# float32 numbers, a float32 gradient for each, and AdamW's two float32 states. What is the largest rank?
# `count(shape, rank, targets)` counts.


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
# <details><summary>Hint 1</summary>How many bytes go with one trained number? Four float32 numbers of 4 bytes.</details>
# <details><summary>Hint 2</summary>What does rank 1 cost? Rank r costs r times as much.</details>

# %% [markdown]
# ## 6 · The same as PEFT's
#
# Your layer is LoRA. Is it *PEFT's* LoRA, the one that everybody's files are for? Put the trained adapter of section
# 3 back on the base, save it, and let PEFT read it.

# %%
from peft import PeftModel

from qlora_lab.finetuning import load_lora, save_lora

add_lora(model, rank=8, alpha=16, targets=TARGETS)
for name, layer in lora_layers(model).items():
    layer.lora_A.data, layer.lora_B.data = adapter[name]
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    ours = model(**unseen[0]).logits
    save_lora(model, f"{folder}/ours")
    peft_model = PeftModel.from_pretrained(unload(model), f"{folder}/ours")
    pefts = peft_model(**unseen[0]).logits
    peft_model.save_pretrained(f"{folder}/pefts")
    base_logits = peft_model.unload()(**unseen[0]).logits
    again = load_lora(model, f"{folder}/pefts")(**unseen[0]).logits

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
difference, effect = (pefts - ours).abs().max(), (ours - base_logits).abs().max()
print(
    f"largest difference of a logit: {difference:.0e} between PEFT's and ours; the adapter moves them by up to {effect:.0f}"
)

# %% claims
assert difference < 1e-3 and torch.equal(again, ours) and effect > 1
assert len(lora_layers(model)) == 30 and trainable_parameters(model) == 322_560

# %% [markdown]
# ## Recap
#
# - Measured on a real model: AdamW's update is *not* of low rank by its norm, but a few of its directions do nearly
# all of the work.
# - LoRA trains B A beside a frozen W. B starts at zero: not one bit of the output changes, and A has no gradient in
# the first step.
# - Under AdamW, alpha is a learning rate for B. Compare ranks only when each has its own learning rate.
# - rank × (in + out) numbers for each matrix. LLaMA-7B, rank 16 on q, k, v, o: {{adapter_numbers:,}}, or {{100 * adapter_numbers / whole:.4f}} %. 4,194,304 is
# rank 8 on q and v.
#
# This serves *train a QLoRA model successfully*: a QLoRA model is this one on a base in 4 bits.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [07 · What happens when the base is 4-bit?](07_qlora_from_scratch.ipynb)
