"""A model whose weights are spread over several processes, by PyTorch's FSDP2: each keeps a share of every layer.

Just before a layer computes, its shares are gathered from all processes; just after, they are given up again. No
process ever holds the whole model, not even while it is loaded:

    model, unfilled = empty_model(config, True, device, torch.bfloat16)   # the structure, without memory
    model = add_adapter(model)                                            # whatever is to be trained goes in now
    fill_and_shard(model, unfilled, CheckpointWeights(folder), device)    # layer by layer: read, quantize, shard

Spread are the 4-bit codes, everything in 16 bits, and the adapters with their gradients and optimizer states. Each
process has whole: the scales of the 4-bit blocks (0.127 bits a parameter), which bitsandbytes keeps outside of the
parameters; and embeddings that are the output head too, since they are needed at both ends of the model.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.models.compatibility import build_on_meta, quantize_on_meta
from qlora_lab.models.faults import require_right_scales, use_differentiable_kernels
from qlora_lab.models.quiet import quiet_transformers

Weights = Callable[[str, torch.Size], torch.Tensor]  # a parameter's name and shape -> its values, in any dtype
Unfilled = dict[tuple[nn.Module, str], str]  # a module and its parameter -> the parameter's name in the checkpoint
STORAGE = torch.bfloat16  # of the 4-bit codes, as bitsandbytes and Accelerate ask for with FSDP. The bits are the same


def empty_model(config, quantize: bool, device: torch.device, compute_dtype: torch.dtype) -> tuple[Any, Unfilled]:
    """Build the structure of a model. Its parameters are on the device, and have one element each, repeated.

    Args:
        config: transformers'.
        quantize: to doubly quantized NF4, all linear layers but the output head.

    Returns:
        the model in eval mode, and the parameters that are to be filled

    Raises:
        UserError: transformers has no such model, or treats its weights in a way that is not supported here.
    """
    with quiet_transformers():
        model: Any = build_on_meta(config, compute_dtype, buffers=True)
        if model._get_dtype_plan(compute_dtype):
            raise UserError(
                f"transformers keeps weights of a {type(model).__name__} in float32: it cannot be sharded yet"
            )
        if quantize:
            quantize_on_meta(model, compute_dtype, STORAGE)
            use_differentiable_kernels(model)
    unfilled = {}
    for name, module in model.named_modules():
        if getattr(module, "source_cls", nn.Linear) is not nn.Linear:
            raise UserError(f"{name} is a {module.source_cls.__name__}, which cannot be sharded yet: use one process")
        for key, parameter in module.named_parameters(recurse=False):
            unfilled[module, key] = f"{name}.{key}"
            values = torch.empty((), dtype=compute_dtype, device=device).expand(parameter.shape)
            setattr(module, key, _like(parameter, values))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    model.tie_weights()
    if tied_embeddings(model):
        del unfilled[model.get_output_embeddings(), "weight"]
    return model.eval(), unfilled


def fill_and_shard(model, unfilled: Unfilled, weights: Weights, device: torch.device) -> None:
    """Fill an empty model with weights, layer by layer, and leave each process its share of each layer.

    All processes must call this, and the weights must be the same in all.

    Args:
        model, unfilled: from `empty_model`; adapters may have been added to the model.
        weights: gives a parameter's values.

    Raises:
        UserError: the processes were not started as one run, or a weight is missing.
    """
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError(
            "sharding needs processes that know of one another, even if there is only one: start them with "
            "accelerate launch or python -m torch.distributed.run"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = tied_embeddings(model)
    for module in in_loading_order(model):
        fill(module, unfilled, weights)
        if module is whole:
            model.get_output_embeddings().weight = module.weight
            continue
        require_right_scales(module)
        sharded = fully_shard(module, mesh=mesh, ignored_params=set(whole.parameters()) if whole else None)
        # gradients are added up and not averaged: the loss is divided by the number of tokens in all processes
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # torch 2.13: an expert that no sample here reaches
            sharded.set_reduce_scatter_unused_params(True)
        if module is model.get_input_embeddings():
            sharded.set_unshard_in_backward(False)  # they are frozen: their backward pass needs nothing
    if unfilled:
        raise UserError(f"{next(iter(unfilled.values()))} belongs to no layer of the decoder: it cannot be sharded yet")


def in_loading_order(model) -> list[nn.Module]:
    """What is filled and sharded one after the other: embeddings, the decoder's layers, the output head, the decoder.

    A later one may contain earlier ones: only what is left of it counts.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=())
    return [causal_lm.get_input_embeddings(), *layers, *([] if tied_embeddings(model) else [head]), decoder]


def tied_embeddings(model) -> nn.Module | None:
    """The input embeddings, if their weight is the output head's too."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embeddings if head.weight is embeddings.weight else None


def fill(module: nn.Module, unfilled: Unfilled, weights: Weights) -> None:
    """Fill the parameters of a module and of those in it, and take them off the list."""
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            name = unfilled.pop((part, key), None)
            if name is None:  # an adapter's, or filled already
                continue
            values = weights(name, parameter.shape).to(parameter.device, parameter.dtype)
            filled = _like(parameter, values)
            if hasattr(filled, "quant_state"):
                filled = filled.to(parameter.device)  # this is where bitsandbytes quantizes
            setattr(part, key, filled)


def _like(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A frozen parameter with these values and, if it is to be quantized, with bitsandbytes' settings."""
    if not hasattr(parameter, "quant_state"):
        return nn.Parameter(values, requires_grad=False)
    kept = ("compress_statistics", "quant_type", "quant_storage", "module")
    return type(parameter)(values, requires_grad=False, **{key: getattr(parameter, key) for key in kept})


class CheckpointWeights:
    """The weights of a checkpoint in safetensors, each read when it is asked for.

    Args:
        source: a folder, or the id of a model on the hub, which is downloaded.

    Raises:
        UserError: no safetensors in it, or a damaged index.
    """

    def __init__(self, source: str):
        from huggingface_hub import snapshot_download
        from safetensors import SafetensorError, safe_open

        folder = pathlib.Path(source)
        if not folder.is_dir():
            folder = pathlib.Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        self.source, self.files = source, {}
        try:
            for path in sorted(folder.glob("model*.safetensors")):
                file = safe_open(path, "pt")
                self.files.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The values of a parameter. Raises UserError if the checkpoint lacks it, or has another shape."""
        if name not in self.files:
            raise UserError(f"the checkpoint {self.source!r} has no {name}: its weights cannot be read layer by layer")
        values = self.files[name].get_tensor(name)
        if values.shape != shape:
            raise UserError(
                f"the checkpoint {self.source!r} has {name} of shape {tuple(values.shape)}, not {tuple(shape)}"
            )
        return values


class RandomWeights:
    """Weights of a model that nobody trained: norms are 1, the rest is Gaussian. The same in all processes.

    Args:
        device: on which they are drawn. seed: the same seed gives the same weights on the same kind of device.
    """

    def __init__(self, device: torch.device, seed: int = 0, std: float = 0.02):
        self.device, self.std = device, std
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return values.normal_(std=self.std, generator=self.generator)
