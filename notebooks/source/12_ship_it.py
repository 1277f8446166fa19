# %% [markdown]
# # 12 · How do I ship it?
#
# Tomorrow somebody wants your adapter on a laptop without Python, or behind a web page. So you merge it into the model, write one file for
# *llama.cpp*, a program that runs language models on nearly every computer, and check that it answers as your model did.
#
# | you need | |
# |---|---|
# | time | 35 minutes |
# | computing | up to 3 minutes on two CPU cores |
# | memory | 4 GB |
# | GPU | not needed |

# %% machinery "Imports, a folder to write into, and whether llama.cpp is here"
import json
import os
import tempfile
import urllib.request
import warnings
from pathlib import Path

import torch
from IPython.display import display

from qlora_lab.classroom.checks import check_ends_taught, check_file_bytes, check_riddle, progress
from qlora_lab.classroom.lessons.n12.figures import plot_merges, show_ends
from qlora_lab.classroom.lessons.n12.machinery import (
    INSTALL,
    MEASURED,
    TRAINED,
    as_written,
    base_alone,
    clue,
    go_on_training,
    is_here,
    serve,
    show_measured,
    survives,
    terminal,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.finetuning import is_exact, load_lora, load_model, load_samples, lora_layers, text_loss, tokenize
from qlora_lab.models.loading import locate
from qlora_lab.quantization import dequantize, quantize

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name
warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")  # the text says what it warns of
scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed when the kernel ends
os.chdir(scratch.name)  # so that names of files are short
print("llama.cpp is here" if is_here() else f"llama.cpp is not here: run {INSTALL} in a new cell, then go on")

# %% [markdown]
# ## 1 · Something to ship
#
# `terminal` runs a line of a terminal. This one trains for lesson 01's task, on {{96}} samples instead of {{240}}.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
terminal(
    "python -m qlora_lab.train_qlora --steps 24 --batch-size 4 --lr 0.002 --eval-samples 0 --quiet --output run",
    lines=2,
)

# %% [markdown]
# ## 2 · Three merges
#
# A layer with an adapter computes *W x + (alpha / rank) · B A x*. To *merge* is to add *(alpha / rank) · B A* to W for good, which leaves
# an ordinary model. But to which W? You trained beside weights in 4 bits, so there are three ways:
#
# | | the adapter is added to | and stored in |
# |---|---|---|
# | *dequantized* | what the 4-bit weights stand for | 16 bits |
# | *requantized* | what the 4-bit weights stand for | 4 bits, rounded again |
# | *pristine* | the checkpoint's own 16-bit weights | 16 bits |
#
# Four weights on the levels of NF4 (lesson 04), with small corrections (made up):

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
# Each correction is smaller than half a step to the next level, so rounding takes it away again.
#
# **Predict.** Below is the loss on eight held-out orders, without the adapter and with it beside the 4-bit weights. What is it after
# each merge?

# %% machinery "Load the model with its adapter, and measure losses"
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
checkpoint = locate("smollm2-135m-instruct")
chats = {split: load_samples("orders", split)["messages"] for split in ("train", "validation", "test")}
beside, tokenizer = load_model(quantization="nf4")
dtype, device = beside.dtype, str(beside.device)
validation, _ = tokenize({"messages": chats["validation"][:8]}, tokenizer, max_length=256)


def loss_of(model):
    """Validation loss, nats per token."""
    loss = text_loss(model, validation, pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    return loss.total / loss.tokens


lines = {"no adapter": loss_of(beside)}
lines["adapter beside"] = loss_of(load_lora(beside, "run/adapter"))
left = survives(list(lora_layers(beside).values())[::40], "nf4")

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print(*(f"{name:<16}{loss:.3f}" for name, loss in lines.items()), sep="\n")

# %%
prediction = {"dequantized": ..., "requantized": ..., "pristine": ...}  # ← your guesses

# %% [markdown]
# In plain transformers and PEFT, the three ways differ by a few words. (For `checkpoint`, a name such as
# `Qwen/Qwen2.5-1.5B-Instruct` will do.)

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

as_trained = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
)


def base(config=None):
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=dtype, device_map=device)


