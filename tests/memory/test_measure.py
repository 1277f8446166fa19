import subprocess
import sys

import pytest
import torch

from qlora_lab.memory.measure import peak_memory_bytes


def test_peak_of_a_cpu_sees_what_was_touched_and_is_not_lowered_by_freeing_it():
    code = """
import torch
from qlora_lab.memory.measure import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
touched = torch.ones(300_000_000)  # 1.2 GB
during = peak_memory_bytes(cpu)
del touched
print(during - before, peak_memory_bytes(cpu) - during)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, later = map(int, done.stdout.split())
    assert grown == pytest.approx(1.2e9, rel=0.1)
    assert abs(later) < 40e6  # Linux counts in batches of pages


@pytest.mark.gpu
def test_peak_of_a_gpu_counts_tensors():
    from qlora_lab.memory.measure import reset_peak

    device = torch.device("cuda")
    reset_peak(device)
    before = torch.cuda.memory_allocated()
    kept = torch.ones(25_000_000, device=device)
    assert peak_memory_bytes(device) - before == pytest.approx(kept.nbytes, abs=2 * 2**20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the recorder would record")
def test_recorder_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "-m", "qlora_lab.memory.record"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no GPU: this records training steps on one\n")
