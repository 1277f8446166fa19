"""What do few bits cost? The bundled model learns the same on bases that are held in several ways.

Needs a GPU; writes `accuracy-<gpu>.json`, anew after each run. See `orders` for what the ways have in common.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.quantized_linear import quantize_linears
from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import BATCH_SIZE, RANK, STEPS, Ready, held_out, per_token, speed, trained
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import INT4, quantize
from qlora_lab.training.data import load_samples


@dataclass(frozen=True)
class Method:
    """How the frozen base is held, and in what its products are computed.

    quantization: None, bitsandbytes' "nf4" or "fp4", or "int4": our symmetric one, levels -7 to 7. All in blocks of 64.
    bits: a linear's bits per parameter.
    """

    what: str
    bits: float
    quantization: str | None = None
    double_quant: bool = False
    dtype: torch.dtype = torch.bfloat16


METHODS = {
    "lora-fp32": Method("LoRA, fp32 base", 32, dtype=torch.float32),
    "lora-bf16": Method("LoRA, bf16 base", 16),
    "nf4": Method("QLoRA, NF4", 4.5, "nf4"),
    "nf4-double": Method("QLoRA, NF4 + double quantization", 4.127, "nf4", double_quant=True),
    "fp4": Method("QLoRA, FP4", 4.5, "fp4"),
    "int4": Method("QLoRA, INT4", 4.5, "int4"),
}


def load_base(method: Method, device: torch.device, compute_dtype: torch.dtype | None = None):
    """The bundled model as `method` holds it, and its tokenizer. compute_dtype: in place of the method's."""
    dtype = compute_dtype or method.dtype
    if method.quantization == "int4":
        model, tokenizer = load_model(device=device, compute_dtype=dtype)
        return quantize_linears(model, quantizer=lambda weight: quantize(weight, INT4)), tokenizer
    return load_model(
        quantization=method.quantization, double_quant=method.double_quant, device=device, compute_dtype=dtype
    )


def prepare_method(
    name: str,
    seed: int,
    device: torch.device,
    *,
    batch_size: int = BATCH_SIZE,
    compute_dtype: torch.dtype | None = None,
) -> Ready:
    """See `train_method`."""
    base, tokenizer = load_base(METHODS[name], device, compute_dtype)
    model = add_lora(base, rank=RANK, alpha=2 * RANK, seed=seed)
    settings = {"compute_dtype": compute_dtype or METHODS[name].dtype, "optimizer": "adamw_torch"}
    return Ready(model, tokenizer, settings, {"batch_size": batch_size, "seed": seed})


def train_method(
    name: str,
    seed: int,
    device: torch.device,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    judged: int = 200,
    compute_dtype: torch.dtype | None = None,
) -> dict:
    """Train the bundled model by a method of METHODS, and judge it before and after.

    Args:
        seed: of the adapter and of the samples' order.
        judged: samples of `validation`, `test` and `shifted` each; 0 judges no answers.
        compute_dtype: in place of the method's (a CPU is quick in fp32 only).

    Returns:
        method, seed; losses (nats per token, one a step); before, after: {validation, prose: nats per token};
        exact: {test, shifted: a string of 0 and 1, one for each sample}; peak_allocated (bytes while training, None on
        a CPU); tokens_per_second, seconds_per_step (medians).
    """
    ready = prepare_method(name, seed, device, batch_size=batch_size, compute_dtype=compute_dtype)
    model, tokenizer, dtype = ready.model, ready.tokenizer, ready.settings["compute_dtype"]
    chats = {split: load_samples("orders", split).select(range(judged))["messages"] for split in ("test", "shifted")}
    judge = Judge(chats if judged else {}, held_out(tokenizer, judged), tokenizer, dtype)
    before = judge.losses(model)
    records, peak = trained(ready, steps)
    after = judge(model)
    return {
        "method": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "before": per_token(before),
        "after": per_token(after.losses),
        "exact": after.exact,
        "peak_allocated": peak,
        **speed(records),
    }


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=8)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of("accuracy", arguments.output)
    for name, method in METHODS.items():
        record.put("methods", name, {"what": method.what, "bits": method.bits})
    orders.time_alone(record, METHODS, prepare_method)
    orders.run_all(record, "method", METHODS, arguments.seeds, train_method, jobs=arguments.jobs)
