"""Models: fetch, load or build one, and know beforehand what will go wrong.

    bundled.py         models that pip can fetch, made into checkpoints in the user's cache
    loading.py         any model of a folder or the hub, in 4 bits if wanted; none of its code runs
    experts.py         the experts of a mixture in 4 bits, dequantized one at a time
    experts_loading.py and loaded so from a checkpoint, layer by layer
    experts_lora.py    and adapted: PEFT's layer for them
    random_weights.py  a LLaMA of any shape, or another decoder, built on the device matrix by matrix
    sharded.py         a model spread over several processes, read and quantized layer by layer
    embeddings.py      input embeddings in the host's memory instead of the GPU's
    hardware.py        which device, which dtype to compute in, whether there are 4-bit kernels
    skeletons.py       models without memory: shapes, and what the libraries do to them
    compatibility.py   what 4 bits would quantize in a model, and what not, from its config alone
    budget.py          which layers to keep in 16 bits, when there is room for some
    trying.py          whether it trains, packs, chunks, how long it reads: tried on a tiny copy with random weights
    tiny.py            that copy
    rows.py            attention for rows that begin with the same tokens, which are computed once
    parts.py           which part of a model reads text
    tokens.py          does a tokenizer fit its model?
    faults.py          faults of other libraries, and how we avoid them
    quiet.py           transformers without its progress bars and advice

`python -m qlora_lab.models fetch` and `... preflight NAME` are its commands.
"""
