# %% [markdown]
# # 14 · More than one card
#
# LLaMA-65B in 4 bits takes 35 GB, more than a card of 24 GB can hold. Can several such cards train it together? This lesson
# shows how, what each card then holds, and what has to travel between the cards in every step. Two processes on your CPU stand
# in for two cards, so that you can watch; the numbers for real cards are from two H200.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 2 GB |
# | GPU | not needed |

# %% machinery "Imports, and the record of two H200"
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ipywidgets
import torch

import qlora_lab
from qlora_lab.classroom.checks import check_cards_needed, check_tokens_to_hide, progress
from qlora_lab.classroom.lessons.n14.figures import plot_cards_needed, plot_step_times, told
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES, estimate, traffic

GB = 1e9  # 10^9 bytes everywhere in this notebook
scratch = Path(tempfile.mkdtemp())
folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record = json.loads((folder / "cards-nvidia-h200.json").read_text(encoding="utf-8"))
print(f"recorded on {record['device']}, {record['date']}, by `{record['command']}`")

# %% [markdown]
# ## 1 · Share out the data
#
# The simplest way to use two cards: each holds the *whole* model and takes its own samples. After the backward pass
# the cards add up their gradients, and both make the same update. This is called *data parallel* training.
#
# Four numbers show that nothing changes. A step with four samples needs the sum of their four gradients. Let one weight
# have these:

# %%
gradients = torch.tensor([0.5, -1.0, 2.0, 0.25])  # of one weight, from four samples
first_card, second_card = gradients[:2].sum(), gradients[2:].sum()
print(
    f"one card: {gradients.sum():.2f}; two cards: {first_card:.2f} + {second_card:.2f} = {first_card + second_card:.2f}"
)

# %% [markdown]
# What must travel is the gradients, and QLoRA trains only the adapters.
#
# **Predict.** Two cards train LLaMA-7B with QLoRA, rank 64 on all linear layers, gradients in float32. How many GB does
# each card receive in a step? (The weights in 4 bits are 3.5 GB.)

# %%
prediction = {"received, GB": ...}  # ← your guess

# %%
seven = SHAPES["llama-7b"]
received = traffic(seven, processes=2, sharding="data", rank=64)
full = 4 * seven.parameters()
print(f"each card receives {received['gradients'] / GB:.2f} GB; {told(prediction['received, GB'])}")
print(f"with full fine-tuning it would be {full / GB:.1f} GB")

# %% [markdown]
# **What happened?** The adapters are 160 million numbers of 4 bytes, {{received['gradients'] / GB:.2f}} GB. Think of them as N
# parts, one for each of N cards. First every card collects its own part from the others and adds it up, which brings it
# (N − 1) / N of the whole; then it collects the finished parts of the others, (N − 1) / N again. With two cards that is once
# the whole. The base is frozen, so it never travels. That makes QLoRA easier to spread than full fine-tuning, by
# a factor of {{full / received['gradients']:.0f}}.
#
# ## 2 · Share out the model
#
# Data parallel cards all hold the whole model. If it does not fit one card, more cards do not help. So let each card keep
# only its *share* of every layer, and borrow the rest when it is needed:
#
# 1. Just before a layer computes, each card gathers the other shares of that layer. (*All-gather.*)
# 2. The layer computes, as always. Each card has its own samples.
# 3. The card forgets what it gathered, and goes on to the next layer.
# 4. In the backward pass, the same again, from the last layer to the first. The gradients of the adapters are summed up, and
#    each card keeps the sums for its share only. (*Reduce-scatter.*)
#
# PyTorch does this; it is called *fully sharded data parallel*, FSDP. Here are eight weights on two cards:

# %%
layer = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0])
share = {"card 0": layer[:4], "card 1": layer[4:]}  # what each holds all the time
gathered = torch.cat(list(share.values()))  # what each holds while this layer computes
print(f"held {share['card 0'].numel()} of {layer.numel()}; gathered for a moment: {gathered.tolist()}")

