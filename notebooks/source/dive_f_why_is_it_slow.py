# %% [markdown]
# # Dive F · Why is QLoRA slow, and what makes it fast?
#
# An H100 reaches {{691}} million million operations a second. When it trains LLaMA-7B with QLoRA, one sample at a time, it gets
# through {{791}} tokens a second. The arithmetic would allow {{17440:,}}. What does it do the rest of the time? You look into a single
# training step, find out who waits for whom, and see what helps. At the end you write a GPU kernel.
#
# | you need | |
# |---|---|
# | time | 67 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional: with one, the last section times your own |

# %% machinery "Imports, with Triton interpreted where there is no GPU"
import os
from types import SimpleNamespace

import ipywidgets
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

# %% machinery "Imports of the course, and the records"
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_lab.classroom.cards import seconds_at_best
from qlora_lab.classroom.checks import (
    check_dequantize_kernel,
    check_floor,
    check_norm_bytes,
    check_slowdown,
    progress,
)
from qlora_lab.classroom.lessons.dive_f.figures import (
    plot_arriving,
    plot_bounds,
    plot_kinds,
    plot_ladder,
    plot_roofline,
    plot_timeline,
)
from qlora_lab.classroom.lessons.dive_f.machinery import (
    ORDERS,
    RATE,
    STEPS,
    WAYS,
    arriving,
    arriving_by_size,
    bf16,
    busy_ms,
    count_traffic,
    crossing,
    fast_floor_of,
    find,
    first_correction,
    floor_of,
    hosts_of,
    launch_us,
    measured_points,
    multiplied_weights,
    parts_of,
    predict_ms,
    read_record,
    time_bundled,
    timeline,
)
from qlora_lab.classroom.plots import is_number, new_axes, told
from qlora_lab.classroom.widgets import explore

record, kernels = read_record("step"), read_record("kernels")


def step_of(who, samples, checkpointing=True):
    """Milliseconds of a recorded step."""
    return find(record["runs"], who, samples, checkpointing)["milliseconds"]


print(f"recorded on one {record['device']}, {record['date']}, by `{record['command']}`")
print(", ".join(f"{package} {version}" for package, version in record["versions"].items()))

# %% [markdown]
# ## 1 · What a kernel waits for
#
# A GPU's work comes in **kernels**, small programs that do the same to many numbers at once. One multiplies two
# matrices, another adds two tensors. Each reads its inputs from the GPU's memory, computes, and writes its result back. The GPU
# computes and moves bytes side by side, so the slower of the two decides. How many bytes a second it can move is its memory's
# **bandwidth**. Our H100 reached:

# %%
rate = record[RATE]  # in a large product of two bf16 matrices
bandwidth = kernels["results"]["nf4, bfloat16"]["copy bytes per second"]  # when it copied a large tensor
print(f"{rate / 1e12:.0f} million million operations a second, {bandwidth / 1e12:.2f} million million bytes a second")
print(f"that is {rate / bandwidth:.0f} operations in the time of one byte")

# %% claims
assert f"{rate / 1e12:.0f} {rate / bandwidth:.0f}" == "691 231"
assert f"{512e3 / step_of('standard', 1):.0f} {512e3 / floor_of(1, True, rate):,.0f}" == "791 17,440"
assert 1 / 6 / (rate / bandwidth) < 1 / 1000

# %% [markdown]
# Take the addition of two bf16 tensors. For each operation, {{4}} bytes are read and {{2}} written. In that time the H100 could do over
# a thousand operations. So an addition costs its trips to memory.
#
# A matrix product is different, since it uses each weight once for *every token*. For each weight and token it does
# {{2}} operations, a multiplication and an addition.
#
# **Predict.** A bf16 weight of {{4096}} × {{4096}} is multiplied with some tokens. From how many tokens on does the computing last
# longer than the reading and writing?

# %%
prediction = ...  # ← your guess, in tokens


# %%
def product_us(tokens, n_in, n_out, rate, bandwidth):
    """Microseconds of a bf16 product: of its computing, and of its reading and writing."""
    operations = 2 * tokens * n_in * n_out
    moved = 2 * (n_in * n_out + tokens * n_in + tokens * n_out)  # bytes: the weight, inputs, outputs
    return 1e6 * operations / rate, 1e6 * moved / bandwidth


# %% machinery "Draw the operations that a kernel can reach"
def per_byte(tokens):
    """Operations for each byte of a product with 4096 x 4096 weights."""
    return 2 * tokens * 4096**2 / (2 * (4096**2 + tokens * 2 * 4096))


dots = {"an addition": 1 / 6, "dequantizing": 1 / (4.5 / 8 + 2)}
dots |= {
    name: per_byte(n)
    for n, name in {1: "a product: 1 token", 64: "64 tokens", 512: "512 tokens", 8192: "8,192 tokens"}.items()
}
at_guess = per_byte(prediction) if is_number(prediction) else None

# %% alt="A line over the operations for each byte, both axes logarithmic. It rises until {{rate / bandwidth:.0f}} operations for each byte and is flat from there on, at {{rate / 1e12:.0f}} million million operations a second. On the slope lie an addition, dequantizing, and products with {{1}} and {{64}} tokens; on the flat part lie products with {{512}} and {{8192:,}} tokens."
for tokens in (1, 64, 512, 8192):
    computing, moving = product_us(tokens, 4096, 4096, rate, bandwidth)
    print(f"{tokens:>5,} tokens: computing {computing:>6.2f} µs, reading and writing {moving:>5.2f} µs")
