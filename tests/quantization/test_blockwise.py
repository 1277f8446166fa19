"""quantize and dequantize against bitsandbytes' CPU code, the loops of `reference`, and hand-made cases."""

import dataclasses
import subprocess
import sys
from typing import NamedTuple

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_lab.quantization import (
    E2M1,
    FP4,
    FP4_BIT_PATTERNS,
    INT4,
    NF4,
    QuantizedTensor,
    dequantize,
    dequantize_plain,
    double_quantize,
    nearest_level,
    pack,
    quantize,
    quantize_plain,
    reference,
    thresholds,
    unpack,
)
from qlora_lab.quantization import blockwise as module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOKS = {"nf4": NF4, "fp4": FP4}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal types and equal values; 0.0 and -0.0 are the same value."""
    return a.dtype == b.dtype and torch.equal(a, b)


def same_but_flushed(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """`same_bits`, except that AVX512's conversion to bf16 makes zeros of what is too small for a normal number."""
    if theirs.dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16", False):
        flushed = (theirs == 0) & (ours.abs() < torch.finfo(torch.bfloat16).smallest_normal)
        ours = torch.where(flushed, theirs, ours)
    return same_bits(ours, theirs)


def their_bytes(x: torch.Tensor, name: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' packed bytes, flat, with its codes renamed to ours; and its absmax."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(x, block_size, name, torch.uint8)
    packed = packed.flatten()
    if name == "fp4":
        packed = pack(FP4_BIT_PATTERNS.argsort().to(packed.device)[unpack(packed).long()])
    return packed, absmax


def their_values(packed, absmax, name, q, shape=None) -> torch.Tensor:
    """bitsandbytes' decoding of its own bytes, as one row: in several it errs on a CPU with AVX512, see below."""
    if name == "fp4":
        packed = pack(FP4_BIT_PATTERNS.to(packed.device)[unpack(packed).long()])
    arguments = (packed[:, None], absmax, q.block_size, name, shape or (1, q.shape.numel()), q.dtype)
    with torch.compiler.set_stance("force_eager"):  # it would compile for every shape with an odd last dimension
        return torch.ops.bitsandbytes.dequantize_4bit.default(*arguments).reshape(q.shape)


class Recipe(NamedTuple):
    """How to make a random tensor: a failing example is one line to read."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    exponent: int = 0
    seed: int = 0

    def make(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        dice = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "outliers":
            x = torch.where(dice < 0.02, 50 * x, x)
        elif self.kind == "sparse":
            x = torch.where(dice < 0.9, 0.0, x)
        elif self.kind == "mixed":  # blocks hold everything from rounding errors of their absmax up to it
            x = x * 10 ** (8 * dice - 4)
        elif self.kind == "denormal":
            x = x * 10.0 ** (-37 - 8 * dice)
        elif self.kind == "ties":  # on a threshold or a float32 step beside it, under an absmax that is a power of two
            edges = torch.cat([thresholds(NF4), thresholds(FP4)])
            edges = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))])
            edges = torch.cat([edges, torch.ones(len(edges) // 8)])
            x = edges[(dice * len(edges)).long()].double()
        largest = torch.finfo(self.dtype).max
        scale = 2.0**self.exponent if self.kind == "ties" else 10.0**self.exponent
        return (x * scale).clamp(-largest, largest).to(self.dtype)


shapes = st.one_of(
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 70), st.integers(1, 130)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 90)),
)
kinds = st.sampled_from(["normal", "outliers", "sparse", "ties", "mixed", "denormal"])
recipes = st.builds(Recipe, shapes, st.sampled_from(DTYPES), kinds, st.integers(-30, 30), st.integers(0, 2**31))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(recipe=recipes, block_size=st.sampled_from(BLOCK_SIZES), name=st.sampled_from(["nf4", "fp4"]))
@example(recipe=Recipe((100,), kind="sparse", exponent=-400), block_size=64, name="nf4")  # zeros
@example(recipe=Recipe((3, 5), kind="sparse", exponent=-400), block_size=32, name="fp4")
@example(recipe=Recipe((71,), exponent=38), block_size=32, name="nf4")  # the reciprocals are denormal
@example(recipe=Recipe((16,), torch.bfloat16, "denormal"), block_size=32, name="nf4")  # the values are denormal
def test_codes_absmax_and_values_equal_bitsandbytes(recipe, block_size, name):
    x = recipe.make()
    q = quantize(x, CODEBOOKS[name], block_size)
    packed, absmax = their_bytes(x, name, block_size)
    assert same_bits(q.codes, packed)
    assert same_bits(q.absmax, absmax)
    restored = dequantize(q)
    assert restored.shape == x.shape
    assert same_but_flushed(restored, their_values(packed, absmax, name, q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 1024])
@pytest.mark.parametrize("shape", [(6, 192), (5, 16), (10, 80), (3, 96), (65, 272), (10, 66), (7, 13), (40,)])
def test_rows_that_hold_no_whole_blocks(shape, block_size, name, dtype):
    """Ours is right in every shape. bitsandbytes' AVX512 code is not: then it has read exactly these other scales."""
    x = Recipe(shape, dtype).make()
    q = quantize(x, CODEBOOKS[name], block_size)
    theirs = their_values(*their_bytes(x, name, block_size), name, q, shape)
    if same_bits(dequantize(q), theirs):
        return
    rows, columns = shape
    assert columns % block_size and columns % 16 == 0
    assert same_bits(dequantize(q)[0], theirs[0])
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    scales = q.absmax[row * (columns // block_size) + column // block_size]
    levels = q.codebook[unpack(q.codes)[: x.numel()].long()].reshape(shape)
    assert same_bits((levels * scales).to(dtype), theirs)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    recipe=recipes,
    block_size=st.sampled_from(BLOCK_SIZES),
    codebook=st.one_of(
        st.sampled_from([NF4, FP4, E2M1, INT4]),
        st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16).map(lambda levels: torch.tensor(sorted(levels))),
    ),
)
def test_the_fast_way_equals_the_plain_one(recipe, block_size, codebook):
    x = recipe.make()
    fast, plain = quantize(x, codebook, block_size), quantize_plain(x, codebook, block_size)
    assert same_bits(fast.codes, plain.codes)
    assert same_bits(fast.absmax, plain.absmax)
    assert same_bits(dequantize(fast), dequantize_plain(fast))
    double = double_quantize(fast)
    assert same_bits(dequantize(double), dequantize_plain(double))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipe=recipes, block_size=st.sampled_from([32, 64, 256]), codebook=st.sampled_from([NF4, FP4, E2M1, INT4]))
