# %% [markdown]
# # 13 · What do tutorials get wrong?
#
# Here are {{18}} sentences about QLoRA. Most stand in the paper, manuals and tutorials, seven in *the plan*, a page of notes for this course from before anything was measured. You vote on each; then the evidence votes, computed here or read from a
# measurement. The lessons had most of it, so this is also your final test; only claims {{6}}, {{10}}, {{11}} and {{18}} and the speeds of {{13}} and {{14}} are new. At the end you hand in a model of your own.
#
# | you need | |
# |---|---|
# | time | 26 minutes, if you kept a model that you trained in lesson 08 |
# | computing | up to 1 minute on two CPU cores |
# | memory | 2 GB |
# | GPU | not needed |

# %% machinery "Imports"
import warnings

from qlora_lab.classroom.checks import certificate, check_faults, check_project, progress
from qlora_lab.classroom.lessons.n13 import evidence
from qlora_lab.classroom.lessons.n13.evidence import judge
from qlora_lab.classroom.lessons.n13.figures import plot_ballot
from qlora_lab.classroom.plots import new_axes

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name

# %% [markdown]
# ## 1 · Your vote
#
# A true sentence holds wherever it is tried. So each one is put to one or more **cases**. If it holds in all of them, the
# verdict is *true*; if in none, *false*; and if the cases disagree, *it depends*, and the interesting question is: on what?
#
# **Numbers**
#
# 1. *NF4 has sixteen bins of equal mass, so every code is used equally often.*
# 2. *NF4 loses less than INT4.*
# 3. *Double quantization saves about {{0.37}} bits per parameter, approximately {{3}} GB for a 65B model.*
#
# **Memory**
#
# 4. *QLoRA trains a 7B model in {{3.7}} GB.*
# 5. *A 65B model can be fine-tuned on a single {{48}} GB GPU.*
# 6. *Use a paged optimizer: what does not fit moves to the CPU, and training goes on instead of running out of memory.*
#
# **Libraries**
#
# 7. *`BitsAndBytesConfig(load_in_4bit=True)` loads the model in NF4, as QLoRA does.*
# 8. *LLaMA-7B, r = {{16}} on q, k, v and o: trainable params: {{"4,194,304"}}.*
# 9. *QLoRA in 4 bits is supported on the CPU.*
# 10. *To load LLaMA, pass `trust_remote_code=True`.*
# 11. *Without `prepare_model_for_kbit_training` the first backward pass fails.*
#
# **Training**
#
# 12. *The base is rounded, and yet the gradients of the adapter are exact.*
# 13. *QLoRA trains {{20}}–{{30}} % slower than LoRA.*
# 14. *Gradient checkpointing: memory −{{50}} %, speed −{{20}} %.*
# 15. *No pad token? `tokenizer.pad_token = tokenizer.eos_token`, and that is that.*
#
# **Afterwards**
#
# 16. *4 bits cost less than {{2}} %.*
# 17. *Merge the adapter back into the 4-bit model: nothing is lost.*
# 18. *It works with most Transformers.* (Here: with each of three well-known ones.)
#
# **Predict.** Replace `...` by `"true"`, `"false"` or `"depends"`. What you leave open is not counted.

# %%
votes = {1: ..., 2: ..., 3: ..., 4: ..., 5: ..., 6: ...}
votes |= {7: ..., 8: ..., 9: ..., 10: ..., 11: ..., 12: ...}
votes |= {13: ..., 14: ..., 15: ..., 16: ..., 17: ..., 18: ...}

# %% [markdown]
# ## 2 · Numbers
#
# Each test is a short function; `evidence.codes_are_used_equally??` in a new cell shows one.

# %%
tests = {1: evidence.codes_are_used_equally, 2: evidence.nf4_beats_int4, 3: evidence.three_gigabytes_at_65b}
results = judge(votes, tests)

# %% claims
assert [results[n].verdict for n in range(1, 4)] == ["false", "depends", "true"]
errors = results[2].values["errors"]
assert errors["Gaussian"][2] < errors["Gaussian"][0] < errors["Gaussian"][1]
assert errors["uniform"][2] < errors["uniform"][0] and errors["real weights"][0] < min(errors["real weights"][1:])

