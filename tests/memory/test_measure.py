import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import build_random
from qlora_lab.memory import measure_memory
from qlora_lab.memory import measuring as measure_module
from qlora_lab.memory import meter as meter_module
from qlora_lab.memory.meter import Meter, Phase, peak_memory_bytes
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES, Shape
from tests.conftest import watch_train_steps


def test_peak_of_a_cpu_sees_what_was_touched_and_is_not_lowered_by_freeing_it():
    code = """
import torch
from qlora_lab.memory.meter import peak_memory_bytes
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
    from qlora_lab.memory.meter import reset_peak

    device = torch.device("cuda")
    reset_peak(device)
    before = torch.cuda.memory_allocated()
    kept = torch.ones(25_000_000, device=device)
    assert peak_memory_bytes(device) - before == pytest.approx(kept.nbytes, abs=2 * 2**20)


# -------------------------------------------------------------------------------------------------------------- phases


def test_meter_joins_marks_of_one_name():
    meter = Meter(torch.device("cpu"))
    kept = torch.ones(10_000_000)
    first = meter.mark("load")
    second = meter.mark("load")
    assert meter.phases["load"].seconds == pytest.approx(first.seconds + second.seconds)
    assert meter.phases["load"].peak_allocated >= kept.nbytes
    assert set(meter.as_dict()["load"]) == {"allocated", "peak_allocated", "peak_reserved", "seconds"}


def test_each_phase_has_its_own_seconds_and_its_own_peak(monkeypatch):
    """A pretended device: the clock and the peak are set by hand."""
    clock, peak, bytes_now = [10.0], [0], [0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(meter_module, "memory_bytes", lambda device: bytes_now[0])
    monkeypatch.setattr(meter_module, "peak_memory_bytes", lambda device: peak[0])
    monkeypatch.setattr(meter_module, "reset_peak", lambda device: peak.__setitem__(0, bytes_now[0]))
    peak[0] = 1000  # of something before
    meter = Meter(torch.device("cpu"))

    def work(name, seconds, highest, left):
        clock[0] += seconds
        peak[0], bytes_now[0] = max(peak[0], highest), left
        return meter.mark(name)

    assert work("load", 2.0, highest=500, left=300) == Phase(300, 500, 0, 2.0)
    assert work("step", 1.0, highest=400, left=350) == Phase(350, 400, 0, 1.0)
    assert work("step", 4.0, highest=370, left=310) == Phase(310, 370, 0, 4.0)
    assert meter.phases == {"load": Phase(300, 500, 0, 2.0), "step": Phase(310, 400, 0, 5.0)}


def test_phases_join_to_the_larger_peak_and_the_later_end():
    assert Phase(1, 9, 3, 1.0) | Phase(2, 5, 4, 0.5) == Phase(2, 9, 4, 1.5)


# ------------------------------------------------------------------------------------------------------- measure_memory


def test_the_memory_room_loads_neither_torch_nor_transformers():
    code = """
import sys
import qlora_lab.memory as memory
assert not {"torch", "transformers"} & set(sys.modules)
assert memory.estimate(memory.SHAPES["llama-7b"]).peak_allocated > 5e9
assert memory.trainable_parameters(memory.SHAPES["llama-7b"], 64) == 159_907_840
assert not {"torch", "transformers"} & set(sys.modules)
from qlora_lab.memory import MeasuredMemory, MemoryBreakdown, measure_memory
assert callable(measure_memory) and callable(memory.estimate)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def trained(monkeypatch) -> list[dict]:
    """What `train_steps` was given, each time."""
    return watch_train_steps(monkeypatch, "qlora_lab.memory.measuring")


@pytest.mark.parametrize("source", ["shape", "folder"])
@pytest.mark.parametrize("use_qlora", [True, False])
def test_measure_memory(use_qlora, source, monkeypatch, tiny_folder, trained):
    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 192, 2, 4, 2, 97))
    name = "tiny" if source == "shape" else str(tiny_folder)
    knobs = {"rank": 4, "targets": ["q_proj", "v_proj"], "batch_size": 3, "sequence_length": 16}
    checkpointing = use_qlora
    got = measure_memory(name, use_qlora, **knobs, gradient_checkpointing=checkpointing, device="cpu")
    assert got.device == "cpu"
    assert 0 < got.loaded <= got.peak
    [settings] = trained
    assert settings["bits"] == (4 if use_qlora else 16)
    assert settings["rank"] == {4} and settings["targets"] == {"q_proj", "v_proj"}
    assert settings["ids"] == (3, 16) and settings["learned"] == 3 * 15  # the first is no target
    assert settings["gradient_checkpointing"] == checkpointing
    assert settings["optimizer"] == "adamw_torch" and settings["steps"] == 2


