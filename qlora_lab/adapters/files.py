"""Adapters in PEFT's file format: `PeftModel.from_pretrained` reads ours, `load_lora` reads PEFT's.

PEFT's format is a folder with two files:

    adapter_config.json         r, lora_alpha, lora_dropout, target_modules and PEFT's many other settings
    adapter_model.safetensors   base_model.model.<name of the layer>.lora_A.weight, and .lora_B.weight

PEFT does not record which weights an adapter was trained on. We add a fingerprint of them to the header of the
safetensors file, which PEFT ignores.

PiSSA's adapters fit the base that is left over when they begin: W - s B0 A0. Beside a dense one, PEFT's way is ours: an
adapter of twice the rank fits W itself, for

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]                         (Meng et al. 2024, arXiv 2404.02948, appendix)

Beside a base in 4 bits that is another model, since Q(W - s B0 A0) is not Q(W) - s B0 A0. So A0 and B0 are kept in a
third file, initial.safetensors, to make that base again. Such an adapter says "pissa" in its config, which PEFT refuses
to load beside 4-bit layers, and has the fingerprint of another base.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.lora import LoraLinear, add_lora, lora_layers, required_lora
from qlora_lab.adapters.targets import is_linear, is_named, widths
from qlora_lab.errors import UserError

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for DoRA's m
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
INITIAL = "initial.safetensors"
# PEFT's settings that do not change what A and B mean, or in a way that is understood here. Any other setting that is
# on does, or may: ranks of single layers, an initialization that changes the base ... Every release has new ones.
HARMLESS = {
    *"peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode".split(),
    *"r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern".split(),
    *"megatron_core qalora_group_size eva_config ensure_weight_tying fan_in_fan_out use_rslora".split(),
}
HARMLESS_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def save_lora(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter in PEFT's format. Each file is put in place by a rename: it is never there in part.

    Args:
        folder: where the two files go; created if it does not exist.

    Raises:
        UserError: a model without LoRA layers, or whose layers differ in kind, rank, alpha or dropout.
    """
    from safetensors.torch import save_file

    layers = required_lora(model)
    kinds = {
        (layer.rank, layer.alpha, layer.dropout, layer.rank_stabilized, isinstance(layer, DoraLinear))
        for layer in layers.values()
    }
    if len(kinds) > 1:
        raise UserError(
            "the LoRA layers have several (rank, alpha, dropout, whether rank-stabilized, whether DoRA): "
            f"{sorted(kinds)}; one file holds one"
        )
    ((rank, alpha, dropout, rank_stabilized, dora),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        **({"use_rslora": True} if rank_stabilized else {}),
        **({"use_dora": True} if dora else {}),
        "target_modules": _shortest_targets(model, list(layers)),
        "bias": "none",
        "inference_mode": True,
    }
    parts = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"} | ({"lora_magnitude": MAGNITUDE} if dora else {})
    tensors = {
        f"{PREFIX}{name}.{theirs}": getattr(layer, ours).detach().contiguous().cpu()
        for name, layer in layers.items()
        for ours, theirs in parts.items()
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "base_fingerprint": base_fingerprint(model)}
    save_file(tensors, folder / f"{WEIGHTS}.part", metadata)
    (folder / f"{CONFIG}.part").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in (WEIGHTS, CONFIG):
        (folder / f"{file}.part").replace(folder / file)


def load_lora(model: nn.Module, folder: str | os.PathLike, any_base: bool = False) -> nn.Module:
    """Read an adapter that `save_lora` or PEFT wrote.

    A model without LoRA layers gets them; existing ones are overwritten.

    Args:
        any_base: accept an adapter that was trained on other weights of the same shapes. (Only `save_lora` records
            the weights: with PEFT's own files, nothing but names and shapes can be compared.)

    Returns:
        the same model

    Raises:
        UserError: missing or damaged files, an adapter that is not plain LoRA, another base, a rank other than that of
            the model's layers, or a merged model.
    """
    config, tensors, fingerprint = read_adapter(folder, with_dora=True)
    names = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors))
    kind = DoraLinear if config.get("use_dora") else LoraLinear
    rank_stabilized = bool(config.get("use_rslora"))
    _require_same_base(model, names, tensors, None if any_base else fingerprint)
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise UserError("an adapter is merged into this model: unmerge(model) before another one is loaded")
    if layers and set(layers) != set(names):
        raise UserError(
            f"the adapter has {len(names)} layers, the model's adapter {len(layers)} others: unload(model) first"
        )
    ranks = {layer.rank for layer in layers.values()} - {config["r"]}
    if ranks:
        raise UserError(
            f"the adapter has rank {config['r']}, the model's LoRA layers {ranks.pop()}: unload(model) first"
        )
    if any(type(layer) is not kind for layer in layers.values()):
        raise UserError(f"the adapter needs {kind.__name__}s, and the model has other LoRA layers: unload(model) first")
    rank, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    if not layers:
        dtype = tensors[f"{names[0]}.lora_A"].dtype
        add_lora(model, rank, alpha, names, dropout, dtype=dtype, rank_stabilized=rank_stabilized, kind=kind)
    for name, layer in lora_layers(model).items():
        layer.alpha, layer.dropout, layer.rank_stabilized = alpha, dropout, rank_stabilized
        layer.lora_A.data.copy_(tensors[f"{name}.lora_A"])
        layer.lora_B.data.copy_(tensors[f"{name}.lora_B"])
        if isinstance(layer, DoraLinear):
            layer.lora_magnitude.data.copy_(tensors[f"{name}.{MAGNITUDE}"])
    return model


