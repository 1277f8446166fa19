# %% [markdown]
# # 08 · Your data
#
# You have a task and a file. Here a messy file becomes a data set, a trained adapter and a judgement. At the end you do
# the same with yours.
#
# | you need | |
# |---|---|
# | time | 37 minutes |
# | computing | up to 3 minutes on two CPU cores, and 3 for your own file |
# | memory | 4 GB |
# | GPU | not needed |

# %% machinery "Imports, a folder that is removed when the notebook closes, and `run`, which runs commands in it"
import json
import random
import tempfile
from collections import Counter
from math import exp
from pathlib import Path

from qlora_lab.classroom.checks import check_my_file, check_pattern, check_split_by, progress
from qlora_lab.classroom.lessons.n08.figures import plot_amounts
from qlora_lab.classroom.lessons.n08.machinery import (
    Terminal,
    shares_by_split,
    shares_of,
    short_training,
    show_scores,
    without_days,
)
from qlora_lab.classroom.lessons.n08.samples import without_end
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import show_answers
from qlora_lab.evaluation.scores import parse_score
from qlora_lab.experiments.tickets import DAYS, write_tickets
from qlora_lab.finetuning import generate, load_model, load_prose, text_loss
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.places import RECORDS
from qlora_lab.training.chat import tokenize_chat, tokenize_text
from qlora_lab.training.data import read_chats
from qlora_lab.training.picture import in_short

dtype = pick_compute_dtype(pick_device())
folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
scratch = Path(folder.name).resolve()
run = Terminal(scratch)
record = json.loads((RECORDS / "amounts-nvidia-h200.json").read_text(encoding="utf-8"))

# %% [markdown]
# ## 1 · What is in the file?
#
# Here are a bicycle shop's support tickets, exported from a spreadsheet.

# %%
write_tickets(scratch / "tickets.csv")
lines = (scratch / "tickets.csv").read_text(encoding="utf-8").splitlines()
print(*lines[:4], sep="\n")
run("python -m qlora_lab.data tickets.csv")

# %% [markdown]
# This command reads text, CSV, Parquet and JSON, and knows these layouts:
#
# | layout | a sample has |
# |---|---|
# | Alpaca | an `instruction`, often an `input` that it is about, and the `output` wanted |
# | ShareGPT | `conversations`, a list of turns such as `{"from": "human", "value": "..."}`, then one from `gpt` |
# | OpenAI's messages | `messages`, a list of turns such as `{"role": "user", "content": "..."}`, then one from the `assistant` |
# | pairs | `prompt` and `response`, or `question` and `answer` |
#
# It cannot know the shop's own column names. So name two: the *prompt*, which the model reads, and the *response*, which it
# learns to say.
#
# **Predict.** The file has {{len(lines) - 1}} rows. How many have both a message and a reply? And what share of all tokens belongs to the
# replies?

# %%
prediction = {"samples": ..., "share": ...}  # ← your guesses

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply")
print("\n", told(prediction["samples"]), " · ", told(prediction["share"]), sep="")

# %% [markdown]
# **What happened?** Rows without a message or a reply are left out, repeated ones in section 5. Always
# giving the *most frequent answer* is the dullest guess, which a model must beat. Samples *to judge on* test the model at the end, those *to
# validate on* watch the training (section 5). And if a word of your language costs far more tokens than an English one, this model has hardly seen the language.
#
# <details><summary>What else does the report say?</summary>
#
# - In the first table `p95` is what {{95}} of {{100}} samples do not exceed.
# - The second one counts letters by script (Latin, Greek, Arabic ...), the tokens that they take, and what a word takes.
#
# </details>
#
# The last lines matter most: the first sample *token by token*. A **chat template** has put marks around the turns, as this model
# saw them in its own training. It also added a system message that nobody in the shop wrote.
#
# ## 2 · The token that ends an answer
#
# The last learned token is `<|im_end|>`, with the id `2`. Some scripts never teach it. Short samples are padded to the length of
# long ones, and padding gets the label `-100`, which means *not learned*. Such a script finds it by its id. But this model pads with
# `<|im_end|>`, so the real one is not learned either.
#
# **Predict.** Train for ten steps without that one label, on all but eight tickets, and ask three of the eight. What will the
# model do after an answer?

