"""Exercise checks and progress.

A check takes the learner's answer and shows one line: not attempted yet (·), what is wrong (✗), or right (✓).

    >>> def weight_bytes(parameters, bits):
    ...     return parameters * bits
    >>> check_bytes_of_weights(weight_bytes)
    ✗ 0.1 weight_bytes(134515008, 32) gives 4,304,480,256, expected 538,060,032. These are bits: eight make a byte.

It never raises, unless QLORA_LAB_STRICT=1 is set: then everything but ✓ raises ExerciseUnsolved. Solved exercises are
noted in a small JSON file, and `progress()` shows them by item of the course's checklist.

To add a check, write a function from the answer to a Verdict, decorate it, and give tests/classroom/test_checks.py one
right answer and the wrong ones it should recognize:

    @exercise("3.2", "level usage", item="nf4", points=2, todo="complete `level_usage`")
    def check_level_usage(level_usage):
        came = call(level_usage, codes)          # catches what the learner's code raises, and stubs
        if ...:
            return wrong("Your shares sum to 0.5. Which of the two codes in each byte is missing?")
        return right("...")

`check_level_usage(answer)` then shows, records and, in strict mode, raises; `check_level_usage.verdict(answer)` is the
pure function for the tests: it returns the Verdict and does nothing else.
"""

import functools
import html
import json
import math
import os
import reprlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

CHECKLIST = {
    "quantization": "explain how quantization works (INT8, INT4, NF4)",
    "nf4": "say how NF4 differs from plain INT4",
    "config": "configure BitsAndBytesConfig",
    "train": "train a QLoRA model successfully",
    "memory": "measure and compare memory, LoRA against QLoRA",
    "accuracy": "analyse the loss of accuracy, LoRA against QLoRA",
}
TAUGHT_IN = {  # notebooks whose exercises serve an item: it is ticked when all of them are there and solved
    "quantization": ("02", "03", "04"),
    "nf4": ("03",),
    "config": ("00", "07"),
    "train": ("06", "07"),
    "memory": ("00", "01", "08"),
    "accuracy": ("09",),
}
MARKS = {"open": "·", "wrong": "✗", "right": "✓"}


@dataclass(frozen=True)
class Exercise:
    """id: notebook and number, such as "7.2". item: a key of CHECKLIST. points: 1 to 3, the difficulty's dots."""

    id: str
    title: str
    item: str
    points: int

    def __post_init__(self):
        if self.item not in CHECKLIST:
            raise ValueError(f"exercise {self.id} has item={self.item!r}: expected one of {', '.join(CHECKLIST)}")


@dataclass(frozen=True)
class Verdict:
    """state: "open", "wrong" or "right". message: one sentence or two for the learner."""

    state: str
    message: str


class Mistake(Exception):
    """Ends a check from within a helper: the answer is wrong, and the message says why."""


class ExerciseUnsolved(Exception):
    """In strict mode: an exercise is open or wrong."""


# --- The mechanism ----------------------------------------------------------------------------------------------------


def right(message: str) -> Verdict:
    return Verdict("right", message)


def wrong(message: str) -> Verdict:
    return Verdict("wrong", message)


def exercise(id: str, title: str, *, item: str, points: int, todo: str) -> Callable:
    """Turn a function from an answer (and what else it needs) to a Verdict into a check that shows it.

    todo: completes the sentence "not attempted yet: ...".
    The check has the attributes `exercise` and `verdict` (see the top of this file).
    """

    def decorate(judge: Callable[..., Verdict]) -> Callable[..., None]:
        @functools.wraps(judge)
        def verdict(answer, *others):
            try:
                if is_stub(answer):
                    raise NotImplementedError
                return judge(answer, *others)
            except NotImplementedError:
                return Verdict("open", f"not attempted yet: {todo}.")
            except Mistake as mistake:
                return wrong(str(mistake))
            except Exception as error:  # an answer that the check did not foresee
                return wrong(f"{described(answer)} could not be checked. {told(error)}")

        @functools.wraps(judge)
        def check(answer, *others):
            show(check.exercise, verdict(answer, *others))

        check.exercise = Exercise(id, title, item, points)
        check.verdict = verdict
        return check

    return decorate


def show(exercise: Exercise, verdict: Verdict) -> None:
    """Print the verdict on one line, record a solved exercise, and raise ExerciseUnsolved in strict mode."""
    line = " ".join(f"{MARKS[verdict.state]} {exercise.id} {verdict.message}".split())
    print(line)
    if verdict.state == "right":
        record(exercise.id)
    elif os.environ.get("QLORA_LAB_STRICT", "0") not in ("", "0"):
        raise ExerciseUnsolved(line)


