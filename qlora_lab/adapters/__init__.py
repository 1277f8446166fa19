"""Small trained matrices beside frozen layers.

lora.py              LoRA around any linear layer. It knows nothing of quantization: that is the lesson
targets.py           which layers a name means
merging.py           add a correction to its base's weight, take it back, take the LoRA layers out
files.py             PEFT's file format, both ways
quantized_linear.py  the frozen linear in 4 bits; replace a model's, take over bitsandbytes'
peft_adapter.py      PEFT's own adapters, which `train_qlora` trains
"""
