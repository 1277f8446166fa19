"""A model that no process holds whole: started for real, in two and in four processes on the CPU."""

import json
import pathlib
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from qlora_lab import train_qlora
from qlora_lab.errors import UserError
from qlora_lab.finetuning import train
from qlora_lab.memory import from_config, traffic
from qlora_lab.models.loading import load_model
from qlora_lab.models.sharded import (
    CheckpointWeights,
    RandomWeights,
    empty_model,
    fill,
    fill_and_shard,
    in_loading_order,
)
from qlora_lab.training.sharding import is_wanted
from tests.conftest import ended, processes, tiny_config, unwatched_processes
from tests.training.sharded_processes import CONFIG, CPU, RUNS, SETTINGS, batches, empty, in_memory

FSDP = pathlib.Path(__file__).parents[2] / "data" / "accelerate" / "fsdp.yaml"
RUN = "--steps 6 --batch-size 4 --eval-samples 2 --rank 4 --checkpoint-every 2 --compute-dtype float32 --quiet --json"


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer) -> pathlib.Path:
    """A tiny checkpoint whose embeddings and output head are two matrices."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def whole(quantize: bool):
    """The model of `sharded_processes`, whole, in this process."""
    model, unfilled = empty(quantize)
    weights = RandomWeights(CPU, std=0.2)
    for module in in_loading_order(model):
        fill(module, unfilled, weights)
    assert not unfilled
    return model


def test_four_processes_with_a_quarter_each_are_one_run(tmp_path):
    """The same losses and gradient norms, of which rounding changes the last digits only; and a quarter of the memory.

    What is not shared out: the scales of the 4-bit blocks, which are no parameters.
    """
    done = ended(processes(4, "tests.training.sharded_processes", tmp_path))
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"process-{n}.json").read_text()) for n in range(4)]
    for name, (quantize, accumulation, named) in RUNS.items():
        model = whole(quantize)
        bytes_of_all, weights = in_memory(model), sum(not p.requires_grad for p in model.parameters())
        adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        records = train(model, batches(accumulation), progress=False, **SETTINGS, **named)
        for process in seen:
            assert process["processes"] == 4
            assert process[name] == seen[0][name]
            for ours, alone in zip(process[name], records, strict=True):
                assert ours == pytest.approx([alone.loss, alone.gradient_norm], rel=1e-5)
            assert process[f"{name}, empty"] == adapters + 4 * weights  # of each weight one element
            assert process[f"{name}, share"] == process[f"{name}, after"]
            assert process[f"{name}, share"] == bytes_of_all / 4
    expected = traffic(from_config(tiny_config(**CONFIG)), processes=4, sharding="full", rank=8, accumulation=2)
    assert [process["received"] for process in seen] == 4 * [expected]


def test_train_qlora_in_two_processes(untied, tmp_path, capsys):
    """What `accelerate launch --config_file data/accelerate/fsdp.yaml` says is in the surroundings.

    On a file, of which each process draws by itself what to hold out and what to mix in: all must draw the same.
    """
    rows = [{"prompt": f"Say {n}.", "response": str(n), "who": f"customer {n // 2}"} for n in range(40)]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(untied), *RUN.split(), "--data", str(mine), "--split-by", "who"]
    command += ["--replay", "orders", "--replay-share", "0.4"]
    done = ended(processes(2, "qlora_lab.train_qlora", *command, "--output", tmp_path / "two", shard=True))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert train_qlora.main([*command, "--output", str(tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (report["processes"], alone["processes"]) == (2, 1)
    assert (report["sharded"], alone["sharded"]) == (True, False)
    assert report["judged"] == alone["judged"] == {"test": 2}
    assert report["trainable_parameters"] == alone["trainable_parameters"]
    assert report["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for moment in ("before", "after"):
        assert report[moment]["perplexity"] == pytest.approx(alone[moment]["perplexity"], rel=1e-4)
        assert report[moment]["exact_match"] == alone[moment]["exact_match"]
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("two", "one"))
    assert {name: values.shape for name, values in ours.items()} == {name: v.shape for name, v in theirs.items()}
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "one")


def test_accelerate_reads_the_configuration_and_asks_for_sharding(monkeypatch):
    """What `accelerate launch --config_file data/accelerate/fsdp.yaml` puts into its processes' surroundings."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(FSDP), "--num_processes", "3", "-m", "qlora_lab.train_qlora", "--steps", "2"]
    arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    surroundings = prepare_multi_gpu_env(arguments)
    assert arguments.num_processes == 3 and not arguments.cpu
    assert surroundings["FSDP_VERSION"] == "2"
    assert surroundings["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not is_wanted()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", surroundings["ACCELERATE_USE_FSDP"])
    assert is_wanted()


