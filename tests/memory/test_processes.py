"""Memory of a step that several GPUs take together, predicted and measured; and what goes over the wire."""

import json
import pathlib

import pytest

from qlora_lab.memory import SHAPES, estimate, traffic, trainable_parameters

RECORDS = pathlib.Path(__file__).parents[2] / "data" / "records"
RUNS = [run for path in sorted(RECORDS.glob("cards-*.json")) for run in json.loads(path.read_text())["runs"]]
SHARDED, DATA = ("sharded", "rehearsed"), ("one", "data")


def predicted(run: dict) -> int:
    return estimate(
        SHAPES[run["shape"]],
        rank=run["rank"],
        batch_size=run["batch_size"],
        sequence_length=run["length"],
        gradient_checkpointing=run["gradient_checkpointing"],
        optimizer="adamw_torch",
        processes=run["cards"],
        sharding="full" if run["way"] in SHARDED else "data",
    ).peak_allocated


def name_of(run: dict) -> str:
    return f"{run['way']} {run['shape']} x{run['cards']} batch {run['batch_size']}"


@pytest.mark.parametrize("run", [run for run in RUNS if run["way"] in (*SHARDED, *DATA)], ids=name_of)
def test_predictions_hold_against_steps_measured_on_gpus(run):
    assert predicted(run) == pytest.approx(run["peak_allocated"], rel=0.015)


def test_what_was_measured():
    measured = {(run["way"] in SHARDED, run["shape"], run["cards"]) for run in RUNS}
    assert {(True, "llama-7b", cards) for cards in (1, 2, 4)} <= measured
    assert {(True, "llama-65b", cards) for cards in (1, 2, 4, 8)} <= measured


def test_a_65b_model_fits_two_cards_of_24_gb_and_is_loaded_there():
    runs = [run for run in RUNS if run["shape"] == "llama-65b" and run["cards"] == 2]
    assert runs
    for run in runs:
        assert max(run["peak_allocated"], run["loading_peak"]) < run["cap_gb"] * 1e9 == 24e9


def test_one_gpu_that_plays_one_of_several_needs_what_one_of_them_needs():
    """Which is how eight were measured."""
    key = ("shape", "cards", "batch_size", "length", "rank", "gradient_checkpointing")
    real = {tuple(run[name] for name in key): run for run in RUNS if run["way"] == "sharded"}
    played = [run for run in RUNS if run["way"] == "rehearsed" and tuple(run[name] for name in key) in real]
    assert len(played) == 5
    for run in played:
        with_others = real[tuple(run[name] for name in key)]
        assert run["peak_allocated"] == pytest.approx(with_others["peak_allocated"], rel=0.002)


def test_one_process_alone_holds_what_it_holds_without_sharding():
    """But for one layer, of which it has its own part, which is all of it, and a copy; and the head."""
    shape, settings = SHAPES["llama-7b"], {"batch_size": 4, "optimizer": "adamw_torch"}
    alone = estimate(shape, **settings, processes=1, sharding="full")
    plain = estimate(shape, **settings)
    head = 2 * shape.vocab_size * shape.hidden_size
    assert alone.peak_allocated == plain.peak_allocated + head
    assert alone.parts["gathered"] == head


def test_each_process_has_its_share_and_all_the_scales():
    shape = SHAPES["llama-65b"]
    one, eight = (estimate(shape, processes=n, sharding="full", optimizer="adamw_torch").parts for n in (1, 8))
    for name in ("base weights", "norms", "adapters", "embeddings and head", "optimizer states"):
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-6)
    assert eight["quantization constants"] == one["quantization constants"] > 1e9


def test_more_processes_need_less_each_but_never_less_than_what_all_have():
    shape = SHAPES["llama-65b"]
    peaks = [estimate(shape, processes=n, sharding="full").peak_allocated for n in (1, 2, 4, 8, 16, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] > estimate(shape).parts["quantization constants"]


def test_data_parallel_processes_exchange_adapters_gradients_only():
    """A ring brings each of 4 processes 3/4 of the vector twice."""
    shape = SHAPES["llama-7b"]
    moved = traffic(shape, processes=4, sharding="data", rank=64)
    assert moved == {"weights": 0, "gradients": 2 * 3 / 4 * 4 * trainable_parameters(shape, 64)}


def test_sharded_processes_gather_the_model_twice_in_each_micro_batch():
    """By hand: half a byte a weight of the linears, two bytes of embeddings and norms, four of the adapters."""
    shape = SHAPES["llama-7b"]
    adapters = 4 * trainable_parameters(shape, 64)
    layers = shape.linear_parameters() / 2 + 2 * (shape.norm_parameters() - shape.hidden_size) + adapters
    ends = 2 * (shape.embedding_parameters() + shape.hidden_size)
    once = (2 * layers + ends) / 2
    assert traffic(shape, processes=2, sharding="full") == {"weights": once, "gradients": adapters / 2}
    four = traffic(shape, processes=2, sharding="full", accumulation=4)
    assert four == {"weights": 4 * once, "gradients": 4 * adapters / 2}


def test_nothing_moves_where_there_is_one_process():
    for sharding in ("data", "full"):
        assert set(traffic(SHAPES["llama-7b"], processes=1, sharding=sharding).values()) == {0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"sharding": "ful"}, "did you mean 'full'"),
        ({"sharding": "full", "method": "full"}, "goes with lora and qlora"),
        ({"sharding": "full", "optimizer": "adamw_8bit"}, "32-bit optimizer states"),
        ({"sharding": "full", "preset": "lean"}, "updates after the backward pass"),
    ],
)
def test_bad_input_is_told_in_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        estimate(SHAPES["llama-7b"], **wrong)


def test_a_rank_that_the_processes_cannot_share_is_refused():
    """As `train_qlora` refuses it: A has as many rows."""
    assert estimate(SHAPES["llama-7b"], rank=16, processes=3, sharding="data")
    with pytest.raises(ValueError, match="rank=16 cannot be shared evenly by 3 processes: choose a multiple of them"):
        estimate(SHAPES["llama-7b"], rank=16, processes=3, sharding="full")
