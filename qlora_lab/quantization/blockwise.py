"""Block-wise 4-bit quantization: a tensor as small integers and a few scales.

    quantize      cut the flattened tensor into blocks of 64; divide each by its largest absolute value (absmax);
                  replace each element by the index of the nearest of 16 levels; pack two indices into a byte
    dequantize    look the levels up; multiply by absmax

Why blocks: an outlier stretches the scale of everything that shares it. A block confines the damage to 64 elements, at
the price of one scale for each block. Blocks run over the flattened tensor; one may begin in one row and end in the
next.

`quantize_plain` and `dequantize_plain` are the whole algorithm in a few lines of PyTorch. `quantize` and `dequantize`
return the same bits faster and without large temporaries: on CUDA with the Triton kernels of `kernels.py`, elsewhere
with three techniques that change no result:

    pieces         work on a million elements at a time, so that intermediate results stay in the cache
    cells          to find a number's level, look up which of 1,025 equal cells it lies in; a cell holds at most one
                   threshold, so one comparison settles the rest. `torch.bucketize` needs four, one after the other
    pairs          a byte holds two codes; a table of 256 pairs of levels decodes both in one lookup

The reference is bitsandbytes 0.50 on the CPU (`backends/default/ops.py`), including two oddities:

    - an absmax below 1e-38 is replaced by 1e-38 for scaling; if the last block is partial, its stored absmax is, too
    - a partial last block is *divided* by its absmax. All others are multiplied by the reciprocal of theirs, which may
      round the last bit differently (it never matters for NF4 with bf16 or fp16 input)

On CUDA, bitsandbytes multiplies all blocks by approximate reciprocals, and decodes a block of zeros as -0.0. On a CPU
with AVX512, its `dequantize_4bit` uses wrong scales where rows do not consist of whole blocks (see
`models.faults.require_right_scales`), and with AVX512-BF16 it turns bf16 numbers below 1.2e-38 into zeros. None of
this is reproduced here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .codebooks import NF4, check_codebook, nearest_level, thresholds
from .double_quant import gpu_kernels
from .packing import pack, unpack
from .scales import SMALLEST_ABSMAX, QuantizedAbsmax, check_block_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what can be quantized
PIECE = 1 << 20  # elements at a time, a multiple of every block size: some 20 MB of temporaries
GPU_PIECE = 1 << 24  # a GPU prefers a few large kernels


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in 4 bits.

    Attributes:
        codes: uint8, Tensor[(elements + 1) // 2]: two codebook indices per byte, high nibble first.
        absmax: float32, Tensor[blocks], or a `QuantizedAbsmax`, which holds the scales in 8 bits.
        codebook: float32, Tensor[16], ascending in [-1, 1].
        shape, dtype: of the original.
        block_size: elements that share a scale.

    Raises:
        ValueError: an unsupported dtype or block size, or parts that disagree in shape, dtype or device.
    """

    codes: torch.Tensor
    absmax: torch.Tensor | QuantizedAbsmax
    codebook: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    def __post_init__(self):
        check_block_size(self.block_size)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}: choose torch.float32, torch.bfloat16 or torch.float16")
        object.__setattr__(self, "shape", torch.Size(self.shape))
        scales = self.absmax.codes if isinstance(self.absmax, QuantizedAbsmax) else self.absmax
        scale_dtype = torch.uint8 if isinstance(self.absmax, QuantizedAbsmax) else torch.float32
        n = self.shape.numel()
        expected = {
            "codes": (self.codes, torch.uint8, (n + 1) // 2),
            "absmax": (scales, scale_dtype, -(-n // self.block_size)),
            "codebook": (self.codebook, torch.float32, 16),
        }
        for name, (part, dtype, count) in expected.items():
            if part.dtype != dtype or part.shape != (count,):
                raise ValueError(
                    f"{name} is {part.dtype} of shape {tuple(part.shape)}: a tensor of shape {tuple(self.shape)} in "
                    f"blocks of {self.block_size} needs {dtype} of shape ({count},)"
                )
            if part.device != self.codes.device:
                raise ValueError(
                    f"{name} is on {part.device}, codes are on {self.codes.device}: move all with .to(device)"
                )

    def dequantize(self) -> torch.Tensor:
        """The same as `dequantize(self)`: every quantized type of this package has this method."""
        return dequantize(self)

    def indices(self) -> torch.Tensor:
        """The level chosen for each element: int32, 0 to 15, in the tensor's shape."""
        return unpack(self.codes, self.shape.numel()).view(self.shape).int()

    @property
    def levels(self) -> int:
        """The number of levels: 16."""
        return len(self.codebook)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything held, including the codebook (64 bytes; with 8-bit scales, 1,092 for both tables)."""
        return self.codes.nbytes + self.absmax.nbytes + self.codebook.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of codes and scales per element; partial blocks and padding count as they are.

        Codebooks do not count: their size does not depend on the tensor's. NaN for an empty tensor.
        """
        scales = [self.absmax]
        if isinstance(self.absmax, QuantizedAbsmax):
            scales = [self.absmax.codes, self.absmax.absmax]
        n = self.shape.numel()
        return 8 * sum(part.nbytes for part in [self.codes, *scales]) / n if n else float("nan")

    def to(self, device) -> QuantizedTensor:
        """The same tensor on another device."""
        parts = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "codebook")}
        return dataclasses.replace(self, **parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All parts as tensors by name, for `safetensors.torch.save_file`; the inverse is `from_state_dict`."""
        state = {
            "codes": self.codes,
            "codebook": self.codebook.clone(),  # many tensors share one, and safetensors refuses shared memory
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "block_size": torch.tensor(self.block_size),
            "dtype": torch.empty(0, dtype=self.dtype),  # only its dtype matters
        }
        if isinstance(self.absmax, QuantizedAbsmax):
            second = {field.name: getattr(self.absmax, field.name) for field in dataclasses.fields(self.absmax)}
            second |= {"codebook": second["codebook"].clone(), "block_size": torch.tensor(self.absmax.block_size)}
            return state | {f"absmax.{name}": part for name, part in second.items()}
        return state | {"absmax": self.absmax}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> QuantizedTensor:
        """Rebuild a QuantizedTensor from what `state_dict` returned.

        Raises:
            ValueError: missing or unknown names, parts that disagree, or levels that do not form a codebook.
        """
        first = {"codes", "codebook", "shape", "block_size", "dtype"}
        second = {f"absmax.{field.name}" for field in dataclasses.fields(QuantizedAbsmax)}
        if set(state) not in (first | {"absmax"}, first | second):
            raise ValueError(f"the state has {sorted(state)}: {sorted(first)} and absmax, or absmax.*, are needed")
        if "absmax" in state:
            absmax = state["absmax"]
        else:
            check_codebook(state["absmax.codebook"], size=256)
            absmax = QuantizedAbsmax(
                codes=state["absmax.codes"],
                absmax=state["absmax.absmax"],
                offset=state["absmax.offset"],
                codebook=state["absmax.codebook"],
                block_size=int(state["absmax.block_size"]),
            )
        check_codebook(state["codebook"])
        return cls(
            codes=state["codes"],
            absmax=absmax,
            codebook=state["codebook"],
            shape=torch.Size(state["shape"].tolist()),
            dtype=state["dtype"].dtype,
            block_size=int(state["block_size"]),
        )


# ---------------------------------------------------------------------------------------------------- in a few lines


@torch.no_grad()
def quantize_plain(x: torch.Tensor, codebook: torch.Tensor = NF4, block_size: int = 64) -> QuantizedTensor:
    """The readable version of `quantize`, equal to it bit for bit. It needs several times the tensor's memory."""
    check_input(x, codebook, block_size)
    codebook = codebook.to(x.device)
    scaled, absmax = scale_blocks(x.reshape(-1).float(), block_size)
    refuse_non_finite(x, absmax)
    codes = pack(nearest_level(scaled, codebook), padding=code_of_zero(codebook))
    return QuantizedTensor(codes, absmax, codebook, x.shape, x.dtype, block_size)


@torch.no_grad()
def dequantize_plain(q: QuantizedTensor) -> torch.Tensor:
    """The readable version of `dequantize`, equal to it bit for bit."""
    absmax = q.absmax.dequantize() if isinstance(q.absmax, QuantizedAbsmax) else q.absmax
    values = q.codebook[unpack(q.codes, q.shape.numel()).int()]
    values = values * absmax.repeat_interleave(q.block_size)[: len(values)]
    return values.to(q.dtype).view(q.shape)


def scale_blocks(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide each block by its absmax, which brings it into [-1, 1].

    Args:
        flat: float32, Tensor[n].

    Returns:
        scaled, Tensor[n], and absmax, Tensor[blocks]: both float32.
    """
    full = len(flat) // block_size * block_size  # elements in full blocks
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if full < len(flat):  # the last block is partial: bitsandbytes divides here, see above
        rest = flat[full:]
        last = rest.abs().max().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, rest / last])
    return scaled, absmax


def code_of_zero(codebook: torch.Tensor) -> int:
    """The code that fills the last nibble of an odd count: as in bitsandbytes, the code of the number 0."""
    return int(nearest_level(torch.zeros((), device=codebook.device), codebook))


def check_input(x: torch.Tensor, codebook: torch.Tensor, block_size: int) -> None:
    """Raise TypeError or ValueError for arguments that `quantize` does not take. x's values are not examined."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {type(x).__name__}: give a torch.Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: quantize takes float32, bfloat16 and float16; convert it with x.float()")
    check_codebook(codebook)
    check_block_size(block_size)


def refuse_non_finite(x: torch.Tensor, absmax: torch.Tensor) -> None:
    """Raise ValueError if x holds NaN or infinity. Both carry over to their block's absmax: only that is searched."""
    if torch.isfinite(absmax).all():
        return
    wrong = (~torch.isfinite(x)).nonzero()
    first = tuple(wrong[0].tolist())
    raise ValueError(
        f"x has {len(wrong)} non-finite among its {x.numel()} values, the first ({x[first].item()}) at index {first}: "
        "find out where they come from, or replace them with torch.nan_to_num(x)"
    )


# ------------------------------------------------------------------------------------------------------------- and fast


@torch.no_grad()
def quantize(x: torch.Tensor, codebook: torch.Tensor = NF4, block_size: int = 64) -> QuantizedTensor:
    """Quantize a tensor to 4 bits, block by block.

    Args:
        x: float32, bfloat16 or float16; any shape and layout, empty included. Arithmetic is float32 in each case.
        codebook: float32, Tensor[16], ascending in [-1, 1]: NF4, FP4, INT4 or your own.
        block_size: elements that share a scale: a power of two from 32 to 4096. The last block may be partial.

    Returns:
        A QuantizedTensor on x's device, with codes and absmax equal to those of bitsandbytes' CPU code
        (`bitsandbytes.functional.quantize_4bit`); for FP4 up to the numbering of the levels, see `FP4_BIT_PATTERNS`.

    Raises:
        TypeError: x is not a float32, bfloat16 or float16 tensor, or codebook is not a float32 one.
        ValueError: NaN or infinity in x, an unsupported block size, or levels that do not form a codebook.

    >>> q = quantize(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> [hex(byte) for byte in q.codes.tolist()], q.absmax
    (['0x27', '0xaf'], tensor([2.]))
    >>> dequantize(q)
    tensor([-1.0501,  0.0000,  0.4922,  2.0000])
    """
    check_input(x, codebook, block_size)
    if x.is_cuda and (gpu := gpu_kernels()):
        codes, absmax, codebook, wrong = gpu.quantize(x.reshape(-1), codebook, block_size)
        q = QuantizedTensor(codes, absmax, codebook, x.shape, x.dtype, block_size)
        torch.cuda.current_stream(x.device).synchronize()
        if wrong.item():
            refuse_non_finite(x, absmax)
        return q
    flat, padding = x.reshape(-1), code_of_zero(codebook)
    codebook = codebook.to(x.device)
    codes = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-len(flat) // block_size), dtype=torch.float32, device=x.device)
    search = level_search(codebook)
    piece = PIECE if x.device.type == "cpu" else GPU_PIECE
    for start in range(0, len(flat), piece):
        scaled, scales = scale_blocks(flat[start : start + piece].float(), block_size)
        refuse_non_finite(x, scales)
        packed = pack(search(scaled), padding)
        codes[start // 2 :][: len(packed)] = packed
        absmax[start // block_size :][: len(scales)] = scales
    return QuantizedTensor(codes, absmax, codebook, x.shape, x.dtype, block_size)


@torch.no_grad()
def dequantize(q: QuantizedTensor) -> torch.Tensor:
    """The tensor that q stands for, in its original shape and dtype.

    The product of level and scale is float32; rounding to bfloat16 or float16 comes last. For equal codes and
    scales, the result equals that of `bitsandbytes.functional.dequantize_4bit`, except for its errors described above.
    """
    if q.device.type == "cuda" and (gpu := gpu_kernels()):
        return gpu.dequantize(q)
    absmax = q.absmax.dequantize() if isinstance(q.absmax, QuantizedAbsmax) else q.absmax
    n = q.shape.numel()
    out = torch.empty(n, dtype=q.dtype, device=q.device)
    pairs = level_pairs(q.codebook)
    piece = PIECE if q.device.type == "cpu" else GPU_PIECE
    decoded = torch.empty(
        min(piece // 2, len(q.codes)), dtype=pairs.dtype, device=q.device
    )  # reused: fresh memory is slow
    for start in range(0, n, piece):
        target = out[start : start + piece]
        packed = q.codes[start // 2 :][: piece // 2]
        values = torch.index_select(pairs, 0, packed.int(), out=decoded[: len(packed)]).view(torch.float32)
        multiply_blocks(values[: len(target)], absmax[start // q.block_size :], q.block_size, target)
    return out.view(q.shape)


def level_search(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives the indices of `nearest_level` as uint8, for float32 numbers in [-1, 1].

    The cell number i = floor(cells * (1 + x)) can be trusted: scaling by a power of two does not round, and addition
    rounds monotonically. So numbers in a lower cell than a threshold are below it, numbers in a higher cell are above
    it, and only those in the same cell must be compared with it.
    """
    if codebook.device.type != "cpu":  # a GPU is fast enough with bucketize
        return lambda scaled: nearest_level(scaled, codebook).to(torch.uint8)
    edges = thresholds(codebook)
    for cells in (512, 4096, 32768):
        half = torch.tensor(float(cells))
        number = torch.add(half, edges, alpha=cells).int()
        if len(number.unique()) == len(edges):
            break
    else:  # two thresholds (nearly) coincide
        return lambda scaled: nearest_level(scaled, codebook).to(torch.uint8)
    below = torch.searchsorted(number, torch.arange(2 * cells + 1, dtype=torch.int32)).to(torch.uint8)
    edge = torch.full((2 * cells + 1,), float("inf"))
    edge[number.long()] = edges

    def search(scaled: torch.Tensor) -> torch.Tensor:
        cell = torch.add(half, scaled, alpha=cells).int()
        return below.index_select(0, cell).add_((scaled > edge.index_select(0, cell)).view(torch.uint8))

    return search


def level_pairs(codebook: torch.Tensor) -> torch.Tensor:
    """The two levels that each byte stands for: Tensor[256] of int64, each the bits of two adjacent float32 numbers."""
    byte = torch.arange(256, device=codebook.device)
    return torch.stack([codebook[byte >> 4], codebook[byte & 0x0F]], dim=1).view(torch.int64).squeeze(1)


def multiply_blocks(values: torch.Tensor, absmax: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """Write values * absmax, block by block, to `out`: in float32, then rounded to the dtype of `out`."""
    blocks = len(values) // block_size
    full = blocks * block_size  # elements in full blocks
    torch.mul(values[:full].view(-1, block_size), absmax[:blocks, None], out=out[:full].view(-1, block_size))
    if full < len(values):
        torch.mul(values[full:], absmax[blocks], out=out[full:])
