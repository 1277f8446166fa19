"""What lesson 12 and dive H show of `python -m qlora_lab.experiments rounded-twice`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qlora_lab.places import RECORDS


@dataclass(frozen=True)
class BaseAlone:
    """The model without an adapter, its linear layers rounded in some way.

    Attributes:
        loss: of reference answers, nats per token.
        size: the mean size of Q4_0's errors, in steps between its levels; 0 without Q4_0.
        shift: the mean of these errors with their signs: what they move an average weight up by.
    """

    loss: float
    size: float
    shift: float


def base_alone(way: str) -> BaseAlone:
    """What `python -m qlora_lab.experiments rounded-twice` has measured in one of its ways."""
    record = json.loads((RECORDS / "rounded-twice-cpu-x86_64.json").read_text(encoding="utf-8"))
    (row,) = (row for row in record["rows"] if row["way"] == way)
    size, shift = (
        sum(share * error for share, error in zip(record["shares"], row.get(of, [0.0] * 16), strict=True))
        for of in ("absolute", "error")
    )
    return BaseAlone(row["loss"], size, shift)
