# %% [markdown]
# # Dive J · How few bits can the base have?
#
# Lesson 07 put LoRA on a base in {{4}} bits. Why four? With three bits the codes would be a quarter smaller, with two bits half as large.
# Here you turn the bits down until the model breaks. You find out what breaks it, how much of the damage LoRA can repair, and how to
# spend few bits well.
#
# | you need | |
# |---|---|
# | time | 60 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 5 GB |
# | GPU | not used |

# %% machinery "Imports, the model without quantization, and five paragraphs of English"
import ipywidgets
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import (
    check_my_text,
    check_quantizable,
    check_share_of_zeros,
    check_spending,
    check_taken_back,
    progress,
)
from qlora_lab.classroom.lessons.dive_j.figures import plot_bases, plot_layer, plot_repairs
from qlora_lab.classroom.lessons.dive_j.machinery import (
    BITS,
    BLOCK_SIZES,
    EDGES,
    cost,
    flowing_into,
    quantized,
    repaired_output,
    spend,
    study,
    with_lora,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import Batches, load_model, load_prose, load_samples, nf4_double, text_loss, tokenize, train
from qlora_lab.quantization import quantize_absmax, quantize_affine
from qlora_lab.training.chat import tokenize_text

dense, tokenizer = load_model(device="cpu", compute_dtype=torch.float32)
prose = [tokenize_text(text, tokenizer) for text in load_prose()[:5]]

# %% [markdown]
# ## 1 · One layer
#
# A frozen layer need not be NF4: it works with any numbers that can be turned back into a matrix. Lesson 03 had two schemes for any
# number of bits. **Absmax** divides by the largest absolute value, so that zero stays zero. **Affine** spreads the codes evenly from the
# smallest number to the largest one, and stores a minimum beside each scale.
#
# Judge them by what matters to the next layer: the *output*. So let real text flow into one of the {{210}} linear layers, and measure how
# far its output is off.
#
# **Predict.** With absmax and *one scale for the whole matrix*, which many tutorials show, how many bits are as good as {{4}} bits with a scale
# for every {{64}} weights?

# %%
guess = ...  # ← your guess, from 4 to 8

# %% machinery "Try all settings on one layer"
layer = dense.model.layers[4].mlp.up_proj
weight = layer.weight.detach()
result = study(weight, flowing_into(layer, lambda: text_loss(dense, prose)))


def draw_layer(bits, block, scheme):
    _, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    chosen = result.costs[scheme, block, bits]
    edges = EDGES.tolist()
    plot_layer(axes, (result.original, edges), (result.left[scheme, block, bits], edges), result.dots(), chosen)
    axes[0].set(xlim=(-0.5, 0.5), ylim=(1e-6, 1))
    axes[1].set(xlim=(1.8, 9.2), ylim=(2e-3, 2))
    axes[1].set_title(f"{chosen[0]:.2f} bits, error {chosen[1]:.3f}", fontsize=10)
    return axes[0]


# %% [markdown]
# Find out with the sliders (they need a running kernel). On the left, grey, are the layer's weights, and in blue what is left of them. On the right is
# the error of the output, over all the bits that a weight costs, scales included. Your choice is ringed.

# %% alt="Left, histogram of one layer's weights (log scale): grey the original, blue what the chosen quantization leaves, with gaps beside zero. Right, error of the output (log scale) over bits per parameter: it falls with more bits, by a factor of two for each. Your choice is ringed: at the start {{result.costs['absmax', 64, 4][0]:.2f}} bits, error {{result.costs['absmax', 64, 4][1]:.3f ±5%}}."
explore(
    draw_layer,
    bits=ipywidgets.SelectionSlider(options=BITS, value=4, description="bits of a code"),
    block=ipywidgets.SelectionSlider(options=BLOCK_SIZES, value=64, description="weights that share a scale"),
    scheme=ipywidgets.ToggleButtons(options=["absmax", "affine"], value="absmax", description="scheme"),
)

# %% machinery "How many bits with one scale are as good"
in_blocks = result.costs["absmax", 64, 4][1]
for bits in (4, 5, 6):
    print(
        f"one scale, {bits} bits: error {result.costs['absmax', 'tensor', bits][1]:.3f}; in blocks, 4 bits: {in_blocks:.3f}"
    )
print(told(guess))

# %% claims
assert result.costs["absmax", "tensor", 5][1] > in_blocks > result.costs["absmax", "tensor", 6][1]

# %% [markdown]
# **What happened?** It takes {{6}} bits. A step of the whole matrix is set by its largest weight, and here one large weight makes the error with {{4}} bits {{result.costs["absmax", "tensor", 4][1] / in_blocks:.1f ±0.3}} times
# that in blocks. One more bit halves the steps, so two bits make up for it.
#
# ## 2 · A whole model
#
# Which layers get few bits? Codes are for matrices that a layer multiplies by. An embedding is looked up, and in many models, this
# one too, the output head *is* the embedding matrix: two modules, one tensor. Whoever quantizes such a head changes the embedding, or makes two tensors of one.
#
# **Exercise J.1 ●●○ (5 minutes).** Name the layers that may be quantized: every `nn.Linear`, except those whose weight an
# `nn.Embedding` holds, too. Each family of models calls its head differently, so do not go by the name. Try it on a model of yours as well.


# %%
def quantizable(model):
    """Names of modules, as `model.named_modules()` gives them."""
    ### BEGIN SOLUTION (about 4 lines)
    modules = dict(model.named_modules())
    embeddings = [m.weight for m in modules.values() if isinstance(m, torch.nn.Embedding)]
    linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    return [name for name, m in linears.items() if not any(m.weight is e for e in embeddings)]
    ### END SOLUTION


# %%
check_quantizable(quantizable)

# %% [markdown]
# <details><summary>Hint 1</summary><code>isinstance(module, torch.nn.Linear)</code>, and the same for Embedding.</details>
# <details><summary>Hint 2</summary><code>a is b</code> asks whether two names mean one tensor. <code>==</code> compares
# element by element.</details>

# %% [markdown]
# Now quantize all of them, in seven ways, and ask each model to read five paragraphs of English. The *loss* is minus the natural logarithm of the
# probability that the right next token gets, in nats per token. A model that knows nothing gives each token of its vocabulary
# the same probability.

# %%
dense_loss = text_loss(dense, prose).per_token
vocabulary = dense.config.vocab_size
print(f"not quantized: {dense_loss:.2f} nats per token")
print(f"knows nothing: {torch.tensor(float(vocabulary)).log():.1f} (all {vocabulary:,} tokens alike)")

# %% [markdown]
# **Predict.** What is the loss with {{4}} bits and one scale for each matrix? And with {{2}} bits, affine, in blocks of {{64}}?

# %%
prediction = {"INT4, one scale": ..., "2 bits affine": ...}  # ← your guesses

# %%
quantizers = {
    "NF4, double": nf4_double,
    "INT4 absmax": lambda weight: quantize_absmax(weight, 4, 64),
    "INT4 affine": lambda weight: quantize_affine(weight, 4, 64),
    "INT4, one scale": lambda weight: quantize_absmax(weight, 4, None),
    "3 bits affine": lambda weight: quantize_affine(weight, 3, 64),
    "3 bits absmax": lambda weight: quantize_absmax(weight, 3, 64),
    "2 bits affine": lambda weight: quantize_affine(weight, 2, 64),
}

# %% alt="Bars for seven bases. Left, the error of the weights; right, the loss on prose, a dashed line marks no quantization. NF4 and INT4 in blocks end near the line, NF4 nearest, though INT4 affine has the smaller error. {{3}} bits lose more. INT4 with one scale and {{2}} bits lose most, and end beyond the loss of a model that knows nothing."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
bases = {name: quantized(dense, quantizer) for name, quantizer in quantizers.items()}
results = {name: (*cost(dense, base), text_loss(base, prose).per_token) for name, base in bases.items()}
_, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1, 1.2]})
_ = plot_bases(axes, results, dense_loss, prediction)
for name, (bits, error, loss) in results.items():
    print(f"{name:<16}{bits:6.3f} bits, error of the weights {error:.3f}, loss {loss:5.2f}")
