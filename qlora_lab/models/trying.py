"""What a model can do, found out by trying it: a tiny copy with random weights reads a dozen tokens, on the CPU.

    tried = try_out(config)      Tried: does it train, pack, chunk its loss, read so many tokens?
    require_trainable(...)       what `train_qlora` asks before it loads a model

A list of architectures would age; a question to the code does not. tiny.py makes the copy.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.models.compatibility import adapt_on_meta, preflight, read_config
from qlora_lab.models.experts import fused_parameters
from qlora_lab.models.loading import FOUR_BITS, first_sentence, is_quantized_already, quantized_by
from qlora_lab.models.parts import text_decoder
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.models.rows import attention_of_rows
from qlora_lab.models.tiny import in_4_bits, tiny_copy

SAME = 1e-3  # of the logits' standard deviation: float32 rounds to 1e-6 of it, another sample moves them by about 1


@dataclass(frozen=True)
class Tried:
    """What a tiny copy of a model did. Each reason is "" where it can.

    Attributes:
        training: why it cannot be trained on answers as a causal language model with PEFT's adapters.
        packing: why samples in one row are not as if each were alone.
        chunks: why its loss cannot be computed chunk by chunk.
        checkpoints: why its activations cannot be checkpointed.
        longest: tokens that it can read at most; None: no limit was met.
        unreached: adapted layers that no text reaches, by name; "*" stands for the number of a layer or an expert.
    """

    training: str = ""
    packing: str = ""
    chunks: str = ""
    checkpoints: str = ""
    longest: int | None = None
    unreached: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.training:
            return f"Tried on a tiny copy: {self.training}"
        packing = f"no: {self.packing}" if self.packing else "yes, samples do not see one another"
        chunks = f"no: {self.chunks or self.checkpoints}" if self.chunks or self.checkpoints else "yes"
        longest = f"\nTokens in a sample: {self.longest} at most" if self.longest else ""
        beside = f", but for {len(self.unreached)} kinds of layers ({self.unreached[0]})" if self.unreached else ""
        return f"Tried on a tiny copy: it trains{beside}\n--packing: {packing}\n--preset lean: {chunks}{longest}"


def require_trainable(
    config,
    *,
    quantize: bool,
    targets: str | list[str] = "all-linear",
    packing: bool = False,
    chunks: bool = False,
    checkpoints: bool = False,
    max_length: int = 0,
    sharded: bool = False,
) -> tuple[str, ...]:
    """Raise UserError unless a model can be trained so; return what should be said before it is, a sentence each.

    Args:
        config: as in `preflight`.
        quantize: whether the base is to be held in 4 bits.
        targets: what is adapted, as in `add_adapter`.
        packing: whether several samples share a row.
        chunks: whether the loss is computed chunk by chunk.
        checkpoints: whether activations are checkpointed.
        max_length: tokens in the longest row.
        sharded: whether the model is spread over processes. Experts stay in 16 bits then.
    """
    config = read_config(config)
    notes = []
    already = quantized_by(config)
    if already and not (already == FOUR_BITS and quantize):
        also = ", or is trained as it is with --method qlora" if already == FOUR_BITS else ""
        raise UserError(f"this checkpoint {is_quantized_already(already)}{also}")
    if quantize and not already:
        seen = preflight(config, experts=not sharded)
        if seen.share_missed > 0.05:
            most = max(seen.missed, key=lambda weight: weight.numel).reason
            notes.append(f"{seen.share_missed:.0%} of the weights of its layers stay in 16 bits ({most})")
    tried = try_out(config, targets, max_length, four_bits=quantize)
    if tried.training:
        raise UserError(tried.training)
    if tried.unreached:
        notes.append(
            f"no text reaches {tried.unreached[0]}, one of {len(tried.unreached)} kinds of adapted layers "
            "(* is any number) that stay as they are"
        )
    if packing and tried.packing:
        raise UserError(f"{tried.packing}: train without --packing")
    if chunks and tried.chunks:
        raise UserError(f"{tried.chunks}: its loss cannot be computed in chunks (--preset lean); choose another preset")
    if checkpoints and tried.checkpoints:
        raise UserError(f"{tried.checkpoints}: train without --gradient-checkpointing and presets")
    if tried.longest and max_length > tried.longest:
        raise UserError(
            f"--max-length {max_length} is more than this model can read: it has positions for {tried.longest} tokens"
        )
    return tuple(notes)


def require_isolation(model) -> None:
    """Raise UserError if samples that share a row would see one another in this model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _on_the_side():
        small = tiny_copy(base.config, type(base))
        if small is not None and (reason := why_not_packed(small)):
            raise UserError(f"{reason}: use packing=False")


_SHARED: dict[tuple[type, str], bool] = {}  # by class and config: a trial takes a tenth of a second


