"""Where a process of 🤗 Accelerate trains. What several of them compute together: test_sharding, test_train_qlora."""

import pytest
import torch

from qlora_lab.training.processes import on_cpu


@pytest.mark.parametrize(
    ("has_gpu", "asked", "expected"),
    [(True, None, False), (True, "false", False), (True, "true", True), (False, None, True), (False, "false", True)],
)
def test_the_cpu_is_trained_on_without_a_gpu_or_where_the_launcher_asks(monkeypatch, has_gpu, asked, expected):
    """`accelerate launch --cpu` hands its processes ACCELERATE_USE_CPU=true."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    assert on_cpu() is expected
