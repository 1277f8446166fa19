# %% [markdown]
# # 09 · Your GPU
#
# How do you do all this without the course's package, on your own card? Here is one script, written with Hugging Face's
# libraries alone. You run it and pull its plug, learn what to do when memory runs out or numbers do, and plan a run of your own.
#
# | you need | |
# |---|---|
# | time | 38 minutes |
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

from qlora_lab.classroom.checks import check_as_chat, check_faulty, check_first_bad, check_plan, progress
from qlora_lab.classroom.lessons.n09.figures import LARGEST, plot_lives, plot_peaks
from qlora_lab.classroom.lessons.n09.machinery import (
    CARDS,
    SCRIPT,
    attempt,
    edit,
    hours,
    largest_batches,
    lines_of,
    louder,
    needed_by_script,
    outputs_of,
    seconds_at_best,
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
# Four libraries share the work. *transformers* loads the model, *bitsandbytes* holds its weights in 4 bits, *PEFT* puts the
# adapter beside them, and *TRL* trains: its `SFTTrainer` (supervised fine-tuning) learns from chats. Open the script to copy it; what
# needs a reason stands below. (This version has been run on CPUs alone.)
#
# <details><summary><b>The whole script, to read and to copy</b> (<code>qlora_hf.py</code>, {{len(script.splitlines())}} lines)</summary>
#
# ```python
# {{script}}
# ```
#
# </details>
#
# **Numbers.** NVIDIA's cards from Ampere ({{2020}}) on multiply in bf16. The T4, which Colab and Kaggle lend for free, is older and has fp16 only.
#
# ```python
# {{quote("fast =", 2)}}
# ```
#
# **Model.** Without these settings, known from lesson 01, you get FP4 and slow fp32, and nobody warns you:
#
# ```python
# {{quote("four_bits =", 3)}}
# ```
#
# **Data.** TRL wants two lists of messages: the model reads the `prompt` and learns the `completion`. TRL writes both with the model's
# own chat template, so the end token is learned, too (lesson 08). The script reads JSON lines and CSV. If your file has other columns
# than `prompt` and `response`, you change this function, and name one of your columns after `--split-by`:
#
# ```python
# {{quote("def as_chat", 4)}}
# ```
#
# Samples of more than `--max-length` tokens are left out. TRL would cut them at the end, where the answer stands.
#
# **Exercise 9.1 ●●○ (3 minutes).** A library's help desk noted whole conversations:
#
# ```
# {"rules": "Be brief.", "turns": ["My card is lost.", "Since when?", "Since Monday.", "It is blocked."]}
# ```
#
# Write `as_chat` for such rows. The visitor (role `user`) speaks first, then both take turns. The last turn is to be learned. `rules`
# become a message with the role `system` at the beginning; where they are empty, there is none.


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
# customers instead, with all their rows (lesson 08).
#
# **Training.** A step takes `batch` times `accumulate` samples: the gradients of several small batches are added up before the
# adapter moves (*accumulation*), and only one batch is in memory at a time. Every `--every` steps the script validates and saves a checkpoint, and at
# the end it takes the one with the lowest validation loss. One loop needs a reason:
#
# ```python
# {{quote("for weight in trainer", 3)}}
# ```
#
# TRL turns the adapter of a 4-bit model into bf16, and the loop makes it fp32 again. First, bf16 keeps {{8}} significant bits of a
# number (seven are stored, lesson 03), so a small update can be rounded away. Second, on a T4 gradients flow back through the layers in fp16, where the smallest would
# become zero. A **loss scaler** prevents that, and needs the adapter's own gradients in fp32.
#
# <details><summary>What is a loss scaler? And did QLoRA's paper not train adapters in bf16?</summary>
#
# Where the layers compute in fp16, so does the backward pass: what it hands from layer to layer is fp16, even if the adapter's own
# gradients are fp32. These numbers are often smaller than fp16's smallest, {{6}}·{{10}}⁻⁸. So the loss is multiplied by {{65536:,}} at
# first, which makes all gradients as much larger, and after the backward pass the adapter's are divided by it again, in fp32. Torch's scaler
# refuses to do so in fp16.
#
# The paper did train in bf16, and it worked there: not every update is too small. At rank {{16}} fp32 costs little, and is on the safe side.
#
# </details>
#
# **Look.** Before training, the script prints the first sample token by token, and stops if no end token is learned.
#
# **Judge.** At the end it answers every test question, and counts what is right to the letter. A model must beat the count
# beside it, of always giving the most frequent answer.
#
# <details><summary>What is such a count worth?</summary>
#
# It fits answers with one right wording, such as JSON; lesson 08 has other scores. Read `out/answers.jsonl` before you trust a share of few answers. And chance alone may move the share of n answers by up
# to {{98}}/√n points.
#
# The questions are answered one after the other. With `--split-by`, fifty customers may be a thousand of them, which takes long.
#
# </details>
#
# **Merge.** The same command with `--merge` writes an ordinary model:
#
# ```python
# {{quote("    merged = PeftModel", 1)}}
# ```
#
# `dequantize()` writes out the numbers that the 4-bit weights stand for. Beside exactly these the adapter was trained;
# [lesson 12](12_ship_it.ipynb) shows what happens if you add it to others. The result has 16 bits a weight, {{2 * SHAPES["mistral-7b"].parameters() / 1e9:.1f}} GB for Mistral-7B.
#
# <details><summary>Where is there room for it?</summary>
#
# On a T4 there is hardly any, nor in the memory of Colab's free machine. Merge on a larger card, or on a computer with more memory: `CUDA_VISIBLE_DEVICES=` before `python` hides the
# GPU, and `--dtype bfloat16` keeps it from taking twice as much.
#
# </details>
#
# ### What to set
#
# | setting | begin with | if not sure |
# |---|---|---|
# | `--model` | a chat model; its name often ends with *Instruct* | another has no chat template, and the script stops with an error |
# | `--lr` | `2e-4`, the default, for 7B and more (the QLoRA paper's), `5e-4` for 1B to 3B (not measured), `2e-3` for our 135M model (measured; section 2 takes `3e-3`, with which it learns alike) | train with three rates, a factor of three apart, each in an `--output` folder of its own, and keep the one with the lowest validation loss |
# | `--steps` | three *epochs*, that is, passes over all samples: `3` × samples to train on / (`batch` × `accumulate`), but `20` at least; the default, `200`, knows nothing of your file | if the validation loss still falls at the end, train again with more, in a new folder |
# | `--every` | a tenth of `--steps`: ten validations, as in lesson 08 | the default is `25`; a run of fewer steps validates and saves only at its end, so that nothing is left of a session that ends earlier, and the last state counts as the best |
# | `--batch`, `--accumulate` | `4` and `4`, the defaults | section 3 says which batch fits your card; keep their product |
# | `--max-length` | `1024`, the default | raise it if the script says that many samples were too long; memory grows with it |
# | rank and alpha | `16` and `32`, as they are | lesson 06 |
#
# <details><summary>And the other words in the script?</summary>
#
# - `including_emulation=False`: without these words torch would say that a T4 has bf16, too, because it can imitate it, slowly.
# - `in 4 bits`: how much of your model is (scales not counted). Of a 7B model it should be most. The embeddings stay in {{16}} or {{32}} bits, and
#   are a large part of our small model.
# - `dtype` and `bnb_4bit_compute_dtype`: the first is the format of what is not in 4 bits, the second the one in which 4-bit layers compute.
# - TRL: *Transformer Reinforcement Learning*, for which the library was begun.
# - The optimizer is not named, so it is torch's AdamW. Section 3 shows how little an adapter's averages take: lesson 02's paged ones
#   are not needed for it.
# - `generation_config`: settings that come with a model, its end tokens among them.
# - Padding is not mentioned: TRL marks what is learned before it pads, so the real end token stays learned, even where it pads, too (lesson 08).
# - `place`: the empty name stands for the whole model, which goes to the first GPU, or to the CPU.
# - `support_avx512bf16_for_cpu`: on some CPUs bitsandbytes switches to a faster way of computing during a validation, and the gradients
#   after it would be wrong. The line switches that way off.
# - `warmup_steps` and `cosine`: the learning rate rises during the first twentieth of the steps, then it falls like a cosine to zero.
# - `lora_dropout`: *dropout* sets a twentieth of the adapter's inputs to zero, at random in every step, so that it relies on no single one.
# - `use_reentrant=False` is the newer of torch's two ways of checkpointing. The older one gives no gradients where a layer's input
#   needs none, as behind frozen embeddings. Transformers and TRL therefore mark the embeddings' output as needing one, so that today
#   both train. The newer one works without such a mark.
# - `learned[-2:]`: some templates write a line break behind the end token, and TRL learns it, too. That is harmless, because the model
#   has stopped by then.
#
# </details>
#
# ## 2 · Run it, and pull the plug
#
# Borrowed GPUs are taken back after some hours. Let us practise that: {{12}} steps, with a checkpoint and a validation after every
# fourth. As soon as step {{6}} is done, the process is killed. (`smollm2` is the folder of the course's small model. What
# the script prints is shortened here.)

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
# **What happened?** It went on after step {{min(second.losses) - 1}}, the last checkpoint, and repeated two steps to the last printed digit. So a saved **checkpoint** (not to be
# confused with gradient checkpointing) holds more than the adapter: the optimizer's averages, the learning rate's place in its schedule, the state of the random numbers, and the
# place in the data. The model has seen only {{2 * max(second.losses)}} orders, each once.
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
# | you have | the script computes in | what to do |
# |---|---|---|
# | a T4 of {{16}} GB, lent by Colab or Kaggle | fp16 | a model of 7B or 8B and `--max-length 512`, since a T4 is slow (section 6); by section 3's sums 13B fits, too, but takes nearly twice as long; be ready for section 4 |
# | a card of {{24}} GB or more, such as an L4 or an RTX {{3090}} | bf16 | up to 13B, with the defaults |
# | no GPU | fp32 | the course's small model with `--lr 2e-3`, for practice; `python -m qlora_lab.models fetch` prints where it lies |
#
# On Colab the disk is gone with the session. So put your data, and the script from section 1 as `qlora_hf.py`, into a folder `qlora` on
# your Drive, choose a T4, and run this (*we had no T4 to try it on*):
#
# ```
# from google.colab import drive; drive.mount("/content/drive")
# %cd /content/drive/MyDrive/qlora
# !pip install -q "transformers>=5.17,<6" "peft>=0.20,<1" "bitsandbytes>=0.50,<1" "trl>=1.14.2,<2"
# !hf auth login
# !python qlora_hf.py --model mistralai/Mistral-7B-Instruct-v0.3 --data my.jsonl --output out --max-length 512  # and your --steps, --every
# ```
#
# In a new session, run the same lines again. There, a step's line has its `grad_norm`, too.
#
# <details><summary>There are warnings. Which are harmless?</summary>
#
# That `gradient_checkpointing` *is deprecated* and, without a GPU, *Failed to load CPU gemm_4bit_forward*.
#
# </details>
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
# ## 3 · Out of memory
#
# A copy of the script has gradient checkpointing switched off. It gets {{16}} samples at a time, and no more than `spare` GB for
# model and training:

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
# **Predict.** Now a bigger case: Llama-3-8B, {{4}} samples of {{512}} tokens, no checkpointing. Which one change saves the most memory:
# rank {{4}} instead of {{16}}, an optimizer with 8-bit states, one sample at a time, or checkpointing?

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
# **What happened?** At rank {{16}}, the adapter and its optimizer are small, so shrinking them saves little. Checkpointing saves most, and
# the script has it. **So when memory runs out, do this, in this order:**
#
# 1. a smaller `--batch` with a larger `--accumulate`: but for dropout and rounding the same step, only slower;
# 2. a shorter `--max-length`;
# 3. a smaller model.
#
# Here is the largest `--batch`, in powers of two, that the card holds by lesson 02's rule, which leaves some memory free. But TRL computes the loss in pieces, so that the
# logits are never all there: Dora's step of exercise 2.2 (Llama-3-8B, {{16}} samples) then needs
# {{needed_by_script("llama-3-8b", 16, 512).card_bytes / 1e9:.0f}} GB, not {{needed_by_script("llama-3-8b", 16, 512, loss_chunk=None).card_bytes / 1e9:.0f}}.

# %% machinery "Which batch fits which card"
heads = [f"{name}, {card['GB']} GB" for name, card in CARDS.items()]
print(f"{'':<28}{'tokens a sample':>16}" + "".join(f"{head:>20}" for head in heads))
for model in ("mistral-7b", "llama-3-8b", "llama-2-13b"):
    for length in (512, 1024):
        fits = largest_batches(model, length)
        what = f"{model}, {SHAPES[model].parameters() / 1e9:.1f} billion"
        print(f"{what:<28}{length:>16,}" + "".join(f"{fits[name] or '–':>20}" for name in CARDS))

# %% claims
assert largest_batches("llama-3-8b", 512)["T4"] >= 4 and largest_batches("llama-2-13b", 512)["T4"] >= 4
takes = [hours(model, CARDS["T4"], 4, 512, 2000, 3) for model in ("mistral-7b", "llama-2-13b")]
assert 1.75 < takes[1] / takes[0] < 2 and largest_batches("llama-2-13b", 1024)["L4"] >= 4

# %% [markdown]
# Nobody has run these sums on the cards.
#
# <details><summary>How do these sums count TRL's loss? Why is a "{{24}} GB" card smaller here? And what did my run take?</summary>TRL scores up to {{4096:,}} tokens and {{32768:,}} of the model's words at a time. The sums count as many scores as that, at {{12}} bytes each, which is more than TRL takes. Sellers' GB are {{2}}³⁰ bytes, so {{24}} of them are {{24 * 2**30 / 1e9:.1f}} of ours, {{10}}⁹ bytes. Torch may use a little less, and the T4 and the L4 keep some for error correction. At its end the script prints the peak of torch's memory; CUDA's context, half a GB, comes on top.</details>
#
# With both cures, checkpointing and {{4}} samples at a time, does the same step of {{16}} go through?

# %%
# NBVAL_IGNORE_OUTPUT
# because the machine decides, where memory cannot be limited
mended = attempt(f"python qlora_hf.py {one_step} --batch 4 --accumulate 4", gigabytes=spare)

# %% claims
assert mended is None or "recorded" in mended

# %% [markdown]
# ## 4 · NaN
#
# On an old card you may one day see this in the log:
#
# ```
# {'loss': '0', 'grad_norm': 'nan', 'learning_rate': '0.0002', ...}
# ```
#
# **NaN** is *not a number*. The trainer leaves it out of the loss that it reports, and if nothing else is left, it says zero. So look at
# `grad_norm`:
#
# | `grad_norm` | why | what to do |
# |---|---|---|
# | `nan` or `inf` now and then, beside a *usual* loss | the loss scaler's factor was too large (section 1, the fold below the loop); it skips this step and takes a smaller one | nothing |
# | `nan` in every step, loss zero | the model has numbers that are too large for fp16 | on a card with bf16, use that, the default; on a T4 take another model, or `--dtype float32`, which needs more memory and is eight times slower by the data sheet, so that section 6's hours become eight times as many. The first steps show whether your model is one of these |
#
# Where does the second kind come from? The largest number of fp16 is {{LARGEST:,}}. What is larger becomes infinity, and infinity divided
# by infinity is NaN.
#
# **Predict.** In this small model, how large is the largest number that flows from one layer to the next?

# %%
guess = ...  # ← your guess

# %% machinery "A sample, the model in fp32, and the largest number after each layer"
tokenizer = AutoTokenizer.from_pretrained("smollm2", trust_remote_code=False)
sample = json.loads(rows[0])
messages = [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": sample["response"]}]
ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
model = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32, trust_remote_code=False).eval()
layers = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
peaks = [x.abs().max().item() for name, x in outputs_of(model, ids) if name in layers]

# %% alt="Largest number after each of {{len(peaks)}} layers, on a log scale: below {{1000:,}} until layer {{10}}, then a jump to {{max(peaks):,.0f ±2%}} at layer {{peaks.index(max(peaks))}}, and about as large until the last two layers. The largest fp16 number, {{LARGEST:,}}, is a dotted line just above."
_ = plot_peaks(new_axes(height=3), peaks, guess)
print(f"largest: {max(peaks):,.0f}, in layer {peaks.index(max(peaks))}; {told(guess)}")

# %% claims
assert 2 < LARGEST / max(peaks) < 3 and peaks[11] == max(peaks) and max(peaks[:11]) < 1000
by_token = dict(outputs_of(model, ids))[layers[11]][0].abs().amax(dim=-1)
assert by_token.argmax() == 0 and by_token[1:].max() < 1000

# %% [markdown]
# **What happened?** Layer {{peaks.index(max(peaks))}} writes a few huge numbers, all at the first token, and they are carried along nearly to the end. [Many
# language models](https://arxiv.org/abs/2402.17762) do so. This one stays below fp16's end by a factor of {{LARGEST / max(peaks):.1f ±0.1}}; [users report](https://github.com/huggingface/transformers/issues/36822) that Gemma {{3}} goes beyond it.
#
# <details><summary>Why do models do that?</summary>
#
# Attention spreads a share of {{100}} % over the tokens, even where there is nothing to look for. Models have learned to look at the first token
# then, and the huge numbers mark it. They have to be huge because a norm follows, which divides by the token's size: beside them, hardly
# anything else of the token is left, so that it looks alike in every text.
#
# </details>
#
# Which module is it? To practise, `louder` multiplies by {{4}} what goes into the
# first layer and what each layer adds. A layer first divides by the size of what it reads (its *norm* does), so the model should say
# the same. The cell leaves both models in fp16, for exercise 9.2.

# %% machinery "The louder model, and its loss in three formats"
loud = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32, trust_remote_code=False).eval()
louder(loud, 4)
found = {}
for name, each in {"the model": model, "the louder one": loud}.items():
    found[name] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad():
            found[name].append(each.to(dtype)(ids, labels=ids).loss.item())
    print(f"loss of {name:<15} fp32 {found[name][0]:.1f} · bf16 {found[name][1]:.1f} · fp16 {found[name][2]:.1f}")

