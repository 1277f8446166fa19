"""What dive F's folded cells compute, and what its first exercise says about a card."""

import pytest
import torch

from qlora_lab.classroom.checks import check_slowdown
from qlora_lab.classroom.lessons.dive_f import machinery


def test_traffic_is_what_operators_read_and_write():
    x = torch.ones(10, dtype=torch.float32)
    assert machinery.count_traffic(lambda a: a + a, x) == (1, 10 * (4 + 4 + 4))  # both arguments are read
    assert machinery.count_traffic(lambda a: a[2:].view(2, 4), x) == (0, 0)
    assert machinery.count_traffic(lambda a: (2 * a).bfloat16(), x) == (2, 10 * (4 + 4) + 10 * (4 + 2))


def test_a_step_takes_as_long_to_launch_as_to_run_where_the_lines_cross():
    record = machinery.read_record("step")
    launching, running = machinery.predict_ms(record, "standard", machinery.crossing(record, 40.0), 40.0)
    assert launching == pytest.approx(running) == pytest.approx(12_717 * 0.04)
    assert machinery.predict_ms(record, "fused, in one graph", 512, 40.0)[0] == 0


def test_groups_and_waiting_are_the_whole_step():
    record = machinery.read_record("step")
    parts = machinery.parts_of(record, "standard", 4)
    assert sum(parts.values()) == pytest.approx(697.79, abs=0.01)
    busy = machinery.find(record["profiles"], "standard", 4)["busy_milliseconds"]
    assert sum(parts.values()) - parts["waiting"] == pytest.approx(busy, abs=0.02)  # two kernels overlap a little


def test_a_small_correction_arrives_only_if_it_is_added_first():
    y = 1 + 2**-7 * torch.arange(8) / 8
    shares = machinery.arriving(y, torch.full((8,), 2**-10))
    assert shares == {"added, then rounded": 1.0, "rounded, then added": 0.0}


def slowdown(tokens, n_in, n_out, rate, bandwidth):
    moved = 2 * (n_in * n_out + tokens * (n_in + n_out))
    return 1 + 2.5625 * n_in * n_out / bandwidth / max(2 * tokens * n_in * n_out / rate, moved / bandwidth)


def test_what_a_card_is_told():
    """A T4: 4096² weights at 2.5625 bytes and 320 GB/s are 134 µs; their product with 2,048 tokens is 1,057 µs."""
    t4 = {"tokens": 2048, "rate": 65e12, "bandwidth": 320e9}
    message = check_slowdown.verdict(slowdown, t4).message
    assert "takes 1.13 times as long" in message and "From about 2,603 tokens on" in message
    slow_memory = t4 | {
        "bandwidth": 30e9
    }  # with 24,192 tokens its product still moves bytes for longer than it computes
    assert "From about 24,192 tokens on" in check_slowdown.verdict(slowdown, slow_memory).message
