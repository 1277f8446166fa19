# %% [markdown]
# # 09 · Your GPU
#
# How do you do all this without the course's package, on your own card? Here is one script, written with Hugging Face's
# libraries alone. You run it, pull its plug, and let it go on. After a pause you meet what stops people: memory, NaN, a wrong line,
# and the clock.
#
# | you need | |
# |---|---|
# | time | 35 minutes |
# | computing | up to 4 minutes on two CPU cores |
# | memory | 3 GB |
# | GPU | not needed, used if there is one |

# %% machinery "Imports, a folder to work in, and in it the script and forty orders"
import functools
import itertools
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from qlora_lab.classroom.cards import CARDS, hours, largest_batches, needed_by_script, reckon, seconds_at_best
from qlora_lab.classroom.checks import check_as_chat, check_blame, check_first_bad, check_plan, progress
from qlora_lab.classroom.lessons.n09.figures import LARGEST, plot_lives, plot_peaks
from qlora_lab.classroom.lessons.n09.machinery import (
    SCRIPT,
    attempt,
    edit,
    lines_of,
    louder,
    outputs_of,
    session,
    work_in,
)
from qlora_lab.classroom.lessons.n09.suspects import show_broken
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.memory import SHAPES
from qlora_lab.places import DATA

disable_progress_bar()
folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed when the kernel ends
work_in(folder.name)
with open(DATA / "orders" / "train.jsonl", encoding="utf-8") as lines:
    rows = list(itertools.islice(lines, 40))
Path("orders.jsonl").write_text("".join(rows), encoding="utf-8")
script = SCRIPT.read_text(encoding="utf-8").rstrip()
quote = functools.partial(lines_of, script)

# %% [markdown]
# ## 1 · The script
#
# *transformers* loads the model, *bitsandbytes* holds its weights in 4 bits, *PEFT* puts the adapter beside them, and *TRL* trains with
# its `SFTTrainer` (supervised fine-tuning). You need not read the script now: the few lines that need a reason stand below.
#
# <details><summary><b>The whole script, to copy when you train on your card</b> (<code>qlora_hf.py</code>, {{len(script.splitlines())}} lines)</summary>
#
# ```python
# {{script}}
# ```
#
# </details>
#
# **Model.** Without these settings, known from lesson 01, you get FP4 and slow fp32, and nobody warns you:
#
# ```python
# {{quote("four_bits =", 3)}}
# ```
#
# `dtype` is what your hardware is good at: bf16, on older cards such as the T4 fp16, on a CPU fp32.
#
# **Data.** The model reads a `prompt` and learns a `completion`, both lists of messages. TRL writes them with the model's own chat
# template, end token included (lesson 08). If your file has other columns than `prompt` and `response`, you change this function:
#
# ```python
# {{quote("def as_chat", 4)}}
# ```
#
# Samples of more than `--max-length` tokens are left out. TRL would cut off their ends, where the answers stand.
#
# **Exercise 9.1 ●●○ (2 minutes).** A library's help desk noted whole conversations:
#
# ```
# {"rules": "Be brief.", "turns": ["My card is lost.", "Since when?", "Since Monday.", "It is blocked."]}
# ```
#
# Write `as_chat` for such rows. The visitor (role `user`) speaks first, then both take turns. The last turn is learned. `rules`
# become a message with the role `system` at the beginning, or none where they are empty.


# %%
def as_chat(row):
    """A row with "rules" and "turns" -> {"prompt": [messages], "completion": [one message]}."""
    ### BEGIN SOLUTION (about 5 lines)
    messages = [{"role": "system", "content": row["rules"]}] if row["rules"] else []
    for number, text in enumerate(row["turns"]):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return {"prompt": messages[:-1], "completion": messages[-1:]}
    ### END SOLUTION


# %%
check_as_chat(as_chat)

# %% [markdown]
# <details><summary>Hint 1</summary>First make one list of all messages, then cut it.</details>
# <details><summary>Hint 2</summary><code>enumerate(row["turns"])</code> numbers the turns from zero: odd ones are the assistant's.</details>

