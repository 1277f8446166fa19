"""What goes with a model: a Modelfile for Ollama, a model card for the hub, the line to run each thing with."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from collections.abc import Mapping

from qlora_lab.evaluation.reports import DULLEST, SCORE_COLUMNS, score_lines
from qlora_lab.export.go_template import turn_texts
from qlora_lab.export.vocabulary import Vocabulary
from qlora_lab.models.bundled import CATALOGUE

BUNDLED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the bundled file was made from


PISSA = {
    "qlora": " It began as a part of the weights (PiSSA), and its base is what was left of them, in 4 bits: beside the "
    "whole base it is useless.",
    "lora": " It began as a part of the weights (PiSSA), which half of its rank takes away: the base is the whole one.",
}


def modelfile(file: str, vocabulary: Vocabulary, tokenizer) -> str:
    """Ollama's recipe: `ollama create NAME -f Modelfile`.

    Greedy, as the run was judged, and without the penalty for repetitions that Ollama had of its own for long (1.1).
    Where the chat template does more than put words between fixed texts, TEMPLATE is left out, with a comment: Ollama
    then looks whether it knows the template in the file. So it is if a Modelfile cannot hold one of its texts.

    Source: docs/modelfile.mdx and parser/parser.go in github.com/ollama/ollama.
    """
    lines = [f"FROM ./{file}"]
    texts = turn_texts(tokenizer)
    template, system = (quoted(texts.go(vocabulary.add_start)), quoted(texts.system)) if texts else (None, None)
    if texts and template and system:
        lines.append(f"TEMPLATE {template}")
        if texts.system:
            lines.append(f"SYSTEM {system}")
    else:
        lines.append("# No TEMPLATE: this chat template does more than Ollama's language can be shown to do")
    for id in (vocabulary.end, vocabulary.end_of_turn):
        if id is not None and (stop := quoted(vocabulary.tokens[id])):  # the file, too, says where answers end
            lines.append(f"PARAMETER stop {stop}")
    return "\n".join([*lines, "PARAMETER temperature 0", "PARAMETER repeat_penalty 1", ""])


def quoted(text: str) -> str | None:
    """A text as an argument in a Modelfile, or None if that cannot hold it.

    Nothing is escaped there: a text ends at its closing quotes. What cannot be printed is dropped by Ollama.
    """
    if '"""' in text or not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    marks = '"""' if '"' in text or "\n" in text else '"'
    return f"{marks}{text}{marks}"


def model_card(settings: Mapping[str, str], report: Mapping, what: str, lines: list[str]) -> str:
    """A README.md in the hub's format: base, data, settings, scores before and after with their counts, versions.

    Args:
        settings: the run's, as text, see `training/run_folder.py`.
        report: the run's; {} if it has none.
        what: the export, in a few words.
        lines: to run it with, in its own folder.
    """
    head = _head(settings["model"], f"tags: [{settings['method']}, lora]")
    run_it = ["## Run it", "", "In this folder:", "", "```", *lines, "```", ""]
    return "\n".join([*head, *_trained(settings, what), *run_it, *_about(settings, report)])


def adapter_card(settings: Mapping[str, str], report: Mapping, own_tokenizer: bool) -> str:
    """A README.md for an adapter's folder, with the code that loads it beside its base. Arguments as for `model_card`.

    Args:
        own_tokenizer: whether the folder has a tokenizer, and the base's is not the one that it was trained with.
    """
    more = (f"tags: [{settings['method']}, lora]", "library_name: peft", "base_model_relation: adapter")
    what = "A LoRA in PEFT's format, to be put beside its base."
    if settings.get("init") == "pissa":
        what += PISSA[settings["method"]]
    if (target := settings.get("merge_aware", "None")) != "None":
        what += f" It was trained to be merged and rounded to {target}, and its scores are those of that merge."
    code = ["## Load it", "", "In this folder:", "", "```python", *_loading(settings, report, own_tokenizer), "```", ""]
    return "\n".join([*_head(settings["model"], *more), *_trained(settings, what), *code, *_about(settings, report)])


def base_card(model: str, what: str, lines: list[str]) -> str:
    """A README.md for a base without an adapter. model: its name or folder. Other arguments as for `model_card`."""
    text = [*_head(model), f"# {_base(model)[1]}, in GGUF", "", f"{what} {_licence(model)}", ""]
    return "\n".join([*text, "## Run it", "", "In this folder:", "", "```", *lines, "```", "", _versions(), ""])


def _base(model: str) -> tuple[str, str]:
    """The base's name on the hub or its folder, and the last part of it."""
    base = BUNDLED_BASE if model in CATALOGUE else model
    return base, pathlib.PurePath(base).name


