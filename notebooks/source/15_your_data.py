# %% [markdown]
# # 15 · Your data
#
# You have a task of your own and a file. How do you teach it to a model? This lesson goes all the way from a messy file to an
# adapter that was trained, validated and judged. Then you do it with your file.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 8 minutes on two CPU cores |
# | memory | 5 GB |
# | GPU | not needed |

# %% machinery "Imports, an empty folder to work in, and a helper that runs command lines"
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import qlora_lab
from qlora_lab.classroom.checks import check_my_file, check_pattern, check_split_by, progress
from qlora_lab.classroom.lessons.n15.figures import plot_amounts, plot_curves, plot_forgetting, told
from qlora_lab.classroom.lessons.n15.tickets import cleaned, read_rows, split_customers, tickets, write_rows
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.widgets import show_answers
from qlora_lab.evaluation.scores import parse_score
from qlora_lab.finetuning import (
    Batches,
    add_adapter,
    generate,
    is_exact,
    load_lora,
    load_model,
    load_prose,
    text_loss,
    train_steps,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.training.chat import tokenize_chat, tokenize_text
from qlora_lab.training.data import stream_samples
from qlora_lab.training.likeness import Twins
from qlora_lab.training.picture import in_short

dtype = pick_compute_dtype(pick_device())
scratch = Path(tempfile.mkdtemp())
record_file = Path(qlora_lab.__file__).parents[1] / "data" / "records" / "amounts-nvidia-h200.json"
record = json.loads(record_file.read_text(encoding="utf-8"))


def run(command):
    """Do what `python -m MODULE ARGUMENTS` does in a terminal, in the folder `scratch`."""
    print("$", command)
    _, _, module, *arguments = shlex.split(command)
    before = os.getcwd()
    os.chdir(scratch)
    try:
        with contextlib.redirect_stderr(sys.stdout):
            importlib.import_module(module).main(arguments)
    finally:
        os.chdir(before)


# %% [markdown]
# ## 1 · What is in the file?
#
# Here is a file as people have it: a bicycle shop's support tickets, exported from a spreadsheet.

# %%
write_rows(scratch / "tickets.csv", tickets())
print(*(scratch / "tickets.csv").read_text().splitlines()[:4], sep="\n")
run("python -m qlora_lab.data tickets.csv")

# %% [markdown]
# This command trains nothing. It reads, and says what it understood. It knows the usual formats (JSON lines, JSON arrays, CSV,
# Parquet, text; Alpaca, ShareGPT, OpenAI's messages), but it does not guess what a shop's own column names mean. So tell it
# which column is the *prompt*, what the model reads, and which the *response*, what it learns to say.
#
# **Predict.** The file has {{len(tickets())}} rows. How many will be left to train on? And what share of their tokens is learned?

# %%
prediction = {"samples": ..., "share": ...}  # ← your guesses

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply")
print("\n", told(prediction["samples"]), " · ", told(prediction["share"]), sep="")

# %% [markdown]
# **What happened?** Rows without a message or a reply are left out, since they teach nothing. Some rows stand there twice. The
# last lines matter most: the first sample *token by token*. A **chat template** has put marks around the turns, `<|im_start|>`
# and `<|im_end|>`, as this model saw them in its own training. It has also added a sentence that nobody in the shop wrote, *You
# are a helpful AI assistant named SmolLM*, because the file has no system message. Only the line `learned` is graded. If a date
# or half of the question is missing in these lines, no training will bring it back.
#
# ## 2 · The token that ends an answer
#
# The last learned token above is `<|im_end|>`. Some scripts never teach it: they mask padding by comparing token ids, and this
# model's padding token *is* `<|im_end|>`; or they format the text by hand and forget it.
#
# **Predict.** Train twice, for ten steps, the same but for that one label. What will the model without it do? (It was taught to
# stop long before it came to you.)

# %%
vote = ...  # "stops all the same", "runs on" or "says nothing"

# %%
columns = {"prompt": "message", "response": "reply"}
samples_of = dict(stream_samples(scratch / "tickets.csv", "train", columns))
chats = list(samples_of.values())
base, tokenizer = load_model(quantization="nf4", compute_dtype=dtype)
samples = [tokenize_chat(chat, tokenizer) for chat in chats[8:]]


def without_end(sample):
    """The same sample; the last token is read, but not learned."""
    last = len(sample.ids) - 1
    return dataclasses.replace(sample, between=((last, last + 1),))


print("labels end with", samples[0].labels[-3:], "and", without_end(samples[0]).labels[-3:])


# %% machinery "A short training of a fresh adapter"
def short_training(samples, steps=10):
    model = add_adapter(load_model(quantization="nf4", compute_dtype=dtype)[0], rank=16, alpha=32)
    batches = Batches(samples, batch_size=4)
    rates = {"learning_rate": 2e-3, "compute_dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
    for _ in train_steps(model, batches, steps=steps, **rates):
        pass
    return model


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
asked = [chat[:-1] for chat in chats[:3]]
answers = {}
for name, taught in {"end learned": samples, "end not learned": [without_end(s) for s in samples]}.items():
    answers[name] = generate(short_training(taught), tokenizer, asked, max_new_tokens=40, dtype=dtype)
print(told(vote))
show_answers(zip([chat[0]["content"] for chat in asked], *answers.values()), ("ticket", *answers))

# %% claims
lengths = {name: [len(tokenizer(a)["input_ids"]) for a in texts] for name, texts in answers.items()}
assert min(lengths["end not learned"]) >= 36 and max(lengths["end learned"]) < 30, lengths

# %% [markdown]
# **What happened?** Ten steps were enough to unlearn stopping. They made the shop's words likelier, and the end token nowhere. All
# probabilities sum to one, so it lost. The model goes on until the limit of 40 tokens. If *your* model babbles after its answer, look at the
# last learned token first.
#
# ## 3 · Which turns are learned
#
# A conversation may hold several answers. All of them are learned by default. `--learn last` takes the last one only;
# `--learn everything` also learns to write the customer's part, which is rarely wanted.

# %%
talk = [
    {"role": "user", "content": "My bell is broken."},
    {"role": "assistant", "content": "Which order?"},
    {"role": "user", "content": "4711"},
    {"role": "assistant", "content": "A new one leaves on Monday. Team: repairs"},
]
for learn in ("last", "all", "everything"):
    print(in_short(tokenize_chat(talk, tokenizer, learn), tokenizer, learn, width=60), end="\n\n")

# %% [markdown]
# Taught the last turns only, a model is never graded on asking back. Choose `last` when the earlier answers are not ones that you
# want to hear again: an old bot's, say.
#
# ## 4 · Questions that it has seen
#
# To know what the model has learned, ask it samples that were kept aside, usually drawn at random. But the report said that some
# rows are *nearly* among the others. Texts are compared by their **shingles**, all that they have of three words in a row:


# %%
def shingles(text):
    words = text.lower().split()
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}


one, other = (
    shingles("Hello, where is my lamp? I paid last week"),
    shingles("Please, where is my lamp? I paid last week"),
)
print(f"{len(one & other)} of {len(one | other)} shingles are in both: {len(one & other) / len(one | other):.0%} alike")

# %% [markdown]
# At 70 % or more the library calls them **twins**, often the same customer asking again. Draw 20 tickets. How many have a twin among
# the others?

# %%
places = list(samples_of.items())
drawn, rest = places[:20], places[20:]  # the file's order is random already
twins = Twins(drawn)
for where, chat in rest:
    twins.see(where, chat)
print(f"{len(twins.found())} of 20 have a twin that would be trained on")

# %% [markdown]
# One cure is to keep one of each:

# %%
clean = cleaned(scratch / "tickets.csv", "prompt=message,response=reply", scratch / "clean.jsonl")

# %% [markdown]
# A better one is another way to draw: choose *customers*, and let all rows of a customer go to the same side. In your data it may
# be the author, the document, the patient or the day.
#
# **Exercise 15.1 ●●○ (4 minutes).** Write such a split. `rows` are dicts; all rows with the same value of `column` go to the same
# list, and about `share` of the rows to the second. Draw at random, with a seed.

# %%
import random


def split_by(rows, column, share):
    """rows: a list of dicts -> two lists, to train on and to test on."""
    ### BEGIN SOLUTION (about 6 lines)
    values = sorted({row[column] for row in rows})
    random.Random(0).shuffle(values)
    test = set()
    while sum(row[column] in test for row in rows) < share * len(rows):
        test.add(values.pop())
    return [row for row in rows if row[column] not in test], [row for row in rows if row[column] in test]
    ### END SOLUTION


# %%
check_split_by(split_by)

# %% [markdown]
# <details><summary>Hint 1</summary>First make a list of the different values of the column, and shuffle that.</details>
# <details><summary>Hint 2</summary>Move values to the test side until enough rows have one of them.</details>

# %% [markdown]
# ## 5 · Train, validate, keep the best
#
# A folder with `train.csv`, `validation.csv` and `test.csv` is read as three splits. These are split by customer:

# %%
splits = split_customers(read_rows(scratch / "tickets.csv"), train=28, validation=8)
for split, rows in splits.items():
    write_rows(scratch / "shop" / f"{split}.csv", rows)
    print(f"{split:<12}{len(rows):>3} rows of {len({row['customer'] for row in rows})} customers")

# %% claims
assert len({row["customer"] for rows in splits.values() for row in rows}) == 64
assert sum(len({row["customer"] for row in rows}) for rows in splits.values()) == 64

# %% [markdown]
# `--validate-every 10` measures the loss on the validation tickets every ten steps, `--keep best` saves the adapter for which it
# was the lowest, and `--judge f1` adds a score that section 6 explains.
#
# **Predict.** What share of the test tickets will get *exactly* the shop's reply? And what share of tickets that were trained on,
# with only the greeting changed?

# %%
prediction = {"test": ..., "seen": ...}  # ← your guesses

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
run(
    "python -m qlora_lab.train_qlora --data shop --columns prompt=message,response=reply --steps 40 --batch-size 4 "
    "--lr 2e-3 --validate-every 10 --keep best --judge f1 --eval-samples 20 --output run --quiet"
)

# %% [markdown]
# Now the adapter from that folder is asked tickets that it was trained on, with another greeting:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then an answer may differ
seen = {}
for question, answer in (chat for _, chat in stream_samples(scratch / "shop", "train", columns)):
    text = re.split("[,:] ", question["content"], maxsplit=1)[1]  # without the greeting
    seen[text] = ([{"role": "user", "content": f"Dear shop, {text}"}], answer["content"])
model = load_lora(load_model(quantization="nf4", compute_dtype=dtype)[0], scratch / "run" / "adapter")
said = generate(model, tokenizer, [asked for asked, _ in seen.values()], max_new_tokens=32, dtype=dtype)
report = json.loads((scratch / "run" / "report.json").read_text())
exact = {"test": report["after"]["exact_match"]["test"]}
exact["seen"] = sum(is_exact(a, expected) for a, (_, expected) in zip(said, seen.values())) / len(said)
for name, share in exact.items():
    print(f"{name:<6}{share:5.0%} exactly right; {told(prediction[name])}")

# %% [markdown]
# **What happened?** A reply holds things that stand in the message (the item, the order), things that follow from it (the team),
# and, for two teams of four, a day. The day does *not* follow from the message: a colleague looked it up. So on new tickets the
# model makes one up, fluently: most words are right, as token F1 says, and the day is not. Of tickets that it was trained on it
# remembers some days, so {{exact['seen']:.0% ±0.2}} instead of {{exact['test']:.0% ±0.2}} are exact. (With some twenty tickets a side, part of that
# may be chance.) A random split mixes both kinds, and promises more than tomorrow's tickets will get.
#
# The fault is in the data: **the answer holds what the question does not.** The model cannot learn that, and learns to invent.
# Put the fact into the prompt (`ships on: Monday`), or take it out of the reply.
#
# `run/report.html` opens in any browser: the losses as curves, each answer before and after beside the expected one. Read
# twenty answers before you believe a score.
#
# ## 6 · How to judge free text
#
# Exact match is harsh where several wordings are right. Here are four scores, from 0 to 1, of five answers:

# %%
reference = "The invoice for order 17 is attached. Team: office"
tried = [
    reference,
    "the invoice for order 17 is attached! team: office",
    "Your invoice (order 17) is attached. Team: office",
    "The invoice for order 71 is attached. Team: office",
    "Sorry about that. Team: office",
]
scores = [parse_score(name) for name in ("normalized", "f1", r"regex:order (\d+)")]

# %% machinery "A table of the scores"
print("exact  normalized  f1    regex")
for answer in tried:
    normal, f1, regex = (score.of(answer, reference) for score in scores)
    print(f"{is_exact(answer, reference):<7}{normal:<12.0f}{f1:<6.2f}{regex:<5.0f} {answer}")

# %% [markdown]
# **Normalized match** ignores case, punctuation and articles. **Token F1** counts the words that answer and reference share. It
# forgives another wording (third line), and the wrong order number just as much (fourth line): one word of eight, articles aside. A
# regular expression asks for one value, here the order number: `--judge 'regex:order (\d+)'`. For answers in JSON, `--judge
# json` compares field by field. Choose the score by the mistake that would cost you most.
#
# **Exercise 15.2 ●○○ (3 minutes).** The shop wants tickets to reach the right *team*. Write a pattern (without `regex:`) whose group
# is the team, wherever else its name may stand in a reply. It should also accept two blanks before the team.

# %%
### BEGIN SOLUTION
### STUB: pattern = ...  # a regular expression
pattern = r"Team:\s*(\w+)"
### END SOLUTION

# %%
check_pattern(pattern)

# %% [markdown]
# <details><summary>Hint</summary>Inside the pattern, round brackets make the group; <code>\w+</code> is a word.</details>

# %% [markdown]
# ## 7 · How many examples?
#
# This was measured on a GPU with the course's orders (sentences that become JSON): 50,
# 200, 500 or 2,000 of them, three random draws each, always {{record['settings']['steps']}} steps of
# {{record['settings']['batch_size']}} samples. `shifted` orders are written in other ways than those trained on.
#
# **Predict.** What share of 100 test orders is exactly right with 50 examples, and with 2,000?

# %%
prediction = {50: ..., 2000: ...}  # ← your guesses, such as 0.5

# %% machinery "Read the record"
plain = [run_ for run_ in record["runs"] if "replay" not in run_["amount"]]
by_split = {split: {} for split in ("test", "shifted")}
for run_ in plain:
    for split in by_split:
        by_split[split].setdefault(int(run_["amount"]), []).append(run_["exact"][split].count("1") / 100)
first = {run_["amount"]: run_ for run_ in plain if run_["seed"] == 0}
curves = {amount: first[amount]["curve"] for amount in ("50", "2000")}
losses = {}
for run_ in record["runs"]:
    amount, _, replay = run_["amount"].partition(" ")
    losses.setdefault(f"{int(amount):,} orders {replay}".strip(), []).append(run_["after"]["prose"])

# %% alt="Dots and lines over the number of examples, 50 to 2,000. Test orders: 79 to 90 % exactly right with 50, 99 to 100 % from 200 on. Shifted orders: between 14 and 35 %, without a trend."
_ = plot_amounts(new_axes(), by_split, prediction)
for split, shares in by_split.items():
    print(f"{split:<8}", " · ".join(f"{n}: {min(s):.0%} to {max(s):.0%}" for n, s in shares.items()))

# %% [markdown]
# **What happened?** 200 examples do all that 2,000 do, and 50 do most of it. And on `shifted` orders all fail alike: more
# data *of the same kind* did not help. (120 steps see 960 of the 2,000.) The 2,000 orders follow twelve patterns, and 200 show each of them many times. So
# do not ask how many examples you have, but how many *kinds*. Start with 100 to 200 that differ, read the wrong answers, and
# add examples of what went wrong.
#
# ## 8 · When to stop, and what is forgotten
#
# The same runs, validated every ten steps:

# %% alt="Losses on a log scale over 120 steps. The training loss of 50 orders falls to 0.0003. Its validation loss falls to 0.04 in 30 steps and stays there; that of 2,000 orders falls to 0.002."
_ = plot_curves(new_axes(), curves, first["50"]["losses"])
for amount, curve in curves.items():
    step, loss = min(curve, key=lambda point: point[1])
    print(f"{amount:>5} orders: lowest validation loss {loss:.4f} at step {step}, {curve[-1][1]:.4f} at the end")

# %% [markdown]
# With 50 orders the training loss goes on falling while the validation loss hardly moves: from step 30 on the model learns these
# orders by heart, which does not help with others. `--patience 3` stops after three validations in a row without any gain. Where
# the validation loss *rises*, `--keep best` saves the adapter of the lowest point.
#
# And what is forgotten? The loss on paragraphs of plain English tells, in **nats per token**: minus the natural logarithm of the
# probability that the right next token gets. **Replay** is the oldest cure: mix in some of what should
# not be forgotten. Here one sample of eight was such a paragraph, never one that is judged on.
#
# **Predict.** Without replay, what is the loss on English after training?

# %%
# NBVAL_IGNORE_OUTPUT
# because the dtype depends on the machine
english = [tokenize_text(text, tokenizer) for text in load_prose()[1::2]]
base_loss = text_loss(base, english, dtype=dtype).per_token
print(f"before training: {base_loss:.2f} nats per token")

# %%
guess = ...  # ← your guess, in nats per token

# %% alt="Dots: loss on plain English after training, three seeds each. The base is the dotted line at {{base_loss:.1f ±0.1}}. With 50 to 2,000 orders it is 3.7 to 4.0; with replay of one in eight 3.5 to 3.6."
_ = plot_forgetting(new_axes(height=2.8), losses, base_loss, guess)
for name, values in losses.items():
    print(f"{name:<22}{min(values):.2f} to {max(values):.2f}")
print(told(guess))

# %% claims
without = [loss for name, values in losses.items() for loss in values if "replay" not in name]
replayed = [loss for name, values in losses.items() for loss in values if "replay" in name]
assert max(replayed) < base_loss + 0.02 < min(without), base_loss

# %% [markdown]
# **What happened?** The model lost some of its English, about as much with 50 orders as with 2,000. One paragraph in eight keeps
# all of it, and the orders are as right as before (99 or 100 of 100). The loss is even a little below the base's: replayed and
# judged paragraphs were written by the same hand. If your model should still chat afterwards, add such samples to your
# file, and judge on others.
#
# ## 9 · Your file
#
# **Exercise 15.3 ●●● (5 minutes).** Collect at least twelve samples of *your* task (with twenty or more, some can be held out to
# validate), in a format of section 1, and name the file below. JSON lines with `prompt` and `response` are the simplest. No
# idea? Take questions that you were asked this week, and your answers.

# %%
my_columns = ""  # if the report asks for it: "--columns prompt=...,response=..."
### BEGIN SOLUTION
### STUB: my_file = ...  # the path of your file, such as "my.jsonl"
my_file = scratch / "my.jsonl"
things = (
    "tent boat lamp rope stove map knife axe spade torch kayak flute drum bell sled skate oar sail net hook".split()
)
pairs = [
    (f"{n + 3} {thing}s at {5 * n + 2} euros each", f"{(n + 3) * (5 * n + 2)} euros") for n, thing in enumerate(things)
]
my_file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
### END SOLUTION

# %%
check_my_file(my_file, my_columns)

# %% [markdown]
# <details><summary>Hint</summary>One sample a line: <code>{"prompt": "what you get", "response": "what you want back"}</code>.</details>

# %% [markdown]
# If the check finds repeats or twins, clean the file as in section 4 (the clean one needs no columns). The next cell reports on your file, trains for 30 steps and judges the adapter on samples
# that it holds out.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
if my_file is not ...:
    data = os.path.relpath(Path(my_file).resolve(), scratch)
    run(f"python -m qlora_lab.data {shlex.quote(data)} {my_columns}")
    run(
        f"python -m qlora_lab.train_qlora --data {shlex.quote(data)} {my_columns} --steps 30 --batch-size 4 "
        "--validate-every 10 --keep best --judge f1 --eval-samples 20 --output my-run --quiet"
    )

# %% [markdown]
# Open `my-run/report.html` in the folder `scratch`, and read. If the score is bad, look in this order: does the report show what
# you meant? Does each answer follow from its question? Are there enough *kinds* of samples? Were there enough steps, or does
# the validation loss still fall at the end? `shutil.copytree(scratch / "my-run", "my-run")` keeps the run. For another try, name another folder after `--output`.
#
# ## Recap
#
# - Read the data report, and the first sample token by token, before you train. The end token is learned.
# - Split by who or what the samples are about, not by rows; an answer must follow from its question.
# - More kinds of samples help, more of the same kind do not. Validation says when to stop, replay keeps what was there.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()
