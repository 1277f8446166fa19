"""One optimizer step, taken in one of four ways; the loop never asks in which.

contract.py     Step and StepResult: what the loop asks of a step
plain.py        autograd's forward and backward, then one update: fits every model
in_backward.py  each parameter is updated as soon as its gradient is there
sharded.py      plain, for a model of which each process holds a part
fast/           LLaMA and families built like it on a GPU, written out by hand
choice.py       which of them the settings ask for, and the model and the machine can do
"""
