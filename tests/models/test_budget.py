"""A plan by budget: against every possible plan, what it costs, what is refused, and that transformers loads it so."""

import itertools
import json
import re

import pytest

from qlora_lab.errors import UserError
from qlora_lab.models.__main__ import main
from qlora_lab.models.budget import best_for_their_bytes, plan, read_gains
from qlora_lab.models.compatibility import preflight

DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture(scope="module")
def looked(tiny_folder):
    return preflight(str(tiny_folder))


@pytest.fixture
def gains(looked):
    """Of no layer but the two down projections, and less than none of one that is small."""
    found = dict.fromkeys((w.name.removesuffix(".weight") for w in looked.weights if w.quantized), 0.0)
    return found | {DOWN.format(0): 0.2, DOWN.format(1): 0.1, "model.layers.0.self_attn.k_proj": -0.3}


def record_of(folder, model, gains):
    """A record as `experiments sensitivity` writes it."""
    kept = {name: {"prose": 3.0 - gain, "x": 9.0} for name, gain in gains.items()}
    losses = {"as it is": {"prose": 2.0}, "all in 4 bits": {"prose": 3.0, "x": 9.0}}
    file = folder / "sensitivity-x.json"
    file.write_text(json.dumps({"settings": {"model": model, "chosen on": "prose"}, "losses": losses, "kept": kept}))
    return file


def test_what_is_chosen_gains_nearly_as_much_as_the_best_of_all_plans():
    """Greedy may lose what the one layer would gain that just did not fit; in this much room it loses nothing."""
    extra = {"a": 2, "b": 3, "c": 8, "d": 1}
    gains = {"a": 2.0, "b": 4.0, "c": 5.0, "d": -1.0}
    for room in range(10):
        chosen = best_for_their_bytes(extra, gains, room)
        every = [names for n in range(5) for names in itertools.combinations(extra, n)]
        best = max(sum(gains[k] for k in names) for names in every if sum(extra[k] for k in names) <= room)
        assert sum(extra[k] for k in chosen) <= room
        assert best - sum(gains[k] for k in chosen) < 1e-9
    assert best_for_their_bytes(extra, gains, 100) == ("b", "a", "c")


def test_a_plan_costs_what_it_says(looked, gains):
    extra = {w.name.removesuffix(".weight"): 2 * w.numel - w.nbytes for w in looked.weights if w.quantized}
    one = plan(looked, gains, looked.nbytes + extra[DOWN.format(0)])
    assert one.kept == (DOWN.format(0),) and one.nbytes == one.budget
    assert plan(looked, gains, one.budget - 1).kept == ()
    both = plan(looked, gains, 1e9)
    assert both.kept == (DOWN.format(0), DOWN.format(1)) and both.gain == pytest.approx(0.3)
    assert both.least == looked.nbytes and both.most == looked.nbytes + sum(extra.values())
    assert both.most == pytest.approx(looked.dense_bytes, rel=1e-3)


def test_transformers_keeps_what_the_plan_says(tiny_folder, looked, gains):
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = plan(looked, gains, 1e9)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=chosen.skip_modules
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=settings, device_map={"": "cpu"}, trust_remote_code=False
    )
    in_4_bits = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert in_4_bits == gains.keys() - set(chosen.kept)
    assert chosen.skip_modules[0] == "lm_head" and not isinstance(model.lm_head, Linear4bit)


def test_the_command_tells_the_plan(tiny_folder, tmp_path, looked, gains, capsys):
    file = record_of(tmp_path, str(tiny_folder), gains)
    assert read_gains(file, str(tiny_folder)) == pytest.approx(gains)
    assert main(["preflight", str(tiny_folder), "--gains", str(file), "--budget", "1GB"]) == 0
    told = capsys.readouterr().out
    assert "Kept in 16 bits: 2 of 14 linear layers (2 down_proj)" in told
    assert "fall by about 0.3000 nats" in told and f"'lm_head', '{DOWN.format(0)}'" in told
    assert main(["preflight", str(tiny_folder), "--gains", str(file), "--budget", f"{looked.nbytes + 9}"]) == 0
    assert "no layer that gains anything fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("1KB", r"the budget is 0.0 MB, and the model takes .* MB with all its linear layers in 4 bits: give more"),
        ("5 apples", "'5 apples' is not a size such as 5GB"),
        ("-3GB", "'-3GB' is not a size"),
    ],
)
def test_an_impossible_budget_is_told(tiny_folder, tmp_path, gains, budget, told, capsys):
    file = record_of(tmp_path, str(tiny_folder), gains)
    try:
        code = main(["preflight", str(tiny_folder), "--gains", str(file), f"--budget={budget}"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert re.search(told, capsys.readouterr().err)


def test_gains_of_nothing_or_of_another_model_are_refused(tmp_path, looked, gains):
    with pytest.raises(UserError, match=r"nobody has measured other/model yet: run `python -m qlora_lab.experiments"):
        read_gains(None, "other/model")
    file = record_of(tmp_path, "one/model", gains)
    with pytest.raises(UserError, match="has the gains of one/model, not of other/model"):
        read_gains(file, "other/model")
    file.write_text("{}")
    with pytest.raises(UserError, match="is no record of `python -m qlora_lab.experiments sensitivity`"):
        read_gains(file, "one/model")
    with pytest.raises(UserError, match="cannot read the gains in"):
        read_gains(tmp_path / "none.json", "one/model")
    with pytest.raises(UserError, match="of another model: they have none for model.layers.0.mlp.down_proj"):
        plan(looked, {}, 1e9)