def is_stub(answer) -> bool:
    """Whether `answer` is None or `...`, or a tuple, list or dict that still holds a `...` or only None."""
    if isinstance(answer, (tuple, list, dict)) and answer:
        parts = list(answer.values() if isinstance(answer, dict) else answer)
        return any(part is ... for part in parts) or all(part is None for part in parts)
    return answer is None or answer is ...


def call(function: Callable, *arguments):
    """Return `function(*arguments)`. Call the learner's function only through here.

    Raises Mistake for what the function raises, with its line, and NotImplementedError if it returns a stub.
    """
    if not callable(function):
        raise Mistake(f"expected a function, got {described(function)}: hand over its name, without parentheses.")
    try:
        came = function(*arguments)
    except NotImplementedError:
        raise
    except Exception as error:
        line = line_of(function, error)
        place = f", in the line `{line}`" if line else ""
        raise Mistake(f"{written(function, arguments)} raised {told(error)}{place}") from error
    if is_stub(came):
        raise NotImplementedError
    return came


def line_of(function: Callable, error: Exception) -> str:
    """The source line of `function`, or of its cell, where `error` came up; empty if there is none."""
    file = function.__code__.co_filename if hasattr(function, "__code__") else None
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] or "" if lines else ""


def expect_number(source: str, came, expected: float, mistakes: list[tuple[float, str]], tolerance=1e-9) -> None:
    """Raise Mistake unless `came` is the number `expected`, and say which mistake it looks like.

    source: what gave the number, to name it. came: a number, or a tensor with one element. tolerance: relative.
    mistakes: pairs of the value that a mistake leads to, and its explanation; the first that fits is told.
    """
    try:
        if isinstance(came, (str, bytes)):  # float("3") would be 3.0
            raise TypeError
        value = float(came)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise Mistake(f"{source} gives {described(came)}, expected one number.") from None
    if not math.isclose(value, expected, rel_tol=tolerance):
        likely = (why for wrong_value, why in mistakes if math.isclose(value, wrong_value, rel_tol=tolerance))
        raise Mistake(f"{source} gives {value:,.10g}, expected {expected:,.10g}. {next(likely, '')}")


def described(value) -> str:
    """What `value` is, in few characters: "the str 'bfloat16'"."""
    return f"the {type(value).__name__} {reprlib.repr(value)}"


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def written(function: Callable, arguments: tuple) -> str:
    """The call as the learner would write it: "mask_prompt([1, 43], [53, 2])"."""
    return f"{getattr(function, '__name__', 'your function')}({', '.join(map(reprlib.repr, arguments))})"


# --- Progress ---------------------------------------------------------------------------------------------------------


def progress_path() -> Path:
    """Where progress is kept: the file named by QLORA_LAB_PROGRESS, else one in the user's data folder."""
    return Path(os.environ.get("QLORA_LAB_PROGRESS") or platformdirs.user_data_path("qlora-lab") / "progress.json")


def record(exercise_id: str) -> None:
    """Note that an exercise is solved. If that fails, say so: the verdict counts all the same."""
    path = progress_path()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=10):  # two notebooks may solve something at once
            solved = read_progress(path)
            if exercise_id not in solved:
                temporary.write_text(json.dumps({"solved": sorted(solved | {exercise_id})}), encoding="utf-8")
                os.replace(temporary, path)  # in one step: never half a file
    except OSError as error:
        print(f"· your progress could not be saved ({error})")


def read_progress(path: Path) -> set[str]:
    """The ids of the solved exercises. A file that cannot be understood is renamed, never deleted."""
    try:
        solved = json.loads(path.read_text(encoding="utf-8"))["solved"]
        if not isinstance(solved, list) or not all(isinstance(id, str) for id in solved):
            raise ValueError("not a list of exercises")
        return set(solved)
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError, KeyError, RecursionError):
        aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.stem}.damaged-{n}.json")).exists())
        os.replace(path, aside)
        print(f"· your progress file was damaged: counting starts anew, and the old file is kept as {aside}")
        return set()