print(told(prediction))

# %% claims
errors, scores = ({name: row[column] for name, row in results.items()} for column in (1, 2))
assert abs(dense_loss - 3.56) < 0.02
assert min(scores["INT4, one scale"], scores["2 bits affine"]) > 10.81 and scores["3 bits absmax"] < 7
assert errors["INT4 affine"] < errors["NF4, double"] and scores["INT4 affine"] > scores["NF4, double"] + 0.1
assert min(scores, key=scores.get) == "NF4, double"
assert abs(scores["3 bits affine"] - scores["3 bits absmax"]) < 0.5

# %% [markdown]
# **What happened?** Two bases are *worse than knowing nothing*: a broken model is sure of wrong tokens. That leaves almost no
# probability for the right one, and costs many nats. One of the two has {{4}} bits, just as many, scales included, as `3 bits affine`, whose loss is {{results["3 bits affine"][2]:.1f ±0.3}}. So it matters less how many bits there are than what they are spent on.
#
# Compare the columns, too. Affine INT4 costs more bits than NF4 *and* has the smaller error of the weights, and yet the higher loss. With {{3}} bits, affine has the smaller error as well, and
# about the loss of absmax. The error of weights is a rough guide only, because not every weight matters equally to what the model says. (Do not take this as a ranking of formats: it is one small model on five paragraphs, and its weights
# had been in {{4}} bits before, see lesson 04.)
#
# ## 3 · Where did the four bits go?
#
# Why is INT4 with one scale so bad? Its largest code stands for the largest weight. All other codes lie at multiples of one step, and what is
# smaller than half a step becomes zero.
#
# **Exercise J.2 ●●○ (4 minutes).** Write the share of a matrix's weights that absmax with one scale rounds to zero. With {{4}} bits, the codes go from
# −{{7}} to {{7}}; with {{3}} bits, from −{{3}} to {{3}}.


