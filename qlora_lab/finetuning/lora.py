"""LoRA: train a small correction beside each frozen linear layer.

    y = base(x) + alpha / rank * (x Aᵀ) Bᵀ        x: (..., in)   A: (rank, in)   B: (out, rank)   y: (..., out)

A starts random and B at zero, so an adapted model first computes exactly what it computed before. Only A and B are
trained: rank * (in + out) numbers instead of in * out. (Hu et al. 2021, arXiv 2106.09685, section 4.1.)

    add_lora(model)               freeze the model, put a LoraLinear around its linear layers, in place
    merge, unmerge                add the correction to the base's weight; take it back, exactly
    unload                        put the base layers back in the LoraLinears' place
    save_lora, load_lora          PEFT's files: `PeftModel.from_pretrained` reads ours, `load_lora` reads PEFT's

The base may be any module with `in_features`, `out_features` and `weight`: nothing here asks what the weight is. QLoRA
is LoRA on a base that happens to be 4-bit. Only `merge` needs a weight that something can be added to.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import pathlib

import torch
from torch import nn

from qlora_lab.errors import UserError


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank correction.

    Args:
        base: a module that maps (..., in_features) to (..., out_features).
        rank: r, the inner dimension of the correction.
        alpha: the correction is scaled by alpha / rank.
        dropout: share of the correction's input that is set to zero while training.
        dtype: of A and B, and so of their gradients and the optimizer's states.
        generator: of A's random numbers, on the base's device; None: torch's own.

    Raises:
        UserError: a rank below 1, or a base that is not linear-like.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not is_linear(base):
            raise UserError(
                f"{type(base).__name__} is not linear-like: LoRA needs its in_features, out_features and weight"
            )
        if rank < 1:
            raise UserError(f"rank={rank}: must be at least 1")
        self.base, self.alpha, self.dropout = base, alpha, dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        # as nn.Linear does: within ±1/sqrt(in_features)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.unmerged_weight: torch.Tensor | None = None  # while merged: what the base's weight was

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self):
        """The base's: frozen, and without the correction unless it is merged."""
        return self.base.weight

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        y = self.base(x)
        if self.merged:
            return y
        z = nn.functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        z = nn.functional.linear(nn.functional.linear(z, self.lora_A), self.lora_B)  # (..., rank), then (..., out)
        return y + (z * (self.alpha / self.rank)).to(y.dtype)

    def delta(self) -> torch.Tensor:
        """What the correction adds to the weight: float32, Tensor[out_features, in_features]."""
        return self.alpha / self.rank * (self.lora_B.float() @ self.lora_A.float())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"


# ------------------------------------------------------------------------------------------------------------------ add


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Freeze a model and put a LoraLinear around its linear layers, in place.

    Args:
        rank, alpha, dropout, dtype: as in `LoraLinear`.
        targets: "all-linear" (all but the output head), or names of modules, or the ends of dotted ones:
            ["q_proj", "layers.0.mlp.down_proj"].
        seed: for A. torch's own generators are not touched.

    Returns:
        the same model

    Raises:
        UserError: a target that the model does not have (near matches are named), no linear layer at all, or a model
            that has adapters already.
    """
    if lora_layers(model):
        raise UserError("this model has LoRA layers already: unload(model) takes them out first")
    names = find_targets(model, targets)
    model.requires_grad_(False)
    devices = {model.get_submodule(name).weight.device for name in names}
    draw = {device: torch.Generator(device).manual_seed(seed) for device in devices if device.type != "meta"}
    for name in names:
        base = model.get_submodule(name)
        layer = LoraLinear(base, rank, alpha, dropout, dtype, draw.get(base.weight.device))
        set_module(model, name, layer.train(model.training))
    return model


def is_linear(module: nn.Module) -> bool:
    """Linear-like: says how wide its input and output are. nn.Linear does, so do bitsandbytes' and our 4-bit layers."""
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(width, int) for width in widths) and hasattr(module, "weight")


