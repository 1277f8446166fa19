"""How fast a training step is: ours, what everybody uses, and what lies between. `make bench-gpu`.

The model is a LLaMA-7B with random weights in NF4 with double quantization, adapters of rank 64 on all linear layers,
512 tokens a sample, paged AdamW in 32 bits; then the bundled model on the course's orders. A step's time is a median of
wall times, from its samples to its loss on the host. Peak memory is what PyTorch's allocator handed out at most during
the steps, capture included; AdamW's states lie outside of it (1.28 GB at 7B), for everyone alike.

    standard     PEFT + bitsandbytes under bf16 autocast, fp32 adapters: `train_steps` as it is
    trl          the same through TRL's SFTTrainer, if TRL is installed
    unsloth      Unsloth's, through its SFTTrainer, if Unsloth is installed; its default checkpointing, which moves
                 layers' inputs to the host too, and "unsloth, on the GPU" without that
    graph        the standard forward and backward pass, captured in one CUDA graph
    bf16         the standard step with bf16 adapters: nothing to cast
    unrecorded   the fast step without its CUDA graph: fewer kernels, launched by Python
    fast         `train_steps(fast=True)`
    offloading   the same with `activation_offloading=True`: layers' inputs wait in the host's memory

The floor is the time of the arithmetic alone, at the rate of a large matrix product in the same run: 4 operations a
weight and token without checkpointing (forward, and the gradient of the input; frozen weights need none), 6 with, if
the whole forward pass is repeated. (The fast step repeats neither a layer's last product nor the last layer: 9 % less.)
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from triton.testing import do_bench

from qlora_lab.finetuning import (
    PRESETS,
    Batches,
    TokenizedSample,
    add_adapter,
    build_random,
    load_model,
    load_samples,
    tokenize,
    train_steps,
)
from qlora_lab.memory import SHAPES
from qlora_lab.training.steps.choice import make_fast_step
from qlora_lab.training.steps.fast.host_memory import capture_stream

SETTINGS = ((1, True), (4, True), (4, False), (16, True))  # samples a step, checkpointing
LENGTH, RANK, SHAPE = 512, 64, "llama-7b"
BETWEEN = ("bf16", "graph", "unrecorded")
COMMON = {"learning_rate": 1e-4, "optimizer": "paged_adamw_32bit", "compute_dtype": torch.bfloat16}


def samples(count: int, length: int, vocabulary: int) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(0)
    return [
        TokenizedSample(tuple(torch.randint(3, vocabulary, (length,), generator=draw).tolist()), 1)
        for _ in range(count)
    ]


def make(who: str):
    """A 7B model as this way of training wants it, and its arguments for `train_steps`."""
    gc.collect()
    torch.cuda.empty_cache()
    model = build_random(SHAPES[SHAPE], device="cuda", compute_dtype=torch.bfloat16)
    if who == "bf16":
        preset = PRESETS["bf16-adapters"]
        model, settings = preset.adapt(model, rank=RANK, alpha=RANK), preset.settings()
        return model, {**COMMON, "compute_dtype": settings["compute_dtype"]}
    model = add_adapter(model, rank=RANK, alpha=RANK)
    return model, {
        **COMMON,
        "fast": who in ("fast", "unrecorded", "offloading"),
        "activation_offloading": who == "offloading",
        **({"make_step": functools.partial(make_fast_step, capture=False)} if who == "unrecorded" else {}),
    }


def running(who: str, batch: int, checkpointing: bool, steps: int):
    """A generator of StepRecords."""
    model, settings = make(who)
    torch.cuda.reset_peak_memory_stats()
    if who == "graph":
        return graphed_steps(model, batch, checkpointing, steps)
    batches = Batches(samples(4 * batch, LENGTH, SHAPES[SHAPE].vocab_size), batch)
    return train_steps(model, batches, steps=steps, gradient_checkpointing=checkpointing, **settings)


def graphed_steps(model, batch: int, checkpointing: bool, steps: int):
    """Transformers' and PEFT's forward and backward pass under autocast, recorded once; AdamW as usual."""
    from types import SimpleNamespace

    from qlora_lab.training.optimizers import make_optimizer
    from qlora_lab.training.schedules import rate

    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = make_optimizer(COMMON["optimizer"], parameters, COMMON["learning_rate"], 0.0)
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    data = samples(4 * batch, LENGTH, SHAPES[SHAPE].vocab_size)
    ids = torch.zeros(batch, LENGTH, dtype=torch.int64, device="cuda")
    positions = torch.arange(LENGTH, device="cuda").expand(batch, LENGTH)

    def forward_backward():
        for p in parameters:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    stream = capture_stream(ids.device)
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_backward()
    torch.cuda.synchronize()
    for p in parameters:
        p.grad = None
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = forward_backward()
    for step in range(steps):
        start = time.perf_counter()
        rows = data[step % 4 * batch :][:batch]
        for group in adamw.param_groups:
            group["lr"] = COMMON["learning_rate"] * rate(step + 1, steps, 3, "cosine")
        ids.copy_(torch.tensor([row.ids for row in rows]))
        graph.replay()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        value = loss.item()
        yield SimpleNamespace(loss=value, seconds=time.perf_counter() - start, tokens=batch * LENGTH)


def trl_steps(model, tokenizer, batch: int, checkpointing: bool, steps: int, **settings) -> tuple[list, list]:
    """SFTTrainer on a model with adapters. Seconds by its own clock, from one step's end to the next; losses."""
    import datasets
    import transformers
    import trl

    ends, losses = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **others):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, arguments, state, control, logs=None, **others):
            if "loss" in logs:
                losses.append(logs["loss"])

    ids = [list(sample.ids) for sample in samples(4 * batch, LENGTH, SHAPES[SHAPE].vocab_size)]
    configured = trl.SFTConfig(
        output_dir="/tmp/bench-trl",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=COMMON["learning_rate"],
        optim=COMMON["optimizer"],
        bf16=True,
        gradient_checkpointing=checkpointing,
        max_length=LENGTH,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = trl.SFTTrainer(
        model, args=configured, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return [end - start for start, end in zip(ends, ends[1:], strict=False)], losses


def trl_run(batch: int, checkpointing: bool, steps: int) -> dict:
    model, _ = make("standard")
    _, tokenizer = load_model(device="cpu")  # SFTTrainer wants one; the samples are made of numbers
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return trl_result(batch, *trl_steps(model, tokenizer, batch, checkpointing, steps, **settings))


def trl_result(batch: int, seconds: list[float], losses: list[float]) -> dict:
    return result(seconds[len(seconds) // 3 :], batch * LENGTH, losses)


def unsloth_runs(steps: int):
    """Unsloth's, on the same weights, one after the other as they come from a process of its own: `bench_unsloth`."""
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(build_random(SHAPES[SHAPE], device="cuda", compute_dtype=torch.bfloat16), pathlib.Path(folder))
        torch.cuda.empty_cache()
        script = pathlib.Path(__file__).with_name("bench_unsloth.py")
        command = [sys.executable, script, folder, str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as child:  # it writes where it is
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
    if child.returncode:
        print(f"unsloth gave up, see above (exit status {child.returncode})")


def save_quantized(model, folder: pathlib.Path) -> None:
    """Write a model in 4 bits as transformers does, and a tokenizer that knows no words."""
    import tokenizers
    import transformers
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    model.config.save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = tokenizers.models.WordLevel({token: i for i, token in enumerate(special.values())}, "<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **special)
    tokenizer.save_pretrained(folder)


def result(seconds: list[float], tokens: int, losses: list[float]) -> dict:
    median = statistics.median(seconds)
    return {
        "milliseconds": 1e3 * median,
        "tokens_per_second": tokens / median,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "losses": losses,
    }


def measured(records) -> dict:
    records = list(records)
    return result([r.seconds for r in records[len(records) // 3 :]], records[-1].tokens, [r.loss for r in records])


KINDS = (  # of kernels, by what their names contain; the first that fits
    ("attention", ("flash", "fmha", "sdpa")),
    ("matrix product", ("nvjet", "gemm", "cutlass", "splitK", "cublas")),
    ("dequantize", ("dequantize", "kDequantize", "Dequantize")),
    ("AdamW", ("adam", "kOptimizer", "Optimizer32bit")),
    ("copies, fills", ("copy", "Memcpy", "Memset", "Fill", "CatArray")),
    ("norm, rotary, SwiGLU, loss", ("rms_norm", "rotate", "swiglu", "cross_entropy", "border")),
)


def profile(who: str, batch: int, checkpointing: bool) -> dict:
    """One step's kernels: how many, how long by kind; and when each of the first ran."""
    from torch.profiler import ProfilerActivity, profile

    steps = running(who, batch, checkpointing, 6)
    for _ in range(4):
        next(steps)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        next(steps)
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, kind_of(e.name)) for e in events)
    steps.close()
    kinds: dict[str, list] = {}
    busy = end_of_last = 0.0
    for start, end, kind in spans:
        count_and_time = kinds.setdefault(kind, [0, 0.0])
        count_and_time[0] += 1
        count_and_time[1] += (end - start) / 1e3
        busy += max(0.0, end - max(start, end_of_last))
        end_of_last = max(end_of_last, end)
    first = spans[0][0]
    middle = spans[len(spans) // 3 :][:150]  # in the forward or backward pass of some layer
    return {
        "kernels": len(spans),
        "span_milliseconds": (end_of_last - first) / 1e3,
        "busy_milliseconds": busy / 1e3,
        "kinds": {kind: {"count": n, "milliseconds": ms} for kind, (n, ms) in sorted(kinds.items())},
        "timeline_microseconds": [
            [round(start - middle[0][0], 1), round(end - middle[0][0], 1), kind] for start, end, kind in middle
        ],
    }


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "elementwise and sums")


def bundled(who: str, steps: int) -> dict:
    """The bundled model, rank 16, 16 orders a step."""
    gc.collect()
    torch.cuda.empty_cache()
    model, tokenizer = load_model(quantization="nf4", device="cuda")
    orders, _ = tokenize(load_samples("orders"), tokenizer, 512)
    model = add_adapter(model, rank=16, alpha=32)
    torch.cuda.reset_peak_memory_stats()
    records = list(
        train_steps(
            model,
            Batches(orders, 16),
            steps=steps,
            learning_rate=1e-3,
            compute_dtype=torch.bfloat16,
            fast=who == "fast",
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    late = records[steps // 2 :]
    tokens = statistics.mean(r.tokens for r in late)
    return result([r.seconds for r in late], tokens, [r.loss for r in records]) | {"tokens": tokens}


def matrix_product_rate(n: int = 8192) -> float:
    """Operations a second of a large product of random bf16 matrices."""
    a = torch.randn(n, n, device="cuda").bfloat16()
    return 2 * n**3 / do_bench(lambda: a @ a, warmup=100, rep=1000, return_mode="median") * 1e3


def floor(tokens: int, checkpointing: bool, rate: float) -> float:
    """Milliseconds of the arithmetic alone."""
    shape = SHAPES[SHAPE]
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size
    return 1e3 * (6 if checkpointing else 4) * weights * tokens / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, step-<gpu>.json")
    parser.add_argument("--only", nargs="*", help="of the ways to train, and of 'profiles' and 'bundled', these alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench-gpu measures a GPU, and PyTorch sees none here\n")
    warnings.filterwarnings("ignore")
    gpu = torch.cuda.get_device_name()
    wanted = lambda part: not arguments.only or part in arguments.only  # noqa: E731
    names = ("torch", "transformers", "peft", "bitsandbytes", "triton", "accelerate", "trl", "unsloth")
    versions = {name: importlib.metadata.version(name) for name in names if installed(name)}
    print(f"{gpu}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    for name in {"trl", "unsloth"} - set(versions):
        print(f"{name} is not installed: left out")

    rate = matrix_product_rate()
    print(f"a matrix product of 8192 x 8192 x 8192 in bf16: {rate / 1e12:.0f} TFLOP/s\n")
    print(f"{'LLaMA-7B':32}{'ms':>9}{'tokens/s':>10}{'of floor':>10}{'peak GB':>9}{'first loss':>12}{'last':>9}")
    runs, profiles, small = [], [], {}

    def save() -> None:
        if not arguments.output:
            return
        record = {
            "command": "make bench-gpu",
            "device": gpu,
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "settings": {"shape": SHAPE, "rank": RANK, "sequence_length": LENGTH, "steps": arguments.steps},
            "matrix product, operations per second": rate,
            "runs": runs,
            "profiles": profiles,
            "bundled": small,
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"step-{gpu.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")

    def add(run: dict) -> None:
        batch, checkpointing = run["batch_size"], run["gradient_checkpointing"]
        run["share_of_floor"] = floor(batch * LENGTH, checkpointing, rate) / run["milliseconds"]
        runs.append(run)
        show(f"{run['who']}, batch {batch}{', checkpointing' if checkpointing else ''}", run)

    for batch, checkpointing in SETTINGS:
        between = BETWEEN if (batch, checkpointing) in ((1, True), (4, False)) else ()
        for who in ("standard", *between, "trl", "fast", *["offloading"] * checkpointing):
            if not wanted(who) or (who == "trl" and "trl" not in versions):
                continue
            if who == "trl":
                run = trl_run(batch, checkpointing, arguments.steps)
            else:
                run = measured(running(who, batch, checkpointing, arguments.steps))
            add({"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing, **run})
        save()
    if wanted("bundled"):
        print("\nthe bundled model, 16 orders a step")
        for who in ("standard", "fast"):
            small[who] = bundled(who, 60)
            show(f"{who}, {small[who]['tokens']:.0f} tokens", small[who])
        save()
    for batch, checkpointing in SETTINGS if wanted("profiles") else ():
        for who in ("standard", "fast"):
            profiles.append(
                {"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}
                | profile(who, batch, checkpointing)
            )
    save()
    if "unsloth" in versions and wanted("unsloth"):
        for run in unsloth_runs(arguments.steps):
            add(run)
            save()


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def show(name: str, run: dict) -> None:
    share = f"{run['share_of_floor']:.0%}" if "share_of_floor" in run else ""
    print(
        f"{name:32}{run['milliseconds']:9.1f}{run['tokens_per_second']:10.0f}{share:>10}"
        f"{run['peak_allocated'] / 1e9:9.2f}{run['losses'][0]:12.4f}{run['losses'][-1]:9.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
