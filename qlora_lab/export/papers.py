"""What goes with a model: a Modelfile for Ollama, a model card for the hub, the line to run each thing with."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

from qlora_lab.evaluation.reports import ANSWERED, READ
from qlora_lab.export.go_template import turn_texts
from qlora_lab.export.trained_run import TrainedRun
from qlora_lab.export.vocabulary import Vocabulary
from qlora_lab.models.bundled import CATALOGUE

BUNDLED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the bundled file was made from


def modelfile(file: str, vocabulary: Vocabulary, tokenizer, adapter: str | None = None) -> str:
    """Ollama's recipe: `ollama create NAME -f Modelfile`.

    Greedy, as the run was judged. Where the chat template does more than put words between fixed texts, TEMPLATE is
    left out, with a comment: Ollama then looks whether it knows the template in the file.
    """
    lines = [f"FROM ./{file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    texts = turn_texts(tokenizer)
    if texts is None:
        lines.append("# No TEMPLATE: this chat template does more than Ollama's language can be shown to do")
    else:
        lines.append(f'TEMPLATE """{texts.go(vocabulary.add_start)}"""')
        if texts.system:
            lines.append(f'SYSTEM """{texts.system}"""')
    for id in (vocabulary.end, vocabulary.end_of_turn):
        if id is not None:
            lines.append(f"PARAMETER stop {json.dumps(vocabulary.tokens[id], ensure_ascii=False)}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def model_card(run: TrainedRun, what: str, lines: list[str]) -> str:
    """A README.md in the hub's format: base, data, settings, scores before and after, versions.

    Args:
        what: the export, in a few words.
        lines: to run it with, in its own folder.
    """
    data = pathlib.PurePath(run.settings["data"]).name
    settings = {key: value for key, value in run.settings.items() if value != "None" and not _is_path(value)}
    text = [*_head(run, f"tags: [{run.settings['method']}, lora]"), f"# {_base(run)[1]}, fine-tuned on {data}", ""]
    text += [f"{what} It was trained with QLoRA Lab's `train_qlora`. {_licence(run)}", "", *_run_it(lines)]
    text += ["## Settings", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    text += ["## Scores", "", "| measure | before | after |", "|---|---|---|", *_scores(run.report), ""]
    return "\n".join([*text, _versions(), ""])


def base_card(run: TrainedRun, what: str, lines: list[str]) -> str:
    """A README.md for a base without an adapter. Arguments as for `model_card`."""
    text = [*_head(run), f"# {_base(run)[1]}, in GGUF", "", f"{what} {_licence(run)}", "", *_run_it(lines)]
    return "\n".join([*text, _versions(), ""])


def _base(run: TrainedRun) -> tuple[str, str]:
    """The base's name on the hub or its folder, and the last part of it."""
    base = BUNDLED_BASE if run.model in CATALOGUE else run.model
    return base, pathlib.PurePath(base).name


def _head(run: TrainedRun, *more: str) -> list[str]:
    base = _base(run)[0]
    head = ["---", "pipeline_tag: text-generation", *more]
    if not pathlib.Path(base).exists():  # a folder of this machine is nobody's base
        head.append(f"base_model: {base}")
    if run.model in CATALOGUE:
        head.append("license: apache-2.0")
    return [*head, "---"]


def _licence(run: TrainedRun) -> str:
    if run.model in CATALOGUE:
        return "The base is under the licence Apache-2.0, and so is this model."
    return "The base's licence holds for this model, too: look it up, and name it here."


def _run_it(lines: list[str]) -> list[str]:
    return ["## Run it", "", "In this folder:", "", "```", *lines, "```", ""]


def _versions() -> str:
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "gguf")
    return f"Written with {', '.join(f'{name} {importlib.metadata.version(name)}' for name in libraries)}."


def _is_path(value: str) -> bool:
    return pathlib.PurePath(value).is_absolute()


def _scores(report: dict) -> list[str]:
    rows = []
    for kind, names, form in (("exact_match", ANSWERED, "{:.1%}"), ("perplexity", READ, "{:.3f}")):
        for name in names:
            before, after = (report.get(time, {}).get(kind, {}).get(name) for time in ("before", "after"))
            if before is not None and after is not None:
                rows.append(f"| {kind.replace('_', ' ')}, {name} | {form.format(before)} | {form.format(after)} |")
    return rows or ["| not judged | | |"]