def base_fingerprint(model: nn.Module) -> str:
    """A hash that identifies a model's weights: hex sha256 of its norms and biases, rounded to bf16.

    Quantization leaves these as they are, so a 4-bit model and its 16-bit original have the same fingerprint. So have a
    model with adapters, ours or PEFT's, and the model without.
    """
    return fingerprint_of(model.named_parameters())


def fingerprint_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`base_fingerprint` of a model's parameters with their names, in the model's order. Matrices are passed over."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        if parameter.ndim == 1 and parameter.is_floating_point() and ".lora_" not in name:  # DoRA's are vectors, too
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".base.", ".")  # PEFT's, and ours
            digest.update(plain.encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def add_fingerprint(folder: str | os.PathLike, fingerprint: str) -> None:
    """Note the base's fingerprint in the header of weights that PEFT has written."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = pathlib.Path(folder) / WEIGHTS
    with safe_open(weights, "pt") as file:
        metadata = {**(file.metadata() or {}), "base_fingerprint": fingerprint}
    part = weights.with_name(f"{WEIGHTS}.part")
    save_file(load_file(weights), part, metadata)
    part.replace(weights)


def save_initial(folder: str | os.PathLike, initial: Mapping[str, torch.Tensor]) -> None:
    """Write what PiSSA's adapters began as; the file is never there in part. initial: from `begin_with_pissa`."""
    from safetensors.torch import save_file

    part = pathlib.Path(folder) / f"{INITIAL}.part"
    save_file(dict(initial), part)
    part.replace(part.with_name(INITIAL))


def read_initial(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What `save_initial` wrote into a folder; {} if nothing. Raises UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = pathlib.Path(folder) / INITIAL
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged, and without it the adapter has no base: {error}") from error


def left_over(fingerprint: str, initial: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of what is left of a base, from the base's own, when adapters have begun as a part of it."""
    digest = hashlib.sha256(fingerprint.encode())
    for name, matrix in sorted(initial.items()):
        digest.update(name.encode())
        digest.update(matrix.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def keep_beside_left_over(folder: str | os.PathLike, initial: Mapping[str, torch.Tensor], fingerprint: str) -> None:
    """Let PEFT's files of a PiSSA adapter say that it belongs beside what is left of a 4-bit base.

    Args:
        initial: from `begin_with_pissa`.
        fingerprint: of the base before that.
    """
    file = pathlib.Path(folder) / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "init_lora_weights": "pissa"}, indent=2), encoding="utf-8")
    save_initial(folder, initial)
    add_fingerprint(folder, left_over(fingerprint, initial))


def convert_to_plain(folder: str | os.PathLike, initial: Mapping[str, torch.Tensor]) -> None:
    """Make of PEFT's files of a PiSSA adapter beside a dense base those of one of twice the rank, beside the whole.

    Its scale is the same: alpha doubles, too, or with rsLoRA grows by the root of 2. DoRA's magnitudes stay.
    """
    from safetensors.torch import load_file, save_file

    folder = pathlib.Path(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    grown = {"r": 2 * config["r"], "lora_alpha": config["lora_alpha"] * (2**0.5 if config.get("use_rslora") else 2)}
    (folder / CONFIG).write_text(json.dumps({**config, **grown}, indent=2), encoding="utf-8")
    tensors = load_file(folder / WEIGHTS)
    for name, began in initial.items():
        key = f"{PREFIX}{name}.weight"
        is_b = name.endswith("_B")
        began = (-began if is_b else began).to(tensors[key])
        tensors[key] = torch.cat([tensors[key], began], dim=int(is_b))  # A is (rank, in), B is (out, rank)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def require_base(folder: str | os.PathLike, fingerprint: str) -> None:
    """Raise UserError if an adapter was trained beside another base. fingerprint: of the checkpoint's weights."""
    from safetensors import safe_open

    with safe_open(pathlib.Path(folder) / WEIGHTS, "pt") as file:
        noted = (file.metadata() or {}).get("base_fingerprint")
    initial = read_initial(folder)
    if noted is not None and noted != (left_over(fingerprint, initial) if initial else fingerprint):
        raise UserError(f"the adapter in {folder} was trained beside another base, or {INITIAL} is another adapter's")


def scale_of(config: dict) -> float:
    """By what B A is scaled, from PEFT's settings: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def read_adapter(
    folder: str | os.PathLike, with_dora: bool = False, with_pissa: bool = False
) -> tuple[dict, dict[str, torch.Tensor], str | None]:
    """Read an adapter's files, without a model.

    Args:
        with_dora: whether the caller knows what to do with DoRA's magnitudes.
        with_pissa: whether the caller takes what `read_initial` returns from the base.

    Returns:
        PEFT's settings; the tensors by "<layer>.lora_A", Tensor[rank, in], "<layer>.lora_B", Tensor[out, rank], and
        with DoRA "<layer>.lora_magnitude_vector", Tensor[out]; the base's fingerprint, None if the file has none

    Raises:
        UserError: missing or damaged files, or an adapter that is neither plain LoRA nor, if allowed, DoRA.
    """
    from safetensors import SafetensorError, safe_open

    folder = pathlib.Path(folder)
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no adapter: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rank, _ = config["r"], config["lora_alpha"]
        with safe_open(folder / WEIGHTS, "pt") as file:
            fingerprint = (file.metadata() or {}).get("base_fingerprint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {error!r}") from error
    special = [
        key
        for key, value in config.items()
        if value and key not in HARMLESS and value not in HARMLESS_VALUES.get(key, ())
    ]
    if (folder / INITIAL).is_file() and "init_lora_weights" in special:
        if not with_pissa:
            raise UserError(
                f"the adapter in {folder} is PiSSA's, and belongs beside what it left of its 4-bit base: load_adapter "
                "loads it, and python -m qlora_lab.export merges it"
            )
        special.remove("init_lora_weights")
    dora = with_dora and bool(config.get("use_dora"))
    if dora:
        special.remove("use_dora")
    endings = (".lora_A", ".lora_B", f".{MAGNITUDE}") if dora else (".lora_A", ".lora_B")
    plain = {name: name.removeprefix(PREFIX).removesuffix(".weight") for name in tensors}
    others = [name for name, short in plain.items() if not short.endswith(endings)]
    if special or others or config.get("peft_type") != "LORA":
        what = (special or others or [config.get("peft_type")])[0]
        raise UserError(f"the adapter in {folder} is not plain LoRA ({what}): load it with PEFT")
    tensors = {plain[name]: tensor for name, tensor in tensors.items()}
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    lonely = [f"{name}{ending}" for name in layers for ending in endings if f"{name}{ending}" not in tensors]
    if lonely or not tensors:
        what = f"{lonely[0] if lonely else 'every tensor'} is missing"
        raise UserError(f"the adapter in {folder} does not agree with its own config: {what}")
    if wrong := [name for name in tensors if not _fits(name, tensors, rank)]:
        raise UserError(f"the adapter in {folder} does not agree with its own config: {wrong[0]} does not fit r={rank}")
    return config, tensors, fingerprint


def _fits(name: str, tensors: dict[str, torch.Tensor], rank: int) -> bool:
    """Whether a tensor's shape agrees with the rank and with the layer's other tensors."""
    tensor = tensors[name]
    if name.endswith(MAGNITUDE):
        return tensor.shape == tensors[name.removesuffix(MAGNITUDE) + "lora_B"].shape[:1]
    return tensor.ndim == 2 and tensor.shape[name.endswith("_B")] == rank


def _require_same_base(model: nn.Module, names: list[str], tensors: dict, fingerprint: str | None) -> None:
    """Raise UserError unless the model has these layers, in these sizes, and the fingerprint if one is given."""
    modules = dict(model.named_modules())
    for name in names:
        expected = len(tensors[f"{name}.lora_B"]), tensors[f"{name}.lora_A"].shape[1]  # (out, in)
        if name not in modules or not is_linear(modules[name]):
            raise UserError(f"the adapter is for another base: this model has no linear layer {name}")
        size = widths(modules[name])[::-1]
        if size != expected:
            raise UserError(f"the adapter is for another base: its {name} is {expected}, this model's is {size}")
    if fingerprint is not None and fingerprint != base_fingerprint(model):
        raise UserError(
            "the adapter was trained on another base: shapes agree, weights do not; any_base=True loads it all the same"
        )


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names, as is usual with PEFT, if they match the same layers; else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    matched = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, LoraLinear) or is_linear(module)) and any(is_named(name, end) for end in ends)
    }
    return ends if matched == set(names) else names
