"""Models for the tests: the bundled one, and a tiny random LLaMA with the bundled one's tokenizer."""

import copy
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import torch

from qlora_lab.finetuning import fetch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # test_kernels.py: to be said before anything imports Triton

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    for marker, target in {"sweep": "make sweep", "whole": "make test-all"}.items():
        if marker not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"in `{target}`"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(autouse=True)
def fsync_as_on_windows(monkeypatch):
    """There, a handle that was opened for reading cannot be flushed."""
    if os.name != "posix":
        return
    import fcntl

    fsync = os.fsync

    def strict(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", strict)


@pytest.fixture(scope="session")
def bundled() -> pathlib.Path:
    """Folder of the bundled model's checkpoint (`make test` has fetched it)."""
    return fetch()


@pytest.fixture(scope="session")
def tokenizer(bundled):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled)


@pytest.fixture
def starting_tokenizer(tokenizer):
    """The bundled model's, but it begins every text with its start token (id 1) unless told not to, as LLaMA's does."""
    from tokenizers.processors import TemplateProcessing

    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert starting("a")["input_ids"][0] == 1
    return starting


@pytest.fixture(scope="session")
def website_folder(tmp_path_factory) -> pathlib.Path:
    """The course as a website, built once for all of xdist's processes. It takes Sphinx, and half a minute."""
    from filelock import FileLock

    from qlora_lab.classroom import website

    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "website"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            website.build(folder)
    return folder


def tiny_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # larger than usual: a random model should care about what it reads
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> pathlib.Path:
    """A checkpoint folder with a random two-layer LLaMA: everything runs in it, nothing is worth reading."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(rank: int = 4, dropout: float = 0.0):
    """A tiny model (vocabulary of 97) with LoRA adapters, in memory; the same one each time."""
    from transformers import LlamaForCausalLM

    from qlora_lab.finetuning import add_adapter

    torch.manual_seed(0)
    return add_adapter(LlamaForCausalLM(tiny_config(vocab_size=97)), rank=rank, alpha=8, dropout=dropout)


@pytest.fixture
def make_tiny():
    return tiny_model


@pytest.fixture
def tiny(make_tiny):
    return make_tiny()


KILLED = """
import os, signal, sys
from qlora_lab import train_qlora
write = train_qlora.StepLog.write
def killed(log, record):
    write(log, record)
    if record.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
train_qlora.StepLog.write = killed
sys.exit(train_qlora.main(sys.argv[2:]))
"""


def kill_train_qlora(arguments: list, output: pathlib.Path, step: int) -> None:
    """Run train_qlora in a process that dies when this step is logged: before its checkpoint, if one is due."""
    command = [sys.executable, "-c", KILLED, str(step), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (output / "report.json").exists()


def in_two_processes(module: str, *arguments) -> subprocess.CompletedProcess:
    """Run a module in two processes on the CPU."""
    return ended(processes(2, module, *arguments))


def processes(count: int, module: str, *arguments, shard: bool = False) -> subprocess.Popen:
    """Start a module in several processes on the CPU. (`accelerate launch --cpu --num_processes 2` starts one.)

    shard: say what `accelerate launch` says for a configuration with FSDP.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return _started([*command, "-m", module, *map(str, arguments)], shard)


def unwatched_processes(count: int, module: str, *arguments, shard: bool = False) -> list[subprocess.Popen]:
    """Start them as `processes` does, but without torchrun, which ends all of them once it sees one dead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, *map(str, arguments)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [{**meeting, "RANK": str(n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(count)} for n in range(count)]
    return [_started(command, shard, rank) for rank in ranks]


def _started(command: list[str], shard: bool, rank: dict[str, str] | None = None) -> subprocess.Popen:
    surroundings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(rank or {})}
    surroundings["CUDA_VISIBLE_DEVICES"] = ""  # Accelerate's barrier would want a GPU for each, where there is one
    return subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env={**surroundings, "ACCELERATE_USE_FSDP": str(shard).lower()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for `processes` to end."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends all
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def watch_train_steps(monkeypatch, module: str) -> list[dict]:
    """Put a spy in the place of the `train_steps` that a module has imported; what it is given, each time."""
    from qlora_lab.training.batches import collate
    from qlora_lab.training.loop import train_steps

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

    monkeypatch.setattr(f"{module}.train_steps", spy)
    return seen