# %%
def share_of_zeros(weight, bits):
    """weight: a float Tensor; bits: of a code -> a share between 0 and 1."""
    ### BEGIN SOLUTION (about 2 lines)
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight.abs() < step / 2).float().mean().item()
    ### END SOLUTION


# %%
check_share_of_zeros(share_of_zeros)

# %% [markdown]
# <details><summary>Hint 1</summary>How wide is a step, if the largest weight gets the largest code?</details>
# <details><summary>Hint 2</summary><code>(condition).float().mean()</code> is a share.</details>

# %%
for size in (64, None):
    codes = [quantize_absmax(block.mlp.up_proj.weight.detach(), 4, size).codes for block in dense.model.layers]
    zeros = [(code == 0).float().mean().item() for code in codes]
    print(f"scale for {size or 'all'}: {min(zeros):.0%} to {max(zeros):.0%} of the weights of an up_proj become zero")

# %% claims
assert min(zeros) > 0.4 and max(zeros) > 0.9  # with one scale

# %% [markdown]
# **What happened?** With one scale, in the up_proj of every one of the {{len(zeros)}} layers, {{100 * min(zeros):.0f}} % or more of the weights become zero, and in the worst layer nearly all. These are 4-bit
# codes, most of which are hardly used. A scale for every {{64}} weights confines a large weight's harm to its {{63}} neighbours.
#
# **Exercise J.3 ●○○ (3 minutes).** Is it the same with *your* text? Put in some lines of what your model would read: mails, code, another
# language. Guess first: will it lose more from {{3}} bits than the English paragraphs, or less?

# %%
### BEGIN SOLUTION
### STUB: my_text = ...  # some lines of yours, in triple quotation marks
my_text = """def mean(numbers):
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)

def variance(numbers):
    middle = mean(numbers)
    return sum((number - middle) ** 2 for number in numbers) / len(numbers)
"""
### END SOLUTION
mine = [tokenize_text(my_text if isinstance(my_text, str) else "nothing yet", tokenizer)]
judged = {"not quantized": dense} | {name: bases[name] for name in ("NF4, double", "3 bits affine")}
my_losses = {name: text_loss(model, mine).per_token for name, model in judged.items()}

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
check_my_text(my_text, my_losses, len(mine[0].ids))

# %% [markdown]
# <details><summary>What to expect</summary>Code and forms are predictable, so their loss is low to begin with. A language of which the model knows little has a high loss even without
# quantization, and may lose more or less than English: compare the differences, not the losses.</details>

# %% [markdown]
# ## 4 · What LoRA can repair
#
# An adapter adds a correction to a damaged base. Can it mend what rounding broke? Four of the bases get fresh LoRA layers, all with the same random A, and take eight steps on the orders of lesson 01.
#
# **Predict.** With NF4, the loss on the orders falls here from about {{1.5}} to {{0.2}}. Where will {{3}} bits and {{2}} bits be in the eighth step?

# %%
prediction = {"3 bits affine": ..., "2 bits affine": ...}  # ← your guesses