def test_the_second_step_is_measured(monkeypatch):
    """On the way to it no peak counts: the optimizer's states come with the first step."""
    seen = []

    def pretended(*_, **__):
        for step in (1, 2):
            seen.append(f"step {step}")
            yield step
        seen.append("a third step")

    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 192, 2, 4, 2, 97))
    monkeypatch.setattr("qlora_lab.memory.measuring.train_steps", pretended)
    monkeypatch.setattr(measure_module, "reset_peak", lambda device: seen.append("reset"))
    monkeypatch.setattr(measure_module, "peak_memory_bytes", lambda device: seen.append("peak") or 7)
    assert measure_memory("tiny", False, rank=4, device="cpu").peak == 7
    assert seen == ["step 1", "reset", "step 2", "peak"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_qlora", [True, False])
def test_the_room_that_is_asked_for_is_what_the_weights_take(use_qlora, dtype, monkeypatch, trained):
    """Of a model that is really built: 4-bit weights and their constants as they are, the rest in the compute dtype."""
    shape = Shape(64, 192, 2, 4, 2, 97)
    monkeypatch.setitem(SHAPES, "tiny", shape)
    monkeypatch.setattr("qlora_lab.memory.measuring.pick_compute_dtype", lambda device: dtype)
    model = build_random(shape, "nf4" if use_qlora else None, device="cpu", compute_dtype=dtype)
    weights = sum(p.nbytes + quant_state_bytes(p) for p in model.parameters())
    for free, fits in ((weights, True), (weights - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        expected = contextlib.nullcontext() if fits else pytest.raises(UserError, match="^tiny needs a GPU")
        with expected:
            measure_memory("tiny", use_qlora, rank=1, sequence_length=2, device="cpu")
    assert len(trained) == 1


def quant_state_bytes(parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    second = state.state2
    return sum(part.nbytes for part in (state.absmax, state.code, state.offset, second.absmax, second.code))


@pytest.mark.gpu
def test_measured_on_a_gpu_is_what_is_predicted():
    for use_qlora in (True, False):
        got = measure_memory("smollm2-360m", use_qlora, device="cuda")
        predicted = estimate(SHAPES["smollm2-360m"], "qlora" if use_qlora else "lora")
        assert got.peak == pytest.approx(predicted.peak_allocated, rel=0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_name": "lama-7b"}, "unknown model 'lama-7b': did you mean llama-7b"),
        ({"model_name": "Qwen2.5-7B"}, "unknown model 'Qwen2.5-7B': did you mean qwen2.5-7b"),
        ({"model_name": "Qwen/Qwen2.5-7B"}, "cannot load 'Qwen/Qwen2.5-7B': "),  # a hub's: there is none here
        ({"model_name": "./smollm2-135m"}, "no such folder: ./smollm2-135m"),
        ({"model_name": "smollm2-135m-instuct"}, "unknown model .*did you mean smollm2-135m-instruct"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"sequence_length": 1}, "sequence_length=1: must be at least 2"),
        ({"model_name": "tiny", "targets": ["qproj"]}, "the model has no linear layer named 'qproj'"),
    ],
)
def test_measure_memory_tells_what_is_wrong(wrong, message, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 192, 2, 4, 2, 97))
    with pytest.raises(UserError, match=f"^{message}"):
        measure_memory(**wrong, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_in_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="^no GPU: torch sees none here"):
        measure_memory(device="cuda")
    free = type("Free", (), {"available": 10**9})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("qlora_lab.memory.measuring.pick_compute_dtype", lambda device: torch.float32)
    # by hand: 6.48e9 weights at 4.127 bits, twice 32,000 x 4,096 embeddings and head in 4 bytes -> 3.34 + 1.05 GB
    with pytest.raises(UserError, match=r"^llama-7b needs a GPU: its weights take 4.4 GB, and 1.0 GB are free here$"):
        measure_memory("llama-7b")
