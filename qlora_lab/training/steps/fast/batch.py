"""Samples end to end in one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

from qlora_lab.training.chat import IGNORED, TokenizedSample


@dataclass(frozen=True)
class FlatBatch:
    """Samples end to end in one row of tokens, filled up with padding. All in one tensor: it is one copy to the GPU.

    numbers: int64, the five parts below one after the other. tokens, sequences, targeted: their sizes T, S and R.
    longest: tokens; no sample has more. What a captured graph depends on is all but `numbers`.
    """

    numbers: torch.Tensor
    tokens: int
    sequences: int
    targeted: int
    longest: int

    @property
    def kind(self) -> tuple[int, ...]:
        return (self.tokens, self.sequences, self.targeted, self.longest)

    def parts(self) -> tuple[torch.Tensor, ...]:
        """ids and positions, (T,); starts, (S + 1,): where each sample begins, and the end (the padding is a sample,
        too, further ones are empty); rows, (R,): tokens whose successor is a target; targets, (R,): that successor, or
        -100 in rows that only fill up."""
        return self.numbers.split([self.tokens, self.tokens, self.sequences + 1, self.targeted, self.targeted])


def flatten(samples: list[TokenizedSample], pad_token_id: int) -> FlatBatch:
    """Put samples end to end. No sample sees another, and no target is another sample's token."""
    lengths = [len(sample.ids) for sample in samples]
    ids = numpy.concatenate([sample.ids for sample in samples])
    padding = rounded_up(len(ids)) - len(ids)
    lengths += [padding] * bool(padding)
    sequences = power_of_two(len(lengths))
    starts = numpy.zeros(sequences + 1, dtype=numpy.int64)
    starts[1 : len(lengths) + 1] = numpy.cumsum(lengths)
    starts[len(lengths) + 1 :] = starts[len(lengths)]
    firsts = [max(sample.prompt_length, 1) for sample in samples]
    targeted = [
        numpy.arange(start + first, start + length)
        for start, first, length in zip(starts, firsts, lengths, strict=False)
    ]
    targeted = numpy.concatenate(targeted)
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


def power_of_two(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()


def rounded_up(n: int) -> int:
    """To a multiple of an eighth of the power of two below, 64 at least: eight sizes from one power to the next."""
    size = max(64, (1 << n.bit_length()) // 16)
    return max(1, -(-n // size)) * size