# %% [markdown]
# **Split.** A fifth of the prompts is kept to test on, and a tenth to validate on, but at most {{50}} each. With `--split-by customer` it is
# customers instead (lesson 08).
#
# **Training.** A step takes `batch` times `accumulate` samples: the gradients of several small batches are added up
# (*accumulation*), so that only one batch is in memory at a time. One loop needs a reason:
#
# ```python
# {{quote("for weight in trainer", 3)}}
# ```
#
# TRL makes the adapter of a 4-bit model bf16, as QLoRA's authors had theirs. The loop makes it fp32 again. In bf16 a small update can be
# rounded away (lesson 02), and on a T4 the training would stop ([dive L](dive_l_small_cards.ipynb), section 7).
#
# **Look and judge.** Before training, the script prints the first sample token by token. At the end it answers every test question,
# and counts what is right to the letter.
#
# ## 2 · Run it, and pull the plug
#
# Borrowed GPUs are taken back after some hours. Let us practise that: {{12}} steps, and after every fourth a validation and a
# **checkpoint**, a saved state of the training. After step {{6}} the process is killed. (`smollm2` is the course's small
# model. What the script prints is shortened here. Its first line leaves out the scales.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
command = "python qlora_hf.py --model smollm2 --data orders.jsonl --output out"
small = "--steps 12 --every 4 --lr 3e-3 --batch 2 --accumulate 1"
first = session(f"{command} {small}", kill_after=6)

# %% [markdown]
# **Predict.** You give the same command again. With which step does it begin? If a step is computed a second time, will its loss be the same?

# %%
prediction = {"begins with step": ..., "same losses": ...}  # ← a number, and True or False

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
second = session(f"{command} {small}")

# %% machinery "The losses of both sessions" alt="Losses over {{max(second.losses)}} steps, falling from about {{first.losses[1]:.1f ±0.1}} to nearly zero. The first session ends after step {{max(first.losses)}}, where it was killed; the second begins with step {{min(second.losses)}} and lies exactly on the first in the two steps that both have."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
_ = plot_lives(new_axes(height=3), first.losses, second.losses, prediction["begins with step"])
for step in sorted(first.losses.keys() & second.losses.keys()):
    print(f"step {step}: loss {first.losses[step]} in the first session, {second.losses[step]} in the second")
print("losses the same:", told(prediction["same losses"]))

# %% claims
assert min(second.losses) == 5 and max(first.losses) == 6 and max(second.losses) == 12
exact = 0.02 if torch.cuda.is_available() else 0
assert all(abs(first.losses[step] - second.losses[step]) <= exact for step in (5, 6))
assert second.losses[12] < 0.4 < 1 < first.losses[1] and {"learned", "answered", "exact match"} <= set(second.words)
assert "<|im_end|>" in second.words["learned"]