times = {n: product_us(n, 4096, 4096, rate, bandwidth) for n in range(1, 1000)}
turn = next(n for n, (computing, moving) in times.items() if computing > moving)
print(f"the computing lasts longer from {turn} tokens on ({told(prediction)})")
_ = plot_roofline(new_axes(height=3.4), rate, bandwidth, dots, at_guess)

# %% claims
assert turn == 261 and per_byte(turn - 1) < rate / bandwidth < per_byte(turn)

# %% [markdown]
# **What happened?** However many tokens come, the weight is read once. With few tokens this reading decides, and more tokens
# cost almost nothing. With many tokens the computing decides. The picture shows it for any kernel: on the slope its bytes
# limit what it reaches, and on the flat part its arithmetic does. From its shape it is called a **roofline**.
#
# QLoRA's weights are stored in 4 bits. A GPU cannot multiply NF4's codes, for they are only names of levels. So before
# a product, another kernel must *dequantize* the weight: it reads codes and scales, and writes {{2}} bytes for each
# weight.
#
# **Exercise F.1 ●●○ (6 minutes).** How much slower does that make a layer on *your* card? In bf16 the layer is its product.
# In NF4 the weight is dequantized first, and the product begins when that kernel has ended. A weight takes {{4.5}} bits, its
# share of the scale included (lesson 04). Write `slowdown`, and fill in your card. Data sheets give its rate as TFLOPS in FP16
# or BF16 ("dense", {{10}}¹² operations a second), and its memory bandwidth in GB/s.


# %%
def slowdown(tokens, n_in, n_out, rate, bandwidth):
    """How many times as long the layer takes in NF4 as in bf16."""
    ### BEGIN SOLUTION (about 3 lines)
    product = max(product_us(tokens, n_in, n_out, rate, bandwidth))
    dequantizing = 1e6 * (4.5 / 8 + 2) * n_in * n_out / bandwidth
    return (dequantizing + product) / product
    ### END SOLUTION


### BEGIN SOLUTION
### STUB: my_card = {"tokens": ..., "rate": ..., "bandwidth": ...}  # tokens of a step of yours; per second
my_card = {"tokens": 4 * 512, "rate": 65e12, "bandwidth": 320e9}
### END SOLUTION

# %%
check_slowdown(slowdown, my_card)

# %% [markdown]
# <details><summary>Hint 1</summary><code>max(product_us(...))</code> is the product's time. For dequantizing count bytes: what is
# read for a weight, and what is written.</details>
# <details><summary>Hint 2</summary>A byte has 8 bits. You have no card? A T4 has <code>65e12</code> operations and
# <code>320e9</code> bytes a second.</details>

# %% [markdown]
# In whole training steps of LLaMA-7B:

# %%
for samples in (1, 4, 16):
    parts = parts_of(record, "standard", samples)
    print(f"{samples:>2} × 512 tokens: dequantizing {parts['dequantize']:.0f} ms,", end=" ")
    print(f"products {parts['matrix products']:>3.0f} ms, the whole step {step_of('standard', samples):>5,.0f} ms")

# %% claims
recorded = [parts_of(record, "standard", samples) for samples in (1, 4, 16)]
assert [f"{row['dequantize']:.0f} {row['matrix products']:.0f}" for row in recorded] == ["25 39", "25 126", "25 471"]

# %% [markdown]
# Dequantizing takes {{parts['dequantize']:.0f}} ms, however many tokens there are, and the products grow. But with one sample, both together are
# a tenth of the step. Something else takes the rest.
#
# ## 2 · Nobody asks the GPU
#
# These steps are those of [lesson 10](10_memory_comparison.ipynb): NF4, rank {{64}} on all linear layers, checkpointing, {{512}} tokens a sample.
# *Standard* is what most people run: transformers, PEFT and bitsandbytes, under **autocast**. That is a mode of PyTorch in
# which products round their inputs to bf16, while the adapters stay in float32.
#
# A step takes thousands of kernels, and the GPU starts none of them by itself. The CPU *launches* each one when Python gets to
# it. (*Python* here is all of the CPU's part, PyTorch and the driver included.) A **profiler** notes when each kernel begins
# and ends.
#
# **Predict.** With one sample, for what share of the step is any kernel running?

# %%
prediction = ...  # ← your guess, in %

# %%
profile, step = find(record["profiles"], "standard", 1), step_of("standard", 1)
busy, launched = profile["busy_milliseconds"], profile["kernels"]
print(f"{launched:,} kernels run for {busy:.0f} ms of {step:.0f}, which is {busy / step:.0%} ({told(prediction)})")
print(f"a kernel lasts {1e3 * busy / launched:.0f} µs; there is one every {1e3 * step / launched:.0f} µs")

# %% claims
assert (launched, f"{busy:.0f} {step:.0f} {busy / step:.0%}") == (12_717, "104 647 16%")
assert f"{1e3 * busy / launched:.0f} {1e3 * step / launched:.0f}" == "8 51"
assert (recorded[0]["dequantize"] + recorded[0]["matrix products"]) / step < 0.1