def can_share_beginnings(model) -> bool:
    """Whether rows that begin with the same tokens can be computed in this model as `models/rows.py` describes it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return False  # each row drops other numbers
    known = (type(base), base.config.to_json_string(use_diff=False))
    if known not in _SHARED:
        with _on_the_side():
            small = tiny_copy(base.config, type(base))
            _SHARED[known] = small is not None and not why_not_shared(small)
    return _SHARED[known]


def try_out(config, targets: str | list[str] = "all-linear", max_length: int = 0, four_bits: bool = False) -> Tried:
    """Try a tiny copy of a model. Arguments as in `require_trainable`; four_bits: try it in 4 bits, too."""
    with _on_the_side():
        try:
            small = tiny_copy(config)
            if small is None:
                return Tried(packing="this model is too large to be tried for it", chunks="")
            if _sees_what_comes(small):
                kind = type(small).__name__
                return Tried(f"{kind} is no causal language model: its tokens see those that come after them")
            packing, chunks = why_not_packed(small), why_not_chunked(small)
            longest = _longest(small, max_length)
        except UserError as error:
            return Tried(str(error))
        except Exception as error:  # whatever a model of this kind does not take
            return Tried(f"a {_kind(config)} cannot be trained: {first_sentence(error)}")
        reason, unreached = _trained_once(small, targets)
        if reason:
            can = ",".join(_trained_alone(config)) if targets == "all-linear" else ""
            return Tried(f"{reason}; --targets {can} can be trained" if can else reason)
        checkpoints = _why_not_checkpointed(small)
        if four_bits and (reason := _trained_once(in_4_bits(tiny_copy(config)), targets)[0]):
            return Tried(f"in 4 bits, {reason}; with --method lora it can")
    return Tried("", packing, chunks, checkpoints, longest, unreached)


def _kind(config) -> str:
    return type(config).__name__.removesuffix("Config")


@contextlib.contextmanager
def _on_the_side():
    """Everybody's random numbers stay as they are, and nothing is said."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -------------------------------------------------------------------------------------------------------------- trials


