import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.experiments import memory_steps as record
from qlora_lab.experiments.allocator_history import live_at_peak
from qlora_lab.experiments.memory_steps import MasterWeights, Record, Setting, measure
from qlora_lab.finetuning import PRESETS, build_random, collate, train_steps
from qlora_lab.memory import measure_memory
from qlora_lab.memory import measuring as measure_module
from qlora_lab.memory import meter as meter_module
from qlora_lab.memory.meter import Meter, Phase, peak_memory_bytes
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES, Shape

MOMENTS = ("forward", "backward", "update")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the recorder would record")
def test_recorder_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "-m", "qlora_lab.experiments", "memory"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no GPU: this records training steps on one\n")


# --------------------------------------------------------------------------------------------------- phases and history


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


def test_history_is_replayed_up_to_its_peak():
    def entry(action: str, address: int, size: int, *frames: tuple[str, int, str]) -> dict:
        keys = ("filename", "line", "name")
        return {
            "action": action,
            "addr": address,
            "size": size,
            "frames": [dict(zip(keys, f, strict=True)) for f in frames],
        }

    linear = ("/x/torch/nn/modules/linear.py", 100, "forward")
    layer = ("/x/peft/tuners/lora/bnb.py", 221, "forward")
    trace = [
        entry("segment_alloc", 0, 1 << 20),
        entry("alloc", 0, 512, linear, layer),
        entry("alloc", 512, 512, linear, layer),
        entry("alloc", 1024, 2048),
        entry("free_requested", 512, 512),
        entry("free_completed", 512, 512),
        entry("alloc", 512, 256, layer),
        entry("free_requested", 1024, 2048),
    ]
    peak, blocks = live_at_peak(trace)
    assert peak == 512 + 512 + 2048
    assert blocks == {("lora/bnb.py:221 forward", 512): 2, ("C++", 2048): 1}


# ------------------------------------------------------------------------------------------------------------- recorder


RUNS = [("full", None), *((method, preset) for method in ("qlora", "lora") for preset in (None, *PRESETS))]


@pytest.mark.parametrize(("method", "preset"), RUNS)
def test_a_run_is_measured_phase_by_phase(method, preset, trained):
    recipe = replace(PRESETS[preset], optimizer="adamw_torch") if preset else None
    knobs = {"gradient_checkpointing": False, "rank": 4, "targets": ("q_proj", "v_proj"), "optimizer": "adamw_torch"}
    setting = Setting("tiny", method, 2, 16, **knobs, adapter_dtype="bfloat16" if method == "lora" else "float32")
    result = measure(setting, torch.device("cpu"), recipe, shape=Shape(64, 192, 2, 4, 2, 97))
    moments = [f"{step}: {moment}" for step in ("first step", "steady step") for moment in MOMENTS]
    assert list(result["phases"]) == ["load", "adapter", *moments]
    of_steps = [result["phases"][moment] for moment in moments]
    measured = result["measured"]
    assert measured["peak_allocated"] == max(phase["peak_allocated"] for phase in of_steps)
    assert measured["tokens_per_second"] == pytest.approx(2 * 16 / measured["step_seconds"])
    assert len(measured["losses"]) == 3
    json.dumps(result)

    [settings] = trained
    assert settings["bits"] == (4 if method == "qlora" else 16)
    assert settings["ids"] == (2, 16) and settings["steps"] == 3
    if method != "full":
        assert settings["rank"] == {4} and settings["targets"] == {"q_proj", "v_proj"}
    fp32 = (recipe.adapter_dtype if recipe else setting.adapter_dtype) == "float32"
    assert settings["adapter_dtype"] == {torch.float32 if fp32 else torch.bfloat16}
    assert settings["compute_dtype"] == (torch.bfloat16 if fp32 else torch.float32)  # fp32 under autocast, or bf16
    assert settings["gradient_checkpointing"] == (preset is not None)
    assert settings["loss_chunk"] == (128 if preset == "lean" else None)
    assert settings["update_in_backward"] == (preset in ("in-backward", "lean"))