# %%
vote = ...  # "stops all the same", "runs on" or "says nothing"

# %% machinery "Read the tickets, and load the model"
columns = {"prompt": "message", "response": "reply"}
chats = read_chats(scratch / "tickets.csv", columns=columns)
base, tokenizer = load_model(quantization="nf4", compute_dtype=dtype)

# %%
samples = [tokenize_chat(chat, tokenizer) for chat in chats[8:]]
spoilt = [without_end(sample) for sample in samples]  # the last token is read, but not learned
print("labels end with", samples[0].labels[-3:], "and", spoilt[0].labels[-3:])

# %% machinery "Train a fresh adapter without the label, and another with it; ask both"
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
asked = [chat[:-1] for chat in chats[:3]]
answers = [
    generate(short_training(taught, steps=10), tokenizer, asked, max_new_tokens=40, dtype=dtype)
    for taught in (spoilt, samples)
]
print(told(vote))
show_answers(zip([chat[0]["content"] for chat in asked], *answers), ("ticket", "end not learned", "end learned"))

# %% claims
lengths = [[len(tokenizer(text)["input_ids"]) for text in texts] for texts in answers]
assert min(lengths[0]) >= 36 and max(lengths[1]) < 30, lengths

# %% [markdown]
# **What happened?** Without the label the model runs on until the limit of {{40}} tokens. With it, it stops. (Both are poor after
# ten steps.) Before, this chat model sometimes stopped. Training unlearned that: it made each learned token likelier and all others less likely, the
# end token among them, and this carries over to the place after the answer. If *your*
# model babbles, look at its last learned token first.
#
# ## 3 · Which turns are learned
#
# A conversation may hold several answers. All are learned by default, or only the last with `--learn last`.

# %% machinery "A conversation with two answers, learned in both ways"
turns = ("My bell is broken.", "Which order?", "4711", "A new one leaves on Monday. Team: repairs")
talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns)]
for learn in ("last", "all"):
    print(in_short(tokenize_chat(talk, tokenizer, learn), tokenizer, learn, width=60), end="\n\n")

# %% [markdown]
# Choose `last` if the earlier answers are not worth learning. When a model is *judged*, only the last answer counts.
#
# ## 4 · Questions that it has seen
#
# To know what a model has learned, ask it what it was not trained on. So `train_qlora` **holds out** a fifth of the samples to
# judge on (rounded down: {{len(chats) // 5}} of {{len(chats)}}), at most `--eval-samples`, by default `50`.
#
# But {{7}} of those {{16}} are *nearly the same* as one of the others. The report compares **shingles**, all groups of three
# words in a row. Samples that share {{70}} % of theirs are nearly the same:

# %% machinery "Shingles of two tickets"
tickets = ("Hello, where is my lamp? I paid last week", "Please, where is my lamp? I paid last week")
one, other = ({" ".join(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)} for text in tickets)
print(*tickets, sep="\n")
print(f"{len(one & other)} of {len(one | other)} shingles are in both: {len(one & other) / len(one | other):.0%}")

# %% [markdown]
# Most often a customer has asked again, and a model may remember the answer. So draw whole customers: all tickets of one stay on
# the same side. (Or of an author, a patient, a day.)

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply --split-by customer", only="hold out")

# %% [markdown]
# But {{8}} are still nearly the same as another customer's, *numbers aside* (without their numbers). The score is about these
# sentences only, so also ask your model ten tickets in other words.
#
# The second line is about luck: other tickets would give another share. How far off a share p of n answers typically is, is its
# **standard error**, `√(p (1 - p) / n)`. It is at most `0.5 / √n`. In {{95}} of {{100}} cases it is off by less than {{1.96}} of
# them, so by at most `0.98 / √n`. With {{400}} answers {{98 / 400**0.5:.0f}} points are left.
#
# Does the split matter? On a GPU, ten such files were split in both ways, and a model trained on each:

