import pytest
import torch

from qlora_lab.experiments.paged_memory import PagedMemory


def test_managed_memory_is_used_again():
    made = []

    def get_paged(*shape, dtype, device):
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    paged = PagedMemory(torch.device("cpu"), get_paged)
    first = paged.get(3, 4, dtype=torch.float32)
    second = paged.get(3, 4, dtype=torch.float32)
    assert first is not second
    assert paged.used_bytes == 2 * 48
    paged.take_back()
    assert paged.used_bytes == 0
    assert paged.get(3, 4, dtype=torch.float32) is first
    paged.get(4, 3, dtype=torch.float32)
    assert len(made) == 3
    half = paged.get(3, 4, dtype=torch.float16)  # not the second, which is idle and as long
    assert half.dtype == torch.float16 and len(made) == 4


def test_a_gpu_is_not_asked_for_more_than_it_has(monkeypatch):
    """Half of what is to spare is left: 2 GB."""
    paged = PagedMemory(torch.device("cuda"), lambda *shape, dtype, device: torch.empty(shape, dtype=dtype))
    free = 2_000_000_000 + 4 * 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    assert paged.get(1000).nbytes == 4000
    with pytest.raises(torch.OutOfMemoryError):
        paged.get(1001)


def test_it_stands_in_for_bitsandbytes_once(monkeypatch):
    import bitsandbytes.functional as functional

    monkeypatch.setattr(functional, "get_paged", functional.get_paged)
    monkeypatch.setattr(PagedMemory, "_installed", None)
    paged = PagedMemory.installed(torch.device("cpu"))
    assert functional.get_paged == paged.get
    assert PagedMemory.installed(torch.device("cpu")) is paged and functional.get_paged == paged.get
