"""The fast step: a decoder's forward and backward pass and its update, written out by hand, in one CUDA graph.

step.py         start here: what makes it fast, the graph, the loss
layer.py        a layer's picture, forward and backward line by line
linear.py       layers that read the same input, and their adapters, as one matrix with a border
adapters.py     all adapters, gradients and AdamW's states in flat tensors
loss_scale.py   the scale of fp16's loss
batch.py        samples end to end in one row of tokens
attention.py    causal attention within each sample
host_memory.py  layers' inputs in the host's memory while they wait
kernels.py      Triton: norm, SwiGLU, loss, AdamW
adapter_kernels.py  Triton: border, dropout
head_kernels.py  Triton: rotary, norms of q and k
rows.py         what both have in common
description.py  what a model is made of, as far as the step needs to know
families.py     which families it knows: LLaMA, Mistral, Qwen, Phi, Gemma, ...
reading.py      the description of a model, its linear layers and adapters, whoever made them
limits.py       what it cannot train, said before anything has changed
"""