def test_the_peak_is_that_of_the_steps_and_not_of_loading(monkeypatch):
    peaks = {"load": (900, 950), "adapter": (800, 850), "first step: forward": (500, 600)}
    peaks |= {"first step: update": (300, 640), "steady step: backward": (700, 700)}

    class Pretended(Meter):
        def mark(self, name, wait=True):
            self.phases[name] = Phase(0, *peaks.get(name, (100, 100)), 1.0)

    monkeypatch.setattr(record, "Meter", Pretended)
    setting = Setting("tiny", "lora", 1, 4, rank=4, optimizer="adamw_torch")
    measured = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97))["measured"]
    assert (measured["peak_allocated"], measured["peak_reserved"]) == (700, 700)


def test_a_card_leaves_what_the_context_does_not_take(monkeypatch):
    """By hand: 12 GB less a context of 0.5 GB, of a GPU of 80 GB."""
    device, fractions = torch.device("cuda", 0), []
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    with pytest.raises(ZeroDivisionError), record.card_of(12, device):
        assert fractions == [(11.5 / 80, device)]
        raise ZeroDivisionError
    assert fractions[1:] == [(1.0, device)]  # whatever happens


def test_full_fine_tuning_in_mixed_precision_is_measured():
    setting = Setting("tiny", "full", 2, 16, optimizer="adamw_torch", full_precision="mixed")
    losses = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97), steps=6)["measured"]["losses"]
    plain = replace(setting, full_precision="float32")
    beside = measure(plain, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97), steps=6)["measured"]["losses"]
    assert losses == pytest.approx(beside, rel=0.01) and losses != beside


def test_master_weights_collect_what_bf16_alone_would_round_away():
    """The same gradients to AdamW in fp32, and in bf16 with and without master weights: 100 steps of 0.00001."""
    start, generator = torch.full((2, 3), 0.02, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    with_masters, alone, exact = (
        torch.nn.Parameter(start.to(dtype, copy=True)) for dtype in 2 * [start.dtype] + [torch.float32]
    )
    optimizers = [torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0) for p in (with_masters, alone, exact)]
    optimizers[0] = MasterWeights(optimizers[0])
    for _ in range(100):
        gradient = (1 + 0.1 * torch.randn(2, 3, generator=generator)).bfloat16()
        for parameter, optimizer in zip((with_masters, alone, exact), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(alone, start)
    assert torch.equal(with_masters, exact.bfloat16())
    assert (exact < 0.0191).all() and with_masters.grad is None


def test_running_out_of_memory_is_a_result(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")

    monkeypatch.setattr(record, "train_steps", full)
    setting = Setting("tiny", rank=4, optimizer="adamw_torch")
    result = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97))
    assert result["out_of_memory"]["after"] == "adapter"
    assert result["out_of_memory"]["message"].endswith("20.00 MiB.")
    assert "measured" not in result


def test_managed_memory_is_lent_again():
    made = []

    def get_paged(*shape, dtype, device):
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    lender = record._Lender(torch.device("cpu"), get_paged)
    first = lender.lend(3, 4, dtype=torch.float32)
    second = lender.lend(3, 4, dtype=torch.float32)
    assert first is not second
    assert lender.lent_bytes == 2 * 48
    lender.take_back()
    assert lender.lent_bytes == 0
    assert lender.lend(3, 4, dtype=torch.float32) is first
    lender.lend(4, 3, dtype=torch.float32)
    assert len(made) == 3
    half = lender.lend(3, 4, dtype=torch.float16)  # not the second, which is idle and as long
    assert half.dtype == torch.float16 and len(made) == 4


def test_record_is_written_after_each_run_and_taken_up_again(tmp_path, capsys):
    path = tmp_path / "memory-x.json"
    key = {"shape": "llama-7b", "preset": "lean", "card_gb": 5}
    first = Record(path, {"device": "x", "date": "2026-11-24"})
    assert first.wants("caps", key, "llama-7b")
    first.add("caps", {**key, "out_of_memory": {"after": "load", "message": "no"}})
    again = Record(path, {"device": "x", "date": "2026-11-25"}, only=["llama-7b"])
    again.read(path)
    again.read(path)
    assert again.about["date"] == "2026-11-24, 2026-11-25"
    assert not again.wants("caps", key, "llama-7b")
    assert not again.has("caps", key, "measured")
    assert again.wants("caps", {**key, "card_gb": 6}, "llama-7b")
    assert not again.wants("caps", {**key, "shape": "llama-65b"}, "llama-65b")
    with pytest.raises(record.OutOfTime):
        Record(path, {}, limit_seconds=-1).wants("caps", key, "llama-7b")
    assert "lean" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    kept = Record(tmp_path / "memory-x.json", {"device": "x", "date": "2026-11-24"})
    kept.add("runs", {"shape": "llama-7b", "skipped": "needs 90.0 GB"})
    before = kept.path.read_text()
    monkeypatch.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        kept.add("runs", {"shape": "llama-13b", "skipped": "needs 90.0 GB"})
    assert kept.path.read_text() == before