# %% [markdown]
# **What happened?** An average kernel is done after {{1e3 * busy / launched:.0f}} µs. Python launches one every {{1e3 * step / launched:.0f}} µs. So the GPU waits. Here are {{2.5}} ms of that step, and of the step to which this notebook leads:

# %% alt="Two timelines of {{2500:,}} microseconds in four lanes: matrix products, dequantize, attention, everything else. Standard: {{shown['standard']}} thin strokes far apart, and nearly all of it is empty. Fast: {{shown['fast']}} blocks, one right behind the other, most of them matrix products and dequantize."
lanes = {"standard (the profiler widens its gaps)": timeline(record, "standard"), "fast": timeline(record, "fast")}
_, axes = plt.subplots(2, 1, figsize=(8, 3.8), layout="constrained", sharex=True)
_ = plot_timeline(axes, lanes, 2500)
shown = {name.split()[0]: sum(start < 2500 for start, _, _ in of) for name, of in lanes.items()}
print(f"kernels that begin in these 2.5 ms: {shown}")

# %% claims
assert shown["fast"] > 2.5 * shown["standard"] and f"{profile['span_milliseconds']:.0f}" == "834"

# %% [markdown]
# The profiler slows Python down: watched, the step took {{profile['span_milliseconds']:.0f}} ms, not {{step:.0f}}. So these gaps are too wide. We only take from it how long
# kernels *run*, and compare that with an unwatched step.
#
# ## 3 · How fast could it be?
#
# Count the arithmetic. For each weight and token, the forward pass takes {{2}} operations. The backward pass takes {{2}} more, for
# the gradient of the layer's input. (A frozen weight needs no gradient of its own, lesson 07.) And what does checkpointing
# compute again? No step can be faster than this arithmetic, so we call it the *floor*. (Attention and adapters are left out.)
#
# **Exercise F.2 ●○○ (3 minutes).** How many milliseconds of arithmetic are in a step? `rate` is in operations a second.
# Then ask it for your model on your card.


# %%
def floor_ms(weights, tokens, checkpointing, rate):
    ### BEGIN SOLUTION (about 2 lines)
    operations = 2 + 2 + (2 if checkpointing else 0)
    return 1e3 * operations * weights * tokens / rate
    ### END SOLUTION


# %%
check_floor(floor_ms)

# %% [markdown]
# <details><summary>Hint</summary>With checkpointing the forward pass runs twice. A second has {{1000:,}} milliseconds.</details>

# %%
print(f"{multiplied_weights() / 1e9:.2f} billion weights; ms a step, and the floor's share of it:")
print(f"{'samples':<9}{'floor':>6}{'standard':>15}{'fast':>15}")
for samples in (1, 4, 16):
    floor = floor_of(samples, True, rate)
    times = [step_of(who, samples) for who in ("standard", "fast")]
    print(f"{samples:<9}{floor:>6.0f}" + "".join(f"{time:>10,.0f}{floor / time:>5.0%}" for time in times))

# %% claims
for samples in (1, 4, 16):
    run = find(record["runs"], "standard", samples)
    assert abs(floor_of(samples, True, rate) / run["milliseconds"] - run["share_of_floor"]) < 1e-9
assert f"{multiplied_weights() / 1e9:.2f} {floor_of(1, True, rate):.0f}" == "6.61 29"
assert f"{floor_of(1, True, rate) / step:.0%} {floor_of(16, True, rate) / step_of('standard', 16):.0%}" == "5% 45%"

# %% [markdown]
# What fills the time? Here are the kernels by kind. *Elementwise* ones do something to each number by itself: they add,
# multiply, or turn float32 into bf16.

# %% alt="Six stacked bars of milliseconds a step: kernels by kind, and waiting. Standard with {{1}} sample: {{busy:.0f}} ms of kernels and {{bars['standard, 1 × 512']['waiting']:.0f}} of waiting. Fast with {{1}}: {{step_of('fast', 1):.0f}} in all. Standard with {{4}}: {{step_of('standard', 4):.0f}}, more than half of it waiting. Fast with {{4}}: {{step_of('fast', 4):.0f}}. Standard with {{16}}: {{step_of('standard', 16):,.0f}}, nearly half of it elementwise kernels and copies. Fast with {{16}}: {{step_of('fast', 16):.0f}}, mostly matrix products."
bars = {f"{who}, {n} × 512": parts_of(record, who, n) for n in (1, 4, 16) for who in ("standard", "fast")}
_ = plot_kinds(new_axes(height=3.6), bars, 1200)
print(f"{'ms':<18}" + "".join(f"{word:>10}" for word in ("products", "dequant.", "attention", "elementw.", "waiting")))
for name, row in bars.items():
    print(f"{name:<18}" + "".join(f"{value:>10.0f}" for value in row.values()))

# %% claims
assert all(row["waiting"] > 0 for row in bars.values())
one, four, sixteen = (bars[f"standard, {n} × 512"] for n in (1, 4, 16))
assert f"{one['waiting']:.0f} {four['waiting']:.0f} {sixteen['waiting']:.0f}" == "543 421 76"
assert (
    four["waiting"] > step_of("standard", 4) / 2
    and 0.4 < sixteen["elementwise, copies"] / step_of("standard", 16) < 0.5
)
assert f"{sixteen['elementwise, copies']:.0f} {bars['fast, 16 × 512']['elementwise, copies']:.0f}" == "451 53"

