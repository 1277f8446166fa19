# %% [markdown]
# # 02 · Why can I not just fine-tune a 7B model?
#
# LLaMA-7B has {{6.7}} billion parameters. In {{16}} bits they take {{13.5}} GB, so on a card of {{24}} GB the model answers questions
# with room to spare. But start to fine-tune it there, and it ends in *CUDA out of memory*. What fills the card?
# And how do an adapter and four bits, as in lesson 01, change that? All of it is arithmetic that you can do before you rent a card.
#
# | you need | |
# |---|---|
# | time | 30 minutes |
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
    batches_on_the_card,
    beside_ours,
    fitting_methods,
    grouped,
    measured_step,
    recorded_needs,
    steps_that_fail,
    table,
    table_of_steps,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import (
    SHAPES,
    bits_per_parameter,
    estimate,
    kbit_preparation_bytes,
    layer_activation_bytes,
    trainable_parameters,
)

CARDS = [8, 16, 24, 40, 80]  # GB

# %% [markdown]
# ## 1 · What a training step holds
#
# Begin with a model that you can count by hand. It knows ten words. An *embedding* gives each word four numbers, a linear layer
# turns them into four others, and an *output layer* makes a score for each of the ten words from those.

# %%
embedding = torch.nn.Embedding(10, 4)
linear = torch.nn.Linear(4, 4, bias=False)
output = torch.nn.Linear(4, 10, bias=False)
parameters = [embedding.weight, linear.weight, output.weight]
print(" + ".join(str(p.numel()) for p in parameters), "=", sum(p.numel() for p in parameters), "parameters")

# %% [markdown]
# Each parameter is a {{32}}-bit number (fp32), so it takes four bytes.
#
# **Predict.** Train it for one step with the optimizer Adam. How many bytes does training keep *for each parameter*, the parameter
# itself included? (What depends on the text is counted apart.)

# %%
prediction = {"bytes a parameter": ...}  # ← your guess

# %%
adam = torch.optim.Adam(parameters)
text, following = torch.tensor([1, 5, 2]), torch.tensor([5, 2, 7])  # three tokens, and what follows each

x = embedding(text)  # (3, 4)
h = linear(x)  # (3, 4)
logits = output(h)  # (3, 10)
log_p = logits.log_softmax(-1)  # (3, 10), logarithms of probabilities
torch.nn.functional.nll_loss(log_p, following).backward()
adam.step()


# %%
def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


held = {
    "weights": size(parameters),
    "gradients": size(p.grad for p in parameters),
    "optimizer states": size(adam.state[p][average] for p in parameters for average in ("exp_avg", "exp_avg_sq")),
    "activations": size([x, h]),
    "logits and loss": size([logits, log_p]),
}

# %% machinery "A picture of the parts" alt="One stacked horizontal bar in bytes: weights {{held['weights']}}, gradients {{held['gradients']}}, optimizer states {{held['optimizer states']}}, activations {{held['activations']}}, logits and loss {{held['logits and loss']}}. The optimizer states are as long as weights and gradients together."
ends = {"the small model": f"{sum(held.values()):,}"}
_ = plot_memory(new_axes(height=1.9), {"the small model": held}, ends=ends).set_xlabel("memory (bytes)")
for part, many in held.items():
    print(f"{part:<18}{many:>5} bytes")
each = (held["weights"] + held["gradients"] + held["optimizer states"]) / 96
print(f"\nthe first three, for each parameter: {each:.0f} bytes; {told(prediction['bytes a parameter'])}")

# %% claims
assert sum(p.numel() for p in parameters) == 96 and held["activations"] + held["logits and loss"] == 4 * (
    12 + 12 + 30 + 30
)