def test_settings_kept_aside_are_not_in_the_grid():
    assert not set(record.HELD_OUT) & ({*record.GRID, *record.EXPLAINED})
    assert len(set(record.GRID)) == len(record.GRID)


def test_lists_are_worked_through(tmp_path, monkeypatch):
    """With a pretended GPU: what does not fit is skipped, and the search for a card ends at the first that trains."""
    asked = []

    def pretended(setting, device, preset=None, **_):
        asked.append((setting, preset))
        phases = {"load": {"allocated": 1}}
        if setting.shape == "llama-33b" and caps and caps[-1] < 24:
            return {"out_of_memory": {"after": "load", "message": "no"}, "phases": phases}
        got = {"peak_allocated": 1, "peak_reserved": 1, "managed_bytes": 1, "step_seconds": 1.0}
        return {"measured": got, "phases": phases}

    @contextlib.contextmanager
    def card(gigabytes, device):
        caps.append(gigabytes)
        yield

    caps: list[int] = []
    monkeypatch.setattr(record, "measure", pretended)
    monkeypatch.setattr(record, "card_of", card)
    monkeypatch.setattr(record, "_expandable_segments", lambda device: "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [[]]})
    device = torch.device("cuda", 0)
    kept = Record(tmp_path / "memory-x.json", {"device": "x", "date": "2026-11-24"})
    record.run_grid(kept, device)
    record.run_caps(kept, device)
    record.run_explain(kept, device)
    written = json.loads(kept.path.read_text())
    assert len(written["runs"]) == len(record.GRID) + len(record.HELD_OUT)
    # 50 GB are free, of which 4 are to spare
    fits = [s.predicted() for s in (*record.GRID, *record.HELD_OUT)]
    fits = [p.peak_allocated + p.outside["paged optimizer states"] <= 46e9 for p in fits]
    assert ["skipped" not in run for run in written["runs"]] == fits and len(set(fits)) == 2
    smallest = {(r["shape"], r["preset"]): r["card_gb"] for r in written["caps"] if "measured" in r}
    assert len(smallest) == 4 * len(PRESETS)
    assert smallest["llama-33b", "lean"] == 24
    assert smallest["llama-65b", "standard"] == 40
    assert smallest["llama-7b", "lean"] == 5
    assert smallest["llama-13b", "lean"] == 8  # it holds 7.38 GB of 7.5, since one of two embeddings is elsewhere
    assert smallest["llama-7b", "standard"] == 6  # it holds 4.505 GB, and the context leaves 4.5 of 5
    assert len(written["explained"]) == len(record.EXPLAINED) + 1

    before = len(asked)
    again = Record(kept.path, {"device": "x", "date": "2026-11-24"})
    again.read(kept.path)
    for run in (record.run_grid, record.run_caps, record.run_explain):
        run(again, device)
    assert len(asked) == before


def test_every_recorded_run_is_compared(capsys):
    assert record.main(["--compare"]) == 0
    printed = capsys.readouterr().out
    for word in ("development: ", "held out: 16 runs", "preset: ", "unexplained", "tensors alive"):
        assert word in printed


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
    seen = []

    def spy(model, batches, **settings):
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        [rows] = next(iter(batches))
        batch = collate(rows, 0)
        seen.append(
            {
                **settings,
                "bits": 4 if any(hasattr(p, "quant_state") for p in model.parameters()) else 16,
                "rank": {p.shape[0] for name, p in adapters.items() if "lora_A" in name},
                "targets": {name.split(".lora_")[0].rpartition(".")[2] for name in adapters},
                "adapter_dtype": {p.dtype for p in adapters.values()},
                "ids": batch["input_ids"].shape,
                "learned": (batch["labels"] != -100).sum().item(),
            }
        )
        return train_steps(model, batches, **settings)

    monkeypatch.setattr("qlora_lab.memory.measuring.train_steps", spy)
    monkeypatch.setattr(record, "train_steps", spy)
    return seen


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