# %% machinery "Read the record: how many held-out tickets were right, and how many of later customers"
splits = json.loads((RECORDS / "splits-nvidia-h200.json").read_text(encoding="utf-8"))
promised = shares_by_split(splits)
for name, (share, count) in promised.items():
    print(f"{name:<22}{share:4.0%} of {count:5,} tickets exactly right")

# %% [markdown]
# Split at random, the score promised more than later customers got; split by customer, it did not. So it should be, since a random
# split has nearly the same tickets on both sides. But so few do not prove it ([the evidence](../docs/decisions.md)).
#
# **Exercise 8.1 ●●○ (3 minutes).** Finish a split by a column. `rows` are dicts; rows with the same value of `column` go to the
# same list, and `share` of the *values* (rounded down) to the second.


# %%
def split_by(rows, column, share):
    """rows: a list of dicts -> two lists, to train on and to test on."""
    values = sorted({row[column] for row in rows})
    random.Random(0).shuffle(values)
    ### BEGIN SOLUTION (about 3 lines)
    test = set(values[: int(share * len(values))])
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
# One command cleans the file and splits it, into a folder that `train_qlora` reads:

# %%
run("python -m qlora_lab.data tickets.csv --columns prompt=message,response=reply --split-by customer --clean shop")

# %% claims
from qlora_lab.training.data_report import report_on
from qlora_lab.training.likeness import NEAR, NUMBERS

found = report_on(scratch / "tickets.csv", tokenizer, "", columns=columns).compared["test"]
assert ([twin.kind for twin in found.twins].count(NEAR), found.judged) == (7, 16)
apart = report_on(scratch / "tickets.csv", tokenizer, "", columns=columns, split_by="customer").compared["test"].twins
assert [twin.kind for twin in apart] == [NUMBERS] * 8
parts = {split: read_chats(scratch / "shop", split, columns) for split in ("train", "validation", "test")}
assert sum(map(len, parts.values())) == 81 and len(parts["test"]) == 16

# %% [markdown]
# Every ten steps `--validate-every 10` measures the loss on the **validation** tickets, and `--keep best` saves the adapter with the
# lowest. These tickets have chosen it, so on them it looks better than it is. It is judged on the **test** tickets.
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
# **Perplexity** is e to the power of the loss: among how many equally likely tokens the model seems to choose.
#
# <details><summary>What do the other lines say?</summary>
#
# - *Dullest guess* is what a program would score that gives one and the same reply to all, the best one for that score.
# - *Loss* is of the first and of the last training step.
# - *Perplexity, validation* and *validation loss* are of the same tickets. Perplexity is measured before training and after it, the
#   validation loss while the model trains, so never before the first step.
# - *Perplexity, prose* is of the first sixteen of the course's paragraphs of English. Lessons that show another figure have taken
#   others of them, or all.
# - *Peak memory* is the most that this notebook has used so far.
#
# </details>
#
# The words are nearly all right, says *token F1* (see section 6). So what is wrong?

