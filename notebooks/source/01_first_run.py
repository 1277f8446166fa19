# %% [markdown]
# # 01 · Can I train a real LLM here, now?
#
# Yes. A minute or two of training on two CPU cores teaches a language model to turn free text into data:
#
# ```
# New order for Julia Weber in Budapest:
# 15 purple bottles, altogether 765 euros.
#
# {"customer":"Julia Weber","item":"bottle","colour":"purple",
#  "quantity":15,"city":"Budapest","total":765}
# ```
#
# You load a small chat model in four bits a weight, ask it to do this, **fine-tune** it (you go on training it, on examples of
# this one task), and ask again. Then you find out what it has not understood, and teach it that with examples of your own.
#
# This lesson is for doing. *Why* each step works, later lessons explain.
#
# | you need | |
# |---|---|
# | time | 34 minutes |
# | computing | up to 4 minutes on two CPU cores |
# | memory | 7 GB |
# | GPU | optional |

# %% machinery "Imports"
import math
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from IPython.display import display

from qlora_lab.classroom.checks import check_bnb_config, check_my_sentence, progress
from qlora_lab.classroom.lessons.n01.figures import plot_right
from qlora_lab.classroom.lessons.n01.machinery import (
    adapter_weights,
    as_chats,
    fault_in,
    megabytes_by_part,
    orders_of,
    quantities_by_place,
    restore,
    sequences,
    shares_by_field,
    wrong_quantities,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import ask_box, live_loss, show_answers, show_tokens
from qlora_lab.finetuning import (
    Batches,
    add_adapter,
    exact_match,
    generate,
    is_exact,
    load_model,
    load_samples,
    tokenize,
    train_steps,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.training.chat import tokenize_chat

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %%
MODEL = BUNDLED = "smollm2-135m-instruct"  # comes with the course
LEARNING_RATE = 1.5e-3  # see section 3
compute_dtype = pick_compute_dtype(pick_device())

# %% [markdown]
# (With a GPU and internet you may put in a larger chat model, `"Qwen/Qwen2.5-1.5B-Instruct"`, say. Larger models want a smaller learning rate: try `5e-4`.)
#
# ## 1 · Load it in four bits
#
# A model is mostly large matrices of numbers, its weights. The one that comes with the course has {{134.5}} million of them, and each usually takes {{16}} bits of memory. To
# **quantize** a model is to store its weights in fewer bits. **QLoRA** holds them in four bits, and trains a small addition beside them.
#
# The library transformers quantizes a model while it loads it, if it gets a `BitsAndBytesConfig`. (The library bitsandbytes does the work.) Ask for four
# bits and nothing else, and you get this:

# %%
from transformers import BitsAndBytesConfig

print(BitsAndBytesConfig(load_in_4bit=True))

# %% [markdown]
# Three of these settings are not those of QLoRA as published. (The lines with `llm_int8` are named after an older method, with 8 bits.)
#
# - A code of four bits can name only sixteen values. **NF4** (4-bit NormalFloat) is a choice of sixteen that lie close together where most weights of a language model lie ([lesson 04](04_nf4.ipynb)).
# - Some neighbouring weights are large, others small. So each group of neighbours has a **scale**, by which its values are multiplied. *Double
#   quantization* stores the scales in fewer bits, too ([lesson 05](05_double_quantization.ipynb)).
# - To calculate with its weights, a layer turns them back into ordinary numbers. The **compute dtype** is the format of these numbers. Which one is fast depends on your
#   machine ([lesson 00](00_start_here.ipynb)). The cell above has picked yours.
#
# **Exercise 1.1 ●○○ (2 minutes).** Write the config that QLoRA wants.

# %%
### BEGIN SOLUTION
### STUB: config = ...  # BitsAndBytesConfig(...)
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=compute_dtype,
)
### END SOLUTION

# %%
check_bnb_config(config, compute_dtype)

# %% [markdown]
# <details><summary>Hint</summary>Take the names from the output above: those that begin with <code>bnb_4bit_</code>. Of these four, the one about storage may stay as it is.</details>

# %% [markdown]
# **Predict.** Four bits are half a byte. How many MB (millions of bytes) will the weights take?

# %%
prediction = {"MB": ...}  # ← your guess

# %%
# NBVAL_IGNORE_OUTPUT
# because the embeddings' dtype, and so their size, depends on the machine
model, tokenizer = load_model(MODEL, quantization="nf4", double_quant=True)  # makes the same config itself
megabytes = megabytes_by_part(model)
for part, size in megabytes.items():
    print(f"{part:<24}{size:6.1f} MB")
print(f"computes in {compute_dtype}; {told(prediction['MB'])}")

# %% claims
weights = sum(math.prod(m.quant_state.shape) for m in model.modules() if hasattr(m, "quant_state"))
weights += sum(p.numel() for p in model.parameters() if not hasattr(p, "quant_state"))
assert MODEL != BUNDLED or (weights == 134_515_008 and tokenizer.vocab_size == 49_152)
assert math.isclose(model.get_memory_footprint() / 1e6, megabytes["all"], rel_tol=0.02)

# %% [markdown]
# **What happened?** Only the matrices inside the layers were quantized: half a byte for each of their weights, and a little for their scales. The *embeddings*, a vector for each of the {{tokenizer.vocab_size:,}} tokens
# that the model knows, keep {{16}} bits a number, or {{32}} where the compute dtype is `float32`. Here the same matrix is the output head, which scores
# the tokens, and transformers leaves that as it is "for numerical stability reasons", as its code says. In a large model it hardly counts.
#
# ## 2 · Ask it before
#
# The course brings made-up orders of three kinds. The `train` orders are for training. The `test` orders are others, written in the same ways. The `shifted` orders are written in
# other ways, with other names and cities. Each is a chat of three messages: the task, the order, and the right answer, which we keep back when we ask the model.

# %%
orders = {split: load_samples("orders", split) for split in ("train", "test", "shifted")}
judged = {split: orders[split].select(range(50))["messages"] for split in ("test", "shifted")}


def answers_of(model, chats):
    questions = [chat[:-1] for chat in chats]
    return generate(model, tokenizer, questions, max_new_tokens=56, dtype=compute_dtype)


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
print(judged["test"][0][0]["content"])
shown = judged["test"][:3]
before = answers_of(model, shown)
show_answers([(chat[1]["content"], said) for chat, said in zip(shown, before)], ("order", "before training"))

# %% claims
assert MODEL != BUNDLED or not any(is_exact(said, chat[2]["content"]) for chat, said in zip(shown, before))

# %% [markdown]
# It does not do the job. (We stop it after {{56}} tokens, hence the torn ends.)
#
# ## 3 · Train it
#
# **What does it learn from?** Here is one of the {{orders["train"].num_rows:,}} `train` chats, cut into tokens as the model sees it:

# %%
samples, _ = tokenize(orders["train"], tokenizer, max_length=256)
pieces = [tokenizer.decode([id]) for id in samples[0].ids]
show_tokens(pieces, [label != -100 for label in samples[0].labels])

# %% claims
assert tokenizer.eos_token_id == samples[0].labels[-1] and len(samples) == 2000

# %% [markdown]
# The model reads all of it, and learns to write what is framed: the answer, and the mark that ends it.
#
# **What changes in it?** Not the 4-bit weights. Training moves weights by tiny amounts, which a weight with only sixteen values to choose from cannot do.
# So these weights are *frozen*: they stay as they are. Beside each quantized matrix, **LoRA** puts two thin matrices of ordinary numbers, and adds what their
# product makes of the layer's input to the layer's output. All of them together are the **adapter**, the only part that is trained. A LoRA adapter on a frozen 4-bit model: that is QLoRA.
#
# Two settings belong to it. The **rank** is the width of the thin matrices: with rank {{16}}, a matrix of {{1536}} × {{576}} numbers gets one of {{1536}} × {{16}} and one of {{16}} × {{576}} beside it. **alpha** says how
# much their product counts; twice the rank is usual ([lesson 06](06_lora.ipynb) explains both).

# %%
model = add_adapter(model, rank=16, alpha=32, targets="all-linear")
model.print_trainable_parameters()

# %% [markdown]
# **How does it learn?** In each step the model reads eight chats. For every token that it should write, we look at the probability that it gave to the
# right one. The **loss** is minus the natural logarithm of this probability, averaged over these tokens (its unit is the *nat*). Then an
# optimizer, Adam, moves each weight of the adapter so that the loss gets smaller. It divides a weight's gradient by that gradient's usual size, so each moves by about the **learning rate**. ([Dive D](dive_d_training_tricks.ipynb) measures which rate suits this model.)
#
# **Predict.** The loss starts near {{1.5}}, when the right token gets a probability of about {{math.exp(-1.5):.0%}}. You take thirty steps. In which will the loss
# first be below {{0.1}} ({{math.exp(-0.1):.0%}})? And what share of {{len(judged['test'])}} `test` orders will the model then get exactly right? Of as many `shifted` ones?

# %%
prediction = {"step": ..., "test": ..., "shifted": ...}  # ← a step, and two shares such as 0.5

# %% alt="Line plot, drawn during training: loss (log scale) over {{len(records)}} optimizer steps. It starts near {{records[0].loss:.1f ±0.2}}, falls steeply in the first steps, crosses the dotted line at {{0.1}}, then wavers below it."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
settings = {"compute_dtype": compute_dtype, "pad_token_id": tokenizer.pad_token_id}
steps = train_steps(model, Batches(samples, batch_size=8, seed=0), steps=30, learning_rate=LEARNING_RATE, **settings)
records = live_loss(steps, total=30, guess=prediction["step"])
first = next((record.step for record in records if record.loss < 0.1), None)
print(f"loss {records[0].loss:.2f} in step 1, first below 0.1 in step {first}; {told(prediction['step'])}")
print(f"in the last three steps: {', '.join(f'{record.loss:.3f}' for record in records[-3:])}")

# %% claims
assert MODEL != BUNDLED or 1.3 < records[0].loss < 1.7

# %% [markdown]
# **What happened?** Much of an answer is always the same (`{"customer":"` and so on), and most of the rest is copied from the order. Both
# are learned in a few steps. Why go on when the loss is below {{0.1}}? Because one wrong token spoils an answer. If each of forty
# tokens is right with a probability of {{math.exp(-0.1):.1%}}, all forty are right in only {{math.exp(-0.1 * 40):.0%}} of the answers.
#
# ## 4 · Ask it again

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
answers = {split: answers_of(model, chats) for split, chats in judged.items()}
show_answers([(chat[1]["content"], said) for chat, said in zip(shown, answers["test"])], ("order", "after training"))

# %% [markdown]
# An answer counts as right if it is the right JSON object and nothing else. Here are both kinds, whole and field by field:

# %% machinery "Compare the answers with the right ones"
wanted = {split: [chat[2]["content"] for chat in chats] for split, chats in judged.items()}
score = {split: exact_match(answers[split], wanted[split]) for split in judged}
fields = {split: shares_by_field(answers[split], judged[split]) for split in judged}

# %% alt="Pairs of horizontal bars, test and shifted orders: share exactly right. Whole test orders are nearly all right, whole shifted ones less than half. Below a line the six fields: of test orders each is right nearly always; of shifted ones all are right less often, quantity and city least."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
_ = plot_right(new_axes(height=4.8), score, fields)
for split in score:
    print(f"{split:<8} {score[split]:4.0%} of {len(judged[split])} orders exactly right; {told(prediction[split])}")

# %% claims
assert MODEL != BUNDLED or (score["test"] >= 0.85 and score["shifted"] < 0.5)

# %% [markdown]
# **What happened?** After {{len(records)}} steps the model is almost perfect on orders like those that it has seen. On shifted orders it
# fails most of the time, and neither the loss nor the `test` score would have told you. Compare three wrong answers with what was expected:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
pairs = zip(judged["shifted"], answers["shifted"])
wrong = [
    (chat[1]["content"], said, chat[2]["content"]) for chat, said in pairs if not is_exact(said, chat[2]["content"])
]
show_answers(wrong[:3], ("shifted order", "answer", "expected"))

# %% [markdown]
# Why is that? An order names six things. In the example at the top of this page, the sequence is: customer, city, quantity, colour, item,
# total. How many different sequences do the orders have?

# %%
known = sequences(orders["train"]["messages"])
for split in orders:
    of_split = sequences(orders[split]["messages"])
    print(f"{split:<8} {len(of_split):2} sequences, {len(of_split - known)} of them not in train")
early = sum(names.index("quantity") < names.index("total") for names in known)
print(f"In {early} of the {len(known)} sequences of train, the quantity stands before the total.")

# %% claims
assert [len(sequences(orders[split]["messages"]) - known) for split in orders] == [0, 0, 9] and len(known) == 8

# %% [markdown]
# All {{orders["train"].num_rows:,}} training orders have only these {{len(known)}} sequences. So it is enough to recognize the sentence and to know *where* each thing stands in it.
# Nothing forced the model to learn what a quantity *is*. If so, a total in front of the quantity should do no harm in sentences that it knows, and much in new ones, and
# so should a **decoy**, something that does not belong in the answer (the `34` in `not 34 but 31`):

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
for split in ("test", "shifted"):
    for place, (right, count) in quantities_by_place(answers[split], judged[split]).items():
        print(f"{split:<9}{place:<31}quantity right in {right:2} of {count}")
print("what shifted orders have instead:", wrong_quantities(answers["shifted"], judged["shifted"]))

# %% claims
by_place, of_test = (
    {place: right / max(1, count) for place, (right, count) in quantities_by_place(answers[s], judged[s]).items()}
    for s in ("shifted", "test")
)
assert MODEL != BUNDLED or of_test["total before quantity"] > 0.8, of_test
assert MODEL != BUNDLED or by_place["quantity before total"] > max(list(by_place.values())[1:]) + 0.2, by_place
assert MODEL != BUNDLED or wrong_quantities(answers["shifted"], judged["shifted"])["the total"] >= 5

# %% [markdown]
# So it is. In `test` orders the quantity is nearly always right, even behind the total. In `shifted` orders it is so where it comes first and there is no decoy. Otherwise it is often wrong,
# and then mostly the total or the decoy.
#
# The `test` orders measure whether the model has learned *your sentences*, not whether it has learned *the job*.
#
# ## 5 · Try it
#
# Write orders of your own, and see what it takes to get a wrong answer. (This needs a running kernel.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
task = orders["train"][0]["messages"][0]


def ask(order):
    chat = [task, {"role": "user", "content": order}, {"role": "assistant", "content": ""}]
    return {"after training": answers_of(model, [chat])[0]}


mine = "Three green umbrellas to Ada Lovelace in London, please, she pays 42 euros."
display(show_answers(ask(mine).items(), ("model", mine)))
ask_box(ask, first=mine)

# %% machinery "Train on, half on your orders and half on old ones, and ask before and after"
start = adapter_weights(model)


def teach(sentence, steps=8):
    if sentence is ... or fault_in(sentence):
        return SimpleNamespace(losses=[])
    restore(model, start)
    orders = orders_of(sentence)
    asked = as_chats(orders[-1:], task)
    before = answers_of(model, asked)
    mine = [tokenize_chat(chat, tokenizer) for chat in as_chats(orders[:-1], task)]
    mixed = Batches([*(mine * 32)[:32], *samples[240:272]], batch_size=8, seed=1)
    losses = [
        record.loss
        for record in train_steps(model, mixed, steps=steps, learning_rate=LEARNING_RATE * 2 / 3, **settings)
    ]
    after = answers_of(model, [*asked, *judged["shifted"]])
    right = exact_match(after[1:], wanted["shifted"])
    return SimpleNamespace(losses=losses, row=(asked[0][1]["content"], before[0], after[0]), shifted=right)


# %% [markdown]
# ## 6 · Teach it your way of writing
#
# **Exercise 1.2 ●●○ (5 minutes).** In section 5, find a way of writing an order that the model gets wrong: with a decoy, or in a new sequence. Write
# it down with blanks: `{customer}`, `{quantity}`, `{colour}`, `{item}`, `{city}`, `{total}` and, if you like, `{other}`, a number that does not belong in the answer.
#
# The next cell fills the blanks in five times, and trains on with four of these orders, at a lower rate (untuned). (Half of what it trains on are `train` orders, so that the model
# does not forget them.) The model is asked the fifth before and after. Each try begins with the adapter as it is now.

# %%
### BEGIN SOLUTION
### STUB: my_sentence = ...  # "... {quantity} {colour} {item}s ..."
my_sentence = "Cancel the {other} white plates. {customer} in {city} would rather have {quantity} {colour} {item}s, {total} euros in all."
### END SOLUTION

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
taught = teach(my_sentence)  # a minute on two CPU cores
check_my_sentence(my_sentence, taught.losses)

# %% [markdown]
# <details><summary>Hint 1</summary>Section 4 shows what goes wrong most. Try a number that is taken back, say, or the price before everything else.</details>
# <details><summary>Hint 2</summary>For example: <code>"{customer} ordered {other} mugs last week ..."</code>. And now?</details>

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds differently
if taught.losses:
    display(show_answers([taught.row], ("not trained on", "before", "after")))
    print(f"shifted orders exactly right: {score['shifted']:.0%} before, {taught.shifted:.0%} after")

# %% [markdown]
# **What happened?** Is your fifth order right now, and was it wrong before? And what became of the `shifted` orders? When we trained on the solution's sentence, the fifth order was right,
# but of the {{50}} `shifted` orders only {{6}} were right, where {{16}} had been before. Four examples teach one more way of writing. They do not teach the job, and they can pull the model away
# from what it could do. (Why here, we do not know.) [Lesson 08](08_your_data.ipynb) shows how to judge examples, and that more of the same kind do not help.
#
# There is a catch: you know the `shifted` orders by now, so they are no longer a fair test of what you train next.
#
# ## 7 · Keep it
#
# What you have trained is a small file, with four bytes for each weight of the adapter. **PEFT** is Hugging Face's library for
# adapters. Any program that uses it can put yours on the same *base model*, the model without adapter, again. (The folder below vanishes with the kernel. Name one of your own to keep it.)

# %%
from peft import PeftModel

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name) / "orders-adapter"
model.save_pretrained(folder)
print(f"{(folder / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB")
base, _ = load_model(MODEL, quantization="nf4", double_quant=True)
reloaded = PeftModel.from_pretrained(base, folder)
ids = torch.tensor([samples[0].ids], device=model.device)
with torch.no_grad():
    print("says exactly the same:", torch.equal(reloaded(ids).logits, model(ids).logits))

# %% claims
with torch.no_grad():
    assert torch.equal(reloaded(ids).logits, model(ids).logits)

# %% [markdown]
# [Lesson 12](12_ship_it.ipynb) makes a file that runs without Python. The same from a terminal, on these orders or on a file of your own:
#
# ```
# python -m qlora_lab.train_qlora --output runs/orders
# python -m qlora_lab.train_qlora --output runs/mine --data my.jsonl
# ```
#
# ## Recap
#
# ```
# order ┬─ weights, 4-bit, frozen ┐
#       └─ adapter, trained ─────(+)
#                                 │
#                               JSON
# exactly right after {{len(records)}} steps
# orders like those of training  {{score['test']:.0% ±0.15}}
# orders written in other ways   {{score['shifted']:.0% ±0.2}}
# ```
#
# - QLoRA stores a model's weights in four bits, leaves them as they are, and trains a small adapter beside them.
# - A few hundred examples and two minutes on a CPU make a small model almost perfect at one narrow job, for questions like the examples.
# - So judge it on data unlike its training data, too.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [02 · Why can I not just fine-tune a 7B model?](02_memory_wall.ipynb)
