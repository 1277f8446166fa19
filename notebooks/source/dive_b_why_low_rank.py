# %% [markdown]
# # Dive B · Why does a low rank suffice?
#
# LoRA trains an update of rank `8` or `16` beside a matrix that could take one of rank `576` or `4096`. It works, and the usual
# explanation is: *the updates of fine-tuning have a low rank.* Do they? You train real matrices in full, take their updates apart, and
# find the explanation wrong and the method right. Then you ask whether a higher rank is better. You need lesson 06 for this, and nothing
# after it.
#
# | you need | |
# |---|---|
# | time | 53 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 2 GB |
# | GPU | not used |

# %% machinery "Imports"
import ipywidgets
import torch
from torch import nn

from qlora_lab.classroom.checks import check_best_of_rank, check_lora_suspects, check_needed_rank, progress
from qlora_lab.classroom.lessons.dive_b.checks import LORA_BUGS, lora_suspects
from qlora_lab.classroom.lessons.dive_b.figures import (
    plot_by_rank,
    plot_energy,
    plot_parts,
    plot_rebuilt,
    plot_truncation,
)
from qlora_lab.classroom.lessons.dive_b.machinery import (
    SmallProblem,
    cut_in_two,
    directions_for,
    read_pairs,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import add_lora, load_model, lora_layers, unload

# %% [markdown]
# ## 1 · Taking a matrix apart
#
# In lesson 06, an update was a column times a row, or a sum of a few of these. This section goes the other way: you get a matrix, and ask
# which columns and rows it is made of. Here is a matrix of which we know the answer. It is the sum of two products, a large one and a
# smaller one, and of a little noise.

# %% alt="Four tables of numbers in coloured squares: M, and the three that it is the sum of. The large product has whole rows and columns of the same pattern, and so has the smaller one; the noise has none."
noise = 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
large = torch.outer(torch.tensor([1, 2, 0, -1, 0, 1.0]), torch.tensor([1, 0, 2, 0, -1, 1.0]))
smaller = torch.outer(torch.tensor([1, 0, 1, 0, -1, -1.0]), torch.tensor([0, 1, -1, 1, -1, 1.0]))
M = large + smaller + noise
_ = plot_parts(M, {"the large product": large, "the smaller product": smaller, "noise": noise})

# %% [markdown]
# Every matrix can be written as a sum of columns times rows. The **singular value decomposition** (SVD) finds the sum that has the largest
# product first, then the next largest, and so on:
#
# ```
# M = s₁ · u₁ v₁ + s₂ · u₂ v₂ + …
# ```
#
# Each column u and each row v has length one, so the number s in front, the **singular value**, says how large the product is. Let us call
# each product a **direction**. A six by six matrix has up to six of them, and a matrix of rank r has exactly r.
#
# How much of the matrix is in one direction? Square all entries of M and add them up: that is its squared norm. The directions are
# perpendicular to each other, so this equals the sum of the squared singular values. Each direction has a *share* of it, s² divided by the sum of all s².
#
# **Predict.** What share of the squared norm do the two largest of the six directions hold, in M, and in a matrix of random numbers?

# %%
prediction = {"M": ..., "random": ...}  # ← your guesses, in per cent


# %%
def shares(matrix):
    squares = torch.linalg.svdvals(matrix) ** 2  # largest first
    return squares / squares.sum()


random = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
for name, matrix in {"M": M, "random": random}.items():
    print(f"{name:<7}", " ".join(f"{share:4.0%}" for share in shares(matrix)))
print(told(prediction))

# %% claims
assert shares(M)[:2].sum() > 0.95 and 0.6 < shares(random)[:2].sum() < 0.85
left, values, right = torch.linalg.svd(M)
for i, product in enumerate((large, smaller)):
    assert (left[:, i : i + 1] * values[i] @ right[i : i + 1] - product).norm() < 0.3 * product.norm()
assert torch.isclose((torch.linalg.svdvals(M) ** 2).sum(), M.square().sum())

# %% [markdown]
# **What happened?** The two largest directions of M hold {{100 * shares(M)[:2].sum().item():.0f ±1}} %. They are close to the two
# products, and the other four are mostly noise. Even random numbers are not spread evenly in a matrix this small:
# {{100 * shares(random)[:2].sum().item():.0f ±1}} %. A share only says something beside that of random numbers of the same shape.
#
# Move the slider. It keeps the r largest directions and throws the rest away. No matrix of rank r comes nearer to M, by the squares of
# the differences.


# %% machinery "Slider: M, rebuilt from its largest directions"
def draw_rebuilt(rank):
    return plot_rebuilt(M, rank)


# %% alt="Left, M as coloured squares. Middle, M rebuilt from its largest directions: with two, where the slider starts, it looks nearly the same. Right, bars: the six singular values, the first two far larger than the others; the ones kept are blue."
explore(draw_rebuilt, rank=ipywidgets.IntSlider(value=2, min=1, max=6, description="rank"))

# %% [markdown]
# **Exercise B.1 ●○○ (4 minutes).** Write what the slider does, for any matrix. `torch.linalg.svd(matrix, full_matrices=False)` returns
# three tensors: the columns u, side by side; the singular values; and the rows v, one below the other.


# %%
def best_of_rank(matrix, rank):
    """The matrix of this rank that is nearest to `matrix`: a tensor of the same shape."""
    ### BEGIN SOLUTION (about 2 lines)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
    ### END SOLUTION


# %%
check_best_of_rank(best_of_rank)

# %% [markdown]
# <details><summary>Hint 1</summary>Take the first <code>rank</code> columns of u, values of s and rows of v.</details>
# <details><summary>Hint 2</summary>A matrix product adds up column times row, over all pairs. <code>u * s</code> multiplies each column by
# its value.</details>

# %% [markdown]
# ## 2 · A real update
#
# Now for the bundled model, and the orders of lesson 01. You train three matrices of each of its last ten layers *in full*: there is no
# adapter, and every number in them may move. The {{20}} layers below are frozen. What they make of the orders never changes, so
# `cut_in_two` computes it once, and hands you the upper part of the model with its input.

# %%
model, tokenizer = load_model("smollm2-135m-instruct", compute_dtype=torch.float32, device="cpu")
half = cut_in_two(model, tokenizer, keep=10, steps=10)  # ten batches of four orders
TARGETS = ["q_proj", "v_proj", "down_proj"]
trained = {name: p for name, p in half.model.named_parameters() if any(target in name for target in TARGETS)}
before = {name: p.detach().clone() for name, p in trained.items()}
QUERIES = [name for name in trained if "q_proj" in name]  # ten matrices of 576 × 576
untrained_loss = half.unseen_loss()
print(f"{len(trained)} matrices, {sum(p.numel() for p in trained.values()):,} numbers to train")

# %% [markdown]
# Ten steps of AdamW follow. The **update** of a matrix is what it is afterwards minus what it was before. The gradients are added up
# too, for you will want to compare.

# %%
gradients = {name: torch.zeros_like(p) for name, p in trained.items()}
adamw = torch.optim.AdamW([p.requires_grad_() for p in trained.values()], lr=3e-4, weight_decay=0)
for batch in half.batches:
    adamw.zero_grad()
    half.loss(batch).backward()
    for name, p in trained.items():
        gradients[name] += p.grad
    adamw.step()
half.model.requires_grad_(False)
update = {name: p.detach() - before[name] for name, p in trained.items()}

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
full_loss = half.unseen_loss()
print(f"loss on 6 orders that it has not seen: {untrained_loss:.2f} before, {full_loss:.2f} after")

# %% claims
assert len(trained) == 30 and 1 < untrained_loss < 1.2 and full_loss < 0.12

# %% [markdown]
# (The loss is minus the natural logarithm of the probability of the right token, on average over the answers' tokens.) Ten steps did the
# job. Are the updates of low rank?
#
# **Predict.** The updates of the ten `q_proj` have {{before[QUERIES[0]].shape[0]}} × {{before[QUERIES[0]].shape[1]}} numbers each, so up to
# {{before[QUERIES[0]].shape[0]}} directions. What share of their squared norm do the {{8}} largest hold?

# %%
prediction = ...  # ← your guess, in per cent


# %%
def cumulative(matrices):
    """Share of the squared norm that the r largest directions hold, r = 1, 2, ...; over all the matrices."""
    squares = torch.stack([torch.linalg.svdvals(matrix) ** 2 for matrix in matrices]).sum(0)
    return (squares.cumsum(0) / squares.sum()).tolist()


draw = torch.Generator().manual_seed(0)
held = {
    "gradients, added up": cumulative([gradients[name] for name in QUERIES]),
    "update by AdamW": cumulative([update[name] for name in QUERIES]),
    "the weights themselves": cumulative([before[name] for name in QUERIES]),
    "random numbers": cumulative([torch.randn(576, 576, generator=draw) for _ in QUERIES]),
}

# %% alt="Four rising curves: share of the squared norm in the r largest directions, r from {{1}} to {{len(held['random numbers'])}}, on a log scale. At rank {{8}} the gradients have nearly all of it, AdamW's update about two thirds, the weights themselves far less, random numbers hardly any."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
_ = plot_energy(new_axes(), held, (8, prediction))
at_8 = {name: values[7] for name, values in held.items()}
print(", ".join(f"{name} {share:.0%}" for name, share in at_8.items()), "in 8 of 576 directions")
print(told(prediction))

# %% claims
assert at_8["gradients, added up"] > 0.9 and 0.6 < at_8["update by AdamW"] < 0.75
assert 0.1 < at_8["the weights themselves"] < 0.3 and at_8["random numbers"] < 0.06
assert min(torch.linalg.matrix_rank(update[name]).item() for name in QUERIES) > 500

# %% [markdown]
# **What happened?** The update is far from random, and it is far from rank {{8}}, too. About a third of its squared norm lies in hundreds of other
# directions. The *gradients* do have nearly all of their norm in a few directions, although each token adds one column times one
# row to them, and there are hundreds of tokens.
#
# So it is AdamW that spreads the update out. It divides each entry of the gradient by that entry's usual size, and then a tiny entry
# moves as far as a large one. Take this to the extreme and all that is left of a gradient is its signs. Had the gradient a single direction,
# its signs would have one, too: the column's signs times the row's. But where the large directions cancel or are close to zero, the
# small ones decide the sign, and then count as much as any other:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
signs = cumulative([gradients[name].sign() for name in QUERIES])[7]
print(f"8 directions hold {at_8['gradients, added up']:.0%} of the gradients, {signs:.0%} of their signs")

# %% claims
assert 0.4 < signs < 0.7 and signs < at_8["update by AdamW"]

# %% [markdown]
# ## 3 · What the loss needs
#
# By its norm, then, the update is not of low rank. Cut it down all the same: in all {{len(trained)}} matrices, keep the {{8}} largest
# directions and throw the rest away.
#
# **Predict.** The loss was {{untrained_loss:.1f ±0.05}} before training and is {{full_loss:.2f ±0.03}} with the whole update. What will
# it be with {{8}} directions?

# %%
prediction = ...  # ← your guess: about 0.4, if a third of the update is a third of the gain

# %%
directions = {name: torch.linalg.svd(delta, full_matrices=False) for name, delta in update.items()}
total = sum((delta**2).sum().item() for delta in update.values())


@torch.no_grad()
def put(part):
    """Base plus a part of each update's directions (a slice); returns its share of the squared norm."""
    for name, (u, s, v) in directions.items():
        trained[name].copy_(before[name] + (u[:, part] * s[part]) @ v[part])
    return sum((s[part] ** 2).sum().item() for _, s, _ in directions.values()) / total


# %%
RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
kept, alone, rest = [], [], []
for rank in RANKS:
    kept.append(put(slice(None, rank)))
    alone.append(half.unseen_loss())
    put(slice(rank, None))
    rest.append(half.unseen_loss())

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
gain, gain_of_rest = ([(untrained_loss - loss) / (untrained_loss - full_loss) for loss in of] for of in (alone, rest))
print(f"{'':<28}{'squared norm':>13}{'loss':>7}{'gain':>7}")
for at in (RANKS.index(8), RANKS.index(1)):
    print(f"the {RANKS[at]} largest alone{'':<11}{kept[at]:>13.0%}{alone[at]:>7.2f}{gain[at]:>7.0%}")
for at in (RANKS.index(1), RANKS.index(32)):
    print(f"all but the {RANKS[at]:>2} largest{'':<7}{1 - kept[at]:>13.0%}{rest[at]:>7.2f}{gain_of_rest[at]:>7.0%}")
print(told(prediction))

# %% claims
assert 0.5 < kept[3] < 0.72 and gain[3] > 0.9 and gain[0] > 0.5 and kept[0] < 0.3
assert gain_of_rest[0] > 0.8 and gain_of_rest[5] < 0.2 and gain[0] > 3 * gain_of_rest[5]
assert 0.125 < 1 - kept[5] < 0.25 and rest[5] > 0.8 * untrained_loss

# %% [markdown]
# **What happened?** The loss does not go by norm. The largest direction and all that comes after the first {{32}} have about as much of it,
# {{100 * kept[0]:.0f ±8}} % and {{100 * (1 - kept[5]):.0f ±5}} %. But the one brings {{100 * gain[0]:.0f ±12}} % of the gain, and the other {{100 * gain_of_rest[5]:.0f ±8}} %. AdamW moved those last numbers because it moves
# everything, not because the loss asked for it. (In section 2, eight directions held {{100 * at_8["update by AdamW"]:.0f ±5}} % of the ten `q_proj` alone. Here it is all {{len(trained)}} matrices.)
#
# Move the slider. Orange is the other half of the experiment: the update *without* its largest directions.

# %% machinery "Slider: the largest directions, and all the others"
LOSSES = {"the largest directions alone": alone, "all the others alone": rest}


def draw_truncation(rank):
    here = RANKS.index(rank)
    ax = plot_truncation(RANKS, kept, LOSSES, (untrained_loss, full_loss), here)
    ax.set_title(f"rank {rank}: loss {alone[here]:.2f} · without them {rest[here]:.2f}", loc="left", fontsize=11)
    return ax


# %% alt="Left, two bars: share of the squared norm kept and thrown away, at the start with rank {{8}}. Right, loss over rank {{RANKS[0]}} to {{RANKS[-1]}}, with dotted lines before and after training. The largest directions alone fall almost to the trained loss. The others alone begin lower, on the left, and rise to the untrained loss."
explore(draw_truncation, rank=ipywidgets.SelectionSlider(options=RANKS, value=8, description="rank"))

# %% claims
assert rest[0] < alone[0] and (untrained_loss - rest[0]) / (untrained_loss - full_loss) > 0.8

# %% [markdown]
# Look at the left end. The largest direction alone brings {{100 * gain[0]:.0f ±12}} % of the gain, and yet it is hardly missed: *without* it, the others
# bring {{100 * gain_of_rest[0]:.0f ±8}} %. So there is more than one way to nearly the same loss.
#
# That is why a method may restrict the update from the start. It need not find the update that full training would have found, only one
# that does as well.
#
# ## 4 · A low rank from the start
#
# Now train LoRA on the same ten batches. It takes a larger learning rate: {{0.005}} here, for both ranks, and {{0.0003}} above.
#
# **Predict.** What will the loss be with rank {{8}}, and with rank {{1}}?

# %%
prediction = {"rank 8": ..., "rank 1": ...}  # ← your guesses


# %%
def loss_with_lora(rank):  # -> how many numbers are trained, the loss, and A and B of each layer
    add_lora(half.model, rank, alpha=2 * rank, targets=TARGETS)
    adapter = [p for p in half.model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(adapter, lr=5e-3, weight_decay=0)
    for batch in half.batches:
        adamw.zero_grad()
        half.loss(batch).backward()
        adamw.step()
    loss = half.unseen_loss()
    pairs = {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in lora_layers(half.model).items()}
    unload(half.model)
    return sum(p.numel() for p in adapter), loss, pairs


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
put(slice(0, 0))  # no direction at all: the base again
results = {"before training": (0, untrained_loss), "in full": (sum(p.numel() for p in trained.values()), full_loss)}
for rank in (1, 8):
    numbers, loss, pairs = loss_with_lora(rank)
    results[f"LoRA, rank {rank}"] = (numbers, loss)
for name, (numbers, loss) in results.items():
    print(f"{name:<16}{numbers:>11,} numbers trained, loss {loss:.2f}")
print(told(prediction))

# %% claims
for rank in (1, 8):
    add_lora(half.model, rank, alpha=2 * rank, targets=TARGETS)
    assert half.unseen_loss() == untrained_loss  # to the last bit
    unload(half.model)
assert [numbers for numbers, _ in results.values()] == [0, 13_271_040, 40_320, 322_560]
assert results["LoRA, rank 8"][1] < 1.5 * full_loss and results["LoRA, rank 1"][1] < alone[0]

# %% [markdown]
# **What happened?** {{results['LoRA, rank 8'][0]:,}} numbers instead of {{results['in full'][0] / 1e6:.0f}} million reach about the loss of
# full training. (LoRA's learning rate was the better of two that were tried, full training's the first: read this as "as good", not as
# "better".) Rank {{1}}, with {{results['LoRA, rank 1'][0]:,}} numbers, does better than the largest single direction of the full update
# did in section 3. It may have found a better direction, or only gone farther: that was not compared. Nor does this say that rank {{8}} is better
# than rank {{1}}, since both had one learning rate. Section 5 shows what that can do.
#
# Do not overdo it. This is one easy task and ten steps. Where there is much to learn that the base has never seen, a higher rank or full
# training can win. That a low rank suffices is the result of an experiment, and you should repeat it on your task.
#
# You can also ask an adapter whether it has *used* its rank. The matrix B A has at most r directions, and some may be nearly empty.
#
# **Exercise B.2 ●●○ (6 minutes).** Write `needed_rank`: how many of the directions of B A does it take to hold at least the given
# share of its squared norm?


# %%
def needed_rank(A, B, share):
    """A: (rank, in), B: (out, rank), share from 0 to below 1 -> the smallest number of directions that hold it."""
    ### BEGIN SOLUTION (about 3 lines)
    squares = torch.linalg.svdvals(B @ A) ** 2
    held = squares.cumsum(0) / squares.sum()
    return int((held < share).sum()) + 1
    ### END SOLUTION


# %%
check_needed_rank(needed_rank)

# %% [markdown]
# <details><summary>Hint 1</summary>The function <code>shares</code> of section 1 has most of it. <code>cumsum</code> adds up from the
# first.</details>
# <details><summary>Hint 2</summary>How many of the sums are still too small? One direction more is enough.</details>

# %% [markdown]
# Ask it about the adapter of rank {{8}} from above. Or write the folder of an adapter of *yours* between the quotation marks, such as the one
# that you keep in lesson 08: any LoRA adapter that PEFT has saved will do.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
my_adapter = ""  # ← a folder with adapter_model.safetensors
adapter = read_pairs(my_adapter) if my_adapter else pairs
yours = [needed_rank(A, B, 0.9) for A, B in adapter.values()]
needed = (
    [directions_for(A, B, 0.9) for A, B in adapter.values()] if None in yours else yours
)  # ours while yours is open
rank = len(next(iter(adapter.values()))[0])
print(f"90 % of the squared norm, in {len(adapter)} layers: in {min(needed)} to {max(needed)} of {rank} directions")

# %% claims
assert my_adapter or 1 <= min(needed) <= max(needed) <= 5

# %% [markdown]
# A small number says that the adapter might have managed with a lower
# rank. But by section 3 the loss does not go by norm, so only training with that rank shows it.
#
# ## 5 · Is a higher rank better?
#
# Many tutorials compare ranks at *one* learning rate, with alpha at twice the rank. Here is a small problem on which you can try them all.

# %%
problem = SmallProblem()

# %% [markdown]
# It is a layer with {{problem.base.in_features}} inputs and outputs, whose weight is wrong by a matrix of rank `4`. LoRA has {{60}} steps to
# find it.
#
# **Predict.** At one learning rate, by what factor is the final loss of rank {{64}} smaller than that of rank {{8}}? And if each rank
# may choose its *own* best learning rate: from which of the ranks `2`, `4`, `8`, `16` and `64` on is the loss within a factor of four of
# rank {{64}}'s?

# %%
prediction = {"factor": ..., "good from rank": ...}  # ← your guesses

# %% alt="Two lines: mean squared error at the last step, log scale, over the rank. With one learning rate for all, the line falls all the way, by about a hundred times from rank {{8}} to rank {{64}}. With each rank at its best of seven rates, rank {{2}} alone is bad, and the line is nearly flat from rank {{4}} on."
ranks, rates = [2, 4, 8, 16, 64], [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]
final = {r: [problem.losses(r, 2 * r, rate)[-1] for rate in rates] for r in ranks}
best = {r: min(final[r]) for r in ranks}
lines = {
    "learning rate 0.001 for all": [final[r][0] for r in ranks],
    "each rank at its best of seven": list(best.values()),
}
_ = plot_by_rank(new_axes(), ranks, lines, "mean squared error after 60 steps", prediction["good from rank"])
for r in ranks:
    print(f"rank {r:>2}: {final[r][0]:.1e} at 0.001, {best[r]:.1e} at {rates[final[r].index(best[r])]:g}")
print(told(prediction))

# %% claims
assert 90 < final[8][0] / final[64][0] < 110  # at one learning rate: about a hundred times
assert best[4] < 4 * best[64] and best[8] < 2 * best[64] and best[2] > 200 * best[4]
assert all(min(final[r]) < final[r][-1] for r in (4, 8, 16, 64))  # no best rate is the largest that was tried
first_gain = {r: first - second for r in (8, 64) for first, second in [problem.losses(r, 2 * r, 1e-3, steps=2)]}
assert 7.5 < first_gain[64] / first_gain[8] < 8.5

# %% [markdown]
# **What happened?** At one learning rate, rank {{64}} ends about {{final[8][0] / final[64][0]:.0f ±10}} times lower than rank {{8}}, and it looks
# as if the rank had done it. But it is the step. With alpha at twice the rank, the scale is the same for all ranks, and every column of B
# moves by about the learning rate in each step. A larger rank has more columns that move, all to the same end, so its update grows faster
# in a step. At {{0.001}} the others have not arrived after {{60}} steps.
#
# Give each rank its own learning rate, and rank {{4}} comes within a factor of {{best[4] / best[64]:.1f ±0.5}} of rank {{64}}, and rank {{8}} within
# {{best[8] / best[64]:.1f ±0.5}}. Only rank {{2}} fails for good, because what is missing has rank {{4}}. (The best rates hardly differ, but rank {{64}}
# already does well at far smaller ones.) So before you believe that one rank is better than
# another, tune the learning rate of both. With alpha / r kept, as in lesson 06, a rate that suited one rank is a good first guess for another, but no
# fair comparison.
#
# ## 6 · Five layers, four bugs
#
# **Exercise B.3 ●●○ (6 minutes).** Before you believe an experiment with LoRA, make sure that it *is* LoRA. Here are five layers
# around the same base, with rank `4`, alpha `32` (a large one, so that faults show), and dropout {{0.1}} on the correction's input. (Dropout sets
# a share of the numbers to zero while training, at random.) Four have a bug, and none of the bugs raises an error. `examine` prints four facts
# about a layer. The last is about merging, which adds the correction to the base's weight for good. Name what each layer has.

# %%
square = nn.Linear(576, 576, bias=False)
square.weight.data.copy_(before[QUERIES[0]])
suspects = lora_suspects(square.requires_grad_(False))
print("\n".join(f"{name!r}: {bug}" for name, bug in LORA_BUGS.items()))


# %% machinery "examine(name) looks at one of the five"
def examine(name):
    layer, x = suspects[name], torch.randn(100, 576, generator=torch.Generator().manual_seed(2))
    layer.B.data.zero_()  # as at the start
    layer.zero_grad()
    torch.manual_seed(0)
    started = layer.train()(x)
    print(f"training mode, B zero: the output differs from the base's by {(started - square(x)).norm():.1f}")
    started.square().sum().backward()
    print(f"norms of the gradients: A {layer.A.grad.norm():.2g}, B {layer.B.grad.norm():.2g}")
    layer.B.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))  # as if it had learned
    output, expected = layer.eval()(x) - square(x), x @ (layer.B @ layer.A).T * 32 / 4
    print(f"evaluation mode, B random: the correction's norm is {output.norm():.1f}, expected {expected.norm():.1f}")
    by_merging = x @ (layer.merged_weight() - square.weight).T
    print(f"added to the weight instead, it differs from that by {(by_merging - output).norm():.1f}")


# %%
examine("A")  # ← then look at B, C, D and E

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ...}  # one of the five keys above for each
diagnosis = {"A": "transposed", "B": "healthy", "C": "wet base", "D": "both zero", "E": "upside down"}
### END SOLUTION

# %%
check_lora_suspects(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>Go line by line: what should a sound layer print? The base's output at first; a gradient
# for B and none for A; the expected correction; and what is added to the weight does what the layer computes.</details>
# <details><summary>Hint 2</summary>Where two lines look odd, ask which of the bugs would do that to both.</details>

# %% [markdown]
# ## Recap
#
# - The update that full training with AdamW makes is *not* of low rank by its norm, but a few of its directions do nearly all of the
#   work for the loss.
# - There is more than one update that does the job. LoRA looks for one of low rank from the start, and finds it.
# - Compare ranks only when each has its own learning rate.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [07 · What happens when the base is 4-bit?](07_qlora_from_scratch.ipynb)
