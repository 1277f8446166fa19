"""Small trained matrices beside frozen layers.

lora.py              LoRA around any linear layer. It knows nothing of quantization: that is the lesson
dora.py              DoRA: the same, and the lengths of the weight's rows apart
initialization.py    PiSSA and LoftQ: other beginnings for A and B
targets.py           which layers a name selects
merging.py           adds a correction to its base's weight, takes it back, removes the LoRA layers
files.py             PEFT's file format, both ways
quantized_linear.py  the frozen linear layer in 4 bits; replaces a model's, or takes over bitsandbytes'
merge_aware.py       LoRA that learns under the rounding of a merge into 4 bits
as_one.py            a frozen layer and PEFT's adapter beside it as one operation, on a CPU
peft_adapter.py      PEFT's own adapters, which `train_qlora` trains
"""