def merged(base):
    return PeftModel.from_pretrained(base, "run/adapter").merge_and_unload()


# %% alt="Horizontal bars: validation loss after each merge, with lines for no adapter and for the adapter beside the base. Dequantized and pristine end near the adapter's line, requantized goes most of the way back to no adapter."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
model = merged(base(as_trained).dequantize())
losses = {
    "dequantized": loss_of(model),
    "requantized": loss_of(merged(base(as_trained))),
    "pristine": loss_of(merged(base())),
}
for name, loss in losses.items():
    print(f"{name:<16}{loss:.3f}   {told(prediction[name])}")
print(f"requantized: {left:.0%} of the corrections are left in the weights")
_ = plot_merges(new_axes(height=2.4), losses, lines, prediction)

# %% claims
from qlora_lab.finetuning import dequantize_linears, merge, unload

gained = lines["no adapter"] - lines["adapter beside"]
assert (
    abs(losses["dequantized"] - lines["adapter beside"]) < 0.03 and losses["pristine"] < lines["adapter beside"] + 0.1
)
assert losses["requantized"] > lines["adapter beside"] + 0.3 * gained and left < 0.2
assert abs(losses["pristine"] - losses["dequantized"]) < 0.03
ours = unload(merge(load_lora(dequantize_linears(load_model(quantization="nf4")[0]), "run/adapter")))
theirs = dict(model.named_parameters())
assert all(
    torch.allclose(theirs[name].float(), w.float(), rtol=2**-7, atol=1e-6) for name, w in ours.named_parameters()
)
assert len(theirs) == len(dict(ours.named_parameters()))
del ours, theirs

# %% [markdown]
# **What happened?** *Dequantized* is the model that you trained, but for the rounding to 16 bits. Without the word `.dequantize()`,
# `merge_and_unload()` on the 4-bit model is *requantized*. It has lost
# {{(losses["requantized"] - lines["adapter beside"]) / (lines["no adapter"] - lines["adapter beside"]):.0% ±0.3}} of what the adapter had gained in
# loss, and PEFT only warns of "rounding errors". Three such models, trained on a GPU, got none of {{100}} `test` orders right. Only
# {{left:.0% ±0.1}} of the corrections are left, in six layers. Why so much of the gain
# is left all the same, we know only in part ([dive H](dive_h_merging.ipynb)).
#
# *Pristine* is the model loaded once more in 16 bits. Eight orders are too few to tell which is better. But it is not the
# model that you judged, and an adapter may have learned to make up for NF4's rounding errors. **So our export takes
# *dequantized*, but for Q4_0 *pristine*** (section 4).
#
# > **Without this course.** `save_pretrained("merged")` of model and tokenizer writes the merged model, and llama.cpp's script
# > `convert_hf_to_gguf.py` makes the next section's file from it.
#
# ## 3 · One file
#
# *GGUF* is llama.cpp's file format. One file holds everything: weights, vocabulary, chat template, and the end token, at which an answer
# stops. `--check` asks file and trained model five `test` orders and
# five `shifted` ones.

# %%
# NBVAL_IGNORE_OUTPUT
# because times depend on the machine, and another processor rounds otherwise
terminal("python -m qlora_lab.export run --to shipped --as gguf --weights q8_0 --check --samples 5")

# %% claims
check = json.loads(Path("shipped/check.json").read_text())
from qlora_lab.export.check import UNEQUAL, most_unequal

assert most_unequal(UNEQUAL["q8_0"], 10) == 5
assert [most_unequal(UNEQUAL[kind], 100) for kind in ("f16", "q8_0")] == [7, 20]
assert check["verdict"] == "equal" and check["samples"] == 10 and check["exact_match"][0] >= 0.4