def test_equal_to_the_loops(recipe, block_size, codebook):
    x = recipe.make().flatten()[:700]
    values = x.float().tolist()
    packed, absmax = reference.quantize(values, codebook.tolist(), block_size)
    q = quantize(x, codebook, block_size)
    assert q.codes.tolist() == packed
    assert q.absmax.tolist() == absmax
    restored = reference.dequantize(packed, absmax, codebook.tolist(), len(values), block_size)
    assert same_bits(dequantize(q), torch.tensor(restored).to(x.dtype))


@pytest.mark.parametrize("pieces", [(64, 4096), (4096, 4096), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("shape", [(3, 5000), (4096,), (12288, 1), (20000,)])
def test_pieces_do_not_show(monkeypatch, pieces, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    monkeypatch.setattr(module, "PIECE", max(pieces))
    q = quantize(x, block_size=min(pieces[0], 4096))
    plain = quantize_plain(x, block_size=min(pieces[0], 4096))
    assert same_bits(q.codes, plain.codes)
    assert same_bits(q.absmax, plain.absmax)
    assert same_bits(dequantize(q), dequantize_plain(q))


def test_a_piece_is_whole_blocks():
    for piece in (module.PIECE, module.GPU_PIECE):
        assert piece % max(BLOCK_SIZES) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiplying_by_the_reciprocal_or_dividing_is_the_same_for_nf4_and_16_bit_input(dtype):
    """Every ratio x/absmax of two positive 16-bit numbers, up to their exponents: 8 or 11 significant bits each.

    So the partial last block, which bitsandbytes divides on the CPU and multiplies on CUDA, has one answer. (For fp32
    it has not; nor for FP4 and INT4, whose thresholds are ratios of small integers.)
    """
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    mantissas = torch.arange(2 ** (bits - 1), 2**bits, dtype=torch.float32)
    for exponent in range(0, 12):  # below 2**-12 every ratio has the code of zero
        x = mantissas[:, None] * 2.0**-exponent
        divided, multiplied = x / mantissas, x * (1 / mantissas)
        for sign in (1, -1):
            same = nearest_level(sign * divided, NF4) == nearest_level(sign * multiplied, NF4)
            assert same[x <= mantissas].all()


def test_a_tie_goes_to_the_lower_level():
    x = torch.cat([torch.ones(1), thresholds(NF4), torch.zeros(48)])  # absmax 1: scaling changes nothing
    assert quantize(x).indices()[1:16].tolist() == list(range(15))
    above = thresholds(NF4).nextafter(torch.tensor(2.0))
    assert quantize(torch.cat([torch.ones(1), above, torch.zeros(48)])).indices()[1:16].tolist() == list(range(1, 16))


def test_the_partial_last_block_is_divided_as_in_bitsandbytes():
    """Numbers so near a threshold that dividing and multiplying by the reciprocal give them different codes."""
    torch.manual_seed(0)
    absmax = torch.rand(20_000) + 1
    x = absmax[:, None] * thresholds(NF4)
    differ = nearest_level(x / absmax[:, None], NF4) != nearest_level(x * (1 / absmax)[:, None], NF4)
    rows = differ.any(dim=1).nonzero().flatten()[:20]
    assert len(rows) == 20
    for row in rows:
        partial = torch.cat([absmax[row, None], x[row]])  # 16 numbers
        whole = partial.repeat(2)
        for block in (partial, whole):
            assert same_bits(quantize(block, block_size=32).codes, their_bytes(block, "nf4", 32)[0])
        assert quantize(partial, block_size=32).codes.tolist() != quantize(whole, block_size=32).codes[:8].tolist()


def test_by_hand():
    q = quantize(torch.tensor([-1.0, 0.0, 0.5, 2.0]))  # scaled: -0.5, 0, 0.25, 1
    assert q.codes.tolist() == [0x27, 0xAF]  # nearest NF4 levels: -0.5251, 0, 0.2461, 1
    assert q.absmax.tolist() == [2.0]
    assert dequantize(q).tolist() == [2 * NF4[2].item(), 0.0, 2 * NF4[10].item(), 2.0]


def test_zeros_stay_zeros_and_pack_as_0x77():
    q = quantize(torch.zeros(128))
    assert q.codes.tolist() == [0x77] * 64
    assert q.absmax.tolist() == [0.0, 0.0]
    assert dequantize(q).tolist() == [0.0] * 128


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0, 2)])
def test_empty(shape):
    for q in (quantize(torch.empty(shape)), double_quantize(quantize(torch.empty(shape)))):
        assert len(q.codes) == 0
        assert dequantize(q).shape == torch.Size(shape)


