"""The house itself: what an import costs, which room enters which, is README's map true, what no file may hold."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora_lab"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))


def python(code: str) -> str:
    """Run `code` in a fresh interpreter in the repository's root; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def repository_files() -> list[str]:
    """Paths, relative to the root, that git tracks or would offer to add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in set(listed.split("\0")) if path and (ROOT / path).is_file())


# ------------------------------------------------------------------------------------------------------------- imports


def test_importing_the_package_is_quick_and_loads_nothing_else():
    code = """
import json, sys, time
before, start = set(sys.modules), time.process_time()  # of this process: others may keep it waiting
import qlora_lab
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""
    runs = [json.loads(python(code)) for _ in range(5)]
    assert statistics.median(seconds for seconds, _ in runs) < 0.2
    loaded = {name.partition(".")[0] for _, names in runs for name in names}
    assert loaded - sys.stdlib_module_names == {"qlora_lab"}


def test_importing_finetuning_leaves_the_slow_libraries_alone_and_the_gpu_untouched():
    code = """
import json, sys
import torch, qlora_lab.finetuning
print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))
"""
    loaded, cuda_initialized = json.loads(python(code))
    assert "qlora_lab.finetuning" in loaded
    assert not {"datasets", "transformers", "peft", "bitsandbytes", "accelerate"} & set(loaded)
    assert not cuda_initialized


