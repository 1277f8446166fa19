# %% [markdown]
# # Dive G · More than one card
#
# LLaMA-65B in 4 bits takes {{34}} GB, and a card of {{24}} GB cannot hold that. Can several such cards train it together? This
# lesson shows three ways to spread a training over cards, what each card then holds, and what has to travel between
# them in every step. Two processes on your CPU stand in for two cards, so that you can watch. The numbers for real cards were
# measured on one, two and four H200.
#
# | you need | |
# |---|---|
# | time | 55 minutes |
# | computing | up to 3 minutes on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the record of one, two and four H200"
import json
import math
import os
import subprocess
import sys
import tempfile

import ipywidgets
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import check_cards_needed, check_tokens_to_hide, progress
from qlora_lab.classroom.lessons.dive_g.figures import plot_cards_needed, plot_plan, plot_ways
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES, estimate, traffic
from qlora_lab.places import RECORDS

GB = 1e9  # 10^9 bytes everywhere in this notebook
temporary = tempfile.TemporaryDirectory()  # the processes write into it; it is removed when the kernel ends
record = json.loads((RECORDS / "cards-nvidia-h200.json").read_text(encoding="utf-8"))
earlier, latest, four = (
    record["runs"][rows] for rows in (slice(22, 29), slice(29, 37), slice(37, None))
)  # as measured


def find(rows, way, batch_size, shape="llama-7b"):
    """The row of this way to train, with so many samples on each card."""
    return next(r for r in rows if (r["way"], r["batch_size"], r["shape"]) == (way, batch_size, shape))


print(f"recorded on {record['device']}, {record['date']}, by `{record['command']}`")

# %% [markdown]
# ## 1 · Share out the data
#
# The simplest way to use two cards is that each holds the *whole* model and takes its own samples. After the backward pass
# the cards add up their gradients, and both make the same update. This is called *data parallel* training.
#
# It changes nothing: a step with four samples needs the sum of their four gradients. Suppose that for one weight they are these:

# %%
gradients = torch.tensor([0.5, -1.0, 2.0, 0.25])  # of one weight, from four samples
first, second = gradients[:2].sum(), gradients[2:].sum()
print(f"one card: {gradients.sum():.2f}; two cards: {first:.2f} + {second:.2f} = {first + second:.2f}")

# %% [markdown]
# (A loss is a mean over tokens. Our loop divides by the tokens of the whole step, on all cards, so it is a sum as well.)
#
# The samples of all cards in a step are the *global batch*. Two cards that take {{16}} samples each make steps of {{2 * 16}}. If you
# want the same steps as before, give each card half of the samples.
#
# So the gradients must travel between the cards, and QLoRA trains only the adapters.
#
# **Predict.** Two cards train LLaMA-7B with QLoRA, rank {{64}} on all linear layers, gradients in float32. How many GB does
# each card receive in a step? (The weights in 4 bits take {{SHAPES["llama-7b"].linear_parameters() / 2 / GB:.1f}} GB.)

# %%
prediction = {"received, GB": ...}  # ← your guess

# %%
seven = SHAPES["llama-7b"]
received = traffic(seven, processes=2, sharding="data", rank=64)["gradients"]
full = 4 * seven.parameters()
print(f"each card receives {received / GB:.2f} GB; {told(prediction['received, GB'])}")
print(f"with full fine-tuning it would be {full / GB:.1f} GB")

# %% claims
from qlora_lab.memory import trainable_parameters

assert received == 4 * trainable_parameters(seven, 64, "all-linear")
parts_of_65b = estimate(SHAPES["llama-65b"], rank=16).parts
of_the_model = ("base weights", "quantization constants", "embeddings and head", "norms")
assert round(sum(parts_of_65b[name] for name in of_the_model) / GB) == 34