# %% alt="Four lines: the loss on orders (log scale) over eight steps. NF4 starts lowest and falls. {{3}} bits affine starts higher, falls as well and stays above it. {{2}} bits affine and INT4 with one scale start far above and stay far above."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
samples, _ = tokenize(load_samples("orders", "train").select(range(400)), tokenizer, max_length=256)
samples = sorted(samples, key=lambda sample: len(sample.ids))[:100]  # short ones: quicker
settings = {"steps": 8, "learning_rate": 2e-3, "schedule": "constant", "warmup_steps": 3, "progress": False}
repairs, after = {}, {}
for name in ("NF4, double", "3 bits affine", "2 bits affine", "INT4, one scale"):
    model = with_lora(bases[name])
    records = train(model, Batches(samples, batch_size=1, seed=0), **settings)
    repairs[name] = [record.loss for record in records]
    after[name] = text_loss(model, prose).per_token
_ = plot_repairs(new_axes(), repairs, prediction)
print(told(prediction))

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
print(f"{'':<16}{'orders, step 1':>15}{'step 8':>8}{'prose, before':>15}{'after':>8}")
for name, losses in repairs.items():
    print(f"{name:<16}{losses[0]:15.1f}{losses[-1]:8.1f}{results[name][2]:15.1f}{after[name]:8.1f}")

# %% claims
assert abs(repairs["NF4, double"][0] - 1.5) < 0.06 and abs(repairs["NF4, double"][-1] - 0.2) < 0.06
assert repairs["3 bits affine"][-1] < 1.2 and min(repairs["2 bits affine"]) > 3 < min(repairs["INT4, one scale"])
assert after["3 bits affine"] > 5 and after["2 bits affine"] > 10
repaired = scores["3 bits affine"] - after["3 bits affine"]
assert repaired < 0.3 * (scores["3 bits affine"] - dense_loss)

# %% [markdown]
# **What happened?** On the orders, {{3}} bits learn, too, some steps behind NF4: the signal was damaged, but still there. With {{2}} bits, or with one scale for a matrix, little of it is
# left, and eight steps are far from enough. (They do not say what eight thousand steps would bring.)
#
# Now look at the prose. The base of {{3}} bits has learned much of the orders, and reads English almost as badly as before. (With one scale for a matrix, English became even worse.) So these eight steps have not *repaired* it. They have
# taught it a task on top of the damage. Could an adapter repair a base at all?
#
# ## 5 · How much could it repair?
#
# Rounding added an error to each weight. To repair a layer, B A would have to be minus this error. B A has rank {{16}}, so ask: how much of the error could
# the *best* matrix of rank {{16}} take back? The *singular value decomposition* knows: it writes a matrix as a sum of directions, each with its size, the singular value,
# and the best matrix of rank {{16}} is the sum of the {{16}} largest ([dive B](dive_b_why_low_rank.ipynb) shows why).
#
# **Exercise J.4 ●●○ (4 minutes).** Write the share of the squared norm that the best matrix of a given rank takes back.


# %%
def taken_back(damage, rank):
    """damage: Tensor[out, in]; rank: of the best matrix -> a share between 0 and 1."""
    ### BEGIN SOLUTION (about 2 lines)
    energy = torch.linalg.svdvals(damage).square()
    return (energy[:rank].sum() / energy.sum()).item()
    ### END SOLUTION


# %%
check_taken_back(taken_back)

# %% [markdown]
# <details><summary>Hint 1</summary><code>torch.linalg.svdvals</code> gives the singular values, the largest first.</details>
# <details><summary>Hint 2</summary>The squared norm of a matrix is the sum of its squared singular values.</details>

# %% [markdown]
# **Predict.** For the layer of section 1 in {{2}} bits, what share does rank {{16}} take back?

# %%
guess = ...  # ← your guess, such as 0.5

# %% machinery "Two errors and random numbers, and what rank 16 takes back of each"
damage = weight - quantize_affine(weight, 2, 64).dequantize()
query = dense.model.layers[0].self_attn.q_proj.weight.detach()
matrices = {
    "its error in 2 bits": damage,
    "random numbers in its shape": torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),
    "the error of the first q_proj": query - quantize_affine(query, 2, 64).dequantize(),
}
energy = {name: torch.linalg.svdvals(matrix).square() for name, matrix in matrices.items()}
shares = {name: (values[:16].sum() / values.sum()).item() for name, values in energy.items()}
for name, share in shares.items():
    print(f"{name}: rank 16 takes back {share:.0%}")
print(told(guess))

# %% claims
first, noise, most = shares.values()
assert 0.06 < noise < first < 0.08 < 0.2 < most < 0.3

