"""The fast step: a LLaMA's forward and backward pass and its update, written out by hand, in one CUDA graph.

step.py         start here: a layer's picture, forward and backward line by line, the graph
linear.py       layers that read the same input, and their adapters, as one matrix with a border
adapters.py     all adapters, gradients and AdamW's states in flat tensors
batch.py        samples end to end in one row of tokens
attention.py    causal attention within each sample
host_memory.py  layers' inputs in the host's memory while they wait
kernels.py      Triton: norm, rotary, SwiGLU, loss, border, AdamW
reading.py      a model's linear layers and adapters, whoever made them
limits.py       what it cannot train, said before anything has changed
"""
