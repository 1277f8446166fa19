"""Numbers in few bits: how they are made, what they cost, what they lose.

    quantize, dequantize            block-wise 4-bit, equal to bitsandbytes' bit for bit (blockwise.py)
    double_quantize                 the scales in 8 bits (double_quant.py)
    quantize_absmax, ..._affine     integers of 2 to 8 bits (uniform.py)
    quantize_q4_0                   llama.cpp's 4 bits, equal to the library gguf's bit for bit (uniform.py)
    NF4, FP4, INT4, ...             the levels, and how they are derived (codebooks.py)
    af4, bof4                       the best levels for normal numbers, by integration (optimal.py)
    quantize_levels                 any levels and blocks, signed scales, outliers apart (any_levels.py)
    quantize_mxfp4, ..._nvfp4       what hardware multiplies (microscaling.py)
    error_report, level_usage, ...  what was lost, and where (metrics.py)
    pack, unpack                    two 4-bit codes in a byte (packing.py)
    QuantizedAbsmax                 scales in 8 bits, and the limits of blocks (scales.py)

`reference.py` repeats it in slow, readable loops; `kernels.py` has Triton kernels for tensors on a GPU. Nothing but
torch is needed, and Triton on a GPU.
"""

from qlora_lab.facts import bits_per_parameter

from .any_levels import LevelTensor, quantize_levels
from .blockwise import QuantizedTensor, dequantize, dequantize_plain, quantize, quantize_plain
from .codebooks import (
    BITSANDBYTES_NF4,
    DYNAMIC8,
    E2M1,
    FP4,
    FP4_BIT_PATTERNS,
    INT4,
    INT8,
    NF4,
    best_codebook,
    dynamic_map,
    integer_levels,
    nearest_level,
    normal_float,
    normal_quantiles,
    thresholds,
)
from .double_quant import double_quantize, quantize_scales, quantize_scales_plain
from .metrics import ErrorReport, entropy, error_report, level_usage, max_error, relative_rms, snr_db
from .microscaling import MicroscaledTensor, quantize_mxfp4, quantize_nvfp4
from .optimal import af4, bof4, optimal_levels
from .packing import pack, unpack
from .scales import QuantizedAbsmax
from .uniform import UniformTensor, quantize_absmax, quantize_affine, quantize_q4_0

__all__ = [
    "BITSANDBYTES_NF4",
    "DYNAMIC8",
    "E2M1",
    "FP4",
    "FP4_BIT_PATTERNS",
    "INT4",
    "INT8",
    "NF4",
    "ErrorReport",
    "LevelTensor",
    "MicroscaledTensor",
    "QuantizedAbsmax",
    "QuantizedTensor",
    "UniformTensor",
    "af4",
    "best_codebook",
    "bits_per_parameter",
    "bof4",
    "dequantize",
    "dequantize_plain",
    "double_quantize",
    "dynamic_map",
    "entropy",
    "error_report",
    "integer_levels",
    "level_usage",
    "max_error",
    "nearest_level",
    "normal_float",
    "normal_quantiles",
    "optimal_levels",
    "pack",
    "quantize",
    "quantize_absmax",
    "quantize_affine",
    "quantize_levels",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "quantize_plain",
    "quantize_q4_0",
    "quantize_scales",
    "quantize_scales_plain",
    "relative_rms",
    "snr_db",
    "thresholds",
    "unpack",
]