# %% [markdown]
# **What happened?** The second session went on after step {{min(second.losses) - 1}}, the last checkpoint, and repeated two steps to the last printed digit. So a
# checkpoint holds more than the adapter: the optimizer's averages, the place in schedule and data, and the state of the random
# numbers. (Few answers are right yet, since the model has seen only {{2 * max(second.losses)}} orders.)
#
# <details><summary>May I train longer later? And how do I keep the run?</summary>
#
# A larger `--steps` goes on, too. But the learning rate, which had fallen to zero, jumps up to its place on the longer curve. For a
# clean run begin again, in a new folder. Another file needs a new folder, too: in the old one, the command goes on from the old checkpoint. If a session ended while a checkpoint was being written, remove that last folder first.
#
# This lesson's folder is removed when its kernel ends: `shutil.copytree("out", "/a/folder/of/yours")` keeps the run.
#
# </details>
#
# ### On Colab, on Kaggle, on your card
#
# | you have | begin with |
# |---|---|
# | a T4 of {{16}} GB, lent by Colab or Kaggle | a model of 7B or 8B, and `--max-length 512`, since a T4 is slow (13B fits, too, but takes nearly twice as long) |
# | a card of {{24}} GB or more, such as an L4 or an RTX {{3090}} | up to 13B, with the defaults |
# | no GPU | the course's small model, for practice; `python -m qlora_lab.models fetch` prints where it lies |
#
# On Colab the disk is gone with the session. So put your data, and the script as `qlora_hf.py`, into a folder `qlora` on
# your Drive, choose a T4, and run this (*we have only run the script on CPUs*):
#
# ```
# from google.colab import drive; drive.mount("/content/drive")
# %cd /content/drive/MyDrive/qlora
# !pip install -q "transformers>=5.17,<6" "peft>=0.20,<1" "bitsandbytes>=0.50,<1" "trl>=1.14.2,<2"
# !hf auth login
# !python qlora_hf.py --model mistralai/Mistral-7B-Instruct-v0.3 --data my.jsonl --output out --max-length 512  # and your --steps, --every
# ```
#
# In a new session, run the same lines again. Four flags are yours to set:
#
# | flag | begin with |
# |---|---|
# | `--model` | a chat model: its name often ends with *Instruct*. Without a chat template the script stops with an error |
# | `--steps` | three *epochs*, that is, passes over all samples: `3` × samples to train on / `16`, which is batch × accumulate, but `20` at least |
# | `--every` | a tenth of `--steps`. A run that ends before its first checkpoint has saved nothing |
# | `--lr` | `2e-4`, the default, for 7B and more; `5e-4` for 1B to 3B; `2e-3` for our small model (lesson 08) |
#
# [Running it](../docs/running.md#the-plain-script) has the other flags, what else the script says, and how to merge the adapter.
#
# <details><summary>Some models, such as Llama and Gemma, are <b>gated</b>: what must I do?</summary>
#
# Their makers want you to accept a licence first. Log in on the model's page, read it and agree. Make an access token there (*read* is
# enough), and give it to your machine with `hf auth login`. If the page of your model asks for nothing, leave that line out.
#
# </details>
#
# <details><summary>And on Kaggle, or on a card of my own?</summary>
#
# Kaggle lends two T4, and the script uses one. Switch the internet on, work in `/kaggle/working`, and write `CUDA_VISIBLE_DEVICES=0`
# before `python`. On your own card, the script's first lines say what to install, and `python -m bitsandbytes` says whether
# bitsandbytes finds the card.
#
# </details>
#
# <details><summary>How do I use the adapter there?</summary>
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
#
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
#                                bnb_4bit_compute_dtype=torch.float16)  # on a newer card bfloat16, here and below
# model = AutoModelForCausalLM.from_pretrained("out/adapter", quantization_config=four_bits, dtype=torch.float16,
#                                              device_map={"": 0}).eval()  # the base, too: the adapter names it
# tokenizer = AutoTokenizer.from_pretrained("out/adapter")
# chat = [{"role": "user", "content": "your question"}]  # before it the system message, if your samples have one
# ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(0)
# print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
# ```
#
# </details>
#
# ## A good place to stop for today
#
# You have a script that trains on your file and survives the end of a session: you could begin tonight. Still to come are memory that
# runs out, NaN, three broken scripts, and hours and price. When you come back, run the notebook's first two (folded) code cells, and go
# on here.
#
# ## 3 · Out of memory
#
# A copy of the script has gradient checkpointing switched off. It gets {{16}} samples at a time, and `spare` GB for model and training:

# %%
# NBVAL_IGNORE_OUTPUT
# because the machine decides at which tensor it ends
spare = 1 if torch.cuda.is_available() else 2.5
edit("gradient_checkpointing=True,", "gradient_checkpointing=False,", to="greedy.py")
one_step = "--model smollm2 --data orders.jsonl --output out1 --steps 1"
error = attempt(f"python greedy.py {one_step} --batch 16 --accumulate 1", gigabytes=spare)

# %% claims
assert error is not None

# %% [markdown]
# So few bytes were too much, because hundreds of tensors like this one are held already: *activations*, for each sample, token
# and layer.
#
# **Predict.** Now Llama-3-8B, with {{4}} samples of {{512}} tokens and no checkpointing. Which one change saves the most memory: rank {{4}}
# instead of {{16}}, an optimizer with 8-bit states, one sample at a time, or checkpointing?

# %%
vote = ...  # "rank", "optimizer", "one sample" or "checkpointing"

# %%
changes = {"as it is": {}, "rank": {"rank": 4}, "optimizer": {"optimizer": "adamw_8bit"}}
changes |= {"one sample": {"batch": 1}, "checkpointing": {"gradient_checkpointing": True}}
needs = {}
for name, change in changes.items():
    settings = {"batch": 4, "length": 512, "gradient_checkpointing": False} | change
    needs[name] = needed_by_script("llama-3-8b", **settings).total / 1e9  # lesson 02's `estimate`
    print(f"{name:<15}{needs[name]:5.1f} GB")
print(told(vote))

# %% claims
assert sorted(needs, key=needs.get) == ["checkpointing", "one sample", "rank", "optimizer", "as it is"]
assert needs["as it is"] > 15.6 > needs["one sample"]