# %% [markdown]
# **What happened?** The adapters are {{received / 4e6:.0f}} million numbers of {{4}} bytes, which makes {{received / GB:.2f}} GB. The base is frozen, so
# it never travels. That is why a step of QLoRA moves {{full / received:.0f}} times fewer bytes than one of full fine-tuning.
#
# How do N cards add up? Cut the gradients into N parts, one for each card. First every card collects its own part from all the
# others and sums it. Then it collects the finished parts from them. Each time it receives (N − {{1}}) / N of the whole, so with two cards
# the whole once.
#
# ## 2 · Share out the model
#
# If the model does not fit one card, more cards that hold all of it do not help. So let each card keep only its *share* of every layer, and
# borrow the rest when it is needed:
#
# 1. Just before a layer computes, each card gathers the other shares of that layer. (This is an *all-gather*.)
# 2. The layer computes as always. Each card has its own samples.
# 3. The card forgets what it gathered, and goes on to the next layer.
# 4. In the backward pass it does the same again, from the last layer to the first. The gradients of the adapters are summed up,
#    and each card keeps the sums for its own share only. (This is a *reduce-scatter*.)
#
# PyTorch does this for us. It is called *fully sharded data parallel*, or FSDP, and the model is *sharded*. Here are eight
# weights on two cards:

# %%
layer = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0])
share = {"card 0": layer[:4], "card 1": layer[4:]}  # what each holds all the time
gathered = torch.cat(list(share.values()))  # what each holds while this layer computes
print(f"held {share['card 0'].numel()} of {layer.numel()}; gathered for a moment: {gathered.tolist()}")

# %% [markdown]
# Two processes on this computer now train the bundled model with QLoRA, first with the data shared out, then with the model as well.
# Each step has two samples, one for each process.
#
# **Predict.** Which losses differ visibly from those of one process: none, those of the data parallel processes, those of
# the sharded ones, or both?

# %%
vote = ...  # "none", "data", "sharded" or "both"


