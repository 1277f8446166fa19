"""Layers' inputs in the host's memory while they wait for their backward pass."""

from __future__ import annotations

import contextlib
import functools

import torch

from qlora_lab.training.steps.fast.batch import power_of_two


@functools.lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, since cuBLAS keeps 32 MiB for each stream that it has ever worked on."""
    return torch.cuda.Stream(device)


@functools.lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """For what travels between GPU and host beside the computation."""
    return torch.cuda.Stream(device)


class HostMemory:
    """Where layers' inputs wait for their backward pass, so that the GPU's memory need not hold them all.

    Copies run on a stream of their own, beside the computation: in the forward pass one layer's input leaves while the
    next layer is computed, in the backward pass the one below arrives meanwhile. It costs nothing as long as a
    layer's input, (T, H), travels in less time than the layer takes forward. (LLaMA-7B on an H100, at 53 GB/s: 1.3 ms
    beside 6, for 8192 tokens. T cancels out, so a narrow model may lose time.)

    Whatever is copied must live until its copy is done: memory that is let go of belongs to the next kernel of the
    computing stream, which does not wait for this one. In a captured graph the copies' stream forks off from the
    capture, and `arrived` for the lowest layer has joined it again.
    """

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = (layers, hidden), dtype, device
        self.stream = copy_stream(device) if device.type == "cuda" else None
        self.buffers: dict[int, torch.Tensor] = {}  # by tokens: a captured graph writes where it wrote when captured
        self.leaving: torch.Tensor | None = None
        self.arriving: list[torch.Tensor] = []  # one at most

    def begin(self, tokens: int) -> None:
        """Have room for so many tokens, in pages that cannot be moved: LLaMA-7B, 8192 tokens: 2.1 GB.

        Sizes are powers of two, so all buffers that were ever needed take twice the largest at most.
        """
        capacity = power_of_two(tokens)
        if capacity not in self.buffers:
            layers, hidden = self.shape
            pinned = self.stream is not None
            self.buffers[capacity] = torch.empty(layers, capacity, hidden, dtype=self.dtype, pin_memory=pinned)
        self.buffer = self.buffers[capacity][:, :tokens]

    def send(self, i: int, x: torch.Tensor) -> None:
        """Copy layer i's input to the host. The next call, or `fetch`, waits for it, and lets go of x."""
        if self.leaving is not None:
            self._wait()
        with self._beside():
            self.buffer[i].copy_(x, non_blocking=True)
        self.leaving = x

    def fetch(self, i: int) -> None:
        """Have layer i's input copied back; `arrived` returns it."""
        if self.leaving is not None:
            self._wait()
        x = torch.empty(self.buffer[i].shape, dtype=self.dtype, device=self.device)
        self.leaving = None
        with self._beside():
            x.copy_(self.buffer[i], non_blocking=True)
        self.arriving.append(x)

    def arrived(self) -> torch.Tensor:
        self._wait()
        return self.arriving.pop()

    def _wait(self) -> None:
        """What is launched from here on begins when the copies are done."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _beside(self):
        """On the other stream, when what has been launched so far is done."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)
