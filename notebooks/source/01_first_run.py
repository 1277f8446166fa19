# %% [markdown]
# # 01 · Can I train a real LLM here, now?
#
# Yes. On two CPU cores, in a minute or two of training, a language model that has never done this job learns to turn
# free text into data:
#
# > *New order for Julia Weber in Budapest: 15 purple bottles, altogether 765 euros.*
# >
# > ```json
# > {"customer":"Julia Weber","item":"bottle","colour":"purple",
# >  "quantity":15,"city":"Budapest","total":765}
# > ```
#
# You load the model in 4 bits, ask it to try, and give it an **adapter**: a small set of extra weights, the only ones that
# are trained. That is QLoRA: a LoRA adapter on a base held in 4 bits. You watch the loss fall, and judge the result twice:
# on orders like those it has seen, and on orders it was never prepared for, such as this one:
#
# > *Not 34 but 31 jackets, please, in pink rather than blue. It is for Deepak Gunawardena over in Samarkand, who has paid
# > 73 euros.*
#
# | you need | |
# |---|---|
# | time | 25 minutes |
# | computing | up to 9 minutes on two CPU cores, 2 on a GPU |
# | memory | 5 GB |
# | GPU | optional |

# %% machinery "Imports"
import math
import tempfile
import warnings
from pathlib import Path

import torch