# %% [markdown]
# **What happened?** {{each:.0f}} bytes are kept for each parameter, four times what the model itself takes. These are the parts of a step:
#
# | part | what it is | bytes |
# |---|---|---|
# | **weights** | the parameters themselves | {{4}} each |
# | **gradients** | for each weight one number, left by the backward pass: how the loss changes with it | {{4}} each |
# | **optimizer states** | for each weight two numbers that Adam remembers, running averages of its gradients and of their squares; from them it makes the weight's next step | {{8}} each |
# | **activations** | what the forward pass computes and the backward pass needs again, such as a layer's input: the gradient of the layer's weight is made from it | grow with the tokens |
# | **logits and loss** | at each token a score for each known word, and what the loss makes of the scores: logarithms of probabilities, and later gradients | grow with the tokens |
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
# Training in **mixed precision** is faster, since GPUs multiply {{16}}-bit numbers many times faster than {{32}}-bit ones. In one common recipe
# weights and gradients are stored in bf16, a {{16}}-bit format, and Adam's two numbers stay in fp32. All
# weights are kept a second time, as an **fp32 copy**. Why? Let a weight make a thousand small steps:

# %% machinery "A weight that makes a thousand small steps, in two formats"
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.tensor(0.02, dtype=dtype)
    gap = weight - torch.nextafter(weight, torch.zeros((), dtype=dtype))  # to the next smaller number
    for _ in range(1000):
        weight -= 0.00001  # Adam's steps are about as large as the learning rate, here 0.00001
    print(f"{str(dtype):<15} from 0.02 to {weight.item():.4f}; the next smaller number was {gap.item():.1g} away")

# %% claims
assert weight == torch.tensor(0.02, dtype=torch.bfloat16)

# %% [markdown]
# In bf16 the weight has not moved: each step is less than half of the gap to the next number, so it is rounded back. So the fp32 copy
# collects the steps, and the bf16 weight is rounded from it.
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

# %% machinery "A picture of it" alt="One stacked horizontal bar of memory in GB, with lines at card sizes. Full fine-tuning takes {{sum(full.values()) / 1e9:.1f}} GB, past the last of them. Half of it is optimizer states, a quarter the fp32 copy of the weights."
in_gb = {part: many / 1e9 for part, many in full.items()}
_ = plot_memory(new_axes(height=2.2), {"full fine-tuning": in_gb}, CARDS, prediction)
print(f"{sum(in_gb.values()):.1f} GB; {told(prediction['full fine-tuning'])}")

# %% claims
mixed = estimate(shape, "full", full_precision="mixed", optimizer="adamw_torch").parts
assert [mixed[part] for part in ("gradients", "optimizer states", "master weights")] == list(full.values())[1:]
assert 780 < 12 * SHAPES["llama-65b"].parameters() / 1e9 < 785

# %% [markdown]
# **What happened?** It takes {{sum(full.values()) / 1e9:.1f}} GB, again {{sum(full.values()) / n:.0f}} bytes for each parameter. Mixed precision is for speed, and saves no memory here.
#
# > **Other sums** that you will read belong to other recipes:

# %% machinery "Four recipes"
recipes = {
    "with an fp32 copy (our sum)": (2, 2, 8, 4),
    "without the copy": (2, 2, 8, 0),
    "with it, and Adam in 8 bits": (2, 2, 2, 4),
    "everything in bf16": (2, 2, 4, 0),
}
counts = {"7B": n, "65B": SHAPES["llama-65b"].parameters()}
print(f"{'bytes of weight, gradient, Adam, copy':<54}" + "".join(f"{name:>10}" for name in counts))
for recipe, each_part in recipes.items():
    gigabytes_of = [sum(each_part) * count / 1e9 for count in counts.values()]
    digits = " + ".join(map(str, each_part)) + f" = {sum(each_part)}"
    print(f"{recipe:<34}{digits:<20}" + "".join(f"{size_:>7.0f} GB" for size_ in gigabytes_of))

