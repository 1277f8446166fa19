"""What the hardware can do: which device, which dtype to multiply in, whether there are 4-bit kernels."""

from __future__ import annotations

import torch

from qlora_lab.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by their names in files


def pick_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bf16 matrices. Emulated bf16 exists too, and is slow (T4, AVX2)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        instructions = torch.cpu.get_capabilities()
        return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


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