def fingerprint(run: pathlib.Path) -> str:
    from safetensors import safe_open

    with safe_open(run / "adapter/adapter_model.safetensors", "pt") as file:
        return file.metadata()["base_fingerprint"]


def test_one_killed_ends_all_and_another_number_goes_on(untied, tmp_path, capsys):
    """Without torchrun's watching, which may end the others before they have heard of it."""
    output = tmp_path / "run"
    command = ["--model", str(untied), *RUN.split(), "--output", str(output)]
    command[command.index("--steps") + 1] = "20"
    started = unwatched_processes(4, "qlora_lab.train_qlora", *command, shard=True)
    deadline = time.time() + 200
    while not list(output.glob("checkpoints/checkpoint-*2")) and time.time() < deadline:
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    started[1].kill()
    done = [ended(process) for process in started]
    assert [process.returncode for process in done] == [1, -signal.SIGKILL, 1, 1]
    for survivor in (done[0], *done[2:]):
        assert "error: another process of this run has ended" in survivor.stderr
    assert not (output / "report.json").exists()

    resumed = ended(processes(2, "qlora_lab.train_qlora", *command, "--resume", shard=True))
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert 2 <= report["resumed_at"] < 20
    command[command.index(str(output))] = str(tmp_path / "one")
    assert train_qlora.main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    assert report["losses"] == pytest.approx(alone["losses"], rel=1e-3)  # 20 steps of AdamW enlarge what rounding began


def test_a_checkpoint_is_read_as_transformers_reads_it(untied):
    """Each weight, and each code of the quantized ones, bit for bit."""
    for quantize in (False, True):
        model, unfilled = empty_model(tiny_config(tie_word_embeddings=False), quantize, CPU, torch.float32)
        fill(model, unfilled, CheckpointWeights(str(untied)))
        theirs, _ = load_model(untied, "nf4" if quantize else None, device="cpu", compute_dtype=torch.float32)
        other = dict(theirs.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.data.view(torch.uint8).flatten(), other[name].data.view(torch.uint8).flatten())
        for ours, its in zip(model.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(ours, its)


def test_an_empty_model_takes_no_memory():
    model, unfilled = empty_model(tiny_config(), True, CPU, torch.bfloat16)
    assert in_memory(model) < 2_000
    assert len(unfilled) == len(list(model.parameters()))  # the tied head is not filled twice


def test_a_checkpoint_that_lacks_a_weight_or_has_another_shape(untied):
    weights = CheckpointWeights(str(untied))
    with pytest.raises(UserError, match="has no model.layers.9.up_proj.weight"):
        weights("model.layers.9.up_proj.weight", torch.Size([1]))
    with pytest.raises(UserError, match=r"of shape \(64,\), not \(65,\)"):
        weights("model.norm.weight", torch.Size([65]))


def test_processes_that_do_not_know_of_one_another():
    with pytest.raises(UserError, match="start them with accelerate launch"):
        fill_and_shard(*empty(False), RandomWeights(CPU), CPU)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--preset lean --compute-dtype bfloat16 --optimizer adamw_torch", "reads and updates whole parameters"),
        ("--fast", "--fast reads and updates whole parameters"),
        ("--optimizer adamw_8bit", "quantizes its states in blocks"),
        ("--adapter dora", "--adapter dora needs whole weights"),
        ("--init loftq", "--init loftq needs whole weights"),
        ("--merge-aware nf4", "merge_aware merges whole matrices"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused_at_once(untied, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train_qlora.main(["--model", str(untied), "--output", str(tmp_path / "run"), *flags.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
