"""Models without memory, on torch's meta device: what the libraries would do to the real one, done to its shapes."""

from __future__ import annotations

import warnings

import torch

from qlora_lab.errors import UserError
from qlora_lab.models.experts import split_targets
from qlora_lab.models.loading import bnb_config, first_sentence
from qlora_lab.models.parts import excluded_modules


def build_on_meta(config, dtype: torch.dtype, buffers: bool = False):
    """The model of a config, on the meta device: shapes and dtypes, no memory. buffers: compute them, on the CPU."""
    from accelerate import init_empty_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as `from_pretrained` does; single modules may still choose another
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = _construct(config)
        model.tie_weights()
    except UserError:
        raise
    except Exception as error:
        kind = type(config).__name__
        raise UserError(f"transformers cannot build a model of this {kind}: {first_sentence(error)}") from error
    finally:
        torch.set_default_dtype(default)
    return model


def _construct(config):
    """A model of the class that the config names, else of the first auto class that knows such configs."""
    import transformers

    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)  # an untrusted config may name anything here
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(config)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
        auto_class = getattr(transformers, auto)
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config(config)
    named = f"names {', '.join(config.architectures)}" if config.architectures else f"is a {type(config).__name__}"
    raise UserError(f"transformers {transformers.__version__} has no model for this config, which {named}")


def quantize_on_meta(model, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
    """Let transformers replace the model's linears by `Linear4bit`, as it does before it loads weights into them.

    storage: the dtype that the packed codes will have. The bits are the same.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = bnb_config("nf4", True, dtype, storage)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # for the biases of the new layers
    try:
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=None)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # `from_pretrained` sets it once the weights are loaded; PEFT looks at it


def adapt_on_meta(model, targets: str | list[str] = "all-linear") -> tuple[tuple[str, ...], str]:
    """Let PEFT adapt the model; return `Preflight.targets`, and why there are none ("" if there are)."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    from qlora_lab.models.experts_lora import register

    of_experts = []
    if not isinstance(targets, str):
        targets, of_experts = split_targets(model, targets)
    excluded = excluded_modules(model)
    config = LoraConfig(r=1, target_modules=targets, target_parameters=of_experts or None, exclude_modules=excluded)
    register(config)
    try:
        with warnings.catch_warnings():  # PEFT warns of settings that it makes itself
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError as error:
        return (), first_sentence(error)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return tuple(_adapted(name, getattr(module, "parameter_name", None)) for name, module in layers), ""


def _adapted(name: str, parameter: str | None) -> str:
    """The dotted name of what a PEFT layer adapts: a module, or a bare parameter. (Two on one module are nested.)"""
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"