# %% claims
normal, lost = found["the model"], found["the louder one"]
assert abs(lost[0] - normal[0]) < 0.01 and abs(lost[1] - normal[0]) < 0.05 and lost[2] != lost[2]
assert abs(normal[2] - normal[0]) < 0.05

# %% [markdown]
# **Exercise 9.2 ●○○ (2 minutes).** Write a function that gets the outputs of all modules, in the order in which they were computed, and
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
place = first_bad(outputs_of(loud, ids))
print(place)

# %% claims
assert place in (None, "model.layers.11.mlp.down_proj"), place

# %% [markdown]
# It should be `model.layers.11.mlp.down_proj`, with an infinity: there the figure jumps, and four times that jump is more than fp16 has. The
# NaN follows in the next layer, whose norm divides by a size that is infinite, too. Neither the loss scaler nor a smaller learning rate can help, because frozen weights make these numbers.
#
# <details><summary>How do I get the outputs of <em>my</em> model? And what has <code>louder</code> changed?</summary>
#
# `outputs_of` calls `module.register_forward_hook(hook)` for each of `model.named_modules()`; torch then calls
# `hook(module, inputs, output)` after that module.
#
# `louder` multiplies the embeddings, and the last matrix of each attention (`o_proj`) and of each MLP (`down_proj`).
#
# </details>
#
# ## 5 · A colleague's script
#
# **Exercise 9.3 ●●● (3 minutes).** A colleague has changed the script, and taken out the part *look*. On a
# T4 the script stops at its first step. On a newer card it trains, and the validation loss looks wonderful. But the answers are bad, and many never end. Which three lines are to
# blame? And which line causes which complaint? (One has two causes.)