# %% [markdown]
# There are two different troubles. With one sample the GPU *waits* for {{bars['standard, 1 × 512']['waiting']:.0f}} of {{step:.0f}} ms. With sixteen it hardly waits, but
# {{bars['standard, 16 × 512']['elementwise, copies']:.0f}} of {{step_of('standard', 16):,.0f}} ms go into elementwise kernels and copies.
#
# ### And on another card?
#
# Lesson 09 plans with a third of what a card's data sheet promises. In a data sheet, look for the line "FP16" or "BF16 Tensor Core".
# Take the *dense* number: "with sparsity" is double. For a GeForce take "with FP32 accumulate", which is half of the other. At best, a
# step takes the time of its operations at that speed. And once in each of its three passes, each weight is read in {{4}} bits, written in
# {{16}}, and read again. Both times are added up. Beside that, here is a step of TRL, with which lesson 09 trains:

# %% machinery "TRL's step beside the best case of the data sheet"
H100 = {"FLOP/s": 989e12, "bytes/s": 3350e9}  # of the data sheet
shares = {}
for samples in (1, 4, 16):
    best = 1e3 * seconds_at_best("llama-7b", H100, 512 * samples)
    shares[samples] = best / step_of("trl", samples)
    print(
        f"{samples:>2} × 512 tokens: at best {best:4.0f} ms, measured {step_of('trl', samples):5,.0f}, a share of {shares[samples]:.0%}"
    )
print(f"the H100's products alone reach {rate / H100['FLOP/s']:.0%} of the data sheet's speed")

# %% claims
assert shares[1] < 0.1 and 0.18 < shares[4] < 0.22 and 0.3 < shares[16] < 0.35
assert f"{rate / H100['FLOP/s']:.0%}" == "70%"
ways = ("trl", "standard")
timed = [
    {
        (run["who"], run["batch_size"]): run["milliseconds"]
        for run in host["runs"]
        if run["who"] in ways and run["gradient_checkpointing"]
    }
    for host in [record, *record["other_hosts"]]
]
timed = [took for took in timed if ("trl", 1) in took]
assert [[took[way, 1] > took[way, 4] for way in ways] for took in timed] == [[True, False]] * 3

# %% [markdown]
# With {{16}} samples it is a third. Products never reach the promise, and what lies between them waits for memory (section 5). A card that reads its
# memory fast for its operations, such as the RTX {{3090}}, should do better than a third, and the L4 worse. With fewer samples the
# H100 waits for Python. A slower card waits less, since it computes longer, but nobody has measured one. A T4 may draw only {{70}} watts, and slows down for that:
# somebody measured {{24}} of its {{65}} million million operations a second for matrix products alone, and
# [an answer in NVIDIA's forum](https://forums.developer.nvidia.com/t/about-gpu-peak-performance/264462) gave this reason.
#
# <details><summary>One sample took longer than four: is that chance?</summary>
#
# Hardly. Each time is a median over all steps but the first two, which include the warm-up. And in two more runs, on other
# machines with such a card, TRL took longer with one sample than with four, too. The record does not tell why. Without TRL, four took longer each time.
#
# </details>
#
# ## 4 · Close the gaps
#
# - **A CUDA graph** is a recording of launches. Forward and backward pass are recorded once, and then one call replays all their
#   kernels, without Python in between. (Their shapes are recorded, too: so tokens are filled up to one of a few lengths.)
# - **Fused kernels** do the work of several in one go, so there are fewer to launch. Section 5 shows what else they save.
# - **Both** is our fast step: `train(..., fast=True)`, or `--fast` in a terminal.
# - **bf16 adapters** are what many people try first, so that autocast has less to round.
#
# All of them were measured with LLaMA. `--fast` serves other families, too, such as Mistral, Qwen, Phi or Gemma (`docs/benchmarks.md` has
# their speeds). Any other model trains as usual, after a line that says why.
#
# **Predict.** The standard step takes {{step:.0f}} ms with one sample. How long does it take with each of these?

# %%
guesses = {"bf16 adapters": ..., "one graph": ..., "fused kernels": ..., "both (fast)": ...}  # ← in ms

# %% alt="Two panels of bars, milliseconds a step, and the floor. {{1}} sample with checkpointing: standard {{first['standard']:.0f}}, bf16 adapters {{first['bf16 adapters']:.0f}}, one graph {{first['one graph']:.0f}}, fused kernels {{first['fused kernels']:.0f}}, both {{first['both (fast)']:.0f}}, floor {{floors[0]:.0f}}. {{4}} samples without: {{', '.join(f'{ms:.0f}' for ms in second.values())}}, floor {{floors[1]:.0f}}."
settings = {"1 × 512, checkpointing": (1, True), "4 × 512, without": (4, False)}
first, second = ({name: step_of(who, *of) for name, who in WAYS.items()} for of in settings.values())
floors = [floor_of(*of, rate) for of in settings.values()]
_, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
_ = plot_ladder(axes, dict(zip(settings, (first, second))), floors, guesses)
for name in WAYS:
    guess = told(guesses[name]) if name in guesses else ""
    print(f"{name:<15}{first[name]:>6.0f} ms {second[name]:>6.0f} ms   {guess}")