def find_targets(model: nn.Module, targets: str | list[str] = "all-linear") -> list[str]:
    """Dotted names of the layers that `targets` means, in the model's order. See `add_lora` for targets and errors."""
    linears = [name for name, module in model.named_modules() if name and is_linear(module)]
    if not linears:
        others = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise UserError(f"the model has no linear layer that LoRA could adapt: it is made of {', '.join(others)}")
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [name for name in linears if model.get_submodule(name) is not head]
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise UserError("targets is empty: name at least one layer, or say 'all-linear'")
    ends = sorted({name.rpartition(".")[2] for name in linears})
    for target in targets:
        if not any(is_named(name, target) for name in linears):
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ends)}"
            raise UserError(f"the model has no linear layer named {target!r}: {hint}")
    return [name for name in linears if any(is_named(name, target) for target in targets)]


def is_named(name: str, target: str) -> bool:
    """Whether a dotted name is the target or ends in it, as in PEFT: `model.layers.0.mlp.up_proj` is an `up_proj`."""
    return name == target or name.endswith("." + target)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with this dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's LoRA layers by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> int:
    """How many numbers A and B have: rank * (in_features + out_features), summed over the layers."""
    return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in lora_layers(model).values())


# ---------------------------------------------------------------------------------------------------------------- merge


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every correction to its base's weight: inference then costs what it cost before LoRA.

    The sum is rounded to the weight's dtype. Each layer keeps the old weight, so that `unmerge` restores it bit by bit
    (a subtraction would not); `unload` lets it go.

    Raises:
        UserError: a model without LoRA layers, merged already, or with a base that has no weight of floating point.
    """
    layers = required_lora(model)
    if any(layer.merged for layer in layers.values()):
        raise UserError("the adapter is merged already: merging twice would add it twice; unmerge(model) takes it back")
    for name, layer in layers.items():
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise UserError(
                f"{name}: {type(layer.base).__name__} holds no weight that a correction can be added to; "
                "dequantize_linears(model) makes the base dense first"
            )
    for layer in layers.values():
        layer.unmerged_weight = layer.base.weight.data
        layer.base.weight.data = (layer.unmerged_weight.float() + layer.delta()).to(layer.unmerged_weight.dtype)
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Give the bases their old weights back, bit by bit. Raises UserError if nothing is merged."""
    layers = required_lora(model)
    if not all(layer.merged for layer in layers.values()):
        raise UserError("the adapter is not merged: there is nothing to take back")
    for layer in layers.values():
        layer.base.weight.data, layer.unmerged_weight = layer.unmerged_weight, None
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the LoRA layers out: what stays is the base, merged if it was. Raises UserError if there are none."""
    for name, layer in required_lora(model).items():
        set_module(model, name, layer.base)
    return model


def required_lora(model: nn.Module) -> dict[str, LoraLinear]:
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no LoRA layers: add_lora(model) or load_lora(model, folder) adds them")
    return layers


# ---------------------------------------------------------------------------------------------------------------- files
#
# PEFT's format is a folder with two files:
#     adapter_config.json         r, lora_alpha, lora_dropout, target_modules and PEFT's many other settings
#     adapter_model.safetensors   base_model.model.<name of the layer>.lora_A.weight, and .lora_B.weight
#
# What PEFT does not write is which weights the adapter was trained on. We add a fingerprint to the header of the
# safetensors file, where PEFT looks past it.

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# PEFT's settings that do not change what A and B mean. Any other that is on does, or may: rsLoRA's scale, a rank or an
# alpha of a layer's own, DoRA, a start that changes the base ... PEFT has new ones in every release.
HARMLESS = {
    *"peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode".split(),
    *"r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern".split(),
    *"megatron_core qalora_group_size eva_config ensure_weight_tying".split(),
}
HARMLESS_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def save_lora(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter in PEFT's format, and each file whole or not at all.

    Raises:
        UserError: a model without LoRA layers, or whose layers differ in rank, alpha or dropout.
    """
    from safetensors.torch import save_file

    layers = required_lora(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) > 1:
        raise UserError(f"the LoRA layers have several (rank, alpha, dropout): {sorted(kinds)}; one file holds one")
    ((rank, alpha, dropout),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _shortest_targets(model, list(layers)),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach().contiguous().cpu()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "base_fingerprint": base_fingerprint(model)}
    save_file(tensors, folder / f"{WEIGHTS}.part", metadata)
    (folder / f"{CONFIG}.part").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in (WEIGHTS, CONFIG):
        (folder / f"{file}.part").replace(folder / file)