# %% machinery "Wrong answers, one for each reply, and two counts"
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then an answer may differ
rows = [json.loads(line) for line in (scratch / "run" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
expected, given = [row["expected"] for row in rows], [row["after"]["answer"] for row in rows]
wrong = {row["expected"]: row for row in rows if not row["after"]["exact"]}  # of each reply, one
told_by = [(row["asked"][-1]["content"], row["expected"], row["after"]["answer"]) for row in wrong.values()]
named = sum(any(day in chat[-1]["content"] for day in DAYS) for chat in chats)
in_test = sum(any(day in text for day in DAYS) for text in expected)
print(f"{named} of all {len(chats)} replies name a day, and {in_test} of these {len(rows)}")
for what, same in {"as it is": str, "without the day": without_days(DAYS)}.items():
    right = sum(same(one) == same(other) for one, other in zip(expected, given))
    print(f"the reply {what}: {right} of {len(rows)} right")
show_answers(told_by[:3], ("ticket", "the shop's reply", "the model's"))

# %% claims
report = json.loads((scratch / "run" / "report.json").read_text(encoding="utf-8"))
shares = report["after"]
assert 0.25 < shares["exact_match"]["test"] < 0.85 < shares["f1"]["test"], shares
assert all(any(day in reply for day in DAYS) for _, reply, _ in told_by), told_by
assert right >= 15 and not any(day in chat[0]["content"] for day in DAYS for chat in chats)

# %% [markdown]
# **What happened?** Half of the shop's replies name a *day* that is not in the message, because a colleague looked it up. The
# model makes one up, and with five working days one of five is right by luck. So even a perfect model gets about
# `1 - {{named}}/{{len(chats)}} × 4/5` = {{1 - named / len(chats) * 4 / 5:.0%}} of such tickets right. Without the day, this model gets {{right ±1}} of {{len(rows)}} right.
#
# The fault is in the data: **the answer holds what the question does not.** Put the fact into the
# prompt (`ships on: Monday`), or take it out of the reply. And read answers before you believe a score: a run's `report.html` has
# all.
#
# ## 6 · How to judge free text
#
# Exact match is harsh where several wordings are right. Which of these answers would you send to a customer, and which score
# agrees with you?

# %%
reference = "The invoice for order 17 is attached. Team: office"
tried = [
    reference,
    "the invoice for order 17 is attached! team: office",
    "Your invoice (order 17) is attached. Team: office",
    "The invoice for order 71 is attached. Team: office",
]
scores = [parse_score(name) for name in ("normalized", "f1", r"regex:order (\d+)")]
show_scores(tried, reference, scores)
teams = Counter(chat[-1]["content"].split()[-1] for chat in chats)
print(teams)

# %% [markdown]
# The fourth is about another customer's invoice, and only the last score notices. **Normalized match** ignores case,
# punctuation and articles. **Token F1** is twice the number of words that answer and reference share, divided by the words of both; to it, a wrong
# order number is one wrong word. `regex:...` compares one value: what the pattern's *group*, its part in brackets, finds (`\d+` is any
# number of digits). Every reply must have it. Give several, in quotes: `--judge 'regex:order (\d+)' --judge f1`. Choose the score by
# the mistake that would cost you most.
#
# And look at the dullest guess beside it: if {{95}} of {{100}} tickets went to one team, always naming it would be {{95}} % right.
# (Here it is {{max(teams.values())}} of {{len(chats)}}.)
#
# **Exercise 8.2 ●○○ (2 minutes).** The shop wants tickets to reach the right *team*. Write a pattern (without `regex:`) whose group
# finds the team at the end of the reply, even if its name stands elsewhere, too, or there are two blanks before it.

# %%
### BEGIN SOLUTION
### STUB: pattern = ...  # a regular expression
pattern = r"Team:\s*(\w+)"
### END SOLUTION

# %%
check_pattern(pattern)

# %% [markdown]
# <details><summary>Hint</summary>What stands right before the team in every reply? <code>\s*</code> stands for any number of blanks, none included.</details>

# %% [markdown]
# ## 7 · How many examples, and what is forgotten
#
# Measured on a GPU with lesson 01's orders (`shifted`: written in other ways): {{50}} to {{2000}} of them, three random draws each, always {{record['settings']['steps']}} steps of
# {{record['settings']['batch_size']}}.
#
# **Predict.** What share of {{100}} test orders is exactly right with {{50}} examples, and with {{2000}}?

# %%
prediction = {"50": ..., "2000": ...}  # ← your guesses, such as 0.5

# %% machinery "Draw and print the record" alt="Dots and lines over the number of examples, {{50}} to {{2000}}. Test orders: {{min(exact['test'][50]):.0%}} to {{max(exact['test'][50]):.0%}} exactly right with {{50}}, {{min(exact['test'][2000]):.0%}} to {{max(exact['test'][200]):.0%}} from {{200}} on. Shifted orders: between {{min(map(min, exact['shifted'].values())):.0%}} and {{max(map(max, exact['shifted'].values())):.0%}}, without a trend."
exact = shares_of(record)
_ = plot_amounts(new_axes(height=3), exact, prediction)
for split, shares in exact.items():
    print(f"{split:<8}", " · ".join(f"{n}: {min(s):.0%} to {max(s):.0%}" for n, s in shares.items()))

# %% [markdown]
# **What happened?** {{200}} examples do all that {{2000}} do, and {{50}} do most of it. On `shifted` orders all fail alike: more data
# *of the same kind* did not help. Start with {{100}} to {{200}} that differ, read the wrong answers, and add examples of those.
#
# **How many steps?** As long as the validation loss falls. `--patience 3` stops after three
# validations without a new lowest one; beyond that, a model learns its samples by heart.
#
# **What is forgotten?** In section 5 the perplexity of English prose went up: the model lost some of its English. The oldest cure
# is **replay**, mixing in some of what should be kept. Here are the orders' runs again, without it, and with one paragraph of
# English (none that is judged on) in eight samples:

# %% machinery "The perplexity of every second paragraph before training, and after it in the record"
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
english = [tokenize_text(text, tokenizer) for text in load_prose()[1::2]]
print(f"perplexity of prose before training: {exp(text_loss(base, english, dtype=dtype).per_token):.0f}")
for way in ("without", "with"):
    runs = [each for each in record["runs"] if ("replay" in each["amount"]) == (way == "with")]
    after = [exp(each["after"]["prose"]) for each in runs]
    print(f"after training {way} replay: {min(after):.0f} to {max(after):.0f}")

# %% claims
from math import log

start = text_loss(base, english, dtype=dtype).per_token
kept = {True: [], False: []}
for each in record["runs"]:
    kept["replay" in each["amount"]].append(each["after"]["prose"])
assert max(kept[True]) < start + 0.02 < min(kept[False]), start
mine = report["after"]["perplexity"]["prose"] / report["before"]["perplexity"]["prose"]
assert log(mine) > max(kept[False]) - start, (mine, start)

# %% [markdown]
# That keeps all of it (even a little more, since one author wrote the replayed and the judged paragraphs). If your model should still
# chat, give chats to `--replay FILE`: they become a tenth of the training.
#
# <details><summary>Why did my run of section 5 lose more?</summary>
#
# Its learning rate was higher ({{0.002}} against {{record['settings']['learning_rate']}}), its batches were smaller, and its task was another. Which of these did it was not
# measured here; dive D shows that a higher rate alone forgets more. The paragraphs are others, too: section 5 judged the first
# {{16}}, this table every second one.
#
# </details>
#
# ## 8 · Settings for your file
#
# | setting | begin with | how we know |
# |---|---|---|
# | base model | the largest *instruct* model (one that was trained to answer) whose QLoRA run fits on your card | common practice; lessons 02 and 09 |
# | `--lr`, 135M | `2e-3`; from `1.5e-3` to `5e-3`, lesson 01's orders are learned alike | measured (dive D) |
# | `--lr`, 1B to 3B | `5e-4` | in between; not measured, nor why larger models take less |
# | `--lr`, 7B | `2e-4`; a third of it if the loss jumps up | the QLoRA paper's |
# | `--rank`, `--alpha` | `16` and `32` | lesson 06, dive B |
# | `--batch-size` | `4` on a CPU, `8` to `16` on a GPU if they fit | lesson 02 |
# | `--steps` | `3` × samples to train on / batch size, but `20` at least (section 5 had fewer: its loss still fell); validated ten times, `--keep best --patience 3` | common practice; section 7 |
# | `--max-length` | the most tokens in the report: longer samples are left out | section 1 |
# | memory | lesson 02's sum and the room beside it | measured (lesson 02) |
#
# [Decisions before a run](../docs/decisions.md) has the evidence, and says where there is none.
#
# ## 9 · Your file
#
# **Exercise 8.3 ●●● (7 minutes).** Name a file of *your* task: twelve samples or more in a layout of section 1. A table with two
# columns is enough, such as terms and what they mean. (Writing one takes longer.) No idea? The hint has a task that this small model
# can learn.
#
# The run is removed with this notebook unless `my_run` is a folder of yours. Keep it: lesson 11 can use it, and with {{20}} samples
# lesson 13.

# %%
my_columns = ""  # what section 4 had: "--columns prompt=...,response=... --split-by ..."
my_run, my_steps = scratch / "my-run", 24  # "runs/mine" in its place would stay
### BEGIN SOLUTION
### STUB: my_file = ...  # the path of your file, such as "my.jsonl"
my_file = scratch / "my.jsonl"
names = (
    "Ana Ben Carla Daniel Elif Femi Greta Hugo Ines Jonas Kemal Lena Mara Nils Olga Pablo Rosa Sven Tara Yusuf".split()
)
days = "Monday Tuesday Wednesday Thursday Friday".split()
forms = ("{name} will come {day} at {hour}", "{day} at {hour} I meet {name}", "lunch with {name}, {day}, {hour}")
pairs = []
for n, name in enumerate(names):  # no day and hour twice
    facts = {"name": name, "day": days[n % 5], "hour": 8 + 3 * n % 11}
    pairs.append((forms[n % 3].format(**facts), "{day}, {hour}:00, {name}".format(**facts)))
my_file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
### END SOLUTION

# %%
check_my_file(my_file, my_columns)

# %% [markdown]
# <details><summary>Hint</summary>Notes become lines of a calendar, with other names, days and hours in each. One sample a line:
# <code>{"prompt": "Ana will come Monday at 9", "response": "Monday, 9:00, Ana"}</code></details>

# %% [markdown]
# This reports on your file, trains, and judges the adapter on a fifth of it. Read the answers: a share of so few means
# little.

# %% machinery "Report, train and judge"
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
if my_file is not ...:
    mine = f"{run.path(my_file)} {my_columns}"
    run(f"python -m qlora_lab.data {mine}")
    run(
        f"python -m qlora_lab.train_qlora --data {mine} --steps {my_steps} --batch-size 4 --lr 2e-3 --validate-every 8 "
        f"--keep best --judge f1 --eval-samples 20 --output {run.path(my_run)} --quiet"
    )

# %% [markdown]
# Are they bad? Ask in this order: Does the data report show what you meant? Does each answer follow from its question?
# Does the validation loss still fall at the end? (Another try needs another `my_run`.)
#
# Now ask your model something new:
#
# ```python
# from peft import PeftModel
# from qlora_lab.finetuning import generate, load_model
#
# base, tokenizer = load_model(quantization="nf4")
# mine = PeftModel.from_pretrained(base, f"{my_run}/adapter")  # your folder
# generate(mine, tokenizer, [[{"role": "user", "content": "..."}]], max_new_tokens=40, dtype=base.dtype)
# ```
#
# ## Recap
#
# ```
# tickets.csv        {{len(lines) - 1}} rows
#  └ cleaned         {{sum(map(len, parts.values()))}} samples
#    │ whole customers, not rows
#    ├ train         {{len(parts["train"]):2}} to learn
#    ├ validation    {{len(parts["validation"]):2}} to choose by
#    └ test          {{len(parts["test"]):2}} to judge by
#      right         {{len(rows) * report["after"]["exact_match"]["test"]:2.0f ±4}}
#      dullest guess {{max(Counter(expected).values()):2}}
# ```
#
# - First read the data report, and a sample token by token: the end token must be learned.
# - Split by whom the samples are about, not by rows, and let answers follow from their question.
# - Beside a score belong the number of answers and the dullest guess, and more of the same soon stops helping.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [09 · Your GPU](09_your_gpu.ipynb)
