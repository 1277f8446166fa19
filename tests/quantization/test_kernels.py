"""The Triton kernels equal the plain version bit for bit: on a CPU in Triton's interpreter, on a GPU as they run."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

from qlora_lab.quantization import (
    DYNAMIC8,
    E2M1,
    FP4,
    INT4,
    INT8,
    NF4,
    dequantize,
    dequantize_plain,
    double_quantize,
    kernels,
    nearest_level,
    quantize,
    quantize_plain,
    quantize_scales,
    quantize_scales_plain,
    thresholds,
)
from tests.quantization.test_blockwise import BLOCK_SIZES, CODEBOOKS, DTYPES, Recipe

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
interpreted = pytest.mark.skipif(CUDA, reason="a GPU is here: nothing is interpreted")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of a zero included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def decoded(q) -> torch.Tensor:
    """What `kernels.dequantize` should give."""
    if CUDA or q.dtype != torch.bfloat16:
        return dequantize_plain(q)
    # Triton's interpreter does not round to bfloat16, it cuts (`_convert_float`, called without a rounding mode)
    values = dequantize_plain(dataclasses.replace(q, dtype=torch.float32))
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def quantized(flat: torch.Tensor, codebook: torch.Tensor, block_size: int):
    """Codes, absmax and flag, when they are all there."""
    codes, absmax, _, wrong = kernels.quantize(flat, codebook, block_size)
    if CUDA:
        torch.cuda.synchronize()
    return codes, absmax, wrong


def assert_equal(x: torch.Tensor, codebook: torch.Tensor, block_size: int, scale_block_size: int = 256) -> None:
    """Quantize, dequantize, and both with double quantization."""
    plain = quantize_plain(x, codebook, block_size)
    codes, absmax, wrong = quantized(x.reshape(-1), codebook, block_size)
    assert not wrong
    assert same_bits(codes, plain.codes)
    assert same_bits(absmax, plain.absmax)
    assert same_bits(kernels.dequantize(plain), decoded(plain))

    second = quantize_scales_plain(plain.absmax, scale_block_size)
    if not second.offset.isfinite():  # scales near float32's largest number: their sum overflows
        return
    codes, absmax = kernels.quantize_scales(plain.absmax, second.offset, second.codebook, scale_block_size)
    assert same_bits(codes, second.codes)
    assert same_bits(absmax, second.absmax)
    double = dataclasses.replace(plain, absmax=second)
    assert same_bits(kernels.dequantize(double), decoded(double))


def random_codebook(seed: int) -> torch.Tensor:
    return torch.rand(16, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).sort().values


KINDS = ("normal", "outliers", "sparse", "ties", "mixed", "denormal")
CASES = [  # every kind of numbers in every dtype, the rest in turn
    (Recipe(((3, 5, 50), (2048,), (41, 51), (1,))[i % 4], dtype, kind, exponent=(0, -30, 30)[i % 3], seed=i), i)
    for i, (kind, dtype) in enumerate(itertools.product(KINDS, DTYPES))
]
CASES += [(Recipe((0,)), 0)]
CASES += [(Recipe((3, 1365), torch.bfloat16, "ties"), 7)]  # all but one of a block of 4096
CASES += [(Recipe((100,), kind="sparse", exponent=-400), 1)]  # zeros
CASES += [(Recipe((71,), exponent=38), 0)]  # the reciprocals are denormal


@interpreted
@pytest.mark.parametrize(("recipe", "turn"), CASES)
def test_equal_to_the_plain_version(recipe, turn):
    codebook = [NF4, FP4, E2M1, INT4, random_codebook(turn)][turn % 5]
    assert_equal(recipe.make(), codebook, BLOCK_SIZES[turn % 8], scale_block_size=(256, 32)[turn % 2])


@pytest.mark.parametrize(("codebook", "count"), [(NF4, 1), (INT4, 1), (E2M1, 2), (FP4, 3), (torch.zeros(16), 15)])
def test_comparisons_that_a_codebook_needs(codebook, count):
    below, edges, comparisons, _ = kernels.search_tables(tuple(codebook.tolist()), torch.device("cpu"))
    assert comparisons == count
    assert below[0] == 0 and below[33:].tolist() == [15] * 31


@interpreted
@pytest.mark.parametrize("codebook", [NF4, FP4, E2M1, INT4])
def test_borders_of_cells_and_thresholds_and_their_neighbours(codebook):
    edges = torch.cat([thresholds(codebook), torch.arange(-64, 65) / 64])
    up, down = edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))
    x = torch.cat([edges, up, down]).clamp(-1, 1)
    x = torch.nn.functional.pad(x, (0, 512 - len(x)), value=1.0)  # absmax 1: scaling changes nothing
    codes, _, _ = quantized(x, codebook, 512)
    assert (
        codes.tolist() == (nearest_level(x, codebook).view(-1, 2) @ torch.tensor([16, 1], dtype=torch.int32)).tolist()
    )


def test_the_partial_last_block_is_divided():
    """Numbers so near a threshold that dividing and multiplying by the reciprocal give them different codes."""
    absmax = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)) + 1
    x = absmax * thresholds(NF4)
    differ = (nearest_level(x / absmax, NF4) != nearest_level(x * (1 / absmax), NF4)).any(1).nonzero()[:10, 0]
    assert len(differ) == 10
    for row in differ:
        assert_equal(torch.cat([absmax[row], x[row]]).to(DEVICE), NF4, 32)
        assert_equal(torch.cat([absmax[row], x[row]]).repeat(2).to(DEVICE), NF4, 32)


def test_strides_do_not_matter():
    """Tensors that are not dense in memory: nothing in the interface forbids them."""
    x = Recipe((50, 60)).make().to(DEVICE)
    codes, absmax, _ = quantized(x[:, 0], NF4, 32)
    plain = quantize_plain(x[:, 0], NF4, 32)
    assert same_bits(codes, plain.codes) and same_bits(absmax, plain.absmax)
    q = quantize_plain(x)
    sparse = {name: torch.stack([part, part], 1)[:, 0] for name, part in vars(q).items() if torch.is_tensor(part)}
    assert not any(part.is_contiguous() for part in sparse.values())
    assert same_bits(kernels.dequantize(dataclasses.replace(q, **sparse)), dequantize_plain(q))


def test_a_default_device_does_not_matter():
    """`with torch.device("meta")` is how models are built."""
    kernels.search_tables.cache_clear()
    with torch.device("meta"):
        below, edges, _, _ = kernels.search_tables(tuple(NF4.tolist()), torch.device("cpu"))
    assert below.device.type == edges.device.type == "cpu"


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, on infinity times 0
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows_in_the_absmax_of_its_block(value, dtype):
    for index in (3, 70, 4096 + 5):  # the last is in a partial block
        x = torch.ones(4096 + 10, dtype=dtype)
        x[index] = value
        _, absmax, wrong = quantized(x, NF4, 64)
        assert wrong
        assert (~absmax.isfinite()).nonzero().flatten().tolist() == [index // 64]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from qlora_lab.quantization.kernels import dequantize_kernel as kernel

types = {"codes": "*u8", "codebook": "*fp32", "out": "*bf16", "n": "i32", "n_bytes": "i32", "gap": "i32"}
second = {"scale_absmax": "*fp32", "scale_codebook": "*fp32", "scale_offset": "*fp32"}
for double in (False, True):
    for columns in (0, 4096):
        signature = types | ({"absmax": "*u8", **second} if double else {"absmax": "*fp32"})
        constants = {"BLOCK_SIZE": 64, "SCALE_BLOCK_SIZE": 256 * double, "TILE": 1024}
        constants |= {"COLUMNS": columns, "GAP_UNIT": 8}
        constants |= {} if double else dict.fromkeys(second)
        place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
        source = ASTSource(
            kernel,
            {name: signature.get(name, "constexpr") for name in kernel.arg_names},
            {place[name]: value for name, value in constants.items()},
            {place[name]: [["tt.divisibility", 16]] for name in signature if name != "gap"},
        )
        ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2}).asm["ptx"]
        print(sum(ptx.count(f"ld.global.{kind}") for kind in ("v2.b32", "b64")), ptx.count("st.global.v4.b32"),
              ptx.count("ld.global.b8"))
"""