# %% [markdown]
# - **Claim 1: false** (online tutorials). The bins have equal mass under one normal distribution. But each block was divided by its
#   own largest element, and after that its numbers are spread in another way ([lesson 04](04_nf4.ipynb)).
# - **Claim 2: it depends** (nearly everybody says it) on the data, on the kind of INT4, and on its price. Affine INT4 beats NF4 on
#   Gaussian numbers, but pays half a bit a weight here, for a second constant.
# - **Claim 3: true** (QLoRA's paper). The plan had {{0.4}} GB, which looks like {{0.4}} *bits* that became gigabytes
#   ([lesson 05](05_double_quantization.ipynb)).

# %% [markdown]
# ## 3 · Memory

# %%
tests = {4: evidence.seven_billion_in_3_7_gb, 5: evidence.biggest_on_48_gb, 6: evidence.paging_prevents_out_of_memory}
results |= judge(votes, tests)

# %% claims
assert [results[n].verdict for n in range(4, 7)] == ["false", "true", "depends"]
run = results[4].values["run"]
assert (run["shape"], run["method"], run["batch_size"], run["sequence_length"]) == ("llama-7b", "qlora", 1, 512)
caps = evidence.record("memory")["caps"]
failed = [row for row in caps if "out_of_memory" in row]
assert {row["optimizer"] for row in caps} == {"paged_adamw_32bit"}
assert {row["out_of_memory"]["after"] for row in failed} == {"adapter", "first step: forward"}  # no update yet

# %% [markdown]
# - **Claim 4: false** (the plan: half a byte for each of {{7}} billion parameters, and {{0.1}} GB for adapter and optimizer, rounded up). The loaded weights alone exceed it,
#   because embeddings and output head stay in 16 bits; and a step needs more than weights ([lesson 02](02_memory_wall.ipynb)).
# - **Claim 5: true** (QLoRA's paper), if only just. A card that is called "{{48}} GB" has {{48}} GiB, so a little more. (We have
#   none: an H100 was held to that size, [lesson 10](10_memory_comparison.ipynb). *Standard* is that lesson's recipe, the others are [dive L](dive_l_small_cards.ipynb)'s; *reserved* counts the gaps, too.)
# - **Claim 6: it depends** (online tutorials) on *what* does not fit. Only optimizer states can move, and only of matrices with
#   {{"100,000"}} numbers or more: at rank {{16}}, a matrix beside {{4096}} inputs has {{f"{16 * 4096:,}"}}. The {{results[6].values["failed"]}} runs ([dive L](dive_l_small_cards.ipynb)'s) failed before their first update, when there were
#   no states yet.

# %% [markdown]
# ## 4 · Libraries

# %%
tests = {
    7: evidence.four_bits_are_nf4,
    8: evidence.four_million_trainable,
    9: evidence.trains_on_a_cpu,
    10: evidence.strangers_code_is_needed,
    11: evidence.preparation_is_needed,
}
results |= judge(votes, tests)

# %% claims
assert [results[n].verdict for n in range(7, 12)] == ["false", "false", "true", "false", "false"]
assert results[8].values["counted"] == {16: 16_777_216, 8: 4_194_304} and results[10].values["refused"]
assert not results[7].values["double"] and str(results[7].values["dtype"]) == "torch.float32"

# %% [markdown]
# - **Claim 7: false** (online tutorials), three times over: you get FP4, no double quantization, and slow float32 arithmetic. Nothing
#   warns you.
# - **Claim 8: false** (the plan). It is four times as many. The printout is that of another run, with rank {{8}}
#   on q and v.
# - **Claim 9: true** (bitsandbytes' manual). In {{2023}} it needed an NVIDIA GPU, as tutorials still say.
# - **Claim 10: false** (the plan's script). LLaMA's code is part of transformers. The switch runs Python files from the model's
#   repository on your machine, with your rights. Only an architecture that transformers lacks needs it; then read the file first.
# - **Claim 11: false** (online tutorials). It trains without the call (*reentrant*: torch's older checkpointing). The call turns every 16-bit parameter into
#   float32, embeddings and head included, which costs memory. It also switches gradient checkpointing on: do that yourself if you leave it out.
#
# **Exercise 13.1 ●●○ (3 minutes).** Judge a tutorial. You get its settings and whether the GPU has bf16 (the T4, which Colab lends, has
# not: there, float16 is right). Return the names of the settings that are wrong *or missing*. Those that matter are `load_in_4bit`,
# `bnb_4bit_quant_type`, `bnb_4bit_use_double_quant`, `bnb_4bit_compute_dtype` and `trust_remote_code`.