@torch.no_grad()
def _logits(model, *samples: list[int], positions: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of samples in one row, of shape (tokens, vocabulary), computed as `token_loss_sum` has them computed."""
    ids = torch.tensor([[token for sample in samples for token in sample]])
    if positions is None:
        positions = torch.tensor([[position for sample in samples for position in range(len(sample))]])
    keep = torch.arange(ids.shape[1])
    return model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits[0].float()


def _differ(left: torch.Tensor, right: torch.Tensor) -> float:
    """By how many standard deviations logits differ, at most."""
    return ((left - right).abs().max() / left.std()).item()


def _tokens(model, count: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.get_input_embeddings().weight.shape[0], (count,), generator=draw).tolist()


def _sees_what_comes(model) -> bool:
    first, second = _tokens(model, 9, 1), _tokens(model, 9, 2)
    together = _logits(model, first[:6] + second[:3])
    return _differ(_logits(model, first)[:6], together[:6]) > SAME


def why_not_packed(model) -> str:
    """Why samples in one row are not, to this model, as if each were alone; "" if they are."""
    first, second = _tokens(model, 7, 1), _tokens(model, 5, 2)
    packed = _logits(model, first, second)
    if (leak := _differ(_logits(model, second), packed[len(first) :])) > SAME:
        kind = type(model).__name__
        return f"in a {kind}, samples that share a row see one another (their logits move by {leak:.2g} deviations)"
    return ""


@torch.no_grad()
def why_not_shared(model) -> str:
    """Why `models/rows.py` does not compute rows with a common beginning as if each were alone; "" if it does."""
    kind = type(model).__name__
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        return f"{kind} does not let its attention be chosen"
    first, *rests = (_tokens(model, count, seed) for seed, count in enumerate((7, 5, 5)))
    alone = torch.cat([_logits(model, [*first, *rest])[len(first) :] for rest in rests])
    model.train()  # with its dropout, if it has any
    try:
        with attention_of_rows(model):
            positions = [*range(7), *range(7, 12), *range(7, 12)]
            ids, keep = torch.tensor([[*first, *rests[0], *rests[1]]]), torch.arange(7, 17)
            made = model(
                input_ids=ids,
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=keep,
                beginning=7,
                rows=2,
            ).logits[0]
    except Exception as error:  # whatever a model of this kind does not take
        return f"{kind} does not take rows with a common beginning: {first_sentence(error)}"
    finally:
        model.eval()
    if (difference := _differ(alone, made[-len(alone) :].float())) > SAME:
        return f"in a {kind}, rows with a common beginning move each other's logits by {difference:.2g} deviations"
    return ""


def _longest(model, wanted: int) -> int | None:
    """The number of positions that a model has, if it is fewer than wanted and it cannot do with more."""
    config = vars(model.config.get_text_config())
    limits = {value for name, value in config.items() if "position" in name and isinstance(value, int)}
    for limit in sorted(limit for limit in limits if 1 < limit < wanted):
        try:
            _logits(model, _tokens(model, limit + 1, 1))
        except (IndexError, RuntimeError, ValueError):
            return limit
    return None


def _trained_once(model, targets: str | list[str]) -> tuple[str, tuple[str, ...]]:
    """Have PEFT adapt the targets, as training will, and take gradients: why that fails, or ""; `Tried.unreached`.

    The model is left with adapters.
    """
    if isinstance(targets, list):  # a target may be in a layer that the copy does not have
        names = [*(name for name, _ in model.named_modules()), *fused_parameters(model)]
        targets = [t for t in targets if any(f".{name}".endswith(f".{t}") for name in names)]
    try:
        adapted, error = adapt_on_meta(model, targets) if targets else ((), "")
        if error:
            kind = type(model).__name__
            return f"{kind} cannot be adapted as it is: PEFT's {targets} finds no target ({error})", ()
        for module in model.modules():  # the adapters were made without memory
            if any(p.is_meta for p in module.parameters(False)):
                module.to_empty(device="cpu", recurse=False)
                for parameter in module.parameters(False):
                    nn.init.normal_(parameter, std=0.01)
        _take_gradients(model)
        ids = torch.tensor([_tokens(model, 9, 1)])  # as it is judged
        mask = torch.ones_like(ids)
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    except Exception as error:  # whatever a model of this kind, or PEFT's layers in it, do not take
        return f"a {_kind(model.config)} cannot be trained: {first_sentence(error)}", ()
    if lost := _lost_when_loaded(model):
        kind = _kind(model.config)
        return (
            f"a {kind}'s adapter cannot be kept: PEFT loses {len(lost)} of its tensors when it loads it ({lost[0]})",
            (),
        )
    reached: dict[str, bool] = {}  # experts of one layer count as one, for few tokens do not visit each
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            name = re.sub(r"\.\d+(?=\.)", ".*", name.partition(".lora_")[0])
            reached[name] = reached.get(name, False) or (parameter.grad is not None and bool(parameter.grad.any()))
    return "", tuple(name for name, some in reached.items() if not some)


def _lost_when_loaded(model) -> list[str]:
    """Tensors of an adapter that PEFT saves and does not find again: it renames some, as checkpoints are renamed."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    kept = get_peft_model_state_dict(model)
    return [name for name in set_peft_model_state_dict(model, kept).missing_keys if ".lora_" in name]


def _take_gradients(model) -> None:
    ids = torch.tensor([_tokens(model, 9, 1)])
    positions, keep = torch.arange(9)[None], torch.arange(9)
    logits = model.train()(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()


def _why_not_checkpointed(model) -> str:
    """Why the activations of a model with adapters cannot be checkpointed; "" if they can."""
    try:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        _take_gradients(model)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"the activations of a {_kind(model.config)} cannot be checkpointed ({first_sentence(error)})"
    return ""


def _trained_alone(config) -> list[str]:
    """The last names of those linear layers that can be adapted and trained, tried one after the other."""
    model: Any = tiny_copy(config)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    return [end for end in ends if _trained_once(tiny_copy(config), [end]) == ("", ())]


# ------------------------------------------------------------------------------------------------- around the head

_PLAIN: weakref.WeakSet = weakref.WeakSet()  # models whose logits are known to be those of their head


def require_plain_head(model) -> None:
    """Raise UserError unless a model's logits are what its output head makes of its decoder's hidden states.

    Seen in a forward pass of two tokens, the first time that it is asked of a model. A factor or a cap on the logits is
    not always in the config where one would look for it.
    """
    if model not in _PLAIN:
        if reason := why_not_chunked(model):
            raise UserError(f"{reason}: use loss_chunk=None")
        _PLAIN.add(model)


@torch.no_grad()
def why_not_chunked(model) -> str:
    """What a causal language model does between its decoder and its logits beside the head; "" if nothing."""
    seen = {}
    decoder, head = text_decoder(model), model.get_output_embeddings()
    if decoder is None:
        return f"a {type(model).__name__} does not say which of its parts is the decoder"
    hooks = (
        decoder.register_forward_hook(lambda module, given, made: seen.update(hidden=made.last_hidden_state)),
        head.register_forward_hook(lambda module, given, made: seen.update(read=given[0], made=made)),
    )
    try:
        ids = torch.tensor([[3, 4]], device=head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if set(seen) != {"hidden", "read", "made"} or not torch.equal(seen["hidden"], seen["read"]):
        return f"a {type(model).__name__} changes its hidden states before the head"
    if not torch.equal(logits.float(), seen["made"].float()):
        return f"a {type(model).__name__} changes its logits after the head"
    return ""


@torch.no_grad()
def where_not_finite(model, ids: torch.Tensor) -> str:
    """The dotted name of the first module whose output is not finite while the model reads ids; "" if none is."""
    found: list[str] = []

    def watch(name: str):
        def hook(module, given, made):
            if not found and isinstance(made, torch.Tensor) and not made.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(input_ids=ids.to(model.get_output_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
