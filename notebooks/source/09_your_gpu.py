# %% [markdown]
# # 09 · Your GPU
#
# How do you do all this without the course's package, on your own card? Here is one script of less than a hundred lines,
# written with Hugging Face's libraries alone. You read it, run it, break it as it will break one day anyway,
# and mend it. Then you plan a training of a 7B or 8B model: memory, hours and price.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 4 minutes on two CPU cores |
# | memory | 3 GB |
# | GPU | not needed, used if there is one |

# %% machinery "Imports, an empty folder to work in, and the script in it"
import itertools
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_lab
from qlora_lab.classroom.checks import check_as_chat, check_faulty, check_first_bad, check_plan, progress
from qlora_lab.classroom.lessons.n09.figures import LARGEST, plot_lives, plot_peaks
from qlora_lab.classroom.lessons.n09.machinery import attempt, edit, louder, outputs_of, read, session, work_in
from qlora_lab.classroom.lessons.n09.suspects import show_broken
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.memory import SHAPES, estimate

repository = Path(qlora_lab.__file__).resolve().parents[1]
work_in(tempfile.mkdtemp())
with open(repository / "data" / "orders" / "train.jsonl", encoding="utf-8") as lines:
    rows = list(itertools.islice(lines, 60))
Path("orders.jsonl").write_text("".join(rows), encoding="utf-8")

# %% [markdown]
# ## 1 · The script
#
# Four libraries share the work. *transformers* loads the model, *bitsandbytes* holds its weights in 4 bits, *PEFT* puts the
# adapter beside them, and *TRL* trains: its `SFTTrainer` (supervised fine-tuning) learns from chats. The whole
# script, with its imports and command line, is `examples/qlora_hf.py` in the course's folder. Here are its parts.

# %%
read("numbers")

# %% [markdown]
# **Which numbers?** NVIDIA's cards since 2020 multiply in bf16. The T4, which Colab lends for free, is older and has fp16
# only.
#
# <details><summary>Why the long name in brackets?</summary>Ask torch whether a T4 supports bf16, and it says yes: it would imitate it, slowly. The long name asks for the real thing.</details>

# %%
read("model")

# %% [markdown]
# **The model** has the settings that you know. Without them you get FP4 and slow fp32, and nobody warns you.
#
# <details><summary>What do <code>place</code> and the last two lines do?</summary>The empty name in <code>place</code> stands for the whole model: all of it goes to the first GPU, or to the CPU. The last two lines matter on some CPUs only. There bitsandbytes switches to a faster way of computing during a validation, and the gradients after it would be wrong; these lines switch that way off.</details>

# %%
read("data")

# %% [markdown]
# **The data.** TRL wants two lists of messages: `prompt` is read, `completion` is learned. TRL writes both with the model's own chat template.
# The token that ends the answer is learned, too, or the model would never stop. One sample in ten is kept aside for validation.
#
# <details><summary>What can go wrong with the end?</summary>Short samples are filled up to the length of the longest (<i>padding</i>), with some models by this same token. Padding must not be learned. Whoever leaves out <i>every</i> such token leaves out the real end, too, and the model talks on and on. TRL goes by the place instead.</details>
#
# **Exercise 9.1 ●●○ (4 minutes).** A library's help desk noted whole conversations:
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
# <details><summary>Hint 2</summary><code>enumerate(row["turns"])</code> numbers the turns from 0: odd ones are the assistant's.</details>

# %%
read("training")