from qlora_lab.classroom.checks import (
    check_bnb_config,
    check_labels,
    check_token_weighted_loss,
    check_trainable_parameters,
    progress,
)
from qlora_lab.finetuning import (
    Batches,
    add_adapter,
    exact_match,
    generate,
    is_exact,
    load_model,
    load_prose,
    load_samples,
    text_loss,
    tokenize,
    train_steps,
    trainable_parameters,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.training.chat import tokenize_text

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %%
BUNDLED = "smollm2-135m-instruct"
MODEL = BUNDLED  # with a GPU and internet, a chat model of the hub: "Qwen/Qwen2.5-1.5B-Instruct", say

device = pick_device()
compute_dtype = pick_compute_dtype(device)

# %% [markdown]
# ## 1 · Four bits, please
#
# `transformers` quantizes a model while it loads it, if you hand it a `BitsAndBytesConfig`. Its defaults are *not*
# QLoRA's: `fp4` instead of `nf4`, no double quantization, `float32` compute.
#
# - **NF4** names the 16 values that a 4-bit code can stand for (notebook 04).
# - Every 64 weights share a *scale*. **Double quantization** stores the scales in 8 bits too (notebook 05).
# - The **compute dtype** is the format that the layers multiply in. Notebook 00 shows why it depends on the machine; the cell
#   above has picked yours: `compute_dtype`.
#
# **Exercise 1.1 ●○○ (3 minutes).** Write the config of QLoRA: 4 bits, NF4, double quantization, and `compute_dtype`.

# %%
from transformers import BitsAndBytesConfig

### BEGIN SOLUTION
### STUB: config = ...  # BitsAndBytesConfig(...), four settings
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
# <details><summary>Hint</summary>The arguments are <code>load_in_4bit</code>, <code>bnb_4bit_quant_type</code>,
# <code>bnb_4bit_use_double_quant</code> and <code>bnb_4bit_compute_dtype</code>.</details>

# %% [markdown]
# **Predict.** The bundled model has 134.5 million parameters. Four bits are half a byte. How many MB (10⁶ bytes) will it take
# once it is loaded?

# %%
prediction = {"MB": 67}  # ← your guess

# %%
# NBVAL_IGNORE_OUTPUT
# because the embeddings' dtype depends on the machine
# `load_model` is `AutoModelForCausalLM.from_pretrained(..., quantization_config=...)` with the config of exercise 1.1
model, tokenizer = load_model(MODEL, quantization="nf4", double_quant=True)
used = model.config.quantization_config
print(f"config: {used.bnb_4bit_quant_type}, double {used.bnb_4bit_use_double_quant}, {used.bnb_4bit_compute_dtype}")
linears = [m for name, m in model.named_modules() if hasattr(m, "quant_state")]
quantized = sum(math.prod(m.quant_state.shape) for m in linears)
embedding = model.get_input_embeddings().weight
total = quantized + sum(p.numel() for p in model.parameters() if not hasattr(p, "quant_state"))
print(f"{quantized:>12,} parameters in {len(linears)} linear layers: 4-bit codes, {linears[0].weight.dtype} in memory")
print(f"{embedding.numel():>12,} parameters in the embeddings: {embedding.dtype}")

# %% claims
assert MODEL != BUNDLED or (total == 134_515_008 and tokenizer.vocab_size == 49_152)

# %%
# NBVAL_IGNORE_OUTPUT
# because the embeddings' dtype, and so their size, depends on the machine
codes_and_scales = quantized * (4 + 8 / 64 + 32 / (64 * 256)) / 8
megabytes = {"4-bit linears and scales": codes_and_scales / 1e6, "embeddings": embedding.nbytes / 1e6}
megabytes["all"] = sum(megabytes.values())
for part, size in megabytes.items():
    print(f"{part:<26}{size:7.1f} MB")
print(f"your guess: {prediction['MB']} MB")

# %% claims
assert MODEL != BUNDLED or math.isclose(model.get_memory_footprint() / 1e6, megabytes["all"], rel_tol=0.02)

# %% [markdown]
# **What happened?** The linear layers shrank as promised: 4 bits a parameter and an eighth of a bit for the scales. But *only* the linear
# layers are quantized. Embeddings stay in 16 or 32 bits, and here they are the output head at the same time. In a small
# model with a large vocabulary they dominate. In LLaMA-7B they are a small share, and still "7B × half a byte" does not hold:

# %%
from qlora_lab.memory import SHAPES, bits_per_parameter

shape = SHAPES["llama-7b"]
in_4_bits = shape.linear_parameters() * bits_per_parameter() / 8
in_16_bits = 2 * (shape.embedding_parameters() + shape.norm_parameters())
print(f"LLaMA-7B: {in_4_bits / 1e9:.2f} GB in 4 bits + {in_16_bits / 1e9:.2f} GB in 16 bits")
print(f"{shape.parameters():,} parameters x 0.5 bytes: {shape.parameters() / 2 / 1e9:.2f} GB")

# %% [markdown]
# ## 2 · Before
#
# Here are three orders, and what the model makes of them now. The task is stated in its system prompt: *turn the order into
# JSON with customer, item, colour, quantity, city and total.*

# %%
orders = {split: load_samples("orders", split) for split in ("train", "test", "shifted")}
judged = {split: orders[split].select(range(50))["messages"] for split in ("test", "shifted")}


def answers_of(model, chats, max_new_tokens=56):
    return generate(model, tokenizer, [chat[:-1] for chat in chats], max_new_tokens, dtype=compute_dtype)


def expected(chats):
    return [chat[-1]["content"] for chat in chats]


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
from qlora_lab.classroom.widgets import show_answers

shown = judged["test"][:3]
before = answers_of(model, shown)
show_answers(zip([chat[-2]["content"] for chat in shown], before, strict=True), ("order", "before training"))

# %% [markdown]
# It can write, but it does not do the job. Here is the score over more of them, by a strict measure: the answer must be the
# right JSON object and nothing else (right words in another form count as wrong). To see later what the training made it
# forget, we also measure its **perplexity** on 24 paragraphs of plain English: between how many equally likely next tokens
# it hesitates, on average.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
some = judged["test"][:10] + judged["shifted"][:10]
score_before = exact_match(answers_of(model, some), expected(some))
prose = [tokenize_text(text, tokenizer) for text in load_prose()[:24]]
prose_before = text_loss(model, prose, dtype=compute_dtype).perplexity
print(f"exactly right before training: {score_before:.0%} of {len(some)} orders, test and shifted")
print(f"perplexity on prose: {prose_before:.2f}")

# %% claims
assert MODEL != BUNDLED or score_before < 0.05

# %% [markdown]
# ## 3 · What it learns from
#
# A training sample is the order and the right answer, in the model's chat format. The model reads all of it, and is graded
# on the *answer* only. That is what the labels say: −100 means "do not grade this token".

# %%
from qlora_lab.classroom.widgets import show_tokens

samples, left_out = tokenize(orders["train"], tokenizer, max_length=256)
sample = samples[0]
show_tokens([tokenizer.decode([i]) for i in sample.ids], [label != -100 for label in sample.labels])

# %% claims
assert left_out == "" and tokenizer.eos_token_id == sample.labels[-1]
assert MODEL != BUNDLED or tokenizer.pad_token_id == tokenizer.eos_token_id

# %% [markdown]
# Framed and bold: learned. Grey: only read. Look at the last framed token. `<|im_end|>` is how the model says "done". In this
# model, as in many, it is *also* the padding token, and a script that masks padding by comparing ids masks it too. A model
# trained that way is never taught to stop.
#
# **Exercise 1.2 ●●○ (5 minutes).** Write the masking yourself. Two lists of token ids come in; `input_ids` and `labels`, of
# the same length, go out. (transformers shifts the labels by one itself: label *i* belongs to token *i*.)


# %%
def mask_prompt(prompt_ids, response_ids):
    """Two lists of ids -> input_ids and labels; the prompt is read, the response is learned."""
    ### BEGIN SOLUTION (about 3 lines)
    input_ids = prompt_ids + response_ids
    labels = [-100] * len(prompt_ids) + response_ids
    return input_ids, labels
    ### END SOLUTION


# %%
check_labels(mask_prompt)

# %% [markdown]
# <details><summary>Hint 1</summary>Lists add up with <code>+</code>, and <code>[-100] * n</code> repeats.</details>
# <details><summary>Hint 2</summary>Leave the response as it is, end token included.</details>

# %% [markdown]
# ## 4 · What it learns with
#
# The 4-bit weights stay as they are. Beside each linear layer, LoRA puts two thin matrices: A, with `rank` rows, and B, with
# `rank` columns. Only those are trained. What the layer adds to its output is `alpha / rank` × B A x; here that factor is
# 32 / 16 = 2.
#
# **Exercise 1.3 ●●○ (4 minutes).** How many parameters is that? For a linear layer from `i` to `o` features, A is
# `rank × i` and B is `o × rank`.


# %%
def lora_parameters(rank, shapes):
    """shapes: a list of (in_features, out_features), one for each adapted layer."""
    ### BEGIN SOLUTION (about 1 line)
    return sum(rank * (i + o) for i, o in shapes)
    ### END SOLUTION


# %%
check_trainable_parameters(lora_parameters)

# %%
model = add_adapter(model, rank=16, alpha=32, targets="all-linear")
print(
    f"{trainable_parameters(model):,} parameters train: {trainable_parameters(model) / total:.1%} of the base's {total:,}"
)

# %% claims
by_formula = sum(16 * (layer.in_features + layer.out_features) for layer in linears)
assert trainable_parameters(model) == by_formula

# %% [markdown]
# B starts at zero, so the adapter changes nothing yet: the *logits*, the model's scores for every next token, are the same
# bit for bit.

# %%
with torch.no_grad():
    ids = torch.tensor([sample.ids], device=device)
    with model.disable_adapter():
        without = model(ids).logits
    adapted = model(ids).logits
if torch.equal(adapted, without):
    print("same logits, with and without the adapter")

# %% claims
assert torch.equal(adapted, without)

# %% [markdown]
# ## 5 · The loop
#
# 20 steps of 8 orders: 160 of the 2,000, each seen once. In each step the loop runs the batch forward, back through the
# frozen 4-bit weights into the adapter, clips the gradient and lets AdamW move A and B. You can read it: it is the function `train_steps` in
# [`qlora_lab/training/loop.py`](../qlora_lab/training/loop.py).
#
# One line in it is worth an exercise. When a batch is too big for the memory, it is cut into micro-batches, and their
# gradients are added up (*accumulation*). Samples differ in length, so micro-batches differ in their number of target tokens.
#
# **Exercise 1.4 ●●○ (4 minutes).** Given each micro-batch's mean loss and its number of target tokens: what is the loss of
# the whole batch, in which every *token* counts the same?


# %%
def global_loss(micro_batch_losses, target_tokens):
    """Mean loss per token over all micro-batches."""
    ### BEGIN SOLUTION (about 2 lines)
    total = sum(loss * tokens for loss, tokens in zip(micro_batch_losses, target_tokens))
    return total / sum(target_tokens)
    ### END SOLUTION


# %%
check_token_weighted_loss(global_loss)

# %% [markdown]
# <details><summary>Hint</summary>First turn each mean back into a sum: loss × tokens.</details>

# %% [markdown]
# **Predict.** The loss is −log of the probability that the model gives the right token, averaged over the answers' tokens. It
# starts near 1.5: the right token gets about e^−1.5 = 22 %. At which of the 20 steps will it first be below 0.1 (90 %)? And how
# many of 50 orders will the model get exactly right afterwards: of the `test` kind, written like the training orders, and of the
# `shifted` kind, with other sentences, names, cities and spellings, and with decoys?

# %%
prediction = {"step": 15, "test": 0.80, "shifted": 0.70}  # ← your guesses

# %% alt="Line plot, drawn during training: loss (log scale) over 20 optimizer steps. It falls steeply in the first steps, crosses the dotted line at 0.1, then wavers below it. A dashed vertical line is your guess of the step where it first gets below 0.1."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and the time is the machine's
from qlora_lab.classroom.widgets import live_loss

steps, learning_rate = 20, 2e-3
records = live_loss(
    train_steps(
        model,
        Batches(samples, batch_size=8, seed=0),
        steps=steps,
        learning_rate=learning_rate,
        compute_dtype=compute_dtype,
        pad_token_id=tokenizer.pad_token_id,
    ),
    total=steps,
    guess=prediction["step"],
)
first = next((record.step for record in records if record.loss < 0.1), None)
seconds = sum(record.seconds for record in records)
print(f"loss {records[0].loss:.2f} at step 1, below 0.1 first at step {first}; your guess was {prediction['step']}")
print(f"{seconds:.0f} s, {sum(r.tokens for r in records) / seconds:.0f} tokens/s on {device}")

# %% claims
assert MODEL != BUNDLED or 1.3 < records[0].loss < 1.7

# %% [markdown]
# **What happened?** Most of an answer is the same in every answer (`{"customer":"` …), and most of the rest is copied from the
# order. Both are learned in a few steps. A low loss *per token* does not yet say how many *whole* answers are right: one wrong
# token spoils an answer.
#
# ## 6 · After

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then an answer may differ
answers = {split: answers_of(model, chats) for split, chats in judged.items()}
marks = ["✓" if is_exact(a, e) else "✗" for a, e in zip(answers["test"], expected(judged["test"]))]
show_answers(
    zip([chat[-2]["content"] for chat in shown], before, answers["test"], marks),
    ("order", "before", "after", ""),
)

# %% alt="Pairs of horizontal bars, measured and your guess: share of {{len(judged['test'])}} orders that are exactly right. Of the test orders nearly all are, of the shifted orders fewer than half."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
from qlora_lab.classroom.plots import new_axes, plot_shares

score = {split: exact_match(answers[split], expected(judged[split])) for split in judged}
bars = {f"{split} orders": {"measured": score[split], "your guess": prediction[split]} for split in score}
_ = plot_shares(new_axes(height=2.4), bars, "exactly right (share of 50 orders)")

# %% claims
as_it_was = (MODEL, steps, learning_rate) == (BUNDLED, 20, 2e-3)
assert not as_it_was or (score["test"] >= 0.85 and score["shifted"] < 0.5)

# %% [markdown]
# **What happened?** On the kind of orders it was trained on, a model that got nothing right is now almost perfect, after a
# minute or two and {{8 * steps}} examples. On shifted orders it fails most of the time, and no training loss would have told you: a
# `test` set cut from the same cloth as the training set measures whether the model learned *your sentences*, not whether it
# learned *the job*. Which part of the job did it not learn?

# %% alt="Pairs of horizontal bars for six fields: share of {{len(judged['test'])}} orders in which the field is exactly right, for test and shifted orders. On test orders every field is right nearly always. On shifted ones each is right less often: item and colour lose least, quantity and city most."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
import json


def read(answer):
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


fields = {field: {} for field in ("customer", "item", "colour", "quantity", "city", "total")}
for split in judged:
    rights = [(read(a), json.loads(e)) for a, e in zip(answers[split], expected(judged[split]))]
    for field in fields:
        fields[field][split] = sum(got.get(field) == right[field] for got, right in rights) / len(rights)
_ = plot_shares(new_axes(height=4.2), fields, "field exactly right (share of 50 orders)")
well_formed = sum(set(read(answer)) == set(fields) for answer in answers["shifted"]) / len(answers["shifted"])
print(f"shifted: {well_formed:.0%} of the answers are JSON objects with exactly these six fields")

# %% [markdown]
# The form it has learned, as the printed line says. What goes into the fields is the problem: decoys (*not 34 but
# 31*), numbers in words, and values put into the wrong field where there is no decoy at all. Every training order follows one
# of a dozen patterns: for those it was enough to learn *where* things stand. Here are three that went wrong:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
wrong = [i for i, (a, e) in enumerate(zip(answers["shifted"], expected(judged["shifted"]))) if not is_exact(a, e)][:3]
show_answers(
    [(judged["shifted"][i][-2]["content"], answers["shifted"][i], expected(judged["shifted"])[i]) for i in wrong],
    ("shifted order", "answer", "expected"),
)

# %% [markdown]
# ### And what did it forget?

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
prose_after = text_loss(model, prose, dtype=compute_dtype).perplexity
print(
    f"perplexity on prose: {prose_before:.2f} before, {prose_after:.2f} after ({prose_after / prose_before - 1:+.0%})"
)

# %% [markdown]
# Plain English has become harder for it. But nothing is lost: the base has not changed by a single bit, and without the
# adapter you have the old model back.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
with model.disable_adapter():
    again = text_loss(model, prose, dtype=compute_dtype).perplexity
if again == prose_before:
    print(f"without the adapter: {again:.2f} again, to the last digit")

# %% claims
assert again == prose_before

# %% [markdown]
# ## 7 · Keep it
#
# What you trained is a small file. It needs the base model, but not this course: plain PEFT loads it.

# %%
from peft import PeftModel

folder = Path(tempfile.mkdtemp()) / "orders-adapter"
model.save_pretrained(folder)
size = (folder / "adapter_model.safetensors").stat().st_size
print(f"the adapter takes {size / 1e6:.1f} MB: 4 bytes for each of {trainable_parameters(model):,} parameters")

base, _ = load_model(MODEL, quantization="nf4")
reloaded = PeftModel.from_pretrained(base, folder)
same = answers_of(reloaded, shown) == answers_of(model, shown)
print(f"loaded again on a fresh base: {'same' if same else 'other'} answers")

# %% claims
assert same

# %% [markdown]
# ## 8 · Try it
#
# Write an order of your own. How strange may it be before the answer breaks? (Needs a running kernel.)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
from IPython.display import display

from qlora_lab.classroom.widgets import ask_box

system = orders["test"][0]["messages"][0]


def both(order):
    chat = [system, {"role": "user", "content": order}, {"role": "assistant", "content": ""}]
    with model.disable_adapter():
        untrained = answers_of(model, [chat])[0]
    return {"before": untrained, "after": answers_of(model, [chat])[0]}


mine = "Three green umbrellas to Ada Lovelace in London, please, she pays 42 euros."
display(show_answers(list(both(mine).items()), ("model", mine)))
ask_box(both, first=mine)

# %% [markdown]
# The same from a terminal, in 30 steps, with a report, checkpoints and `--resume`:
#
# ```
# python -m qlora_lab.train_qlora --output runs/orders
# python -m qlora_lab.train_qlora --output runs/lora --method lora --beside runs/orders
# # your data: lines of {"prompt": ..., "response": ...}
# python -m qlora_lab.train_qlora --output runs/mine --data my.jsonl
# # several GPUs
# accelerate launch -m qlora_lab.train_qlora --output runs/two-gpus
# ```
#
# ## Recap
#
# - **Configure `BitsAndBytesConfig`**: say `nf4`, double quantization and the compute dtype, since the defaults are others.
# - **Train a QLoRA model**: 4-bit base, frozen; an adapter, trained; labels of −100 over the prompt; the end token learned.
# - **Analyse the loss of accuracy**: judge on data that differs from the training data, and on what the model should not
#   forget. Whether the 4 bits cost anything is the question of notebook 11.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [02 · Why can I not just fine-tune a 7B model?](02_memory_wall.ipynb). Or go on here:
# set `steps` to 40 or `learning_rate` to 3e-4 in the cell of section 5, predict what happens to `shifted` and to the prose, and
# choose *Kernel → Restart Kernel and Run All Cells* (running that cell alone would go on training the trained adapter).
