"""Layers' inputs in the host's memory while they wait for their backward pass."""

from __future__ import annotations

import contextlib
import functools

import torch

from qlora_lab.training.steps.fast.batch import power_of_two


@functools.lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. It is shared, since cuBLAS keeps 32 MiB for each stream that it has ever run on."""
    return torch.cuda.Stream(device)


@functools.lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies between GPU and host, which run beside the computation."""
    return torch.cuda.Stream(device)


class HostMemory:
    """Holds layers' inputs until their backward pass, so that the GPU's memory need not hold them all.

    Copies run on a stream of their own, beside the computation. In the forward pass a layer's input is copied to the
    host while the next layer is computed; in the backward pass the input of the layer below is copied back meanwhile.
    This takes no extra time as long as copying a layer's input, (T, H), is faster than the layer's forward pass.
    (LLaMA-7B on an H100, at 53 GB/s: 1.3 ms against 6, for 8192 tokens. T cancels out, so a narrow model may lose
    time.)

    A tensor must stay alive until its copy is done: once freed, its memory goes to the next kernel of the computing
    stream, which does not wait for the copying stream. In a captured graph the copying stream forks off from the
    capture, and by `arrived` of the lowest layer it has joined it again.

    Args:
        layers: how many inputs to hold. hidden: H. dtype, device: of the inputs.
    """

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = (layers, hidden), dtype, device
        self.stream = copy_stream(device) if device.type == "cuda" else None
        self.buffers: dict[int, torch.Tensor] = {}  # by capacity; a captured graph writes to the same one
        self.leaving: torch.Tensor | None = None
        self.arriving: list[torch.Tensor] = []  # one at most

    def begin(self, tokens: int) -> None:
        """Provide a buffer for this many tokens, in pinned memory: 2.1 GB for LLaMA-7B and 8192 tokens.

        Capacities are powers of two, so all buffers together take at most twice the memory of the largest.
        """
        capacity = power_of_two(tokens)
        if capacity not in self.buffers:
            layers, hidden = self.shape
            pinned = self.stream is not None
            self.buffers[capacity] = torch.empty(layers, capacity, hidden, dtype=self.dtype, pin_memory=pinned)
        self.buffer = self.buffers[capacity][:, :tokens]

    def send(self, i: int, x: torch.Tensor) -> None:
        """Start copying layer i's input, (T, H), to the host; the next `send` or `fetch` waits and releases x."""
        if self.leaving is not None:
            self._wait()
        with self._beside():
            self.buffer[i].copy_(x, non_blocking=True)
        self.leaving = x

    def fetch(self, i: int) -> None:
        """Start copying layer i's input back; `arrived` returns it."""
        if self.leaving is not None:
            self._wait()
        x = torch.empty(self.buffer[i].shape, dtype=self.dtype, device=self.device)
        self.leaving = None
        with self._beside():
            x.copy_(self.buffer[i], non_blocking=True)
        self.arriving.append(x)

    def arrived(self) -> torch.Tensor:
        """The input that `fetch` has copied, (T, H)."""
        self._wait()
        return self.arriving.pop()

    def _wait(self) -> None:
        """Make what is launched from here on wait for the copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _beside(self):
        """A context for copies: they run on the other stream, after what has been launched so far."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)
