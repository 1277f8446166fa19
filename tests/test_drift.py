"""Does every call into another library still fit the installed version's signature?

A library that renames an argument breaks a course in the middle of a lesson, often in a branch that no test enters. So
this reads the package and the notebooks' sources, finds each name that comes from another library, imports it, and
binds each call to its signature. Methods of objects are out of reach: only names that start at an import are followed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import sys
import warnings

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "qlora_lab").rglob("*.py")), *sorted((ROOT / "notebooks" / "source").glob("*.py"))]

# Keyword arguments that go into `**kwargs`, and the line of the library (module, text) that takes them out
THROUGH_KWARGS = {
    ("from_pretrained", "dtype"): ("transformers.modeling_utils", 'kwargs.pop("dtype"'),
    ("from_pretrained", "device_map"): ("transformers.modeling_utils", 'kwargs.pop("device_map"'),
    ("from_pretrained", "output_loading_info"): ("transformers.modeling_utils", 'kwargs.pop("output_loading_info"'),
    ("from_pretrained", "use_safetensors"): ("transformers.modeling_utils", "use_safetensors: bool"),
    ("from_pretrained", "gguf_file"): ("transformers.modeling_utils", '"gguf_file"'),
    ("from_pretrained", "quantization_config"): ("transformers.modeling_utils", '"quantization_config"'),
    ("from_pretrained", "trust_remote_code"): (
        "transformers.models.auto.configuration_auto",
        'kwargs.pop("trust_remote_code"',
    ),
    **{
        (tracker, keyword): ("accelerate.tracking", f"{package}.init(project=self.run_name, **self.init_kwargs)")
        for tracker, package in (("TrackioTracker", "trackio"), ("WandBTracker", "wandb"))
        for keyword in ("name", "id", "resume", "dir")
    },
    ("from_config", "pre_quantized"): ("transformers.quantizers.base", 'kwargs.pop("pre_quantized"'),
    ("PreTrainedTokenizerFast", "tokenizer_object"): (
        "transformers.tokenization_utils_tokenizers",
        'kwargs.pop("tokenizer_object"',
    ),
    ("Qwen3MoeConfig", "head_dim"): ("transformers.models.qwen3_moe.modeling_qwen3_moe", '"head_dim"'),
    **{  # PyTorch says operators' arguments in Python where it gives their outputs' shapes
        (f"_efficient_attention_{way}", keyword): ("torch._meta_registrations", f"{keyword}: {kind} | None = None")
        for way in ("forward", "backward")
        for keyword, kind in (("scale", "float"), ("window_size", "int"))
    },
    ("subplots", "figsize"): ("matplotlib.figure", "figsize=None"),
    ("subplots", "layout"): ("matplotlib.figure", "layout=None"),
    ("MaxNLocator", "integer"): ("matplotlib.ticker", "integer=False"),
    ("start_new_kernel", "extra_arguments"): ("jupyter_client.manager", "extra_arguments"),
    ("start_new_kernel", "cwd"): ("jupyter_client.provisioning.local_provisioner", '"cwd"'),
    ("start_new_kernel", "env"): ("jupyter_client.provisioning.provisioner_base", '"env"'),
    ("tqdm", "unit"): ("tqdm.std", "unit="),
    ("tqdm", "total"): ("tqdm.std", "total="),
    ("tqdm", "disable"): ("tqdm.std", "disable="),
}


class Reader(ast.NodeVisitor):
    """Collects imported names and calls of one file: `imports` by alias, `calls` as (line, dotted name, node)."""

    def __init__(self, source: str):
        self.imports: dict[str, str] = {}
        self.names: list[tuple[int, str]] = []
        self.calls: list[tuple[int, str, ast.Call]] = []
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    self.imports[alias.asname or top] = alias.name if alias.asname else top
                    self.names.append((node.lineno, alias.name))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    self.names.append((node.lineno, f"{node.module}.{alias.name}"))
        self.visit(tree)

    def dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.imports.get(node.id)
        if isinstance(node, ast.Attribute):
            root = self.dotted(node.value)
            return f"{root}.{node.attr}" if root else None
        return None

    def visit_Call(self, node: ast.Call) -> None:
        if name := self.dotted(node.func):
            self.calls.append((node.lineno, name, node))
        self.generic_visit(node)


def foreign(name: str) -> bool:
    top = name.partition(".")[0]
    if top == "unsloth":  # not among the requirements: it is measured where somebody has installed it
        return False
    return top not in sys.stdlib_module_names and top not in ("qlora_lab", "tests", "__future__")


def resolve(name: str):
    """The object with this dotted name. Raises ImportError or AttributeError when it has gone."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            found = importlib.import_module(".".join(parts[:i]))
        else:
            found = getattr(found, part)
    return found


