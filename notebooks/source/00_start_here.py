# %% [markdown]
# # 00 · Is my machine ready?
#
# In this course you fine-tune real language models in 4 bits, on the machine in front of you. No GPU, no account and no
# model hub are needed; a GPU makes everything faster and the models bigger.
#
# This first notebook takes a minute. It looks at your machine, asks a real language model a question, and shows how
# predictions, sliders and exercises work here.
#
# | you need | |
# |---|---|
# | time | 15 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional |

# %% [markdown]
# ## What is here?

# %% machinery "Imports"
import importlib.metadata
import os
import platform

import psutil
import torch

from qlora_lab.models.hardware import has_bf16, pick_compute_dtype, pick_device

# %%
# NBVAL_IGNORE_OUTPUT
# because versions, cores and memory are those of the machine
device = pick_device()
gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
memory = gpu.total_memory if gpu else psutil.virtual_memory().total

print(
    f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {memory / 1e9:.0f} GB on the {device.type.upper()}"
)
print(f"training will run on: {gpu.name if gpu else 'the CPU'}")
print(f"multiplies bf16 matrices itself: {'yes' if has_bf16(device) else 'no'}")
for package in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"):
    print(f"{package:<14}{importlib.metadata.version(package)}")

# %% [markdown]
# The packages are there. Whether 4-bit works here shows at the end, when a model answers. The third line matters more than it
# seems to. Let us find out why.

# %% [markdown]
# ## Fewer bits, faster?
#
# A number in `float32` takes 32 bits, in `bfloat16` 16. Half the bits to move, half the bits to multiply. Multiply two
# matrices of 512 × 512 (8192 × 8192 on a GPU) in `float32`, then in `bfloat16`.
#
# **Predict.** How many times as long as the first does the second take? (0.5 would be half the time.) Change the number, then
# run.

# %%
prediction = {"bfloat16": 0.5}  # ← your guess: times as long as float32

# %% alt="Horizontal bars: how many milliseconds (log scale) a matrix product takes in float32 and in bfloat16; a diamond in the second row is your guess. Where the hardware has no bf16, the bfloat16 bar is by far the longer; where it has, the shorter. The printed line says by what factor."
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine
import time
from statistics import median

from qlora_lab.classroom.plots import new_axes, plot_times


def milliseconds(dtype, repeats=7):
    n = 512 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits until a GPU is done
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