# %% [markdown]
# **What happened?** At rank {{16}}, adapter and optimizer are small, so shrinking them saves little. One sample leaves a quarter
# of the activations, and checkpointing, which the script has, even less. **So when memory runs out, do this, in this order:**
#
# 1. a smaller `--batch` with a larger `--accumulate`: the same step, only slower (but for rounding and *dropout*, which sets a few
#    of the adapter's inputs to zero at random);
# 2. a shorter `--max-length`;
# 3. a smaller model.
#
# Does our step of {{16}} samples go through with checkpointing, {{4}} at a time?

# %%
# NBVAL_IGNORE_OUTPUT
# because the machine decides, where memory cannot be limited
mended = attempt(f"python qlora_hf.py {one_step} --batch 4 --accumulate 4", gigabytes=spare)

# %% claims
assert mended is None or "recorded" in mended

# %% [markdown]
# Here is the largest `--batch`, in powers of two, that should fit by lesson 02's rule. (Nobody has tried it on the cards. TRL needs less
# than lesson 02 says: [dive L](dive_l_small_cards.ipynb), section 5.)

# %% machinery "Which batch fits which card"
heads = [f"{name}, {card['GB']} GB" for name, card in CARDS.items()]
print(f"{'':<28}{'tokens a sample':>16}" + "".join(f"{head:>20}" for head in heads))
for model in ("mistral-7b", "llama-3-8b", "llama-2-13b"):
    for length in (512, 1024):
        fits = largest_batches(model, length)
        what = f"{model}, {SHAPES[model].parameters() / 1e9:.1f} billion"
        print(f"{what:<28}{length:>16,}" + "".join(f"{fits[name] or '–':>20}" for name in CARDS))

# %% claims
assert largest_batches("llama-3-8b", 512)["T4"] >= 4
assert min(largest_batches("mistral-7b", 512).values()) >= 16  # section 6 takes so many
assert largest_batches("llama-2-13b", 512)["T4"] >= 4  # of section 2's table, as is the time
takes = [hours(model, CARDS["T4"], 4, 512, 2000, 3) for model in ("mistral-7b", "llama-2-13b")]
assert 1.75 < takes[1] / takes[0] < 2 and largest_batches("llama-2-13b", 1024)["L4"] >= 4

# %% [markdown]
# ## 4 · NaN
#
# On an old card, the log may one day say this:
#
# ```
# {'loss': '0', 'grad_norm': 'nan', 'learning_rate': '0.0002', ...}
# ```
#
# **NaN** is *not a number*. The trainer leaves it out of the loss that it reports, which is then zero. So look at `grad_norm`, the
# gradient's length. Is it `nan` or `inf` only now and then? Do nothing: a **loss scaler** is at work ([dive L](dive_l_small_cards.ipynb), section 7). In every
# step? Then the model has numbers that are too large for fp16. The largest that fp16 has is {{LARGEST:,}} (lesson 03). Beyond lies infinity, and
# infinity divided by infinity is NaN.
#
# Let us make such a model. `louder` multiplies by {{4}} what goes into the first layer, and what each layer adds to it. But a layer
# first divides by the size of what it reads (its *norm* does), so the louder model should say the same as before.
#
# **Predict.** In which formats does it, `"fp32"`, `"bf16"`, `"fp16"`?

# %%
formats = ...  # ← a list, such as ["fp32"]

# %% machinery "A sample, the model and the louder one; their losses in three formats. It leaves both models in fp16"
tokenizer = AutoTokenizer.from_pretrained("smollm2", trust_remote_code=False)
sample = json.loads(rows[0])
messages = [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": sample["response"]}]
ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
model = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32, trust_remote_code=False).eval()
layers = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
peaks = [x.abs().max().item() for name, x in outputs_of(model, ids) if name in layers]
loud = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32, trust_remote_code=False).eval()
louder(loud, 4)
found = {}
for name, each in {"the model": model, "the louder one": loud}.items():
    found[name] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad():
            found[name].append(each.to(dtype)(ids, labels=ids).loss.item())
    print(f"loss of {name:<15} fp32 {found[name][0]:.1f} · bf16 {found[name][1]:.1f} · fp16 {found[name][2]:.1f}")
print(told(formats))

# %% claims
normal, lost = found["the model"], found["the louder one"]
assert abs(lost[0] - normal[0]) < 0.01 and abs(lost[1] - normal[0]) < 0.05 and lost[2] != lost[2]
assert abs(normal[2] - normal[0]) < 0.05

# %% [markdown]
# **What happened?** In fp32 and in bf16, which has as wide a range, it does. Only fp16 fails. Which module's numbers are too large?
#
# **Exercise 9.2 ●○○ (1 minute).** Write a function that gets the outputs of all modules, in the order in which they were computed, and
# gives the name of the first one that went wrong. (An infinity is wrong already.)


