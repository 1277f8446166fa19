"""Merged checkpoints, and all that is refused: one sentence, and nothing left under the final name."""

import errno
import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_lab.adapters.files import load_lora
from qlora_lab.adapters.lora import lora_layers
from qlora_lab.adapters.merging import merge, unload
from qlora_lab.adapters.quantized_linear import dequantize_linears
from qlora_lab.export import __main__ as command
from qlora_lab.export import checkpoint, new_folder
from qlora_lab.export.merged_weights import MergedWeights, checkpoint_index
from qlora_lab.export.trained_run import read_run
from qlora_lab.memory.meter import memory_bytes, peak_memory_bytes
from qlora_lab.models.loading import load_model
from tests.export.conftest import WORDS, family_config, make_run, trained_model


@pytest.fixture
def run(small_tokenizer, tmp_path):
    return make_run(tmp_path, family_config("llama tied"), small_tokenizer)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(17, 49)[None]).logits[0]


@pytest.mark.parametrize(("family", "method"), [("llama tied", "qlora"), ("qwen2", "lora"), ("gemma3", "qlora")])
def test_a_merged_checkpoint_answers_as_the_trained_model(family, method, small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config(family), small_tokenizer, method)
    command.export(read_run(run), tmp_path / "out", "merged", "f32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(trained_model(run)), rtol=1e-4, atol=1e-4)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config")
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "base"))
    assert theirs.chat_template == ours.chat_template and theirs.chat_template
    assert theirs("Hi <|im_end|> 25")["input_ids"] == ours("Hi <|im_end|> 25")["input_ids"]
    assert merged.generation_config.eos_token_id == 2


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_other_adapters_are_merged_as_peft_computes_them(kind, method, small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, method, kind=kind)
    command.export(read_run(run), tmp_path / "out", "merged", "f32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(trained_model(run)), rtol=1e-4, atol=1e-4)


def test_dora_is_merged_as_our_layers_merge_it(small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, kind="dora")
    model, _ = load_model(str(tmp_path / "base"), "nf4", device="cpu", compute_dtype=torch.float32)
    state = unload(merge(load_lora(dequantize_linears(model), run / "adapter"))).state_dict()
    weights = MergedWeights(read_run(run))
    for name in weights.shapes:
        torch.testing.assert_close(weights[name], state[name], rtol=1e-5, atol=1e-6)


def test_it_is_the_merge_that_the_lesson_makes(run, tmp_path):
    """Dequantize, load_lora, merge, unload on the model as a whole. Bit for bit."""
    model, _ = load_model(str(tmp_path / "base"), "nf4", device="cpu", compute_dtype=torch.float32)
    load_lora(dequantize_linears(model), run / "adapter")
    layers = list(lora_layers(model))
    state = unload(merge(model)).state_dict()
    weights = MergedWeights(read_run(run))
    assert {f"{name}.weight" for name in layers} == weights.adapted
    assert state.keys() - weights.shapes.keys() == {"lm_head.weight"}  # tied
    for name in weights.shapes:
        assert torch.equal(weights[name], state[name]), name


def test_shards_hold_what_they_may_and_load_as_one(run, tmp_path):
    weights = MergedWeights(read_run(run))
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    assert checkpoint.write_checkpoint(weights, tmp_path / "one", torch.bfloat16) == ["model.safetensors"]
    files = checkpoint.write_checkpoint(weights, tmp_path / "many", torch.bfloat16, shard_bytes=50_000)
    assert len(files) > 2
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 50_000 or len(held) == 1
    assert sum(t.nbytes for t in whole.values()) == checkpoint.checkpoint_bytes(weights, torch.bfloat16)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))
    assert set(checkpoint_index(tmp_path / "many")) == set(whole)


