"""Managed memory, where bitsandbytes' paged optimizers have their states: counted, and used again by the next run."""

from __future__ import annotations

import torch

SPARE = 4_000_000_000  # bytes of the card that no run is planned to use


class PagedMemory:
    """Hands out managed memory in the place of bitsandbytes, and keeps it for the runs that follow.

    Two things would end a list of runs in one process. bitsandbytes never frees the states of its paged optimizers. And
    a GPU should never be asked for more managed memory than it has free: then it pages for ever. bitsandbytes has no
    argument for either, so its `get_paged` is replaced, for the whole process.
    """

    _installed: PagedMemory | None = None

    def __init__(self, device: torch.device, get_paged):
        self._device, self._get_paged = device, get_paged
        self._used: list[torch.Tensor] = []
        self._idle: list[torch.Tensor] = []

    @classmethod
    def installed(cls, device: torch.device) -> PagedMemory:
        """The process's only one, put in the place of `bitsandbytes.functional.get_paged`."""
        import bitsandbytes.functional as functional

        if cls._installed is None:
            cls._installed = cls(device, functional.get_paged)
            functional.get_paged = cls._installed.get
        return cls._installed

    @property
    def used_bytes(self) -> int:
        """What the present run has."""
        return sum(buffer.nbytes for buffer in self._used)

    def get(self, *shape: int, dtype=torch.float32, device=None) -> torch.Tensor:
        """`get_paged`, from what an earlier run has left if that fits."""
        for index, buffer in enumerate(self._idle):
            if tuple(buffer.shape) == shape and buffer.dtype == dtype:
                self._used.append(self._idle.pop(index))
                return self._used[-1]
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._device.type == "cuda" and torch.cuda.mem_get_info(self._device)[0] < size + SPARE // 2:
            raise torch.OutOfMemoryError("no room for more managed memory on this GPU")
        self._used.append(self._get_paged(*shape, dtype=dtype, device=device or self._device))
        return self._used[-1]

    def take_back(self) -> None:
        """A run is over: what it had is for the next one."""
        import bitsandbytes.functional as functional

        self._idle += self._used
        self._used = []
        functional.GlobalPageManager.get_instance().paged_tensors.clear()