def misfit(name: str, call: ast.Call) -> str:
    """What is wrong with a call of the object `name`; empty if nothing is, or if it tells no signature (C code)."""
    try:
        target = resolve(name)
    except (ImportError, AttributeError) as error:
        return f"{name} has gone: {error}"
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return ""
    if inspect.isclass(target) and next(iter(signature.parameters), None) == "self":  # as some classes in Rust tell it
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    keywords = [keyword.arg for keyword in call.keywords]
    open_ended = starred or None in keywords
    named = {keyword: None for keyword in keywords if keyword}
    explicit = {p.name for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD}
    takes_any = len(explicit) < len(signature.parameters)
    for keyword in sorted(set(named) - explicit):
        place = THROUGH_KWARGS.get((name.rpartition(".")[2], keyword))
        if takes(target, keyword) or (place is None and not takes_any):
            continue
        if place is None:
            return f"{name} takes {keyword}= only as one of **kwargs: say in THROUGH_KWARGS where it is read"
        if place[1] not in inspect.getsource(importlib.import_module(place[0])):
            return f"{name}({keyword}=): {place[0]} no longer has {place[1]}"
        del named[keyword]
    if takes_any and not explicit:  # a wrapper that hides what it wraps
        return ""
    try:
        positional = [None for argument in call.args if not isinstance(argument, ast.Starred)]
        (signature.bind_partial if open_ended else signature.bind)(*positional, **named)
    except TypeError as error:
        return f"{name}({', '.join(map(str, keywords))}): {error}"
    return ""


def takes(target, keyword: str) -> bool:
    """Whether a class with `**kwargs` knows a keyword: a base's argument, a trait, or what matplotlib can set."""
    if not inspect.isclass(target):
        return False
    if getattr(target, "class_traits", None) and keyword in target.class_trait_names():
        return True
    initializers = [f for base in target.__mro__[:-1] if callable(f := vars(base).get("__init__"))]
    return hasattr(target, f"set_{keyword}") or any(keyword in inspect.signature(f).parameters for f in initializers)


def misfits(source: str) -> list[str]:
    reader, wrong = Reader(source), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line, name in reader.names:
            if foreign(name):
                try:
                    resolve(name)
                except (ImportError, AttributeError) as error:
                    wrong.append(f"line {line}: {name} has gone: {error}")
        wrong += [
            f"line {line}: {what}"
            for line, name, call in reader.calls
            if foreign(name) and (what := misfit(name, call))
        ]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_calls_fit_the_installed_libraries(path):
    if path.name in ("kernels.py", "kernel_speed.py", "step_speed.py"):
        pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")
    assert misfits(path.read_text(encoding="utf-8")) == []


def test_enough_is_read():
    calls = {
        name
        for path in FILES
        for _, name, _ in Reader(path.read_text(encoding="utf-8")).calls
        if foreign(name) and not name.startswith("torch.")
    }
    assert len(calls) > 60
    for name in (
        "transformers.BitsAndBytesConfig",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "peft.LoraConfig",
        "peft.get_peft_model",
        "bitsandbytes.functional.quantize_4bit",
        "bitsandbytes.nn.Linear4bit",
        "accelerate.Accelerator",
    ):
        assert any(call == name or call.endswith(name.rpartition(".")[2]) for call in calls), name


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("from peft import LoraConfig\nLoraConfig(rank=8)", "unexpected keyword argument 'rank'"),
        ("import peft\npeft.get_peft_modell(1, 2)", "peft.get_peft_modell has gone"),
        ("def f():\n    from transformers import Llama9Config", "transformers.Llama9Config has gone"),
        (
            "from transformers import AutoModelForCausalLM as A\nA.from_pretrained('x', torch_dtyp=1)",
            "torch_dtyp= only as one of **kwargs",
        ),
        ("import torch.nn.functional as F\nF.cross_entropy(1)", "missing a required argument: 'target'"),
    ],
)
def test_what_has_gone_is_told(source, complaint):
    (wrong,) = misfits(source)
    assert complaint in wrong


def test_nothing_is_loaded_that_could_run_code():
    """Left open, transformers asks on a terminal whether a model's own Python may run; pickles may run it unasked."""
    loads = 0
    for path in FILES:
        if "qlora_lab" not in path.relative_to(ROOT).parts:
            continue
        for line, name, call in Reader(path.read_text(encoding="utf-8")).calls:
            if name.startswith("transformers.") and name.endswith(".from_pretrained"):
                loads += 1
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
                assert given.get("trust_remote_code") is False, f"{path.name}:{line}"
                if "Model" in name and "gguf_file" not in given:
                    assert given.get("use_safetensors") is True, f"{path.name}:{line}"
    assert loads >= 6


# ------------------------------------------------------------------------------- what the course teaches about versions


def test_bitsandbytes_config_still_needs_every_argument():
    """The lesson of notebook 01: its defaults are not QLoRA's."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    defaults = config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype, config.bnb_4bit_use_double_quant
    assert defaults == ("fp4", torch.float32, False)


def test_old_training_arguments_are_still_refused():
    """Tutorials are full of them."""
    from transformers import Trainer, TrainingArguments

    known = inspect.signature(TrainingArguments).parameters
    gone = ("evaluation_strategy", "group_by_length", "no_cuda", "overwrite_output_dir", "logging_dir")
    assert not [name for name in gone if name in known]
    assert "eval_strategy" in known and "processing_class" in inspect.signature(Trainer).parameters


def test_loading_in_4_bits_by_an_argument_is_still_refused(tiny_folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(TypeError, match="load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, load_in_4bit=True)


def test_a_config_that_does_not_ask_for_4_bits_still_gets_them(tiny_folder):
    """What the checks of exercises 1.1 and 12.2 say of transformers 5."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=BitsAndBytesConfig())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
