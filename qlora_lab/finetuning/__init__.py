"""Fine-tuning on one page: the names that lessons and users import, gathered from the packages that define them.

    models/ load or build a model · adapters/ add trainable weights · training/ train them · evaluation/ measure

Importing this page imports torch; transformers, peft, bitsandbytes, datasets and accelerate follow when first needed.
"""

from qlora_lab.adapters.files import load_lora, save_lora
from qlora_lab.adapters.lora import LoraLinear, add_lora, lora_layers, lora_parameters
from qlora_lab.adapters.merging import merge, unload, unmerge
from qlora_lab.adapters.peft_adapter import add_adapter, load_adapter, trainable_parameters
from qlora_lab.adapters.quantized_linear import (
    QuantizedLinear,
    dequantize_linears,
    from_bitsandbytes,
    nf4_double,
    quantize_linears,
)
from qlora_lab.evaluation.answers import exact_match, generate, is_exact
from qlora_lab.evaluation.losses import Loss, text_loss
from qlora_lab.models.bundled import fetch
from qlora_lab.models.compatibility import Preflight, preflight
from qlora_lab.models.embeddings import embeddings_to_cpu, embeddings_to_device
from qlora_lab.models.loading import load_model
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.batches import Batches, collate
from qlora_lab.training.chat import TokenizedSample, tokenize
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.loop import TrainingDiverged, train, train_steps
from qlora_lab.training.presets import PRESETS, Preset
from qlora_lab.training.step_records import StepRecord

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
    "load_adapter",
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