# %% [markdown]
# **The training.** A step takes `batch` times `accumulate` samples: gradients of several small batches are added up before the
# adapter moves, and memory is needed for one of them at a time. *Gradient checkpointing* keeps only what goes into each layer, and computes the rest again in the backward pass.
# `max_length` cuts longer samples *at the end*, and there stands the answer.
#
# **Why the loop?** TRL turns the adapter of a 4-bit model into bf16. The loop makes it fp32 again, for two reasons.
#
# 1. bf16 keeps 8 significant bits of a number, so a small update is rounded away.
# 2. A T4 would stop at the first step, with an error that ends in `not implemented for 'BFloat16'`.
#
# The error comes from the **loss scaler**, which every training in fp16 needs. Gradients are often smaller than the smallest number of
# fp16, 6·10⁻⁸. So the loss is multiplied by 65,536 at first (in fp32, which reaches that far), and the gradients are divided by it
# after the backward pass. torch does that for fp32 gradients only.
#
# <details><summary>And the other words?</summary><code>warmup_steps</code> and <code>cosine</code>: the learning rate rises during the first twentieth of the steps, and then falls like a cosine, slowly, fast and slowly again, to zero. <code>use_reentrant=False</code> chooses the newer of torch's two ways of checkpointing. The older one loses the gradients of a layer whose input has none, as behind frozen embeddings.</details>

# %%
read("answer")

# %% [markdown]
# ## 2 · Run it, and pull the plug
#
# Borrowed GPUs are taken back after some hours, whatever you are doing. Let us practise it: 16 steps, with a checkpoint and
# a validation after every fourth. As soon as step 10 is done, the process is killed. `smollm2` is a folder with the course's small model.
#
# **Predict.** You give the same command again. With which step does it begin? Some steps are then computed a second time: will their losses be the same?

# %%
prediction = {"begins with step": ..., "same losses": ...}  # ← a number, and True or False

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
command = "python qlora_hf.py --model smollm2 --data orders.jsonl --output out"
small = "--steps 16 --lr 3e-3 --batch 2 --accumulate 1"
first = session(f"{command} {small}", kill_after=10)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
second = session(f"{command} {small}")

# %% alt="Losses over 16 steps, falling from about 1.5 to below 0.2. The first session ends after step 10, where it was killed; the second begins with step 9 and lies exactly on the first in steps 9 and 10."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
_ = plot_lives(new_axes(height=3), first.losses, second.losses, prediction["begins with step"])
for step in sorted(first.losses.keys() & second.losses.keys()):
    print(f"step {step}: loss {first.losses[step]} in the first session, {second.losses[step]} in the second")
print("losses the same:", told(prediction["same losses"]))

# %% claims
assert min(second.losses) == 9 and max(first.losses) == 10 and max(second.losses) == 16
exact = 0.02 if torch.cuda.is_available() else 0
assert all(abs(first.losses[step] - second.losses[step]) <= exact for step in (9, 10))
assert second.losses[16] < 0.25 < 1 < first.losses[1] and set(second.words) == {"asked", "expected", "answered"}

# %% [markdown]
# **What happened?** It went on after step 8, the last checkpoint, and repeated steps 9 and 10 to the last printed digit. So a checkpoint holds
# more than the adapter: the optimizer's averages, the learning rate's place in its schedule, the random numbers of the dropout, and the
# place in the data.
#
# The break harmed nothing: the validation loss jumps about with its six samples. And a wrong answer at the end is
# no wonder: the model has seen {{2 * max(second.losses)}} orders, each once.
#
# <details><summary>May I train longer later?</summary>A larger <code>--steps</code> goes on, too. But the learning rate, which had fallen to zero, jumps up to its place on the longer curve. For a clean run begin again, in a new folder.</details>
#
# **On Colab** the disk is gone with the session, so write to your Drive. Put the script and your data into a
# folder `qlora` there, choose a T4, and run this (*we had no T4 to try it on*):
#
# ```
# from google.colab import drive; drive.mount("/content/drive")
# %cd /content/drive/MyDrive/qlora
# !pip install -q "transformers>=5.17,<6" "peft>=0.20,<1" "bitsandbytes>=0.50,<1" "trl>=1.14.2,<2"
# !python qlora_hf.py --model mistralai/Mistral-7B-Instruct-v0.3 --data my.jsonl --output out --batch 1 --accumulate 16
# ```
#
# To resume in a new session, run these lines again. To use the adapter there, run the first three, then:
#
# ```
# import torch
# from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
#                                bnb_4bit_compute_dtype=torch.float16)
# model = AutoModelForCausalLM.from_pretrained("out/adapter", quantization_config=four_bits, dtype=torch.float16,
#                                              device_map={"": 0}).eval()  # the base, too: the adapter names it
# tokenizer = AutoTokenizer.from_pretrained("out/adapter")
# chat = [{"role": "user", "content": "your question"}]
# ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(0)
# print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
# ```
#
# ## 3 · Out of memory
#
# A copy of the script has gradient checkpointing switched off. It gets 16 samples at a time, in a process
# that may take no more than `spare` GB for model and training.

# %%
# NBVAL_IGNORE_OUTPUT
# because the machine decides at which tensor it ends
spare = 1 if torch.cuda.is_available() else 2.5
edit("gradient_checkpointing=True,", "gradient_checkpointing=False,", to="greedy.py")
one_step = "--model smollm2 --data orders.jsonl --output out1 --steps 1"
error = attempt(f"python greedy.py {one_step} --batch 16 --accumulate 1", gigabytes=spare)

# %% [markdown]
# Read such a message from its end: which line, and how many bytes? All orders are padded to the longest, {{100}} tokens. So the bytes
# tell the tensor:

# %%
samples, tokens, bytes_each = 16, 100, 4
for name, width in {"inside the MLP": 1536, "between layers": 576}.items():
    print(f"{name}: {samples * tokens * width * bytes_each:,} bytes")

# %% claims
assert error is not None

# %% [markdown]
# A few megabytes were too much, because hundreds like them are held already: *activations*, for each sample, token and layer.
#
# **Predict.** Now a bigger case: Llama-3-8B, 4 samples of 512 tokens, no checkpointing. Which one change saves the most memory:
# rank 4 instead of 16, an optimizer with 8-bit states, one sample at a time, or checkpointing?
#
# <details><summary>What are <code>loss_chunk</code> and <code>total</code>?</summary>TRL computes the loss in pieces, so that the logits of all {{2048:,}} tokens are never there at once; we count a quarter of them. The total includes what CUDA takes for itself, its <i>context</i>.</details>

# %%
vote = ...  # "rank", "optimizer", "one sample" or "checkpointing"

# %%
script = {"rank": 16, "optimizer": "adamw_torch", "sequence_length": 512, "batch_size": 4}
script["loss_chunk"] = 512  # TRL computes the loss of a few tokens at a time
changes = {"as it is": {}, "rank": {"rank": 4}, "optimizer": {"optimizer": "adamw_8bit"}}
changes |= {"one sample": {"batch_size": 1}, "checkpointing": {"gradient_checkpointing": True}}
needs = {}
for name, change in changes.items():
    needs[name] = estimate(SHAPES["llama-3-8b"], **({"gradient_checkpointing": False} | script | change)).total / 1e9
    print(f"{name:<15}{needs[name]:5.1f} GB")
print(told(vote))

# %% claims
assert sorted(needs, key=needs.get) == ["checkpointing", "one sample", "rank", "optimizer", "as it is"]
assert needs["as it is"] > 15.6 > needs["one sample"]

# %% [markdown]
# **What happened?** The adapter and its optimizer are small, and shrinking them saves little. So mend in this order: checkpointing on; a smaller
# `--batch` with a larger `--accumulate`, which is the same step; a shorter `max_length`, if your samples allow it; then a smaller model. With the first two, the
# step of 16 samples goes through:

# %%
# NBVAL_IGNORE_OUTPUT
# because the machine decides, where memory cannot be limited
mended = attempt(f"python qlora_hf.py {one_step} --batch 4 --accumulate 4", gigabytes=spare)

# %% claims
assert mended is None or "recorded" in mended

# %% [markdown]
# ## 4 · NaN
#
# The largest number of fp16 is {{LARGEST:,}}. What is larger becomes infinity, and infinity minus infinity is **NaN**, *not a number*.
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