def test_bitsandbytes_is_quiet_about_a_kernel_that_nobody_wants_and_about_nothing_else():
    """It says so when it is imported on a CPU with AVX512-BF16; here it is said by hand, for the other CPUs."""
    code = """
import logging, sys
import qlora_lab
import bitsandbytes
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", ImportError("kernels"))
logger.warning("Failed to load the library")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "Failed to load the library\n"


@pytest.mark.parametrize("source", sorted((ROOT / "notebooks" / "source").glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_import_the_package_before_what_loads_bitsandbytes(source):
    """So that its line is never a red box, whatever the CPU. PEFT loads bitsandbytes when it is imported."""
    imports = re.findall(r"^ *(?:from|import) (\w+)", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    early = imports[: imports.index("qlora_lab")] if imports else []  # the glossary has no code
    assert not {"bitsandbytes", "peft", "trl"} & set(early)


# ---------------------------------------------------------------------------------------------- which room enters which

LIBRARIES = "*"  # any package that is not ours
ARGUMENTS, ERRORS, FACTS = "qlora_lab.arguments", "qlora_lab.errors", "qlora_lab.facts"
PLACES = "qlora_lab.places"
QUANTIZATION, MODELS, ADAPTERS = "qlora_lab.quantization", "qlora_lab.models", "qlora_lab.adapters"
TRAINING, EVALUATION, MEMORY = "qlora_lab.training", "qlora_lab.evaluation", "qlora_lab.memory"
EXPORT = "qlora_lab.export"
EXPERIMENTS = "qlora_lab.experiments"
WHEELHOUSE = "qlora_lab.wheelhouse"
COMMAND_LINE = ("qlora_lab.train_flags", "qlora_lab.train_data")
LEARNING = (QUANTIZATION, MODELS, ADAPTERS, TRAINING, EVALUATION)

# What a file may import beside the standard library, by the first pattern that fits it. A name covers what is in it.
MAY_IMPORT = {
    "qlora_lab/__init__.py": (),
    "qlora_lab/__main__.py": (),  # it imports a command's module once that is asked for
    "qlora_lab/errors.py": (),
    "qlora_lab/places.py": (ERRORS,),
    "qlora_lab/arguments.py": (ERRORS,),
    "qlora_lab/facts.py": (),
    "qlora_lab/wheelhouse.py": (),  # runs before anything is installed
    "qlora_lab/colab.py": ("packaging",),  # so does this, on Colab
    "qlora_lab/quantization/kernels.py": ("torch", "triton", FACTS, QUANTIZATION),
    "qlora_lab/quantization/*": ("torch", FACTS, QUANTIZATION),
    "qlora_lab/models/parts.py": ("torch",),
    "qlora_lab/models/__main__.py": (ARGUMENTS, ERRORS, MODELS),
    "qlora_lab/models/*": (LIBRARIES, ERRORS, FACTS, PLACES, WHEELHOUSE, QUANTIZATION, MODELS),
    # QLoRA is LoRA on a base that happens to be 4-bit: LoRA knows nothing of quantization
    "qlora_lab/adapters/merge_aware.py": ("torch", ERRORS, FACTS, QUANTIZATION, ADAPTERS),
    "qlora_lab/adapters/quantized_linear.py": (LIBRARIES, ERRORS, FACTS, QUANTIZATION, MODELS, ADAPTERS),
    "qlora_lab/adapters/peft_adapter.py": (LIBRARIES, ERRORS, FACTS, ADAPTERS, MODELS),
    "qlora_lab/adapters/as_one.py": ("torch", "psutil", ADAPTERS),
    "qlora_lab/adapters/targets.py": ("torch", ERRORS, ADAPTERS, "qlora_lab.models.parts"),
    "qlora_lab/adapters/*": ("torch", "safetensors", ERRORS, FACTS, ADAPTERS),
    "qlora_lab/training/*": (LIBRARIES, ERRORS, FACTS, PLACES, QUANTIZATION, MODELS, ADAPTERS, TRAINING),
    "qlora_lab/evaluation/*": (LIBRARIES, ERRORS, FACTS, *LEARNING),
    "qlora_lab/export/*": (LIBRARIES, ARGUMENTS, ERRORS, FACTS, *LEARNING, EXPORT),
    "qlora_lab/memory/meter.py": (LIBRARIES, ERRORS, FACTS, *LEARNING, MEMORY),
    "qlora_lab/memory/measuring.py": (LIBRARIES, ERRORS, FACTS, *LEARNING, MEMORY),
    "qlora_lab/memory/__init__.py": (FACTS, MEMORY),
    "qlora_lab/memory/*": (FACTS, MEMORY),  # predictions that cannot peek at a measurement
    "qlora_lab/experiments/*": (LIBRARIES, ARGUMENTS, ERRORS, FACTS, PLACES, *LEARNING, MEMORY, EXPERIMENTS),
    "qlora_lab/finetuning/*": LEARNING,  # a page of names
    "qlora_lab/classroom/*": (LIBRARIES, "qlora_lab"),
    "qlora_lab/train_flags.py": ("torch", ARGUMENTS, ERRORS, FACTS, *LEARNING),
    "qlora_lab/data.py": ("tqdm", ARGUMENTS, ERRORS, MODELS, TRAINING, "qlora_lab.train_flags"),
    "qlora_lab/train_data.py": ("torch", ERRORS, *LEARNING, "qlora_lab.train_flags"),
    "qlora_lab/train_qlora.py": (LIBRARIES, ARGUMENTS, ERRORS, FACTS, *LEARNING, EXPORT, MEMORY, *COMMAND_LINE),
}


def imported_names(path: str, source: str) -> set[str]:
    """Absolute dotted names that a module imports anywhere, functions included.

    `from a import b` counts as `a.b`, for b may be a module.
    """
    package = path.split("/")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, node.module] if node.module else base
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def trespasses(path: str, source: str) -> list[str]:
    """The imports in the module at `path` that `MAY_IMPORT` does not allow."""
    rules = next((rules for pattern, rules in MAY_IMPORT.items() if fnmatch.fnmatch(path, pattern)), None)
    assert rules is not None, f"{path}: say in MAY_IMPORT what it may import"

    def allowed(name: str) -> bool:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or name == "qlora_lab.__version__":
            return True
        if top != "qlora_lab" and LIBRARIES in rules:
            return True
        return any(f"{name}.".startswith(f"{rule}.") for rule in rules)

    return sorted(name for name in imported_names(path, source) if not allowed(name))


@pytest.mark.parametrize("path", MODULES)
def test_rooms_are_entered_in_one_direction(path):
    assert trespasses(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("quantization/packing.py", "import torch.nn, math\nfrom . import codebooks\nfrom .codebooks import NF4", []),
        ("quantization/packing.py", "import numpy as np", ["numpy"]),
        ("quantization/packing.py", "from ..adapters import lora", ["qlora_lab.adapters.lora"]),
        ("quantization/packing.py", "from qlora_lab import memory", ["qlora_lab.memory"]),
        ("adapters/lora.py", "from torch import nn\nfrom qlora_lab.errors import UserError", []),
        (
            "adapters/lora.py",
            "def f():\n    import qlora_lab.quantization as q",
            ["qlora_lab.quantization"],
        ),
        ("models/loading.py", "import peft\nfrom qlora_lab.quantization import NF4", []),
        ("models/loading.py", "from qlora_lab.training import loop", ["qlora_lab.training.loop"]),
        ("training/steps/fast/step.py", "import qlora_lab.memory.meter", ["qlora_lab.memory.meter"]),
        ("export/check.py", "from qlora_lab.evaluation.judge import Judge\nimport gguf", []),
        ("evaluation/judge.py", "from qlora_lab.export import check", ["qlora_lab.export.check"]),
        ("memory/prediction.py", "import torch", ["torch"]),
        ("memory/prediction.py", "from qlora_lab import experiments", ["qlora_lab.experiments"]),
        ("memory/measuring.py", "import qlora_lab.training.loop\nimport torch", []),
        ("memory/measuring.py", "from qlora_lab.classroom import plots", ["qlora_lab.classroom.plots"]),
        ("train_qlora.py", "from qlora_lab import __version__, classroom, memory", ["qlora_lab.classroom"]),
        ("__init__.py", "from .quantization import NF4", ["qlora_lab.quantization.NF4"]),
    ],
)
def test_a_trespass_is_seen(path, source, found):
    assert trespasses(f"qlora_lab/{path}", source) == found


# --------------------------------------------------------------------------------------------------- files, one by one

DOTTED = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in MODULES}


def imports_among_ours(sources: dict[str, str]) -> dict[str, set[str]]:
    """By module, which of the others it imports, functions included. sources: by path. A name's module is imported."""
    dotted = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    graph = {}
    for module, path in dotted.items():
        found = set()
        for name in imported_names(path, sources[path]):
            while name and name not in dotted:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {module, ""}
    return graph