@dataclass(frozen=True, repr=False)
class Progress:
    """Which exercises are solved. Shows itself by item of the checklist: a table in Jupyter, text elsewhere."""

    exercises: tuple[Exercise, ...]
    solved: frozenset[str]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """One row an item: its box, its sentence, "2 of 3", the next open exercise."""
        rows = []
        for item, sentence in CHECKLIST.items():
            mine = [exercise for exercise in self.exercises if exercise.item == item]
            still_open = [exercise for exercise in mine if exercise.id not in self.solved]
            written = {exercise.id.partition(".")[0].zfill(2) for exercise in mine}
            more = bool(mine) and not written.issuperset(TAUGHT_IN[item])
            box = "☑" if mine and not still_open and not more else "☐"
            count = f"{len(mine) - len(still_open)} of {len(mine)}" if mine else "no exercise yet"
            count += ", more to come" if more else ""
            rows.append((box, sentence, count, f"{still_open[0].id} {still_open[0].title}" if still_open else ""))
        return rows

    def summary(self) -> str:
        done = [exercise for exercise in self.exercises if exercise.id in self.solved]
        points = sum(exercise.points for exercise in done), sum(exercise.points for exercise in self.exercises)
        return f"{len(done)} of {len(self.exercises)} exercises solved, {points[0]} of {points[1]} points"

    def __repr__(self) -> str:
        lines = [
            f"{box} {sentence:<50} {count:<22} {'next: ' + following if following else ''}".rstrip()
            for box, sentence, count, following in self.rows()
        ]
        return "\n".join([self.summary(), *lines])

    def _repr_html_(self) -> str:
        def cells(tag, texts):
            return "".join(f'<{tag} style="text-align:left">{html.escape(text)}</{tag}>' for text in texts)

        rows = [cells("th", ("", "I can", "solved", "next")), *(cells("td", row) for row in self.rows())]
        return f"<p>{self.summary()}</p><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def progress() -> Progress:
    """Your progress: which exercises are solved, by item of the course's checklist."""
    try:
        solved = read_progress(progress_path())
    except OSError as error:
        print(f"· your progress could not be read ({error})")
        solved = set()
    return Progress(all_exercises(), frozenset(solved))


def all_exercises() -> tuple[Exercise, ...]:
    """The exercises of all checks in this file, in its order."""
    return tuple(check.exercise for check in globals().values() if hasattr(check, "exercise"))


# --- 00_start_here ----------------------------------------------------------------------------------------------------