# %%
show_broken()

# %%
### BEGIN SOLUTION
### STUB: faulty = ...  # the numbers of three lines, such as {12, 34, 56}
faulty = {93, 103, 116}
### END SOLUTION

# %%
check_faulty(faulty)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin with the complaints, and ask of each what in a script could cause it. Only then read. (His samples have about {{90}} tokens.)</details>
# <details><summary>Hint 2</summary>One of the lines is in the part "split", two are in the part "training".</details>
# <details><summary>When you have them: which line did what?</summary>"It stops on a T4": <code>to(dtype)</code>, by which the adapter and its gradients are fp16 there, and the loss scaler refuses these. (On the newer card they are bf16, which rounds small updates away.) "The answers are bad, and many never end": <code>max_length=64</code>. TRL cut the samples off after {{64}} tokens, so the model learned little of each answer, and never its end; the part that was taken out would have stopped the script. "The validation loss looks wonderful" has two causes: the validation samples were trained on, by <code>part in ("train", …)</code>, and they were cut off in the same place. (We tried it with the small model: all test answers were wrong, and went on until they were stopped.)</details>

# %% [markdown]
# ## 6 · Hours and price
#
# How long will a run take? A card's data sheet tells how fast a step would be *at best*. How much of that is reached was
# measured for TRL on one H100 only, with LLaMA-7B, rank {{64}} and {{512}} tokens a sample:

# %% machinery "Read the record, and set it beside the best case"
record = json.loads((DATA / "records/step-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
measured = {(run["who"], run["batch_size"], run["gradient_checkpointing"]): run for run in record["runs"]}
H100 = {"GB": 84.9, "FLOP/s": 989e12, "bytes/s": 3350e9}
shares = {}
for batch in (1, 4, 16):
    seconds = measured["trl", batch, True]["milliseconds"] / 1000
    best = seconds_at_best("llama-7b", H100, 512 * batch)
    shares[batch] = best / seconds
    print(
        f"batch {batch:>2}: at best {1000 * best:4.0f} ms, measured {1000 * seconds:5.0f} ms, a share of {shares[batch]:.0%}"
    )

# %% claims
assert shares[1] < 0.1 and 0.18 < shares[4] < 0.22 and 0.3 < shares[16] < 0.35
assert 8 < H100["FLOP/s"] / CARDS["L4"]["FLOP/s"] < H100["FLOP/s"] / CARDS["RTX 3090"]["FLOP/s"] < 15
assert 15 < H100["FLOP/s"] / CARDS["T4"]["FLOP/s"] < 15.5
elsewhere = [
    {
        run["batch_size"]: run["milliseconds"]
        for run in host["runs"]
        if run["who"] == "trl" and run["gradient_checkpointing"]
    }
    for host in record["other_hosts"]
]
kernels = {
    run["batch_size"]: run["kernels"]
    for run in record["profiles"]
    if run["who"] == "standard" and run["gradient_checkpointing"]
}
assert 1 < kernels[4] / kernels[1] < 1.1
profiled = {
    run["batch_size"]: (run["busy_milliseconds"], run["span_milliseconds"])
    for run in record["profiles"]
    if run["who"] == "standard" and run["gradient_checkpointing"]
}
assert {n: (round(busy), round(span)) for n, (busy, span) in profiled.items()} == {
    1: (104, 834),
    4: (277, 707),
    16: (968, 1054),
}
without = [
    {
        run["batch_size"]: run["milliseconds"]
        for run in host["runs"]
        if run["who"] == "standard" and run["gradient_checkpointing"]
    }
    for host in [record, *record["other_hosts"]]
]
assert [took[1] < took[4] for took in without if took] == [True, True, True]
assert 1.6 < 1 / 3 / shares[4] < 2  # so much longer with the share of four samples
assert [took[1] > took[4] for took in elsewhere if took] == [True, True]

# %% [markdown]
# With one sample or with four, the H100 waits for Python, which takes half a second or more to start the same thousands of small operations.
# With {{16}} samples it is busy nearly all the time, and reaches a third. **We plan with this third for every card.** Nobody has measured slower cards, and a T4 is held back (second fold), so the hours below may
# double, or the cards' order change. **Rely on the order of magnitude only: a lunch, a night or a week.** After twenty steps your own log knows better.
#
# <details><summary>One sample took longer than four: is that chance?</summary>
#
# Hardly. Each time is a median over all steps but the first two, which include the warm-up. And in two more runs, on other
# machines with such a card, one sample took longer than four, too. The record does not tell why; without TRL, four took longer each time.
# But it tells whose time it is. In a profile of the step without TRL, the GPU computes for {{104}} of {{834}} ms with one sample, for {{277}}
# of {{707}} with four, and for {{968}} of {{1054:,}} with {{16}}. The rest of the time it waits.
#
# </details>
#
# <details><summary>What is the best case? And why only a third, if the card is busy?</summary>
#
# **FLOP/s** are the floating-point operations, such as a multiplication or an addition, that a card does in a second. A token costs two of
# them a weight in the forward pass, two more when checkpointing computes it again, and two in the backward pass; a frozen weight has no
# gradient of its own. And once in each of these passes, each weight is read in {{4}} bits, written in {{16}}, and read again. Both times are added up.
#
# In a data sheet, look for the line "FP16" or "BF16 Tensor Core". Take the *dense* number: "with sparsity" is double. For a GeForce take
# "with FP32 accumulate", which is half of the other.
#
# The H100's matrix products alone reach {{record["matrix product, operations per second"] / H100["FLOP/s"]:.0%}} of the data sheet's speed, and the many small operations between them wait for memory. A card that
# reads its memory fast for its FLOP/s, such as the RTX {{3090}}, should do better than a third, and the L4 worse. A T4 may draw only {{70}} watts, and
# slows down for that: somebody measured {{24}} of its {{65}} TFLOP/s for matrix products alone, and
# [an answer in NVIDIA's forum](https://forums.developer.nvidia.com/t/about-gpu-peak-performance/264462) gave this reason.
#
# </details>
#
# Here is Mistral-7B with {{2000:,}} samples of {{512}} tokens to train on, three epochs, four at a time (`--steps 375`). The price is one example for all. Download, validation and judging come on top.

# %% machinery "Hours and price on three cards"
price = 0.35  # of an hour: an example, in any currency
print(f"at {price} an hour")
for name, card in CARDS.items():
    took = hours("mistral-7b", card, batch=4, length=512, samples=2000, epochs=3)
    pace = 3 * 2000 * 512 / took / 3600
    print(f"{name:<9}{pace:>6.0f} tokens a second{took:>6.1f} h{took * price:>6.2f}")

# %% [markdown]
# **Exercise 9.4 ●●● (3 minutes).** How much can a card learn in the twelve hours of a session? Choose a card, a model, and a length that section 3
# has not. Take the largest batch as there, and as many samples as end in time at half the speed: a tenth more would be late.
# `needed_by_script(model, batch, length).card_bytes` and `hours(model, card, batch, length, samples, epochs)` reckon.

# %%
### BEGIN SOLUTION
### STUB: plan = {
### STUB:     "model": ...,  # a name in SHAPES, of 1.7B parameters or more
### STUB:     "card": ...,  # CARDS["T4"], or a dict of your own
### STUB:     "batch": ...,  # samples at a time
### STUB:     "length": ...,  # tokens a sample
### STUB:     "samples": ...,
### STUB:     "epochs": ...,
### STUB: }
plan = {"model": "mistral-7b", "card": CARDS["T4"], "batch": 16, "length": 768, "samples": 4500, "epochs": 3}
### END SOLUTION

# %%
check_plan(plan)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin with one sample, and double it while <code>needed_by_script(...).card_bytes / 1e9</code> is at most the card's <code>"GB"</code>. A card of your own is a dict, too: <code>print(CARDS["T4"])</code> shows one. And <code>print(*SHAPES)</code> shows the models' names.</details>
# <details><summary>Hint 2</summary>Twice as many samples take twice as many hours. So ask first what a thousand of them take.</details>

# %% [markdown]
# ## Recap
#
# | when | do |
# |---|---|
# | you begin | copy the script; change `as_chat` and `--split-by`; read what it shows before it trains |
# | the session ends | give the same command again |
# | out of memory | a smaller `--batch` with a larger `--accumulate`, then shorter samples, then a smaller model |
# | NaN on an old card | look for fp16 that overflows; another model, or fp32 |
# | it never stops, or scores too well | look at what was learned, and at what was held out |

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [10 · Was the prediction right?](10_memory_comparison.ipynb)
