# %% [markdown]
# # 12 · How do I ship it?
#
# Your adapter works, inside this notebook. Tomorrow somebody wants to use it on a laptop without Python, or behind a web server. In this
# lesson you turn it into files for *llama.cpp*, a C++ program that runs language models on nearly every computer. You also see how
# such a file can go wrong, and why.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 6 minutes on two CPU cores |
# | memory | 4 GB |
# | GPU | not needed |

# %% machinery "Imports, a folder to write into, and whether llama.cpp is here"
import json
import os
import tempfile
import urllib.request
from pathlib import Path

import torch
from IPython.display import display

from qlora_lab.classroom.checks import check_culprits, check_ends_taught, check_file_bytes, progress
from qlora_lab.classroom.lessons.n12.figures import plot_gaps, plot_merges, show_end
from qlora_lab.classroom.lessons.n12.machinery import (
    INSTALL,
    go_on_training,
    in_8_bits,
    is_here,
    loss_in,
    round_twice,
    serve,
    terminal,
    without_end,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.finetuning import (
    dequantize_linears,
    generate,
    is_exact,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    merge,
    text_loss,
    tokenize,
    unload,
)
from qlora_lab.quantization import dequantize, quantize

os.chdir(tempfile.mkdtemp())  # so that names of files are short; all of it is gone when the machine restarts
print("llama.cpp is here" if is_here() else f"llama.cpp is not here: run {INSTALL} in a new cell, then go on")

# %% [markdown]
# ## 1 · Something to ship
#
# `terminal` does here what the same line does in a terminal. This one trains the bundled model with QLoRA to turn orders into JSON,
# and writes the run into the folder `run`.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
terminal("python -m qlora_lab.train_qlora --steps 24 --batch-size 2 --lr 0.003 --eval-samples 0 --quiet --output run")

# %% [markdown]
# ## 2 · Three merges
#
# An adapter is two thin matrices, A and B, beside the frozen matrix W of a layer. Together they compute
# *W x + (alpha / rank) · B A x*. To *merge* is to add the product to W, once and for all, which leaves an ordinary model.
# But which W? You trained beside weights in 4 bits, so there are three ways:
#
# | | the adapter is added to | and stored in |
# |---|---|---|
# | *dequantized* | what the 4-bit weights stand for | 16 bits |
# | *requantized* | what the 4-bit weights stand for | 4 bits, rounded again |
# | *pristine* | the checkpoint's own 16-bit weights | 16 bits |
#
# PEFT's `merge_and_unload()` on a 4-bit model is the second way. Here are four weights on the levels of NF4, and small corrections,
# made up for this example:

# %%
weights = dequantize(quantize(torch.tensor([0.90, -0.35, 0.12, -0.60])))
corrections = torch.tensor([0.00, 0.02, -0.02, 0.03])
again = dequantize(quantize(weights + corrections))
print("weights in 4 bits      ", [f"{w:6.3f}" for w in weights])
print("with the corrections   ", [f"{w:6.3f}" for w in weights + corrections])
print("and in 4 bits again    ", [f"{w:6.3f}" for w in again])

# %% claims
assert torch.equal(again, weights)

# %% [markdown]
# Each correction is smaller than half a step to the next level, so rounding to the same levels takes it away again.
#
# **Predict.** Below stands the loss without the adapter, and with it beside the 4-bit weights. What is the loss
# after each merge?

# %% machinery "Load the model with its adapter, and measure losses"
chats = {split: load_samples("orders", split)["messages"] for split in ("train", "validation", "test", "shifted")}
model, tokenizer = load_model(quantization="nf4")
dtype = model.dtype
validation, _ = tokenize({"messages": chats["validation"][:8]}, tokenizer, max_length=256)


def loss_of(model):
    """Validation loss, nats per token."""
    loss = text_loss(model, validation, pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    return loss.total / loss.tokens


lines = {"no adapter": loss_of(model)}
lines["adapter beside"] = loss_of(load_lora(model, "run/adapter"))
names = list(lora_layers(model))

# %% claims
from qlora_lab.classroom.lessons.n12.machinery import survives

some = list(lora_layers(model).values())[::40]
assert survives(some, "nf4") < 0.5 and survives(some, "q4_0") > 0.7

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print(*(f"{name:<16}{loss:.3f}" for name, loss in lines.items()), sep="\n")

# %%
prediction = {"dequantized": ..., "requantized": ..., "pristine": ...}  # ← your guesses


# %%
def merged(base):
    """The base with the adapter in its weights: an ordinary model."""
    return unload(merge(load_lora(base, "run/adapter")))


def in_4_bits(model):
    """The same model after its linear layers were rounded to NF4."""
    for name in names:
        weight = model.get_submodule(name).weight
        weight.data = dequantize(quantize(weight.data.float())).to(weight.dtype)
    return model


# %% alt="Horizontal bars: validation loss after each merge, with lines for no adapter and for the adapter beside the base. Dequantized and pristine end near the adapter's line, requantized goes most of the way back to no adapter."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
model = merged(dequantize_linears(model))
losses = {"dequantized": loss_of(model)}
losses["requantized"] = loss_of(in_4_bits(merged(dequantize_linears(load_model(quantization="nf4")[0]))))
losses["pristine"] = loss_of(merged(load_model()[0]))
for name, loss in losses.items():
    print(f"{name:<16}{loss:.3f}   {told(prediction[name])}")
_ = plot_merges(new_axes(height=2.4), losses, lines, prediction)

# %% claims
assert losses["dequantized"] < lines["adapter beside"] + 0.03 and losses["pristine"] < lines["adapter beside"] + 0.1
assert losses["requantized"] > 0.5 * lines["no adapter"] and abs(losses["pristine"] - losses["dequantized"]) < 0.03

# %% [markdown]
# **What happened?** *Dequantized* is the model that you trained. *Requantized* has lost
# {{(losses["requantized"] - lines["adapter beside"]) / (lines["no adapter"] - lines["adapter beside"]):.0% ±0.3}} of what the adapter had
# gained, for the reason that the four numbers show. *Pristine* is as good here: so small a difference on eight samples means nothing. But an
# adapter may learn to make up for rounding errors, which this model does not have, and your measurements are of the dequantized one. So export
# takes that, with one exception in section 4.
#
# ## 3 · One file
#
# *GGUF* is the file format of llama.cpp. One file holds everything: weights, vocabulary, the *chat template* (the program
# that writes a conversation as one text, with marks around each turn), and the *end token*, at which an answer stops.

# %%
terminal("python -m qlora_lab.export run --to f16 --as gguf")

# %% [markdown]
# After the file and its size come two lines for a terminal: one starts llama.cpp's server, the other hands the model to
# *Ollama*, a friendlier shell around it. Here, the Python package `xllamacpp` runs the same server. You talk to it over HTTP:


# %%
def post(server, path, request):
    """One request: JSON there, JSON back."""
    headers, body = {"Content-Type": "application/json"}, json.dumps(request).encode()
    sent = urllib.request.Request(server.address + path, body, headers)
    return json.loads(urllib.request.urlopen(sent, timeout=120).read())


def ask(server, messages, max_tokens=60, **more):
    """What the model answers, why it stopped, and how fast it was."""
    request = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
    reply = post(server, "/v1/chat/completions", request)
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], reply["timings"]["predicted_per_second"]


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
server = serve("f16")
order = chats["test"][0]
answer, why, _ = ask(server, order[:-1])
print(order[-2]["content"], answer, f"it ended because of: {why}", sep="\n")

# %% claims
assert why == "stop" and is_exact(answer, order[-1]["content"])

# %% [markdown]
# That was your model, without PyTorch. The server speaks OpenAI's protocol, so programs written for that can use it.
#
# For a friend's laptop, copy the folder `f16`. Install Ollama (from ollama.com) or llama.cpp (`brew install llama.cpp` on a Mac,
# `winget install llama.cpp` on Windows) there, and type its line from above. After `ollama create`, `ollama run` with the model's name
# starts a chat.
#
# ## 4 · Smaller files
#
# F16 stores 16 bits for each weight. *Q8_0* takes blocks of 32 weights, and stores 8 bits for each weight and one 16-bit scale for
# the block. *Q4_0* does the same with 4 bits. A Q4_0 file of ours holds the vocabulary's table in Q8_0.
#
# **Exercise 12.1 ●●○ (3 minutes).** How large will the file of *your* model be? Write a function that says it in bytes. `linear` is the
# number of weights in the linear layers, `vocabulary` that of the embeddings (and of the head, if it has weights of its own). For the bundled
# model these are 106,168,320 and 28,311,552. The files below are two megabytes larger: they hold the tokenizer, too.


# %%
def file_bytes(linear, vocabulary, kind):
    """Bytes of a GGUF file of kind "f16", "q8_0" or "q4_0", without tokenizer and norms."""
    ### BEGIN SOLUTION (about 3 lines)
    bits = {"f16": (16, 16), "q8_0": (8 + 16 / 32, 8 + 16 / 32), "q4_0": (4 + 16 / 32, 8 + 16 / 32)}
    of_linear, of_vocabulary = bits[kind]
    return (linear * of_linear + vocabulary * of_vocabulary) / 8
    ### END SOLUTION


# %%
check_file_bytes(file_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>How many bits does a block of 32 weights take, with its scale? Divide by 32.</details>
# <details><summary>Hint 2</summary>Two kinds treat all weights alike. Q4_0 does not.</details>

# %% [markdown]
# **Predict.** Each file answers eight orders. How many does it answer *word for word* as the trained model does? There are two Q4_0
# files: `q4_0` is made from the pristine merge, so its weights are rounded once. `twice` is made from the dequantized merge, whose
# weights were rounded to NF4 before.

# %%
prediction = {"f16": ..., "q8_0": ..., "q4_0": ..., "twice": ...}  # ← your guesses

# %%
terminal("python -m qlora_lab.export run --to q8_0 --as gguf --weights q8_0", lines=1)
terminal("python -m qlora_lab.export run --to q4_0 --as gguf --weights q4_0", lines=1)
round_twice(Path("run"), Path("twice"))

# %%
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine, and another processor rounds otherwise
judged = chats["test"][:8]
trained = generate(model, tokenizer, [chat[:-1] for chat in judged], 60, dtype=dtype)


def judge(server):
    """Over eight orders: tokens/s, answers equal to the trained model's, right ones, those that stopped; and the loss."""
    answers, ends, speeds = zip(*[ask(server, chat[:-1]) for chat in judged])
    right = sum(is_exact(answer, chat[-1]["content"]) for answer, chat in zip(answers, judged))
    equal, loss = sum(map(str.__eq__, answers, trained)), loss_in(server, validation, tokenizer)
    return sum(speeds) / 8, equal, right, ends.count("stop"), loss


table = {}
for kind in prediction:
    table[kind] = sum(file.stat().st_size for file in Path(kind).glob("*.gguf")) / 1e6, *judge(serve(kind))

# %%
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine, and another processor rounds otherwise
print(f"{'of 8 orders':<12}{'MB':>7}{'tokens/s':>10}{'equal':>7}{'right':>7}{'stopped':>9}{'loss':>8}")
for kind, (size, speed, equal, right, stopped, loss) in table.items():
    print(
        f"{kind:<12}{size:>7.1f}{speed:>10.0f}{equal:>7}{right:>7}{stopped:>9}{loss:>8.3f}   {told(prediction[kind])}"
    )

# %% claims
assert table["f16"][2] >= 6 and table["q8_0"][2] >= 5 and table["f16"][4] == 8
assert table["q4_0"][5] < 0.7 * table["twice"][5] and abs(table["f16"][5] - losses["dequantized"]) < 0.02
assert table["q4_0"][0] < table["q8_0"][0] < table["f16"][0]
linear = sum(model.get_submodule(name).weight.numel() for name in names)
assert (linear, model.get_input_embeddings().weight.numel()) == (106_168_320, 28_311_552)
assert all(
    abs(8e6 * table[kind][0] / (106_168_320 * bits + 28_311_552 * of_table) - 1) < 0.03
    for kind, bits, of_table in (("f16", 16, 16), ("q8_0", 8.5, 8.5), ("q4_0", 4.5, 8.5))
)

# %% [markdown]
# *Right* answers are the reference, word for word. For the loss, `loss_in` asks the server how likely each token of section 2's
# samples was.
#
# **What happened?** F16 and Q8_0 answer as the trained model does. In 4 bits, several answers differ. The loss counts every token, and
# says more: {{table["q4_0"][5]:.3f ±0.1}} rounded once, {{table["twice"][5]:.3f ±0.2}} rounded twice, because the errors of both
# roundings add up. So for Q4_0, export takes the pristine merge.
#
# Why has `twice` not lost the adapter, as *requantized* has? That one rounds to the very levels on which the weights already stand.
# Q4_0 has others. Many weights stand close to the middle between two of them, where a small correction decides which way they
# go. So much of the adapter survives.
#
# Measure the speed where the file will run: here it is noisy.
#
# Eight orders are few. `--check` asks file and trained model what your run was judged on. Yours was judged on nothing, so take two
# samples of each split:

# %%
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine, and another processor rounds otherwise
terminal("python -m qlora_lab.export run --to checked --as gguf --weights q8_0 --check --samples 2")

# %% claims
assert json.loads(Path("checked/check.json").read_text())["verdict"] == "equal"

# %% [markdown]
# (Perplexity is exp(loss).) The last line is the verdict: *equal*, *broken*, or for Q4_0 *lossy*, with what was lost. Accept a lossy file
# only where Q8_0 does not fit. To lose less, train with `--merge-aware q4_0`: then each training step rounds as the file will, and the adapter learns what survives.
#
# ## 5 · A colleague's model
#
# A colleague goes on training your adapter for six steps, on more orders, with a script of her own. Her chat template differs from
# yours in one thing: it does not write `<|im_end|>` after a turn.
#
# **Predict.** What is wrong with her model?

# %%
vote = ...  # "wrong answers", "stops too early", "never stops" or "nothing"

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
hers = without_end(chats["train"][100:200], tokenizer)
go_on_training(Path("run"), hers, steps=6, to=Path("hers"))
terminal("python -m qlora_lab.export hers --to hers-q8_0 --as gguf --weights q8_0", lines=1)
server = serve("hers-q8_0")
answer, why, _ = ask(server, order[:-1], max_tokens=90)
print(repr(answer), f"it ended because of: {why}; {told(vote)}", sep="\n")

# %% claims
assert why == "length" and is_exact(answer[: len(order[-1]["content"])], order[-1]["content"])

# %% [markdown]
# **What happened?** The answer is right, and then the model goes on until the limit of 90 tokens (`length`). llama.cpp knows the end token,
# but the model never says it. Here are the last tokens that a sample teaches, yours and hers:


# %%
yours, _ = tokenize({"messages": chats["train"][100:200]}, tokenizer, max_length=256)
display(show_end(yours[0], tokenizer), show_end(hers[0], tokenizer))

# %% [markdown]
# The template ends a turn with the end token and a line break. Hers leaves the end token out, so the line break is what
# remains, and nothing says that an answer ends.
#
# **Exercise 12.2 ●●○ (4 minutes).** Write the test that finds this *before* training, for anybody's data: the share of samples
# in which the last learned token is an end token. A sample has `labels`: a list of token ids, with -100 for tokens that are not learned.


# %%
def ends_taught(samples, end_ids):
    """The share of the samples, 0 to 1, whose last learned token is one of `end_ids`."""
    ### BEGIN SOLUTION (about 4 lines)
    taught = 0
    for sample in samples:
        learned = [label for label in sample.labels if label != -100]
        taught += bool(learned) and learned[-1] in end_ids
    return taught / len(samples)
    ### END SOLUTION


# %%
check_ends_taught(ends_taught)

# %% [markdown]
# <details><summary>Hint 1</summary>What counts is the last label that is learned. Is it always the last of the list?</details>
# <details><summary>Hint 2</summary>First throw away all -100. Nothing may be left, and such a sample does not teach the end.</details>

# %% [markdown]
# Now your test on both data sets (`None` until you have written it):

# %%
print("yours, hers:", *[ends_taught(samples, [tokenizer.eos_token_id]) for samples in (yours, hers)])

# %% claims
lasts = [{tokenizer.decode(sample.labels[-1:]) for sample in samples} for samples in (yours, hers)]
assert lasts == [{"<|im_end|>"}, {"\n"}]

# %% [markdown]
# A *stop text* tells the server to cut the answer off there. It is quick, and right as long as no answer contains the text. The cure is
# to put the end token back into the samples, and to train again:


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print("with a stop text:", ask(server, order[:-1], stop=["\n"])[:2])
go_on_training(Path("hers"), yours, steps=6, to=Path("mended"))
terminal("python -m qlora_lab.export mended --to mended-q8_0 --as gguf --weights q8_0", lines=1)
answer, why, _ = ask(serve("mended-q8_0"), order[:-1], max_tokens=90)
print("trained again:", (answer, why))

# %% claims
assert why == "stop"

# %% [markdown]
# ## 6 · The French riddle
#
# Ask the bundled model, without any adapter, the same question in two files.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
question = [{"role": "user", "content": "What is the capital of France?"}]
servers = {}
for kind in ("f16", "q8_0"):
    terminal(f"python -m qlora_lab.export smollm2-135m-instruct --to base-{kind} --as base --weights {kind}", lines=1)
    servers[kind] = serve(f"base-{kind}")
    print(f"{kind:<6}{ask(servers[kind], question, 24)[0]!r}")

# %% [markdown]
# Is the Q8_0 file broken? There are four suspects: the chat template, the tokens, the *weights* in the file (wrong ones, or only
# rounded), and the rounded *inputs*. To multiply fast, llama.cpp on a CPU rounds the numbers that flow *into* each linear layer to
# 8 bits, too, if the weights have 8 bits or fewer. First, clear the innocent:


# %%
prompts = {kind: post(server, "/apply-template", {"messages": question})["prompt"] for kind, server in servers.items()}
ours = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
theirs = post(servers["q8_0"], "/tokenize", {"content": ours, "parse_special": True})["tokens"]
ids = tokenizer(ours, add_special_tokens=False)["input_ids"]
print("same text:", prompts["f16"] == prompts["q8_0"] == ours, "· same tokens:", ids == theirs, f"({len(ids)})")

# %% claims
assert prompts["f16"] == prompts["q8_0"] == ours and ids == theirs

# %% [markdown]
# Then look at the first word. The *gap* is the log probability of "The" minus that of "L": above zero the answer begins in English, below
# zero in French.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
gaps = {}
for kind, server in servers.items():
    request = {"messages": question, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    first = post(server, "/v1/chat/completions", request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    said = {entry["token"]: entry["logprob"] for entry in first}
    gaps[kind] = said["The"] - said["L"]
    print(f"{kind:<6}The {said['The']:.2f}   L {said['L']:.2f}   gap {gaps[kind]:+.2f}")

# %% claims
assert gaps["f16"] > 0 and abs(gaps["q8_0"]) < 0.5

# %% [markdown]
# It is nearly a tie in both files, so a small error decides, and two suspects are left. In PyTorch you can round one and leave the other
# alone: `in_8_bits` does what Q8_0 does. The question goes through the model eight times, with noise of a millionth on every layer's
# inputs, to show how much is chance.
#
# **Predict.** Which rounding, alone, can bring the gap below zero?

# %%
vote = ...  # "weights", "inputs", "each of them" or "neither"


# %% machinery "The gap between The and L, with rounded weights, rounded inputs, both or neither; each eight times"
english, french = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("The", "L"))


def gaps_with(function, weights, inputs, times=8):
    """Log probability of The minus that of L, `times` times: the inputs differ by millionths from time to time."""
    base, _ = load_model(device="cpu")
    base = base.float().eval()
    layers = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    generator = torch.Generator().manual_seed(0)

    def before(_, given):
        x = given[0] * (1 + 1e-6 * torch.randn(given[0].shape, generator=generator))
        return (function(x) if inputs else x,)

    for layer in layers:
        if weights:
            layer.weight = torch.nn.Parameter(function(layer.weight.data), requires_grad=False)
        layer.register_forward_pre_hook(before)
    found = []
    for _ in range(times):
        with torch.no_grad():
            scores = base(torch.tensor([ids])).logits[0, -1].float()
        found.append((scores[english] - scores[french]).item())
    return found


# %% alt="Dots: the gap between The and L, eight runs each. With nothing rounded all lie at +0.1, with rounded weights all at +0.2. With rounded inputs they scatter on both sides of zero, and with both rounded they scatter as widely. Diamonds: llama.cpp's F16 and Q8_0."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
cases = {"nothing": (False, False), "weights": (True, False), "inputs": (False, True), "both": (True, True)}
found = {name: gaps_with(in_8_bits, *which) for name, which in cases.items()}
for name, values in found.items():
    print(f"{name + ' rounded':<17}", *[f"{value:+.2f}" for value in values], f"  mean {sum(values) / 8:+.2f}")
print(told(vote))
_ = plot_gaps(new_axes(height=3), {f"{name} rounded": values for name, values in found.items()}, gaps)

# %% claims
spread = {name: max(values) - min(values) for name, values in found.items()}
assert spread["weights"] < 0.02 < 0.1 < spread["inputs"] and spread["both"] > 0.1
assert min(found["weights"]) > min(found["nothing"]) > 0 > min(found["inputs"]) and min(found["both"]) < 0

# %% [markdown]
# **What happened?** Rounded weights move the gap, but always to the same place, on the English side. Rounded inputs scatter it: noise of a
# millionth sends a few numbers to the neighbouring level, and each layer makes more of that. They shift it, too: mere chance would
# scatter around the gap without rounding, but the mean is {{sum(found["inputs"]) / 8:+.2f ±0.3}}. Why it shifts towards French, these eight
# runs do not tell.
#
# Your own Q8_0 file answered like the trained model. Its loss of {{table["q8_0"][5]:.3f ±0.1}} means that the right token typically has a
# probability of {{2.718 ** -table["q8_0"][5]:.0% ±0.1}} (exp(−loss)), so ties are rare. One answer proves nothing about a file: compare many, on
# your task.
#
# **Exercise 12.3 ●●○ (4 minutes).** Four people say that their Q8_0 file is broken. Name each one's suspect. (Another processor
# adds in another order, which changes last digits, like our noise.)
#
# | | what they have found |
# |---|---|
# | A | the text is that of training, but has a dozen tokens more: each `im_start` mark became several |
# | B | training had three tokens more; decoded, llama.cpp's prompt ends with the user's last word |
# | C | same text, same tokens; no answer is right on any computer; an F16 file of the same export is no better |
# | D | same text, same tokens; nearly all answers are equal, and on another computer, with the same file, other ones are not |

# %%
### BEGIN SOLUTION
### STUB: culprits = {"A": ..., "B": ..., "C": ..., "D": ...}  # "template", "tokens", "weights" or "inputs"
culprits = {"A": "tokens", "B": "template", "C": "weights", "D": "inputs"}
### END SOLUTION

# %%
check_culprits(culprits)

# %% [markdown]
# <details><summary>Hint 1</summary>Each suspect did it once. Go in the order of this section: text, tokens, what is computed.</details>
# <details><summary>Hint 2</summary>The weights in a file are the same on each computer, and may be wrong without being rounded.</details>

# %% [markdown]
# ## 7 · Who runs what
#
# | you hand over | its size here | who runs it | choose it when |
# |---|---|---|---|
# | a merged checkpoint, `--as merged` | two bytes a weight, as F16 | transformers; *vLLM*, a server for GPUs | there is a GPU, many users |
# | GGUF, `--as gguf` | {{table["q4_0"][0]:.0f}} to {{table["f16"][0]:.0f}} MB | llama.cpp, Ollama | a laptop, a CPU, no Python |
# | the adapter alone: `run/adapter`, or GGUF by `--as adapter` | {{Path("run/adapter/adapter_model.safetensors").stat().st_size / 1e6:.0f}} MB, and one base | PEFT and vLLM, or llama.cpp | many tasks share one base |
#
# In llama.cpp one base serves many adapters, and each request says which of them act. `--as base` writes the base, here
# in Q4_0. The adapter stays beside it, and is not rounded.
#
# **Predict.** Is its loss lower than that of the merged Q4_0 file?

# %%
vote = ...  # "lower", "the same" or "higher"

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
terminal("python -m qlora_lab.export run --to adapter --as adapter", lines=1)
terminal("python -m qlora_lab.export run --to base-q4_0 --as base --weights q4_0", lines=1)
server = serve("base-q4_0", "adapter")
beside = loss_in(server, validation, tokenizer)
print(f"loss of Q4_0: {beside:.3f} with the adapter beside, {table['q4_0'][5]:.3f} merged; {told(vote)}")
print("adapter off:", ask(server, order[:-1], 40, lora=[{"id": 0, "scale": 0}])[0])

# %% claims
assert beside > table["q4_0"][5] - 0.01 and abs(beside - table["q4_0"][5]) < 0.5 * (
    table["twice"][5] - table["q4_0"][5]
)

# %% [markdown]
# It is not lower, though the adapter is whole now: here it is even a little higher. (After a longer training, on {{20}} samples, both
# had {{0.117}}.) So the rounding of the base is what costs. Keep adapters apart to serve many tasks.
#
# Each folder has a `README.md`, too, the page that Hugging Face shows of a model. Add where the data comes from, and what the
# model is not for.
#
# ## 8 · Your own run
#
# With a data file of your own, in a terminal (`--check` needs `pip install xllamacpp`):
#
# ```
# python -m qlora_lab.train_qlora --data my.jsonl --output runs/mine
# python -m qlora_lab.export runs/mine --to shipped --as gguf --weights q8_0 --check
# ollama create mine -f shipped/Modelfile && ollama run mine
# ```
#
# ## Recap
#
# - Merge into the *dequantized* base, which is the model that you trained. For Q4_0, round only once.
# - A file is right if it *answers* as the trained model did: same prompt, same tokens, same end, nearly all answers equal.
# - A model stops only if it has learned to. Look at the last learned token before you train.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [13 · What do tutorials get wrong?](13_fact_check.ipynb)