@exercise("0.1", "bytes of a model's weights", item="memory", points=1, todo="complete `weight_bytes`")
def check_bytes_of_weights(weight_bytes: Callable[[float, int], float]) -> Verdict:
    """weight_bytes(parameters, bits): how many bytes so many weights take, at so many bits each."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for parameters, bits in [(134_515_008, 32), (134_515_008, 16), (134_515_008, 4), (7e9, 4)]:
        expected = parameters * bits / 8
        mistakes = [
            (parameters * bits, "These are bits: eight make a byte."),
            (parameters * bits * 8, "You multiplied by 8. A byte holds eight bits, so divide."),
            (parameters * (bits // 8), "`bits // 8` makes nothing of half a byte: divide with `/`."),
            (parameters * 8 / bits, "You divided by `bits`: fewer bits must give fewer bytes."),
            (parameters * 4, "That is the result for 32 bits: is `bits` used?"),
        ]
        for unit, size in units.items():
            why = f"These are {unit}. Plain bytes are asked for: choose the unit when you print."
            mistakes += [(value, why) for value in (expected / size, expected // size, round(expected / size))]
        source = written(weight_bytes, (parameters, bits))
        expect_number(source, call(weight_bytes, parameters, bits), expected, mistakes)
    return right("Seven billion weights: 28 GB at 32 bits, 3.5 GB at 4. What training adds on top is notebook 01.")


@exercise("0.2", "the compute dtype of a machine", item="config", points=1, todo="complete `choose_compute_dtype`")
def check_compute_dtype(choose_compute_dtype: Callable) -> Verdict:
    """choose_compute_dtype(device_type, has_bf16): the torch.dtype to multiply matrices in, on "cpu" or "cuda"."""
    from torch import bfloat16, dtype, float16, float32

    mistakes = {
        ("cpu", False, bfloat16): "Without bf16 instructions a CPU is far slower in bfloat16: you measured it.",
        ("cpu", False, float16): "float16 is slow on a CPU, and overflows beyond 65,504.",
        ("cpu", True, float16): "float16 is slow on a CPU, and overflows beyond 65,504.",
        ("cpu", True, float32): "That works, but leaves the CPU's bf16 instructions unused.",
        ("cuda", True, float16): "That runs, but overflows beyond 65,504: bfloat16 has float32's range.",
        ("cuda", True, float32): "That works, but slowly: the tensor cores want 16 bits.",
        ("cuda", False, bfloat16): "A GPU without bf16, such as the T4, imitates it, slowly: float16 is native.",
        ("cuda", False, float32): "That works on a T4, but slowly: its tensor cores want float16.",
    }
    best = {("cpu", False): float32, ("cpu", True): bfloat16, ("cuda", True): bfloat16, ("cuda", False): float16}
    for machine, expected in best.items():
        came = call(choose_compute_dtype, *machine)
        source = written(choose_compute_dtype, machine)
        if isinstance(came, str):
            return wrong(f"{source} gives the string {came!r}, expected a dtype: torch.{came.removeprefix('torch.')}.")
        if not isinstance(came, dtype):
            return wrong(f"{source} gives {described(came)}, expected a torch.dtype.")
        if came != expected:
            return wrong(f"{source} gives {came}, expected {expected}. {mistakes.get((*machine, came), '')}")
    return right("bf16 where the hardware has it, float16 on older GPUs, float32 on older CPUs.")


# --- 07_qlora_run -----------------------------------------------------------------------------------------------------


@exercise("7.1", "a BitsAndBytesConfig for QLoRA", item="config", points=1, todo="build a BitsAndBytesConfig")
def check_bnb_config(config, compute_dtype) -> Verdict:
    """config: a transformers.BitsAndBytesConfig for QLoRA. compute_dtype: the torch.dtype that suits this machine."""
    from transformers import BitsAndBytesConfig

    if isinstance(config, dict):
        return wrong("This is a dict of options, expected a BitsAndBytesConfig: write BitsAndBytesConfig(**options).")
    if not isinstance(config, BitsAndBytesConfig):
        return wrong(f"expected a BitsAndBytesConfig, got {described(config)}.")
    if config.load_in_8bit:
        return wrong("load_in_8bit is True: that is LLM.int8(), twice the size. QLoRA wants load_in_4bit=True.")
    if not config.load_in_4bit:
        return wrong("load_in_4bit is False, expected True: without it nothing is quantized, whatever else you set.")
    if (quant_type := config.bnb_4bit_quant_type) != "nf4":
        why = " fp4 is the default, nf4 has to be asked for." if quant_type == "fp4" else ""
        return wrong(f"bnb_4bit_quant_type is {quant_type!r}, expected 'nf4'.{why}")
    if not config.bnb_4bit_use_double_quant:
        return wrong(
            "bnb_4bit_use_double_quant is False, the default, expected True: it takes the scales from 0.5 to 0.127 "
            "bits per parameter."
        )
    if (dtype := config.bnb_4bit_compute_dtype) != compute_dtype:
        why = " float32 is the default, another dtype has to be asked for." if str(dtype) == "torch.float32" else ""
        return wrong(f"bnb_4bit_compute_dtype is {dtype}, expected {compute_dtype} on this machine.{why}")
    return right("The defaults are fp4, plain float32 scales and float32 compute, and nothing would have warned you.")


@exercise("7.2", "the labels of a training sample", item="train", points=2, todo="complete `mask_prompt`")
def check_labels(mask_prompt: Callable) -> Verdict:
    """mask_prompt(prompt_ids, response_ids) -> (input_ids, labels): -100 over the prompt, the response kept.

    Lists of ints or 1-D tensors. Labels are not shifted (transformers shifts them), and the end token, the last of
    the response, is learned too.
    """
    # The end token, 2, also occurs in a prompt; lengths differ, so that none can be built in.
    for prompt, response in [([1, 41, 42, 2, 1], [51, 52, 2]), ([1, 43], [53, 54, 55, 2])]:
        everything, expected = prompt + response, [-100] * len(prompt) + response
        came = call(mask_prompt, list(prompt), list(response))
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"mask_prompt gives {described(came)}, expected the pair input_ids, labels.")
        input_ids, labels = (part.tolist() if hasattr(part, "tolist") else list(part) for part in came)
        if any(isinstance(part, list) for part in [*input_ids, *labels]):
            return wrong("mask_prompt gives two dimensions, expected one: a single sample is not a batch yet.")
        if (input_ids, labels) == (expected, everything):
            return wrong("mask_prompt gives labels, input_ids, expected input_ids, labels: swap them.")
        if input_ids != everything:
            why = " Are labels and input_ids one and the same list? Mask a copy." if -100 in input_ids else ""
            return wrong(f"input_ids are {input_ids}, expected prompt and response: {everything}.{why}")
        if labels != expected:
            return wrong(f"labels are {labels}, expected {expected}. {mistake_in_labels(labels, prompt, response)}")
    return right("The model reads the whole sample and is graded on the answer alone, its end token included.")


def mistake_in_labels(labels: list, prompt: list, response: list) -> str:
    """How `labels` may have come out wrong; empty if nothing comes to mind."""
    expected, n = [-100] * len(prompt) + response, len(prompt)
    if labels[: len(expected) - 1] == expected[1:] or labels[1:] == expected[:-1]:
        return "They are shifted by one. transformers shifts by itself: label i belongs to token i."
    if labels == response:
        return "Every token needs a label: -100 for those of the prompt."
    if len(labels) != len(expected):
        return f"These are {len(labels)} labels for {len(expected)} tokens."
    if labels == prompt + response:
        return "The prompt is not masked: the model would learn to write the questions too."
    if labels == [*expected[:-1], -100]:
        return "The end token is masked: the model would never learn to stop."
    if labels == prompt + [-100] * len(response):
        return "It is the other way round: mask the prompt, keep the response."
    if set(labels) == {-100}:
        return "Everything is masked: nothing is left to learn."
    if labels[n:] == response and len(set(labels[:n])) == 1:
        return f"You masked with {labels[0]}, which is a token to learn. Cross entropy skips -100 only."
    if labels[: n + 1] == [-100] * (n + 1) or labels[n - 1 :] == [prompt[-1], *response]:
        return "The mask is off by one where the response begins."
    return ""


@exercise("7.3", "LoRA's trainable parameters", item="train", points=2, todo="complete `lora_parameters`")
def check_trainable_parameters(lora_parameters: Callable[[int, list], int]) -> Verdict:
    """lora_parameters(rank, shapes): how many parameters LoRA adds to linears of the shapes (inputs, outputs)."""
    hidden, mlp = 4096, 11008
    llama_7b = [*[(hidden, hidden)] * 4, (hidden, mlp), (hidden, mlp), (mlp, hidden)] * 32
    for rank, shapes in [(2, [(3, 5)]), (4, [(10, 30), (20, 70)]), (64, llama_7b)]:
        inputs, outputs = (sum(side) for side in zip(*shapes, strict=True))
        full = sum(inputs * outputs for inputs, outputs in shapes)
        first, last, many = rank * sum(shapes[0]), rank * sum(shapes[-1]), len(shapes)
        mistakes = [
            (full, "in × out is the whole matrix. LoRA trains A (r × in) and B (out × r) instead."),
            (rank * full, "r × in × out is more than the whole matrix. A has r × in, B has out × r."),
            (rank * rank * full, "You multiplied A's parameters by B's: add them."),
            (rank * inputs, "This is A alone: B (out × r) is trained too."),
            (rank * outputs, "This is B alone: A (r × in) is trained too."),
            (inputs + outputs, "This is in + out without the rank."),
            (2 * rank * inputs, "2 × r × in is right for square matrices only."),
            (first, f"This is the first of {many} layers: add them all up."),
            (last, f"This is the last of {many} layers: add them all up."),
            (first * many, f"This is {many} times the first layer: the shapes differ."),
        ]
        source = written(lora_parameters, (rank, shapes))
        expect_number(source, call(lora_parameters, rank, list(shapes)), rank * (inputs + outputs), mistakes)
    return right("LLaMA-7B gets 159,907,840 at rank 64, 2.4 % of its weights. PEFT counts the same.")


@exercise("7.4", "the loss of several micro-batches", item="train", points=2, todo="complete `global_loss`")
def check_token_weighted_loss(global_loss: Callable[[list, list], float]) -> Verdict:
    """global_loss(micro_batch_losses, target_tokens): the mean loss per token over all micro-batches.

    micro_batch_losses: each the mean over its own target tokens. target_tokens: how many those are.
    """
    for losses, tokens in [([2.0, 1.0, 4.0], [10, 70, 20]), ([0.5, 3.0], [300, 100])]:
        total = sum(loss * n for loss, n in zip(losses, tokens, strict=True))
        inverse = sum(loss / n for loss, n in zip(losses, tokens, strict=True))
        mistakes = [
            (
                sum(losses) / len(losses),
                "This is the mean of means, the gradient accumulation bug: ten tokens count as much as seventy.",
            ),
            (total, "This is the sum over all tokens: divide it by their number."),
            (total / len(losses), "You divided by the number of micro-batches: divide by the number of tokens."),
            (sum(losses), "The losses are added up without their weights."),
            (sum(losses) / sum(tokens), "Weigh each loss by its number of tokens before you divide by all tokens."),
            (inverse / sum(1 / n for n in tokens), "You weighed by 1/n: more tokens must count more, not less."),
            (inverse, "You divided each loss by its tokens. It is a mean already: multiply."),
        ]
        # 1e-6: float32 has seven digits, should the answer be computed with tensors
        source = written(global_loss, (losses, tokens))
        expect_number(source, call(global_loss, list(losses), list(tokens)), total / sum(tokens), mistakes, 1e-6)
    return right("Every token counts once: the loss is that of one big batch, however you slice it.")
