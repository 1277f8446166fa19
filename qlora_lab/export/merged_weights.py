"""The weights of a trained model, one at a time.

An adapter was trained beside *rounded* weights, so it is added to the rounded ones (`adapters/quantized_linear.py`):

    weight = dequantize(nf4(weight of the checkpoint)) + alpha / rank * B A

That is the model that was trained, and what a file should hold. Q4_0 rounds once more, and two roundings cost more
than one: it gets the checkpoint's own weights and the adapter (`rounded=False`), see `TrainedRun.rounded_for`.
docs/export.md has the measurements.

(rsLoRA scales by alpha / sqrt(rank); DoRA then gives each row the length that it has learned, see adapters/dora.py.
PiSSA's adapter began as a part of the checkpoint's weight, and what is rounded is the weight without that part.)

Nothing is loaded as a model. A tensor is read from the checkpoint when it is asked for, rounded as bitsandbytes did
when the model was loaded for training, and forgotten. So a 7B model needs the memory of a few of its matrices.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from qlora_lab.adapters.files import MAGNITUDE, fingerprint_of, left_over, read_adapter, read_initial, scale_of
from qlora_lab.adapters.initialization import without
from qlora_lab.adapters.quantized_linear import frozen_weight
from qlora_lab.errors import UserError
from qlora_lab.export.trained_run import TrainedRun
from qlora_lab.models.compatibility import build_on_meta, quantize_on_meta, read_config
from qlora_lab.models.experts import FourBitExperts, replace_experts
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.models.random_weights import linear_4bit


class MergedWeights:
    """The tensors of a run's model with its adapter merged, by the names that its checkpoint has.

    Args:
        run: the base's folder, its dtype, whether it was quantized; and the adapter.
        with_adapter: or else the base alone.
        rounded: with the base rounded to 4 bits as it was in training, if it was; or else as its checkpoint has it.

    Attributes:
        config: transformers' config of the base.
        dora: whether the adapter is DoRA's.
        shapes: by name, in the model's order. A head that is tied to the embeddings is not among them.
        adapted: names of the weights that the adapter changes.

    Raises:
        UserError: a checkpoint that is incomplete, damaged, already quantized or stored under other names than
            transformers' model has; an adapter other than LoRA, rsLoRA, DoRA, or of another base; adapted embeddings.
    """

    config: Any

    def __init__(self, run: TrainedRun, with_adapter: bool = True, rounded: bool = True):
        self.run = run
        self.config = read_config(run.base)
        if getattr(self.config, "quantization_config", None):
            raise UserError(f"the base {run.model} is stored quantized: export needs its 16-bit checkpoint")
        self._adapter, self._scale, self.dora, fingerprint = {}, 0.0, False, None
        self._initial = read_initial(run.adapter)
        if with_adapter or self._initial:
            settings, adapter, fingerprint = read_adapter(run.adapter, with_dora=True, with_pissa=True)
            self._adapter = adapter if with_adapter else {}
            self._scale, self.dora = scale_of(settings), bool(settings.get("use_dora"))
        self.adapted = {f"{name.rpartition('.lora_')[0]}.weight" for name in self._adapter}
        self._files = checkpoint_index(run.base)
        with quiet_transformers():
            skeleton = build_on_meta(self.config, run.dtype)
            self.shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
            self._quantized: set[str] = set()
            self._experts: dict[str, FourBitExperts] = {}
            if run.quantized and rounded:
                quantize_on_meta(skeleton, run.dtype)
                self._quantized = _in_4_bits(skeleton)
                for name, module in replace_experts(skeleton, dtype=run.dtype).items():
                    self._experts.update({f"{name}.{fused}": module for fused in module.fused})
        if missing := [name for name in self.shapes if name not in self._files]:
            raise UserError(
                f"the checkpoint of {run.model} lacks {len(missing)} of the model's weights or has other names for "
                f"them ({missing[0]} is the first): it cannot be exported"
            )
        self._require_same_base(fingerprint)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU: float32 where the adapter changes it, else the run's dtype. So it is rounded once."""
        weight = self._read(name)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in self._initial:
            weight = without(weight, self._initial[f"{layer}.lora_A"], self._initial[f"{layer}.lora_B"], self._scale)
        if name in self._quantized:
            linear = linear_4bit(weight, "nf4", True, self.run.dtype)
            weight = frozen_weight(linear).dequantize()
        if name in self._experts:
            weight = self._experts[name].rounded(weight)
        if name not in self.adapted:
            return weight
        a, b = self._adapter[f"{layer}.lora_A"], self._adapter[f"{layer}.lora_B"]
        merged = (self._scale * (b.float() @ a.float())).add_(weight)  # as `merge` adds them, bit for bit
        if self.dora:
            length = torch.linalg.vector_norm(merged, dim=1)
            merged *= (self._adapter[f"{layer}.{MAGNITUDE}"].float() / length)[:, None]
        return merged

    def matrices(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The adapter alone: (name of the weight, A: Tensor[rank, in], B: Tensor[out, rank]), in the model's order."""
        for name in self.shapes:
            layer = name.removesuffix(".weight")
            if name in self.adapted:
                yield name, self._adapter[f"{layer}.lora_A"], self._adapter[f"{layer}.lora_B"]

    @property
    def alpha_over_rank(self) -> float:
        return self._scale

    def _read(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._files[name], "pt") as file:
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} from {self._files[name].name}: {error}") from error
        if tuple(tensor.shape) != self.shapes[name]:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint of {self.run.model}, and the config says "
                f"{self.shapes[name]}: they do not belong together"
            )
        return tensor.to(self.run.dtype)

    def _require_same_base(self, fingerprint: str | None) -> None:
        embeddings = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        if tied := self.adapted & embeddings:
            raise UserError(
                f"the adapter changes {tied.pop()}: merged, it would change embeddings and head alike; only adapters "
                "of other layers can be exported"
            )
        for name in sorted(self.adapted):
            layer = name.removesuffix(".weight")
            size = len(self._adapter[f"{layer}.lora_B"]), self._adapter[f"{layer}.lora_A"].shape[1]
            if self.shapes.get(name) != size:
                there = self.shapes.get(name, "no such layer")
                raise UserError(f"the adapter is for another base: its {layer} is {size}, {self.run.model} has {there}")
        vectors = ((name, self._read(name)) for name, shape in self.shapes.items() if len(shape) == 1)
        now = fingerprint_of(vectors)
        if fingerprint is not None and fingerprint != (left_over(now, self._initial) if self._initial else now):
            raise UserError(
                f"the adapter was trained on another base than {self.run.model} is now: shapes agree, weights do not; "
                "export it with the weights that it was trained on"
            )


def checkpoint_index(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """By the name of a tensor, the safetensors file that holds it.

    Raises:
        UserError: no safetensors weights, or a file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = {}
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / pathlib.PurePath(name).name for name in sorted(set(names.values()))]
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"the base's weights cannot be read: {file} is missing or damaged ({error})") from error
    if not found:
        raise UserError(f"{folder} has no weights in safetensors files")
    return found


def _in_4_bits(skeleton) -> set[str]:
    """Names of the weights that bitsandbytes holds in 4 bits."""
    from bitsandbytes.nn.modules import Linear4bit

    return {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Linear4bit)}
