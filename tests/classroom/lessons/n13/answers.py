"""Answers to the exercises of 13_fact_check: right ones, found by another way than the check's, and likely mistakes."""

import json
import tempfile
from pathlib import Path

from qlora_lab.classroom.checks import check_faults, check_project

# --- 13.1 -------------------------------------------------------------------------------------------------------------


def list_faults(settings, has_bf16):
    found = []
    if settings.get("load_in_4bit", False) is not True:
        found.append("load_in_4bit")
    if settings.get("bnb_4bit_quant_type", "fp4") == "fp4":
        found.append("bnb_4bit_quant_type")
    if not settings.get("bnb_4bit_use_double_quant"):
        found.append("bnb_4bit_use_double_quant")
    if settings.get("bnb_4bit_compute_dtype", "float32") != {True: "bfloat16", False: "float16"}[has_bf16]:
        found.append("bnb_4bit_compute_dtype")
    if settings.get("trust_remote_code"):
        found.append("trust_remote_code")
    return found


def without(name, more=()):
    return lambda settings, has_bf16: [*(set(list_faults(settings, has_bf16)) - {name}), *more]


def present_only(settings, has_bf16):
    return [name for name in list_faults(settings, has_bf16) if name in settings]


# --- 13.2 -------------------------------------------------------------------------------------------------------------

FOLDER = Path(tempfile.mkdtemp())


def run(name, lines=60, losses=(2.0, 1.5, 1.0, 0.6, 0.4, 0.3, 0.3, 0.2), exact=0.8, adapter=True, data=None, **report):
    """The folder of a made-up run."""
    folder = FOLDER / name
    (folder / "adapter").mkdir(parents=True)
    file = FOLDER / f"{name}.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n' * lines, encoding="utf-8")
    after = {"exact_match": {} if exact is None else {"test": exact}, "perplexity": {}}
    content = {"losses": list(losses), "steps": len(losses), "after": after, "interrupted": False, **report}
    (folder / "report.json").write_text(json.dumps(content))
    (folder / "run.json").write_text(json.dumps({"data": str(data or file)}))
    if adapter:
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def folder_of_data():
    folder = FOLDER / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 50, encoding="utf-8")
    return folder


def half_written():
    folder = run("half")
    (folder / "report.json").write_text('{"losses": [')
    return folder


RIGHT = [
    (check_faults, (list_faults,)),
    (check_faults, (lambda settings, has_bf16: set(list_faults(settings, has_bf16)),)),
    (check_project, (run("good"),)),
    (check_project, (str(run("as-text")),)),
    (check_project, (run("unjudged", exact=None),)),
    (check_project, (run("of-a-folder", data=folder_of_data()),)),
    (check_project, (run("relative", data="relative.jsonl"),)),
]

WRONG = [  # and what the learner must be told
    (check_faults, without("bnb_4bit_quant_type"), "fp4 is the default"),
    (check_faults, without("bnb_4bit_use_double_quant"), "off unless it is asked for"),
    (check_faults, without("trust_remote_code"), "runs strangers' code"),
    (check_faults, without("load_in_4bit"), "nothing asks for 4 bits"),
    (check_faults, without("bnb_4bit_compute_dtype"), "float32 is the default"),
    (check_faults, present_only, "which is not set"),
    (check_faults, lambda settings, has_bf16: list_faults(settings, True), "float16 is right there"),
    (check_faults, without("", ["trust_remote_code"]), "left out or False it is as it should be"),
    (check_faults, without("", ["device_map"]), "none of the five"),
    (check_faults, lambda settings, has_bf16: len(list_faults(settings, has_bf16)), "expected a set of names"),
    (check_faults, lambda settings, has_bf16: "load_in_4bit", "expected a set of names"),
    (check_project, FOLDER / "nowhere", "there is no folder"),
    (check_project, FOLDER, "no readable run.json"),
    (check_project, half_written(), "no readable report.json"),
    (check_project, run("short", lines=19), "19 lines, expected at least 20"),
    (check_project, run("orders", data="orders"), "trained on the course's 'orders'"),
    (check_project, run("lost", data=FOLDER / "gone.jsonl"), "cannot be found any more"),
    (check_project, run("few", losses=(2.0, 0.5, 0.2)), "3 steps, expected at least 8"),
    (check_project, run("flat", losses=(2.0,) * 7 + (1.9,)), "The loss went from 2.00 to 1.97"),
    (check_project, run("nan", losses=(2.0,) * 7 + (float("nan"),)), "expected less than half"),
    (check_project, run("no-adapter", adapter=False), "adapter is missing"),
    (check_project, run("stopped", interrupted=True), "--resume"),
    (check_project, 3, "expected the run's folder"),
]