def test_a_tensor_is_forgotten_before_the_next_is_made(small_tokenizer, tmp_path):
    """Matrices of 4 MB in a file of 76: what it takes to write it is a few of them."""
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 256, "num_hidden_layers": 3}
    run = make_run(tmp_path, family_config("llama tied", **wide), small_tokenizer, "lora")
    weights = MergedWeights(read_run(run))
    (tmp_path / "out").mkdir()
    refs = pathlib.Path("/proc/self/clear_refs")
    if not os.access(refs, os.W_OK):
        pytest.skip("the peak of a process is begun anew on Linux only")
    before = memory_bytes(torch.device("cpu"))
    refs.write_text("5")  # the peak begins anew
    assert peak_memory_bytes(torch.device("cpu")) < before + 10e6
    (name,) = checkpoint.write_checkpoint(weights, tmp_path / "out", torch.float32)
    size = (tmp_path / "out" / name).stat().st_size
    assert size > 70e6 and peak_memory_bytes(torch.device("cpu")) - before < 0.5 * size


def test_the_header_is_safetensors_own(run, tmp_path):
    """Same tensors, dtypes, shapes and metadata; and the first tensor begins at a multiple of 8 bytes."""
    weights = MergedWeights(read_run(run))
    checkpoint.write_checkpoint(weights, tmp_path, torch.float16)
    tensors = {name: weights[name].half() for name in weights.shapes}
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == list(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    written = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(written[:8], "little")
    theirs = save(tensors, {"format": "pt"})
    assert length % 8 == 0 and len(written) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    header = json.loads(theirs[8 : 8 + int.from_bytes(theirs[:8], "little")])
    for name, entry in json.loads(written[8 : 8 + length]).items():
        own = {key: value for key, value in header[name].items() if key != "data_offsets"}  # theirs are sorted by name
        assert {key: value for key, value in entry.items() if key != "data_offsets"} == own


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(capsys, run, *arguments: str) -> str:
    """Run the command line; return its one sentence. The output folder must not be there, nor a part of it."""
    to = run.parent / "out"
    was = to.exists()
    capsys.readouterr()  # transformers' bars, from making models
    assert command.main([str(run), "--to", str(to), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert to.exists() == was and not to.with_name("out.part").exists()
    return said.err


def test_an_existing_folder_is_left_alone(run, capsys):
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine")
    assert "is there already" in refused(capsys, run)
    assert (run.parent / "out" / "mine.txt").read_text() == "mine"


def test_what_is_no_run_is_refused(run, capsys):
    assert "is no run of train_qlora" in refused(capsys, run.parent / "base")
    shutil.rmtree(run / "adapter")
    assert "has no adapter: finish the run" in refused(capsys, run)
    (run / "run.json").write_text('{"model"')
    assert "run.json is damaged" in refused(capsys, run)


def test_another_base_is_refused(run, capsys):
    weights = load_file(run.parent / "base" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, run.parent / "base" / "model.safetensors", {"format": "pt"})
    assert "was trained on another base" in refused(capsys, run)


def test_a_base_of_another_size_is_refused(small_tokenizer, run, capsys):
    other = make_run(run.parent / "other", family_config("llama tied", hidden_size=128), small_tokenizer)
    shutil.copytree(other / "adapter", run / "adapter", dirs_exist_ok=True)
    assert "is for another base: its model.layers.0" in refused(capsys, run)


def test_an_incomplete_checkpoint_is_refused(run, capsys):
    weights = load_file(run.parent / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, run.parent / "base" / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the model's weights" in refused(capsys, run)
    (run.parent / "base" / "model.safetensors").write_bytes(b"half")
    assert "missing or damaged" in refused(capsys, run)


def test_a_full_disk_is_seen_before_anything_is_written(run, capsys, monkeypatch):
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: usage)
    assert "is too full: 0.2 MB are to be written, and 0.0 MB are free" in refused(capsys, run)


def test_files_are_flushed_as_every_system_can(tmp_path):
    """conftest.py's fsync refuses handles that were opened for reading, as on Windows."""
    with new_folder.new_folder(tmp_path / "model", 10) as part:
        (part / "weights").write_bytes(b"weights")
    assert (tmp_path / "model" / "weights").read_bytes() == b"weights"


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_disk_that_fills_up_leaves_nothing(run, capsys, monkeypatch, form):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "model_card", full)  # the last file: all others are there
    assert "No space left on device; nothing is left of it" in refused(capsys, run, "--as", form)


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_file_system_that_takes_only_small_files_leaves_nothing(run, capsys, form):
    """A real failure in the middle of the weights, as on a full disk, or on FAT32 with a file of more than 4 GB."""
    resource = pytest.importorskip("resource")  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        said = refused(capsys, run, "--as", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    why = {"merged": "File too large", "gguf": "not all bytes were taken"}[form]
    assert "cannot write" in said and why in said and "nothing is left of it" in said


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(run, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "base")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(run.parent / "base")
    assert f"has {WORDS + 1} tokens and the embeddings have {WORDS} rows" in refused(capsys, run, "--as", "gguf")


def test_a_killed_export_leaves_nothing_under_the_final_name_and_the_next_one_works(run, monkeypatch, capsys):
    def killed(*_, **__):
        assert (run.parent / "out.part" / "model.safetensors").is_file() and not (run.parent / "out").exists()
        raise KeyboardInterrupt

    capsys.readouterr()  # transformers' bars, from making models
    with monkeypatch.context() as patch:
        patch.setattr(command, "model_card", killed)
        assert command.main([str(run), "--to", str(run.parent / "out")]) == 130
    assert capsys.readouterr().err == "error: interrupted: nothing is left of the export\n"
    assert sorted(path.name for path in run.parent.iterdir()) == ["base", "run"]
    (run.parent / "out.part").mkdir()  # what SIGKILL leaves behind
    (run.parent / "out.part" / "old.txt").write_text("old")
    assert command.main([str(run), "--to", str(run.parent / "out")]) == 0
    assert not (run.parent / "out" / "old.txt").exists() and not (run.parent / "out.part").exists()


def test_a_check_that_is_interrupted_leaves_the_whole_export(run, monkeypatch, capsys):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check_export", killed)
    out = run.parent / "out"
    capsys.readouterr()
    assert command.main([str(run), "--to", str(out), "--check"]) == 130
    assert capsys.readouterr().err == f"error: interrupted: {out} is whole, but not checked\n"
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == WORDS


def test_an_adapter_of_the_embeddings_is_refused(run, capsys):
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    adapter["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 64)
    adapter["base_model.model.lm_head.lora_B.weight"] = torch.ones(WORDS, 4)
    save_file(adapter, run / "adapter" / "adapter_model.safetensors")
    assert "the adapter changes lm_head.weight" in refused(capsys, run)


def test_a_base_that_is_quantized_already_is_refused(run, capsys):
    config = json.loads((run.parent / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (run.parent / "base" / "config.json").write_text(json.dumps(config))
    assert "is stored quantized" in refused(capsys, run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "q4_0"], "--weights q4_0 is for --as gguf"),
        (["--as", "gguf", "--weights", "f32"], "--weights f32 is for --as merged"),
        (["--as", "adapter", "--weights", "f16"], "an adapter is written as it is"),
        (["--as", "adapter", "--check"], "--check is for --as gguf and --as merged"),
        (["--as", "base", "--check"], "--check is for --as gguf and --as merged"),
        (["--as", "base", "--weights", "f32"], "--weights f32 is for --as merged"),
        (["--as", "zip"], "invalid choice: 'zip'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(run, capsys, arguments, said):
    assert said in refused(capsys, run, *arguments)


def test_a_dora_adapter_alone_is_refused(small_tokenizer, tmp_path, capsys):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, kind="dora")
    said = refused(capsys, run, "--as", "adapter")
    assert "this adapter is DoRA's" in said and "export the merged model with --as gguf" in said


def test_what_is_neither_run_nor_model_has_no_base(run, capsys):
    assert "nowhere" in refused(capsys, run.parent / "nowhere", "--as", "base")


def test_a_check_without_llama_cpp_says_how_to_get_it(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "is_here", lambda: False)
    assert "pip install" in refused(capsys, run, "--as", "gguf", "--check")
