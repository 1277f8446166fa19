"""Export a run of train_qlora: `python -m qlora_lab.export RUN --to FOLDER`.

    --as merged    a checkpoint for transformers, vLLM and others (the default)
    --as gguf      one file for llama.cpp and Ollama, with a Modelfile
    --as adapter   the adapter alone, in GGUF
    --as base      the base that it belongs beside, in GGUF, without the adapter

A file holds the base as it was rounded for training. One in Q4_0 starts from the checkpoint's own weights, since
rounding twice loses more. Not so with --merge-aware and LoftQ, which know of the first rounding.

`--check` asks the export and the trained model the questions that the run was judged on. Its verdict is "equal";
"lossy", for 4 bits that cost some of what the model had right; or "broken". The exit code is 2 for a broken export and
for a user's error, else 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from dataclasses import dataclass

from qlora_lab.arguments import Parser, count
from qlora_lab.errors import UserError
from qlora_lab.export.check import Check, check_checkpoint, check_gguf, judged_chats
from qlora_lab.export.checkpoint import checkpoint_bytes, write_checkpoint
from qlora_lab.export.gguf_files import KINDS, plan, write_adapter, write_model
from qlora_lab.export.llama_cpp import INSTALL, is_here
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.new_folder import new_folder
from qlora_lab.export.papers import base_card, model_card, modelfile
from qlora_lab.export.trained_run import TrainedRun, read_base, read_run
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.models.hardware import DTYPES
from qlora_lab.models.loading import load_tokenizer

CHECKPOINT_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def parser() -> Parser:
    p = Parser(prog="python -m qlora_lab.export", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("run", metavar="RUN", help="the output folder of train_qlora; with --as base a model will do")
    p.add_argument("--to", type=pathlib.Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    p.add_argument("--as", dest="form", choices=list(WHAT), default="merged")
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
    """Run the command line; return the exit code: 0, 2 (a user's error, a broken export), 130 (Ctrl-C)."""
    written = None
    try:
        args = parser().parse_args(arguments)
        require_possible(args)
        trained = args.form != "base" or (pathlib.Path(args.run) / "run.json").is_file()
        run = read_run(pathlib.Path(args.run)) if trained else read_base(args.run)
        chats = judged_chats(run, args.samples) if args.check else []
        written = export(run, args.to, args.form, args.weights)
        check = check_export(run, args.to, args.form, args.weights, chats) if args.check else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = f"{args.to} is whole, but not checked" if written else "nothing is left of the export"
        print(f"error: interrupted: {left}", file=sys.stderr)
        return 130
    if check:
        text = json.dumps(check.as_dict(), indent=1, ensure_ascii=False)
        (args.to / "check.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.json:
        print(json.dumps({**dataclasses.asdict(written), "check": check.as_dict() if check else None}))
    else:
        sizes = [f"{args.to / name}: {nbytes / 1e6:,.1f} MB" for name, nbytes in written.files.items()]
        print("\n".join([*sizes, *written.run_with, *([str(check)] if check else [])]))
    if check and check.verdict == "broken":
        print(f"error: {args.to} is broken: {check.why}", file=sys.stderr)
        return 2
    return 0


def require_possible(args) -> None:
    """Raise UserError for arguments that do not go together, before anything is loaded."""
    if args.form == "merged" and args.weights not in (None, *CHECKPOINT_DTYPES):
        raise UserError(f"--weights {args.weights} is for --as gguf: a checkpoint has {', '.join(CHECKPOINT_DTYPES)}")
    if args.form in IN_GGUF and args.weights == "f32":
        raise UserError(f"--weights f32 is for --as merged: a GGUF file has {', '.join(KINDS)}")
    if args.form == "adapter" and args.weights:
        raise UserError("--weights is for --as gguf and --as merged: an adapter is written as it is, in f32")
    if args.form in ("adapter", "base") and args.check:
        raise UserError("--check is for --as gguf and --as merged: base and adapter answer together, nothing here does")
    if args.form == "gguf" and args.check and not is_here():
        raise UserError(f"--check wants llama.cpp, which is not here: {INSTALL} brings it")


@dataclass(frozen=True)
class Written:
    """What `export` has written.

    Attributes:
        files: of weights, by name: bytes.
        run_with: lines to run it with.
    """

    files: dict[str, int]
    run_with: list[str]


def export(run: TrainedRun, to: pathlib.Path, form: str = "merged", kind: str | None = None) -> Written:
    """Write a run's model.

    Args:
        to: a folder that does not exist; it appears when all is written.
        form: of WHAT.
        kind: type of the matrices; None: bf16 for a checkpoint, f16 for GGUF.

    Raises:
        UserError: whatever the modules of this room refuse.
    """
    kind = kind or ("bf16" if form == "merged" else "f16")
    weights = MergedWeights(run, with_adapter=form != "base", rounded=run.rounded_for(kind))
    tokenizer = load_tokenizer(run.base)
    name = (
        base_name(run, kind) if form == "base" else f"{_last(run.model)}-{pathlib.PurePath(run.settings['data']).stem}"
    )
    file = f"{name}-{'adapter' if form == 'adapter' else kind.upper()}.gguf"
    vocabulary = read_vocabulary(tokenizer, weights.config.vocab_size) if form in IN_GGUF else None
    if form == "merged":
        dtype = DTYPES[CHECKPOINT_DTYPES[kind]]
        nbytes = checkpoint_bytes(weights, dtype)
    elif vocabulary:
        nbytes = sum(entry.nbytes for entry in plan(weights, kind))
    else:
        nbytes = 4 * sum(math.prod(a.shape) + math.prod(b.shape) for _, a, b in weights.matrices())
    with new_folder(to, nbytes) as folder:
        if form == "merged":
            write_checkpoint(weights, folder, dtype)
        elif vocabulary:
            write_model(weights, vocabulary, folder / file, kind, name)
            (folder / "Modelfile").write_text(modelfile(file, vocabulary, tokenizer), encoding="utf-8")
        else:
            write_adapter(weights, folder / file, name)
        lines = commands(run, form, pathlib.Path(), file, name)
        if form == "base":
            card = base_card(run.model, WHAT[form], lines)
        else:
            card = model_card(run.settings, run.report, WHAT[form], lines)
        (folder / "README.md").write_text(card, encoding="utf-8")
    found = sorted(path for path in to.iterdir() if path.suffix in (".gguf", ".safetensors"))
    return Written({path.name: path.stat().st_size for path in found}, commands(run, form, to, file, name))


def commands(run: TrainedRun, form: str, where: pathlib.Path, file: str, name: str) -> list[str]:
    """Lines to run an export with.

    Args:
        where: its folder, as it is named from where the lines are typed.
        file, name: of the GGUF file, of the model.
    """
    if form == "merged":
        return [f"vllm serve {where}", f"transformers chat {where}"]
    if form in IN_GGUF:
        return [f"llama-server -m {where / file}", f"ollama create {name.lower()} -f {where / 'Modelfile'}"]
    base = f"{base_name(run, 'f16')}-F16.gguf"
    if where == pathlib.Path():
        return [f"llama-server -m {base} --lora {file}"]
    make_it = f"python -m qlora_lab.export {run.folder} --to BASE --as base"
    return [make_it, f"llama-server -m {pathlib.Path('BASE') / base} --lora {where / file}"]


def base_name(run: TrainedRun, kind: str) -> str:
    """What the base's own file is called: one that holds the base as it was changed for training says so."""
    what = [_last(run.model), *["left-over"] * run.left_over, *["nf4"] * run.rounded_for(kind)]
    return "-".join(what)


def _last(path: str) -> str:
    return pathlib.PurePath(path).name


IN_GGUF = ("gguf", "base")
WHAT = {
    "merged": "The adapter is merged into the weights that it was trained beside, those of 4 bits dequantized.",
    "gguf": "One file for llama.cpp and Ollama, with the adapter merged into its weights.",
    "adapter": "A LoRA for llama.cpp, to be put beside the base that it was trained beside, which `--as base` writes.",
    "base": "A base without an adapter, for llama.cpp and Ollama, and for adapters that were trained beside it.",
}


def check_export(run: TrainedRun, to: pathlib.Path, form: str, kind: str | None, chats: list) -> Check:
    """Compare what `export` has written with the trained model. Raises UserError if it cannot be loaded."""
    if form == "merged":
        return check_checkpoint(run, to, chats)
    (file,) = to.glob("*.gguf")
    return check_gguf(run, file, kind or "f16", chats)


if __name__ == "__main__":
    sys.exit(main())