@interpreted
def test_threads_load_and_store_sixteen_numbers_at_a_time(tmp_path):
    """8 bytes of codes in one load, 32 of bf16 in two stores. (Byte by byte, with 8-bit scales it took 10 % longer.)"""
    (tmp_path / "compile.py").write_text(COMPILE)
    surroundings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, tmp_path / "compile.py"], env=surroundings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["1 2 0", "1 2 0", "1 2 2", "1 2 2"]  # the last: two 8-bit scales, maybe


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, block_size, name):
    for i, (kind, shape) in enumerate((kind, shape) for kind in KINDS for shape in ((64, 4096), (77, 641), (4099,))):
        x = Recipe(shape, dtype, kind, exponent=(-30, 0, 30)[i % 3], seed=i).make().cuda()
        assert_equal(x, CODEBOOKS[name], block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_on_a_gpu(block_size):
    draw = torch.Generator("cuda").manual_seed(block_size)
    x = torch.randn(1000, 1001, device="cuda", generator=draw).bfloat16()
    assert_equal(x, NF4, block_size, scale_block_size=block_size)
    assert_equal(x.float().mul(1e-37), torch.rand(16, device="cuda", generator=draw).sort().values, block_size)


@pytest.mark.gpu
def test_public_functions_use_the_kernels(monkeypatch):
    called = []
    for name in ("quantize", "dequantize", "quantize_scales"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, function=function: called.append(name) or function(*a))
    x = torch.randn(50, 60, device="cuda")
    for view in (x, x.t(), x[::2, 3:], x.expand(2, 50, 60), x[:, :1], x[0, 0], x[:0]):
        q, plain = quantize(view), quantize_plain(view)
        assert same_bits(q.codes, plain.codes) and same_bits(q.absmax, plain.absmax)
        assert same_bits(dequantize(q), dequantize_plain(q)) and dequantize(q).shape == view.shape
        double = double_quantize(q)
        assert same_bits(dequantize(double), dequantize_plain(double))
        assert q.codebook.device == double.absmax.codebook.device == x.device
    assert set(called) == {"quantize", "dequantize", "quantize_scales"}
    for codebook in (DYNAMIC8, INT8):
        scales = torch.rand(1001, device="cuda")
        ours, plain = quantize_scales(scales, 32, codebook), quantize_scales_plain(scales, 32, codebook)
        assert same_bits(ours.codes, plain.codes) and same_bits(ours.absmax, plain.absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [quantize, quantize_plain])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_on_a_gpu_too(quantizer, value):
    x = torch.zeros(10, 10, device="cuda")
    x[7, 3] = x[9, 9] = value
    with pytest.raises(ValueError, match=rf"x has 2 non-finite .* the first \({value}\) at index \(7, 3\)"):
        quantizer(x)


@pytest.mark.gpu
def test_more_elements_than_32_bits_can_number():
    n = 2**32 + 3 * 4096 + 77
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip(f"{n} elements in bfloat16, in 4 bits and back need {5 * n / 1e9:.0f} GB of GPU memory")
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    for piece in x.split(2**30):
        piece.normal_()
    q, start = quantize(x), n // 4096 * 4096 - 8192
    plain = quantize_plain(x[start:])
    assert same_bits(q.codes[start // 2 :], plain.codes) and same_bits(q.absmax[start // 64 :], plain.absmax)
    del x
    assert same_bits(dequantize(q)[start:], dequantize_plain(plain))
