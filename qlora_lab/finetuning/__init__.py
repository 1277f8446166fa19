"""Models that learn: load or build one, feed it, train it, judge it.

Importing this room imports torch; transformers, peft, bitsandbytes, datasets and accelerate come when they are needed.
"""

import warnings

from qlora_lab.finetuning.data import Batches, TokenizedSample, collate, load_prose, load_samples, tokenize
from qlora_lab.finetuning.evaluate import Loss, exact_match, generate, is_exact, text_loss
from qlora_lab.finetuning.models import (
    add_adapter,
    build_random,
    embeddings_to_cpu,
    fetch,
    load_model,
    trainable_parameters,
)
from qlora_lab.finetuning.preflight import Preflight, preflight
from qlora_lab.finetuning.presets import PRESETS, Preset
from qlora_lab.finetuning.train import StepRecord, TrainingDiverged, train, train_steps

__all__ = [
    "PRESETS",
    "Batches",
    "Loss",
    "Preflight",
    "Preset",
    "StepRecord",
    "TokenizedSample",
    "TrainingDiverged",
    "add_adapter",
    "build_random",
    "collate",
    "embeddings_to_cpu",
    "exact_match",
    "fetch",
    "generate",
    "is_exact",
    "load_model",
    "load_prose",
    "load_samples",
    "preflight",
    "text_loss",
    "tokenize",
    "train",
    "train_steps",
    "trainable_parameters",
]

# `python -m qlora_lab.finetuning.preflight` would remark that this package has imported that module already
warnings.filterwarnings("ignore", "'qlora_lab.finetuning.preflight' found in sys.modules", RuntimeWarning)