# %% [markdown]
# **Predict.** Two processes on this computer now train the bundled model with QLoRA, first with the data shared out, then
# with the model shared out as well. Against one process, which losses change visibly: none, those of the data parallel
# processes, those of the sharded ones, or both?

# %%
vote = ...  # "none", "data", "sharded" or "both"


# %% machinery "Train three times with the command line: one process, two, and two that share the model"
def train(processes, sharded):
    """Four steps of the bundled model in so many processes of this computer; their losses."""
    output = scratch / f"{processes}-{sharded}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [
        "-m",
        "qlora_lab.train_qlora",
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--rank",
        "8",
        "--eval-samples",
        "0",
    ]
    command += ["--compute-dtype", "float32", "--quiet", "--output", str(output)]
    asked = {"ACCELERATE_USE_FSDP": str(sharded).lower(), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads((output / "report.json").read_text())["losses"]


# %%
losses = {"one process": train(1, False), "data": train(2, False), "sharded": train(2, True)}
for way, values in losses.items():
    print(f"{way:<12}", "  ".join(f"{loss:.4f}" for loss in values))
print(told(vote))

# %% claims
assert all(abs(a - b) < 1e-4 * a for way in losses.values() for a, b in zip(way, losses["one process"], strict=True))

# %% [markdown]
# **What happened?** None. The sum of all gradients is the same, whoever computed which part of it, and each weight is what it
# was when its layer computes. Only the order of additions differs, and with it the last digits. You have just trained a model
# that neither process held.
#
# ## 3 · What each card holds
#
# Not everything is shared out. Each card also needs the activations of its own samples, two copies of the layer that is
# computing (the one that arrives, and the one that is used), and, in our implementation, the scales of all 4-bit blocks.
#
# **Predict.** LLaMA-65B, QLoRA with rank 16, one sample of 512 tokens on each card. What is the least number of 24 GB cards?

# %%
cards = ...  # ← your guess

# %% machinery "Draw the memory on each card, and let it be explored"
measured = {
    (run["shape"], run["cards"], run["batch_size"], run["rank"]): run["peak_allocated"] / GB
    for run in record["runs"]
    if run["way"] in ("sharded", "rehearsed") and run["gradient_checkpointing"]
}


def draw(shape, batch_size, rank, guess=None):
    knobs = {"rank": rank, "batch_size": batch_size, "optimizer": "adamw_torch", "sharding": "full"}
    predicted = {n: estimate(SHAPES[shape], processes=n, **knobs).parts for n in (1, 2, 3, 4, 6, 8)}
    points = {n: measured[shape, n, batch_size, rank] for n in predicted if (shape, n, batch_size, rank) in measured}
    return plot_cards_needed(new_axes(height=3.4), predicted, points, guess)


# %% alt="Stacked bars: GB on each card when 65B is shared by 1, 2, 3, 4, 6 or 8 cards. One card needs 38.9 GB, two need 21.4, eight 7.9. Lines mark cards of 16, 24 and 48 GB; dots mark measurements, which lie on the bars."
explore(
    lambda shape, batch_size, rank: draw(shape, batch_size, rank, cards),
    shape=ipywidgets.Dropdown(options=[name for name in SHAPES if name.startswith("llama")], value="llama-65b"),
    batch_size=ipywidgets.SelectionSlider(options=[1, 2, 4, 8, 16], value=1, description="samples a card"),
    rank=ipywidgets.SelectionSlider(options=[8, 16, 32, 64], value=16, description="rank"),
)

# %%
two = estimate(SHAPES["llama-65b"], rank=16, optimizer="adamw_torch", processes=2, sharding="full")
real = measured["llama-65b", 2, 1, 16]
print(
    f"65B on two cards: predicted {two.peak_allocated / GB:.1f} GB each, measured {real:.1f} GB; {told(cards)}"
)
print(two.table())

# %% [markdown]
# **What happened?** Two cards are enough. Half of the 4-bit weights is 16 GB, and everything else takes
# {{two.peak_allocated / GB - two.parts['base weights'] / GB:.1f}} GB. It was measured on two H200 whose memory was capped at
# 24 GB each. With more cards the shares shrink and the rest does not: eight cards need more than an eighth each.
#
# **Exercise 14.1 ●●○ (6 minutes).** Which cards fit *your* model? Write a function that returns the least number of cards, up
# to 64, whose predicted `total` stays below 95 % of what one card has (the rest is lost to gaps), or 0 if there is none.
# `knobs` is a dict of more arguments for `estimate`: `{"rank": 16, "optimizer": "adamw_torch"}`, say.


# %%
def cards_needed(shape, card_gb, knobs):
    """The least number of cards of `card_gb` GB (10^9 bytes) that train the shape together; 0: more than 64."""
    ### BEGIN SOLUTION (about 4 lines)
    for processes in range(1, 65):
        predicted = estimate(shape, processes=processes, sharding="full", **knobs)
        if predicted.total < 0.95 * card_gb * GB:
            return processes
    return 0
    ### END SOLUTION


# %%
check_cards_needed(cards_needed)

# %% [markdown]
# <details><summary>Hint 1</summary>A loop over 1, 2, 3 …; <code>estimate(shape, processes=n, sharding="full", **knobs)</code>
# predicts for one card.</details>
# <details><summary>Hint 2</summary>Compare <code>.total</code>, in bytes, with 0.95 × card_gb × 10⁹, and return at the first
# that is smaller.</details>
#
# ## 4 · What it costs
#
# Every layer is gathered twice in a step, for the forward and for the backward pass. The weights travel in 4 bits, but they
# are many.

# %%
big = SHAPES["llama-65b"]
data, sharded = (traffic(big, processes=2, sharding=way, rank=16) for way in ("data", "full"))
step_seconds = [run for run in record["runs"] if run["shape"] == "llama-65b" and run["way"] == "sharded"][-1][
    "milliseconds"
] / 1e3
print(
    f"65B, two cards, a step: data parallel {sum(data.values()) / GB:.1f} GB, sharded {sum(sharded.values()) / GB:.1f} GB"
)
for wire, speed in {
    "NVLink 4 (H100, H200)": 450,
    "PCIe 4.0 x16": 25,
    "Ethernet, 100 Gbit/s": 12.5,
    "10 Gbit/s": 1.25,
}.items():
    print(f"{wire:<24}{speed:>7} GB/s: {sum(sharded.values()) / GB / speed:8.2f} s for the sharded step")

# %% [markdown]
# A step of 65B with one sample took {{step_seconds:.1f}} s on two H200. Against that NVLink is no problem, PCIe would add more
# than half again if nothing overlapped, and over 10 Gbit/s you would do nothing but wait. (Speeds are nominal ones of one
# direction; 25 GB/s is what PCIe 4.0 really gives.) The wires can work while the card computes, but not faster than they are.
#
# **Predict.** Two H200 train 7B with 16 samples each. One card alone does 8,930 tokens a second. How many do two do, data parallel
# and sharded?

# %%
tokens = {"data": ..., "sharded": ...}  # ← your guesses


# %% machinery "Find the runs of the record"
def run_of(way, shape, cards, batch_size):
    return [
        run for run in record["runs"]
        if (run["way"], run["shape"], run["cards"], run["batch_size"]) == (way, shape, cards, batch_size)
    ][-1]  # fmt: skip


# %% alt="Horizontal bars: tokens a second of LLaMA-7B, 16 samples on each card. One card 8,930; two with the data shared out 17,793, two with the model shared out 16,389. A dashed line marks twice the speed of one card."
speed = {
    "one card": run_of("one", "llama-7b", 1, 16)["tokens_per_second"],
    "two, data": run_of("data", "llama-7b", 2, 16)["tokens_per_second"],
    "two, sharded": run_of("sharded", "llama-7b", 2, 16)["tokens_per_second"],
}
few = {way: run_of(way, "llama-7b", cards, 4)["tokens_per_second"] for way, cards in (("one", 1), ("sharded", 2))}
_ = plot_step_times(new_axes(height=2.4), speed, tokens)
for way, value in speed.items():
    print(f"{way:<14}{value:>8,.0f} tokens/s, {value / speed['one card']:.2f} times one card")

# %% [markdown]
# **What happened?** Sharing the data costs next to nothing: {{speed['two, data'] / speed['one card'] / 2:.1%}} of the ideal. Sharing
# the model costs {{1 - speed['two, sharded'] / speed['one card'] / 2:.0%}}. It is not the wires: 4.5 GB take NVLink 10
# milliseconds of a step of a second. It is what has to be *started* in every layer: gathering, copying, giving up, by Python,
# while the card waits. With 4 samples a card there is less to compute meanwhile, and sharding reaches
# {{few['sharded'] / few['one'] / 2:.0%}} only.
#
# **Exercise 14.2 ●●● (12 minutes).** How many tokens must a card have in a step, so that the wires do not hold it up? A card
# that computes `flops` operations a second needs 6 of them for each weight and token with checkpointing (forward, again forward,
# and the gradient of the input). Return the least number of tokens for which the computing takes at least as long as the wires.
# (The least in theory: Python may hold a card up long before the wires do.)


# %%
def tokens_to_hide(shape, processes, bytes_per_second, flops):
    """Least number of tokens a card for which a sharded step computes as long as it receives."""
    ### BEGIN SOLUTION (about 4 lines)
    moved = sum(traffic(shape, processes=processes, sharding="full", rank=16).values())
    operations = 6 * shape.linear_parameters()
    return math.ceil(moved / bytes_per_second * flops / operations)
    ### END SOLUTION


# %%
check_tokens_to_hide(tokens_to_hide)

# %% [markdown]
# <details><summary>Hint 1</summary>Seconds of the wires: <code>sum(traffic(shape, processes=processes, sharding="full",
# rank=16).values()) / bytes_per_second</code>.</details>
# <details><summary>Hint 2</summary>Seconds of a token: 6 × <code>shape.linear_parameters()</code> / flops.</details>
#
# ## 5 · Layers one after the other
#
# There is a third way. `device_map="auto"` in transformers puts the first half of the layers on one card and the second half on
# the other. It needs no launcher: one process drives both. But a sample goes through the layers one after the other, so while one
# card computes, the other waits. N cards are as fast as one. It is the way to *try* a model that is too large for a card, not to
# train it fast. (Pipelines that keep all cards busy cut the batch into pieces; that is another lesson.)
#
# | | each card holds | each card receives in a step | with N cards |
# |---|---|---|---|
# | data parallel | the whole model | the adapters' gradients | nearly N times as fast, with enough samples |
# | sharded | 1/N of it, two whole layers, all scales | the others' shares, twice, in 4 bits | less: more travels, and has to be started |
# | layers (`device_map`) | 1/N of the layers | a hidden state a token, and its gradient | as fast as one |
#
# ## 6 · Your turn
#
# Two commands, the same for 2 cards or 8. The first if the model fits one card, the second if it does not:
#
# ```
# accelerate launch --num_processes 2 -m qlora_lab.train_qlora --model owner/name --data my.jsonl
# accelerate launch --config_file data/accelerate/fsdp.yaml --num_processes 2 -m qlora_lab.train_qlora --model owner/name --data my.jsonl
# ```
#
# ## Recap
#
# - Data parallel QLoRA sends the adapters' gradients only, once a step, however many micro-batches it has.
# - Sharding lets cards train together what none of them can hold: 65B on two cards of 24 GB. The price: in every micro-batch
#   each card receives the others' shares twice.
# - Neither changes the losses: a sum is a sum.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()