# %% claims
assert [f"{time:.0f}" for time in first.values()] == ["647", "488", "163", "150", "63"]
assert [f"{time:.0f}" for time in second.values()] == ["387", "389", "243", "149", "125"]
graphed = find(record["profiles"], "standard", 4, False)["busy_milliseconds"]
fused = [find(record["profiles"], "fast", *of)["busy_milliseconds"] for of in settings.values()]
assert f"{graphed:.0f} {fused[0]:.0f} {fused[1]:.0f}" == "193 61 120"
counts = [find(record["profiles"], who, 1)["kernels"] for who in ("standard", "fast")]
assert f"{counts[1] / counts[0]:.2f}" == "0.25"

# %% [markdown]
# **What happened?** One graph makes a step of one sample {{first['standard'] / first['one graph']:.1f}} times as fast, with the same arithmetic. With four samples it helps
# less, since there the kernels themselves run for {{find(record['profiles'], 'standard', 4, False)['busy_milliseconds']:.0f}} ms. With fused kernels there are a quarter as many launches. With one sample they run for
# {{find(record['profiles'], 'fast', 1)['busy_milliseconds']:.0f}} of {{first['fused kernels']:.0f}} ms, and the rest is Python's. Both together are {{first['standard'] / first['both (fast)']:.1f}} times as fast.
#
# And bf16 adapters? They win a quarter with one sample, and nothing with four, where there is *more* to round. Here
# are the same card and libraries on two more hosts (the computers around the card), on the same day:

# %% machinery "The same steps on three hosts"
hosts = hosts_of(record)
table = {name: [find(rows, who, 1)["milliseconds"] for rows in hosts.values()] for name, who in WAYS.items()}
print(f"{'ms, 1 × 512':<15}" + "".join(f"{host:>6}" for host in hosts))
for name, row in table.items():
    print(f"{name:<15}" + "".join(f"{value:>6.0f}" for value in row))
h200 = {n: find(read_record("step", "nvidia-h200")["runs"], "fast", n)["milliseconds"] for n in (1, 16)}
print(
    f"and fast on one H200: {h200[1]:.0f}; with 16 samples {h200[16]:.0f}, where the H100 took {step_of('fast', 16):.0f}"
)

# %% claims
changes = {name: [round(100 * (there / here - 1)) for there in rest] for name, (here, *rest) in table.items()}
assert table["bf16 adapters"][1] > table["standard"][1]  # on B
assert changes == {  # in per cent of A's
    "standard": [-28, 10], "bf16 adapters": [-1, 40], "one graph": [-18, 8], "fused kernels": [33, 88], "both (fast)": [0, -1],
}  # fmt: skip
assert [fused < graph for fused, graph in zip(table["fused kernels"], table["one graph"])] == [True, False, False]
assert f"{h200[1]:.0f} {h200[16]:.0f}" == "56 555"

# %% [markdown]
# Only the fast step takes equally long everywhere. Whatever Python launches, another host changes: fused kernels by up to
# {{100 * max(there / here - 1 for here, *rest in table.values() for there in rest):.0f}} %. On B, bf16 adapters win nothing. A step that waits for its host measures the host. So one comparison on one
# host says little about two ways that both wait.
#
# ### Who waits for whom?
#
# In one formula: the CPU needs *launches × time of a launch*, and the GPU needs the time of its kernels. They work side by side, so
# the step takes **the longer of both**. The kernels' time grows with the tokens, and the launches do not.
#
# **Predict.** Up to how many tokens does the standard step wait for Python?

# %%
prediction = ...  # ← your guess, in tokens

# %% machinery "Draw the formula"
LINE = [256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16_384]


def draw(how, tokens, microseconds):
    pairs = [predict_ms(record, how, n, microseconds) for n in LINE]
    here = (tokens, max(predict_ms(record, how, tokens, microseconds)))
    return plot_bounds(new_axes(height=3.8), LINE, *map(list, zip(*pairs)), here, measured_points(record, how))


# %% alt="Milliseconds a step over tokens a step, both logarithmic. Launching is flat at {{predict_ms(record, 'standard', 512, 50.9)[0]:.0f}} ms, and the kernels' time grows from {{busy_ms(record, 'standard', 256):.0f}} ms at {{256}} tokens to {{busy_ms(record, 'standard', 16384):,.0f}} at {{16384:,}}. The thick line is the longer of both. Three measured marks lie on it or a little above."
explore(
    draw,
    how=ipywidgets.Dropdown(options=list(STEPS), description="the step"),
    tokens=ipywidgets.SelectionSlider(options=[256 * 2**i for i in range(7)], value=512, description="tokens a step"),
    microseconds=ipywidgets.FloatSlider(value=50.9, min=2, max=80, step=0.1, description="µs a launch"),
)

# %%
for host, rows in hosts.items():
    one, fewer = (launch_us(record, rows, how) for how in ("standard", "fused, launched by Python"))
    print(f"{host}: a launch takes {one:.0f} µs, with fused kernels {fewer:.0f} µs;", end=" ")
    print(f"the standard step waits up to {crossing(record, one):,.0f} tokens")
print(told(prediction))

