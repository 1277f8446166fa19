# %% [markdown]
# # 02 · Why can I not just fine-tune a 7B model?
#
# LLaMA-7B has {{6.7}} billion parameters. In {{16}} bits they take {{13.5}} GB, so on a card of {{24}} GB the model answers questions
# with room to spare. But start to fine-tune it there, and the first step ends in *CUDA out of memory*. What fills the card?
# And why did lesson 01 load its model in four bits, and train an adapter only? The answers are arithmetic, and you
# can do it before you rent a card.
#
# | you need | |
# |---|---|
# | time | 25 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports"
import ipywidgets
import torch

from qlora_lab.classroom.checks import check_cures, check_gigabytes, check_mine, progress
from qlora_lab.classroom.lessons.n02.figures import MEMORY_STYLES, plot_growth, plot_memory, plot_methods
from qlora_lab.classroom.lessons.n02.machinery import (
    METHODS,
    TARGETS,
    answers,
    fitting_methods,
    grouped,
    measured_step,
    steps_that_fail,
    table,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES, bits_per_parameter, estimate, layer_activation_bytes, trainable_parameters

CARDS = [8, 16, 24, 40, 80]  # GB

# %% [markdown]
# ## 1 · What a training step holds
#
# Begin with a model that you can count by hand. It knows ten words. An *embedding* gives each word four numbers, a linear layer
# turns these into four others, and an *output layer* turns those into a score for each of the ten words.

# %%
embedding = torch.nn.Embedding(10, 4)
linear = torch.nn.Linear(4, 4, bias=False)
output = torch.nn.Linear(4, 10, bias=False)
parameters = [embedding.weight, linear.weight, output.weight]
print(" + ".join(str(p.numel()) for p in parameters), "=", sum(p.numel() for p in parameters), "parameters")

# %% [markdown]
# Each parameter is a {{32}}-bit number (fp32), so it takes four bytes.
#
# **Predict.** Train it for one step, with the optimizer Adam. How many bytes are then held *for each parameter*: for
# itself, and for what training has added?

# %%
prediction = {"bytes a parameter": ...}  # ← your guess

# %%
adam = torch.optim.Adam(parameters)
text, following = torch.tensor([1, 5, 2]), torch.tensor([5, 2, 7])  # three tokens, and what follows each

x = embedding(text)  # (3, 4)
h = linear(x)  # (3, 4)
logits = output(h)  # (3, 10)
torch.nn.functional.cross_entropy(logits, following).backward()
adam.step()


# %%
def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


held = {
    "weights": size(parameters),
    "gradients": size(p.grad for p in parameters),
    "optimizer states": size(adam.state[p][average] for p in parameters for average in ("exp_avg", "exp_avg_sq")),
    "activations": size([x, h]),
    "logits": size([logits]),
}

# %% machinery "A picture of the parts" alt="One stacked horizontal bar in bytes: weights {{held['weights']}}, gradients {{held['gradients']}}, optimizer states {{held['optimizer states']}}, activations {{held['activations']}}, logits {{held['logits']}}. The optimizer states are as long as weights and gradients together."
ends = {"the small model": f"{sum(held.values()):,}"}
_ = plot_memory(new_axes(height=1.9), {"the small model": held}, ends=ends).set_xlabel("memory (bytes)")
for part, many in held.items():
    print(f"{part:<18}{many:>5} bytes")
each = (held["weights"] + held["gradients"] + held["optimizer states"]) / 96
print(f"\nthe first three, for each parameter: {each:.0f} bytes; {told(prediction['bytes a parameter'])}")

# %% claims
assert sum(p.numel() for p in parameters) == 96 and held["activations"] + held["logits"] == 4 * (12 + 12 + 30)

# %% [markdown]
# **What happened?** The step holds {{each:.0f}} bytes for each parameter, four times what the model itself takes:
#
# | part | what it is | bytes |
# |---|---|---|
# | **weights** | the parameters themselves | {{4}} each |
# | **gradients** | for each weight one number, left by the backward pass: how the loss changes with it | {{4}} each |
# | **optimizer states** | for each weight two numbers that Adam remembers, running averages of its gradients and of their squares: they tell how large a step suits this weight | {{8}} each |
# | **activations** | what the forward pass computes and the backward pass needs again, such as a layer's input: the gradient of the layer's weight is made from it | grow with the tokens |
# | **logits** | the scores, one for each known word at each token | grow with the tokens |
#
# ## 2 · The wall
#
# Now the same for LLaMA-7B. (A GB is {{10}}⁹ bytes here.)

# %%
shape = SHAPES["llama-7b"]
n, in_linears = shape.parameters(), shape.linear_parameters()
print(f"{n:,} parameters, {in_linears / n:.1%} of them in the linear layers")

# %% claims
assert n == 6_738_415_616

# %% [markdown]
# A model of this size is usually trained in **mixed precision**. Weights and gradients are stored in bf16, a {{16}}-bit format,
# because GPUs multiply such numbers many times faster. Adam's two numbers stay in fp32. And all weights are
# kept a second time, as an **fp32 copy**. Why? Let a weight make a thousand small steps:

# %%
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.tensor(0.02, dtype=dtype)
    for _ in range(1000):
        weight -= 0.00001  # in full fine-tuning, a step is often about as small
    print(f"{str(dtype):<15} from 0.02 to {weight.item():.4f}")

# %% claims
assert weight == torch.tensor(0.02, dtype=torch.bfloat16)

# %% [markdown]
# In bf16 the weight has not moved. Between neighbouring numbers of this format there is a gap, and each step is less than half of it, so
# it is rounded back. In mixed precision the fp32 copy collects the steps, and the bf16 weight is rounded from it.
#
# **Predict.** How many GB does the full fine-tuning of LLaMA-7B take, activations and logits aside?

# %%
prediction = {"full fine-tuning": ...}  # ← your guess, in GB

# %%
full = {
    "weights": 2 * n,  # bytes
    "gradients": 2 * n,
    "optimizer states": (4 + 4) * n,
    "fp32 copy": 4 * n,
}

# %% machinery "A picture of it" alt="One stacked horizontal bar of memory in GB, with lines at card sizes. Full fine-tuning takes {{sum(full.values()) / 1e9:.1f}} GB, past the line of the largest card. Half of it is optimizer states, a quarter the fp32 copy of the weights."
in_gb = {part: many / 1e9 for part, many in full.items()}
_ = plot_memory(new_axes(height=2.2), {"full fine-tuning": in_gb}, CARDS, prediction)
print(f"{sum(in_gb.values()):.1f} GB; {told(prediction['full fine-tuning'])}")

# %% claims
mixed = estimate(shape, "full", full_precision="mixed", optimizer="adamw_torch").parts
assert [mixed[part] for part in ("gradients", "optimizer states", "master weights")] == list(full.values())[1:]
assert 780 < 12 * SHAPES["llama-65b"].parameters() / 1e9 < 785

# %% [markdown]
# **What happened?** It takes {{sum(full.values()) / 1e9:.1f}} GB: again {{sum(full.values()) / n:.0f}} bytes for each parameter, differently divided. No card in the picture holds
# that, and half of it is Adam's.
#
# > **Other sums.** Elsewhere you may read {{8 * n / 1e9:.0f}} GB, or {{12 * n / 1e9:.0f}}. Neither counts the copy, and the first counts Adam's numbers in bf16, too. Both are
# > real recipes: they save memory, and lose small steps. (The second is how QLoRA's paper counts "more than {{780}} GB" for 65B.)
#
# <details><summary>How large is a card "of {{24}} GB"?</summary>
#
# Most sellers count in GiB, which are {{2}}³⁰ bytes: {{24}} GiB are {{24 * 2**30 / 1e9:.1f}} of our GB. We count them as {{24}}. The difference is
# a reserve for what no sum foresees. Not every card has it: a T4 "of {{16}} GB" shows {{15.6}}.
#
# </details>
#
# ## 3 · Two ways through the wall
#
# **LoRA** freezes the model and trains an adapter beside it, as you did in lesson 01. A frozen weight gets no gradient, and needs neither Adam nor
# an fp32 copy. Of its {{16}} bytes, two remain. Only the adapter's parameters, in fp32, pay the full price of section 1.
#
# **QLoRA** goes on: what never changes can be stored more coarsely. It stores the linear layers in four bits a
# parameter, and a little more for scales (lesson 05). Embedding, output layer and norms keep {{16}} bits.

# %%
adapter = trainable_parameters(shape, rank=64)
print(f"adapter of rank 64 on all linear layers: {adapter:,} parameters")
print(f"a parameter of QLoRA's linear layers: {bits_per_parameter():.3f} bits, four of them for the weight")

# %% [markdown]
# **Predict.** You train with one sample of {{512}} tokens at a time, at rank {{64}}, as QLoRA's paper does. How many GB does LoRA take, and
# how many QLoRA?

# %%
prediction = {"LoRA": ..., "QLoRA": ...}  # ← your guesses, in GB

# %%
needed = {name: estimate(shape, method, rank=64, full_precision="mixed") for name, method in METHODS.items()}

# %% machinery "A picture and a table of the parts" alt="Stacked horizontal bars of memory in GB, with lines at card sizes. Full fine-tuning takes {{needed['full fine-tuning'].total / 1e9:.1f}}, past the largest card; LoRA {{needed['LoRA'].total / 1e9:.1f}}, just past the second smallest; QLoRA {{needed['QLoRA'].total / 1e9:.1f}}, below the smallest. The last two are enlarged below: the weights shrink, the other parts stay nearly the same."
bars = {name: grouped(memory) for name, memory in needed.items()}
plot_methods(bars, CARDS, prediction)
print(table(bars))
print(told(prediction))

# %% claims
assert [f"{memory.total / 1e9:.0f}" for memory in needed.values()] == ["109", "17", "7"]
others = [sum(bar.values()) - bar["weights"] for bar in (bars["LoRA"], bars["QLoRA"])]
assert abs(others[0] - others[1]) < 0.1

# %% [markdown]
# `estimate` is the course's function for such sums. It goes through every tensor of a step, so it has two parts that the small
# model did not need:
#
# | part | what it is |
# |---|---|
# | **helpers** | tensors that live for a moment, such as one weight matrix unpacked from {{4}} to {{16}} bits while it multiplies |
# | **CUDA context** | what the GPU's driver takes before your first tensor, about half a GB |
#
# **What happened?** LoRA removes what training adds to the frozen weights. What remains is mostly the weights, and QLoRA
# shrinks them by {{100 * (1 - bars["QLoRA"]["weights"] / bars["LoRA"]["weights"]):.0f}} %. All the rest, about {{others[1]:.1f}} GB, costs both the same.
#
# <details><summary>Why has the table no logits, and fewer bytes of gradients than of adapters?</summary>
#
# A step has several moments that could be its fullest, its <b>peak</b>, and <code>estimate</code> takes the largest. With LoRA and QLoRA that is the moment
# when the backward pass has come down to the first layer. The logits are gone by then, and the gradients of this layer's adapters are
# not there yet. With full fine-tuning it is Adam's update, when the activations are gone, too.
#
# </details>
#
# **Exercise 2.1 ●●○ (3 minutes).** Write the sum for any model: frozen weights, plus an adapter in fp32 with all that its training adds.
# (Leave
# activations, logits, helpers and context aside.)


# %%
def gigabytes(shape, bits, trained):
    """GB (10^9 bytes) of a step.

    shape: has linear_parameters(), and parameters() for all of them. bits: of a parameter in the linear layers; the
    others have 16. trained: how many parameters the adapter has.
    """
    ### BEGIN SOLUTION (about 3 lines)
    in_linears = shape.linear_parameters()
    others = shape.parameters() - in_linears
    return (in_linears * bits / 8 + others * 2 + trained * (4 + 4 + 8)) / 1e9
    ### END SOLUTION


# %%
check_gigabytes(gigabytes)

# %% [markdown]
# <details><summary>Hint 1</summary>There are three kinds of parameters: in linear layers, the model's others, the adapter's. How many bytes
# does each take?</details>
# <details><summary>Hint 2</summary>Eight bits make a byte. For what an adapter's parameter takes, see section 1.</details>

# %% [markdown]
# ## 4 · Eight answers to one question
#
# How much memory does QLoRA need for a 7B model? You will read anything between {{3}} and {{8}} GB. Most of these numbers are right, and
# count different things:

# %% machinery "Eight answers"
real = measured_step()
print(answers(real))

# %% claims
assert f"{real.allocated / 1e9:.2f} {real.on_the_card / 1e9:.2f}" == "5.43 7.80"

# %% [markdown]
# *Torch's tensors* are what `torch.cuda.max_memory_allocated()` reports. Torch sees neither the CUDA context nor Adam's states,
# because QLoRA's optimizer is **paged**: its states lie in memory that the driver can move to the CPU when the card is full.
# That hides {{needed["QLoRA"].outside["paged optimizer states"] / 1e9:.2f}} GB. `nvidia-smi` shows everything. It shows more than our sum, because torch takes memory in large pieces
# with gaps in them, and because this driver took more than half a GB (lesson 10).
#
# To choose a card, count everything, and leave a GB free.
#
# ## 5 · What grows with the batch
#
# So far a step had one sample of {{512}} tokens. And it used **gradient checkpointing**: of a layer's activations, only its input is
# kept. When the backward pass comes to a layer, it computes the layer's other activations again. That costs time and saves memory.
#
# **Predict.** With {{16}} samples and checkpointing, QLoRA takes {{estimate(shape, batch_size=16).total / 1e9:.1f}} GB. How many GB does it take without?

# %%
prediction = {"without": ...}  # ← your guess, in GB

# %%
batches = [1, 2, 4, 8, 16]
curves = {
    name: [estimate(shape, batch_size=batch, gradient_checkpointing=on).total / 1e9 for batch in batches]
    for name, on in {"with": True, "without": False}.items()
}

# %% machinery "A picture and the numbers" alt="Two lines: memory in GB over the tokens in a step, {{512}} to {{8192:,}}. With checkpointing it rises from {{curves['with'][0]:.1f}} to {{curves['with'][-1]:.1f}}. Without, it rises from {{curves['without'][0]:.1f}} to {{curves['without'][-1]:.1f}}, past three lines of card sizes."
_ = plot_growth(new_axes(), curves, [512 * batch for batch in batches], CARDS, prediction["without"])
for batch, small, large in zip(batches, curves["with"], curves["without"]):
    print(f"batch {batch:>2}: {small:4.1f} GB with checkpointing, {large:4.1f} without: {1 - small / large:.0%} saved")
print(told(prediction["without"]))

# %% claims
assert sum(card < curves["without"][-1] for card in CARDS) - sum(card < curves["without"][0] for card in CARDS) == 3

# %% [markdown]
# **What happened?** Checkpointing saves {{100 * (1 - curves["with"][0] / curves["without"][0]):.0f}} % with one sample and {{100 * (1 - curves["with"][-1] / curves["without"][-1]):.0f}} % with sixteen. Weights, adapter and Adam stay as they are,
# while activations grow with the tokens. How much does one layer keep for each token? And what of the logits?

# %% machinery "Activations and logits"
kept = layer_activation_bytes(shape, "qlora", rank=64)
layer_input = 2 * shape.hidden_size
print(f"a layer keeps for each token: its input {layer_input:,} bytes, all activations {kept:,} bytes\n")
for name in ("llama-7b", "llama-3-8b"):
    parts = grouped(estimate(SHAPES[name], batch_size=16))
    print(f"{name:<12}16 samples, checkpointing, {SHAPES[name].vocab_size:>7,} words:", end=" ")
    print(f"activations {parts['activations']:4.1f} GB, logits {parts['logits']:4.1f} GB")

# %% claims
assert estimate(shape, batch_size=16).parts["logits and loss"] == 16 * 511 * 32_000 * 3 * 4
assert 4 < SHAPES["llama-3-8b"].vocab_size / shape.vocab_size < 4.01

# %% [markdown]
# Checkpointing keeps one of {{kept / layer_input:.0f}} bytes. It cannot help the logits, which come after the last layer. At their peak, three
# fp32 numbers stand there for each token and each word of the vocabulary: the logarithm of its probability, and two
# gradients. With four times as many words, Llama-3-8B needs four times as much.
#
# **Exercise 2.2 ●●○ (3 minutes).** Four steps, of {{512}} tokens a sample, run out of memory. For each, one of five changes is enough, and
# the other four are not. Which part is the largest there, and what shrinks it?
#
# The changes are `"4 bits"`, `"checkpointing"`, `"half the samples"`, `"rank 16"` and `"8-bit Adam"`, which stores Adam's two numbers in
# a byte each.

# %% machinery "The four steps"
print(steps_that_fail())

# %%
### BEGIN SOLUTION
### STUB: cures = {"Ada": ..., "Ben": ..., "Carla": ..., "Dora": ...}
cures = {"Ada": "4 bits", "Ben": "checkpointing", "Carla": "half the samples", "Dora": "rank 16"}
### END SOLUTION

# %%
check_cures(cures)

# %% [markdown]
# <details><summary>Hint 1</summary>What is unusual in each row, compared with the QLoRA bar of section 3?</details>
# <details><summary>Hint 2</summary>Dora: sixteen bytes for each of a billion adapter parameters. If Adam's eight become two, what is left?</details>

# %% [markdown]
# ## 6 · Your model, your card
#
# Every move asks `estimate` again. Which knob helps most with few tokens, and which with many?

# %% machinery "The figure and its sliders"
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


def draw(model, method, targets, **knobs):
    mixed = {"targets": TARGETS[targets], "full_precision": "mixed"}
    memory = estimate(SHAPES[model], METHODS[method], **mixed, **knobs)
    limit = next((end for end in (26, 104, 420, 1650) if memory.total < 0.88e9 * end), 6400)
    bar = dict.fromkeys(MEMORY_STYLES, 0.0) | grouped(memory)
    ax = plot_memory(new_axes(height=2.7), {"": bar}, CARDS, limit=limit)
    ax.set_title(f"{model} · {method}: {memory.total / 1e9:.1f} GB", fontsize=11, pad=18)
    return ax


def pick(name, options, value):
    return ipywidgets.SelectionSlider(options=options, value=value, description=name)


def choose(name, options, value):
    return ipywidgets.Dropdown(options=list(options), value=value, description=name)


SLIDERS = {
    "model": choose("model", SHAPES, "llama-7b"),
    "method": choose("method", METHODS, "QLoRA"),
    "targets": choose("adapter on", TARGETS, "all linears"),
    "optimizer": choose("optimizer", OPTIMIZERS, "paged_adamw_32bit"),
    "rank": pick("rank", [4, 8, 16, 32, 64, 128, 256], 64),
    "batch_size": pick("samples", [1, 2, 4, 8, 16, 32], 1),
    "sequence_length": pick("tokens in each", [128, 256, 512, 1024, 2048, 4096], 512),
    "gradient_checkpointing": ipywidgets.Checkbox(value=True, description="gradient checkpointing"),
}

# %% alt="One stacked horizontal bar: memory in GB of the settings that you choose, part by part, with lines at card sizes. At the start, LLaMA-7B with QLoRA and one sample of {{512}} tokens takes {{estimate(shape).total / 1e9:.1f}} GB, below the line of the smallest card. More than half of it are weights."
explore(draw, **SLIDERS)

# %% [markdown]
# Which card does a model need? Here is the first of the three methods that fits, with section 3's settings:

# %% machinery "A table of models and cards"
sizes = [8, 16, 24, 40, 48, 80]
models = ["smollm2-1.7b", "llama-7b", "llama-3-8b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b"]
print(f"{'':<12}" + "".join(f"{card:>5} GB" for card in sizes) + "   QLoRA needs")
for model, fitting in fitting_methods(models, sizes).items():
    short = [method.removesuffix(" fine-tuning") for method in fitting]
    total = estimate(SHAPES[model]).total / 1e9
    print(f"{model:<12}" + "".join(f"{method:>8}" for method in short) + f"{total:>11.1f} GB")

# %% claims
big = estimate(SHAPES["llama-65b"])
found = fitting_methods(models, sizes)
assert not any("full fine-tuning" in fitting for name, fitting in found.items() if name != "smollm2-1.7b")
assert found["llama-7b"] == ["QLoRA", "QLoRA", "LoRA", "LoRA", "LoRA", "LoRA"]
assert 0 < big.total - 48e9 < big.outside["paged optimizer states"]

# %% [markdown]
# By this sum 65B just misses {{48}} GB, where QLoRA's paper trains it. But its paged states may move out, and many a card "of {{48}} GB" has
# {{48 * 2**30 / 1e9:.1f}}. Lesson 10 shows what was measured.
#
# **Exercise 2.3 ●●○ (3 minutes).** Choose a model, a card and the length of your task's samples. How many samples can QLoRA take at
# a time, at most, with `estimate`'s defaults (rank {{64}}, checkpointing)? Do not try them all: find out what one more sample costs, and divide.

# %%
### BEGIN SOLUTION
### STUB: mine = {
### STUB:     "model": ...,  # a name: print(*SHAPES)
### STUB:     "card": ...,  # GB
### STUB:     "tokens": ...,  # in a sample
### STUB:     "samples": ...,  # estimate(SHAPES[...], batch_size=..., sequence_length=...).total
### STUB: }
of_50, of_60 = (estimate(SHAPES["mistral-7b"], batch_size=b, sequence_length=256).total for b in (50, 60))
each_sample = (of_60 - of_50) / 10
mine = {"model": "mistral-7b", "card": 16, "tokens": 256, "samples": 50 + int((16e9 - of_50) / each_sample)}
### END SOLUTION

# %%
check_mine(mine)

# %% [markdown]
# <details><summary>Hint 1</summary>The difference between two estimates is the price of the samples between them. Take one estimate near the card's
# size: with few samples the peak is another moment of the step, and a sample costs less.</details>
# <details><summary>Hint 2</summary>The room that is left, divided by that price, is how many more samples fit.</details>
# <details><summary>My model is not in the list.</summary>
#
# `from qlora_lab.memory import from_config`, then `"model": from_config(transformers.AutoConfig.from_pretrained("owner/name"))`. It works for
# models that are built like LLaMA.
#
# </details>

# %% [markdown]
# ## Recap
#
# - Training takes {{16}} bytes for each parameter that is trained. A frozen one takes {{2}}, in four bits half a one.
# - So QLoRA freezes the model, stores it in four bits, and pays the full price for a small adapter only.
# - Activations and logits come on top and grow with the tokens. Checkpointing cuts the first, fewer samples at a time both.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [03 · What is lost with fewer bits?](03_number_formats.ipynb)