# %%
def first_bad(outputs):
    """[(name, tensor), ...] -> the name of the first tensor with a NaN or an infinity in it; None if there is none."""
    ### BEGIN SOLUTION (about 3 lines)
    for name, tensor in outputs:
        if not tensor.isfinite().all():
            return name
    ### END SOLUTION


# %%
check_first_bad(first_bad)

# %% [markdown]
# <details><summary>Hint</summary><code>tensor.isfinite()</code> says of each number whether it is neither NaN nor an infinity.</details>

# %%
place = first_bad(outputs_of(loud, ids))  # of the louder model, in fp16
print(place)

# %% claims
assert place in (None, "model.layers.11.mlp.down_proj"), place

# %% [markdown]
# It should be `model.layers.11.mlp.down_proj`. Here is the largest number after each layer of the model *before* it got louder:

# %% alt="Largest number after each of {{len(peaks)}} layers, on a log scale: below {{1000:,}} until layer {{10}}, then a jump to {{max(peaks):,.0f ±2%}} at layer {{peaks.index(max(peaks))}}, and about as large until the last two layers. The largest fp16 number, {{LARGEST:,}}, is a dotted line just above."
_ = plot_peaks(new_axes(height=3), peaks)
print(f"largest: {max(peaks):,.0f}, in layer {peaks.index(max(peaks))}")

# %% claims
assert 2 < LARGEST / max(peaks) < 3 and peaks[11] == max(peaks) and max(peaks[:11]) < 1000
by_token = dict(outputs_of(model, ids))[layers[11]][0].abs().amax(dim=-1)
assert by_token.argmax() == 0 and by_token[1:].max() < 1000

# %% [markdown]
# Layer {{peaks.index(max(peaks))}} writes a few huge numbers, all at the first token, and they are carried along nearly to the end. [Many
# language models](https://arxiv.org/abs/2402.17762) do so (dive L says why). Four times as much is more than fp16 has. The NaN follows in the
# next layer, whose norm divides by an infinite size. [Users report](https://github.com/huggingface/transformers/issues/36822) that
# Gemma {{3}} goes beyond fp16's end as it is.
#
# **What helps?** On a card that has bf16, the script takes it by default. On a T4, take another model; the first steps show whether it is one
# of these. A smaller learning rate cannot help, because frozen weights make these numbers.
#
# <details><summary>How do I get the outputs of <em>my</em> model?</summary>
#
# `outputs_of` calls `module.register_forward_hook(hook)` for each of `model.named_modules()`; torch then calls
# `hook(module, inputs, output)` after that module.
#
# </details>
#
# ## 5 · Three broken scripts
#
# **Exercise 9.3 ●●○ (4 minutes).** Three colleagues have each changed one line of the script.
#
# - **Ana**'s script stops on a T4, at its first step.
# - **Ben**'s validation loss looks wonderful, and so do the answers to his test questions. New ones are answered badly.
# - **Cleo**'s model answers badly, and seldom stops. (She also took out the part *look*. Her samples have about {{90}} tokens.)
#
# Here are all three lines in one copy. Whose is which?

# %%
show_broken()

# %%
### BEGIN SOLUTION
### STUB: blame = {"Ana": ..., "Ben": ..., "Cleo": ...}  # the numbers of three lines
blame = {"Ana": 12, "Ben": 2, "Cleo": 5}
### END SOLUTION

# %%
check_blame(blame)

# %% [markdown]
# <details><summary>Hint 1</summary>Ask of each complaint what in a script could cause it, and only then read. Section 1 shows one of the lines as it should be.</details>
# <details><summary>Hint 2</summary>Ben: for which rows is his condition true while <code>part</code> is <code>"train"</code>? Cleo: where does the answer stand in a sample, and where does TRL cut?</details>
# <details><summary>When you have them: which line did what?</summary>Ana, <code>to(dtype)</code>: on a T4 her adapter and its gradients are fp16, and the loss scaler refuses these. (On a newer card they are bf16, which rounds small updates away.) Ben, <code>part in ("train", …)</code>: while <code>part</code> is <code>"train"</code>, that is true of every row. So he trains on what he holds out. Cleo, <code>max_length=64</code>: TRL cut her samples off after {{64}} tokens, so the model learned little of each answer, and never its end. The part <em>look</em> would have stopped the script. (We tried it with the small model: all test answers were wrong, and went on until they were stopped.)</details>