# %%
tutorial = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "trust_remote_code": True}


def faults(settings, has_bf16):
    """Names of the settings that are wrong or missing; dtypes are strings. Try it: faults(tutorial, False)."""
    ### BEGIN SOLUTION (about 8 lines)
    wanted = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16" if has_bf16 else "float16",
    }
    wrong = {name for name, value in wanted.items() if settings.get(name) != value}
    return wrong | ({"trust_remote_code"} if settings.get("trust_remote_code") else set())
    ### END SOLUTION


# %%
check_faults(faults)

# %% [markdown]
# <details><summary>Hint 1</summary>Put what you want into a dict, and compare: <code>settings.get(name) != value</code> is
# also true where the setting is missing.</details>
# <details><summary>Hint 2</summary><code>trust_remote_code</code> is the other way round: missing is right.</details>

# %% [markdown]
# ## 5 · Training

# %%
tests = {
    12: evidence.gradient_is_exact,
    13: evidence.a_quarter_slower,
    14: evidence.checkpointing_50_20,
    15: evidence.pad_may_be_the_end,
}
results |= judge(votes, tests)

# %% claims
assert [results[n].verdict for n in range(12, 16)] == ["true", "depends", "false", "depends"]
by_tokens, every = results[13].values["by_tokens"], results[13].values["every"]
assert sum(20 <= change <= 30 for change in every) == 2 and max(by_tokens[8192]) < 0
assert round(max(by_tokens[512])) == 54 and min(by_tokens[512]) > 5

# %% [markdown]
# - **Claim 12: true**, in float32. The rounding happened once, before training, and the rounded weights are constants. The gradient is
#   exact *for the rounded model* ([lesson 07](07_qlora_from_scratch.ipynb)). What computing in bf16 rounds comes on top.
# - **Claim 13: it depends** (the plan), most of all on the tokens in a step. At the same batch, a 4-bit layer has more small pieces of work than a bf16 one, and in a small
#   step the GPU waits for the CPU to start them ([dive F](dive_f_why_is_it_slow.ipynb)). In a full step the wait disappears, and making the weights dense takes no longer than for few tokens.
#   (One step took {{560}} ms in one run and {{647}} in another, and a row compares two such steps. So the trend from few tokens to many can be read, but not two rows
#   apart, such as {{6}} and {{31}} %; a minus is no gain.)
# - **Claim 14: false** (the plan) in all eight pairs. Checkpointing shrinks activations and little else, so what it saves depends
#   on their share. It computes the forward pass twice, and what the GPU waits for in small steps, it waits for twice, too
#   ([dive D](dive_d_training_tricks.ipynb)). Even if all ran twice, that would be −{{50}} %. Why one step has −{{-min(results[14].values["speed"]):.0f}} %, nobody has looked.
# - **Claim 15: it depends** (nearly every script) on who masks. Code that compares token ids cannot tell padding from the real end
#   token. It masks both, so the model never learns to stop. Code that counts lengths has no such trouble.

# %% [markdown]
# ## 6 · Afterwards

# %%
tests = {
    16: evidence.costs_under_2_per_cent,
    17: evidence.merging_loses_nothing,
    18: evidence.works_with_most_models,
}
results |= judge(votes, tests)

# %% claims
assert [results[n].verdict for n in range(16, 19)] == ["depends", "false", "depends"]
left = results[17].values["left"]
assert left["into 4 bits again"] < 0.9 and abs(left["into the dequantized base, bf16"] - 1) < 0.02

# %% [markdown]
# - **Claim 16: it depends** (the plan), first of all on what the {{2}} % are of. Both losses on orders are close to zero, so a tiny difference
#   is a large share of them, and hardly moves perplexity. And all of this is
#   one seed of a 135M model, so partly luck: [lesson 11](11_accuracy_comparison.ipynb) has error bars.
# - **Claim 17: false** (online tutorials). An adapter is smaller than the steps between the 4-bit levels, so most of it is rounded away.
#   The dequantized base keeps it. Here, the adapter is made up, for one matrix; of a trained one, [lesson 12](12_ship_it.ipynb) found {{1}} %, and
#   measures the loss.
# - **Claim 18: it depends** (the plan) on whether the weights are in *linear layers*, because only those are packed. The *experts* of a
#   Mixtral layer, several MLPs of which each token uses two, are two large tensors in transformers {{5}}, which stay as they are. You ask for 4 bits and hardly get any, without a
#   warning.