# %% machinery "Train three times with the command line: one process, two, and two that share the model"
def launch(processes, module, flags="", sharded=False):
    """Run a module of this course in so many processes of this computer; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    asked = {"ACCELERATE_USE_FSDP": str(sharded).lower(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command += ["-m", module, *flags.split()]
    done = subprocess.run(command, env={**os.environ, **asked}, cwd=temporary.name, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def train(processes, sharded):
    """Losses of four steps of the bundled model."""
    flags = "--steps 4 --batch-size 2 --rank 8 --eval-samples 0 --compute-dtype float32 --quiet --json"
    output = launch(processes, "qlora_lab.train_qlora", f"{flags} --output {processes}-{sharded}", sharded)
    return json.loads(output)["losses"]


# %%
losses = {"one process": train(1, False), "data": train(2, False), "sharded": train(2, True)}
for way, values in losses.items():
    print(f"{way:<12}", "  ".join(f"{loss:.4f}" for loss in values))
print(told(vote))

# %% claims
assert all(abs(a - b) < 1e-4 * a for way in losses.values() for a, b in zip(way, losses["one process"], strict=True))

# %% [markdown]
# **What happened?** None. The sum of all gradients is the same, whoever computed which part, and each weight has its usual
# value when its layer computes. Only the last digits may differ, with the order of additions.
#
# What did the two sharded processes hold meanwhile? They load the model once more and count:

# %%
held = json.loads(launch(2, "qlora_lab.classroom.lessons.dive_g.held"))
print(f"{'MB':<28}{'whole':>8}{'process 0':>12}{'process 1':>12}")
for kind, (whole, zero, one) in held.items():
    print(f"{kind:<28}{whole / 1e6:>8.2f}{zero / 1e6:>12.2f}{one / 1e6:>12.2f}")

# %% claims
assert all(2 * zero == 2 * one == whole for whole, zero, one in list(held.values())[:3])
assert all(zero == one == whole for whole, zero, one in list(held.values())[3:])

# %% [markdown]
# You have trained a model whose layers neither process held: each had half of every layer, and the whole only for a moment.
# Two kinds of tensors are not shared here: the scales of the 4-bit blocks, and this model's embeddings, because the same matrix is
# the output head and is needed at both ends. (LLaMA has two matrices there, and both are shared.)
#
# ## 3 · What each card holds
#
# Something else is not shared either: each card needs the activations of its own samples. It also needs room for two copies of
# the layer that is computing, the one that arrives and the one that is used.
#
# **Predict.** LLaMA-65B, QLoRA with rank {{16}}, one sample of {{512}} tokens on each card. What is the least number of
# cards of {{24}} GB?

# %%
cards = ...  # ← your guess

# %% machinery "Draw the memory on each card, and let it be explored"
peaks = {
    way: {
        (run["shape"], run["batch_size"], run["rank"], run["cards"]): run["peak_allocated"] / GB
        for run in record["runs"]
        if run["way"] == way and run["gradient_checkpointing"]
    }
    for way in ("sharded", "rehearsed")
}


def draw(shape, batch_size, rank, guess=None):
    knobs = {"rank": rank, "batch_size": batch_size, "optimizer": "adamw_torch", "sharding": "full"}
    predicted = {n: estimate(SHAPES[shape], processes=n, **knobs).parts for n in (1, 2, 4, 8)}
    key = (shape, batch_size, rank)
    dots = {way: {n: rows[(*key, n)] for n in predicted if (*key, n) in rows} for way, rows in peaks.items()}
    return plot_cards_needed(new_axes(height=3.4), predicted, dots, guess)


on_each = {
    n: estimate(SHAPES["llama-65b"], rank=16, optimizer="adamw_torch", processes=n, sharding="full")
    for n in (1, 2, 4, 8)
}

# %% alt="Stacked bars: GB on each card when 65B is shared by {{1}}, {{2}}, {{4}} or {{8}} cards. One card needs {{on_each[1].peak_allocated / GB:.1f}} GB, two need {{on_each[2].peak_allocated / GB:.1f}}, eight {{on_each[8].peak_allocated / GB:.1f}}. Lines mark cards of {{16}}, {{24}} and {{48}} GB; dots for one and two cards mark measurements, which lie on the bars' ends."
explore(
    lambda shape, batch_size, rank: draw(shape, batch_size, rank, cards),
    shape=ipywidgets.Dropdown(options=[name for name in SHAPES if name.startswith("llama")], value="llama-65b"),
    batch_size=ipywidgets.SelectionSlider(options=[1, 2, 4, 8, 16], value=1, description="samples a card"),
    rank=ipywidgets.SelectionSlider(options=[8, 16, 32, 64], value=16, description="rank"),
)

# %%
two = on_each[2]
real = peaks["sharded"]["llama-65b", 1, 16, 2]
print(f"65B on two cards: predicted {two.peak_allocated / GB:.1f} GB each, measured {real:.1f} GB; {told(cards)}")
print(two.table())

# %% [markdown]
# **What happened?** Two cards are enough. Half of the 4-bit weights is {{two.parts['base weights'] / GB:.0f}} GB, and everything else takes
# {{two.peak_allocated / GB - two.parts['base weights'] / GB:.1f}} GB. Most lines of the table you know from
# [lesson 02](02_memory_wall.ipynb). The others are short-lived helpers:
#
# - *gathered*: the two copies of the layer that is computing;
# - *bf16 copies*: the adapters once more, rounded to bf16 to multiply with, all of them whole until the pass is over;
# - *dequantized weight*: the one 4-bit matrix that is being multiplied, in bf16;
# - *workspace*: scratch memory of cuBLAS, NVIDIA's library of matrix products.
#
# The *quantization constants* are the scales. They and the bf16 copies do not shrink with more cards, so eight cards need far more than an
# eighth each. We did not have eight. What the hollow dots show (try rank {{64}}) was *rehearsed*: one card plays one of several, and puts
# copies of its own share where the others' would arrive. Torch's allocator was capped at {{24}} GB on the two real cards.
# The CUDA context and the buffers of the library that moves the shares lie outside of that cap: leave half a GB or more for them.
#
# **Exercise G.1 ●●○ (6 minutes).** Which cards fit *your* model? Write a function that returns the least number of cards whose
# predicted `total` stays below {{95}} % of what one card has (the rest is lost to gaps between tensors), or {{0}} if there is none.
# An adapter's A has `rank` rows, which our command shares out evenly, so only numbers that divide the rank are possible. `knobs`
# is a dict of more arguments for `estimate`, such as `{"rank": 16, "optimizer": "adamw_torch"}`. Then ask it about the cards
# that you have.


# %%
def cards_needed(shape, card_gb, knobs):
    """The least number of cards of `card_gb` GB (10^9 bytes) that train the shape together; 0: there is none."""
    ### BEGIN SOLUTION (about 6 lines)
    for processes in range(1, knobs["rank"] + 1):
        if knobs["rank"] % processes:
            continue
        predicted = estimate(shape, processes=processes, sharding="full", **knobs)
        if predicted.total < 0.95 * card_gb * GB:
            return processes
    return 0
    ### END SOLUTION


# %%
check_cards_needed(cards_needed)

# %% [markdown]
# <details><summary>Hint 1</summary>Can you work the number out, or do you have to try one after the other?</details>
# <details><summary>Hint 2</summary>The folded cell above the figure asks <code>estimate</code> about several numbers of cards.</details>

# %% [markdown]
# ## 4 · Layers one after the other
#
# There is a third way. The first half of the layers lives on one card and the second half on the other. A sample
# goes through the first card, and what comes out of it, one hidden state for each token, is handed on to the second. This is a
# *pipeline*. `device_map="auto"` in transformers makes one. It needs no launcher, since a single process drives both cards. But
# look at who works when:
#
# ```
# time     →
# card 0   forward   .......   .......   backward
# card 1   .......   forward   backward  .......
# ```
#
# While one card computes, the other waits. (Other pipelines cut the batch into pieces and so keep all cards busy.) In return, little
# has to travel:

# %%
handed_on = 2 * seven.hidden_size * 16 * 512  # bf16; 16 samples of 512 tokens
print(f"7B, 16 samples: {handed_on / GB:.2f} GB of hidden states forward, and as much of their gradients back")

# %% [markdown]
# (In the run that we measured, card {{0}} also has the output head, so all of this crosses twice.)
#
# ## 5 · Side by side
#
# Two H200 trained 7B in all three ways, with rank {{64}}, checkpointing, and {{16}} samples of {{512}} tokens on each card. (The
# pipeline is one process, so it has {{16}} samples in all.) *NVLink* connected them, NVIDIA's direct wires between the
# cards of one computer. Today's consumer cards talk over PCIe, the computer's ordinary slots.
#
# **Predict.** One card alone does {{find(latest, "one", 16)["tokens_per_second"]:,.0f}} tokens a second. How many do two cards manage together?

# %%
tokens = {"data parallel": ..., "sharded": ..., "pipelined": ...}  # ← your guesses

# %% machinery "Speed and memory of the three ways"
names = {"one card": "one", "data parallel": "data", "sharded": "sharded", "pipelined": "pipelined"}
rows = {name: find(latest, way, 16) for name, way in names.items()}
moves = {name: sum(traffic(seven, processes=2, sharding=way, rank=64).values()) / GB
         for name, way in {"data parallel": "data", "sharded": "full"}.items()}  # fmt: skip
moves |= {"one card": 0.0, "pipelined": 2 * handed_on / GB}
speed = {name: row["tokens_per_second"] for name, row in rows.items()}
memory = {name: row["peak_allocated"] / GB for name, row in rows.items()}

# %% alt="Two panels of horizontal bars, LLaMA-7B on two H200 with {{16}} samples a card. Tokens a second: one card {{speed['one card']:,.0f}}, data parallel {{speed['data parallel']:,.0f}}, sharded {{speed['sharded']:,.0f}}, pipelined {{speed['pipelined']:,.0f}}; a dashed line marks twice one card. Peak GB on the fuller card: one card {{memory['one card']:.1f}}, data parallel {{memory['data parallel']:.1f}}, sharded {{memory['sharded']:.1f}}, pipelined {{memory['pipelined']:.1f}}."
fig, axes = plt.subplots(1, 2, figsize=(8, 2.4), layout="constrained", sharey=True)
_ = plot_ways(axes, speed, memory, tokens)

# %%
print(f"{'':<15}{'tokens/s':>10}{'of one':>8}{'GB a card':>11}{'GB moved a step':>17}")
for name in names:
    print(f"{name:<15}{speed[name]:>10,.0f}{speed[name] / speed['one card']:>8.2f}", end="")
    print(f"{memory[name]:>11.1f}{moves[name]:>17.2f}   {told(tokens[name]) if name in tokens else ''}")

# %% machinery "Four cards, and two cards with 4 samples each, twice"
for way in ("data", "sharded"):
    row = find(four, way, 16)
    of_four = f"{row['tokens_per_second'] / speed['one card'] / 4:.0%} of four times one card"
    print(f"four cards, {way}: {of_four}, {row['peak_allocated'] / GB:.1f} GB a card")
again = {}
for name, of_run in {"the run above": latest, "an earlier run": earlier}.items():
    fast = {way: find(of_run, way, 4)["tokens_per_second"] for way in ("one", "data", "sharded")}
    again[name] = {way: f"{fast[way] / fast['one'] / 2:.0%}" for way in ("data", "sharded")}
    print(
        f"two cards, 4 samples each, {name}: data {again[name]['data']}, sharded {again[name]['sharded']} of twice one"
    )

# %% claims
assert moves["sharded"] / 450 * 1000 < 10
assert memory["pipelined"] < memory["sharded"] < memory["data parallel"]
ordinary = [r["milliseconds"] for r in record["runs"] if (r["way"], r["batch_size"]) == ("one", 16)]
assert max(ordinary) < 1.01 * min(ordinary)
alone, played, whole = (find(record["runs"], way, 16) for way in ("sharded", "rehearsed", "one"))
assert (alone["cards"], played["cards"]) == (1, 2)
assert [f"{row['milliseconds'] / whole['milliseconds']:.2f}" for row in (alone, played)] == ["1.02", "1.03"]
assert f"{rows['sharded']['milliseconds'] / rows['one card']['milliseconds']:.2f}" == "1.09"

# %% [markdown]
# **What happened?** Each way pays for something else. (*GB moved* is what arithmetic says that a card receives.)
#
# - **Data parallel** reaches {{speed['data parallel'] / speed['one card'] / 2:.0%}} of twice one card. It saves no memory.
# - **Sharded** reaches {{speed['sharded'] / speed['one card'] / 2:.0%}} of it, with a quarter less memory for the same samples. Thin wires are not
#   what it loses time to: NVLink moves {{450}} GB/s in each direction, so {{moves['sharded']:.1f}} GB take {{moves['sharded'] / 450 * 1000:.0f}} milliseconds of a step of a
#   second. Starting and copying in every layer costs {{2}} to {{3}} %. The rest comes only with a real second card, and we did not take it apart.
# - **Pipelined** takes the least memory here, because a card keeps only its own half of everything and gathers nothing. (It also has
#   {{16}} samples in flight where the sharded cards have {{2 * 16}}.) It is as fast as one card: a way to *try* a model that is too large, not
#   to train it fast.
#
# Four cards do nearly four times as much. With {{4}} samples a card there is less to compute, so the cards wait longer for
# Python, which starts everything in every layer. The same program on the same kind of machine then gives {{again['the run above']['data']}} or
# {{again['an earlier run']['data']}} data parallel, and {{again['the run above']['sharded']}} or {{again['an earlier run']['sharded']}} sharded. So do not
# choose by such numbers: fill the cards with samples first, and then measure on your own machine.
#
# ## 6 · How thin may the wire be?
#
# Slower wires than NVLink decide. For 65B, this is what a step moves, and how long it takes:

# %%
big = SHAPES["llama-65b"]
data, sharded = (sum(traffic(big, processes=2, sharding=way, rank=16).values()) / GB for way in ("data", "full"))
print(f"65B, two cards, GB a step: {data:.1f} data parallel, {sharded:.1f} sharded")
wires = {"NVLink 4": 450, "PCIe 4.0 x16": 25, "Ethernet, 100 Gbit/s": 12.5, "Ethernet, 10 Gbit/s": 1.25}
for wire, gb in wires.items():
    print(f"{wire:<22}{gb:>7} GB/s: {data / gb:8.3f} s data parallel, {sharded / gb:7.2f} s sharded")

# %% [markdown]
# (The H200 uses NVLink {{4}}. Speeds are nominal and those of one direction; of PCIe's {{32}} GB/s we count {{25}}.)
#
# Sharded, the weights are gathered twice, for the forward and for the backward pass. If a step has several *micro-batches*, whose
# gradients are added up before one update, the weights are gathered twice for each. Data parallel gradients travel once a step,
# however many micro-batches it has.
#
# Our data parallel step exchanges its gradients after the backward pass, so their time always adds. Sharded, the next layer can
# arrive while this one computes, and the wires cost only what they take longer.
#
# How long does a step compute? For each token, each weight is multiplied with a number, and the product is added to a sum. That is
# {{2}} operations. With checkpointing this happens three times: in the forward pass, once more when the backward pass computes the layer
# again, and for the gradient of the layer's input. (Frozen weights need no gradient of their own.) So a step takes {{2}} × {{3}} = {{2 * 3}}
# operations for each weight and token, {{2}} in the forward and {{4}} in the backward pass. What a card gets done in a second, counted like
# this, is its *pace*:

# %%
run = rows["one card"]
pace = 6 * seven.linear_parameters() * run["batch_size"] * run["length"] / (run["milliseconds"] / 1e3)
print(f"7B, 16 samples, one H200: {pace / 1e12:.0f} TFLOP/s (10^12 operations a second)")

# %% [markdown]
# **Exercise G.2 ●●● (12 minutes).** How many tokens must a card have in a micro-batch, so that the wires do not hold it up? The model
# `shape` is trained with rank {{16}}, sharded by so many cards. A pass can hide only its own traffic, because its layers
# cannot wait for what arrives in the other pass. The forward pass hides half of the gathered weights, the backward pass the other half and
# the gradients (`traffic` gives `weights` and `gradients`, in bytes). Return the least number of tokens for which both passes compute as
# long as they receive. (In practice Python may hold a card up long before.)


# %%
def tokens_to_hide(pace, shape, processes, bytes_per_second):
    """Least number of tokens a card for which each pass of a sharded step computes as long as it receives.

    pace: operations a second that a card gets done.
    """
    ### BEGIN SOLUTION (about 5 lines)
    moved, weights = traffic(shape, processes=processes, sharding="full", rank=16), shape.linear_parameters()
    forward = moved["weights"] / 2 / bytes_per_second / (2 * weights / pace)
    received = moved["weights"] / 2 + moved["gradients"]
    backward = received / bytes_per_second / (4 * weights / pace)
    return math.ceil(max(forward, backward))
    ### END SOLUTION


# %%
check_tokens_to_hide(tokens_to_hide)

# %% [markdown]
# <details><summary>Hint 1</summary>For each pass you need two times: how long its bytes take, and how long one token computes.</details>
# <details><summary>Hint 2</summary>In the forward pass a token takes <code>2 * shape.linear_parameters() / pace</code> seconds.</details>

# %% [markdown]
# Apply it: what do `pace`, `big`, two cards and each of the four wires give? With one sample of {{512}} tokens, which wires are
# fast enough?

# %% machinery "What you should find"
gathered = traffic(big, processes=2, sharding="full", rank=16)["weights"] / 2
found = {wire: math.ceil(gathered / (gb * GB) * pace / (2 * big.linear_parameters())) for wire, gb in wires.items()}

# %% claims
assert list(found.values()) == [101, 1812, 3623, 36224] and 1812 // 4 == 453 < 512

# %% [markdown]
# <details><summary>What you should have found</summary>{{found["NVLink 4"]:,}}, {{found["PCIe 4.0 x16"]:,}},
# {{found["Ethernet, 100 Gbit/s"]:,}} and {{found["Ethernet, 10 Gbit/s"]:,}} tokens: of these wires, only NVLink is fast enough for a card at the pace of an H200. A card of a quarter of
# its pace takes four times as long to compute, and needs a quarter of the tokens: with PCIe {{found["PCIe 4.0 x16"] // 4}}, less than one sample. The
# forward pass decides, since it has half of the weights to wait for and a third of the computing.</details>

# %% [markdown]
# ## 7 · A plan on paper: from one card to many hosts
#
# A *host* is a computer with several cards in it. The wires inside of it are fast. Those between hosts are slow, and all cards
# of a host share them. For many hosts there is a fourth way, *hybrid sharding*: shard *inside* each host, and let the hosts be data
# parallel. Then only the adapters' gradients travel between hosts.
#
# Here is the arithmetic. The cards form a ring: each passes what it has received on to the next, until all have everything. Only
# one card of a host has its neighbour in another host, so what comes over the host's wire is what one card receives:


# %%
def wire_seconds(shape, hosts, micro_batches, between, inside=450e9):
    """Seconds that a step's bytes take, for 8 cards a host; bytes a second between and inside the hosts."""

    def moved(processes, way):
        parts = traffic(shape, processes=processes, sharding=way, rank=64, accumulation=micro_batches)
        return sum(parts.values())

    slowest = between if hosts > 1 else inside
    return {
        "data parallel": moved(8 * hosts, "data") / slowest,
        "sharded": moved(8 * hosts, "full") / slowest,
        "hybrid": moved(8, "full") / inside + moved(hosts, "data") / between,
    }


