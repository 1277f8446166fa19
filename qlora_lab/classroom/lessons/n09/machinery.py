"""Machinery of 09_your_gpu: lines of the script, sessions that end, short memory, what a run
needs, a model that speaks louder."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_lab.errors import UserError
from qlora_lab.places import EXAMPLES, IMPORTED_FROM

SCRIPT = EXAMPLES / "qlora_hf.py"
INSTALL = "%pip install trl"
RECORDED = (  # where memory cannot be limited; CPU of a Linux machine, torch 2.13
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 9830400 bytes. Error code 12 (Cannot allocate memory)"
)


def work_in(folder: os.PathLike | str) -> None:
    """Go into a folder, and put there what the lesson's commands name: the script, and the bundled model as `smollm2`.

    Raises:
        UserError: TRL is not installed.
    """
    from importlib.util import find_spec

    from qlora_lab.models.loading import locate

    if find_spec("trl") is None:
        raise UserError(f"TRL is not here: run {INSTALL} in a cell of its own, then this cell again")
    os.chdir(folder)
    shutil.copyfile(SCRIPT, "qlora_hf.py")
    model = pathlib.Path(locate("smollm2-135m-instruct"))
    try:
        os.symlink(model, "smollm2", target_is_directory=True)
    except OSError:  # Windows, without the right to
        shutil.copytree(model, "smollm2")


def lines_of(text: str, beginning: str, count: int) -> str:
    """So many lines of a text, from the only one that begins with `beginning`; indented as little as can be.

    Raises:
        ValueError: no line begins so, or several do.
    """
    lines = text.splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith(beginning)]
    if len(at) != 1:
        raise ValueError(f"{len(at)} lines begin with {beginning!r}, expected one")
    return textwrap.dedent("\n".join(lines[at[0] : at[0] + count]))


def edit(old: str, new: str, to: str) -> None:
    """Write a copy of the script in which `old`, which stands there once, reads `new`.

    Raises:
        UserError: `old` is not there, or more than once.
    """
    text = SCRIPT.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise UserError(f"{old!r} is {text.count(old)} times in the script, expected once")
    pathlib.Path(to).write_text(text.replace(old, new), encoding="utf-8")


# --- Sessions ---------------------------------------------------------------------------------------------------------


BEFORE = ("in 4 bits", "train", "validation", "test", "read", "learned")  # what the script says first, by name,
AFTER = ("asked", "expected", "answered", "exact match", "always the most frequent answer")  # and at its end


@dataclass
class Session:
    """losses, validated: by step. words: what the script said of its data and at its end, by name.

    began: the checkpoint's step, or 0.
    """

    began: int
    losses: dict[int, float] = field(default_factory=dict)
    validated: dict[int, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def environment() -> dict[str, str]:
    """For a child that tells each line as it comes, and not what libraries warn of."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


def session(line: str, kill_after: int | None = None) -> Session:
    """Run `python script ...` in a process of its own, and tell its losses as they come.

    Args:
        kill_after: kill the process, as the end of a session does, as soon as it has told this step's loss.

    Raises:
        UserError: the script failed; the last line of what it said.
    """
    print("$", line)
    _, *arguments = shlex.split(line)
    output = pathlib.Path(arguments[arguments.index("--output") + 1])
    saved = [int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")]
    seen = Session(max(saved, default=0))

    def heard(text: str) -> bool:
        _listen(seen, text)
        return kill_after is not None and kill_after in seen.losses

    errors = run_until([sys.executable, *arguments], heard, environment())
    if errors is None:
        print("killed")
    elif "exact match" not in seen.words:
        raise UserError(f"the script failed: {last_line(errors)}")
    return seen


def _listen(seen: Session, text: str) -> None:
    if found := re.search(r"\{'(eval_)?loss'.*\}", text):
        told = ast.literal_eval(found[0])
        if found[1]:
            seen.validated[max(seen.losses)] = float(told["eval_loss"])
            print(f"         validation loss {float(told['eval_loss']):.4g}")
        else:
            step = max(seen.losses, default=seen.began) + 1
            seen.losses[step] = float(told["loss"])
            print(f"step {step:>2}  loss {seen.losses[step]:.4g}")
    elif found := re.match(rf"({'|'.join(BEFORE + AFTER)}): +(.*)", text):
        name, said = found[1], found[2]
        seen.words[name] = said
        if name in AFTER:
            print(f"{name}: {said}")
        elif not seen.began:  # a session that goes on has told them before
            print(textwrap.fill(f"{name}: {said}", 110, subsequent_indent=9 * " "))


def last_line(errors: str) -> str:
    """The line of a traceback that says what went wrong; a progress bar may have written after it."""
    lines = [line for line in errors.strip().splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1] if lines else errors.strip()[-300:] or "it said nothing"


# --- Short memory -----------------------------------------------------------------------------------------------------


def attempt(line: str, gigabytes: float) -> str | None:
    """Run one step of `python script ...` with so much memory left for it, and tell how it ended.

    Returns:
        the error's last line, or None if the step went through.
    """
    print("$", line)
    _, *arguments = shlex.split(line)
    command = [sys.executable, "-m", "qlora_lab.classroom.lessons.n09.limited", str(gigabytes), *arguments]
    path = os.pathsep.join([str(IMPORTED_FROM), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = run_until(command, lambda text: "{'loss'" in text, environment() | {"PYTHONPATH": path})
    if told is None:
        print("the step went through")
        return None
    error = last_line(told)
    if "or a GPU, lets a process be limited" in error:
        error = RECORDED
        print("Memory cannot be limited here. This is what a Linux machine said:")
    else:
        print(*where(told), sep="\n")
    print(error)
    return error


def run_until(command: list[str], heard: Callable[[str], bool], environment: dict[str, str]) -> str | None:
    """Run a command until it prints a line that is `heard`; then it is killed, and None comes back; else its errors."""
    with open("errors.txt", "w+", encoding="utf-8") as log:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", env=environment
        ) as process:
            for text in process.stdout or ():
                if heard(text):
                    process.kill()
                    return None
        log.seek(0)
        return log.read()


def where(errors: str) -> list[str]:
    """The last lines of a model's own code in a traceback: the file's name, the function, and the line."""
    frames = re.findall(r'File "(?:[^"]*[/\\])?(modeling_\w+\.py)", line \d+, in (\w+)\n +(.+)', errors)
    return [f"{file}, {function}: {code}" for file, function, code in frames[-1:]]


# --- A louder model ---------------------------------------------------------------------------------------------------


def louder(model, factor: float) -> None:
    """Multiply, in place, all that is added to a LLaMA's residual stream: embeddings, and what layers put out.

    Each norm divides by the size of what it reads, so the model says the same as before (but for the norms' epsilon).
    """
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        if head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(head.weight.clone())
        embeddings.weight.mul_(factor)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)


def outputs_of(model, ids) -> list[tuple[str, object]]:
    """(name, output) of every module that puts out one tensor, in the order in which they are done.

    ids: int64 (1, tokens).
    """
    import torch

    seen: list[tuple[str, object]] = []

    def hook_of(name: str):
        return lambda module, given, output: seen.append((name, output)) if isinstance(output, torch.Tensor) else None

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen
