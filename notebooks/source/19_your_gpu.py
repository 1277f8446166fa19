# %% [markdown]
# # 19 · Your GPU
#
# How do you do all this without the course's package, on your own card? You get one script of seventy lines,
# written with Hugging Face's libraries alone, and it is yours to copy. You read it, run it, break it in the ways
# in which it will break one day anyway, and mend it. Then you plan a training of a 7B or 8B model: memory, hours and price.
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
from qlora_lab.classroom.lessons.n19.figures import LARGEST, plot_lives, plot_peaks, told
from qlora_lab.classroom.lessons.n19.machinery import attempt, edit, louder, outputs_of, read, session, work_in
from qlora_lab.classroom.lessons.n19.suspects import show_broken
from qlora_lab.classroom.plots import new_axes
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
# adapter beside them, and *TRL* trains: its `SFTTrainer` (supervised fine-tuning) learns from chats. You find the script
# in `examples/qlora_hf.py`. Here are its parts, without imports and command line.

# %%
read("numbers")

# %% [markdown]
# **Which numbers?** NVIDIA's cards since 2020 multiply in bf16. The T4, which Colab lends for free, is older and has fp16
# only. Ask torch whether a T4 supports bf16, and it says yes: it would imitate it, slowly. Hence the long name in brackets.

# %%
read("model")

# %% [markdown]
# **The model** has the settings that you know. Without them you get FP4 and slow fp32, and nobody warns you.

# %%
read("data")

# %% [markdown]
# **The data.** TRL wants two lists of messages: `prompt` is read, `completion` is learned. TRL writes both with the model's own chat template. The token that ends the answer is learned, even if the same token fills up short
# samples (the *padding*). One sample in ten is kept aside for validation.
#
# **Exercise 19.1 ●●○ (4 minutes).** A library's help desk noted whole conversations:
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
# The loop that makes the adapter fp32 has a story. TRL turns the adapter of a 4-bit model into bf16, which keeps 8 significant bits of a
# number: a small update is rounded away. On a T4 the training would even stop at its first step, with an error that
# ends in `not implemented for 'BFloat16'`. The reason is the **loss scaler**, which every training in fp16 needs. Gradients are often smaller than the smallest number of fp16, 6·10⁻⁸. So the loss is multiplied by a large number, 65,536 at first,
# before the backward pass, and the gradients are divided by it afterwards. torch does that for fp32 gradients only.

# %%
read("answer")

# %% [markdown]
# ## 2 · Run it, and pull the plug
#
# Borrowed GPUs are taken back after some hours, whatever you are doing. Let us practise it: 16 steps, with a checkpoint and
# a validation after every fourth. As soon as step 10 is done, the process is killed.
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
# Two things spoil it. Another `--steps` is another schedule. And if the output folder is on the borrowed machine, it is gone with
# the session: on Colab, mount your Drive and write there.
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
# Read such a message from its end. Which line was it, and how many bytes did it want? The bytes tell which tensor it was:

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

# %% [markdown]
# **What happened?** Layer 11 writes a few huge numbers, which are carried along nearly to the end. Most language models have learned
# to do this. This one stays below fp16's end, by a factor of less than three. Others do not: Gemma 3 is known for it.
#
# So let us make a louder model. `louder` multiplies all that layers write by 4. Each layer first divides what it reads by its
# size (that is what a norm does), so the louder model should say exactly the same:

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
# **Exercise 19.2 ●●○ (2 minutes).** Write a function that finds the place. It gets the outputs of all modules, in the order in which they were
# computed, and gives the name of the first one in which not every number is finite.


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
# <details><summary>Hint</summary><code>tensor.isfinite()</code> is true where a number is neither NaN nor infinite; <code>.all()</code> asks all of them.</details>

# %%
place = first_bad(outputs_of(loud, ids))
print(place)

# %% claims
assert place in (None, "model.layers.11.mlp.down_proj"), place

# %% [markdown]
# The address is that of the jump in the figure, `model.layers.11.mlp.down_proj`, and `outputs_of` works for your model, too. The loss scaler cannot help, since
# these numbers are too large in the forward pass already. Compute such a model in bf16, or take another one.
#
# In a training log you have to look twice. The trainer leaves NaN out of the loss that it reports, and what is left is zero:
#
# ```
# {'loss': '0', 'grad_norm': 'nan', 'learning_rate': '0.003', ...}
# ```
#
# A loss of exactly 0 is no triumph. But with a loss scaler a `nan` or `inf` in `grad_norm` now and then is harmless: its number was too large, the step
# is skipped, and the next one takes a smaller number.
#
# ## 5 · A colleague's script
#
# **Exercise 19.3 ●●● (4 minutes).** A colleague has changed the script. On a T4 it stops at its first step. On a newer card it trains, and its
# validation looks wonderful. But new questions get bad answers, and many answers never end. Three lines are to blame. Which?

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
# <details><summary>Hint 1</summary>One fault for each complaint: the first step, the validation, the answers' ends.</details>
# <details><summary>Hint 2</summary>Compare the copy with section 1, part by part.</details>

# %% [markdown]
# ## 6 · A plan for a card of your own
#
# **Memory** you can predict: `estimate`, as above. **Time** is what the card's data sheet lets you work out. Each token costs two
# operations a weight in the forward pass, two more when checkpointing computes it again, and two in the backward pass. And three
# times each weight is read in 4 bits, written in 16, and read again:

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
# thousands of small operations. With 16 samples the share is a third. A T4 is 15 times slower, so it hardly waits. For a slow card
# a third is a fair plan. But this is arithmetic: *nobody here has run it on a T4*. After twenty steps your own log knows better.

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
# **Exercise 19.4 ●●● (4 minutes).** Make a plan for your card (or one that you could rent), your model and your amount of data, with the
# settings in `script`, checkpointing on, and a third of the best speed.

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
# With 7B and 8B models leave the learning rate at 2e-4 for a first try; the 3e-3 above is for our tiny model and its few steps.
#
# **Gated models.** Some models (Llama, Gemma) ask you to accept a licence first: log in on the model's page, read, agree. Then make an
# access token there (*read* is enough), and give it to your machine with `hf auth login`. Without it the download ends with an error about a `gated repo`. Look up what
# the licence says about publishing and commercial use. Apache-2.0 and MIT ask for little.
#
# ## 7 · And ours?
#
# The course's command does the same job. On the same H100, in tokens a second:

# %% machinery "Read the same record"
print(f"{'samples a step':<16}{'TRL':>8}{'PEFT':>8}{'--fast':>8}")
for batch in (1, 4, 16):
    speeds = [measured[who, batch, True]["tokens_per_second"] for who in ("trl", "standard", "fast")]
    print(f"{batch:<16}" + "".join(f"{speed:>8,.0f}" for speed in speeds))

# %% claims
gain = {
    b: measured["fast", b, True]["tokens_per_second"] / measured["trl", b, True]["tokens_per_second"]
    for b in (1, 4, 16)
}
assert gain[1] > 10 and gain[4] > 3 and 1.8 < gain[16] < 2

# %% [markdown]
# `python -m qlora_lab.train_qlora --fast` starts the whole step as one recorded list of operations, so that Python is out of the
# way. It needs a LLaMA-like model and a card with bf16; elsewhere it says why not. Plain Hugging Face
# runs everywhere, and everybody can help you with it, so start there.
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
# **Next:** [10 · Which knob buys what?](10_training_tricks.ipynb)
