# %% [markdown]
# # 00 · Is my machine ready?
#
# In this course you fine-tune real language models whose weights are held in four bits each, on the machine in front of you. No
# GPU, no account and no model hub are needed. A GPU makes everything faster and the models bigger.
#
# This first notebook looks at your machine, asks a real language model a question, and shows how predictions, exercises and
# sliders work here. At the end there is a map of the course.
#
# | you need | |
# |---|---|
# | time | 12 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional |

# %% [markdown]
# ## What is here?

# %% machinery "Imports"
import importlib.metadata
import os
import platform

import ipywidgets
import psutil
import torch

from qlora_lab.classroom.lessons.n00.machinery import milliseconds
from qlora_lab.classroom.plots import is_number, new_axes, plot_times, plot_weights, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import generate, load_model
from qlora_lab.models.hardware import has_bf16, pick_compute_dtype, pick_device

# %%
# NBVAL_IGNORE_OUTPUT
# because versions, cores and memory are those of the machine
device = pick_device()
gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
memory = gpu.total_memory if gpu else psutil.virtual_memory().total
print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores")
print(f"training will run on: {gpu.name if gpu else 'the CPU'}, with {memory / 1e9:.0f} GB of memory")
for package in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"):
    print(f"{package:<14}{importlib.metadata.version(package)}")

# %% [markdown]
# The packages are there. Does a model run with them? SmolLM2-135M-Instruct is small, but it is the real thing, with {{30}} layers
# and a vocabulary of {{49_152:,}} tokens, and it came with the set-up. Here it is, in four bits (`nf4`: lesson 04):

# %%
model, tokenizer = load_model("smollm2-135m-instruct", quantization="nf4")
question = [{"role": "user", "content": "What is the capital of France?"}]
print(generate(model, tokenizer, [question], max_new_tokens=12)[0])

# %% claims
assert model.is_loaded_in_4bit
assert model.config.num_hidden_layers == 30 and model.config.vocab_size == 49_152

# %% [markdown]
# It talks: **your machine is ready.** (Before you run a cell, its output is ours: the row *outputs from* at the top names the machine. Where a GPU measured, outputs name it.) In [lesson 01](01_first_run.ipynb) you teach it a trade.
#
# ## How predictions work
#
# Before a result appears, you are asked to guess it. Nobody grades a guess, and you may leave the `...` as they are. But a
# result that you have guessed wrong is one that you will remember.
#
# Here is the first. A number in the format `float32` takes {{32}} bits, in `bfloat16` half as many. The next cell multiplies two large
# matrices in each of the formats.
#
# **Predict.** How many times as long as in `float32` does it take in `bfloat16`? (One half would be twice as fast.)

# %%
prediction = {"bfloat16": ...}  # ← your guess, such as 0.5

# %% alt="Horizontal bars: how many milliseconds (log scale) a matrix product takes in float32 and in bfloat16. Where the hardware has no bf16, the bfloat16 bar is by far the longer; where it has, the shorter. The printed line says by what factor."
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine
measured = {name: milliseconds(getattr(torch, name), device) for name in ("float32", "bfloat16")}
guess = prediction["bfloat16"]
_ = plot_times(new_axes(height=1.8), measured, {"bfloat16": guess * measured["float32"]} if is_number(guess) else None)
print(f"bfloat16 takes {measured['bfloat16'] / measured['float32']:.2f} times as long as float32 here; {told(guess)}")
print("multiplies bfloat16 itself:", "yes" if has_bf16(device) else "no", "· we compute in", pick_compute_dtype(device))

# %% [markdown]
# **What happened?** That depends on whether your hardware *has* bfloat16. A GPU of the last years, or a recent CPU, multiplies such numbers
# itself and is faster with them. For another CPU, torch may have only
# a simple loop, which takes many times as long. Nothing warns you: the product is right, only the time is not. So the format for computing has to be chosen for the machine. The last line says what the course has chosen for yours.
#
# ## How exercises work
#
# Replace the `...`, run the cell, and run the check below it. A check never breaks anything. It says **·** for not attempted
# yet, **✗** with the likely mistake, or **✓**. Hints are folded under it, and so is the solution, unless your
# teacher keeps it back. What you have solved is remembered on this machine.
#
# **Exercise 0.1 ●○○ (2 minutes).** How many bytes do a model's weights take? You will need this number all the time.


# %%
def weight_bytes(parameters, bits):
    """Bytes that so many weights take, at so many bits each."""
    ### BEGIN SOLUTION (about 1 line)
    return parameters * bits / 8
    ### END SOLUTION


# %%
from qlora_lab.classroom.checks import check_bytes_of_weights, progress

check_bytes_of_weights(weight_bytes)

# %% [markdown]
# <details><summary>Hint</summary>How many bits are in one byte?</details>

# %% [markdown]
# ## Sliders
#
# Most lessons have a slider. Move this one (it needs a running *kernel*, the notebook's Python process): which of your favourite models fit into this machine,
# and in which format? These are the weights alone. [Lesson 02](02_memory_wall.ipynb) shows what training adds to them.