# %% [markdown]
# **Predict.** 65B with rank {{64}} on two hosts of eight H200 each, one sample of {{512}} tokens on each card, {{100}} Gbit/s between the
# hosts. The computing takes {{6 * big.linear_parameters() * 512 / pace:.1f}} s at the pace above. How long do the wires take, sharded among all
# {{2 * 8}} cards, and hybrid?

# %%
seconds = {"sharded": ..., "hybrid": ...}  # ← your guesses


# %% machinery "Draw a plan, and let it be explored"
def draw_plan(shape, hosts, samples, micro_batches, between):
    computing = 6 * SHAPES[shape].linear_parameters() * samples * 512 * micro_batches / pace
    wired = wire_seconds(SHAPES[shape], hosts, micro_batches, between / 8 * 1e9)
    return plot_plan(new_axes(height=2.6), computing, wired, seconds)


wired = wire_seconds(big, 2, 1, 12.5e9)
computing = 6 * big.linear_parameters() * 512 / pace

# %% alt="Horizontal bars on a logarithmic axis, seconds a step of 65B on two hosts: computing {{computing:.2f}}; the wires take {{wired['data parallel']:.2f}} when data parallel, {{wired['sharded']:.1f}} when sharded among all cards, {{wired['hybrid']:.2f}} when hybrid."
explore(
    draw_plan,
    shape=ipywidgets.Dropdown(options=[name for name in SHAPES if name.startswith("llama")], value="llama-65b"),
    hosts=ipywidgets.SelectionSlider(options=[1, 2, 4, 8], value=2, description="hosts of 8 cards"),
    samples=ipywidgets.SelectionSlider(options=[1, 2, 4, 8, 16], value=1, description="samples a card"),
    micro_batches=ipywidgets.SelectionSlider(options=[1, 2, 4, 8], value=1, description="micro-batches"),
    between=ipywidgets.SelectionSlider(options=[10, 25, 100, 400, 3200], value=100, description="Gbit/s between hosts"),
)

