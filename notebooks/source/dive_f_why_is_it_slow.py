# %% [markdown]
# # Dive F · Why is QLoRA slow, and what makes it fast?
#
# A GPU that computes 691 million million operations a second trains a 7B model at 791 tokens a second. The arithmetic
# would allow seventeen thousand. Where do the other sixteen thousand go? Here you look into a single training step, kernel
# by kernel, find who is waiting for whom, and close the gaps one by one. At the end you write a GPU kernel, and it runs
# on your CPU.
#
# | you need | |
# |---|---|
# | time | 50 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional: with one, the last section times your own |

# %% machinery "Imports, with Triton interpreted where there is no GPU"
import json
import os
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; to be said before anything imports Triton
try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Windows, macOS, or Linux without `pip install -e '.[triton]'`: exercise F.4 says so
    triton, tl, jit = None, SimpleNamespace(constexpr=int), lambda function: function

# %% machinery "Imports of the course"
import qlora_lab
from qlora_lab.classroom.checks import (
    check_dequantize_kernel,
    check_floor,
    check_idle_share,
    check_norm_bytes,
    progress,
)
from qlora_lab.classroom.lessons.dive_f.figures import (
    plot_arriving,
    plot_bounds,
    plot_kinds,
    plot_ladder,
    plot_losses,
    plot_timeline,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.memory import SHAPES

# %%
folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record = json.loads((folder / "step-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
print(f"recorded on one {record['device']}, {record['date']}, by `{record['command']}`")
print(", ".join(f"{package} {version}" for package, version in record["versions"].items()))

# %% [markdown]
# ## 1 · A working day of a GPU
#
# The setting of [notebook 10](10_memory_comparison.ipynb): LLaMA-7B in NF4, random weights, rank 64 on all linears, 512
# tokens a sample, checkpointing. *Standard* is what everybody runs: transformers, PEFT, bitsandbytes, bf16 autocast.
#
# A step is thousands of *kernels*: small programs, one for a matrix product, one for an addition, each launched by Python
# when it gets there. The GPU does one after the other (on one stream), and between two of them it does nothing.
# *Python* here means all of the CPU's part: Python, PyTorch, the driver.
#
# **Predict.** One sample a step. In which share of the step does the GPU compute at all?

# %%
prediction = {"computes": 90}  # ← your guess, in %


# %%
def find(rows, who, batch, checkpointing=True):
    """The recorded run or profile of this way to train, with so many samples a step."""
    wanted = {"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def step_of(who, batch, checkpointing=True):
    """Milliseconds a step, without the profiler."""
    return find(record["runs"], who, batch, checkpointing)["milliseconds"]


profile = find(record["profiles"], "standard", 1)
step, busy = step_of("standard", 1), profile["busy_milliseconds"]
print(f"{profile['kernels']:,} kernels compute for {busy:.0f} ms of {step:.0f}: {busy / step:.0%};", end=" ")
print(f"your guess: {prediction['computes']} %")
print(f"(while it was being profiled, the step lasted {profile['span_milliseconds']:.0f} ms)")

# %% claims
assert (profile["kernels"], f"{busy:.0f} {step:.0f} {busy / step:.0%}") == (12_717, "104 647 16%")
assert f"{profile['span_milliseconds']:.0f}" == "834"

# %% [markdown]
# Two honest words about these numbers. The {{busy:.0f}} ms come from a profiler, and the profiler itself slows Python down: with it
# the step lasted {{profile['span_milliseconds']:.0f}} ms, without it {{step:.0f}}. Kernels do not run longer for being watched, gaps do. So compare the *busy* time
# with the step that nobody watched.
#
# Here are 2.5 ms out of each profile, on the same scale. Below is the step that this notebook leads to: the same model,
# adapters and samples.

# %% alt="Two timelines of 2,500 microseconds in four lanes: matrix products, dequantize, attention, everything else. Standard: 43 thin strokes far apart, nearly all of it is empty. Fast: blocks one right behind the other, most of them matrix products and dequantize, without gaps."
LANES = {"matrix product": "matrix products", "dequantize": "dequantize", "attention": "attention"}


def lanes(who):
    timeline = find(record["profiles"], who, 1)["timeline_microseconds"]
    return [(start, end, LANES.get(kind, "everything else")) for start, end, kind in timeline]


titles = {"standard (the profiler widens its gaps)": lanes("standard"), "fast": lanes("fast")}
fig, axes = plt.subplots(2, 1, figsize=(8, 3.8), layout="constrained", sharex=True)
_ = plot_timeline(axes, titles, 2500)

# %%
shown = {title.split()[0]: sum(start < 2500 for start, _, _ in kernels) for title, kernels in titles.items()}
print(f"kernels that begin in these 2.5 ms: {shown}")

# %% claims
assert shown["fast"] > 2.5 * shown["standard"]

# %% [markdown]
# **Exercise F.1 ●●○ (6 minutes).** Put a number on the white. `spans` are pairs of start and end, in the order of their
# starts. Of the time from the first start to the last end, in which share does *no* kernel run? (On several
# streams, kernels may overlap.)


# %%
def idle_share(spans):
    """[(start, end), ...] -> share between 0 and 1."""
    ### BEGIN SOLUTION (about 5 lines)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - spans[0][0])
    ### END SOLUTION


# %%
check_idle_share(idle_share)

# %% [markdown]
# <details><summary>Hint 1</summary>Go through the kernels and remember the latest end so far: what comes before it has been
# counted.</details>
# <details><summary>Hint 2</summary>A kernel adds <code>end - max(start, until)</code>, if that is above zero.</details>

# %%
waiting = {}
for who in ("standard", "fast"):
    seen = find(record["profiles"], who, 1)
    idle = 1 - seen["busy_milliseconds"] / seen["span_milliseconds"]
    unwatched = max(0.0, 1 - seen["busy_milliseconds"] / step_of(who, 1))
    print(f"{who:<9} waits {idle:.0%} of the profiled step, {unwatched:.0%} of the one that nobody watched")
    waiting[who] = f"{idle:.0%} {unwatched:.0%}"

# %% claims
assert waiting == {"standard": "88% 84%", "fast": "4% 4%"}

# %% [markdown]
# **What happened?** A kernel here lasts 8 µs on average. Until Python has walked through the next module, found the right
# operator and launched it, 51 µs have passed. The GPU is done long before. It is not slow; it is *not asked*.

# %%
print(
    f"a kernel: {1e3 * busy / profile['kernels']:.1f} µs; from one to the next: {1e3 * step / profile['kernels']:.1f} µs"
)

# %% claims
assert f"{1e3 * busy / profile['kernels']:.0f} {1e3 * step / profile['kernels']:.0f}" == "8 51"

# %% [markdown]
# ## 2 · The floor
#
# How fast could it be? Each weight multiplies and adds once a token: 2 operations forward. The gradient of the
# layer's input takes 2 more. (Frozen weights need no gradient of their own: [dive D](dive_d_training_tricks.ipynb).) And
# checkpointing runs the forward pass twice. (We count all of it. The fast step repeats neither a layer's last product nor
# the last layer, and so leaves out 9 % of these operations.)
#
# **Exercise F.2 ●○○ (4 minutes).** How many milliseconds of pure arithmetic are in a step? `weights` is their number,
# `rate` the operations a second that the GPU reaches in a large matrix product.


# %%
def floor_ms(weights, tokens, checkpointing, rate):
    ### BEGIN SOLUTION (about 2 lines)
    operations = 2 + 2 + (2 if checkpointing else 0)
    return 1e3 * operations * weights * tokens / rate
    ### END SOLUTION


# %%
check_floor(floor_ms)

# %% [markdown]
# <details><summary>Hint</summary>4 operations a weight and token without checkpointing, 6 with it; 1,000 milliseconds a
# second.</details>

# %%
shape, rate = SHAPES["llama-7b"], record["matrix product, operations per second"]
layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
weights = shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size  # the embedding is a look-up
floors = {(b, on): 1e3 * (6 if on else 4) * weights * 512 * b / rate for b in (1, 4, 16) for on in (True, False)}
print(f"{weights / 1e9:.2f} billion weights, {rate / 1e12:.0f} million million operations/s in a large product")
print(f"{'samples':<12}{'floor':>8}{'standard':>16}{'fast':>16}   (ms, and the floor's share)")
for batch in (1, 4, 16):
    times = [step_of(who, batch) for who in ("standard", "fast")]
    columns = "".join(f"{time:>10.0f}{floors[batch, True] / time:>6.0%}" for time in times)
    print(f"{batch:<12}{floors[batch, True]:>8.0f}{columns}")

# %% claims
for batch in (1, 4, 16):
    run = find(record["runs"], "standard", batch)
    assert abs(floors[batch, True] / run["milliseconds"] - run["share_of_floor"]) < 1e-9
assert f"{weights / 1e9:.2f} {rate / 1e12:.0f} {floors[1, True]:.0f} {floors[1, True] / step:.0%}" == "6.61 691 29 5%"
assert f"{512e3 / step:.0f} {512e3 / floors[1, True]:,.0f}" == "791 17,440"
assert f"{floors[1, True] / step_of('fast', 1):.0%} {floors[16, True] / step_of('fast', 16):.0%}" == "46% 82%"

# %% [markdown]
# With one sample the standard step uses **5 %** of what the GPU can do. (TRL's trainer on
# the same libraries: {{step_of('trl', 1):.0f}} ms.) What stands between 647 and 29 ms? Look at the kernels by kind:

# %% alt="Six stacked bars of milliseconds a step: kernels by kind, and waiting. Standard, 1 sample: 104 ms of kernels and 543 waiting, 647. Fast, 1: 63. Standard, 4: 698, more than half of it waiting. Fast, 4: 166. Standard, 16: 1,044, nearly half of it elementwise kernels and copies. Fast, 16: 573, mostly matrix products."
GROUPS = {
    "matrix products": ["matrix product"],
    "dequantize": ["dequantize"],
    "attention, AdamW": ["attention", "AdamW"],
    "elementwise, copies": ["elementwise and sums", "copies, fills", "norm, rotary, SwiGLU, loss"],
}


def parts_of(who, batch, checkpointing=True):
    """Milliseconds by group; what the step that nobody watched takes longer is waiting."""
    kinds = find(record["profiles"], who, batch, checkpointing)["kinds"]
    parts = {name: sum(kinds[k]["milliseconds"] for k in of if k in kinds) for name, of in GROUPS.items()}
    return parts | {"waiting": step_of(who, batch, checkpointing) - sum(parts.values())}


parts = {f"{who}, {batch} × 512": parts_of(who, batch) for batch in (1, 4, 16) for who in ("standard", "fast")}
_ = plot_kinds(new_axes(height=3.6), parts, 1200)

# %%
print(f"{'ms':<18}" + "".join(f"{word:>8}" for word in ("product", "dequant", "attn", "elem", "waiting")))
for name, row in parts.items():
    print(f"{name:<18}" + "".join(f"{value:>8.0f}" for value in row.values()))

# %% claims
assert all(row["waiting"] > 0 for row in parts.values())
one, four, sixteen = (parts[f"standard, {batch} × 512"] for batch in (1, 4, 16))
assert f"{one['waiting']:.0f} {four['waiting']:.0f} {sixteen['waiting']:.0f}" == "543 421 76"
assert f"{sixteen['elementwise, copies']:.0f} {parts['fast, 16 × 512']['elementwise, copies']:.0f}" == "451 53"

# %% [markdown]
# Two different diseases. With one sample the GPU waits, {{one['waiting']:.0f}} of {{step:.0f}} ms. With sixteen there is enough to do, and it waits
# for 76 of 1,044; but 451 ms go into additions, casts and copies. Each has its own cure.
#
# ## 3 · Close the gaps
#
# Four things that people try, alone or together:
#
# - **bf16 adapters**: no float32 adapter, no autocast, so fewer casts between the two.
# - **a CUDA graph**: record all launches of forward and backward once, and replay them in *one* call.
# - **fused kernels**: fewer, larger ones, each doing several steps at a time; still launched by Python.
# - **both**: fused kernels in a graph. That is *fast*: `train(..., fast=True)`, or `--fast` in a terminal.
#
# **Predict.** One sample with checkpointing, 647 ms today. And four samples without, 387 ms.

# %%
predictions = [  # ← your guesses, in ms
    {"bf16 adapters": 350, "one graph": 300, "fused kernels": 250, "both": 100},  # 1 × 512, checkpointing
    {"bf16 adapters": 350, "one graph": 300, "fused kernels": 250, "both": 100},  # 4 × 512, none
]

# %% alt="Two panels of bars, milliseconds a step, with your guesses and the floor. 1 sample, checkpointing: standard 647, bf16 adapters 488, one graph 163, fused kernels 150, both 63, floor 29. 4 samples without: 387, 389, 243, 149, 125, floor 78."
WAYS = {
    "standard": "standard", "bf16 adapters": "bf16", "one graph": "graph",
    "fused kernels": "unrecorded", "both": "fast",
}  # fmt: skip
settings = {"1 × 512, checkpointing": (1, True), "4 × 512, without": (4, False)}
ladders = {title: {name: step_of(who, *s) for name, who in WAYS.items()} for title, s in settings.items()}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
_ = plot_ladder(axes, ladders, [floors[s] for s in settings.values()], predictions)

# %%
print(f"{'ms':<15}" + "".join(f"{title.split(',')[0]:>9}{'guess':>7}" for title in ladders))
for name in WAYS:
    columns = (
        f"{times[name]:>9.0f}{guesses.get(name, ''):>7}" for times, guesses in zip(ladders.values(), predictions)
    )
    print(f"{name:<15}" + "".join(columns))

# %% claims
first, second = ladders.values()
assert [f"{time:.0f}" for time in first.values()] == ["647", "488", "163", "150", "63"]
assert [f"{time:.0f}" for time in second.values()] == ["387", "389", "243", "149", "125"]

# %% [markdown]
# **What happened?**
#
# - **One graph** takes the waiting: {{first['standard'] / first['one graph']:.1f}} times as fast with one sample, and not a line of arithmetic has changed. With four
#   it gets to 243 ms and stops: there the GPU computes for 193 of them.
# - **Fused kernels** are a quarter as many launches: 150 ms with one sample, where they compute for 61; the rest is Python's
#   time. With four they compute for 120 of 149 ms.
# - **Both**: {{first['standard'] / first['both']:.1f}} times as fast with one sample. Neither alone comes near.
# - **bf16 adapters** win a quarter with one sample, and nothing with four. That is odd: with four there is more to cast.
#
# That was host A. The same card and libraries on two more hosts, on the same day (with small changes to the fast step between
# them). What depends on the host?

# %%
others = [host["runs"] for host in record["other_hosts"] if any(run["who"] == "fast" for run in host["runs"])]
hosts = dict(zip("ABC", [record["runs"], *others], strict=True))
print(f"{'ms':<15}" + "".join(f"{title.split(',')[0]:>12}{'':>12}" for title in settings))
print(f"{'':<15}" + "".join(f"{host:>{width}}" for _ in settings for host, width in zip(hosts, (12, 6, 6))))
changes = {}
for name, who in WAYS.items():
    rows = [[find(runs, who, *s)["milliseconds"] for runs in hosts.values()] for s in settings.values()]
    changes[name] = [round(100 * (there / first - 1)) for first, *rest in rows for there in rest]
    print(f"{name:<15}" + "".join(f"{a:>12.0f}{b:>6.0f}{c:>6.0f}" for a, b, c in rows))

# %% claims
assert changes == {  # in per cent of A's: B, C with one sample; B, C with four
    "standard": [-28, 10, 7, 21], "bf16 adapters": [-1, 40, -21, 4], "one graph": [-18, 8, -6, 1],
    "fused kernels": [33, 88, -15, 46], "both": [0, -1, -1, 0],
}  # fmt: skip
fused_wins = [
    find(runs, "unrecorded", 1)["milliseconds"] < find(runs, "graph", 1)["milliseconds"] for runs in hosts.values()
]
assert fused_wins == [True, False, False]
computes = [find(record["profiles"], "fast", *s)["busy_milliseconds"] for s in settings.values()]
assert [f"{ms:.0f}" for ms in computes] == ["61", "120"]

# %% [markdown]
# Only *both* is the same. Whatever Python launches, another host changes, this way and that: by up to 88 %, more than bf16
# adapters could win. With one sample fused kernels beat the graph on A, and lose to it on B and C. A step that waits for its
# host measures its host. So one comparison on one host, in a blog post or here, says little about two ways that both wait; and
# the same host may be another one an hour later.
#
# What does the graph leave, at four samples? The kernels of the standard step, one right after the other:

# %%
kinds = find(record["profiles"], "standard", 4, False)["kinds"]
for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["milliseconds"]):
    print(f"{kind:<22}{row['count']:>6,} kernels{row['milliseconds']:>7.0f} ms")
busy = sum(row["milliseconds"] for row in kinds.values())
moved = kinds["elementwise and sums"]["milliseconds"] + kinds["copies, fills"]["milliseconds"]
print(f"together {busy:.0f} ms, of which casts, copies and elementwise kernels {moved / busy:.0%}")

# %% claims
counts = [find(record["profiles"], who, 1)["kernels"] for who in ("standard", "fast")]
assert f"{busy:.0f} {moved:.0f} {moved / busy:.0%} {counts[1] / counts[0]:.2f}" == "193 83 43% 0.25"

# %% [markdown]
# {{moved:.0f}} of {{busy:.0f}} ms go into casts, copies and elementwise kernels. Why are sums so expensive? Not for their arithmetic.
#
# ### Memory traffic
#
# An H100 does 691 million million operations a second in matrix products. It moves 1.5 million million bf16 numbers a second
# to or from its memory, and even its ordinary units add far faster than that. So an addition costs what it *reads and
# writes*. LLaMA's norm, as transformers has
# it, with `x` in bf16 (2 bytes a number):
#
# ```python
# h = x.float()                    # 1  bf16 -> float32
# s = h.pow(2)                     # 2
# m = s.mean(-1, keepdim=True)     # 3  one number a row
# h = h * torch.rsqrt(m + eps)     # 4
# h = h.to(torch.bfloat16)         # 5
# y = weight * h                   # 6  one row, in bf16
# ```
#
# **Exercise F.3 ●●○ (6 minutes).** Each line is a kernel that reads its inputs from memory and writes its result back. How
# many bytes move for each element of `x`? And in one fused kernel that keeps everything between in registers? (Leave out
# what is as small as a row or a column.)

# %%
### BEGIN SOLUTION
### STUB: norm_bytes = {"operators": ..., "fused": ...}  # bytes read and written for each element of x
norm_bytes = {"operators": (2 + 4) + (4 + 4) + 4 + (4 + 4) + (4 + 2) + (2 + 2), "fused": 2 + 2}
### END SOLUTION

# %%
check_norm_bytes(norm_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>Line 1 reads 2 bytes and writes 4.</details>
# <details><summary>Hint 2</summary>Lines 2 and 4 read 4 and write 4; line 3 reads 4 and writes next to nothing.</details>

# %% [markdown]
# Torch can count: this mode sees every operator, and adds up the bytes of its tensors.

# %%
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountBytes(TorchDispatchMode):
    moved = kernels = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
            self.kernels += 1
        return result


# %%
from transformers.models.llama.modeling_llama import LlamaRMSNorm

x = torch.randn(512, 4096, dtype=torch.bfloat16)
norm = LlamaRMSNorm(4096).bfloat16()
with CountBytes() as count, torch.no_grad():
    norm(x)
per_element = count.moved / x.numel()
bandwidth = json.loads((folder / "kernels-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
bandwidth = bandwidth["results"]["nf4, bfloat16"]["copy bytes per second"]
print(f"{count.kernels} kernels (two of them on a number a row) move {per_element:.1f} bytes an element,", end=" ")
print(f"one kernel would move 4: {per_element / 4:.0f} times less")
print(f"16 × 512 tokens at {bandwidth / 1e12:.1f} TB/s:", end=" ")
print(", ".join(f"{1e6 * size * 16 * 512 * 4096 / bandwidth:.0f} µs" for size in (per_element, 4)))

# %% claims
assert f"{per_element:.1f} {per_element / 4:.0f}" == "36.0 9" and f"{bandwidth / 2 / 1e12:.1f}" == "1.5"

# %% [markdown]
# The same numbers, a ninth of the traffic. That is what a fused kernel is: not cleverer arithmetic, fewer trips. And it
# is where sixteen samples win: there elementwise kernels and copies took 342 + 109 ms, of 968 in which the GPU computed.

# %%
print(f"{'16 × 512, checkpointing':<28}{'standard':>10}{'fast':>8}   ms")
both = [find(record["profiles"], who, 16)["kinds"] for who in ("standard", "fast")]
for kind in sorted(both[0] | both[1]):
    print(f"{kind:<28}" + "".join(f"{kinds.get(kind, {}).get('milliseconds', 0):>9.0f}" for kinds in both))
down = shape.hidden_size * shape.intermediate_size  # a layer's last product
again = (shape.num_hidden_layers - 1) * (layer - down)  # weights that the fast step uses a second time forward
operations = 4 * weights + 2 * again
own = 1e3 * operations * 16 * 512 / rate
print(f"the floor {floors[16, True]:.0f} ms, of what the fast step computes {own:.0f}")

# %% claims
cost = [both[0][kind]["milliseconds"] for kind in ("elementwise and sums", "copies, fills")]
assert [f"{ms:.0f}" for ms in cost] == ["342", "109"]
assert f"{find(record['profiles'], 'standard', 16)['busy_milliseconds']:.0f}" == "968"
products = [kinds["matrix product"]["milliseconds"] for kinds in both]
attention = [kinds["attention"]["milliseconds"] for kinds in both]
assert f"{products[0]:.0f} {products[1]:.0f} {attention[0]:.0f} {attention[1]:.0f}" == "471 452 17 42"
assert (
    f"{1 - operations / (6 * weights):.0%} {floors[16, True]:.0f} {own:.0f} {own / step_of('fast', 16):.0%}"
    == "9% 470 429 75%"
)

# %% [markdown]
# Matrix products were good already: {{products[0]:.0f}} ms, where the floor is {{floors[16, True]:.0f}}. The fast step's {{products[1]:.0f}} are below it, since it computes less
# a second time; its own floor is 429 ms, three quarters of the step. Attention takes longer, 42 ms for 17: another
# implementation, for samples that lie end to end, and it adds gradients in a fixed order, so that a run repeats to the bit.
#
# ### Who waits for whom?
#
# All of this in one formula. The CPU needs *launches × µs each*, the GPU its *busy* time, and they work side by side: the
# step takes **the longer of both**. The busy time grows by the token; launches do not. Move the tokens, and the µs that
# Python needs for a launch (it depends on the host, and on how much Python stands around a kernel).
#
# **Predict.** Up to how many tokens a step does the standard step wait for Python?

# %%
prediction = {"waits up to": 1000}  # ← your guess, in tokens

# %%
import ipywidgets

from qlora_lab.classroom.widgets import explore

STEPS = {  # how: kernels launched by Python, whose kernels, which runs to show
    "standard": (12_717, "standard", "standard"),
    "standard, in one graph": (0, "standard", "graph"),
    "fused, launched by Python": (3_241, "fast", "unrecorded"),
    "fused, in one graph": (0, "fast", "fast"),
}
recorded = {who: [(512 * r["batch_size"], r["milliseconds"]) for r in record["runs"] if r["who"] == who
                  and r["gradient_checkpointing"]] for _, _, who in STEPS.values()}  # fmt: skip
few, many = (
    {who: find(record["profiles"], who, b)["busy_milliseconds"] for who in ("standard", "fast")} for b in (1, 16)
)


def busy_ms(who, tokens):
    """A line through the recorded steps of 512 and of 8,192 tokens."""
    return few[who] + (many[who] - few[who]) * (tokens - 512) / (8192 - 512)


def step_ms(how, tokens, microseconds):
    """Predicted milliseconds of a step: the CPU's and the GPU's."""
    launches, kernels, _ = STEPS[how]
    return launches * microseconds / 1e3, busy_ms(kernels, tokens)


# %% alt="Milliseconds a step over tokens a step, both logarithmic. Launching is flat at 647 ms, the GPU's work grows from 75 ms at 256 tokens to 1,900 at 16,384; the thick line is the longer of both. Three measured marks lie on it or up to 8 % above. The mark at 512 tokens says 647 ms."
LINE = [256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16_384]


def draw(how, tokens, microseconds):
    pairs = [step_ms(how, n, microseconds) for n in LINE]
    here = (tokens, max(step_ms(how, tokens, microseconds)))
    return plot_bounds(new_axes(height=3.8), LINE, *map(list, zip(*pairs)), here, recorded[STEPS[how][2]])


explore(
    draw,
    how=ipywidgets.Dropdown(options=list(STEPS), description="the step"),
    tokens=ipywidgets.SelectionSlider(options=[256 * 2**i for i in range(7)], value=512, description="tokens a step"),
    microseconds=ipywidgets.FloatSlider(value=50.9, min=2, max=80, step=0.1, description="µs a launch"),
)

# %% [markdown]
# Move the µs for *fused, launched by Python* until the line meets the measured 150 ms. Is a launch of these cheaper? Then
# look:

# %%
for who in ("standard", "fast"):
    between = find(record["profiles"], who, 4)["busy_milliseconds"]
    print(f"{who:<9} busy at 4 × 512: {between:.0f} ms, by the line {busy_ms(who, 2048):.0f}")


def crossing(microseconds):
    """Tokens at which the standard step's two lines meet."""
    launching, slope = step_ms("standard", 512, microseconds)[0], (many["standard"] - few["standard"]) / (8192 - 512)
    return 512 + (launching - few["standard"]) / slope


def launch(rows):
    """Microseconds a launch where one sample waits for Python: of the standard step, and of fused kernels."""
    return [1e3 * find(rows, who, 1)["milliseconds"] / n for who, n in (("standard", 12_717), ("unrecorded", 3_241))]


costs = {host: launch(rows) for host, rows in hosts.items()}
for host, (standard, fused) in costs.items():
    print(f"{host}: µs a launch: standard {standard:.0f}, fused {fused:.0f};", end=" ")
    print(f"the standard step waits up to {crossing(standard):,.0f} tokens")
print(f"your guess: {prediction['waits up to']:,}")
errors = {n: max(step_ms("standard", n, 50.9)) / ms - 1 for n, ms in recorded["standard"]}
errors = [round(100 * off) for off in errors.values()]
print(f"predicted and measured differ by {errors} %")
print(f"standard in one graph: predicted {few['standard']:.0f} ms, measured {step_of('graph', 1):.0f}")

# %% claims
for who, told in {"standard": "277 276", "fast": "160 162"}.items():
    assert f"{find(record['profiles'], who, 4)['busy_milliseconds']:.0f} {busy_ms(who, 2048):.0f}" == told
assert f"{few['standard']:.0f} {step_of('graph', 1):.0f}" == "104 163" and errors == [0, -7, -7]
assert [round(us) for pair in costs.values() for us in pair] == [51, 46, 37, 62, 56, 87]
assert [round(crossing(standard), -2) for standard, _ in costs.values()] == [5300, 3700, 5900]

# %% [markdown]
# **What happened?** On host A the standard step waits for Python up to some 5,300 tokens, on B up to 3,700, on C up to 5,900. That
# is why [dive D](dive_d_training_tricks.ipynb) found four samples to take no longer than one, without checkpointing. Fused
# kernels are a quarter as many, but each launch still has its price: 46 µs for 51 on A, 62 for 37 on B, 87 for 56 on C. With
# one sample the CPU still holds the GPU up, unless the launches are in a graph.
#
# The formula is a sketch. At one sample it must be right: the 50.9 µs were taken from there. It is 7 % low at four, where there
# are a few more kernels and the host was slower, and at sixteen, where some phases wait for the CPU and others do not. For
# the standard step in one graph it says 104 ms, not 163. Not everything runs side by side: bitsandbytes' AdamW waits for the
# GPU after each of its 448 kernels, which are not in the graph.
#
# ## 4 · LoRA as the border of a matrix
#
# In the fast step LoRA's sum costs no trip to memory. PEFT computes `y = x Wᵀ`, then `z = x Aᵀ`, then `s z Bᵀ`, and adds: `y`
# is written, read and written again. Now put the adapter around the weight, as a border (s is alpha / rank):
#
# ```
# M = [ W   sB ]
#     [ A    0 ]
#
# z  = x Aᵀ
# y  = [x z] [W sB]ᵀ  = x Wᵀ + s x Aᵀ Bᵀ
# dz = s dy B
# dx = [dy dz] [W; A] = dy W + s dy B A
# ```
#
# The sums are *inside* the products. Written behind `x`, `z` is only 64 more columns.
#
# **Predict.** By how many per cent does a product with 4096 columns grow by the border of rank 64?

# %%
prediction = {"border": 10}  # ← your guess, in %

# %%
torch.manual_seed(0)
n_out, n_in, rank, s, tokens = 96, 64, 8, 2.0, 5
W, A, B = (torch.randn(size, dtype=torch.float64) for size in ((n_out, n_in), (rank, n_in), (n_out, rank)))
x, dy = (torch.randn(tokens, size, dtype=torch.float64) for size in (n_in, n_out))

M = torch.cat([torch.cat([W, s * B], 1), torch.cat([A, torch.zeros(rank, rank)], 1)])
upper, left = M[:n_out], M[:, :n_in]  # [W sB] and [W; A]

z = x @ A.T
y = torch.cat([x, z], 1) @ upper.T  # forward: one product
dz = dy @ (s * B)
dx = torch.cat([dy, dz], 1) @ left  # backward: one product
dA, dB = dz.T @ x, s * dy.T @ z

# %%
inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
plain = inputs[0] @ W.T + s * (inputs[0] @ inputs[1].T) @ inputs[2].T
for ours, theirs in zip((y, dx, dA, dB), (plain.detach(), *torch.autograd.grad(plain, inputs, dy))):
    torch.testing.assert_close(ours, theirs)
growth = 64 / 4096
print(
    f"y, dx, dA, dB equal autograd's; rank 64 beside 4096 columns: {growth:+.1%}; your guess: {prediction['border']} %"
)

# %% claims
assert f"{growth:.1%}" == "1.6%"

# %% [markdown]
# One matrix, read along its rows forward and along its columns backward: W and A, W and B share a product each time. (The
# border itself, `z` and `dz`, remains a small product.)
#
# ### A surprise in the last bit
#
# The border was built for speed. It turned out to *learn better*, too. bf16 has 8 significant bits. PEFT's layer, under
# autocast, rounds `x Wᵀ` to bf16 and then adds the correction. A product with a border sums both in float32 and rounds
# once.
#
# **Predict.** A correction is a thousandth of the output's size. Which share of it arrives, on average, in each way?

# %%
prediction = {"rounded, then added": 100, "added, then rounded": 100}  # ← your guesses, in %


# %%
def bf16(values):
    return values.bfloat16().float()


def arriving(y, correction):
    """Which share of the correction is left, on average, if y is rounded first, and if the sum is."""
    ways = {"rounded, then added": bf16(bf16(y) + correction), "added, then rounded": bf16(y + correction)}
    size = correction.square().sum()
    return {name: ((came - bf16(y)) * correction).sum().item() / size.item() for name, came in ways.items()}


draw_from = torch.Generator().manual_seed(0)
y = torch.randn(2_000_000, generator=draw_from)  # outputs of a layer, of size 1
sizes = [2.0**-k for k in range(14, 1, -1)]
noise = torch.randn(y.shape, generator=draw_from)
shares = [arriving(y, size * noise) for size in sizes]

# %% [markdown]
# And how large *is* a correction? B begins at zero, and one step of AdamW moves each of its numbers by the learning rate.
# Here is a layer of LLaMA-7B's width after one step at 1e-4:

# %% alt="Share of a correction that arrives, over its size from 0.00006 to 0.25 of the output's. Added, then rounded: always 100 %. Rounded, then added: 4 % at the left end, half at 0.001, all from 0.008 on. A layer of LLaMA-7B's width after one step is at 0.0004, where a fifth arrives."
W = 0.02 * torch.randn(1024, 4096, generator=draw_from)
A = (torch.rand(64, 4096, generator=draw_from) * 2 - 1) / 4096**0.5  # PEFT's initial A
B = 1e-4 * (torch.randint(0, 2, (1024, 64), generator=draw_from) * 2.0 - 1)  # after a step at 1e-4
x = torch.randn(128, 4096, generator=draw_from)
base, correction = x @ W.T, x @ A.T @ B.T
relative = (correction.norm() / base.norm()).item()
lines = {name: [share[name] for share in shares] for name in reversed(shares[0])}
_ = plot_arriving(new_axes(height=3.4), sizes, lines, {"a layer after\nits first step": relative})

# %%
thousandth, in_layer = arriving(y, 1e-3 * noise), arriving(base, correction)
for name, share in thousandth.items():
    print(f"a thousandth, {name}: {share:.0%}; your guess: {prediction[name]} %")
print(f"the layer: a correction of {relative:.1g} of the output;", end=" ")
print(", ".join(f"{name} {round(share, 1):.0%}" for name, share in in_layer.items()))

# %% claims
assert 0.15 < in_layer["rounded, then added"] < 0.25 and abs(in_layer["added, then rounded"] - 1) < 0.05
assert f"{relative:.0e}" == "4e-04" and abs(thousandth["added, then rounded"] - 1) < 0.02

# %% [markdown]
# **What happened?** Four fifths of this layer's first correction are lost. (The fifth arrives at outputs near zero, where bf16
# numbers lie closer together.) If a correction is below half a unit in the last
# place of a *rounded* output, adding it changes nothing: not once, but each time, at every token. If it is added to the
# *unrounded* output, it pushes some outputs across the edge to the next bf16 number, in proportion to its size. Each single
# output is as coarse, and on average nothing is lost.
#
# Does it show in training? An untrained LLaMA-7B, four samples twice over, learning rate 1e-4, computing in three ways:

# %% alt="Loss over eight steps in three ways. Steps 1 to 4, new samples: all three together at 11.1 to 11.3. Steps 5 to 8, samples seen before: float32 10.83, 9.94, 9.60, 10.07, fast just above it, bf16 autocast far higher: 11.13, 10.77, 10.52, 10.83."
rounding = json.loads((folder / "rounding-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
print(f"{rounding['device']}, {rounding['date']}: " + ", ".join(f"{p} {v}" for p, v in rounding["versions"].items()))
_ = plot_losses(new_axes(height=3.2), rounding["losses"], again=5)

# %%
for name, values in rounding["losses"].items():
    print(f"{name:<14}" + "".join(f"{value:>9.3f}" for value in values))

# %% claims
exact, fast, autocast = rounding["losses"].values()
gaps = {"fast": [a - b for a, b in zip(fast, exact)], "autocast": [a - b for a, b in zip(autocast, exact)]}
assert max(abs(gap) for values in gaps.values() for gap in values[:4]) < 0.04
assert max(gaps["fast"][4:]) < 0.1 and min(gaps["autocast"][4:]) > 0.29

# %% [markdown]
# On samples that it has seen, autocast is 0.3 to 0.9 nats behind float32; the fast step at most 0.1. It is one run of each,
# and an extreme setting: an untrained model, a small rate, the very first steps. Later B is larger and
# less of it is lost (the figure's right half). But who is fast need not be less exact.
#
# ## 5 · Write one
#
# Time to write a kernel. Triton compiles Python to GPU code, and can also *interpret* it on a CPU. A kernel is written for
# one **program**, which takes a **tile** of numbers. Thousands of programs run at a time. Here is the smallest one:


# %%
@jit
def triple_kernel(x, out, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # numbers of this program's elements: [TILE]
    value = tl.load(x + i, mask=i < n, other=0)  # x is an address, x + i are TILE addresses
    tl.store(out + i, 3 * value, mask=i < n)  # the last tile may reach beyond the end: mask it


# %%
# NBVAL_IGNORE_OUTPUT
# because Triton is not installed everywhere
if triton:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(10.0, device=device)
    out = torch.zeros_like(x)
    triple_kernel[(3,)](x, out, 10, 4)  # 3 programs of 4 elements each, for 10 numbers
    print(out.tolist())
else:
    print("Triton is not installed here: read on, exercise F.4 cannot be run")

# %% claims
assert not triton or torch.equal(out, 3 * x)

# %% [markdown]
# **Exercise F.4 ●●● (15 minutes).** Dequantize NF4. For each number `i` of the tile: byte `i // 2` holds its code, in the
# high nibble if `i` is even, in the low one if it is odd; `codebook` has the 16 levels; `absmax` one scale for each
# `BLOCK_SIZE` numbers. Write level × scale to `out`. (Where Triton is not installed, the check says so and your checklist
# does not wait for it.)


# %%
@jit
def dequantize_kernel(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    ### BEGIN SOLUTION (about 7 lines)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < n
    byte = tl.load(codes + i // 2, mask=inside, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    level = tl.load(codebook + code)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=inside, other=0)
    tl.store(out + i, level * scale, mask=inside)
    ### END SOLUTION


# %%
# NBVAL_IGNORE_OUTPUT
# because Triton is not installed everywhere
check_dequantize_kernel(dequantize_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin as <code>triple_kernel</code> does. A load with a tile of addresses gives a tile of
# values, so a look-up in a table is a load too: <code>tl.load(codebook + code)</code>.</details>
# <details><summary>Hint 2</summary>High nibble: <code>byte &gt;&gt; 4</code>, low nibble: <code>byte &amp; 15</code>;
# <code>tl.where(condition, a, b)</code> chooses number by number.</details>

# %% [markdown]
# You read half a byte for each number and write it once: nothing in between touches memory. The package's kernel
# (`qlora_lab/quantization/kernels.py`) has the same lines, reads each byte once instead of twice, and can write into a
# bordered matrix. On the H100, in bf16, against what the memory allows:

# %%
kernels = json.loads((folder / "kernels-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
print(f"{kernels['device']}, {kernels['date']}: " + ", ".join(f"{p} {v}" for p, v in kernels["versions"].items()))
row = kernels["results"]["nf4, bfloat16"]["dequantize"]
for who, share in row["share of copy bandwidth"].items():
    print(f"{who:<14}{row['microseconds'][who]:>7,.0f} µs{share:>6.0%} of the copy bandwidth")

# %% claims
assert [f"{share:.0%}" for share in row["share of copy bandwidth"].values()] == ["96%", "75%", "4%"]
assert kernels["results"]["nf4, bfloat16"]["equal to the plain version"]

# %% [markdown]
# *plain* does it with PyTorch's operators: 24 times the time for the same numbers, bit by bit. What it adds is trips to
# memory.
#
# ## 6 · Yours
#
# The bundled model, 16 orders a step, rank 16. On the H100 it went from 362 ms a step to 10, 35 times as fast: with so small
# a model, nearly all of the standard step must be waiting. If you have a GPU, here is yours.

# %%
small = record["bundled"]
print(
    ", ".join(
        f"{who}: {run['milliseconds']:.0f} ms, {run['tokens_per_second']:,.0f} tokens/s" for who, run in small.items()
    )
)

# %% claims
ratio = small["standard"]["milliseconds"] / small["fast"]["milliseconds"]
slower = row["microseconds"]["plain"] / row["microseconds"]["ours"]
assert (
    f"{small['standard']['milliseconds']:.0f} {small['fast']['milliseconds']:.0f} {ratio:.0f} {slower:.0f}"
    == "362 10 35 24"
)

# %%
# NBVAL_IGNORE_OUTPUT
# because it measures this machine's GPU, if there is one
import statistics

from qlora_lab.finetuning import Batches, add_adapter, load_model, load_samples, tokenize, train_steps


def timed(fast):
    """Median milliseconds of the later of 40 steps of the bundled model."""
    model, tokenizer = load_model(quantization="nf4", device="cuda")
    orders, _ = tokenize(load_samples("orders"), tokenizer, 512)
    settings = {"steps": 40, "learning_rate": 1e-3, "compute_dtype": torch.bfloat16, "fast": fast}
    model = add_adapter(model, rank=16, alpha=32)
    steps = list(train_steps(model, Batches(orders, 16), pad_token_id=tokenizer.pad_token_id, **settings))
    return 1e3 * statistics.median(step.seconds for step in steps[20:])


if torch.cuda.is_available():
    standard, fast = timed(False), timed(True)
    print(
        f"{torch.cuda.get_device_name()}: standard {standard:.0f} ms, fast {fast:.0f} ms, {standard / fast:.1f}x faster"
    )
else:
    print("no GPU here: the record has to do")

# %% [markdown]
# (On a GPU that cannot do the fast step, it says why in one line and trains as usual.)
#
# ## Recap
#
# - A step takes the longer of two times: the CPU's to launch the kernels, and the GPU's to run them. Find out which before
#   you optimize.
# - With few tokens the GPU waits: record the launches in a graph. With many it moves bytes: fuse what stands between the
#   matrix products. Together 10.2 times as fast with one sample; and with sixteen, three quarters of the time is the
#   arithmetic's own.
# - LoRA is the border of a matrix: for a layer of rank 64, 1.6 % more of its product, and sums in float32 before they are rounded.
# - A profiler slows down what it watches. Compare its busy time with the time of a step that nobody watched.
#
# This serves *train a QLoRA model successfully*: it closes here.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** read the step itself. `qlora_lab/training/steps/fast/step.py` has the picture of a layer at its top, and its forward
# and backward pass are that picture, line by line. Then back to [the map](00_start_here.ipynb) for what is still open.