# %% [markdown]
# ## 6 · Hours and price
#
# How long does a run take? **Divide the work by the speed.**
#
# The work: for each token, a weight costs six operations (multiplications and additions). Two are the forward pass, two its
# repetition by checkpointing, and two the backward pass (four if the weights were trained: each would need its own gradient). The speed: data sheets give it in **FLOP/s**, floating-point
# operations a second. That is the best case. Here is what TRL reached with LLaMA-7B on an H100:

# %% machinery "Read the record, and set it beside the best case"
record = json.loads((DATA / "records/step-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
measured = {(run["who"], run["batch_size"], run["gradient_checkpointing"]): run for run in record["runs"]}
H100 = {"GB": 84.9, "FLOP/s": 989e12, "bytes/s": 3350e9}
seconds = measured["trl", 16, True]["milliseconds"] / 1000
best = seconds_at_best("llama-7b", H100, 16 * 512)
print(f"16 samples of 512 tokens: at best {best:.2f} s, measured {seconds:.2f} s, a share of {best / seconds:.0%}")

# %% claims
assert 0.3 < best / seconds < 0.35

# %% [markdown]
# So we plan with a third, for every card. Mistral-7B on a T4, with {{2000:,}} samples of {{512}} tokens, three times:

# %%
operations = 6 * SHAPES["mistral-7b"].parameters() * 3 * 2000 * 512
print(f"{operations / (CARDS['T4']['FLOP/s'] / 3) / 3600:.1f} hours")

# %% [markdown]
# Here are three cards, with the unpacking of 4-bit weights counted, too. The prices are examples: put yours in.

# %%
prices = {"T4": 0.35, "L4": 0.80, "RTX 3090": 0.40}  # of an hour, in any currency
for name, card in CARDS.items():
    took = hours("mistral-7b", card, batch=16, length=512, samples=2000, epochs=3)
    print(f"{name:<9}{took:>5.1f} hours, price {took * prices[name]:.2f}")

# %% claims
for card in CARDS.values():  # the sum by hand, and with the unpacking of weights
    by_hand = operations / (card["FLOP/s"] / 3) / 3600
    assert by_hand < hours("mistral-7b", card, batch=16, length=512, samples=2000, epochs=3) < 1.1 * by_hand

# %% [markdown]
# Downloading and judging come on top, and nobody has measured these cards, so hours may double. **Rely on the order of magnitude only: a lunch, a night or a week.** After
# twenty steps your own log knows better. ([Dive F](dive_f_why_is_it_slow.ipynb), section 3, says why it is only a third, and what to look
# for in a data sheet.)
#
# **Exercise 9.4 ●●○ (3 minutes).** How much can a T4 learn in the twelve hours of a session? Samples have {{768}} tokens and are seen
# three times. (Or make `case` your own.) Find the largest batch that fits, a power of two. Then find as many samples as end in time
# at *half* the speed; a tenth more would be late. `reckon` says what a try needs:

# %%
case = {"model": "mistral-7b", "card": CARDS["T4"], "length": 768, "epochs": 3}
reckon(case, batch=1, samples=1000)

# %%
### BEGIN SOLUTION
### STUB: plan = {"batch": ..., "samples": ...}
plan = {"batch": 16, "samples": 4500}
### END SOLUTION

# %%
check_plan(plan, case)

# %% [markdown]
# <details><summary>Hint 1</summary>The batch decides over memory. Double it in <code>reckon</code> while the GB are at most the card's.</details>
# <details><summary>Hint 2</summary>With that batch, twice as many samples take twice as many hours. So you can reckon their number from one try.</details>
# <details><summary>How do I name my model and my card?</summary><code>print(*SHAPES)</code> shows the models' names, and <code>print(CARDS["T4"])</code> what a card is: a dict of three numbers.</details>

# %% [markdown]
# ## Recap
#
# | when | do |
# |---|---|
# | you begin | copy the script; change `as_chat` and `--split-by`; read what it shows before it trains |
# | the session ends | give the same command again |
# | out of memory | a smaller `--batch` with a larger `--accumulate`, then shorter samples, then a smaller model |
# | NaN in every step on an old card | fp16 overflows: take a card with bf16, or another model |
# | it never stops, or scores too well | look at what was learned, and at what was held out |
# | you plan | six operations a weight and token, at a third of the data sheet's speed |

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [10 · Was the prediction right?](10_memory_comparison.ipynb)
