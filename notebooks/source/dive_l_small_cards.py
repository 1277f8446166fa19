# %% [markdown]
# # Dive L · Which card is large enough?
#
# Lesson 10 ends with a table: 7B trains on a card of {{8}} GB, 65B on one of {{48}}. Can it be less? Here are four recipes that were
# tried on ever smaller cards, what each of them gives up, and what a card must hold that torch does not count. You
# make 13B fit a card of {{12}} GB without moving anything to the CPU. And if the card is old, it has fp16 only.
#
# | you need | |
# |---|---|
# | time | 43 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the record"
import ipywidgets
import torch

from qlora_lab.classroom.cards import needed_by_script
from qlora_lab.classroom.checks import check_12_gb, check_card_usage, check_fastest_preset, check_logits, progress
from qlora_lab.classroom.lessons.dive_l.figures import plot_cards, plot_waterfall
from qlora_lab.classroom.lessons.dive_l.machinery import (
    GB,
    SIZES,
    grouped,
    one_step,
    outcomes_of,
    read_record,
    recorded_peaks,
    shape_name,
    size_of,
    whole_step,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.widgets import explore
from qlora_lab.finetuning import PRESETS
from qlora_lab.memory import SHAPES, estimate

record = read_record("memory")
context = record["outside_allocator_at_start"]  # bytes that the driver had taken before the first tensor
print(f"recorded on one {record['device']}, {record['date']}")

# %% [markdown]
# ## 1 · Where did the missing gigabytes go?
#
# The setting is that of lesson 10: LLaMA-7B, QLoRA, rank {{64}} on all linear layers, one sample of {{512}} tokens, gradient checkpointing, paged
# AdamW. Torch counts its tensors. The driver counts what is taken of the card, and `nvidia-smi` shows that in MiB:

# %%
step = one_step(record, "7B")["measured"]
on_the_card = step["peak_reserved"] + step["outside_allocator"]
print(f"torch's tensors {step['peak_allocated'] / GB:.2f} GB", end=", ")
print(f"on the card {on_the_card / GB:.2f} GB, or {on_the_card / 2**20:,.0f} MiB")

# %% [markdown]
# - **Reserved.** Torch takes memory from the driver in large pieces, and there are gaps between the tensors in them.
# - **Managed memory.** The states of a paged optimizer lie beside torch's memory (lesson 02).
# - **CUDA context.** The driver takes its own before the first tensor.
#
# **Exercise L.1 ●○○ (4 minutes).** Explain the driver's number: how many bytes should it show, from what the record knows?
# `run["measured"]` has `peak_allocated`, `peak_reserved` and `managed_bytes`; `context` is what the driver had taken at the start.


# %%
def bytes_on_the_card(run, context):
    """What nvidia-smi should show, in bytes."""
    ### BEGIN SOLUTION (about 2 lines)
    measured = run["measured"]
    return measured["peak_reserved"] + measured["managed_bytes"] + context
    ### END SOLUTION


# %%
check_card_usage(bytes_on_the_card)

# %% [markdown]
# <details><summary>Hint 1</summary>Tensors lie inside what is reserved: adding both counts them twice.</details>
# <details><summary>Hint 2</summary>Three terms: what torch has reserved, what lies in managed memory, the context.</details>

# %% machinery "What is left over"
left_over = (on_the_card - step["peak_reserved"] - step["managed_bytes"] - context) / GB
print(
    f"reserved {step['peak_reserved'] / GB:.2f}, managed {step['managed_bytes'] / GB:.2f}, context {context / GB:.2f},",
    end=" ",
)
print(f"left over {left_over:.2f} GB")

# %% claims
assert f"{on_the_card / GB:.2f} {left_over:.2f}" == "7.80 0.22"

# %% [markdown]
# {{left_over:.2f}} GB remain. Kernels and libraries that were loaded on the way are a plausible owner, but nobody measured that.
#
# ## 2 · What does the paper count?
#
# QLoRA's paper gives {{6.9}}, {{11.3}}, {{24.7}} and {{45.0}} GB for this setting and the four sizes of LLaMA. These are more than torch's tensors here, and less than all that is on the
# card. The authors' published script, run with `--bf16`, holds the adapters in bf16, which halves adapters and gradients. Let us
# measure that, and add the states and the context. In the last two columns the loaded model is taken away from both sums:

# %% machinery "Our sum and the paper's, with and without the base"
paper = dict(zip(SIZES, ((6.9, 5.046), (11.3, 8.476), (24.7, 19.302), (45.0, 37.074))))  # GB: total, base model
print(
    f"{'GB':<5}{'bf16 adapters':>14}{'states':>8}{'context':>9}{'sum':>8}{'paper':>8}{'less the base:':>18}{'sum':>6}{'paper':>7}"
)
totals, rests = {}, {}
for size, (total, base) in paper.items():
    wanted = (shape_name(size), "bf16-adapters")
    bf16 = next(row for row in record["caps"] if (row["shape"], row["preset"]) == wanted and "measured" in row)[
        "measured"
    ]
    pieces = [bf16["peak_allocated"] / GB, bf16["managed_bytes"] / GB, context / GB]
    loaded = one_step(record, size)["phases"]["load"]["allocated"] / GB
    totals[size], rests[size] = (sum(pieces), total), (sum(pieces) - loaded, total - base)
    print(f"{size:<5}{pieces[0]:>14.2f}{pieces[1]:>8.2f}{pieces[2]:>9.2f}{sum(pieces):>8.2f}{total:>8}", end="")
    print(f"{rests[size][0]:>24.1f}{rests[size][1]:>7.1f}")

# %% claims
assert all(abs(ours / theirs - 1) < 0.03 for ours, theirs in totals.values())
assert all(ours > theirs + 0.8 for ours, theirs in rests.values())

# %% [markdown]
# The totals meet within {{3}} %. Is the question answered? Take the loaded model away, and they no longer do: at 65B our sum has {{rests["65B"][0]:.1f}} GB
# left, the paper {{rests["65B"][1]:.1f}}. Our base is smaller than the paper's and the rest larger, and the two differences cancel by luck. What the paper's base model
# holds, it does not say. A total that agrees is no explanation yet.
#
# ## 3 · On a card of that size
#
# Now the same H100, with torch held to what a card of so many GB has beside a context of half a GB. Torch was also told to let its pieces grow
# (`expandable_segments:True`), which leaves fewer gaps. There are four recipes:

# %%
for name, preset in PRESETS.items():
    print(f"{name:<14}{preset.what}")

# %% [markdown]
# *In-backward* updates each adapter as soon as its gradient is there, and throws the gradient away. So there is never more than one. But
# nothing can be done with all gradients together: no clipping to a common length, and no accumulation over several batches.
#
# **Predict.** With the standard recipe torch's tensors take {{step["peak_allocated"] / GB:.1f}} GB at 7B, and {{5.5}} GB are there on a card of {{6}} GB. Does it train?

# %%
vote = ...  # "yes" or "no"

# %% machinery "Cards and recipes" alt="Grid of marks: four recipes at 7B, 13B, 33B, 65B over card sizes. Crosses are out of memory, dots train. The smallest cards: standard {{smallest['7B', 'standard']}}, {{smallest['13B', 'standard']}}, {{smallest['33B', 'standard']}}, {{smallest['65B', 'standard']}}; lean {{smallest['7B', 'lean']}}, {{smallest['13B', 'lean']}}, {{smallest['33B', 'lean']}}, {{smallest['65B', 'lean']}}. On the smallest card, nearly all dots are hollow: optimizer states would move out."
outcomes, cards = outcomes_of(record["caps"])
smallest = {row: min(card for card, how in tried.items() if how != "fails") for row, tried in outcomes.items()}
_ = plot_cards(new_axes(height=4.6), outcomes, cards)
print(f"7B, standard, 6 GB: {outcomes['7B', 'standard'][6]}; {told(vote)}\n\nsmallest card (GB) that trains:")
for name in PRESETS:
    print(f"{name:<14}" + "".join(f"{size:>6} {smallest[size, name]:>3}" for size in SIZES))
ran = {(size_of(row), row["preset"]): row for row in record["caps"] if "measured" in row}
everything = whole_step(ran["65B", "standard"])
print(f"\n65B, standard, with paged states and context: {everything:.1f} GB")
beside = context + left_over * GB
tight = [row for row in ran if ran[row]["measured"]["peak_reserved"] + beside > smallest[row] * GB]
print(f"too small if {beside / GB:.2f} GB lie beside torch:", "; ".join(f"{size} {name}" for size, name in tight))
print(f"\ncard (GB) that holds everything, {beside / GB:.2f} GB beside torch included:")
for name in PRESETS:
    print(f"{name:<14}" + "".join(f"{size:>6} {whole_step(ran[size, name], beside):>5.1f}" for size in SIZES))

# %% claims
assert tight == [("7B", "in-backward"), ("7B", "lean"), ("13B", "in-backward")]
assert outcomes["7B", "standard"][6] == "fails"
assert [smallest[size, "standard"] for size in SIZES] == [8, 12, 24, 48]
assert [smallest[size, "bf16-adapters"] for size in SIZES] == [6, 10, 24, 40]
assert [smallest[size, "lean"] for size in SIZES] == [5, 10, 20, 40]
filled = [row for row, card in smallest.items() if outcomes[row][card] == "fits"]
assert filled == [("7B", "standard"), ("65B", "in-backward")]

# %% [markdown]
# **What happened?** Torch cannot use every byte: on {{8}} GB, where it trains, {{ran["7B", "standard"]["measured"]["peak_reserved"] / GB:.2f}} GB were reserved for {{step["peak_allocated"] / GB:.2f}} GB of tensors. A sum of tensors alone would have
# said yes.
#
# - 65B trains on {{48}} GB and 33B on {{24}}, as the paper says, even with adapters in fp32.
# - With adapters in bf16, 65B trains on {{smallest["65B", "bf16-adapters"]}} GB. *Lean* takes 33B to {{smallest["33B", "lean"]}} and 7B to {{smallest["7B", "lean"]}}.
#
# But look at the **hollow dots**. The optimizer's states lay in managed memory *beside* the limit, and an H100 has room for them. On a card of just
# that size the driver would move some of them to the CPU and back in every step. That is so in all but two of the sixteen rows. The
# step of 65B on "{{48}}" takes {{everything:.1f}} GB in all. How much slower such a step would be was not measured.
#
# And section 1 found {{(context / GB + left_over):.2f}} GB beside torch rather than {{0.5}}. With those, {{len(tight)}} of the sixteen cards are too small, 7B's {{5}} GB among them. Whoever does not want to
# rely on paging needs the cards of the last table: {{whole_step(ran["7B", "lean"], beside):.1f}} GB for 7B, for example, with the leanest recipe.
#
# ## 4 · What does a smaller recipe cost?

# %% machinery "Memory and time of each recipe"
print(f"{'':<20}{'card':>6}{'reserved':>10}{'+ managed':>11}{'s a step':>10}")
for (size, name), row in ran.items():
    got = row["measured"]
    print(f"{size:<6}{name:<14}{row['card_gb']:>6}{got['peak_reserved'] / GB:>10.2f}", end="")
    print(f"{got['managed_bytes'] / GB:>11.2f}{got['step_seconds']:>10.2f}")
again = {size: one_step(record, size)["measured"]["step_seconds"] for size in SIZES}
print(
    "\nthe standard step in lesson 10's runs: "
    + ", ".join(f"{size} {seconds:.2f} s" for size, seconds in again.items())
)

# %% claims
assert again["7B"] < 0.6 < 0.7 < ran["7B", "standard"]["measured"]["step_seconds"]

# %% [markdown]
# At 7B the times show little: the same standard step took {{again["7B"]:.2f}} s in one run and {{ran["7B", "standard"]["measured"]["step_seconds"]:.2f}} in another. At this size the GPU waits for Python, whose
# speed varies ([dive F](dive_f_why_is_it_slow.ipynb)). At 33B and 65B the same step took nearly the same time in both runs, and there bf16 adapters are faster than the standard recipe, by {{1 - ran["33B", "bf16-adapters"]["measured"]["step_seconds"] / ran["33B", "standard"]["measured"]["step_seconds"]:.0%}} and
# {{1 - ran["65B", "bf16-adapters"]["measured"]["step_seconds"] / ran["65B", "standard"]["measured"]["step_seconds"]:.0%}}.
#
# Do the recipes *learn* alike? Here is the bundled model after {{30}} steps with each of them on lesson 01's orders, at two seeds:

# %% machinery "What the recipes learn"
learned = read_record("presets")
print(f"{learned['device']}, {learned['date']}: nats per token on held-out orders")
by_preset = {name: [run["validation_loss"] for run in learned["runs"] if run["preset"] == name] for name in PRESETS}
for name, values in by_preset.items():
    print(f"{name:<14}" + "".join(f"{value:>10.4f}" for value in values))
standard = by_preset["standard"]
apart = max(abs(value - base) for values in by_preset.values() for value, base in zip(values, standard))
seeds = abs(standard[0] - standard[1])
print(f"apart from standard: {apart:.4f} at most; standard's two seeds: {seeds:.4f}")

# %% claims
assert apart < seeds and all(run["losses"][0] > 1.4 and run["exact_match"] >= 0.97 for run in learned["runs"])

# %% [markdown]
# No recipe ends far from the standard one: the seeds differ more. (The two that update in the backward pass, and so
# without clipping, are the higher ones at both seeds. Two seeds are too few to say more.) Did you expect that of adapters in bf16, after lesson 02, where a bf16 weight did not move at all? An adapter's
# numbers are small and its learning rate is large: beside a number of {{0.02}}, a step of {{0.0015}} is no trifle that rounding swallows.
#
# **Exercise L.2 ●●○ (4 minutes).** Let the record choose. Which recipe takes the fewest seconds a step, of those that
# train the model on *your* card? (For 7B, mind the noise.) `rows` is `record["caps"]`. A run that succeeded on a smaller card counts too; one that
# ran out of memory has no `measured`. If none trains, return `None`.


# %%
def fastest_preset(rows, shape, card_gb):
    """Name of the recipe (`preset`) with the fewest seconds a step that trains `shape` on a card of `card_gb` GB."""
    ### BEGIN SOLUTION (about 3 lines)
    works = [row for row in rows if row["shape"] == shape and row["card_gb"] <= card_gb and "measured" in row]
    best = min(works, key=lambda row: row["measured"]["step_seconds"], default=None)
    return best and best["preset"]
    ### END SOLUTION


# %%
check_fastest_preset(fastest_preset)

# %% [markdown]
# <details><summary>Hint 1</summary>Three conditions: the shape, <code>row["card_gb"] &lt;= card_gb</code>, and
# <code>"measured" in row</code>.</details>
# <details><summary>Hint 2</summary><code>min(..., key=lambda row: row["measured"]["step_seconds"], default=None)</code>
# </details>

# %% [markdown]
# ## 5 · The logits' turn
#
# With checkpointing, logits and loss grow fastest: at their peak, three fp32 numbers stand there for each token and each known word (lesson 02).
#
# **Exercise L.3 ●●○ (3 minutes).** {{8}} GB are free for logits and loss. How many tokens fit into one step, with LLaMA's vocabulary of
# {{SHAPES["llama-7b"].vocab_size:,}} and with Llama-3-8B's, {{SHAPES["llama-3-8b"].vocab_size:,}}? Guess first. (One long document is a step, too.)


# %%
def tokens_that_fit(vocabulary, gigabytes):
    """Whole tokens whose logits and loss take `gigabytes` (10^9 bytes) at most."""
    ### BEGIN SOLUTION (about 1 line)
    return int(gigabytes * 1e9 // (vocabulary * 3 * 4))
    ### END SOLUTION


# %%
check_logits(tokens_that_fit)

# %% [markdown]
# <details><summary>Hint</summary>Bytes of one token: words × numbers for each word × bytes of an fp32 number.</details>

# %% [markdown]
# TRL, with which lesson 09 trains, avoids this. It scores up to {{4096:,}} tokens and {{32768:,}} of the model's words at a time, so the
# logits are never all there. Lesson 09's sums count as many scores as that, at {{12}} bytes each, which is more than TRL takes. Dora's
# step of exercise 2.2 was {{16}} samples of {{512}} tokens with Llama-3-8B:

# %%
pieces, at_once = (needed_by_script("llama-3-8b", 16, 512, **how) for how in ({}, {"loss_chunk": None}))
print(f"logits all at once {at_once.card_bytes / 1e9:.0f} GB, in pieces {pieces.card_bytes / 1e9:.0f} GB")

# %% claims
assert f"{at_once.card_bytes / 1e9:.0f} {pieces.card_bytes / 1e9:.0f}" == "30 14"

# %% [markdown]
# ## 6 · Take it apart
#
# The sum by part, and the recorded peak where there is one. What happens to the parts from {{1}} × {{512}} to {{16}} × {{2048}} tokens? From rank {{64}} to {{16}}?

# %% machinery "The figure and its sliders"
recorded = recorded_peaks(record)
first = grouped(estimate(SHAPES["llama-7b"], batch_size=4, gradient_checkpointing=False))


def draw(shape, method, tokens, checkpointing, rank):
    batch, length = tokens
    knobs = {"rank": rank, "batch_size": batch, "sequence_length": length, "gradient_checkpointing": checkpointing}
    parts = grouped(estimate(SHAPES[shape], method, **knobs))
    peak = recorded.get((shape, method, batch, length, checkpointing, rank))
    totals = {"predicted peak": sum(parts.values()), "measured peak": peak}
    return plot_waterfall(new_axes(height=3.2), parts, totals, "torch's tensors (GB, 10$^9$ bytes)", 60)


lengths = [(f"{b} × {n}", (b, n)) for n in (512, 2048) for b in (1, 4, 16)]
SLIDERS = {
    "shape": ipywidgets.Dropdown(options=[shape_name(size) for size in SIZES], description="model"),
    "method": ipywidgets.Dropdown(options=["qlora", "lora"], description="method"),
    "tokens": ipywidgets.SelectionSlider(options=lengths, value=(4, 512), description="batch × length"),
    "checkpointing": ipywidgets.Checkbox(value=False, description="gradient checkpointing"),
    "rank": ipywidgets.SelectionSlider(options=[16, 64], value=64, description="rank"),
}

# %% alt="Waterfall of horizontal bars: GB of six groups, each beginning where the last ends, then predicted and measured peak. At the start, 7B with QLoRA and {{4}} × {{512}} tokens without checkpointing: activations are {{first['activations']:.2f}} of the {{sum(first.values()):.2f}} predicted."
explore(draw, **SLIDERS)

# %% claims
assert sum(first.values()) / recorded["llama-7b", "qlora", 4, 512, False, 64] > 0.99

# %% [markdown]
# **Exercise L.4 ●●○ (6 minutes).** You have a card of {{12}} GB and want LLaMA-13B: QLoRA, rank {{64}} on all linear layers, {{3072:,}} tokens a step
# (three samples of {{1024:,}}, say). Nothing may page out: the total of the sum must fit. Reckon before you try: how many parameters
# has the adapter, and which of its costs can be halved or quartered? The optimizers are `"adamw_torch"`, `"adamw_8bit"`,
# `"paged_adamw_32bit"` and `"paged_adamw_8bit"`; adapters are `"float32"` or `"bfloat16"`.

# %%
settings = {
    ### BEGIN SOLUTION
    ### STUB: "batch_size": ...,
    ### STUB: "sequence_length": ...,
    ### STUB: "gradient_checkpointing": ...,
    ### STUB: "optimizer": ...,
    ### STUB: "adapter_dtype": ...,
    "batch_size": 3,
    "sequence_length": 1024,
    "gradient_checkpointing": True,
    "optimizer": "paged_adamw_8bit",
    "adapter_dtype": "bfloat16",
    ### END SOLUTION
}

# %%
check_12_gb(settings)

# %% [markdown]
# <details><summary>Hint 1</summary>Adapter and gradients have four bytes a parameter each in fp32 and two in bf16; Adam's states have eight, or two
# in 8 bits.</details>
# <details><summary>Hint 2</summary>Adam's states in 8 bits alone just fail.</details>

# %% [markdown]
# ## 7 · An old card
#
# A T4 has {{16}} GB, but no bf16, so lesson 09's script trains in fp16 there. What the backward pass hands from layer to layer is fp16,
# too, and often smaller than fp16's smallest number. It would become zero. A **loss scaler** prevents that: it multiplies the loss by
# {{65536:,}} at first, which makes all gradients as much larger, and after the backward pass it divides the adapter's by the factor again, in fp32.

# %%
factor, gradient = 65_536, torch.tensor(1e-8)
scaled = (factor * gradient).half().float() / factor
print(f"smallest number of fp16: {2.0**-24:.0e}")
print(f"{gradient:.0e} in fp16: {gradient.half():.0e}; scaled, in fp16, and divided again: {scaled:.0e}")

# %% claims
assert torch.tensor(2.0**-24).half() > 0 == torch.tensor(2.0**-26).half() == gradient.half()
assert abs(scaled / gradient - 1) < 1e-3

# %% [markdown]
# Where the factor is too large, a gradient becomes infinite. Then the scaler skips the step, and goes on with half the factor. In the log, `grad_norm`
# is `inf` or `nan` now and then, beside a usual loss. That is harmless. But the scaler must find fp32 gradients. If the adapter itself
# is fp16, it refuses:

# %%
weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([weight])
scaler.scale(1e-3 * weight.float().sum()).backward()
try:
    scaler.unscale_(optimizer)
except ValueError as error:
    print(error)

# %% claims
assert scaler.get_backoff_factor() == 0.5 and scaler.get_scale() == factor and weight.grad.isfinite().all()

# %% [markdown]
# TRL makes the adapter of a 4-bit model bf16, as QLoRA's authors had theirs. That worked there, and in section 4 as well: not every
# update is too small. Lesson 09's script makes it fp32 again, since a T4 needs that, and at rank {{16}} it costs little.
#
# A scaler cannot help in the *forward* pass. Some models write numbers there that are too large for fp16, as lesson 09's louder one
# did, and all at the first token. Why do they do that? Attention spreads a share of {{100}} % over the tokens, even where there is nothing to look for. Models
# have learned to look at the first token then, and the huge numbers mark it. They have to be huge because a norm follows, which divides
# by the token's size: beside them, hardly anything else of the token is left, so that it looks alike in every text.
#
# Such a model needs a newer card, or fp32 (`--dtype float32`). That takes more memory, and on a T4 eight times as long: its data sheet has
# {{8.1}} million million operations a second in fp32, and {{65}} in fp16.

# %% [markdown]
# ## Recap
#
# - A card holds torch's tensors, gaps between them, paged states, the driver's context, and what libraries load. Torch shows you the first two, `nvidia-smi` all of it.
# - 65B trains on {{48}} GB and, with adapters in bf16, on {{smallest["65B", "bf16-adapters"]}}. On cards of
#   just that size the optimizer's states have to travel.
# - Two totals that agree may count different things.
# - In fp16 a loss scaler keeps small gradients alive. Numbers that are too large in the forward pass need another format.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [11 · What did four bits cost?](11_accuracy_comparison.ipynb)