# %% [markdown]
# > The second gives the "more than {{780}} GB" that QLoRA's paper names for 65B. None comes near a card of {{24}}.
#
# <details><summary>How large is a card "of {{24}} GB"?</summary>
#
# Some makers mean GiB, which are {{2}}³⁰ bytes: {{24}} GiB are {{24 * 2**30 / 1e9:.1f}} of our GB. But cards for data centres often keep some for error
# correction. Torch finds {{15.6}} GB on a T4 "of {{16}}", and {{23.5}} on an L4 "of {{24}}". We count what the name says. For yours ask
# <code>torch.cuda.mem_get_info()</code>: bytes free, and bytes in all.
#
# </details>
#
# ## 3 · Freeze the model, and train little beside it
#
# **LoRA** freezes the model. A frozen weight needs no gradient of its own, no Adam and no fp32 copy: of its {{16}} bytes, two remain. (The
# gradient still passes *through* the frozen layers on its way down, so activations are needed as before.)
#
# Beside each linear layer, LoRA puts an adapter of two thin matrices: one has `rank` numbers for each input, the other `rank` for each
# output. Only the adapter is trained, in fp32, so its parameters take {{4 + 4 + 8}} bytes each. This lesson counts with rank {{64}},
# because QLoRA's paper did. (A smaller one will often do, see lesson 06.)
#
# **QLoRA** goes on: a frozen weight collects no small steps, so it may be rounded more coarsely. QLoRA stores the linear layers in four bits a
# parameter, with *scales* to multiply them by (lesson 05). Embedding, output layer and norms, {{1 - in_linears / n:.1%}} of the parameters, keep {{16}} bits.

# %% machinery "Parameters of an adapter, bits of a weight"
one_layer = 64 * (4096 + 4096)  # rank × (inputs + outputs)
print(f"rank 64 beside a layer of {4096 * 4096:,} weights: {one_layer:,} parameters")
print(f"beside all linear layers of LLaMA-7B: {trainable_parameters(shape, rank=64):,}")
print(f"a weight of QLoRA's linear layers, scales included: {bits_per_parameter():.3f} bits")

# %% [markdown]
# **Predict.** You train with one sample of {{512}} tokens at a time, at rank {{64}}. How many GB does LoRA take, and how many QLoRA?

# %%
prediction = {"LoRA": ..., "QLoRA": ...}  # ← your guesses, in GB

# %%
needed = {name: estimate(shape, method, rank=64, full_precision="mixed") for name, method in METHODS.items()}

# %% machinery "A picture and a table of the parts" alt="Stacked horizontal bars of memory in GB, with lines at card sizes. Full fine-tuning takes {{needed['full fine-tuning'].total / 1e9:.1f}}, past the last line; LoRA {{needed['LoRA'].total / 1e9:.1f}}, just past the second line; QLoRA {{needed['QLoRA'].total / 1e9:.1f}}, below the first. The last two are enlarged below: the weights shrink, the other parts stay nearly the same."
bars = {name: grouped(memory) for name, memory in needed.items()}
plot_methods(bars, CARDS, prediction)
print(table(bars))
print(told(prediction))

# %% claims
assert [f"{memory.total / 1e9:.0f}" for memory in needed.values()] == ["109", "17", "7"]
others = [sum(bar.values()) - bar["weights"] for bar in (bars["LoRA"], bars["QLoRA"])]
assert abs(others[0] - others[1]) < 0.1

# %% [markdown]
# `estimate`, the course's function for such sums (`"mixed"` is section 2's recipe), has two parts that the small model did not need:
#
# | part | what it is |
# |---|---|
# | **helpers** | what is needed to compute: room for matrix products, a weight matrix unpacked from {{4}} to {{16}} bits, the adapter rounded to {{16}} bits, Adam's intermediate results |
# | **CUDA context** | what the GPU's driver takes before your first tensor; we count half a GB |
#
# **What happened?** Of LoRA's memory, {{100 * bars["LoRA"]["weights"] / sum(bars["LoRA"].values()):.0f}} % are frozen weights, and QLoRA shrinks them by {{100 * (1 - bars["QLoRA"]["weights"] / bars["LoRA"]["weights"]):.0f}} %. All the rest, about {{others[1]:.1f}} GB, costs both
# nearly the same.
#
# The parts are not all there at once. In the forward pass activations pile up, and at its end come the logits. In the backward pass these go
# away and gradients come. Then Adam updates. The fullest moment is the **peak**, and the table shows it.
#
# <details><summary>Why no logits, and why have the columns other activations, helpers and gradients?</summary>
#
# - With one sample, the peak of LoRA and QLoRA comes in the backward pass, in the first layer. By then the logits are gone.
# - LoRA has more activations than QLoRA: PEFT's adapters on {{16}}-bit layers keep copies of their inputs (lesson 10). It has fewer helpers,
#   since nothing is unpacked.
# - Gradients are a little less than adapters: those of the first layer are not there yet.
# - Full fine-tuning has its peak in Adam's update, when the activations are gone.
#
# </details>
#
# **Exercise 2.1 ●●○ (3 minutes).** Write the sum for any model: frozen weights, and an adapter in fp32 with all that its training adds.


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
# Your sum leaves activations, logits, helpers and context aside. How much is that?

