"""Tokenized samples -> an endless, seeded stream of optimizer steps -> the tensors that a model takes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_lab.errors import UserError
from qlora_lab.training.chat import IGNORED, TokenizedSample


@dataclass(frozen=True)
class Batches:
    """An endless, seeded stream of optimizer steps; each step is a list of micro-batches, each of them a list of rows.

    A row is one row of the input tensor: one sample or, with `packing`, as many as fit in `max_length`. Without
    packing, samples of similar length are batched together, which needs little padding. The same seed gives the same
    stream, so a resumed run continues it by skipping the steps already taken. 2 micro-batches of 4 rows are the same
    step as 8 rows at once.

    Args:
        samples: at least one.
        batch_size: rows per micro-batch, that is per forward pass, over all processes together.
        accumulation: micro-batches per optimizer step.
        packing: put several samples in one row; they cannot attend to one another (see `collate`).
        max_length: tokens in a packed row.
        seed: of the order of the samples.

    Raises:
        UserError: no samples, or a batch size or accumulation below 1.
    """

    samples: list[TokenizedSample]
    batch_size: int = 8
    accumulation: int = 1
    packing: bool = False
    max_length: int = 512
    seed: int = 0

    def __post_init__(self):
        if not self.samples:
            raise UserError("there are no samples to train on")
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError(
                f"batch_size={self.batch_size} and accumulation={self.accumulation}: both must be at least 1"
            )

    def steps_per_epoch(self) -> int:
        """Optimizer steps after which each sample has been seen about once."""
        rows = len(self._pack(list(self.samples))) if self.packing else len(self.samples)
        return math.ceil(rows / (self.batch_size * self.accumulation))

    def __iter__(self) -> Iterator[list[list[list[TokenizedSample]]]]:
        rows_a_step = self.batch_size * self.accumulation
        draw = torch.Generator().manual_seed(self.seed)
        rows = []
        while True:
            while len(rows) < rows_a_step:
                epoch = _shuffled(self.samples, draw)
                rows += self._pack(epoch) if self.packing else [[sample] for sample in epoch]
            size = min(16, len(rows) // rows_a_step) * rows_a_step
            window, rows = rows[:size], rows[size:]
            if not self.packing:
                window.sort(key=lambda row: len(row[0].ids))
            steps = [window[i : i + rows_a_step] for i in range(0, size, rows_a_step)]
            for step in _shuffled(steps, draw):
                yield [step[i : i + self.batch_size] for i in range(0, rows_a_step, self.batch_size)]

    def _pack(self, samples: list[TokenizedSample]) -> list[list[TokenizedSample]]:
        """Greedy: a sample goes into the current row if it fits, otherwise it begins the next one."""
        rows, room = [], 0
        for sample in samples:
            if len(sample.ids) > room:
                rows.append([])
                room = self.max_length
            rows[-1].append(sample)
            room -= len(sample.ids)
        return rows


def replayed_count(samples: int, share: float) -> int:
    """How many others must be mixed into so many samples to be this share of all.

    >>> replayed_count(500, 1 / 8)
    71
    """
    return round(samples * share / (1 - share))


def with_replay(samples: list[TokenizedSample], others: list[TokenizedSample], share: float) -> list[TokenizedSample]:
    """Mix in others, so that a model does not forget what they hold: this share of each epoch.

    Args:
        share: between 0 and 1. If the others are too few for it, they are repeated; if they are more, the first are
            taken. `Batches` shuffles them in.

    Raises:
        UserError: there are no others.
    """
    if not others:
        raise UserError("there are no samples to replay")
    return [*samples, *itertools.islice(itertools.cycle(others), replayed_count(len(samples), share))]


def _shuffled(values: list, draw: torch.Generator) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=draw).tolist()]


def collate(rows: list[list[TokenizedSample]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of samples -> `input_ids`, `position_ids`, `labels`, each int64 of shape (len(rows), longest row).

    There is no attention mask. Positions restart at 0 with each sample, which is how transformers (masking_utils,
    `find_packed_sequence_indices`) finds where samples begin and keeps them from attending to one another. Padding
    comes last and continues the last sample's positions: under causal attention no real token sees it, and its labels
    are ignored. So is the label of each sample's first token, since the token before it belongs to another sample.

    Raises:
        UserError: no rows.
    """
    if not rows:
        raise UserError("there are no rows to make a batch of: give at least one")
    length = max(sum(len(sample.ids) for sample in row) for row in rows)
    batch = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        ids, positions, labels = [], [], []
        for sample in row:
            ids += sample.ids
            positions += range(len(sample.ids))
            labels += sample.labels
        padding = length - len(ids)
        batch["input_ids"].append(ids + [pad_token_id] * padding)
        batch["position_ids"].append(positions + list(range(len(row[-1].ids), len(row[-1].ids) + padding)))
        batch["labels"].append(labels + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def collate_sharing(rows: list[list[TokenizedSample]], pad_token_id: int) -> dict[str, torch.Tensor | int]:
    """Rows of one sample each -> one sequence that has their common beginning once, as `models/rows.py` wants it.

    No token that is learned is in the beginning, or directly behind it: each is predicted from a token of its own row.

    Returns:
        `input_ids`, `position_ids` and `labels`, each int64 of shape (1, beginning + rows * tokens of the longest
        rest); `beginning`, the number of its tokens, and `rows`
    """
    samples = [sample for (sample,) in rows]
    common = len(os.path.commonprefix([sample.ids for sample in samples]))
    beginning = min(common, *(max(1, min(sample.prompt_length, len(sample.ids))) - 1 for sample in samples))
    whole = collate(rows, pad_token_id)
    batch = {name: torch.cat([x[0, :beginning], x[:, beginning:].flatten()])[None] for name, x in whole.items()}
    return {**batch, "beginning": beginning, "rows": len(rows)}