# %% claims
costs = [[round(launch_us(record, rows, how)) for how in list(STEPS)[::2]] for rows in hosts.values()]
assert costs == [[51, 46], [37, 62], [56, 87]]
assert [round(crossing(record, launch_us(record, rows, "standard")), -2) for rows in hosts.values()] == [
    5300,
    3700,
    5900,
]
assert [int(crossing(record, launch_us(record, rows, "standard")) / 512) for rows in hosts.values()] == [10, 7, 11]
errors = [
    round(100 * (max(predict_ms(record, "standard", n, 50.9)) / ms - 1))
    for n, ms in measured_points(record, "standard")
]
assert errors == [0, -7, -7] and round(max(predict_ms(record, "standard, in one graph", 512, 50.9))) == 104
assert [round(busy_ms(record, who, 2048)) for who in ("standard", "fast")] == [276, 162]  # measured: 277, 160

# %% [markdown]
# **What happened?** On these hosts, seven to eleven samples take hardly longer than one. With fused kernels there are fewer launches,
# but on A each still takes {{launch_us(record, hosts['A'], 'fused, launched by Python'):.0f}} µs.
# (Choose *fused, launched by Python* above, and set the slider to that.)
#
# The formula is a sketch. It must be right with one sample, for its {{50.9}} µs were taken from that step. With four and sixteen it is
# {{7}} % too low. For
# the standard step in one graph it says {{max(predict_ms(record, 'standard, in one graph', 512, 50.9)):.0f}} ms instead of {{first['one graph']:.0f}}, since bitsandbytes' AdamW is not in the graph.
#
# ## 5 · Trips to memory
#
# Elementwise kernels cost their bytes, as section 1 said. Here is LLaMA's norm as transformers has it,
# with `x` in bf16, `m` one number a row, and `weight` one row in bf16:
#
# ```python
# h = x.float()                    # 1  from bf16 to float32
# s = h.pow(2)                     # 2
# m = s.mean(-1, keepdim=True)     # 3
# h = h * torch.rsqrt(m + eps)     # 4
# h = h.to(torch.bfloat16)         # 5
# y = weight * h                   # 6
# ```
#
# **Exercise F.3 ●●○ (4 minutes).** Each line is a kernel that reads its inputs from memory and writes its result back. How many
# bytes is that for each number of `x`? And in one fused kernel, which keeps what is in between on the chip? (Leave out single
# rows and columns.)

# %%
### BEGIN SOLUTION
### STUB: norm_bytes = {"operators": ..., "fused": ...}  # bytes read and written for each number of x
norm_bytes = {"operators": (2 + 4) + (4 + 4) + 4 + (4 + 4) + (4 + 2) + (2 + 2), "fused": 2 + 2}
### END SOLUTION