# %% machinery "Your sum and ours"
print(beside_ours(gigabytes, needed))

# %% [markdown]
# ## 4 · Four answers to one question
#
# How much memory does QLoRA need for LLaMA-7B? You may read any of these, and each counts something else:

# %% machinery "Four answers"
real = measured_step()
prepared = needed["QLoRA"].total + kbit_preparation_bytes(shape)
print(answers(real))

# %% claims
assert f"{real.allocated / 1e9:.2f} {real.on_the_card / 1e9:.2f}" == "5.43 7.80"

# %% [markdown]
# - *Torch's tensors* are less than our sum, because they leave out the CUDA context and the optimizer states. QLoRA's optimizer is
#   **paged**: its states, {{needed["QLoRA"].outside["paged optimizer states"] / 1e9:.2f}} GB, lie on the card, in memory that the driver can move to the CPU when that is full. (Moving takes time.)
# - *On the card* is more than our sum, because torch takes memory in large pieces and leaves gaps in them, and because this driver took
#   more than half a GB. Lesson 10 takes the difference apart.
#
# <details><summary>More answers</summary>
#
# - At rank {{16}} our sum is {{estimate(shape, rank=16).total / 1e9:.2f}} GB.
# - QLoRA's paper gives {{6.9}} GB, with adapters in bf16. It is near our sum by luck: its loaded model takes {{5.05}} GB, ours {{bars["QLoRA"]["weights"]:.2f}}, and it does not
#   say why (dive L).
# - After `prepare_model_for_kbit_training`, which many scripts call, it is {{prepared / 1e9:.2f}} GB, since that turns embedding and output layer into fp32.
#   The course does without.
#
# </details>
#
# ## 5 · What grows with the batch
#
# So far a step had one sample of {{512}} tokens, and it used **gradient checkpointing**: of a layer's activations, only its input is
# kept. When the backward pass comes to a layer, it computes the layer's other activations again. That costs time and saves memory:

# %% machinery "What a layer keeps for each token"
kept = layer_activation_bytes(shape, "qlora", rank=64)
layer_input = 2 * shape.hidden_size
print(f"one layer, for each token: its input {layer_input:,} bytes, all activations {kept:,} bytes")

# %% [markdown]
# **Predict.** Take {{16}} samples, {{16 * 512:,}} tokens. With checkpointing, our sum is {{estimate(shape, batch_size=16).total / 1e9:.1f}} GB. How many GB is it without? (LLaMA-7B has {{shape.num_hidden_layers}} layers.)

# %%
prediction = {"without": ...}  # ← your guess, in GB

# %% machinery "Our sum for five batches"
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
# **What happened?** Checkpointing saves {{100 * (1 - curves["with"][0] / curves["without"][0]):.0f}} % of the sum with one sample and {{100 * (1 - curves["with"][-1] / curves["without"][-1]):.0f}} % with sixteen, since activations grow with the tokens and
# weights, adapter and Adam do not.
#
# With checkpointing the second sample costs hardly anything, but each of the last eight costs {{(curves["with"][4] - curves["with"][3]) / 8:.1f}} GB. With one sample the
# peak comes late, when the logits are gone. With many it comes at the logits: three fp32 numbers for each token and each
# known word, the logarithm of its probability, and the gradients of that and of its score. Checkpointing does not touch them.