def load_lora(model: nn.Module, folder: str | os.PathLike, any_base: bool = False) -> nn.Module:
    """Read an adapter that `save_lora` or PEFT wrote. A model without LoRA layers gets them; others are overwritten.

    Args:
        any_base: accept an adapter that was trained on other weights of the same shapes. (Only `save_lora` writes down
            which: adapters of PEFT are taken at their word.)

    Returns:
        the same model

    Raises:
        UserError: missing or damaged files, a kind of adapter that is not plain LoRA, another base, another rank than
            that of the model's layers, or a merged model.
    """
    config, tensors, fingerprint = _read(pathlib.Path(folder))
    names = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors))
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
    dtype = tensors[f"{names[0]}.lora_A"].dtype
    if not layers:
        add_lora(model, config["r"], config["lora_alpha"], names, config.get("lora_dropout", 0.0), dtype=dtype)
    for name, layer in lora_layers(model).items():
        layer.alpha, layer.dropout = config["lora_alpha"], config.get("lora_dropout", 0.0)
        layer.lora_A.data.copy_(tensors[f"{name}.lora_A"])
        layer.lora_B.data.copy_(tensors[f"{name}.lora_B"])
    return model


def base_fingerprint(model: nn.Module) -> str:
    """Tells one model's weights from another's: sha256 of its norms and biases, rounded to bf16.

    These stay as they are when a model is quantized, so a 4-bit model and its 16-bit original have the same one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            digest.update(name.replace(".base.", ".").encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _read(folder: pathlib.Path) -> tuple[dict, dict[str, torch.Tensor], str | None]:
    """Settings, tensors by "<layer>.lora_A" and "<layer>.lora_B", and the base's fingerprint if there is one."""
    from safetensors import SafetensorError, safe_open

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
    plain = {name: name.removeprefix(PREFIX).removesuffix(".weight") for name in tensors}
    others = [name for name, short in plain.items() if not short.endswith((".lora_A", ".lora_B"))]
    if special or others or config.get("peft_type") != "LORA":
        what = (special or others or [config.get("peft_type")])[0]
        raise UserError(f"the adapter in {folder} is not plain LoRA ({what}): load it with PEFT")
    tensors = {plain[name]: tensor for name, tensor in tensors.items()}
    wrong = [name for name, tensor in tensors.items() if tensor.shape[name.endswith("_B")] != rank]
    lonely = [name for name in tensors if name[:-1] + ("B" if name.endswith("A") else "A") not in tensors]
    if wrong or lonely or not tensors:
        what = f"{(wrong or lonely or ['nothing'])[0]} does not fit r={rank}"
        raise UserError(f"the adapter in {folder} does not agree with its own config: {what}")
    return config, tensors, fingerprint


def _require_same_base(model: nn.Module, names: list[str], tensors: dict, fingerprint: str | None) -> None:
    """Raise UserError unless the model has these layers, in these sizes, and the fingerprint if one is given."""
    modules = dict(model.named_modules())
    for name in names:
        expected = len(tensors[f"{name}.lora_B"]), tensors[f"{name}.lora_A"].shape[1]  # (out, in)
        if name not in modules or not is_linear(modules[name]):
            raise UserError(f"the adapter is for another base: this model has no linear layer {name}")
        size = modules[name].out_features, modules[name].in_features
        if size != expected:
            raise UserError(f"the adapter is for another base: its {name} is {expected}, this model's is {size}")
    if fingerprint is not None and fingerprint != base_fingerprint(model):
        raise UserError(
            "the adapter was trained on another base: shapes agree, weights do not; any_base=True loads it all the same"
        )


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names, as PEFT's users write them, if these mean the same layers; else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, LoraLinear) or is_linear(module)) and any(is_named(name, end) for end in ends)
    }
    return ends if meant == set(names) else names
