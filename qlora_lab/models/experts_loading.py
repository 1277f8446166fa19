"""transformers' 4-bit loading, which takes the experts of mixtures as well.

`from_pretrained` asks a *quantizer* which parameters it wants and gives it each of them, renamed and stacked as the
model has it, whatever the checkpoint's names were. bitsandbytes' own wants the linear layers. This one is the same, and
wants the fused experts too: a layer's are stacked in the host's memory, and go to the device one by one.
"""

from __future__ import annotations

import contextlib

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from qlora_lab.models.experts import FourBitExperts, four_bit_experts, fused_parameters, replace_experts

NAME = "bitsandbytes_4bit_with_experts"


class _Quantize(Bnb4bitQuantize):
    """What is done with each parameter that `_Quantizer` wants."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        """Return tensors for the model by name: here, several for a fused parameter."""
        result, others = {}, {}
        for name, value in input_dict.items():
            module, parameter = get_module_from_name(model, name)
            if isinstance(module, FourBitExperts):
                weights = value[0] if isinstance(value, list) else value
                parts = module.parts_of(parameter, weights, self.hf_quantizer.device)
                prefix = name.removesuffix(parameter)
                result.update({prefix + part: values for part, values in parts.items()})
            else:
                others[name] = value
        return {**result, **super().convert(others, full_layer_name=full_layer_name, model=model, **kwargs)}


class _Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, extended to fused experts."""

    device: torch.device
    fused: list[str]  # dotted names of the parameters that the fused experts have

    def _process_model_before_weight_loading(self, model, device_map, **kwargs):
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        settings = self.quantization_config
        replace_experts(
            model, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype
        )
        self.device, self.fused = torch.device(device_map[""]), fused_parameters(model)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, FourBitExperts):
            return name in module.fused
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions, *model):
        """Let what becomes a fused parameter be stacked on the CPU: on a GPU it would be there three times."""
        updated = super().update_weight_conversions(weight_conversions, *model)
        for converter in updated:
            if isinstance(converter, WeightConverter) and hasattr(converter, "force_cpu"):
                ends = tuple("." + pattern.removeprefix(".") for pattern in converter.target_patterns)
                converter.force_cpu |= any(f".{name}".endswith(ends) for name in self.fused)
        return updated

    def is_serializable(self):
        return not self.fused and super().is_serializable()  # nothing would read them

    def _dequantize(self, model, dtype=None):
        model = super()._dequantize(model, dtype)
        for name, experts in four_bit_experts(model).items():
            model.set_submodule(name, experts.dequantize(dtype))
        return model


def including_experts(settings):
    """The same `BitsAndBytesConfig`, for a `from_pretrained` that quantizes fused experts, too."""
    with contextlib.suppress(ValueError):  # registered already
        register_quantizer(NAME)(_Quantizer)
    settings.quant_method = NAME
    return settings


def as_bitsandbytes(model) -> None:
    """Tell transformers and PEFT that a model that was loaded so is one of bitsandbytes', which is what they know."""
    model.config.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
    for module in model.modules():
        if getattr(module, "quantization_method", None) == NAME:
            module.quantization_method = QuantizationMethod.BITS_AND_BYTES