# %%
check_norm_bytes(norm_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>Line {{1}} reads {{2}} bytes and writes {{4}}.</details>
# <details><summary>Hint 2</summary>Lines {{2}} and {{4}} read {{4}} bytes and write {{4}}. Line {{3}} reads {{4}} and writes next to nothing.</details>

# %% [markdown]
# PyTorch can count: `count_traffic` watches each operator and adds up the bytes of its tensors.

# %%
x = torch.randn(512, 4096, dtype=torch.bfloat16)
operators, moved = count_traffic(LlamaRMSNorm(4096).bfloat16(), x)
print(f"{operators} kernels (two of them on one number a row) move {moved / x.numel():.1f} bytes for each number of x")
us = [1e6 * each * 16 * 512 * 4096 / bandwidth for each in (moved / x.numel(), 4)]
print(f"with 16 × 512 tokens: {us[0]:.0f} µs; one fused kernel would take {us[1]:.0f} µs")

# %% claims
assert f"{moved / x.numel():.1f} {moved / x.numel() / 4:.0f} {operators}" == "36.0 9 8"

# %% [markdown]
# A fused kernel does the same arithmetic for a ninth of the traffic. This is where sixteen samples win:

# %% machinery "A step of sixteen samples by kind of kernel"
print(f"{'ms, 16 × 512':<28}{'standard':>9}{'fast':>7}")
both = [find(record["profiles"], who, 16)["kinds"] for who in ("standard", "fast")]
for kind in sorted(both[0] | both[1]):
    print(f"{kind:<28}" + "".join(f"{of.get(kind, {}).get('milliseconds', 0):>8.0f}" for of in both))
print(
    f"floor: {floor_of(16, True, rate):.0f} ms; {fast_floor_of(16, rate):.0f} for fast, whose checkpointing repeats less"
)

# %% claims
cost = [both[0][kind]["milliseconds"] for kind in ("elementwise and sums", "copies, fills")]
assert [f"{ms:.0f}" for ms in cost] == ["342", "109"]
products, attention = ([of[kind]["milliseconds"] for of in both] for kind in ("matrix product", "attention"))
assert f"{products[0]:.0f} {products[1]:.0f} {attention[0]:.0f} {attention[1]:.0f}" == "471 452 17 42"
share = fast_floor_of(16, rate) / step_of("fast", 16)
assert f"{floor_of(16, True, rate):.0f} {fast_floor_of(16, rate):.0f} {share:.0%}" == "470 429 75%"

# %% [markdown]
# Of {{sum(both[0][kind]['milliseconds'] for kind in ('elementwise and sums', 'copies, fills')):.0f}} ms of elementwise kernels and copies, {{bars['fast, 16 × 512']['elementwise, copies']:.0f}} are left. The products were good already. Only attention
# takes longer. It is another implementation, which adds up gradients in a fixed order, so that a run repeats to the bit.
#
# ## 6 · LoRA as the border of a matrix
#
# LoRA makes such trips, too. PEFT computes `y = x Wᵀ`, then `z = x Aᵀ`, then `s z Bᵀ` (s is alpha / rank), and adds. So `y` is
# written, read again and written again. The fast step puts the adapter around the weight, as a border:
#
# ```
# M = [ W   sB ]          z = x Aᵀ
#     [ A    0 ]          y = [x z] [W sB]ᵀ = x Wᵀ + s z Bᵀ
# ```
#
# Now the sum is *inside* one product. Rank {{64}} adds {{64}} columns to the {{4096}} of `x`, only {{100 * 64 / 4096:.1f}} %. The backward pass does the same with
# the columns `[W; A]`.

# %% machinery "The border on a small layer, beside LoRA's sum"
torch.manual_seed(0)
W, A, B = (torch.randn(size, dtype=torch.float64) for size in ((96, 64), (8, 64), (96, 8)))
x, s = torch.randn(5, 64, dtype=torch.float64), 2.0
M = torch.cat([torch.cat([W, s * B], 1), torch.cat([A, torch.zeros(8, 8)], 1)])
z = x @ A.T
y = torch.cat([x, z], 1) @ M[:96].T  # the upper rows, [W sB]
apart = (y - (x @ W.T + s * z @ B.T)).abs().max().item()
print(f"a small layer: LoRA's sum and the border's product are equal to 12 decimal places: {apart < 1e-12}")

# %% claims
assert apart < 1e-12
inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
dy = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
theirs = torch.autograd.grad(inputs[0] @ W.T + s * (inputs[0] @ inputs[1].T) @ inputs[2].T, inputs, dy)
dz = dy @ (s * B)
for ours, other in zip((torch.cat([dy, dz], 1) @ M[:, :64], dz.T @ x, s * dy.T @ z), theirs):
    torch.testing.assert_close(ours, other)

# %% [markdown]
# ### A surprise: it learns better
#
# Under autocast, PEFT's layer rounds `x Wᵀ` to bf16 and *then* adds LoRA's correction. The border adds both in float32 and rounds
# once. Between {{1}} and {{2}}, bf16 numbers are {{2**-7:.4f}} apart. Here are eight outputs, spread evenly over such a gap,
# and a correction of an eighth of it:

# %%
gap = 2**-7
y, correction = 1 + gap * torch.arange(8) / 8, gap / 8
before, rounded_first, added_first = bf16(y), bf16(bf16(y) + correction), bf16(y + correction)
print("outputs that moved, rounded first:", (rounded_first != before).sum().item(), "of 8")
print("outputs that moved, added first:  ", (added_first != before).sum().item(), "of 8, by a whole gap")

# %% claims
assert torch.equal(rounded_first, before) and (added_first - before).sum() == gap

# %% [markdown]
# Rounded first, the correction never reaches the next number, and is lost every time. Added first, it carries one output of eight
# over the edge, by a gap of eight corrections. On average nothing is lost.
#
# **Predict.** A correction has a thousandth of the output's size. What share of it arrives if the output is rounded first?

# %%
prediction = ...  # ← your guess, in %

# %% alt="Share of a correction that arrives, over its size from {{sizes[0]:.5f}} to {{sizes[-1]}} of the output's. Added, then rounded: always {{100}} %. Rounded, then added: almost nothing at the left end, about half at {{0.001}}, all of it from {{0.008}} on. A layer of LLaMA-7B's width after one step lies where a fifth arrives."
sizes = [2.0**-k for k in range(14, 1, -1)]
base, correction = first_correction()
relative = (correction.norm() / base.norm()).item()
_ = plot_arriving(new_axes(height=3.4), sizes, arriving_by_size(sizes), {"a layer after\nits first step": relative})
thousandth = arriving_by_size([1e-3])[ORDERS[1]][0]
print(f"of a thousandth, {thousandth:.0%} arrive ({told(prediction)})")
share = arriving(base, correction)[ORDERS[1]]
print(
    f"a random layer of 7B's width after one step: a correction of {relative:.1g}, about {round(share, 1):.0%} arrive"
)

# %% claims
shares = arriving(base, correction)
assert 0.15 < shares[ORDERS[1]] < 0.25 and abs(shares[ORDERS[0]] - 1) < 0.05 and f"{relative:.0e}" == "4e-04"
by_size = arriving_by_size([sizes[0], 1e-3, 2**-7])
assert by_size[ORDERS[1]][0] < 0.06 and 0.4 < by_size[ORDERS[1]][1] < 0.6 and by_size[ORDERS[1]][2] > 0.95
assert all(abs(share - 1) < 0.1 for share in by_size[ORDERS[0]])

# %% [markdown]
# In such a layer, four fifths are lost at the beginning. Does it show in training? On the H100 an untrained LLaMA-7B saw four samples twice, at
# a learning rate of {{1e-4}} (loss in nats per token):

# %% machinery "Losses in three ways"
rounding = read_record("rounding")
print(f"{'':<13}{'samples seen first':>28}{'seen before':>28}")
for name, values in rounding["losses"].items():
    print(f"{name:<13}" + "".join(f"{value:>7.2f}" for value in values))

# %% claims
exact, fast, autocast = rounding["losses"].values()
gaps = {"fast": [a - b for a, b in zip(fast, exact)], "autocast": [a - b for a, b in zip(autocast, exact)]}
assert max(abs(gap) for values in gaps.values() for gap in values[:4]) < 0.04
assert max(gaps["fast"][4:]) < 0.1 and min(gaps["autocast"][4:]) > 0.29 and max(gaps["autocast"][4:]) < 0.95

# %% [markdown]
# On samples seen before, autocast is {{min(a - b for a, b in zip(rounding['losses']['bf16 autocast'][4:], rounding['losses']['float32'][4:])):.1f}} to {{max(a - b for a, b in zip(rounding['losses']['bf16 autocast'][4:], rounding['losses']['float32'][4:])):.1f}} nats behind float32, and the fast step at most {{max(a - b for a, b in zip(rounding['losses']['fast'][4:], rounding['losses']['float32'][4:])):.1f}}. It is
# one run of each, in an extreme setting: later B is larger, and less is lost.
#
# ## 7 · Write one
#
# **Triton** makes GPU kernels of Python functions, and can also interpret them on a CPU. You write a kernel for one *program*,
# which takes a *tile* of numbers. Here is a small one:


# %%
@jit
def triple_kernel(x, out, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # the numbers of this program's elements
    value = tl.load(x + i, mask=i < n, other=0)  # x is an address, so x + i are TILE addresses
    tl.store(out + i, 3 * value, mask=i < n)  # the last tile may reach beyond the end: mask it


# %%
# NBVAL_IGNORE_OUTPUT
# because Triton is not installed everywhere
if triton:
    x = torch.arange(10.0, device="cuda" if torch.cuda.is_available() else "cpu")
    out = torch.zeros_like(x)
    triple_kernel[(3,)](x, out, 10, 4)  # 3 programs of 4 elements each, for 10 numbers
    print(out.tolist())
else:
    print("Triton is not installed here: read on, exercise F.4 cannot be run")

# %% claims
assert not triton or torch.equal(out, 3 * x)

# %% [markdown]
# **Exercise F.4 ●●● (12 minutes).** Dequantize NF4. For each number `i` of the tile, byte `i // 2` holds its code: in the high
# nibble if `i` is even, in the low one if it is odd. `codebook` has the {{16}} levels, and `absmax` one scale for each
# `BLOCK_SIZE` numbers. Write level × scale to `out`.


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
# In your kernel, nothing in between touches memory. The package's own (`qlora_lab/quantization/kernels.py`) has the same lines
# with larger loads. Here it is on the H100, beside bitsandbytes' kernel and *plain*, PyTorch's operators one
# after another:

# %%
row = kernels["results"]["nf4, bfloat16"]["dequantize"]
for who, share in row["share of copy bandwidth"].items():
    print(f"{who:<13}{row['microseconds'][who]:>6,.0f} µs, {share:>3.0%} of the bandwidth of a copy")

# %% claims
assert [f"{share:.0%}" for share in row["share of copy bandwidth"].values()] == ["96%", "75%", "4%"]
assert kernels["results"]["nf4, bfloat16"]["equal to the plain version"]

# %% [markdown]
# Plain computes the same numbers in {{row['microseconds']['plain'] / row['microseconds']['ours']:.0f}} times the time. Trips to memory are all that it adds.
#
# ## 8 · Yours
#
# The bundled model is small. On the H100 its standard step took {{record['bundled']['standard']['milliseconds']:.0f}} ms, and the fast one trains the same in {{record['bundled']['fast']['milliseconds']:.0f}}. So the
# standard step mostly waited. If you have a GPU, here is yours:

# %% machinery "The recorded step of the bundled model, and yours"
# NBVAL_IGNORE_OUTPUT
# because it measures this machine's GPU, if there is one
times = {record["device"]: {who: record["bundled"][who]["milliseconds"] for who in ("standard", "fast")}}
if torch.cuda.is_available():
    times["yours, " + torch.cuda.get_device_name()] = {who: time_bundled(who == "fast") for who in ("standard", "fast")}
for name, of in times.items():
    print(
        f"{name}: standard {of['standard']:.0f} ms, fast {of['fast']:.0f} ms, {of['standard'] / of['fast']:.0f} times as fast"
    )
if len(times) == 1:
    print("no GPU here: the record has to do")

# %% claims
small = {who: run["milliseconds"] for who, run in record["bundled"].items()}
assert f"{small['standard']:.0f} {small['fast']:.0f} {small['standard'] / small['fast']:.0f}" == "362 10 35"

# %% [markdown]
# ## Recap
#
# - A kernel takes the longer of two times, computing or moving bytes. A step takes the longer of launching and running. Find out
#   which it is before you optimize.
# - With few tokens the GPU waits for Python: a CUDA graph helps. With many, bytes move between the products: fused kernels help.
#   Together they make a step of one sample {{first['standard'] / first['both (fast)']:.1f}} times as fast.
# - Dequantizing takes the same time, however many tokens there are, so a full step hardly notices it.
# - A profiler slows down what it watches, and a step that waits measures its host.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** read the fast step. `qlora_lab/training/steps/fast/layer.py` has the picture of a layer, and both passes line by line.
# Or go back to [the map](00_start_here.ipynb).
