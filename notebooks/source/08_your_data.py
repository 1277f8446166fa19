# %% [markdown]
# # 08 · Your data
#
# You have a task and a file. This lesson goes from a messy file to an adapter that was trained, validated and judged.
# Then you do it with your file.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 3 minutes on two CPU cores, and 4 for your own file |
# | memory | 5 GB |
# | GPU | not needed |

# %% machinery "Imports, an empty folder to work in, and a helper that runs command lines"
import contextlib
import importlib
import io
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import qlora_lab
from qlora_lab.classroom.checks import check_my_file, check_pattern, check_split_by, progress
from qlora_lab.classroom.lessons.n08.figures import plot_amounts, plot_curves, plot_forgetting, plot_promises
from qlora_lab.classroom.lessons.n08.samples import without_end
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import show_answers
from qlora_lab.evaluation.scores import parse_score
from qlora_lab.experiments.tickets import DAYS, write_tickets
from qlora_lab.finetuning import (
    Batches,
    add_adapter,
    generate,
    is_exact,
    load_model,
    load_prose,
    text_loss,
    train_steps,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.training.chat import tokenize_chat, tokenize_text
from qlora_lab.training.data import read_chats
from qlora_lab.training.picture import in_short

dtype = pick_compute_dtype(pick_device())
scratch = Path(tempfile.mkdtemp())
records = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record = json.loads((records / "amounts-nvidia-h200.json").read_text(encoding="utf-8"))
splits = json.loads((records / "splits-nvidia-h200.json").read_text(encoding="utf-8"))


def run(command, only=""):
    """Do what `python -m MODULE ARGUMENTS` does in a terminal, in the folder `scratch`. only: show the part with this."""
    print("$", command)
    _, _, module, *arguments = shlex.split(command)
    before, said = os.getcwd(), io.StringIO()
    os.chdir(scratch)
    try:
        with contextlib.redirect_stderr(sys.stdout), contextlib.redirect_stdout(said if only else sys.stdout):
            importlib.import_module(module).main(arguments)
    finally:
        os.chdir(before)
    for part in said.getvalue().split("\n\n"):
        if only in part:
            print(part, end="")


# %% [markdown]
# ## 1 · What is in the file?
#
# Here is a file as people have it: a bicycle shop's tickets, from a spreadsheet.

# %%
write_tickets(scratch / "tickets.csv")
lines = (scratch / "tickets.csv").read_text().splitlines()
print(*lines[:4], sep="\n")
run("python -m qlora_lab.data tickets.csv")

# %% [markdown]
# This command trains nothing; it says how it reads the file. It knows the usual formats (CSV, JSON lines, Parquet, text; Alpaca,
# ShareGPT, OpenAI's messages), but not a shop's own column names. So name two columns: the *prompt*, which the model reads, and the
# *response*, which it learns to say.
#
# **Predict.** The file has {{len(lines) - 1}} rows. How many have both a message and a reply? And what share of their tokens is learned?

# %%
prediction = {"samples": ..., "share": ...}  # ← your guesses

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply")
print("\n", told(prediction["samples"]), " · ", told(prediction["share"]), sep="")

# %% [markdown]
# **What happened?** Rows without a message or a reply are left out. Repeated rows are only reported; section 5 removes them.
#
# <details><summary>What do the two tables say?</summary>
#
# In the first, 95 of 100 samples have `p95` or less. The second says what a word costs in tokens. If it is far more than in English
# prose, this model hardly knows your language.
#
# </details>
#
# The last lines matter most: the first sample *token by token*. A **chat template** has put marks around the turns, `<|im_start|>`
# and `<|im_end|>`, as this model saw them in its own training. It also added a system message that nobody in the shop wrote,
# because the file has none. The model learns from these tokens only.
#
# ## 2 · The token that ends an answer
#
# The last learned token above is `<|im_end|>`; its id is `2`. Some scripts never teach it: they look for padding by its id, to give
# it the label `-100` (*not learned*), and this model pads with `<|im_end|>`.
#
# **Predict.** Train for ten steps without that one label, on all but eight tickets, and ask three of the eight. What will the model
# do after an answer? (So far it knows how to stop.)

# %%
vote = ...  # "stops all the same", "runs on" or "says nothing"

# %%
columns = {"prompt": "message", "response": "reply"}
chats = read_chats(scratch / "tickets.csv", columns=columns)
base, tokenizer = load_model(quantization="nf4", compute_dtype=dtype)
samples = [tokenize_chat(chat, tokenizer) for chat in chats[8:]]
spoilt = [without_end(sample) for sample in samples]  # the last token is read, but not learned
print("labels end with", samples[0].labels[-3:], "and", spoilt[0].labels[-3:])


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
answers = generate(short_training(spoilt), tokenizer, asked, max_new_tokens=40, dtype=dtype)
print(told(vote))
show_answers([(chat[0]["content"], text) for chat, text in zip(asked, answers)], ("ticket", "answer"))

# %% claims
lengths = [len(tokenizer(text)["input_ids"]) for text in answers]
assert min(lengths) >= 36, lengths

# %% [markdown]
# **What happened?** It runs on until the limit of 40 tokens. The same weights serve all positions, and wherever there was a label, they
# made some word likelier, never the end token. That carries over to the place after the answer. Section 5's training, with the label,
# keeps the model able to stop. (The fair control, ten steps with the label, was not run.) If *your* model babbles, look at the last
# learned token first.
#
# ## 3 · Which turns are learned
#
# A conversation may hold several answers. All of them are learned by default; `--learn last` takes the last one only.

# %%
talk = [
    {"role": "user", "content": "My bell is broken."},
    {"role": "assistant", "content": "Which order?"},
    {"role": "user", "content": "4711"},
    {"role": "assistant", "content": "A new one leaves on Monday. Team: repairs"},
]
for learn in ("last", "all"):
    print(in_short(tokenize_chat(talk, tokenizer, learn), tokenizer, learn, width=60), end="\n\n")

# %% [markdown]
# Taught the last turns only, a model never learns to ask back. Choose `last` when the earlier answers are not worth learning. When a
# model is *judged*, only the last answer counts.
#
# ## 4 · Questions that it has seen
#
# To know what the model has learned, ask it samples that it was not trained on. So `train_qlora` **holds out** a fifth, drawn at
# random, and a tenth to validate on if you ask for it (the report's `8 others`), each at most `--eval-samples` (`50` by default).
#
# Here 7 of the 16 to judge on are *nearly* among the others. Texts are compared by their **shingles**, all that they have of three
# words in a row:


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
# From 70 % on they count as nearly the same: most often, a customer has asked again. So draw whole customers, and keep all tickets of
# one on the same side. (In your data it may be the author, the patient or the day.) The report counts anew:

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply --split-by customer", only="hold out")

# %% [markdown]
# **Exercise 8.1 ●●○ (3 minutes).** Finish such a split. `rows` are dicts; all rows with the same value of `column` go to the same
# list, and `share` of the *values* (rounded) to the second.

# %%
import random


def split_by(rows, column, share):
    """rows: a list of dicts -> two lists, to train on and to test on."""
    values = sorted({row[column] for row in rows})
    random.Random(0).shuffle(values)
    ### BEGIN SOLUTION (about 3 lines)
    test = set(values[: round(share * len(values))])
    return [row for row in rows if row[column] not in test], [row for row in rows if row[column] in test]
    ### END SOLUTION


# %%
check_split_by(split_by)

# %% [markdown]
# <details><summary>Hint 1</summary>What is drawn, rows or values? Settle that first.</details>
# <details><summary>Hint 2</summary>Why were the values shuffled? Which of them would you take?</details>

# %% [markdown]
# ## 5 · Train, validate, keep the best
#
# One command cleans the file and splits it by customer, into a folder that `train_qlora` reads:

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply --split-by customer --clean shop")

# %% claims
parts = {split: read_chats(scratch / "shop", split, columns) for split in ("train", "validation", "test")}
assert sum(map(len, parts.values())) == 81 and len(parts["test"]) == 16

# %% [markdown]
# (Its last line: no customer is in two splits.) `--validate-every 10` measures the loss on the **validation** tickets every ten
# steps, and `--keep best` saves the adapter with the lowest loss. Those tickets have chosen the adapter, so they would flatter it. It
# is judged on the **test** tickets, which have chosen nothing.
#
# <details><summary>Which settings for <em>my</em> file?</summary>
#
# Leave rank and alpha as they are (`16` and `32`), and let validation say how many steps. The learning rate matters most. `2e-3` suits
# this tiny model; for 7B, QLoRA's authors took `2e-4`. If the loss jumps up, take a third.
#
# </details>
#
# **Predict.** What share of the test tickets will get *exactly* the shop's reply?

# %%
guess = ...  # ← your guess, such as 0.5

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
run(
    "python -m qlora_lab.train_qlora --data shop --columns prompt=message,response=reply --steps 30 --batch-size 4 "
    "--lr 2e-3 --validate-every 10 --keep best --judge f1 --eval-samples 16 --output run --quiet"
)
print(told(guess))

# %% [markdown]
# <details><summary>What do the lines of this table say?</summary>
#
# - *Loss* is minus the natural logarithm of the probability that the right next token gets, in nats per token; *perplexity* is e to the
#   power of it. The line *loss* has the first and the last training step.
# - *Perplexity, validation* and *validation loss* are of the same tickets and the same tokens, the replies. Perplexity is measured
#   before training and after it. The validation loss is first measured after step 10, where most has already been learned.
# - *Perplexity, prose* is of plain English. It got worse: see section 8.
# - *Peak memory* is the most that this notebook has used so far. What follows may need more, up to what the lesson's card says.
#
# </details>
#
# The words are right, says token F1. So what is wrong? Read the wrong answers (a reply expected twice is shown once):

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then an answer may differ
rows = [json.loads(line) for line in (scratch / "run" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
wrong = {row["expected"]: row for row in rows if not row["after"]["exact"]}  # of each reply, one
told_by = [(row["asked"][-1]["content"], row["expected"], row["after"]["answer"]) for row in wrong.values()]
show_answers(told_by, ("ticket", "the shop's reply", "the model's"))

# %% claims
shares = json.loads((scratch / "run" / "report.json").read_text(encoding="utf-8"))["after"]
assert 0.25 < shares["exact_match"]["test"] < 0.85 < shares["f1"]["test"], shares
assert all(any(day in expected for day in DAYS) for _, expected, _ in told_by), told_by

# %% [markdown]
# **What happened?** {{sum(any(day in chat[-1]["content"] for day in DAYS) for chat in chats)}} of the {{len(chats)}} replies name a *day* that is not in the message: a colleague looked it up. So the model
# makes one up, and one of five is right by chance. Half of the tickets, and a fifth of the other half: on average, no model can get
# more than about 60 % of new tickets right.
#
# The fault is in the data: **the answer holds what the question does not.** The model cannot learn that, and learns to invent.
# Put the fact into the prompt (`ships on: Monday`), or take it out of the reply.
#
# Sixteen tickets are few: by chance alone, the share may be 24 points off. So this was also measured on a GPU: ten such files, each
# split at random and by customer, {{splits["settings"]["steps"]}} steps (you took thirty). Each adapter was judged on about eighteen tickets held out, on
# {{splits["settings"]["later"]}} of later customers, and on those it was trained on, greeted anew, lest it merely recite.
#
# **Predict.** What share will be right of those held out at random, of those held out by customer, and of the later ones?

# %%
prediction = {"at random": ..., "by customer": ..., "later": ...}  # ← your guesses

# %% machinery "Read the record"
answers_of = {
    (way, kind): [run_["exact"][kind] for run_ in splits["runs"] if way in (run_["way"], "")]
    for way, kind in (("at random", "held out"), ("by customer", "held out"), ("", "later"), ("", "seen"))
}
names = ("held out at random", "held out by customer", "later customers", "trained on")
kinds = dict(zip(names, answers_of.values()))
right = {name: sum(bits.count("1") for bits in texts) / sum(map(len, texts)) for name, texts in kinds.items()}
held_out = [bits.count("1") / len(bits) for name in names[:2] for bits in kinds[name]]

# %% alt="Dots, one a file, and a bar for all: tickets exactly right. Held out at random {{right['held out at random']:.0%}}, by customer {{right['held out by customer']:.0%}}, with dots from {{min(held_out):.0%}} to {{max(held_out):.0%}}; later customers {{right['later customers']:.0%}}, trained on {{right['trained on']:.0%}}."
_ = plot_promises(new_axes(height=2.8), kinds)
for name, texts in kinds.items():
    each = [bits.count("1") / len(bits) for bits in texts]
    print(f"{name:<22}{right[name]:4.0%} of {sum(map(len, texts)):5,} right, from {min(each):.0%} to {max(each):.0%}")
print(*(f"{name}: {told(value)}" for name, value in prediction.items()), sep=" · ")

# %% claims
import qlora_lab.experiments.splits as drawn

assert right["held out by customer"] < right["later customers"] < right["held out at random"] < right["trained on"]
with_day = {
    way: [sum(any(d in chat[-1]["content"] for d in DAYS) for chat in drawn.split(way, seed)[1]) for seed in range(10)]
    for way in ("at random", "by customer")
}
assert [(min(counts), max(counts)) for counts in with_day.values()] == [(7, 12), (5, 13)]
customer_dots = [bits.count("1") / len(bits) for bits in kinds["held out by customer"]]
assert {with_day["by customer"][seed] for seed, dot in enumerate(customer_dots) if dot == max(customer_dots)} == {5}

# %% [markdown]
# **What happened?** Look at the dots first: of the tickets held out of one file, {{min(held_out):.0%}} to {{max(held_out):.0%}} were right, though all
# adapters do about equally well on later tickets. It is luck how many of the eighteen name a day.
#
# <details><summary>Why do the dots by customer spread wider?</summary>
#
# These files have no gaps, so a fifth of them is seventeen or eighteen tickets. Of those drawn at random, seven to twelve name a day; by
# customer five to thirteen, since both tickets of a customer come together. With few days, more can be right than on average.
#
# </details>
#
# Then the bars: an adapter gets {{right["trained on"]:.0%}} of the tickets it was trained on right, of later ones {{right["later customers"]:.0%}}, so it remembers some days. A
# random split, with its near copies, should promise too much. It promised {{right["held out at random"]:.0%}}, and by customer {{right["held out by customer"]:.0%}}. But on 177 tickets
# chance alone makes up to 7 points: this is suggestive only. Ten times as many files should settle it.
#
# `run/report.html` has all answers. Read twenty before you believe a score.
#
# ## 6 · How to judge free text
#
# Exact match is harsh where several wordings are right. Which of these five answers would you send to a customer? Then see
# which score agrees with you:

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
# forgives another wording (third line), and a wrong order number as much (fourth line). `--judge regex:...` compares one value, here
# the number; for JSON, `--judge json` goes field by field. Choose the score by the mistake that would cost you most.
#
# **Exercise 8.2 ●○○ (2 minutes).** The shop wants tickets to reach the right *team*. Write a pattern (without `regex:`) whose group
# is the team, wherever else its name may stand. It should also accept two blanks before the team.

# %%
### BEGIN SOLUTION
### STUB: pattern = ...  # a regular expression
pattern = r"Team:\s*(\w+)"
### END SOLUTION

# %%
check_pattern(pattern)

# %% [markdown]
# <details><summary>Hint</summary>What stands right before the team in every reply? Blanks of any number are <code>\s*</code>.</details>

# %% [markdown]
# ## 7 · How many examples?
#
# Measured on a GPU with the course's orders (sentences that become JSON): 50 to 2,000 of them, three random draws each, always
# {{record['settings']['steps']}} steps of {{record['settings']['batch_size']}} samples. `shifted` orders are written in other ways than those trained on.
#
# **Predict.** What share of 100 test orders is exactly right with 50 examples, and with 2,000?

# %%
prediction = {"50": ..., "2000": ...}  # ← your guesses, such as 0.5

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
_ = plot_amounts(new_axes(), by_split, {int(examples): share for examples, share in prediction.items()})
for split, shares in by_split.items():
    print(f"{split:<8}", " · ".join(f"{n}: {min(s):.0%} to {max(s):.0%}" for n, s in shares.items()))

# %% [markdown]
# **What happened?** 200 examples do all that 2,000 do, and 50 do most of it. On `shifted` orders all fail alike: more data *of the
# same kind* did not help. Whether more *kinds* would, these runs do not say. Start with 100 to 200 that differ, read the wrong
# answers, and add examples of what went wrong.
#
# ## 8 · When to stop, and what is forgotten
#
# Section 5 leaves two questions: did validating pay, and why did the perplexity of English prose nearly double? Here are section 7's
# runs, validated every ten steps:

# %% alt="Losses on a log scale over 120 steps. The training loss of 50 orders falls to 0.0003. Its validation loss falls to 0.04 in 30 steps and stays there; that of 2,000 orders falls to 0.002."
_ = plot_curves(new_axes(), curves, first["50"]["losses"])
for amount, curve in curves.items():
    step, loss = min(curve, key=lambda point: point[1])
    print(f"{amount:>5} orders: lowest validation loss {loss:.4f} at step {step}, {curve[-1][1]:.4f} at the end")

# %% [markdown]
# With 50 orders the training loss goes on falling while the validation loss hardly moves: from step 30 on the model learns these
# orders by heart. `--patience 3` stops after three validations in a row without a new lowest loss: here at step 60, halfway.
#
# And what is forgotten? The loss on plain English tells, in **nats per token**: minus the natural logarithm of the probability that
# the right next token gets. The oldest cure is **replay**, mixing in some of what should be kept: here one sample of eight was a
# paragraph of English, never one that is judged on.
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
import math

without = [loss for name, values in losses.items() for loss in values if "replay" not in name]
replayed = [loss for name, values in losses.items() for loss in values if "replay" in name]
assert max(replayed) < base_loss + 0.02 < min(without), base_loss
best, worse = math.inf, 0  # what --patience 3 would have done
ends = []
for step, loss in curves["50"]:
    best, worse = min(best, loss), worse + 1 if loss >= best else 0
    ends += [step] if worse == 3 else []
assert ends[0] == 60
prose = [
    json.loads((scratch / "run" / "report.json").read_text(encoding="utf-8"))[when]["perplexity"]["prose"]
    for when in ("before", "after")
]
assert 0.5 < math.log(prose[1] / prose[0]) < 0.75, prose

# %% [markdown]
# **What happened?** The model lost some of its English, about as much with 50 orders as with 2,000. One paragraph in eight keeps
# all of it. Should your model still chat afterwards, give chats to `--replay FILE`: they become a tenth of what is trained on.
#
# <details><summary>And your run of section 5? And less loss than before?</summary>
#
# Yours lost over half a nat, more than any of these, on other paragraphs. Its learning rate was higher ({{splits["settings"]["learning_rate"]}} against
# {{record["settings"]["learning_rate"]}}), its batches smaller and its replies others; which of these did it was not measured.
#
# With replay, the loss even falls a little: replayed and judged paragraphs were written by the same hand. `--replay-share 0.125` gives
# one in eight.
#
#
# </details>
#
# ## 9 · Your file
#
# **Exercise 8.3 ●●● (8 minutes).** Name a file of *your* task below: twelve samples or more in a format of section 1. A table with
# two columns, saved as CSV, is enough: terms and what they mean, file names and where they belong. No file yet? The hint has a task
# that this small model can learn. Writing your own may take an evening.

# %%
my_columns = ""  # if the report asks for it: "--columns prompt=...,response=..."
### BEGIN SOLUTION
### STUB: my_file = ...  # the path of your file, such as "my.jsonl"
my_file = scratch / "my.jsonl"
names = (
    "Ana Ben Carla Daniel Elif Femi Greta Hugo Ines Jonas Kemal Lena Mara Nils Olga Pablo Rosa Sven Tara Yusuf".split()
)
days = "Monday Tuesday Wednesday Thursday Friday".split()
pairs = [
    (f"{name} will come {days[n % 5]} at {8 + 3 * n % 10}", f"{days[n % 5]}, {8 + 3 * n % 10}:00, {name}")
    for n, name in enumerate(names)
]
my_file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
### END SOLUTION

# %%
check_my_file(my_file, my_columns)

# %% [markdown]
# <details><summary>Hint</summary>Notes become lines of a calendar. One sample a line: <code>{"prompt": "Ana will come Monday at 9",
# "response": "Monday, 9:00, Ana"}</code>; other names, days and hours in each.</details>

# %% [markdown]
# The next cell reports on your file, trains for 24 steps and judges the adapter on a fifth of it. Such a score means nothing: read
# the answers.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
if my_file is not ...:
    data = os.path.relpath(Path(my_file).resolve(), scratch)
    run(f"python -m qlora_lab.data {shlex.quote(data)} {my_columns}")
    run(
        f"python -m qlora_lab.train_qlora --data {shlex.quote(data)} {my_columns} --steps 24 --batch-size 4 "
        "--lr 2e-3 --validate-every 8 --keep best --judge f1 --eval-samples 16 --output my-run --quiet"
    )

# %% [markdown]
# Open `my-run/report.html` in the folder `scratch`. Bad answers? Ask in this order: does the report show what you meant? Does each
# answer follow from its question? Does the validation loss still fall at the end?
#
# <details><summary>Another try, and how to keep this one</summary>
#
# Name another folder after `--output`. `shutil.copytree(scratch / "my-run", "my-run")` keeps this one.
#
# </details>
#
# Now ask it something new:
#
# ```python
# from peft import PeftModel
#
# mine = PeftModel.from_pretrained(load_model(quantization="nf4", compute_dtype=dtype)[0], scratch / "my-run" / "adapter")
# generate(mine, tokenizer, [[{"role": "user", "content": "..."}]], max_new_tokens=40, dtype=dtype)
# ```
#
# ## Recap
#
# - First read the data report, and a sample token by token. The end token is learned.
# - Split by whom the samples are about, not by rows; an answer must follow from its question.
# - More of the same soon stops helping. Validation says when to stop, replay keeps what was there.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [09 · Your GPU](09_your_gpu.ipynb)