def test_a_scalar_and_strides_do_not_matter():
    assert dequantize(quantize(torch.tensor(3.0))).item() == 3.0
    torch.manual_seed(0)
    x = torch.randn(50, 60)
    for view in (x.t(), x[::2, 3:], x.expand(2, 50, 60), x[:, :1]):
        assert same_bits(quantize(view).codes, quantize(view.contiguous()).codes)
        assert dequantize(quantize(view)).shape == view.shape


def test_a_parameter_is_quantized_without_a_graph():
    q = quantize(torch.nn.Parameter(torch.randn(8, 8)))
    assert not q.absmax.requires_grad
    assert not dequantize(q).requires_grad


def test_what_it_holds_is_what_it_counts():
    q = quantize(torch.randn(1024, 1024))
    assert q.nbytes == 2**20 // 2 + 4 * 2**14 + 4 * 16
    assert q.bits_per_parameter == 4.5
    double = double_quantize(q)
    assert double.nbytes == 2**20 // 2 + 2**14 + 4 * 2**6 + 1092  # FACTS: 1,092 bytes for two tables and the offset
    assert double.bits_per_parameter == 4 + 8 / 64 + 32 / (64 * 256)
    assert quantize(torch.randn(1)).bits_per_parameter == 8 + 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_saved_and_loaded_with_safetensors(tmp_path, dtype, double):
    originals = {name: quantize(torch.randn(5, 33).to(dtype)) for name in ("a", "b")}
    if double:
        originals = {name: double_quantize(q) for name, q in originals.items()}
    state = {f"{name}.{key}": part for name, q in originals.items() for key, part in q.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    for name, q in originals.items():
        mine = {key.removeprefix(f"{name}."): part for key, part in loaded.items() if key.startswith(f"{name}.")}
        copy = QuantizedTensor.from_state_dict(mine)
        assert (copy.shape, copy.dtype, copy.block_size, copy.nbytes) == (q.shape, q.dtype, q.block_size, q.nbytes)
        assert same_bits(dequantize(copy), dequantize(q))


def test_moves_between_devices():
    for q in (quantize(torch.randn(5, 33)), double_quantize(quantize(torch.randn(5, 33)))):
        moved = q.to("meta")  # there is no second device everywhere, but there is this one
        assert moved.device.type == "meta"
        assert moved.nbytes == q.nbytes
        assert same_bits(dequantize(q.to("cpu")), dequantize(q))


# ----------------------------------------------------------------------------------------------------------- bad input


QUANTIZERS = pytest.mark.parametrize("quantizer", [quantize, quantize_plain])


@QUANTIZERS
@pytest.mark.parametrize("size", [0, -64, 16, 48, 100, 8192, 64.0, "64", None])
def test_impossible_block_sizes(size, quantizer):
    with pytest.raises(ValueError, match=r"block_size=.* choose a power of two from 32 to 4096"):
        quantizer(torch.randn(64), block_size=size)


@QUANTIZERS
@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        (NF4.flip(0), ValueError, r"not sorted: 1 at index 0 comes before 0.722957: pass codebook.sort\(\).values"),
        (NF4 * 7, ValueError, r"has the level -7: levels lie in \[-1, 1\]; divide by the largest"),
        (torch.full((16,), float("nan")), ValueError, "has the level nan"),
        (NF4[1:], ValueError, r"has shape \(15,\): 16 levels are needed"),
        (NF4.view(4, 4), ValueError, r"has shape \(4, 4\)"),
        (NF4.double(), TypeError, "codebook is torch.float64: give a float32 tensor"),
        (NF4.tolist(), TypeError, "codebook is list: give a float32 tensor"),
    ],
)
def test_impossible_codebooks(codebook, error, message, quantizer):
    with pytest.raises(error, match=message):
        quantizer(torch.randn(64), codebook)


@QUANTIZERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(10, 10), (64, 1000)])
def test_values_that_are_not_finite_are_counted_and_found(quantizer, value, shape):
    x = torch.zeros(shape)
    x[7, 3] = x[9, 9] = value
    with pytest.raises(ValueError, match=rf"x has 2 non-finite .* the first \({value}\) at index \(7, 3\)"):
        quantizer(x)


@QUANTIZERS
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64])
def test_other_types(dtype, quantizer):
    with pytest.raises(TypeError, match=f"x is {dtype}: quantize takes float32, bfloat16 and float16"):
        quantizer(torch.zeros(64, dtype=dtype))
    with pytest.raises(TypeError, match="x is list: give a torch.Tensor"):
        quantizer([1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(9, dtype=torch.uint8)}, r"codes is torch.uint8 of shape \(9,\).* needs .* \(83,\)"),
        ({"codes": torch.zeros(83, dtype=torch.int32)}, r"codes is torch.int32"),
        ({"absmax": torch.zeros(2)}, r"absmax is torch.float32 of shape \(2,\).* \(3,\)"),
        ({"absmax": torch.zeros(3, dtype=torch.float16)}, "absmax is torch.float16"),
        ({"shape": torch.Size([5, 40])}, r"a tensor of shape \(5, 40\) in blocks of 64 needs"),
        ({"block_size": 32}, "blocks of 32 needs"),
        ({"block_size": 63}, "choose a power of two"),
        ({"codebook": torch.zeros(15)}, r"codebook is torch.float32 of shape \(15,\)"),
        ({"dtype": torch.int8}, "dtype is torch.int8: choose"),
        ({"absmax": torch.zeros(3, device="meta")}, "absmax is on meta, codes are on cpu: move all with .to"),
    ],
)
def test_parts_that_disagree(change, message):
    q = quantize(torch.randn(5, 33))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(q, **change)


def test_a_state_that_is_none():
    state = quantize(torch.randn(5, 33)).state_dict()
    with pytest.raises(ValueError, match=r"the state has .* are needed"):
        QuantizedTensor.from_state_dict({name: part for name, part in state.items() if name != "absmax"})
    with pytest.raises(ValueError, match="not sorted"):
        QuantizedTensor.from_state_dict({**state, "codebook": NF4.flip(0)})


# -------------------------------------------------------------------------------------------------- memory and devices


def test_memory_that_quantize_needs():
    """At most 1.5 times the input on top of it, result included: in a process of its own, by its high-water mark."""
    code = """
import torch
from qlora_lab.memory.meter import memory_bytes, peak_memory_bytes
from qlora_lab.quantization import quantize
torch.set_num_threads(1)
cpu = torch.device("cpu")
quantize(torch.randn(1 << 16))
x = torch.randn(4096, 4096)
before = memory_bytes(cpu)
quantize(x)
print((peak_memory_bytes(cpu) - before) / x.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert 4.5 / 32 < float(done.stdout) < 1.5  # its result alone has 4.5 bits a number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 999)])
def test_on_a_gpu_equal_to_bitsandbytes_and_to_the_cpu(dtype, name, shape):
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    q = quantize(x, CODEBOOKS[name])
    cpu = quantize(x.cpu(), CODEBOOKS[name])
    assert same_bits(q.codes.cpu(), cpu.codes)
    assert same_bits(q.absmax.cpu(), cpu.absmax)
    packed, absmax = their_bytes(x, name, 64)
    assert same_bits(q.absmax, absmax)
    flips = (unpack(q.codes, x.numel()) != unpack(packed, x.numel())).sum().item()
    print(f"{name} {dtype} {shape}: {flips} of {x.numel()} codes differ")
    if name == "nf4":
        assert flips <= (x.numel() / 1e6 if dtype == torch.float32 else 0)
    theirs = their_values(q.codes, q.absmax, name, q)
    assert same_bits(dequantize(q), theirs)
