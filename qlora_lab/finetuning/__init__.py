"""Models that learn: load or build one, feed it, train it, judge it.

Importing this room imports torch; transformers, peft, bitsandbytes, datasets and accelerate come when they are needed.
"""

import warnings

from qlora_lab.finetuning.data import Batches, TokenizedSample, collate, load_prose, load_samples, tokenize
from qlora_lab.finetuning.evaluate import Loss, exact_match, generate, is_exact, text_loss
from qlora_lab.finetuning.lora import (
    LoraLinear,
    add_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    merge,
    save_lora,
    unload,
    unmerge,
)
from qlora_lab.finetuning.models import (
    add_adapter,
    build_random,
    embeddings_to_cpu,
    embeddings_to_device,
    fetch,
    load_model,
    trainable_parameters,
)
from qlora_lab.finetuning.preflight import Preflight, preflight
from qlora_lab.finetuning.presets import PRESETS, Preset
from qlora_lab.finetuning.quantized_linear import (
    QuantizedLinear,
    dequantize_linears,
    from_bitsandbytes,
    nf4_double,
    quantize_linears,
)
from qlora_lab.finetuning.train import StepRecord, TrainingDiverged, train, train_steps

__all__ = [
    "PRESETS",
    "Batches",
    "LoraLinear",
    "Loss",
    "Preflight",
    "Preset",
    "QuantizedLinear",
    "StepRecord",
    "TokenizedSample",
    "TrainingDiverged",
    "add_adapter",
    "add_lora",
    "build_random",
    "collate",
    "dequantize_linears",
    "embeddings_to_cpu",
    "embeddings_to_device",
    "exact_match",
    "fetch",
    "from_bitsandbytes",
    "generate",
    "is_exact",
    "load_lora",
    "load_model",
    "load_prose",
    "load_samples",
    "lora_layers",
    "lora_parameters",
    "merge",
    "nf4_double",
    "preflight",
    "quantize_linears",
    "save_lora",
    "text_loss",
    "tokenize",
    "train",
    "train_steps",
    "trainable_parameters",
    "unload",
    "unmerge",
]

# `python -m qlora_lab.finetuning.preflight` would remark that this package has imported that module already
warnings.filterwarnings("ignore", "'qlora_lab.finetuning.preflight' found in sys.modules", RuntimeWarning)
