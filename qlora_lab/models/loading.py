"""Load a causal language model: 16/32-bit, or quantized by bitsandbytes while it is loaded.

No code that comes with a model is run: no remote code, no pickled weights.

`transformers` and `bitsandbytes` take seconds to import, so the functions that need them import them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pathlib
import pickle
import re
from typing import Any

import torch

from qlora_lab.errors import UserError
from qlora_lab.models.bundled import CATALOGUE, DEFAULT_MODEL, fetch, say
from qlora_lab.models.faults import require_right_scales, use_differentiable_kernels
from qlora_lab.models.hardware import pick_compute_dtype, pick_device, require_4bit_kernels
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.models.tokens import prepare_tokenizer


def load_model(
    name: str | os.PathLike = DEFAULT_MODEL,
    quantization: str | None = None,
    double_quant: bool = True,
    device: str | torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
):
    """Load a causal language model and its tokenizer.

    Args:
        name: a bundled model (fetched on first use), a folder with a checkpoint, or the id of a model on the hub.
        quantization: None for 16/32-bit weights in `compute_dtype`; "nf4" or "fp4" for bitsandbytes' 4-bit linears
            with blocks of 64, and the same for the fused experts of a mixture (`FourBitExperts`). Embeddings, norms,
            routers and the output head stay in `compute_dtype`.
        double_quant: quantize the blocks' scales too (4.127 instead of 4.5 bits per parameter).
        device: default `pick_device()`. The whole model goes there: nothing is split or offloaded behind your back.
        compute_dtype: default `pick_compute_dtype(device)`.

    A checkpoint that bitsandbytes quantized to 4 bits is loaded as it is, whatever `quantization` says.

    Returns:
        model (in eval mode), tokenizer

    Raises:
        UserError: no such model, a damaged or incomplete checkpoint, one that needs code of its own or has no
            safetensors weights, no 4-bit kernel for the device, or one that reads wrong scales; a checkpoint that is
            quantized in another way; a tokenizer without an end token, or whose padding the model has no row for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device) if device is not None else pick_device()
    compute_dtype = compute_dtype or pick_compute_dtype(device)
    if quantization not in (None, "nf4", "fp4"):
        raise UserError(f"quantization is {quantization!r}: choose None, 'nf4' or 'fp4'")
    source = locate(str(name))
    options = {}
    try:
        with quiet_transformers():
            already = quantized_by(AutoConfig.from_pretrained(source, trust_remote_code=False))
            if already not in ("", FOUR_BITS):
                raise UserError(f"cannot load {str(name)!r}: it {is_quantized_already(already)}")
            if quantization or already:
                require_4bit_kernels(device)
            if quantization and not already:
                from qlora_lab.models.experts_loading import as_bitsandbytes, including_experts

                settings = bnb_config(quantization, double_quant, compute_dtype)
                options["quantization_config"] = including_experts(settings)
            pair: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=compute_dtype,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model, loaded = pair
            if options:
                as_bitsandbytes(model)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # from a missing file, the network, safetensors, an unknown architecture ...
        raise UserError(f"cannot load {str(name)!r}: {why(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"cannot load {str(name)!r}: its checkpoint lacks {len(missing)} weights of a {type(model).__name__} "
            f"({missing[0]} is the first), which would be random numbers: is it a complete checkpoint of that model?"
        )
    if getattr(model.config, "auto_map", None):
        ours = type(model).__name__
        say(f"note: {name} comes with Python code of its own, which is not run: this is transformers' {ours}")
    if quantization or already:
        use_differentiable_kernels(model)
        require_right_scales(model)
    if already:
        _compute_in(model, compute_dtype)
    prepare_tokenizer(tokenizer, model)
    return model.eval(), tokenizer


def load_tokenizer(name: str | os.PathLike = DEFAULT_MODEL):
    """A model's tokenizer without the model. name: as in `load_model`.

    Raises:
        UserError: no such model, or its tokenizer is missing or damaged.
    """
    from transformers import AutoTokenizer

    source = locate(str(name))
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # from a missing file, the network, JSON ...
        raise UserError(f"cannot load the tokenizer of {str(name)!r}: {why(error)}") from error


FOUR_BITS = "bitsandbytes, 4 bits"


def quantized_by(config) -> str:
    """How a checkpoint with this config is quantized: "" if it is not, `FOUR_BITS`, "gptq" ..."""
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method", "")).rpartition(".")[2].lower()
    if method.startswith("bitsandbytes"):
        return FOUR_BITS if settings.get("load_in_4bit") else "bitsandbytes, 8 bits"
    return method


def is_quantized_already(method: str) -> str:
    """The rest of the sentence about a checkpoint in other bits than QLoRA's."""
    return f"is quantized already ({method}): QLoRA starts from the 16-bit checkpoint"


def _compute_in(model, dtype: torch.dtype) -> None:
    """Have 4-bit layers compute in this dtype instead of the one that was written into their checkpoint."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def bnb_config(quantization: str, double_quant: bool, compute_dtype: torch.dtype, storage: torch.dtype = torch.uint8):
    """The `BitsAndBytesConfig` of QLoRA. The class has other defaults: fp4, fp32 compute, no double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )


def locate(name: str) -> str:
    """The folder or hub id from which transformers loads a model; a bundled one is fetched first.

    Raises:
        UserError: no such model or folder, or a folder that wants to run code of its own.
    """
    if name in CATALOGUE:
        return str(fetch(name))
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{name} is no model: the folder has no config.json")
        _require_no_code(pathlib.Path(name))
        return name
    if "/" not in name:
        near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled: {', '.join(CATALOGUE)}"
        raise UserError(f"unknown model {name!r}: {hint} (a hub model is named owner/name, a folder must exist)")
    if name.startswith((".", "/", "~")):
        raise UserError(f"no such folder: {name}")
    return name


def _require_no_code(folder: pathlib.Path) -> None:
    """Raise UserError if the folder's config or tokenizer names Python code in the folder.

    transformers would not run it, since we never allow that, and would use its own class if it has one. But the folder
    was made for the code: without it, another model may be loaded.
    """
    for file in ("config.json", "tokenizer_config.json"):
        named = "null"
        with contextlib.suppress(OSError, ValueError):  # loading the folder will report what is wrong with the file
            named = json.dumps(json.loads((folder / file).read_text(encoding="utf-8")).get("auto_map"))
        modules = sorted({f"{name}.py" for name in re.findall(r"(\w+)\.\w+", named)})
        if there := [module for module in modules if (folder / module).is_file()]:
            raise UserError(
                f"cannot load {str(folder)!r}: it wants to run Python code of its own ({there[0]}, named by auto_map "
                f"in {file}), and this package runs no model's code: where transformers has the architecture itself, "
                f"take auto_map out of {file} to load it as that"
            )


def why(error: Exception) -> str:
    """What a library's error means to the user, in one sentence. (transformers would advise to trust remote code.)"""
    if "trust_remote_code" in str(error):
        return (
            "it wants to run Python code of its own (auto_map in its config or tokenizer), and this package runs no "
            "model's code: choose a model whose architecture transformers has itself"
        )
    if isinstance(error, pickle.UnpicklingError) or "file named model.safetensors" in str(error):
        return (
            "it has no weights in model.safetensors, and pickled ones (pytorch_model.bin) are not read, since pickles "
            "can run code: where you trust them, convert them once with transformers' from_pretrained and "
            "save_pretrained"
        )
    return first_sentence(error)


def first_sentence(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__