# %% machinery "How large the logits are"
for name in ("llama-7b", "llama-3-8b"):
    parts = grouped(estimate(SHAPES[name], batch_size=16))
    print(f"{name:<12}16 samples, {SHAPES[name].vocab_size:>7,} known words:", end=" ")
    print(f"activations {parts['activations']:4.1f} GB, logits and loss {parts['logits and loss']:4.1f} GB")

# %% claims
assert estimate(shape, batch_size=16).parts["logits and loss"] == 16 * 511 * 32_000 * 3 * 4
assert 4 < SHAPES["llama-3-8b"].vocab_size / shape.vocab_size < 4.01

# %% [markdown]
# And which card does such a step need? One with more than our sum, because of section 4's gaps, which grew with the tokens in our runs. This rule
# is on the safe side: **our sum, plus one GB, plus half of the activations and half of logits and loss.**


# %%
def card_for(memory):
    """GB that a card should have for this step."""
    grows = memory.parts.get("activations", 0) + memory.parts.get("logits and loss", 0)
    return (memory.total + grows / 2) / 1e9 + 1


# %% machinery "The rule, and what was measured"
for batch, memory, on_the_card in batches_on_the_card():
    print(f"batch {batch:>2}: our sum {memory.total / 1e9:4.1f} GB", end=", ")
    print(f"by the rule {card_for(memory):4.1f}, measured on the card {on_the_card:4.1f}")

# %% claims
assert [f"{on_the_card:.1f}" for _, _, on_the_card in batches_on_the_card()] == ["7.8", "9.0", "14.6"]
assert all(on_the_card < card_for(memory) for _, memory, on_the_card in batches_on_the_card())
needs = recorded_needs(("llama-7b", "llama-13b"))
assert len(needs) > 15 and all(on_the_card < card_for(memory) for memory, on_the_card in needs)
assert all(abs(card_for(memory) - memory.card_bytes / 1e9) < 1e-8 for memory, _ in needs)

# %% [markdown]
# The GB and the halves were chosen to cover all of our runs with QLoRA at 7B and 13B. (At 65B the gaps were up to a GB larger.)
#
# **Exercise 2.2 ●●○ (3 minutes).** By that rule, four steps are too large for their card. For each, exactly one of the changes is enough. Which one?
# Reckon roughly, in GB. The rows of activations and logits are those of the rule, one and a half times what they take. The peaks are at the logits,
# before gradients come.
#
# | change | what it leaves |
# |---|---|
# | `"4 bits"` | {{100 - 100 * (1 - bars["QLoRA"]["weights"] / bars["LoRA"]["weights"]):.0f}} % of weights in {{16}} bits |
# | `"checkpointing"` | about a twentieth of the activations |
# | `"half the samples"` | half of activations, logits and loss |
# | `"a quarter of the rank"` | a quarter of the adapter and of what belongs to it |
# | `"8-bit Adam"` | a quarter of the optimizer states |

# %% machinery "The four steps"
steps = steps_that_fail()
print(table_of_steps(steps))

# %%
### BEGIN SOLUTION
### STUB: cures = {"Ada": ..., "Ben": ..., "Carla": ..., "Dora": ...}
cures = {"Ada": "4 bits", "Ben": "checkpointing", "Carla": "a quarter of the rank", "Dora": "half the samples"}
### END SOLUTION

# %%
check_cures(cures)

# %% [markdown]
# <details><summary>Hint 1</summary>Which changes save at least what the last row says?</details>
# <details><summary>Hint 2</summary>Ben: half of his two rows is {{0.75 * (steps["Ben"]["activations"] + steps["Ben"].get("logits and loss", 0)):.1f}} GB. Is that enough?</details>

# %% [markdown]
# ## 6 · Your model, your card
#
# *Adapter on* says which linear layers get an adapter.

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