# %% machinery "The plan in numbers, beside real steps of 65B"
print(f"computing {computing:.2f} s; wires:", ", ".join(f"{way} {value:.2f} s" for way, value in wired.items()))
print("; ".join(f"{way}: {told(guess)}" for way, guess in seconds.items()))
measured = find(earlier, "sharded", 1, "llama-65b")["milliseconds"] / 1e3
without = find(record["runs"], "sharded", 1, "llama-65b")["milliseconds"] / 1e3  # the first: on one card
filled, on_paper = find(four, "sharded", 4, "llama-65b")["milliseconds"] / 1e3, 4 * computing
print(f"measured, one sample a card: two cards {measured:.1f} s a step, one card without wires {without:.1f} s")
print(f"measured, four cards, four samples each: {filled:.1f} s, and on paper {on_paper:.1f} s")

# %% claims
assert f"{computing:.1f}" == "0.6"
assert {row["cards"] for row in four} == {4}
assert find(record["runs"], "sharded", 1, "llama-65b")["cards"] == 1

# %% [markdown]
# **What happened?** Sharded among all cards, {{wired['sharded']:.1f}} s of weights and gradients go over the slow wire for {{computing:.1f}} s of computing. Hybrid sharding
# keeps them inside the hosts, and its wires take {{wired['hybrid']:.1f}} s. Now move the sliders: with {{16}} samples a card even {{100}} Gbit/s
# hide behind the computing. (A bar marked *longer* takes longer than that.) Hosts that are built for this have a wire of {{400}} Gbit/s for
# each card. Choose {{8 * 400}}: then sharding among all cards is fast enough, too.
#
# With few tokens, times on paper are too short. With one sample, a real step of 65B on two H200 took {{measured:.1f}} s, although its wires
# need only {{sharded / 450:.2f}} s, because one sample is too little to keep a card at the pace of sixteen. (On one H200, without wires, it took
# {{without:.1f}} s.) With four samples on four H200 it was {{filled:.1f}} s, close to the {{on_paper:.1f}} s on paper. So this is the plan:
#
# 1. **The model fits one card, and one card is fast enough:** use one card.
# 2. **It fits, and you want it faster:** data parallel. Only adapters travel, so hosts may be connected by {{10}} Gbit/s if a step
#    has enough samples or micro-batches.
# 3. **It does not fit:** shard it among cards of one host, with room for as many samples as hide the wires.
# 4. **You want that on many hosts:** hybrid sharding. (PyTorch has it. Our command line shards among all cards of a run.)
# 5. **You only want to look at it:** `device_map="auto"`.
#
# | | each card holds | each card receives in a step | with N cards |
# |---|---|---|---|
# | data parallel | the whole model | the adapters' gradients | nearly N times as fast, with enough samples |
# | sharded | an Nth of it, two whole layers, all scales, bf16 copies of all adapters | in each micro-batch the others' shares, twice | a little less, with enough samples |
# | pipelined (`device_map`) | an Nth of the layers | a hidden state for each token, and its gradient | as fast as one |
#
# ## 8 · Your turn
#
# The first command is for a model that fits one card, the second for one that does not. `--batch-size` counts the samples of all cards:
#
# ```
# accelerate launch --num_processes 2 -m qlora_lab.train_qlora --model owner/name --data my.jsonl
# accelerate launch --config_file data/accelerate/fsdp.yaml --num_processes 2 -m qlora_lab.train_qlora --model owner/name --data my.jsonl
# ```
#
# ## Recap
#
# - Data parallel QLoRA sends only the adapters' gradients, once a step.
# - Sharding lets cards train together what none of them can hold. In every micro-batch each card then receives the others' shares twice.
# - Neither changes the losses beyond rounding, because a sum stays the same whoever computes its parts. A pipeline saves memory
#   and no time.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
