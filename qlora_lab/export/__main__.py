"""Export a run of train_qlora: `python -m qlora_lab.export RUN --to FOLDER`.

    --as merged    a checkpoint for transformers, vLLM and others (the default)
    --as gguf      one file for llama.cpp and Ollama, with a Modelfile
    --as adapter   the adapter alone, in GGUF, for a base that llama.cpp has already

`--check` asks the export and the trained model the questions that the run was judged on. The exit code is 2 for a
user's error, and for an export that does not answer as the model did.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys

from qlora_lab.arguments import Parser, count
from qlora_lab.errors import UserError
from qlora_lab.export.check import Check, check_checkpoint, check_gguf, judged_chats
from qlora_lab.export.checkpoint import checkpoint_bytes, write_checkpoint
from qlora_lab.export.gguf_files import KINDS, plan, write_adapter, write_model
from qlora_lab.export.llama_cpp import INSTALL, is_here
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.new_folder import new_folder
from qlora_lab.export.papers import model_card, modelfile
from qlora_lab.export.trained_run import TrainedRun, read_run
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.models.hardware import DTYPES
from qlora_lab.models.loading import load_tokenizer

CHECKPOINT_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def parser() -> Parser:
    p = Parser(prog="python -m qlora_lab.export", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("run", type=pathlib.Path, metavar="RUN", help="the output folder of train_qlora")
    p.add_argument("--to", type=pathlib.Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    p.add_argument("--as", dest="form", choices=["merged", "gguf", "adapter"], default="merged")
    p.add_argument(
        "--weights",
        choices=[*KINDS, "f32"],
        help="type of the matrices (default: bf16 for merged, f16 for gguf; f32 for merged only)",
    )
    p.add_argument("--check", action="store_true", help="compare its answers with the trained model's")
    p.add_argument("--samples", type=count, help="of each split to check (default: as many as the run was judged on)")
    p.add_argument("--json", action="store_true", help="the report as JSON on standard output, and nothing else there")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a user's error and for a broken export."""
    try:
        args = parser().parse_args(arguments)
        require_possible(args)
        run = read_run(args.run)
        chats = judged_chats(run, args.samples) if args.check else []
        lines = export(run, args.to, args.form, args.weights)
        check = check_export(run, args.to, args.form, args.weights, chats) if args.check else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check:
        (args.to / "check.json").write_text(json.dumps(check.as_dict(), indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps({"run_with": lines, "check": check.as_dict() if check else None}))
    else:
        print("\n".join([*lines, *([str(check)] if check else [])]))
    if check and check.broken:
        print(f"error: {args.to} is broken: {check.broken}", file=sys.stderr)
        return 2
    return 0


def require_possible(args) -> None:
    """Raise UserError for arguments that do not go together, before anything is loaded."""
    if args.form == "merged" and args.weights not in (None, *CHECKPOINT_DTYPES):
        raise UserError(f"--weights {args.weights} is for --as gguf: a checkpoint has {', '.join(CHECKPOINT_DTYPES)}")
    if args.form == "gguf" and args.weights == "f32":
        raise UserError(f"--weights f32 is for --as merged: a GGUF file has {', '.join(KINDS)}")
    if args.form == "adapter" and args.weights:
        raise UserError("--weights is for --as gguf and --as merged: an adapter is written as it is, in f32")
    if args.form == "adapter" and args.check:
        raise UserError("--check is for --as gguf and --as merged: an adapter answers with the base that it is put on")
    if args.form == "gguf" and args.check and not is_here():
        raise UserError(f"--check wants llama.cpp, which is not here: {INSTALL} brings it")


def export(run: TrainedRun, to: pathlib.Path, form: str = "merged", kind: str | None = None) -> list[str]:
    """Write a run's model.

    Args:
        to: a folder that does not exist; it appears when all is written.
        form: "merged", "gguf" or "adapter".
        kind: type of the matrices; None: bf16 for a checkpoint, f16 for GGUF.

    Returns:
        lines that say what to run it with

    Raises:
        UserError: whatever the modules of this room refuse.
    """
    weights = MergedWeights(run)
    tokenizer = load_tokenizer(run.base)
    kind = kind or ("f16" if form == "gguf" else "bf16")
    name = f"{pathlib.PurePath(run.model).name}-{pathlib.PurePath(run.settings['data']).stem}"
    if form == "merged":
        dtype = DTYPES[CHECKPOINT_DTYPES[kind]]
        nbytes = checkpoint_bytes(weights, dtype)
        lines = [f"vllm serve {to}", f"transformers chat {to}"]
    elif form == "gguf":
        vocabulary = read_vocabulary(tokenizer, weights.config.vocab_size)
        nbytes = sum(entry.nbytes for entry in plan(weights, kind))
        file = f"{name}-{kind.upper()}.gguf"
        lines = [f"llama-server -m {to / file}", f"ollama create {name.lower()} -f {to / 'Modelfile'}"]
    else:
        file = f"{name}-adapter.gguf"
        nbytes = 4 * sum(math.prod(a.shape) + math.prod(b.shape) for _, a, b in weights.matrices())
        lines = [f"llama-server -m BASE.gguf --lora {to / file}"]
    with new_folder(to, nbytes) as folder:
        if form == "merged":
            write_checkpoint(weights, folder, dtype)
        elif form == "gguf":
            write_model(weights, vocabulary, folder / file, kind, name)
            (folder / "Modelfile").write_text(modelfile(file, vocabulary, tokenizer), encoding="utf-8")
        else:
            write_adapter(weights, folder / file, name)
        (folder / "README.md").write_text(model_card(run, WHAT[form], lines), encoding="utf-8")
    return lines


WHAT = {
    "merged": "The adapter is merged into the weights that it was trained beside, those of 4 bits dequantized.",
    "gguf": "One file for llama.cpp and Ollama. The adapter is merged into the weights that it was trained beside.",
    "adapter": "A LoRA for llama.cpp, trained beside a base of 4 bits: beside another rounding it answers worse.",
}


def check_export(run: TrainedRun, to: pathlib.Path, form: str, kind: str | None, chats: list) -> Check:
    """Compare what `export` has written with the trained model. Raises UserError if it cannot be loaded."""
    if form == "merged":
        return check_checkpoint(run, to, chats)
    (file,) = to.glob("*.gguf")
    return check_gguf(run, file, kind or "f16", chats)


if __name__ == "__main__":
    sys.exit(main())
