"""Which linear layers to keep in 16 bits, when there is room for some: a plan from measured gains.

    plan(preflight(...), read_gains(FILE, ...), 5e9)      Plan: what is kept, what it costs, and how to load it so
    python -m qlora_lab.models preflight NAME --budget 5GB

A layer's gain is by how much the loss falls when it alone is kept in 16 bits and all others are in 4. `python -m
qlora_lab.experiments sensitivity` measures it. The plan takes layers in the order of gain per byte, as long as they
fit: no layer takes much of a budget, so that the best of all plans could not gain much more. What several layers gain
together is not exactly the sum, so the expected loss is an estimate.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_lab.errors import UserError
from qlora_lab.models.compatibility import Preflight
from qlora_lab.places import RECORDS

BYTES_IN_16_BITS = 2


@dataclass(frozen=True)
class Plan:
    """What stays in 16 bits.

    Attributes:
        budget: bytes that the model's tensors may take. least, most: with all linear layers in 4 bits, or in 16.
        nbytes: with this plan.
        kept: dotted names of the linear layers that stay in 16 bits, in the order in which they were chosen.
        gain: by how much the loss should fall below that with all in 4 bits, nats per token.
        linears: how many there are to choose from.
        head: names of what 4-bit loading leaves by itself, which must be told to it again.
    """

    budget: float
    least: int
    most: int
    nbytes: int
    kept: tuple[str, ...]
    gain: float
    linears: int
    head: tuple[str, ...]

    @property
    def skip_modules(self) -> list[str]:
        """`BitsAndBytesConfig(llm_int8_skip_modules=...)`: it is used for 4 bits, too, and replaces the default."""
        return [*self.head, *self.kept]

    def __str__(self) -> str:
        kinds = collections.Counter(name.rpartition(".")[2] for name in self.kept)
        sizes = f"all in 4 bits {_mb(self.least)}, all in 16 bits {_mb(self.most)}, this plan {_mb(self.nbytes)}"
        lines = [f"Budget {_mb(self.budget)}: {sizes}"]
        if not self.kept:
            return "\n".join([*lines, "Nothing is kept in 16 bits: no layer that gains anything fits."])
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines += [
            f"Kept in 16 bits: {len(self.kept)} of {self.linears} linear layers ({told})",
            f"The loss should fall by about {self.gain:.4f} nats per token (the sum of what each gained alone)",
            f"To load it so: BitsAndBytesConfig(load_in_4bit=True, ..., llm_int8_skip_modules={self.skip_modules})",
        ]
        return "\n".join(lines)


def plan(preflight: Preflight, gains: Mapping[str, float], budget: float) -> Plan:
    """Choose the linear layers to keep in 16 bits.

    Args:
        preflight: of the model.
        gains: by the dotted name of a linear layer, nats per token.
        budget: bytes for all of the model's tensors.

    Raises:
        UserError: the budget is smaller than the model with all its linear layers in 4 bits, or the gains are those of
            another model.
    """
    four_bits = {w.name.removesuffix(".weight"): w for w in preflight.weights if w.quantized}
    if missing := sorted(four_bits.keys() - gains.keys()):
        raise UserError(f"the measured gains are of another model: they have none for {missing[0]}")
    extra = {name: BYTES_IN_16_BITS * w.numel - w.nbytes for name, w in four_bits.items()}
    if budget < preflight.nbytes:
        raise UserError(
            f"the budget is {_mb(budget)}, and the model takes {_mb(preflight.nbytes)} with all its linear layers in "
            "4 bits: give more, or choose a smaller model"
        )
    kept = best_for_their_bytes(extra, gains, budget - preflight.nbytes)
    return Plan(
        budget=budget,
        least=preflight.nbytes,
        most=preflight.nbytes + sum(extra.values()),
        nbytes=preflight.nbytes + sum(extra[name] for name in kept),
        kept=kept,
        gain=sum(gains[name] for name in kept),
        linears=len(four_bits),
        head=tuple(w.name.removesuffix(".weight") for w in preflight.weights if w.reason.startswith("output head"))
        or ("lm_head",),
    )


def best_for_their_bytes(extra: Mapping[str, float], gains: Mapping[str, float], room: float) -> tuple[str, ...]:
    """Names in the order of gain per byte, as long as they fit; what does not gain is left out.

    extra: bytes, or bits, that each takes. room: what all that are chosen may take.
    """
    chosen = []
    for name in sorted(extra, key=lambda name: gains[name] / extra[name], reverse=True):
        if gains[name] > 0 and extra[name] <= room:
            chosen.append(name)
            room -= extra[name]
    return tuple(chosen)


def read_gains(file: str | os.PathLike | None, model: str) -> dict[str, float]:
    """Measured gains by the dotted name of a linear layer, from a record of `experiments sensitivity`.

    Args:
        file: None looks in the course's own records.
        model: the name that the record must have.

    Raises:
        UserError: there is no such record, it is damaged, or it is of another model.
    """
    command = f"python -m qlora_lab.experiments sensitivity --model {model} --output FOLDER"
    if file is None:
        records = sorted(RECORDS.glob("sensitivity-*.json"))
        file = next((path for path in records if _read(path)["settings"]["model"] == model), None)
        if file is None:
            raise UserError(f"nobody has measured {model} yet: run `{command}`, then give its file as --gains FILE")
    record = _read(pathlib.Path(file))
    if record["settings"]["model"] != model:
        raise UserError(f"{file} has the gains of {record['settings']['model']}, not of {model}: run `{command}`")
    text = record["settings"]["chosen on"]
    everything = record["losses"]["all in 4 bits"][text]
    return {name: everything - losses[text] for name, losses in record["kept"].items()}


def _read(file: pathlib.Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if {"settings", "losses", "kept"} <= record.keys():
            return record
    except OSError as error:
        raise UserError(f"cannot read the gains in {file}: {error.strerror}") from None
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{file} is no record of `python -m qlora_lab.experiments sensitivity`, or a damaged one")


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