def loss_in(model, dtype):
    """The loss of the sample, computed in a dtype, in which the model is left."""
    with torch.no_grad():
        return model.to(dtype)(ids, labels=ids).loss.item()


# %% alt="Largest number after each of 30 layers, on a log scale: below 1,000 until layer 10, then a jump to about 25,000 at layer 11, which stays until the last two layers. The largest fp16 number, 65,504, is a dotted line just above."
_ = plot_peaks(new_axes(height=3), peaks, guess)
print(f"largest: {max(peaks):,.0f}, in layer {peaks.index(max(peaks))}; {told(guess)}")

# %% claims
assert 2 < LARGEST / max(peaks) < 3 and peaks[11] == max(peaks) and peaks[10] < 1000
by_token = dict(outputs_of(model, ids))[layers[11]][0].abs().amax(dim=-1)
assert by_token.argmax() == 0 and by_token[1:].max() < 1000

# %% [markdown]
# **What happened?** Layer 11 writes a few huge numbers, which are carried along nearly to the end. All stand at the first token. There
# an attention head looks that finds nothing to look at, and the huge numbers mark the place. Most language models learn such a
# mark. This one stays below fp16's end, by a factor of less than three. Others do not: Gemma 3 and Qwen2-7B are known for it.
#
# So let us make a louder model. `louder` multiplies the embeddings, and all that layers write, by 4. Each layer first divides what it reads by its
# size (that is what a norm does), so the louder model should say exactly the same. (This loss counts the question, too, unlike section 2's.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
loud = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.float32, trust_remote_code=False).eval()
louder(loud, 4)
found = {}
print(f"{'loss in':<16}{'fp32':>8}{'bf16':>8}{'fp16':>8}")
for name, each in {"the model": model, "the louder one": loud}.items():
    found[name] = [loss_in(each, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    print(f"{name:<16}" + "".join(f"{loss:>8.2f}" for loss in found[name]))

# %% claims
normal, lost = found["the model"], found["the louder one"]
assert abs(lost[0] - normal[0]) < 0.01 and abs(lost[1] - normal[0]) < 0.05 and lost[2] != lost[2]
assert abs(normal[2] - normal[0]) < 0.05

# %% [markdown]
# fp32 and bf16 reach up to 3·10³⁸, and do not care. In fp16 the same model is lost. But where?
#
# **Exercise 9.2 ●●○ (2 minutes).** Write a function that finds the place. It gets the outputs of all modules, in the order in which they were
# computed, and gives the name of the first one that went wrong.


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
# <details><summary>Hint 1</summary>Try your condition on three small tensors: one with a NaN, one with an infinity, one with neither.</details>
# <details><summary>Hint 2</summary>torch can ask both at once: look for a name with <code>finite</code> in <code>dir(torch.Tensor)</code>.</details>

# %%
place = first_bad(outputs_of(loud, ids))
print(place)

# %% claims
assert place in (None, "model.layers.11.mlp.down_proj"), place

# %% [markdown]
# Does your address fit the jump in the figure? `outputs_of` works for your model, too. The loss scaler cannot help, since
# these numbers are too large in the forward pass already. Nor can a smaller learning rate: frozen weights make them. Compute such a
# model in bf16. A T4 has none: take another model there, or `--dtype float32`, eight times slower by the data sheet.
#
# In a training log look twice. The trainer leaves NaN out of the loss that it reports, and what is left is zero:
#
# ```
# {'loss': '0', 'grad_norm': 'nan', 'learning_rate': '0.003', ...}
# ```
#
# A loss of exactly 0 is no triumph. But with a loss scaler a `nan` or `inf` in `grad_norm` now and then is harmless: the step is skipped,
# and the scaler goes on with a smaller number.
#
# ## 5 · A colleague's script
#
# **Exercise 9.3 ●●● (4 minutes).** A colleague has changed the script. On a T4 it stops at its first step. On a newer card it trains, and its
# validation looks wonderful. But new questions get bad answers, and many answers never end. Three lines are to blame. Which? And
# why did the validation not warn?

# %%
show_broken()

# %%
### BEGIN SOLUTION
### STUB: faulty = ...  # the numbers of three lines, such as {12, 34, 56}
faulty = {55, 63, 75}
### END SOLUTION

# %%
check_faulty(faulty)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin with the complaints, and ask of each what in a script could cause it. Only then read.</details>
# <details><summary>Hint 2</summary>One of the lines is in the part "data", two are in the part "training".</details>
# <details><summary>When you have them: which fault did what?</summary>The samples were cut off after {{64}} tokens, so the model learned little of each answer, and never its end: hence the bad answers. The validation looked wonderful because its samples were trained on, so it could not warn. And the adapter got the script's <code>dtype</code>: the loss scaler refuses its fp16 gradients on a T4, and in bf16 small updates vanish.</details>

# %% [markdown]
# ## 6 · A plan for a card of your own
#
# **Memory** you can predict: `estimate`, as above. **Time** is what the card's data sheet lets you work out. Each token costs two
# operations a weight in the forward pass, two more when checkpointing computes it again, and two in the backward pass. (Two
# more would be the weight's own gradient, which a frozen weight does not need.) And three
# times each weight is read in 4 bits, written in 16, and read again:
#
# <details><summary>Where do such numbers stand, and why is a "{{24}} GB" card smaller here?</summary>In the card's data sheet. FLOP/s are in the line "FP16" or "BF16 Tensor Core". Take the <i>dense</i> number: "with sparsity" is double. For a GeForce take "with FP32 accumulate", which is half of the other. Sellers' GB are {{2}}³⁰ bytes, so {{24}} of them are {{24 * 2**30 / 1e9:.1f}} of ours, {{10}}⁹ bytes. Torch may use a little less, and the T4 and the L4 keep some for error correction.</details>

# %%
CARDS = {
    "T4": {"GB": 15.6, "FLOP/s": 65e12, "bytes/s": 320e9},
    "L4": {"GB": 23.5, "FLOP/s": 121e12, "bytes/s": 300e9},
    "RTX 3090": {"GB": 25.3, "FLOP/s": 71e12, "bytes/s": 936e9},
    "H100": {"GB": 84.9, "FLOP/s": 989e12, "bytes/s": 3350e9},
}


def seconds_at_best(shape, card, tokens):
    """Of one step with checkpointing."""
    weights = shape.linear_parameters() + shape.vocab_size * shape.hidden_size
    unpacking = 3 * shape.linear_parameters() * (0.5 + 2 + 2)
    return 6 * weights * tokens / card["FLOP/s"] + unpacking / card["bytes/s"]


# %% [markdown]
# **Predict.** This is the best case, with nothing in the way. TRL was measured on an H100 with LLaMA-7B and 512 tokens a sample. What
# share of the best speed did it reach with one sample a step, and what share with 16 (`more`)?

# %%
prediction = {"one sample": ..., "more": ...}  # ← shares, such as 0.9

# %% machinery "Read the record, and set it beside the best case"
record = json.loads((repository / "data/records/step-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
measured = {(run["who"], run["batch_size"], run["gradient_checkpointing"]): run for run in record["runs"]}
shares = {}
for batch in (1, 4, 16):
    seconds = measured["trl", batch, True]["milliseconds"] / 1000
    best = seconds_at_best(SHAPES["llama-7b"], CARDS["H100"], 512 * batch)
    shares[batch] = best / seconds
    print(
        f"batch {batch:>2}: at best {1000 * best:4.0f} ms, measured {1000 * seconds:5.0f} ms, a share of {shares[batch]:.0%}"
    )
print(*(told(each) for each in prediction.values()), sep=" · ")

# %% claims
assert shares[1] < 0.1 and 0.3 < shares[16] < 0.35

# %% [markdown]
# **What happened?** With little work in a step, the H100 waits for Python, which takes over half a second to start its
# thousands of small operations. (One sample took even longer than four: Python's speed varied.) With 16 samples
# the share is a third. A T4 is 15 times slower, so it hardly waits, and we borrow the H100's third. But this is
# arithmetic: *nobody here has run it on a T4*. After twenty steps your own log knows better. The price is an example, in any
# currency, for all three cards:

# %%
price = 0.35  # ← of an hour, where you rent
samples, epochs, length, batch = 2000, 3, 512, 4
for name in ("T4", "L4", "RTX 3090"):
    for model_name in ("llama-2-7b", "llama-3-8b"):
        step = 3 * seconds_at_best(SHAPES[model_name], CARDS[name], batch * length)
        hours = step * samples * epochs / batch / 3600
        print(
            f"{name:<9}{model_name:<11}{batch * length / step:>6.0f} tokens a second{hours:>6.1f} h{hours * price:>6.2f}"
        )

# %% [markdown]
# <details><summary>Does the L4 really beat the RTX {{3090}}?</summary>On paper it multiplies faster. But the other reads its memory three times as fast, and of the reading our formula counts only the weights. Do not trust the order of the two.</details>
#
# **Exercise 9.4 ●●● (4 minutes).** Make a plan for a card (yours takes five minutes more), your model and
# your amount of data, with the settings in `script`, checkpointing on, and a third of the best speed. `print(*SHAPES)` shows the models' names.

# %%
### BEGIN SOLUTION
### STUB: plan = {
### STUB:     "model": ...,  # a name in SHAPES, of 1.7B parameters or more
### STUB:     "card": ...,  # CARDS["T4"], or a dict of your own
### STUB:     "batch": ...,
### STUB:     "length": ...,  # tokens a sample
### STUB:     "samples": ...,
### STUB:     "epochs": ...,
### STUB:     "gigabytes": ...,  # that it needs, context included
### STUB:     "hours": ...,
### STUB: }
plan = {"model": "qwen2.5-7b", "card": CARDS["T4"], "batch": 2, "length": 512, "samples": 1000, "epochs": 2}
settings = script | {"batch_size": plan["batch"], "sequence_length": plan["length"]}
plan["gigabytes"] = estimate(SHAPES[plan["model"]], **settings).total / 1e9
plan_step = 3 * seconds_at_best(SHAPES[plan["model"]], plan["card"], plan["batch"] * plan["length"])
plan["hours"] = plan_step * plan["samples"] * plan["epochs"] / plan["batch"] / 3600
### END SOLUTION

# %%
check_plan(plan)

# %% [markdown]
# <details><summary>Hint 1</summary><code>estimate(SHAPES[...], **(script | {"batch_size": ..., "sequence_length": ...})).total / 1e9</code>; checkpointing is its default.</details>
# <details><summary>Hint 2</summary>Steps are samples times epochs, divided by the batch.</details>

# %% [markdown]
# With 7B and 8B models leave the learning rate at the script's default, `2e-4`, as in the QLoRA paper. `3e-3` suits our tiny model.
#
# <details><summary>The download ends with an error about a <code>gated repo</code>?</summary>Some models (Llama, Gemma) ask you to accept a licence first: log in on the model's page, read, agree. Then make an access token there (<i>read</i> is enough), and give it to your machine with <code>hf auth login</code>. Look up what the licence says about publishing and commercial use. Apache-2.0 and MIT ask for little.</details>
#
# ## Recap
#
# - One script is enough: 4 bits, an adapter in fp32, chats with a learned completion, checkpoints that outlive the session.
# - Out of memory: checkpointing, then a smaller batch with more accumulation. The rank hardly matters.
# - NaN on an old card is mostly fp16 that overflows. Find the first bad module, then compute in bf16 or change the model.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [10 · Was the prediction right?](10_memory_comparison.ipynb)