# %% [markdown]
# **What happened?** {{100 * shares["its error in 2 bits"]:.0f}} %, as of random numbers: the errors of rounding are spread over all {{576}} directions like noise. (Sixteen of {{576}} would be {{16 / 576:.1%}}, but by chance some directions of noise are stronger
# than others, and the best matrix takes those.) Where a few rows of a matrix are far larger than the others, as in the first q_proj, their errors are larger as well, and there rank {{16}} takes back {{100 * shares["the error of the first q_proj"]:.0f}} %.
# Methods such as LoftQ begin A and B with this best matrix.
#
# But section 2 has shown that the error of the weights is a rough guide. What counts is the *output*, and real inputs do not come from all directions alike.
#
# **Predict.** Let five paragraphs flow into the layer. What share of the *output's* error can rank {{16}} take back, if it is made for this text? And how much is left of that on five other paragraphs?

# %%
prediction = {"its own text": ..., "another text": ...}  # ← your guesses, such as 0.5

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
others = [tokenize_text(text, tokenizer) for text in load_prose()[5:10]]
texts = {"its own text": prose, "another text": others}
inputs = {name: flowing_into(layer, lambda text=text: text_loss(dense, text)) for name, text in texts.items()}
for name, share in repaired_output(damage, inputs, rank=16).items():
    print(f"error of the output on {name}: rank 16 takes back {share:.0%}")
print(told(prediction))

# %% claims
own, other = repaired_output(damage, inputs, rank=16).values()
assert 0.4 < own < 0.6 and 0.25 < other < own - 0.1

# %% [markdown]
# **What happened?** Far more than {{100 * shares["its error in 2 bits"]:.0f}} %, about half on its own text and about a third on the other. Few directions carry most of what flows into the layer, and there a low rank can help. So an adapter does not mend the weights. It
# bends the output towards the target, on text *like that which it was trained on*. The bases of section 4 saw nothing but orders, and English stayed
# nearly as damaged as rounding had left it. Choose a base that is good *before* you train, and judge on more than the task.
#
# ## 6 · Spend four bits
#
# All layers got the same bits so far. But a model has seven kinds of linear layers. Some are small, and some suffer more than others.
#
# **Exercise J.5 ●●● (10 minutes).** You have {{4}} bits per parameter, on average over the linear layers, for affine codes of {{2}} to {{8}} bits. Each block costs {{64}} bits more, for its scale
# and minimum, so {{3}} bits in blocks of {{64}} everywhere cost exactly {{4}}. Give each kind of layer its bits and its block size, and get at least half a nat below their loss. Every try takes some seconds.

# %%
sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 0)
for name, parameter in dense.named_parameters():
    kind = name.split(".")[-2]
    if kind in sizes:
        sizes[kind] += parameter.numel()
for name, count in sizes.items():
    print(f"{name:<10}{count / sum(sizes.values()):4.0%} of the parameters")


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
def loss_of(choice):
    """choice: by kind, bits and block size -> loss on prose."""
    return text_loss(spend(dense, choice), prose).per_token


all_alike = dict.fromkeys(sizes, (3, 64))
beat = loss_of(all_alike) - 0.5
print(f"3 bits in blocks of 64 everywhere: loss {beat + 0.5:.2f}; to beat: {beat:.2f}")

# %%
### BEGIN SOLUTION
### STUB: choice = ...  # such as all_alike | {"q_proj": (4, 64)}
choice = dict.fromkeys(sizes, (3, 128)) | {"v_proj": (4, 64), "down_proj": (4, 64)}
### END SOLUTION

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
check_spending(choice, sizes, loss_of, beat)

# %% [markdown]
# <details><summary>Hint 1</summary>A kind costs (bits + {{64}} / block size) times its share of the parameters. Which kinds are so small that one bit more
# for them costs next to nothing?</details>
# <details><summary>Hint 2</summary>Find out who suffers: in <code>loss_of(all_alike | {"v_proj": (4, 64)})</code>, put one kind after the other.
# Ask the large kinds to pay, with larger blocks.</details>

# %% [markdown]
# Real formats for few bits are made in this way: llama.cpp's K-quants, for example, give some kinds of layers more bits than others. And remember NF4: it costs
# {{results["NF4, double"][0]:.3f}} bits and has a loss of {{results["NF4, double"][2]:.2f ±0.05}}.
#
# ## Recap
#
# - What counts is what the bits are spent on: {{4}} bits with one scale for a matrix ruin this model, {{3}} bits in blocks at the same price damage it less.
# - The error of the weights is a rough guide. Judge a base by the loss, on a text like those that it will read.
# - LoRA learns a task on a damaged base. It repairs outputs on text like that which it is trained on, and hardly any of the weights.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [08 · Your data](08_your_data.ipynb)
