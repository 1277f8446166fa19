"""Everything that writes data/records/: `python -m qlora_lab.experiments NAME` measures something and writes it down.

record.py              a file of measurements: on what, with what, when; written in one step, gone on with
gpu.py                 the GPU that is measured

The bundled model learns the course's orders, in several ways and at several seeds (orders.py):
accuracy.py            accuracy: what do few bits cost?
amounts.py             amounts: how many examples, and what is forgotten
splits.py              splits: does a random split promise too much?
tickets.py             a shop's tickets, which it learns there and in the lesson on your data
merge_aware.py         merge-aware: does an adapter survive a merge into 4 bits?
knobs.py               knobs: what does each setting buy, alone?
presets_compared.py    presets: does a recipe buy memory with bad training?

Which 4 bits:
codebooks.py           codebooks: the errors of formats at equal bits, and what they do to a model's loss
sensitivity.py         sensitivity: which layers suffer from 4 bits, and plans that keep some in more
rounded_twice.py       rounded-twice: why weights that were rounded to NF4 and then to Q4_0 are so bad

QLoRA beside what came after it, on two tasks:
methods.py             methods: is QLoRA still what one should use?
methods_known.py       the methods, and the models that they train
methods_runs.py        a learning rate is chosen, a method is trained and judged
methods_grid.py        ranks, amounts of data, batch sizes
methods_compared.py    each method beside QLoRA, and how sure that is
stacked.py             several runs beside one base, in one forward and backward pass

Memory of training steps at LLaMA's shapes:
memory_runs.py         memory: the grid, cards of few GB, peaks taken apart
memory_settings.py     which steps these are, and what each should need
memory_steps.py        one of them, measured phase by phase
paged_memory.py        managed memory, counted and used again
allocator_history.py   what was alive when the most was
memory_comparison.py   what was recorded beside what is predicted
mixtures.py            mixtures: experts in 4 bits, what is predicted and what is measured
kept_activations.py    kept: what a forward pass leaves for its backward pass, by the byte

Speed:
step_speed.py          step: a training step, ours and what others use
families.py            families: the fast step's losses and speeds on other models than LLaMA
step_ways.py           the ways that differ in `train_steps`' arguments, and the plainest loop
step_profile.py        one step, kernel by kernel
sft_trainer.py         through TRL's SFTTrainer
unsloth_process.py     through Unsloth: the process that it gets
unsloth_speed.py       and what runs in it
kernel_speed.py        kernels: beside the bandwidth of a copy
quantization_speed.py  quantization: beside bitsandbytes and a copy, on a CPU too
several_cards.py       cards: one model on several GPUs
card_roofline.py       roofline: what a step takes at least on a card, on paper
side_by_side.py        side-by-side: two trainings on the same cores
"""