# %% alt="One stacked horizontal bar: memory in GB of the settings that you choose, part by part, with lines at card sizes. At the start, LLaMA-7B with QLoRA and one sample of {{512}} tokens takes {{estimate(shape).total / 1e9:.1f}} GB, below the first line. More than half of it are weights."
explore(draw, **SLIDERS)

# %% [markdown]
# Which card does a model need? Here is the first of the three methods that fits each card by section 5's rule, with section 3's settings. (With nothing left free, smaller cards
# were enough: {{8}} GB for 7B, {{12}} for 13B, {{24}} for 33B, {{48}} for 65B, lesson 10.)

# %% machinery "A table of models and cards"
sizes = [8, 16, 24, 40, 48, 80]
models = ["smollm2-1.7b", "llama-7b", "llama-3-8b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b"]
print(f"{'':<12}" + "".join(f"{card:>5} GB" for card in sizes) + "   QLoRA: our sum")
for model, fitting in fitting_methods(models, sizes).items():
    short = [method.removesuffix(" fine-tuning") for method in fitting]
    total = estimate(SHAPES[model]).total / 1e9
    print(f"{model:<12}" + "".join(f"{method:>8}" for method in short) + f"{total:>14.1f} GB")

# %% claims
found = fitting_methods(models, sizes)
assert not any("full fine-tuning" in fitting for name, fitting in found.items() if name != "smollm2-1.7b")
assert found["llama-7b"] == ["–", "QLoRA", "LoRA", "LoRA", "LoRA", "LoRA"]
for name, card in (("llama-33b", 24e9), ("llama-65b", 48e9)):
    large = estimate(SHAPES[name])
    assert 0 < large.total - card < large.outside["paged optimizer states"]

# %% [markdown]
# <details><summary>Did QLoRA's paper not train 33B on {{24}} GB, and 65B on {{48}}?</summary>It did. By our sum alone both take a little more than the card
# has, so some of the paged states must move to the CPU. Lesson 10 shows what was measured.</details>
#
# **Exercise 2.3 ●●○ (3 minutes).** Choose a model, a card, and how many tokens your samples have. What is the largest
# number of samples in a step with which QLoRA fits, by `card_for`?

# %%
### BEGIN SOLUTION
### STUB: mine = {
### STUB:     "model": ...,  # a name: print(*SHAPES)
### STUB:     "card": ...,  # GB
### STUB:     "tokens": ...,  # in a sample
### STUB:     "samples": ...,  # card_for(estimate(SHAPES[...], batch_size=..., sequence_length=...))
### STUB: }
fits = [b for b in range(1, 200) if card_for(estimate(SHAPES["mistral-7b"], batch_size=b, sequence_length=256)) <= 16]
mine = {"model": "mistral-7b", "card": 16, "tokens": 256, "samples": max(fits)}
### END SOLUTION

# %%
check_mine(mine)

# %% [markdown]
# <details><summary>Hint</summary>Let a loop try one sample, two, three, until <code>card_for</code> says more than your card has.</details>
# <details><summary>My model is not in the list.</summary>
#
# `from qlora_lab.memory import from_config`, then `"model": from_config(transformers.AutoConfig.from_pretrained("owner/name"))`. It works for
# models that are built like LLaMA.
#
# </details>

# %% [markdown]
# ## Recap
#
# ```
#   bytes for each parameter       trained     frozen     frozen, in 4 bits
#   weight                            2           2            0.5
#   gradient                          2           –             –
#   Adam's two numbers                8           –             –
#   fp32 copy                         4           –             –
#   in all                           16           2            0.5
# ```
#
# - With Adam in {{32}} bits, {{16}} bytes are kept for each parameter that is trained, in mixed precision or fp32. A frozen one takes {{2}}, and in four bits about half of one.
# - So QLoRA freezes the model, stores it in four bits, and pays the full price for an adapter only.
# - Activations and logits grow with the tokens. Checkpointing cuts the first, fewer samples both.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [03 · What is lost with fewer bits?](03_number_formats.ipynb)