measured = {str(dtype).removeprefix("torch."): milliseconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
guess = {"bfloat16": prediction["bfloat16"] * measured["float32"]}
_ = plot_times(new_axes(height=1.8), measured, guess)
print(f"bfloat16 takes {measured['bfloat16'] / measured['float32']:.2f} times as long as float32 here")

# %% [markdown]
# **What happened?** That depends on whether your hardware *has* bf16. A recent GPU, or a CPU with AVX512-BF16 or AMX,
# multiplies bf16 natively and wins. On a processor without those instructions PyTorch takes a slow path, and loses badly.
# Neither tells you: there is no warning, the product is right, only the time is not.
#
# So the **compute dtype**, in which a 4-bit model does its arithmetic, has to be chosen for the machine. It is a
# setting that no tutorial can choose for you. The lab looks at the hardware:

# %%
# NBVAL_IGNORE_OUTPUT
# because the choice depends on the machine
pick_compute_dtype(device)

# %% [markdown]
# ## How exercises work
#
# Replace the `...`, run the cell, run the check below it. A check never breaks anything: it says **·** for not attempted
# yet, **✗** with the likely mistake, or **✓**. Hints are folded under it, and so is the solution, unless your class is
# graded. What you have solved is remembered.
#
# **Exercise 0.1 ●○○ (2 minutes).** How many bytes do a model's weights take? You will need this number all the time.


# %%
def weight_bytes(parameters, bits):
    """Bytes that so many weights take, at so many bits each."""
    ### BEGIN SOLUTION (about 1 line)
    return parameters * bits / 8
    ### END SOLUTION


# %%
from qlora_lab.classroom.checks import check_bytes_of_weights, check_compute_dtype, progress

check_bytes_of_weights(weight_bytes)

# %% [markdown]
# <details><summary>Hint</summary>How many bits are in one byte?</details>

# %% [markdown]
# ## Sliders
#
# Most notebooks have a slider. Move this one (it needs a running kernel): which of your favourite models fit this machine,
# and in which format? These are the weights alone. What training adds to them is the subject of notebook 02.

# %% alt="Horizontal bars: GB that a model's weights take in 32, 16, 8 and 4 bits, with a dashed line at this machine's memory. Where the slider starts, at {{slider.value:g}} billion parameters, they are {{slider.value * 32 / 8:g}}, {{slider.value * 16 / 8:g}}, {{slider.value:g}} and {{slider.value * 4 / 8:g}} GB: half the bits, half the bytes."
# NBVAL_IGNORE_OUTPUT
# because the line shows this machine's memory
import ipywidgets

from qlora_lab.classroom.plots import plot_weights
from qlora_lab.classroom.widgets import explore


def draw(billions):
    sizes = {f"{bits} bits": billions * bits / 8 for bits in (32, 16, 8, 4)}
    return plot_weights(new_axes(height=2.4), sizes, {"this machine": memory / 1e9})


slider = ipywidgets.FloatSlider(value=7, min=0.1, max=70, step=0.1, description="parameters (10⁹)")
explore(draw, billions=slider)

# %% [markdown]
# **Exercise 0.2 ●○○ (3 minutes).** Write the rule that the lab follows, for four kinds of machine: a CPU and a GPU, each with
# and without bf16. One thing that you have not measured: a GPU without bf16 (the T4 that Colab lends) is fast in `float16`,
# a CPU is not.


# %%
def choose_compute_dtype(device_type, has_bf16):
    """device_type is "cpu" or "cuda"; returns a torch.dtype."""
    ### BEGIN SOLUTION (about 3 lines)
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device_type == "cuda" else torch.float32
    ### END SOLUTION


# %%
check_compute_dtype(choose_compute_dtype)

# %% [markdown]
# <details><summary>Hint 1</summary>Real bf16 wins everywhere: begin with <code>if has_bf16:</code></details>
# <details><summary>Hint 2</summary>Without it there are two cases left, and two dtypes: <code>torch.float16</code> and
# <code>torch.float32</code>.</details>

# %% [markdown]
# ## A real language model
#
# SmolLM2-135M-Instruct is small, but it is the real thing: the architecture of LLaMA, 30 layers, a vocabulary of 49,152
# tokens. It came with the set-up and needs no network. Here it is, in 4 bits.

# %%
from qlora_lab.finetuning import generate, load_model

model, tokenizer = load_model("smollm2-135m-instruct", quantization="nf4")
question = [{"role": "user", "content": "What is the capital of France?"}]
print(generate(model, tokenizer, [question], max_new_tokens=12)[0])

# %% claims
assert model.is_loaded_in_4bit
assert model.config.num_hidden_layers == 30 and model.config.vocab_size == 49_152

# %% [markdown]
# It talks, in 4 bits: **your machine is ready.** In notebook 01 you teach the model a trade.

# %% [markdown]
# ## The map
#
# | | question |
# |---|---|
# | **00** | is my machine ready? |
# | [**01**](01_first_run.ipynb) | can I train a real LLM here, now? |
# | [**02**](02_memory_wall.ipynb) | why can I not just fine-tune a 7B model? |
# | [**03**](03_number_formats.ipynb) | what is lost with fewer bits? |
# | [**04**](04_nf4.ipynb) | which sixteen numbers are best? |
# | [**05**](05_double_quantization.ipynb) | what do the scales cost? |
# | [**06**](06_lora.ipynb) | how can so few numbers change a model? |
# | [**07**](07_qlora_from_scratch.ipynb) | what happens when the base is 4-bit? |
# | [**08**](08_your_data.ipynb) | how do I teach it *my* task? |
# | [**09**](09_your_gpu.ipynb) | how do I do this with plain Hugging Face, on my card? |
# | [**10**](10_memory_comparison.ipynb) | was the prediction right? |
# | [**11**](11_accuracy_comparison.ipynb) | what did 4 bits cost? |
# | [**12**](12_ship_it.ipynb) | how do I use it somewhere else? |
# | [**13**](13_fact_check.ipynb) | what do tutorials get wrong? |
#
# **Deep dives**, for those who want more; nothing on the path needs them:
#
# | | question |
# |---|---|
# | [**A**](dive_a_better_codebooks.ipynb) | are there sixteen better numbers, and does it matter? |
# | [**B**](dive_b_why_low_rank.ipynb) | why does a low rank suffice? |
# | [**C**](dive_c_small_differences.ipynb) | is that small difference real? |
# | [**D**](dive_d_training_tricks.ipynb) | which knob buys what? |
# | [**E**](dive_e_beyond_qlora.ipynb) | should I still use QLoRA? |
# | [**F**](dive_f_why_is_it_slow.ipynb) | why is QLoRA slow, and what makes it fast? |
# | [**G**](dive_g_more_than_one_card.ipynb) | can several cards train what one cannot hold? |
# | [**H**](dive_h_merging.ipynb) | how do I use it? |
# | [**I**](dive_i_the_offset.ipynb) | is NF4's odd constant the best one? |

# %% [markdown]
# ## Recap
#
# - Your machine runs a 4-bit language model.
# - Fewer bits are faster only where the hardware has instructions for them: the compute dtype follows the machine.
# - Weights take parameters × bits / 8 bytes. Training takes more.
#
# These are the six things you will be able to do at the end of the course; the exercises tick them off, item by item. The two
# of this notebook serve *configure BitsAndBytesConfig* and *measure and compare memory*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# Your progress is kept on this machine, across restarts; `progress().export("mine.csv")` (or `.json`) writes it down for
# others.
#
# **Next:** [01 · Can I train a real LLM here, now?](01_first_run.ipynb)
