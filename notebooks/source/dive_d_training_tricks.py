# %% [markdown]
# # Dive D · Which knob buys what?
#
# Every tutorial ends with the same list: an 8-bit optimizer, gradient checkpointing, accumulation, warm-up, clipping, rank, alpha. One
# turns them all on, and hopes. Here you find out which of them save memory, which change what is learned, and which do nothing for you.
# You need lessons 02 to 11.
#
# | you need | |
# |---|---|
# | time | 60 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used: what needs one was recorded on an H100 |

# %% machinery "Imports, and the record"
import math

import ipywidgets
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import check_accumulate, check_beyond_seeds, check_clipped, check_splits, progress
from qlora_lab.classroom.lessons.dive_d.figures import (
    plot_knobs,
    plot_moves,
    plot_pairs,
    plot_splits,
    plot_tradeoff,
)
from qlora_lab.classroom.lessons.dive_d.machinery import (
    GROUPS,
    RATES,
    ROOM,
    WAYS,
    answers,
    chat,
    counted,
    dynamic,
    evenly,
    gradients_of,
    measured_on_the_card,
    needs_of,
    neighbour,
    off,
    orders,
    padding,
    read_knobs,
    recorded,
    splits_of_a_step,
    states,
    tiny,
    untrained_prose,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES
from qlora_lab.training.schedules import rate

knobs = read_knobs()
print(f"recorded on one {knobs.about}")

# %% [markdown]
# ## 1 · One knob at a time
#
# The bundled model, in NF4, learned lesson 01's orders on an H100: {{30}} steps of {{8}} orders, rank {{16}} on all linear layers, alpha
# {{32}}, learning rate {{0.0015}}, bf16, torch's AdamW. Call this *as it is*. Every other row of the figure changes one setting. (Three
# rows change more than one thing: see section 6.)
#
# **Predict.** *As it is*, torch's tensors take {{sum(knobs.peak["as it is"]) / 3:.1f}} GB at their peak. How many are left with each of
# these three? (`batch 4 x 2` is the same eight orders in two passes of four.)

# %%
prediction = {"checkpointing": ..., "batch 4 x 2": ..., "adamw_8bit": ...}  # ← your guesses, in GB

# %% [markdown]
# Each circle is one seed: the loss on held-out *orders*, the loss on *plain English*, which nobody trained on, and the peak. Speed was
# measured once, with the GPU to itself.

# %% machinery "The figure" alt="A row for each of {{len(knobs.orders)}} settings, three runs each, in four panels: loss on orders, loss on plain English, tokens per second, peak memory. A grey band shows how far runs of equal settings lie apart. Checkpointing and smaller batches lie left of the band in memory and, the last two, far left in speed; the optimizers stay in the bands or nearly; all of these have the losses of the first row. Batch {{32}} and rank {{64}} are better on orders and worse on English. The highest learning rate is off the scale."
same_speed = [knobs.speed[knob] for knob in RATES]
same_peak = [size for knob in RATES for size in knobs.peak[knob]]
panels = {  # values, how far equal settings differ, limits, ticks
    "orders\n(nats per token)": (knobs.orders, knobs.orders["as it is"], (0.004, 0.4), [0.005, 0.02, 0.1]),
    "plain English\n(nats per token)": (knobs.prose, knobs.prose["as it is"], (3.55, 4.15), [3.6, 3.8, 4.0]),
    "tokens/s": ({knob: [speed] for knob, speed in knobs.speed.items()}, same_speed, (200, 8000), [300, 1000, 5000]),
    "peak (GB)": (knobs.peak, same_peak, (0.3, 4), [0.4, 1, 3]),
}
fig, axes = plt.subplots(1, 4, figsize=(8, 6), layout="constrained")
_ = plot_knobs(axes, GROUPS, panels, prediction)

# %% machinery "The same in numbers: means of three seeds, and one measurement of speed"
print(f"{'':<20}{'orders':>10}{'English':>10}{'tokens/s':>10}{'peak':>10}")
for knob, speed in knobs.speed.items():
    means = [sum(of[knob]) / 3 for of in (knobs.orders, knobs.prose, knobs.peak)]
    print(f"{knob:<20}{means[0]:>10.4f}{means[1]:>10.2f}{speed:>10,.0f}{means[2]:>7.2f} GB")

# %%
for knob, guess in prediction.items():
    print(f"{knob:<14}{min(knobs.peak[knob]):.2f} to {max(knobs.peak[knob]):.2f} GB ({told(guess)})")
megabytes = [1000 * size for size in states("smollm2-135m", "qlora", 16)]
print(f"AdamW's states {megabytes[0]:.0f} MB, in 8 bits {megabytes[2]:.0f} MB")

# %% claims
assert len(knobs.orders) == 18 and all(len(runs) == 3 for runs in knobs.orders.values())
assert knobs.trained["as it is"] == 4_884_480
assert max(knobs.peak["checkpointing"]) < 0.5 < 0.6 < max(knobs.peak["batch 4 x 2"]) < 0.75
assert max(knobs.peak["adamw_8bit"]) > min(knobs.peak["as it is"]) and 0.7 < 1 - megabytes[2] / megabytes[0] < 0.75

# %% [markdown]
# **What happened?** The 8-bit optimizer saves hardly anything. LoRA trains so few numbers that all of AdamW's states take
# {{megabytes[0]:.0f}} MB, and three quarters of that are not half a gigabyte. Most of the peak is *activations*. These shrink with
# checkpointing, or with fewer samples at a time.
#
# ### First, a ruler
#
# How large must a difference be to mean something? The grey bands show how far *equal* settings lie apart. For the losses these are the
# three seeds of *as it is*. For speed and peak they are five settings that differ in the learning rate only, and so do the same work.

# %% machinery "The bands of speed and peak, and what lies outside"
low, high = min(same_speed), max(same_speed)
print(f"the same work: {low:,.0f} to {high:,.0f} tokens/s, {min(same_peak):.2f} to {max(same_peak):.2f} GB")
faster = knobs.speed["paged_adamw_32bit"] / knobs.speed["as it is"] - 1
print(f"paged_adamw_32bit against as it is: {faster:+.0%}")
slow = knobs.speed["batch 1 x 8"]
print(f"batch 1 x 8: {slow:,.0f} tokens/s, {low / slow:.1f} to {high / slow:.1f} times fewer")

# %% claims
assert all(low <= knobs.speed[knob] <= high for knob in ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"))
assert knobs.speed["batch 32"] > 2 * high and low / slow > 5

# %% [markdown]
# The same work, at {{low:,.0f}} to {{high:,.0f}} tokens/s: the GPU mostly waits for Python, whose speed varies ([dive
# F](dive_f_why_is_it_slow.ipynb)). "Paging makes AdamW {{100 * faster:.0f}} % faster" would be a fairy tale: in an adapter
# this small, no tensor is large enough to be paged (section 2). What lies inside a band has shown nothing. What lies far outside is real, such as eight passes of one sample instead of one pass of eight.
#
# **Exercise D.1 ●○○ (3 minutes).** Now the losses. Say `"lower"` if *all* seeds of a knob are below *all* of the base, `"higher"` if all
# are above, and else `"open"`.


# %%
def beyond_seeds(base, knob):
    """Lists of losses, one a seed -> "lower", "higher" or "open"."""
    ### BEGIN SOLUTION (about 5 lines)
    if max(knob) < min(base):
        return "lower"
    if min(knob) > max(base):
        return "higher"
    return "open"
    ### END SOLUTION


# %%
check_beyond_seeds(beyond_seeds)

# %% [markdown]
# <details><summary>Hint 1</summary>You need not compare every pair: for each answer two numbers decide.</details>
# <details><summary>Hint 2</summary>If the largest of one list is below the smallest of the other, all are.</details>

# %% machinery "All knobs, by this ruler, on orders"
base = knobs.orders["as it is"]
better = [knob for knob, losses in knobs.orders.items() if max(losses) < min(base)]
worse = [knob for knob, losses in knobs.orders.items() if min(losses) > max(base)]
tried, by_luck = len(knobs.orders) - 1, 2 / math.comb(6, 3)
print(f"lower:  {', '.join(better)}\nhigher: {'; '.join(worse)}\nopen:   the other {tried - len(better) - len(worse)}")
print(f"six values make two groups of three in {math.comb(6, 3)} ways; in 2 of these the groups do not overlap:")
print(f"by luck alone {by_luck:.0%} of {tried} knobs are outside, {by_luck * tried:.1f}")

# %% claims
assert better == ["batch 32", "rank 64"] and abs(by_luck - 0.1) < 1e-9
assert worse == ["lr 1.5e-4", "lr 5e-4", "lr 1.5e-2", "rank 4", "q, v", "q, k, v, o"]
assert min(base) / max(max(knobs.orders[knob]) for knob in better) > 1.4
assert min(min(knobs.orders[knob]) for knob in worse) / max(base) > 1.4
assert knobs.losses["checkpointing"] == knobs.losses["as it is"] and len(knobs.losses["as it is"][0]) == 30

# %% [markdown]
# Luck alone would put about two of the {{tried}} outside. These {{len(better) + len(worse)}} are outside by a factor of at least {{1.4}},
# and all of one kind: learning rate, amount of data, rank and targets. The memory knobs are `"open"`. Checkpointing even gives the same
# loss in every step of every seed, to the last bit.
#
# ## 2 · The optimizer: 8 bits, and pages
#
# AdamW remembers two running averages for each trained number: of its gradients, and of their squares. The number moves by the learning
# rate, times the first, divided by the root of the second (lessons 02 and 06). `adamw_8bit` stores both in 8 bits, in blocks of {{256}}
# that share a scale.
#
# That should worry you, for squares of gradients are very unequal. Here are four in one block. Let each gradient be as large as usual, so
# that each number should move by one learning rate.
#
# **Predict.** Let the 8 bits be {{256}} *evenly spaced* levels, from zero to the largest square. By how many learning rates does the
# third number move?

# %%
prediction = ...  # ← your guess

# %%
squares = torch.tensor([1, 1e-2, 1e-4, 1e-6])  # averages of squared gradients
for name, stored in {"evenly spaced": evenly(squares), "dynamic": dynamic(squares)}.items():
    steps = squares.sqrt() / (stored.sqrt() + 1e-8)  # AdamW adds 1e-8, so that it never divides by zero
    print(f"{name}: stored as", ", ".join(f"{value:.2g}" for value in stored))
    print("    moves by", ", ".join(f"{step:,.2f}" for step in steps), "learning rates")
print(told(prediction))

# %% claims
even_steps = squares.sqrt() / (evenly(squares).sqrt() + 1e-8)
assert evenly(squares)[2:].sum() == 0 and even_steps[2] > 9e5 and (steps - 1).abs().max() < 0.2

# %% [markdown]
# **What happened?** Evenly spaced, the two small squares become zero, and AdamW divides by next to nothing: the third number jumps by a
# million learning rates. So bitsandbytes takes a dynamic code, as for the scales in lesson 05. Its levels get closer together towards
# zero, over seven powers of ten, and each number moves nearly as it should.
#
# What does that save at 7B?

# %% machinery "AdamW's states at 7B"
held = {("QLoRA", rank): states("llama-7b", "qlora", rank) for rank in (16, 64)}
held["full fine-tuning", None] = states("llama-7b", "full", 16)
print(f"{'GB of states':<20}{'AdamW':>8}{'of it paged':>14}{'in 8 bits':>12}")
for (method, rank), sizes in held.items():
    name = f"{method}, rank {rank}" if rank else method
    print(f"{name:<20}{sizes[0]:>8.2f}{sizes[1]:>14.2f}{sizes[2]:>12.2f}")

# %% claims
assert [[round(size, 2) for size in sizes] for sizes in held.values()] == [
    [0.32, 0.14, 0.08],
    [1.28, 1.28, 0.32],
    [53.91, 53.91, 13.69],
]

# %% [markdown]
# For full fine-tuning 8 bits save {{held["full fine-tuning", None][0] - held["full fine-tuning", None][2]:.0f}} GB. With LoRA at rank {{64}}, only one GB
# is left to save.
#
# **Paged** states (lesson 02) save nothing while there is room, because then nothing moves. They are an insurance for the one step with a
# very long batch. It covers the states only, never weights or activations, and of these only tensors of {{100_000:,}} numbers and more:
# at rank {{16}}, less than half.
#
# ## 3 · Checkpointing: what it saves, what it costs
#
# Lesson 02 predicted it, and lesson 10 measured it: LLaMA-7B with QLoRA at rank {{64}}, samples of {{512}} tokens, one H100.
#
# **Predict.** A common rule says *"memory −{{50}} %, time +{{25}} %"*. What do you say?

# %%
prediction = {"memory": ..., "time": ...}  # ← your guesses, in per cent, such as -50 and +25

# %% machinery "The figure" alt="Two panels of bars, without and with checkpointing, for {{batches[0]}}, {{batches[1]}} and {{batches[2]}} samples in a pass. Peak memory falls from {{peaks['without checkpointing'][0]:.2f}} to {{peaks['with checkpointing'][0]:.2f}} GB, from {{peaks['without checkpointing'][1]:.1f}} to {{peaks['with checkpointing'][1]:.2f}}, and from {{peaks['without checkpointing'][2]:.1f}} to {{peaks['with checkpointing'][2]:.1f}}. A step takes {{change['time'][0]}}, {{change['time'][1]}} and {{change['time'][2]}} % more seconds."
batches = [1, 4, 16]
peaks, times = recorded(batches, "peak_allocated", 1e9), recorded(batches, "step_seconds", 1)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
sides = {"peak of torch's tensors (GB)": peaks, "seconds a step": times}
_ = plot_pairs(axes, [f"{b} × 512" for b in batches], sides, [70, 1.5], list(prediction.values()))
change = {
    name: [round(100 * (after / before - 1)) for before, after in zip(*values.values())]
    for name, values in {"memory": peaks, "time": times}.items()
}
for name, changes in change.items():
    print(f"{name}:", ", ".join(f"{each:+} %" for each in changes), f"({told(prediction[name])})")

# %% claims
assert change == {"memory": [-31, -63, -81], "time": [48, 70, 41]}

# %% [markdown]
# **What happened?** There is no such percentage. Weights and adapter stay as they are, activations grow with the tokens, and only these
# shrink: by {{-change["memory"][0]}} % of the peak with one sample, by {{-change["memory"][2]}} % with sixteen. (That is of torch's
# tensors. Lesson 02 counts all that is on the card, so its shares are smaller.)
#
# And the time? There is a second forward pass, and many texts call that *"a third more"*. Count the operations for each weight and token.
# A forward pass takes two, a multiplication and an addition. The backward pass of full training takes four: two for the gradient that
# goes on to the layer below, two for the weight's own. LoRA's weights are frozen, so it takes only the first two. The second forward pass
# is then two more of six in full training, but two more of *four* with LoRA. Let torch count:

# %% machinery "Count operations, and compare gradients"
for lora in (False, True):
    plain, twice, equal = counted(lora)
    print(f"tiny model, {'LoRA' if lora else 'in full'}: {plain / 1e6:.0f} million operations,", end=" ")
    print(f"with checkpointing {twice / plain - 1:+.0%}; all gradients equal to the last bit: {equal}")

# %% claims
assert f"{twice / plain - 1:+.0%}" == "+52%" and equal
plain, twice, equal = counted(lora=False)
assert f"{twice / plain - 1:+.0%}" == "+32%" and equal

# %% [markdown]
# A third, and a half. The H100 took {{min(change["time"])}} to {{max(change["time"])}} % longer, but in one timed step each.
#
# ### So it makes training slower?
#
# **Predict.** A step has {{16}} samples. Way A runs four passes of four, without checkpointing. Way B runs one pass of sixteen, with
# it. By how many per cent does B's step take longer?

# %%
prediction = ...  # ← your guess, in per cent

# %% machinery "A and B, from the record"
a, b = splits_of_a_step()
print(f"A: 4 passes of 4, without checkpointing: {a.gigabytes:4.1f} GB, {a.least:.2f} to {a.most:.2f} s a step")
print(f"B: 1 pass of 16, with checkpointing:     {b.gigabytes:4.1f} GB, {b.most:.2f} s a step")
one_sample, four_samples = times["without checkpointing"][:2]
print(f"one pass, without: {one_sample:.2f} s with one sample, {four_samples:.2f} s with four")
print(told(prediction))

# %% claims
assert b.most < a.least and four_samples < one_sample

# %% [markdown]
# **What happened?** B computes half as much again, takes {{a.gigabytes - b.gigabytes:.1f}} GB less, and is not slower, as far as single
# timings tell. (A's time is a range: the record timed each pass with an update, and A needs only one.) The third line says why. Without checkpointing, a pass over
# four samples takes no longer than over one: so much of this GPU is idle. A slower card is busy sooner, and gains less.
#
# So checkpointing buys room, and room for samples buys speed: **fill the card with samples, then accumulate what is missing.** The slider
# shows where that ends. Filled marks fit, with a tenth of the card left for gaps. Black dashes were measured.

# %% machinery "The figure and its sliders"
PASSES = [1, 2, 4, 8, 16]


def draw(size, length, rank, card):
    needs = needs_of(f"llama-{size}", rank, length)
    lines = {name: [needs(samples, on) for samples in PASSES] for name, on in WAYS.items()}
    points = {name: [(n, measured_on_the_card(n, on, length, rank, size)) for n in PASSES] for name, on in WAYS.items()}
    measured = {name: [(n, value) for n, value in found if value] for name, found in points.items()}
    return plot_splits(new_axes(), PASSES, lines, measured, ROOM * card)


SLIDERS = {
    "size": ipywidgets.SelectionSlider(options=["7b", "13b", "33b", "65b"], description="LLaMA"),
    "length": ipywidgets.SelectionSlider(options=[256, 512, 1024, 2048], value=512, description="tokens a sample"),
    "rank": ipywidgets.SelectionSlider(options=[4, 16, 64], value=64, description="rank"),
    "card": ipywidgets.SelectionSlider(options=[8, 12, 16, 24, 48, 80], value=24, description="card (GB)"),
}
at_first = needs_of("llama-7b")

# %% alt="Two lines over five ways to split sixteen samples, from one in a pass to all sixteen: predicted GB on the card for 7B. With checkpointing the line rises from {{at_first(1, True):.0f}} to {{at_first(16, True):.0f}}, and all five fit a card of {{24}} GB. Without it, eight and sixteen samples in a pass do not fit."
explore(draw, **SLIDERS)

# %% claims
assert at_first(4, False) < ROOM * 24 < at_first(8, False) and at_first(16, True) < ROOM * 24

# %% [markdown]
# **Exercise D.2 ●●○ (7 minutes).** `needs(samples, checkpointing)` predicts the GB of a pass. Find the split of {{16}} samples with the
# *fewest passes* that takes at most {{90}} % of the card; if it fits both ways, without checkpointing. Samples in a pass are a power of
# two.


# %%
def best_split(needs, card):
    """-> (samples in a pass, passes, checkpointing), such as (4, 4, True); None if nothing fits."""
    ### BEGIN SOLUTION (about 5 lines)
    for samples in (16, 8, 4, 2, 1):
        for checkpointing in (False, True):
            if needs(samples, checkpointing) <= 0.9 * card:
                return samples, 16 // samples, checkpointing
    return None
    ### END SOLUTION


# %%
check_splits(best_split)

# %% [markdown]
# <details><summary>Hint 1</summary>In which order must you try the ten ways, so that the first that fits is the answer?</details>
# <details><summary>Hint 2</summary>Two loops: the outer one from sixteen samples down, the inner one over <code>(False, True)</code>.</details>

# %% [markdown]
# Now ask it about a training of *yours*. These are the models that `needs_of` knows:

# %% machinery "Names of models"
print(*SHAPES)

# %%
best_split(needs_of("llama-3-8b", rank=16, length=1024), card=24)  # ← your model, rank, tokens a sample, and GB

# %% [markdown]
# ## 4 · Accumulation: is {{4}} × {{4}} really {{16}}?
#
# In the record it is: `batch 4 x 2` and `batch 1 x 8` end where *as it is* ends. In many scripts it was not, for years, transformers'
# Trainer among them. They took the mean loss of each pass (of each *micro-batch*), and then the mean of these means.
#
# Take two passes. The first has one token to learn, with a loss of {{4}}. The second has nine, with a loss of {{1}} each. The mean over
# all ten is ({{4}} + {{9}}) / {{10}} = {{13 / 10}}. The mean of the means is ({{4}} + {{1}}) / {{2}} = {{5 / 2}}: there the one token
# counts as much as the nine together.
#
# How far off are the *gradients*? Here is a step of four answers with {{2}}, {{4}}, {{8}} and {{60}} tokens, one in each pass, beside a
# step that has all four in one:

# %%
targets = [2, 4, 8, 60]
samples, model = answers(targets), tiny()
together = gradients_of(model, [samples], weights=[1])
one_each = [[sample] for sample in samples]
mean_of_means = gradients_of(model, one_each, weights=[1 / 4] * 4)
by_tokens = gradients_of(model, one_each, weights=[n / sum(targets) for n in targets])
print(f"mean of the means: off by {off(mean_of_means, together):.0%}")
print(f"weighted by tokens: off by {off(by_tokens, together):.2%}")

# %% machinery "How long are the orders' answers?"
lengths = [sample.target_count for sample in orders()[0]]
print(f"answers of lesson 01's orders: {min(lengths)} to {max(lengths)} tokens")

# %% claims
assert off(by_tokens, together) < 5e-5 and off(mean_of_means, together) > 1

# %% [markdown]
# The mean of the means is off by more than the gradient itself, without an error or a warning. With lesson 01's orders nobody would have
# noticed, for their answers are about equally long.
#
# **Exercise D.3 ●●● (9 minutes).** Write the loop that gets it right. `mean_loss(batch)` is the mean over a batch's targets (as
# transformers' `model(**batch).loss`). Call `.backward()` so that the gradients add up to those of one large batch. A target is a label
# that is not `-100` *and* has a token before it: nothing predicts the first token of a row.


# %%
def accumulate(mean_loss, micro_batches):
    """Backward passes over all micro-batches (dicts of `input_ids` and `labels`); returns nothing."""
    ### BEGIN SOLUTION (about 4 lines)
    targets = [(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]
    for batch, count in zip(micro_batches, targets):
        (mean_loss(batch) * count / sum(targets)).backward()
    ### END SOLUTION


# %%
check_accumulate(accumulate)

# %% [markdown]
# <details><summary>Hint 1</summary>A mean times the number of its targets is a sum. By which number must all the sums be divided?</details>
# <details><summary>Hint 2</summary>A comparison of tensors gives True and False, and <code>.sum()</code> counts the True. You need the targets of <em>all</em> micro-batches before the
# first backward pass.</details>

# %% machinery "For those who pack: padding, and neighbours in a row"
kinds = {"orders": (orders()[0], 256), "lengths as in a chat": (chat(), 512)}
ways = ("as they come", "similar lengths together", "packed")
padded = {(kind, way): padding(of, width, way) for kind, (of, width) in kinds.items() for way in ways}
for kind in kinds:
    print(f"aside on packing · padding, {kind}: " + ", ".join(f"{way} {padded[kind, way]:.0%}" for way in ways))
anew, on = neighbour()
print(
    f"aside on packing · second sample of a row, logits off by {anew:.0%} if positions begin anew, {on:.0%} if they run on"
)

# %% claims
assert [f"{value:.0%}" for value in padded.values()] == ["6%", "1%", "3%", "54%", "7%", "14%"]
assert anew < 5e-5 and on > 0.05

# %% [markdown]
# <details><summary>What is packing, and what does it buy?</summary>
#
# A tensor is a rectangle, so short samples are filled up with padding, which is computed and thrown away. <i>Packing</i> puts several
# samples into one row instead. Of a batch of chats as they come, about half is padding; packing leaves
# {{100 * padded["lengths as in a chat", "packed"]:.0f}} %. But a batch of samples of similar length leaves only
# {{100 * padded["lengths as in a chat", "similar lengths together"]:.0f}} %, at least beside a packing that always looks at the last row only. What
# packing does buy is steps of equal size, and so of equal memory.
#
# In a packed row the second sample could read the first. transformers prevents that if the positions begin anew at each sample. If they
# run on, it learns from its neighbour, without an error.
#
# </details>
#
# ## 5 · Learning rate, warm-up, clipping
#
# AdamW divides a gradient by that number's *usual* gradient. What is usual in the very first step? `moves` gives a number some gradients,
# and tells how far AdamW moves it in each step, in learning rates:


# %%
def moves(gradients, learning_rate=0.001):
    number = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([number], lr=learning_rate, weight_decay=0)
    places = [0.0]
    for gradient in gradients:
        number.grad = torch.tensor(gradient, dtype=torch.float64)
        adamw.step()
        places.append(number.item())
    return [(before - after) / learning_rate for before, after in zip(places, places[1:])]


for first in (30.0, 0.3, -0.003, 0.00003):
    print(f"first gradient {first:>7g}: moves by {moves([first])[0]:+.2f} learning rates")

# %% claims
assert all(abs(abs(moves([first])[0]) - 1) < 1e-3 for first in (30.0, 0.3, -0.003, 0.00003))

# %% [markdown]
# In its first step AdamW has seen one gradient, so that one *is* the usual. Every number moves by a whole learning rate, also where the
# gradient is so small that its sign may be the chance of a few samples. AdamW is boldest when it knows least. **Warm-up** makes up for
# that: the rate rises over the first steps, until the averages mean something. In the record:

# %%
shares = [rate(step, steps=30, warmup_steps=3, schedule="cosine") for step in range(1, 31)]
print("share of the learning rate in steps 1 to 5:", *(f"{share:.2f}" for share in shares[:5]))
print("in the last three:", *(f"{share:.2f}" for share in shares[-3:]))

# %% [markdown]
# **Clipping** is for the one garbled sample whose gradient is huge. Take the norm of all gradients together, the root of the sum of their
# squares. If it is above a limit, often {{1}}, all are multiplied by the factor that brings it down to the limit.
#
# **Predict.** A number has a gradient of {{1}} in each step, and moves by one learning rate each time. Only in step 20 its gradient is
# {{100}}. How far does it move in step 20, and in step 60?

# %%
prediction = {"step 20": ..., "step 60": ...}  # ← your guesses, in learning rates

# %% alt="Two lines: how far AdamW moves the number in each of {{len(steady)}} steps. Clipped, it moves by one learning rate throughout. Not clipped, it falls to about a half at the large gradient, then to a tenth within some thirty steps, and stays there."
steady = [1.0] * 100
spiked = [*steady[:19], 100.0, *steady[20:]]
lines = {"not clipped": moves(spiked), "clipped at 1": moves([min(g, 1.0) for g in spiked])}
_ = plot_moves(new_axes(height=2.8), lines, dict(zip((20, 60), prediction.values())))
for step, guess in zip((20, 60), prediction.values()):
    print(f"step {step}, not clipped: {lines['not clipped'][step - 1]:.2f} learning rates ({told(guess)})")
late = moves([*[1.0] * 2999, 100.0, *[1.0] * 40])
print(f"the same in step 3,000: {late[2999]:.1f} learning rates, and {late[3039]:.2f} forty steps later")
print(f"all gradients a hundredth as large: {moves([0.01] * 100)[-1]:.2f} learning rates in step 100")

# %% claims
assert lines["clipped at 1"][-1] > 0.99 and abs(moves([0.01] * 100)[-1] - 1) < 1e-3
assert 3.2 < late[2999] < 3.25 and 0.3 < late[3039] < 0.36
assert 0.5 < lines["not clipped"][19] < 0.6 and lines["not clipped"][59] < 0.1 and lines["not clipped"][99] < 0.15

# %% [markdown]
# **What happened?** A gradient {{100}} times too large moves the number half as far as usual. Its square raises at once what is *usual*, so
# it is divided by a large number. Late in a run, when the average rests on thousands of steps, one more weighs less in it, and the number
# jumps by {{late[2999]:.1f}} learning rates. That is still far from {{100}}. In both cases the harm comes later. The average of squares
# keeps {{0.999}} of itself in each step, and while it remembers, ordinary gradients look small beside it: at step 60 the number moves by a
# tenth of what it should, and after the late one by a third. Clipping protects the average.
#
# And a limit that *every* step exceeds? It scales all steps' gradients by similar factors, and AdamW divides a common factor away, as the
# last line shows.
#
# **Exercise D.4 ●●○ (5 minutes).** Write it. The limit is on the norm of all numbers in all tensors together.


# %%
def clipped(gradients, limit):
    """A list of tensors -> a list of tensors, scaled by one factor where their common norm is above the limit."""
    ### BEGIN SOLUTION (about 3 lines)
    norm = sum((gradient**2).sum() for gradient in gradients) ** 0.5
    factor = min(1.0, limit / norm.item())
    return [gradient * factor for gradient in gradients]
    ### END SOLUTION


# %%
check_clipped(clipped)

# %% [markdown]
# <details><summary>Hint 1</summary>First one number, the norm of all tensors together. Then one factor, the same for all.</details>
# <details><summary>Hint 2</summary>Below the limit the factor is one.</details>

# %% [markdown]
# ### But which learning rate?
#
# **Predict.** The rate goes from {{0.0015}} to {{0.005}}. *As it is*, the loss is {{sum(knobs.orders["as it is"]) / 3:.4f}} on held-out
# orders and {{sum(knobs.prose["as it is"]) / 3:.2f}} on plain English. And now?

# %%
prediction = {"orders": ..., "English": ...}  # ← your guesses, in nats per token

# %% machinery "The figure" alt="A point for each run: loss on held-out orders, better to the right, against loss on plain English, better below. Whoever moves right mostly moves up. The lowest rate stays at {{start:.1f}} in English and learns little; batch {{32}} and rank {{64}} learn most and lose in English; the rate of {{0.005}} loses most, and is no better on orders than as it is."
shown = [knob for knob in [*RATES, *GROUPS[4]] if knob != "lr 1.5e-2"]
points = {knob: list(zip(knobs.orders[knob], knobs.prose[knob])) for knob in shown}
start = untrained_prose()
labels = {"as it is": (-6, 14), "batch 32": (42, -4), "rank 4": (34, 8), "rank 64": (-44, 4), "q, v": (-22, 8)}
labels |= {"q, k, v, o": (14, 20), "lr 1.5e-4": (0, 10), "lr 5e-4": (-12, -14), "lr 5e-3": (30, 4)}
_ = plot_tradeoff(new_axes(height=4), points, start, labels, (prediction["orders"], prediction["English"]))
mean = {knob: [sum(values) / 3 for values in zip(*seeds)] for knob, seeds in points.items()}
for knob, (on_orders, english) in sorted(mean.items(), key=lambda item: item[1][1]):
    print(f"{knob:<12}orders {on_orders:.4f}, English {english:.2f}, {english - start:+.2f} against untrained")
print(told(prediction))

# %% claims
assert "lr 5e-3" not in better + worse and min(knobs.prose["lr 5e-3"]) > max(knobs.prose["as it is"])
assert max(knobs.prose["lr 5e-4"]) < min(knobs.prose["as it is"])
assert min(knobs.orders["lr 1.5e-2"]) > 1.5 and all(len(losses) == 30 for losses in knobs.losses["lr 1.5e-2"])

# %% [markdown]
# **What happened?** On the orders the difference is `"open"`, and English got clearly worse. What learns the orders faster pays for it in
# what nobody trained, probably because it moves the model farther from where it was. Your own data does not show that, so measure another
# text, too. With {{0.015}} both are ruined, in spite of warm-up and clipping, and no error says so.
#
# ## 6 · The adapter's knobs
#
# The last five rows change how much is trained, or on how much. **They are not equal in all else:**

# %% machinery "What each trains, and what it saw"
print(f"{'':<12}{'numbers':>11}{'orders seen':>13}{'orders':>9}{'English':>9}")
for knob in ["as it is", *GROUPS[4]]:
    seen = 30 * (32 if knob == "batch 32" else 8)
    print(f"{knob:<12}{knobs.trained[knob]:>11,}{seen:>13,}{mean[knob][0]:>9.4f}{mean[knob][1]:>9.2f}")

# %% claims
assert min(knobs.orders["q, v"]) > max(knobs.orders["rank 4"]) and min(knobs.prose["q, v"]) > max(knobs.prose["rank 4"])
assert abs(mean["q, k, v, o"][0] - mean["rank 4"][0]) < 0.001
assert abs(knobs.trained["rank 4"] / knobs.trained["q, k, v, o"] - 2 / 3) < 0.01
assert mean["q, k, v, o"][1] < mean["as it is"][1] and mean["q, v"][1] < mean["as it is"][1]
assert min(knobs.prose["q, k, v, o"]) > max(knobs.prose["rank 4"])
assert (
    min(knobs.prose["rank 64"])
    > max(knobs.prose["as it is"])
    > min(knobs.prose["as it is"])
    > max(knobs.prose["rank 4"])
)

# %% [markdown]
# - **Batch {{32}}** saw four times as many orders. It is more data, not a better step.
# - **Rank {{4}}** and **rank {{64}}** have the learning rate and the alpha / rank of *as it is*. So each column of B moves equally fast,
#   but rank {{64}} has sixteen times as many columns as rank {{4}}, and its update grows faster. It may win only because it moves
#   farther, as with a higher rate. In the small problem of [dive B](dive_b_why_low_rank.ipynb), most of the advantage goes away once
#   each rank has its own best rate.
# - **Targets** have the rank and the rate of *as it is*, which trains all linear layers, and fewer numbers. They learn the orders less well,
#   and cost less English. Is that the targets, or the amount? Rank {{4}} on *all* layers learns the orders as well as
#   `q, k, v, o` at rank {{16}} does, with two thirds of its numbers, and costs less English than both. So spread a small budget over all
#   layers.

# %% machinery "Three learning rates, with their alpha and rank"
settings = {"the QLoRA authors": (2e-4, 16, 64), "lesson 09's script": (2e-4, 32, 16), "as it is": (1.5e-3, 32, 16)}
for name, (learning_rate, alpha, rank) in settings.items():
    print(f"{name:<20}rate × alpha / rank = {learning_rate * alpha / rank:.5f}")

# %% claims
from transformers import get_scheduler

nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
assert get_scheduler("constant", nothing, num_warmup_steps=57, num_training_steps=1875).get_last_lr() == [2e-4]
products = [learning_rate * alpha / rank for learning_rate, alpha, rank in settings.values()]
assert [round(product / products[0]) for product in products] == [1, 8, 60]

# %% [markdown]
# <details><summary>May I copy a learning rate?</summary>
#
# Only together with its alpha and rank (lesson 06). The QLoRA authors' script for 7B, <code>finetune_guanaco_7b.sh</code>, has a rate of
# {{0.0002}} with alpha {{16}} and rank {{64}}. Lesson 09's script has the same rate, but each of its columns of B counts eight times as much,
# since its alpha / rank is eight times theirs. (It has a quarter as many columns.) With <i>as it is</i> each counts sixty times as much:
# {{30}} steps for an easy task, where they took {{1875:,}}. (Their script asks for warm-up as well, but transformers' <code>constant</code> schedule ignores that.) No record here says
# which rate is best for <i>your</i> run: try three, a factor of three apart, for a few dozen steps.
#
# </details>
#
# > **Somebody may turn knobs for you.** By itself TRL's `SFTTrainer` checkpoints, shuffles, cuts samples at {{1024:,}} tokens, and makes
# > a 4-bit model's adapter bf16. [Lesson 09](09_your_gpu.ipynb) shows what to undo.
#
# ## The list, with receipts
#
# | knob | what it buys | what it costs |
# |---|---|---|
# | checkpointing | {{-change["memory"][0]}} to {{-change["memory"][2]}} % of torch's peak at 7B, the more tokens the more | half as much arithmetic again; nothing in what is learned |
# | fewer samples at a time | the rest of the activations | speed: fill the card first |
# | 8-bit optimizer | {{held["QLoRA", 64][0] - held["QLoRA", 64][2]:.2f}} GB at 7B and rank {{64}}, a quarter of that at rank {{16}} | nothing that three seeds show |
# | paged optimizer | an insurance | not measured: in so small an adapter nothing is paged |
# | bf16 instead of fp32 | {{sum(knobs.peak["float32"]) / 3 - sum(knobs.peak["as it is"]) / 3:.1f}} GB at {{135}}M | nothing that three seeds show |
# | warm-up, clipping | first steps that are not bold, one bad sample that does not last | no run was made without them |
# | rate, data, rank | your task, learned faster | other text, worse |
# | all layers at a low rank | your task with fewer numbers than `q, k, v, o`, and less English lost | nothing that this record shows |
#
# ## Recap
#
# - A ruler first: equal settings at several seeds. What lies within their spread has shown nothing.
# - No memory knob changed what is learned by more than a seed does. Fill the card with samples, checkpointing if need be, and weight by tokens what you
#   accumulate.
# - Rate, data and rank, up to a point, make the model better on yours, and worse on the rest.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [12 · How do I ship it?](12_ship_it.ipynb)