# %% [markdown]
# First come the file and two lines for a terminal: one for llama.cpp's server, one for *Ollama*, a friendlier shell around it.
#
# Then `--check` counts the answers that are *equal*, word for word, and right ones (*exact match*). *Perplexity* (lesson 08) says how likely
# each finds the right answers. The indented lines show where answers part (token ids in brackets), and how much likelier the model found its
# own token: near {{1}}, any rounding may decide. The verdict tells you whether to hand over the file:
#
# | verdict | a file of {{16}} or {{8}} bits | a file of 4 bits | hand it over? |
# |---|---|---|---|
# | equal | of {{100}} answers, at most {{7}} (16 bits) or {{20}} (8 bits) differ | keeps nearly all that the model had right | yes |
# | lossy | | keeps less, or the perplexity is {{5}} % higher | if you can spare what is lost |
# | broken | more differ | keeps less than half, or the perplexity has doubled | no |
#
# It compares the file with *your model*, not with the truth: **the file of a useless model is EQUAL, too.** So judge the model first. And
# ask a hundred orders (`--samples {{50}}`): of ten, five may differ.
#
# The package `xllamacpp` runs the server here, and any program can ask it over HTTP (`temperature` {{0}}: the likeliest token):


# %%
def ask(server, messages, max_tokens=60, **more):
    """What the model answers, and why it stopped."""
    request = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
    headers, body = {"Content-Type": "application/json"}, json.dumps(request).encode()
    sent = urllib.request.Request(server.address + "/v1/chat/completions", body, headers)
    choice = json.loads(urllib.request.urlopen(sent, timeout=120).read())["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
server, order = serve("shipped"), chats["test"][0]
answer, why = ask(server, order[:-1])
print(order[-2]["content"], answer, f"it ended because of: {why}", sep="\n")

# %% claims
assert why == "stop" and is_exact(answer, order[-1]["content"])

# %% [markdown]
# For a friend's laptop, copy the folder `shipped` there, and type one of the two lines from above.
#
# <details><summary>How do I keep the folder, install llama.cpp or Ollama, and what else does Ollama need?</summary>
#
# The folder goes when this notebook's kernel ends. To keep it, run `import shutil; shutil.copytree("shipped", Path.home() / "shipped")` in a
# new cell. Ollama comes from ollama.com. For llama.cpp, type `brew install llama.cpp` on a Mac, `winget install llama.cpp` on Windows.
#
# In training, a system message stated the task before each order; without one, the chat template writes its own (lesson 08). So for
# Ollama, first write yours, `order[0]["content"]`, behind `SYSTEM` in the `Modelfile`. After its line from above, type `ollama run` with
# the model's name.
#
# </details>
#
# ## 4 · How small?
#
# *F16* stores 16 bits for each weight. *Q8_0* stores 8 bits, and one
# 16-bit scale for each block of {{32}} weights. *Q4_0* stores 4 bits and the same scale, but our Q4_0 files hold the embeddings in Q8_0.
#
# **Exercise 12.1 ●●○ (3 minutes).** How large will the file of *your* model be, in bytes? `linear` is the number of weights in its linear
# layers, `vocabulary` that of its embeddings (and of the head, if it has its own weights). The bundled
# model has {{sum(layer.base.weight.quant_state.shape.numel() for layer in lora_layers(beside).values()):,}} and
# {{beside.get_input_embeddings().weight.numel():,}}.


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
# <details><summary>Hint 1</summary>How many bits does a block of {{32}} weights take, with its scale? Divide by {{32}}.</details>
# <details><summary>Hint 2</summary>Two kinds treat all weights alike. Q4_0 does not.</details>

# %% [markdown]
# **Predict.** After lesson 01's whole training, a model answered {{100}} orders, half `test` and half `shifted`, and got {{TRAINED.kept}} exactly
# right ([one run](../docs/export.md), on another CPU than lesson 01's). How many of the {{100}} does each file answer word for word as the model does?

# %%
prediction = {"f16": ..., "q8_0": ..., "q4_0": ...}  # ← your guesses

# %%
show_measured(prediction)

# %% claims
from qlora_lab.places import RECORDS

record = RECORDS / "merge-aware-nvidia-h200.json"
shares = []
for run in json.loads(record.read_text(encoding="utf-8"))["runs"]:
    if run["way"] == "plain, 30 steps":
        of = {
            way: "".join(run[way]["exact"][split][:50] for split in ("test", "shifted")) for way in ("beside", "q4_0")
        }
        shares.append(sum(a == b == "1" for a, b in zip(of["beside"], of["q4_0"])) / of["beside"].count("1"))
assert len(shares) == 3 and f"{min(shares):.0%} {max(shares):.0%}" == "62% 73%"
runs = json.loads(record.read_text(encoding="utf-8"))["runs"]
lost = [run["nf4"]["exact"]["test"] for run in runs if run["way"] == "plain, 30 steps"]
assert [(len(bits), bits.count("1")) for bits in lost] == [(100, 0)] * 3
assert round(MEASURED["q4_0"].kept / TRAINED.kept, 2) == 0.66
assert json.loads((RECORDS / "rounded-twice-cpu-x86_64.json").read_text(encoding="utf-8"))["settings"]["orders"] == 10
assert base_alone("Q4_0 from NF4").loss > 5 * base_alone("Q4_0").loss
(size,) = (file.stat().st_size / 1e6 for file in Path("shipped").glob("*.gguf"))
assert round(size, 1) == MEASURED["q8_0"].megabytes
for kind, bits, of_table in (("f16", 16, 16), ("q8_0", 8.5, 8.5), ("q4_0", 4.5, 8.5)):
    assert 1.5 < MEASURED[kind].megabytes - (106_168_320 * bits + 28_311_552 * of_table) / 8e6 < 2.5
assert sum(layer.base.weight.quant_state.shape.numel() for layer in lora_layers(beside).values()) == 106_168_320
assert beside.get_input_embeddings().weight.numel() == 28_311_552
assert (
    MEASURED["q8_0"].kept == TRAINED.kept == 61 and 40 <= MEASURED["q4_0"].kept <= 41 and MEASURED["q8_0"].equal < 100
)

# %% [markdown]
# **What happened?** F16 answers as the model does, and Q8_0 nearly so. Q4_0 has
# lost a third of what the model had right. Take it only where Q8_0 does not fit.
#
# *q4_0* is made from *pristine* weights, rounded once. *q4_0 twice* is made from *dequantized* ones: rounded to NF4, then to Q4_0.
# How much that costs differs: three other runs, on a GPU, kept {{62}} to {{73}} % of the right answers. The base alone suffers, too: on
# ten orders, its loss is {{base_alone("Q4_0").loss:.1f}} rounded once, and {{base_alone("Q4_0 from NF4").loss:.1f}} rounded twice. **So round once:
# for Q4_0, merge into *pristine*.** [Dive H](dive_h_merging.ipynb) shows what the second rounding does, and how `--merge-aware q4_0`
# trains an adapter that survives it.
#
# ## 5 · A colleague's model
#
# A colleague trains your adapter for six more steps, with her own script.
#
# **Predict.** What is wrong with her model?

# %%
vote = ...  # "wrong answers", "stops too early", "never stops" or "nothing"

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
hers = as_written(chats["train"][300:400], tokenizer, tokenizer.chat_template.replace("<|im_end|>", ""))
go_on_training(Path("run"), hers, steps=6, to=Path("hers"))
terminal("python -m qlora_lab.export hers --to hers-q8_0 --as gguf --weights q8_0", lines=1)
server = serve("hers-q8_0")
answer, why = ask(server, order[:-1], max_tokens=90)
print(repr(answer), f"it ended because of: {why}; {told(vote)}", sep="\n")

# %% claims
assert why == "length" and is_exact(answer[: len(order[-1]["content"])], order[-1]["content"])

# %% [markdown]
# **What happened?** The answer begins right, but goes on to the limit of {{90}} tokens (`length`): her template writes no `<|im_end|>`
# after a turn (lesson 08). Here are the last tokens of one order, as you, TRL (lesson 09) and she trained. Learned tokens are framed:


# %%
yours, _ = tokenize({"messages": chats["train"][300:400]}, tokenizer, max_length=256)
trl = as_written(chats["train"][300:400], tokenizer, tokenizer.chat_template)
display(show_ends({"yours": yours[0], "TRL": trl[0], "hers": hers[0]}, tokenizer))

# %% claims
lasts = [{tokenizer.decode(sample.labels[-1:]) for sample in samples} for samples in (yours, trl, hers)]
assert lasts == [{"<|im_end|>"}, {"\n"}, {"\n"}]
assert {sample.labels[-2] for sample in trl} == {tokenizer.eos_token_id}
assert not any(tokenizer.eos_token_id in sample.labels for sample in hers)

# %% [markdown]
# Hers teaches a line break *in place of* the end token, and six steps were enough. TRL teaches one *behind* the end token, which is harmless.
#
# **Exercise 12.2 ●●○ (4 minutes).** Write the test that finds this *before* training: the share of samples that teach
# their end. Behind the end token, only blanks such as line breaks may be learned. A sample's `labels` are token ids,
# with `-100` for tokens that are not learned.


# %%
def ends_taught(samples, end_ids, blank_ids):
    """The share of the samples, 0 to 1, in which the last learned token that is no blank is one of `end_ids`."""
    ### BEGIN SOLUTION (about 5 lines)
    taught = 0
    for sample in samples:
        learned = [label for label in sample.labels if label != -100 and label not in blank_ids]
        taught += bool(learned) and learned[-1] in end_ids
    return taught / len(samples)
    ### END SOLUTION


# %%
check_ends_taught(ends_taught)

# %% [markdown]
# <details><summary>Hint 1</summary>What counts is the last label that is learned. Is it always the last of the list?</details>
# <details><summary>Hint 2</summary>What does a sample teach in which everything is `-100`?</details>

# %% [markdown]
# Your test on all three should say `1.0 1.0 0.0`:

# %%
ends, blanks = [tokenizer.eos_token_id], tokenizer("\n")["input_ids"]
print("yours, TRL, hers:", *[ends_taught(samples, ends, blanks) for samples in (yours, trl, hers)])

# %% [markdown]
# ## 6 · The French riddle, if you like
#
# In PyTorch, the bundled model, without your adapter, knows the capital of France. Ask its Q8_0 file:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then it may answer in English
terminal("python -m qlora_lab.export smollm2-135m-instruct --to riddle --as base --weights q8_0", lines=1)
server, question = serve("riddle"), [{"role": "user", "content": "What is the capital of France?"}]
print(ask(server, question, 15)[0])

# %% [markdown]
# (If yours says *Paris*, take ours.) The suspects:
#
# | suspect | what it would have done |
# |---|---|
# | "template" | The file's chat template writes another prompt. |
# | "tokens" | The file's vocabulary cuts the prompt into other tokens. |
# | "weights" | They were rounded to 8 bits when the file was written. |
# | "inputs" | To multiply fast, llama.cpp on a CPU also rounds the numbers that flow *into* each layer, for each token anew, if the weights have 8 bits or fewer. |
#
# **Exercise 12.3 ●●○ (3 minutes).** Who is the culprit, and does the file store anything wrong ("broken") or not ("whole")? Clues {{2}} and
# {{3}} round one thing only, in PyTorch. Each number is the probability of *The* as the answer's first word, divided by that of *L*: below {{1}}
# the answer begins in French. ([With nothing rounded, it is {{1.1}}](../docs/export.md).) Each is measured eight times, with tiny noise, to show chance.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print(*[clue(number, server, question) for number in (1, 2, 3)], sep="\n")

# %% claims
from qlora_lab.classroom.lessons.n12.machinery import english_over_french

ids = server.ids(server.prompt(question))
rounded = {number: [float(word) for word in clue(number, server, question).split()[-8:]] for number in (2, 3)}
assert min(rounded[2]) > 1.1 and max(rounded[2]) - min(rounded[2]) < 0.02
assert min(rounded[3]) < 1 and max(rounded[3]) - min(rounded[3]) > 0.1
assert english_over_french(ids, weights=False, inputs=False, times=1)[0] > 1.05
assert "the same text and the same tokens" in clue(1, server, question)

# %%
### BEGIN SOLUTION
### STUB: riddle = {"culprit": ..., "file": ...}  # the file is "whole" or "broken"
riddle = {"culprit": "inputs", "file": "whole"}
### END SOLUTION

# %%
check_riddle(riddle)

# %% [markdown]
# <details><summary>Hint 1</summary>Clue {{1}} clears two of the four.</details>
# <details><summary>Hint 2</summary>Which clue has numbers below {{1}}? Is what is rounded there stored in the file?</details>

# %% [markdown]
# Solved?
#
# <details><summary>Here is why</summary>
#
# Both words are nearly a tie. Rounded weights always move it to the same place, farther on the English side. Rounded inputs scatter it to both
# sides. They are rounded while llama.cpp computes, so the Q8_0 file is whole, and may answer otherwise on another computer, whose processor
# adds in another order. [The page on exports](../docs/export.md) tells the riddle whole.
#
# </details>
#
# ## 7 · Who runs what
#
# | you hand over | its size here | who runs it | choose it when |
# |---|---|---|---|
# | a merged checkpoint, `--as merged` | two bytes a weight | transformers; *vLLM*, a server that answers many requests at once | there is a GPU |
# | GGUF, `--as gguf` | {{MEASURED["q4_0"].megabytes:.0f}} to {{MEASURED["f16"].megabytes:.0f}} MB | llama.cpp, Ollama | a laptop, a CPU, no Python |
# | the adapter alone: `run/adapter`, or GGUF by `--as adapter` | {{Path("run/adapter/adapter_model.safetensors").stat().st_size / 1e6:.0f}} MB, and one base | PEFT and vLLM, or llama.cpp | many tasks share one base |
#
# For the last row, `--as base` writes the base. Each request says which adapters act:

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
terminal("python -m qlora_lab.export run --to adapter --as adapter", lines=1)
terminal("python -m qlora_lab.export run --to base --as base --weights q4_0", lines=1)
server = serve("base", "adapter")
for scale in (1, 0):
    print(f"adapter × {scale}:", ask(server, order[:-1], 40, lora=[{"id": 0, "scale": scale}])[0])

# %% claims
assert '"customer"' in ask(server, order[:-1], 40, lora=[{"id": 0, "scale": 1}])[0]
assert '"customer"' not in ask(server, order[:-1], 40, lora=[{"id": 0, "scale": 0}])[0]

# %% [markdown]
# Ours wrote *Ivanova* for *Ivanov*: the adapter was not trained beside this base, so judge both anew.
#
# Each exported folder has a *model card*, `README.md`. Add where the data comes from, and what the model is not for.
#
# ## 8 · Your own run
#
# With a data file of your own, in a terminal ([lesson 08](08_your_data.ipynb) chooses the flags; `--check` needs
# `pip install xllamacpp`):
#
# ```
# python -m qlora_lab.train_qlora --data my.jsonl --split-by customer --validate-every 10 --keep best --output runs/mine
# python -m qlora_lab.export runs/mine --to shipped --as gguf --weights q8_0 --check
# llama-server -m shipped/*.gguf &
# curl http://localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "..."}]}'
# ```
#
# ## Recap
#
# ```
#   4-bit base, dequantized ──┐     ┌──► 16 or 8 bits: answers alike
#                             ├─(+)─┤
#   adapter, α/r · B A ───────┘     └──► the same 4 bits again: most of it is gone
# ```
#
# - Merge into the *dequantized* base, the model that you trained; for Q4_0, into the *pristine* one.
# - A good file answers as the trained model does. Whether the model is good is another question.
# - A model that was taught something else in place of its end token runs on. (If only its file does, that names another end token.)

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [13 · What do tutorials get wrong?](13_fact_check.ipynb)