def _head(model: str, *more: str) -> list[str]:
    base = _base(model)[0]
    head = ["---", "pipeline_tag: text-generation", *more]
    if pathlib.Path(base).exists():  # a folder of this machine is nobody's base
        head = [line for line in head if not line.startswith("base_model")]
    else:
        head.append(f"base_model: {base}")
    if model in CATALOGUE:
        head.append("license: apache-2.0")
    return [*head, "---"]


def _trained(settings: Mapping[str, str], what: str) -> list[str]:
    data = pathlib.PurePath(settings["data"]).name
    title = f"# {_base(settings['model'])[1]}, fine-tuned on {data}"
    return [title, "", f"{what} It was trained with QLoRA Lab's `train_qlora`. {_licence(settings['model'])}", ""]


def _licence(model: str) -> str:
    if model in CATALOGUE:
        return (
            "The base is under the licence Apache-2.0, and so is this model. Its weights are those of the package "
            f"{CATALOGUE[model].requirement}, which holds them in Q4_1."
        )
    return "The base's licence holds for this model, too: look it up, and name it here."


def _loading(settings: Mapping[str, str], report: Mapping, own_tokenizer: bool) -> list[str]:
    """Python that loads base and adapter with PEFT."""
    model, dtype = settings["model"], f"torch.{report.get('compute_dtype', 'bfloat16')}"
    where = f'"{_base(model)[1]}"  # the folder of the base' if pathlib.Path(model).exists() else json.dumps(model)
    quantized, tokenizer = settings["method"] == "qlora", '"."' if own_tokenizer else "name"
    if quantized and settings.get("init") == "pissa":
        return [
            "import torch",
            "from qlora_lab.finetuning import load_adapter, load_model",
            "from qlora_lab.models.loading import locate",
            "from qlora_lab.models.sharded import CheckpointWeights",
            "",
            f"name = {where}",
            f'base, tokenizer = load_model(name, "nf4", compute_dtype={dtype})',
            'model = load_adapter(base, ".", CheckpointWeights(locate(name)))',
        ]
    config = [
        "config = BitsAndBytesConfig(",
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
        f"    bnb_4bit_compute_dtype={dtype},",
        ")",
    ]
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantized else ''}",
        *(["from qlora_lab.models.loading import locate"] if model in CATALOGUE else []),
        "",
        f"name = {f'locate({where})' if model in CATALOGUE else where}",
        *(config if quantized else []),
        f"base = AutoModelForCausalLM.from_pretrained(name, dtype={dtype}"
        f"{', quantization_config=config' if quantized else ''})",
        'model = PeftModel.from_pretrained(base, ".")',
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
    ]


def _about(settings: Mapping[str, str], report: Mapping) -> list[str]:
    """Settings, scores and versions."""
    settings = {**settings, "steps": str(report.get("steps", settings.get("steps")))}  # by default none are asked for
    told = [f"- {key}: {value}" for key, value in settings.items() if value != "None" and not _is_path(value)]
    scores = score_lines(report) if {"before", "after"} <= report.keys() else []
    columns = SCORE_COLUMNS[: len(scores[0]) - 1] if scores else SCORE_COLUMNS[:2]
    rows = [_table_row(label, *values) for label, *values in scores] or [_table_row("not judged", "", "")]
    head = [_table_row("measure", *columns), "|---" * (1 + len(columns)) + "|"]
    note = [f"{DULLEST[0].upper()}{DULLEST[1:]}.", ""] if len(columns) == 3 else []
    return ["## Settings", "", *told, "", "## Scores", "", *head, *rows, "", *note, _versions(), ""]


def _table_row(*cells: str) -> str:
    """A row of Markdown's; a score by a pattern may have a bar in its name."""
    return f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in cells)} |"


def _versions() -> str:
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "gguf")
    return f"Written with {', '.join(f'{name} {importlib.metadata.version(name)}' for name in libraries)}."


def _is_path(value: str) -> bool:
    return pathlib.PurePath(value).is_absolute()