def import_order(graph: dict[str, set[str]]) -> list[str]:
    """The modules, each after those that it imports. Raises graphlib.CycleError, which names a cycle."""
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_files_import_each_other_in_one_order():
    """`pytest -s -k one_order` prints it."""
    order = import_order(imports_among_ours({path: (ROOT / path).read_text(encoding="utf-8") for path in MODULES}))
    print("\n" + "\n".join(order))
    assert len(order) == len(MODULES)


def test_a_cycle_is_seen_even_inside_of_a_function():
    sources = {"qlora_lab/a.py": "from qlora_lab import b", "qlora_lab/b.py": "def f():\n    from .a import g"}
    with pytest.raises(graphlib.CycleError):
        import_order(imports_among_ours(sources))
    assert import_order(imports_among_ours({**sources, "qlora_lab/b.py": ""})) == ["qlora_lab.b", "qlora_lab.a"]


def private_imports(path: str, source: str) -> list[str]:
    """Names with an underscore that a module takes from another of ours."""
    private = re.compile(r"_(?!_)\w*$")
    return sorted(
        name
        for name in imported_names(path, source)
        if name.startswith("qlora_lab.") and private.match(name.rpartition(".")[2])
    )


@pytest.mark.parametrize("path", MODULES)
def test_no_private_name_is_imported_from_another_module(path):
    assert private_imports(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_a_private_import_is_seen():
    assert private_imports("qlora_lab/a.py", "from qlora_lab.b import _c, d") == ["qlora_lab.b._c"]
    assert private_imports("qlora_lab/a.py", "from qlora_lab import __version__\nfrom torch import _C") == []


def test_no_module_has_the_name_of_something_that_a_package_exports():
    """`from qlora_lab.x import y` would be the one or the other, depending on what was imported before."""
    clashes = []
    for module, path in DOTTED.items():
        if path.endswith("__init__.py"):
            exported = imported_names(path, (ROOT / path).read_text(encoding="utf-8")) - DOTTED.keys()
            clashes += [name for name in exported if f"{module}.{name.rpartition('.')[2]}" in DOTTED]
    assert clashes == []


# Longer than this, and a file or a function says in its docstring why it is in one piece, in the words below.
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION, REASON = 400, 60, re.compile(r"[Ll]ong (because|since|for)")


def lengths(path: str, source: str) -> list[str]:
    """What is too long in a module, and does not say why."""
    tree = ast.parse(source)
    found = []
    if len(source.splitlines()) > LINES_OF_A_MODULE and not REASON.search(ast.get_docstring(tree) or ""):
        found.append(f"{path}: {len(source.splitlines())} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.body[0].lineno + 1  # without what is read before it is entered
            if ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > LINES_OF_A_FUNCTION and not REASON.search(ast.get_docstring(node) or ""):
                found.append(f"{path}: {node.name} has {lines} lines")
    return found


@pytest.mark.parametrize("path", MODULES)
def test_what_is_long_says_why(path):
    assert lengths(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_what_is_too_long_is_seen():
    long = "def f():\n" + "    x = 1\n" * 61
    assert lengths("a.py", long) == ["a.py: f has 61 lines"]
    assert lengths("a.py", long.replace("f():\n", 'f():\n    """Long because it is."""\n')) == []
    assert lengths("a.py", "x = 1\n" * 401) == ["a.py: 401 lines"]


# ------------------------------------------------------------------------------------------------------- README's tree


def tree_entries(markdown: str) -> list[str]:
    """Paths named in a Markdown text's annotated trees: its fenced blocks that have a line starting with `qlora_lab/`.

    Two spaces indent; a line names a file or folder, then, two spaces or more on, says what it is. A line may name
    several (`estimate.py  measure.py`); a name may have wildcards (`[0-9]*.ipynb`).
    """
    entries = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL):
        if not re.search(r"^ *qlora_lab/", block, flags=re.MULTILINE):
            continue
        folders: list[tuple[int, str]] = []  # (indent, path with a slash) of the folders that the line may stand in
        for line in filter(str.strip, block.splitlines()):
            indent = len(line) - len(line.lstrip())
            folders = [(deep, folder) for deep, folder in folders if deep < indent]
            parent = folders[-1][1] if folders else ""
            first, *rest = re.split(r" {2,}", line.strip())
            looks_like_paths = re.compile(r"\S*[\w*\]](\.\w+|/)")
            names = [first]
            for field in rest:
                if not looks_like_paths.fullmatch(field):
                    break
                names.append(field)
            entries += [parent + name for name in names]
            if first.endswith("/"):
                folders.append((indent, parent + first))
    return entries


def test_a_tree_is_read_as_written():
    markdown = """
# Title
```
make lab
```
```text
README.md          what it is, two commands
.ci/run            calls `make test`
qlora_lab/         the package
  memory/    bytes. Numbers only
    estimate.py  measure.py
  train_qlora.py   the command line: python -m qlora_lab.train_qlora
notebooks/         lessons
```
"""
    assert tree_entries(markdown) == [
        "README.md",
        ".ci/run",
        "qlora_lab/",
        "qlora_lab/memory/",
        "qlora_lab/memory/estimate.py",
        "qlora_lab/memory/measure.py",
        "qlora_lab/train_qlora.py",
        "notebooks/",
    ]


def test_readme_names_what_is_there():
    entries = tree_entries((ROOT / "README.md").read_text(encoding="utf-8"))
    assert entries, "README.md has no fenced tree with a line that starts with qlora_lab/"
    missing = [entry for entry in entries if not list(ROOT.glob(entry.rstrip("/")))]
    assert missing == [], "README's tree names what does not exist"
    assert sorted({entry for entry in entries if entries.count(entry) > 1} - {"qlora_lab/"}) == [], "named twice"


def test_readme_names_everything_at_the_top_and_every_room():
    entries = tree_entries((ROOT / "README.md").read_text(encoding="utf-8"))
    files = repository_files()
    top = {path.partition("/")[0] for path in files if not path.startswith(".git")}
    assert sorted(top - {entry.partition("/")[0] for entry in entries}) == [], "missing from README's tree"
    modules = {path for path in files if path.startswith("qlora_lab/") and path.endswith(".py")}
    rooms = {path.rpartition("/")[0] + "/" for path in modules if path.count("/") > 1}
    lessons = {room for room in rooms if room.startswith("qlora_lab/classroom/lessons/")}
    alone = {path for path in modules if path.count("/") == 1 and not path.endswith("__init__.py")}
    assert sorted((rooms - lessons | alone) - set(entries)) == [], "missing from README's tree"


def unnamed(init: str, docstring: str) -> list[str]:
    """What stands beside a room's `__init__.py` and is not named in its docstring."""
    room = init.rpartition("/")[0]
    inside = [path.removeprefix(f"{room}/") for path in MODULES if path.startswith(f"{room}/")]
    beside = {name.partition("/")[0] + "/" if "/" in name else name for name in inside}
    beside -= {"__init__.py", "__main__.py"}
    return sorted(name for name in beside if not re.search(rf"(?<![\w/]){re.escape(name)}", docstring))


@pytest.mark.parametrize("init", [p for p in MODULES if p.endswith("/__init__.py") and p.count("/") > 1])
def test_a_room_says_what_its_files_hold(init):
    if "/lessons" in init:
        pytest.skip("a lesson's files have the same names everywhere: lessons/__init__.py says them")
    docstring = ast.get_docstring(ast.parse((ROOT / init).read_text(encoding="utf-8")))
    assert unnamed(init, docstring or "") == []


def test_a_file_that_nobody_names_is_seen():
    names = [
        "kept_answers.py",
        "page.py",
        "losses.py",
        "answers.py",
        "scores.py",
        "intervals.py",
        "reports.py",
        "soundness.py",
    ]
    assert unnamed("qlora_lab/evaluation/__init__.py", " ".join(names)) == ["judge.py"]


# ----------------------------------------------------------------------------------------------------- what files hold

# Folders of somebody's machine, and a running kernel's scratch files; in a notebook, an escaped line end or the end of
# a colour code may stand before them. This file is searched too: hence no slash next to a name here.
MACHINE_PATHS = re.compile(
    rb"(?:(?<![\w.~+-])|(?<=\\[nrt])|(?<=\dm))/(?:(?:home|root|work|Users)/(?=[\w.])|tmp/(?=ipykernel_\d))"
)


def machine_paths(content: bytes) -> list[str]:
    """The first 40 characters of each path in `content` that holds on one machine only."""
    starts = [match.start() for match in MACHINE_PATHS.finditer(content)]
    return [content[start : start + 40].decode(errors="replace") for start in starts]


def test_no_file_holds_a_path_of_some_machine():
    found = {path: machine_paths((ROOT / path).read_bytes()) for path in repository_files()}
    assert {path: paths for path, paths in found.items() if paths} == {}


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
def test_a_machine_path_is_seen(folder):
    path = f"/{folder}/someone/qlora-lab/notebooks/01_first_run.py"
    for before in ('"', " ", r"\n", r"\u001b[32m", "file://"):
        assert machine_paths(f"some text{before}{path}, line 3".encode()) == [path[:40]]
    assert machine_paths(f"https://host{path} ./..{path} docs{path}".encode()) == []


def opened_without_encoding(source: str) -> list[str]:
    """Calls that read or write text in whatever encoding the machine prefers: Windows' own is rarely UTF-8."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        of_module = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        name = ast.unparse(node.func) if of_module else getattr(node.func, "attr", getattr(node.func, "id", ""))
        last = name.rpartition(".")[2]
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        modes += [keyword.value.value for keyword in node.keywords if keyword.arg == "mode"]
        in_bytes = any(re.fullmatch(r"[rwax+]*b[rwax+]*", mode) for mode in modes)
        of_text = [mode for mode in modes if re.fullmatch(r"[rwaxt+]+", mode)]
        opens = last == "open" and name not in ("os.open", "archive.open") and not in_bytes
        temporary = last in ("NamedTemporaryFile", "TemporaryFile", "fdopen") and of_text
        if opens or temporary or last in ("read_text", "write_text"):
            found.append(f"line {node.lineno}: {last}")
    return found


@pytest.mark.parametrize("path", MODULES)
def test_text_is_read_and_written_in_a_named_encoding(path):
    assert opened_without_encoding((ROOT / path).read_text(encoding="utf-8")) == []


def test_a_file_without_encoding_is_seen():
    fine = """
open(p, "rb"), p.open(mode="r+b"), open(p, "w", encoding="utf-8"), p.read_text(encoding="utf-8")
os.open(p, os.O_RDONLY), tempfile.TemporaryFile(), archive.open(member)
"""
    assert opened_without_encoding(fine) == []
    wrong = """
open(p)
p.open("w")
io.open(p, mode="a+")
p.write_text(text)
(folder / "a.json").read_text()
tempfile.NamedTemporaryFile("w", suffix=".txt")
"""
    names = ["open", "open", "open", "write_text", "read_text", "NamedTemporaryFile"]
    assert opened_without_encoding(wrong) == [f"line {line}: {name}" for line, name in enumerate(names, start=2)]


# --------------------------------------------------------------------------------------------------------- environment


def requirement_names(lines: list[str]) -> set[str]:
    """Names of the packages on requirement lines, as package indexes write them; comments are skipped."""
    names = (re.match(r"\s*([A-Za-z0-9][\w.-]*)", line.partition("#")[0]) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[1]).lower() for name in names if name}


def test_every_requirement_is_pinned_by_the_constraints_for_any_machine():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.M | re.S)[1]
    wanted = requirement_names((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    wanted |= requirement_names([line.replace('"', "") for line in extras.splitlines() if line.startswith("    ")])
    assert sorted(wanted - requirement_names(pins)) == []
    exact = re.compile(r'[a-z0-9-]+==[\w.]+( ; python_version (>=|<) "3\.\d+")?')
    assert [line for line in pins if not line.startswith("#") and not exact.fullmatch(line)] == []
    assert not re.search(r"^(nvidia|cuda)", "\n".join(pins), flags=re.M)


def test_what_make_starts_spins_for_a_short_time_only():
    """Else two notebooks on the same cores stall each other, see the Makefile."""
    command = ["make", "--silent", "--eval=spins: ; @echo $$GOMP_SPINCOUNT", "spins"]
    for environment, seen in (({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5")):
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "MAKEFLAGS")} | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [seen], done.stderr