# %% [markdown]
# ## 7 · The count

# %% machinery "Votes and verdicts by theme"
ballot = {
    theme: [(f"{text}  {n:>2}", votes[n], results[n].verdict) for n, text in claims.items()]
    for theme, claims in evidence.THEMES.items()
}

# %% alt="Grid of dots: {{len(results)}} claims in five themes, in columns true, it depends, false. The evidence says true to {{', '.join(str(n) for n in results if results[n].verdict == 'true')}}; it depends to {{', '.join(str(n) for n in results if results[n].verdict == 'depends')}}; false to the others. Votes that were cast are small diamonds; a dotted line joins a vote to the evidence where they differ."
_ = plot_ballot(new_axes(height=6.4), ballot)
cast = [n for n in results if votes[n] in evidence.VOTES]
agreed = sum(votes[n] == results[n].verdict for n in cast)
print(f"you voted on {len(cast)} of {len(results)} claims, and the evidence agrees with {agreed} of your votes")
count = {verdict: sum(r.verdict == verdict for r in results.values()) for verdict in evidence.VOTES}
print(f"the evidence: {count}")

# %% claims
assert sorted(results) == list(range(1, 19)) and count == {"true": 4, "depends": 6, "false": 8}

# %% [markdown]
# ## 8 · Four questions that everybody asks
#
# **How much accuracy does it cost?** Claim 16: say of what, and how sure you are. [Lesson 11](11_accuracy_comparison.ipynb) measures it
# with eight seeds.
#
# **Is training slower?** Claim 13, at the same batch: with {{512}} tokens in a step, yes, by up to {{max(results[13].values["by_tokens"][512]):.0f}} %; with {{8192:,}}, no; in between it varied. And the memory that is saved has room for a larger batch.
#
# **Quantize for inference, too?** Either merge the adapter and ship one file, or keep the 4-bit base and serve many adapters beside
# it. [Lesson 12](12_ship_it.ipynb) does both.
#
# **Does every model work?** Claim 18: what counts is the share of its weights in linear layers.
# `python -m qlora_lab.models preflight NAME` says it before you download anything.
#
# ## 9 · Your own model
#
# **Exercise 13.2 ●●● (3 minutes).** Hand in a model of *yours*: {{20}} samples or more about something that you know, {{8}} steps or
# more. Did you train one like that in [lesson 08](08_your_data.ipynb), and keep it? Then name its folder. Otherwise this takes half an hour: write
# the lines, `{"prompt": "...", "response": "..."}` each, and run in a terminal, in the course's folder,
#
# ```
# python -m qlora_lab.train_qlora --data my.jsonl --output runs/mine --steps 30
# ```
#
# The check reads the run's report: is the data yours, has the loss fallen by half, is there an adapter?

# %%
### BEGIN SOLUTION
### STUB: project = ...  # "runs/mine"
project = evidence.stand_in_project()
### END SOLUTION

# %%
check_project(project)

# %% [markdown]
# <details><summary>Hint 1</summary>Lines that have something in common are learned fastest: the same kind of question, the
# same form of answer.</details>
# <details><summary>Hint 2</summary>Loss does not fall by half? More <code>--steps</code>. Too slow? Shorter lines.</details>

# %% [markdown]
# ## Recap
#
# ```
# a claim, case by case
# ├─ all hold: true           {{count["true"]}}
# ├─ none holds: false        {{count["false"]}}
# └─ some hold: it depends    {{count["depends"]}}
#     2  numbers, kind of INT4
#     6  what does not fit
#    13  tokens in a step
#    15  who masks the padding
#    16  what the 2 % are of
#    18  share in linear layers
# ```
#
# - A claim about QLoRA needs its setting: which model, which rank, how many tokens in a step, a per cent of what.
# - A wrong number may be right for something else, so ask of what.
# - "It depends" is an answer if you can say on what.
#
# Below is what you have shown, by code that ran. `certificate().save("certificate.html")` writes it on a page that you can print.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
print(certificate())
progress()

# %% [markdown]
# **Next:** take the next tutorial that you read, pick its boldest number, and run it. Or choose a deep dive on
# [the map](00_start_here.ipynb).
