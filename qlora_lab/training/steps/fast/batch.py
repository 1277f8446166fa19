"""Samples concatenated in one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

from qlora_lab.training.chat import IGNORED, TokenizedSample


@dataclass(frozen=True)
class FlatBatch:
    """Samples concatenated in one row of tokens, padded at the end. One tensor holds all, for one copy to the GPU.

    numbers: int64, the five tensors of `parts` concatenated. tokens, sequences, targeted: their sizes T, S and R.
    longest: no sample has more tokens than this, a power of two.
    """

    numbers: torch.Tensor
    tokens: int
    sequences: int
    targeted: int
    longest: int

    @property
    def kind(self) -> tuple[int, ...]:
        """What a captured graph depends on: all sizes."""
        return (self.tokens, self.sequences, self.targeted, self.longest)

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors in `numbers`, as views:

        ids and positions, (T,); starts, (S + 1,): where each sample begins, and the end of the last (the padding is a
        sample too, and any further ones are empty); rows, (R,): positions whose next token is a target; targets, (R,):
        that token, or -100 in rows that are padding.
        """
        return self.numbers.split([self.tokens, self.tokens, self.sequences + 1, self.targeted, self.targeted])


def flatten(samples: list[TokenizedSample], pad_token_id: int) -> FlatBatch:
    """Concatenate samples, of which there must be at least one. No target is another sample's token."""
    lengths = [len(sample.ids) for sample in samples]
    ids = numpy.concatenate([sample.ids for sample in samples])
    padding = rounded_up(len(ids)) - len(ids)
    lengths += [padding] * bool(padding)
    sequences = power_of_two(len(lengths))
    starts = numpy.zeros(sequences + 1, dtype=numpy.int64)
    starts[1 : len(lengths) + 1] = numpy.cumsum(lengths)
    starts[len(lengths) + 1 :] = starts[len(lengths)]
    targeted = numpy.concatenate([start + targets_of(sample) for start, sample in zip(starts, samples, strict=False)])
    empty = rounded_up(len(targeted)) - len(targeted)
    parts = [
        *(ids, numpy.full(padding, pad_token_id)),
        *(numpy.arange(length) for length in lengths),
        starts,
        *(targeted - 1, numpy.zeros(empty, dtype=numpy.int64)),
        *(ids[targeted], numpy.full(empty, IGNORED)),
    ]
    numbers = torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64, copy=False))
    longest = max(64, power_of_two(max(lengths)))
    return FlatBatch(numbers, len(ids) + padding, sequences, len(targeted) + empty, longest)


def targets_of(sample: TokenizedSample) -> numpy.ndarray:
    """The positions of the tokens that are learned."""
    targets = numpy.arange(max(sample.prompt_length, 1), len(sample.ids))
    for start, end in sample.between:
        targets = targets[(targets < start) | (targets >= end)]
    return targets


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def rounded_up(n: int) -> int:
    """Round n up to a multiple of 64 or, if larger, of an eighth of the power of two below n.

    So there are at most eight sizes, hence graphs, from one power of two to the next.
    """
    size = max(64, (1 << n.bit_length()) // 16)
    return max(1, -(-n // size)) * size