# %% machinery "The figure for one number of parameters"
def draw(billions):
    sizes = {f"{bits} bits": billions * bits / 8 for bits in (32, 16, 8, 4)}
    return plot_weights(new_axes(height=2.4), sizes, {"this machine": memory / 1e9})


# %% alt="Horizontal bars: GB that a model's weights take in {{32}}, {{16}}, {{8}} and {{4}} bits, with a dashed line at this machine's memory. Where the slider starts, at {{slider.value:g}} billion parameters, they are {{slider.value * 32 / 8:g}}, {{slider.value * 16 / 8:g}}, {{slider.value:g}} and {{slider.value * 4 / 8:g}} GB: half the bits, half the bytes."
# NBVAL_IGNORE_OUTPUT
# because the line shows this machine's memory
slider = ipywidgets.FloatSlider(value=7, min=0.1, max=70, step=0.1, description="parameters (10⁹)")
explore(draw, billions=slider)

# %% [markdown]
# ## The map
#
# - **You have an evening:** this notebook, then [lesson 01](01_first_run.ipynb), [lesson 09](09_your_gpu.ipynb) and [lesson 12](12_ship_it.ipynb).
#   You train a model, do it again with plain Hugging Face libraries, and make a file of it that runs elsewhere. What they mention of the lessons between, take on trust.
# - **You have a weekend:** the whole path, in its order.
# - **You teach this:** [the instructors' page](../docs/instructors.md).
#
# Every lesson can be opened alone, and the [glossary](glossary.ipynb) explains the terms in a sentence each. The path:
#
# | | question |
# |---|---|
# | lesson 00 (this one) | is my machine ready? |
# | [01 · first run](01_first_run.ipynb) | can I train a real LLM here, now? |
# | [02 · memory wall](02_memory_wall.ipynb) | why can I not just fine-tune a 7B model? |
# | [03 · number formats](03_number_formats.ipynb) | what is lost with fewer bits? |
# | [04 · NF4](04_nf4.ipynb) | which sixteen numbers are best? |
# | [05 · double quantization](05_double_quantization.ipynb) | what do the scales cost? |
# | [06 · LoRA](06_lora.ipynb) | how can so few numbers change a model? |
# | [07 · QLoRA from scratch](07_qlora_from_scratch.ipynb) | what happens when the base is 4-bit? |
# | [08 · your data](08_your_data.ipynb) | how do I teach it *my* task? |
# | [09 · your GPU](09_your_gpu.ipynb) | how do I do this with plain Hugging Face, on my card? |
# | [10 · memory comparison](10_memory_comparison.ipynb) | was the prediction right? |
# | [11 · accuracy comparison](11_accuracy_comparison.ipynb) | what did four bits cost? |
# | [12 · ship it](12_ship_it.ipynb) | how do I use it somewhere else? |
# | [13 · fact check](13_fact_check.ipynb) | what do tutorials get wrong? |
#
# **Deep dives**, for those who want more. Nothing on the path needs them:
#
# | | question |
# |---|---|
# | [A · better codebooks](dive_a_better_codebooks.ipynb) | are there sixteen better numbers, and does it matter? |
# | [B · why low rank works](dive_b_why_low_rank.ipynb) | why does a low rank suffice? |
# | [C · small differences](dive_c_small_differences.ipynb) | is that small difference real? |
# | [D · training tricks](dive_d_training_tricks.ipynb) | which knob buys what? |
# | [E · beyond QLoRA](dive_e_beyond_qlora.ipynb) | should I still use QLoRA? |
# | [F · why is it slow?](dive_f_why_is_it_slow.ipynb) | why is QLoRA slow, and what makes it fast? |
# | [G · more than one card](dive_g_more_than_one_card.ipynb) | can several cards train what one cannot hold? |
# | [H · merging](dive_h_merging.ipynb) | which merge keeps what was trained? |
# | [I · the offset](dive_i_the_offset.ipynb) | is NF4's odd constant the best one? |
# | [J · how few bits](dive_j_how_few_bits.ipynb) | how few bits can the base have? |
# | [K · to the last bit](dive_k_to_the_last_bit.ipynb) | do two programs make the same 4 bits? |
# | [L · small cards](dive_l_small_cards.ipynb) | which card is large enough? |
#
# ## Colab and Kaggle
#
# A notebook that is opened there sets itself up: its first cell fetches the course and the packages that are missing, and keeps the torch that is there, since
# it fits the GPU. (This was tried on simulated machines only.)
#
# - **Colab** lends a GPU, a T4, for free. Your progress is lost with the session, unless your Drive is mounted; the first cell says how.
# - **Kaggle**: switch *Internet* on in the notebook's settings. Progress is kept in the notebook's output if you save a version.
#
# ## Recap
#
# - Your machine runs a 4-bit language model, and computes in the format that suits it.
# - A model's weights take parameters × bits / {{8}} bytes. Training takes more.
# - Guess, run, and be surprised. Checks tell you the likely mistake.
#
# At the end you will be able to do six things, and the exercises tick them off:

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# `progress().export("mine.csv")` (or `.json`) writes your progress down for others.
#
# **Next:** [01 · Can I train a real LLM here, now?](01_first_run.ipynb)
