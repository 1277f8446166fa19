"""What the hardware can do: which device, which dtype to multiply in, whether there are 4-bit kernels."""

from __future__ import annotations

import functools
import os
import platform

import torch

from qlora_lab.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by their names in files


def pick_device() -> torch.device:
    """The NVIDIA GPU if torch sees one, else the CPU.

    Apple's GPU ("mps") is taken only where QLORA_LAB_MPS=1 asks for it, and after `difference_from_cpu` has found none.
    (The course was never run on one.)

    Raises:
        UserError: it was asked for, and is not there or computes other things than the CPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("QLORA_LAB_MPS", "0") in ("", "0"):
        return torch.device("cpu")
    if not torch.backends.mps.is_available():
        raise UserError("QLORA_LAB_MPS=1 asks for Apple's GPU, but torch sees none here: unset it to use the CPU")
    if difference := difference_from_cpu("mps"):
        raise UserError(
            f"Apple's GPU does not compute what the CPU does ({difference}): unset QLORA_LAB_MPS to use the CPU"
        )
    return torch.device("mps")


@functools.cache
def difference_from_cpu(device: str) -> str:
    """What a device computes otherwise than the CPU, or the error that it ends in; empty if nothing was found.

    Tried are what a QLoRA step consists of: to quantize to NF4 and back (bitsandbytes, in blocks of 64), a product with
    the result, a loss, and its gradients. Codes and scales must be equal, floats within 1e-4 of the largest: float32
    sums of 256 products in another order differ by far less, float16 products by more.
    """
    try:
        expected, came = small_step(torch.device("cpu")), small_step(torch.device(device))
    except Exception as error:  # whatever a backend raises for what it lacks
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    for name, right in expected.items():
        exact = not right.is_floating_point() or name == "scales"
        tolerance = 0 if exact else 1e-4 * right.abs().max().item()
        if came[name].shape != right.shape or not (came[name].double() - right.double()).abs().max() <= tolerance:
            return f"other {name}"
    return ""


def small_step(device: torch.device) -> dict[str, torch.Tensor]:
    """The parts of one small QLoRA step that was computed on a device, by name, on the CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def numbers(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

    weight, x = numbers(0, 64, 256), numbers(1, 8, 256)
    a, b = numbers(2, 4, 256).requires_grad_(), numbers(3, 64, 4).requires_grad_()
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    restored = dequantize_4bit(codes, state)
    product = x @ restored.T + x @ a.T @ b.T
    loss = torch.nn.functional.cross_entropy(product, torch.arange(8, device=device))
    loss.backward()
    assert a.grad is not None and b.grad is not None
    parts = {"4-bit codes": codes, "scales": state.absmax, "restored weights": restored, "products": product}
    parts |= {"loss": loss, "gradients of A": a.grad, "gradients of B": b.grad}
    return {name: part.detach().cpu() for name, part in parts.items()}


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bf16 matrices. Emulated bf16 exists too, and is slow (T4, AVX2)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        instructions = torch.cpu.get_capabilities()
        return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def name_machine() -> str:
    """What computes here, in a few words: "2 × CPU (x86_64, AVX512, bf16), torch 2.13.0", or the GPU's name."""
    device = pick_device()
    name = f"{os.cpu_count()} × CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    name += ", bf16)" if has_bf16(torch.device("cpu")) else ")"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {name}"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


def pick_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype to multiply in: bf16 where the hardware has it, else fp16 on a GPU (T4) and fp32 on a CPU."""
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def require_4bit_kernels(device: torch.device) -> None:
    """Raise UserError unless bitsandbytes can quantize to 4 bits on this device."""
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    try:
        quantize_4bit(torch.zeros(64, device=device), quant_type="nf4")
    except Exception as error:
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} has no 4-bit kernel for device {str(device)!r} "
            f"({str(error).splitlines()[0]}): load the model without quantization (--method lora) or "
            "choose another device"
        ) from error
