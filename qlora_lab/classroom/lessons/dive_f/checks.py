"""Exercises of dive_f_why_is_it_slow."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Mistake,
    Verdict,
    described,
    error_text,
    exercise,
    expect_number,
    is_stub,
    right,
    wrong,
)
from qlora_lab.classroom.judging import call as call_function

LAYERS = [  # tokens, n_in, n_out, operations and bytes a second
    (512, 4096, 4096, 7e14, 3e12),  # the computing decides
    (32, 4096, 11008, 6.5e13, 3.2e11),  # the reading and writing does
]
READ, WRITTEN = 4.5 / 8, 2  # bytes a weight, when NF4 is dequantized to bf16


def product_seconds(tokens: int, n_in: int, n_out: int, rate: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of a bf16 product's computing, and of its reading and writing."""
    moved = 2 * (n_in * n_out + tokens * n_in + tokens * n_out)
    return 2 * tokens * n_in * n_out / rate, moved / bandwidth


@exercise("F.1", "what dequantizing costs", item="train", points=2, todo="complete `slowdown`, fill in `my_card`")
def check_slowdown(slowdown: Callable[[int, int, int, float, float], float], my_card: dict | None = None) -> Verdict:
    """slowdown(tokens, n_in, n_out, rate, bandwidth): how many times as long a layer takes in NF4 as in bf16.

    my_card: the learner's "tokens" a step, and the card's "rate" (operations/s) and "bandwidth" (bytes/s).
    """
    for layer in LAYERS:
        tokens, n_in, n_out, _, bandwidth = layer
        computing, moving = product_seconds(*layer)
        product, weight = max(computing, moving), n_in * n_out / bandwidth  # seconds for one byte a weight
        dequantizing = (READ + WRITTEN) * weight
        from_codes = max(computing, moving - (2 - READ) * weight)
        mistakes = [
            (dequantizing / product, "That is what dequantizing adds: the whole layer takes the product's time, too."),
            (product / (product + dequantizing), "The other way round: the time in NF4, divided by that in bf16."),
            (1 + READ * weight / product, "That is the reading alone: the dequantized weight is written, too."),
            (1 + WRITTEN * weight / product, "That is the writing alone: the codes and scales are read, too."),
            (1 + (4.5 + WRITTEN) * weight / product, "4.5 is in bits: a byte has eight of them."),
            (1 + (0.5 + WRITTEN) * weight / product, "4.5 bits a weight, not 4: the scales are read, too."),
            (
                (from_codes + dequantizing) / product,
                "The product reads the *dequantized* weight, with 2 bytes each, as in bf16.",
            ),
            (
                max(computing, moving + dequantizing) / product,
                "Dequantizing is a kernel of its own: the product begins when it has ended, so add up their times.",
            ),
            (
                1 + dequantizing / (computing + moving),
                "The product computes and moves side by side: take the longer of its two times, not their sum.",
            ),
            (1 + dequantizing / computing, "The product takes the longer of its two times, not always the computing."),
            (1 + dequantizing / moving, "The product takes the longer of its two times, not always the moving."),
        ]
        source = f"slowdown({tokens}, {n_in}, {n_out}, rate={layer[3]:g}, bandwidth={bandwidth:g})"
        expect_number(source, call_function(slowdown, *layer), 1 + dequantizing / product, mistakes, tolerance=1e-6)
    if my_card is None or is_stub(my_card):
        raise NotImplementedError
    return judge_card(my_card)


def judge_card(my_card: dict) -> Verdict:
    """What dequantizing costs on the learner's card, for a layer of 4096 x 4096."""
    names = ("tokens", "rate", "bandwidth")
    values = [my_card.get(name) for name in names] if isinstance(my_card, dict) else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(names):
        return wrong(
            f'my_card is {described(my_card)}, expected a dict of three numbers: "tokens", "rate", "bandwidth".'
        )
    tokens, rate, bandwidth = numbers
    if not 1 <= tokens <= 1e8:
        return wrong(f"my_card has {tokens:g} tokens: expected those of one step, samples times their length.")
    if not 1e11 <= rate <= 1e17:
        return wrong(f"my_card has a rate of {rate:g} operations a second: 65 TFLOPS, say, are 65e12.")
    if not 1e10 <= bandwidth <= 1e14:
        return wrong(f"my_card has a bandwidth of {bandwidth:g} bytes a second: 320 GB/s, say, are 320e9.")
    product = max(product_seconds(int(tokens), 4096, 4096, rate, bandwidth))
    dequantizing = (READ + WRITTEN) * 4096**2 / bandwidth
    # a tenth, as soon as the product's computing or its reading and writing takes ten times as long
    enough = min(5 * (READ + WRITTEN) * rate / bandwidth, 2048 * (5 * (READ + WRITTEN) - 1))
    return right(
        f"On your card and with {tokens:,.0f} tokens, a layer of 4096 x 4096 takes {1 + dequantizing / product:.2f} "
        f"times as long in NF4 as in bf16. From about {enough:,.0f} tokens on it costs less than a tenth."
    )


@exercise("F.2", "the floor of a training step", item="train", points=1, todo="complete `floor_ms`")
def check_floor(floor_ms: Callable[[float, int, bool, float], float]) -> Verdict:
    """floor_ms(weights, tokens, checkpointing, rate): milliseconds of the arithmetic alone, at `rate` operations/s."""
    for weights, tokens, checkpointing, rate in [(7e9, 300, True, 5e14), (2e9, 900, False, 4e14)]:
        each = 6 if checkpointing else 4
        expected = 1e3 * each * weights * tokens / rate
        mistakes = [
            (expected / 1e3, "These are seconds: milliseconds are asked for."),
            (expected * 1e3, "These are microseconds: milliseconds are asked for."),
            (expected * 2 / each, "That is the forward pass alone."),
            (expected * 4 / each, "Checkpointing computes the forward pass *twice*: 6 operations with it, 4 without."),
            (
                expected * 8 / each,
                "8 is full fine-tuning with checkpointing: frozen weights need no gradient of their own.",
            ),
            (
                expected * 6 / each,
                "Without checkpointing the forward pass runs once, and frozen weights need no gradient of their own.",
            ),
            (expected / each, "Each weight is a multiplication *and* an addition, and there is a backward pass."),
            (expected / 2, "A multiplication and an addition are two operations."),
            (expected / tokens, "That is for a single token."),
        ]
        came = call_function(floor_ms, weights, tokens, checkpointing, rate)
        source = f"floor_ms({weights:g}, {tokens}, {checkpointing}, {rate:g})"
        expect_number(source, came, expected, mistakes)
    return right("No kernel, graph or library gets below it with this arithmetic.")


@exercise("F.3", "bytes that a fused kernel saves", item="train", points=2, todo="fill in `norm_bytes`")
def check_norm_bytes(norm_bytes: dict) -> Verdict:
    """norm_bytes: bytes of memory traffic an element, of the norm as six operators and as one kernel."""
    if not isinstance(norm_bytes, dict) or not {"operators", "fused"} <= set(norm_bytes):
        return wrong(f"expected a dict with 'operators' and 'fused', got {described(norm_bytes)}.")
    operators = [
        (18, "That is what is read: what is written has to get to memory too."),
        (20, "That is all reads and writes but those of two operators: go through the six lines once more."),
        (34, "`mean` writes next to nothing, but it reads all of the squares; the last line reads and writes bf16."),
        (32, "One operator's reads or writes are missing: `mean` reads 4, too."),
        (40, "`mean` writes one number a row: next to nothing an element."),
        (44, "The last two lines write bf16, 2 bytes, and the last one reads it."),
        (22, "Count the float32 tensors with 4 bytes."),
        (12, "These are the tensors: each is written once, and read by the operator after it."),
        (48, "The first line reads bf16 and the last two write it: 2 bytes each."),
    ]
    fused = [
        (2, "It reads a number *and* writes one."),
        (6, "What is in between stays in registers: bf16 in, bf16 out."),
        (8, "It computes in float32, but reads and writes bf16: 2 bytes each."),
        (36, "That is the six operators': one kernel keeps what is in between in registers."),
    ]
    expect_number("norm_bytes['operators']", norm_bytes["operators"], 36, operators)
    expect_number("norm_bytes['fused']", norm_bytes["fused"], 4, fused)
    return right("Nine times less to move, for the same numbers.")


# ------------------------------------------------------------------------------------------------------- F.4, a kernel

GUARD = 4096  # numbers after each tensor, where a kernel without masks reads and writes: harmless, and noticed


def guarded(tensor, fill):
    """A copy of a 1-D tensor, followed by GUARD numbers more, all of them `fill`."""
    import torch

    longer = torch.full((tensor.numel() + GUARD,), fill, dtype=tensor.dtype)
    longer[: tensor.numel()] = tensor
    return longer


def launch(kernel, q, n: int, tile: int, device: str):
    """Let the kernel run on all tiles of q, and return what it wrote, guard included; NaN where it wrote nothing."""
    import torch

    out = torch.full((n + GUARD,), float("nan"), device=device)
    inputs = [guarded(q.codes, 0xFF), q.codebook, guarded(q.absmax, float("inf"))]
    inputs = [tensor.to(device) for tensor in inputs]
    try:
        kernel[(-(-n // tile),)](*inputs, out, n, q.block_size, tile)
    except Exception as error:
        while error.__cause__ is not None:  # the interpreter wraps what went wrong
            error = error.__cause__
        raise Mistake(f"Launched on {n} numbers, your kernel raised {error_text(error)}") from error
    return out.cpu()


def likely_outputs(q, n: int, tile: int) -> list[tuple]:
    """Pairs of what a mistake leads to, (n,), and its explanation."""
    import torch

    from qlora_lab.quantization.packing import unpack

    i = torch.arange(n)
    size, blocks = q.block_size, len(q.absmax)
    codes = unpack(q.codes)
    level = q.codebook[codes.long()]
    swapped = level[: len(level) // 2 * 2].view(-1, 2).flip(1).flatten()[:n]
    scale = q.absmax[i // size]
    by_tile = q.absmax[(i // tile).clamp(max=blocks - 1)]
    within_tile = q.absmax[(i % tile // size).clamp(max=blocks - 1)]
    return [
        (swapped * scale, "The nibbles are swapped: the high one comes first."),
        (level[:n] * q.absmax[0], "Every number has the scale of the first block: there is one for each 64 numbers."),
        (level[:n] * q.absmax.max(), "That is one scale for the whole tensor: there is one for each 64 numbers."),
        (level[:n] * by_tile, "The scale is that of the program's number: a tile holds several blocks."),
        (level[:n] * within_tile, "The scale's block is counted from the tile's start: count from the tensor's."),
        (level[:n] * q.absmax[i // 2 // size], "The scale is that of the wrong block: count numbers, not bytes."),
        (level[:n] * q.absmax[i % blocks], "The scale is that of the wrong block: `i // BLOCK_SIZE` is its number."),
        (level[:n] / scale, "You divided by the scale: quantizing divided, so multiply."),
        (level[:n], "These are the levels: the scale is missing."),
        (codes[:n] * scale, "These are codes times scales: look the codes up in the codebook."),
        (codes[:n].float(), "These are the codes: look them up in the codebook, and scale."),
        (level[0::2].repeat_interleave(2)[:n] * scale, "Both numbers of a byte got the high nibble."),
        (level[1::2].repeat_interleave(2)[:n] * scale, "Both numbers of a byte got the low nibble."),
    ]


@exercise(
    "F.4", "a dequantize kernel", item="train", points=3, todo="complete `dequantize_kernel`", optional=True
)  # Triton exists for Linux only
def check_dequantize_kernel(kernel) -> Verdict:
    """kernel: a Triton kernel of (codes, codebook, absmax, out, n, BLOCK_SIZE, TILE) that writes the n numbers."""
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return Verdict("unavailable", NO_TRITON)
    import torch

    from qlora_lab.quantization import quantize
    from qlora_lab.quantization.blockwise import dequantize_plain

    interpreted = isinstance(kernel, InterpretedFunction)
    if not interpreted and not isinstance(kernel, triton.JITFunction):
        return wrong(f"expected a kernel, got {described(kernel)}: is there an @jit above its `def`?")
    if not interpreted and not torch.cuda.is_available():
        return wrong(
            "Triton was imported before TRITON_INTERPRET was set: restart the notebook's kernel, and run all cells."
        )
    device = "cpu" if interpreted else "cuda"
    draw = torch.Generator().manual_seed(13)
    for n, tile in [(1024, 256), (1000, 256), (64 * 9 + 17, 128)]:
        x = torch.randn(n, generator=draw) * torch.linspace(1, 3, n)
        q = quantize(x)
        written = launch(kernel, q, n, tile, device)
        came, expected = written[:n], dequantize_plain(q)
        name = f"{n} numbers in tiles of {tile}"
        if written.isnan().all():
            raise NotImplementedError  # nothing was written: a stub
        for likely, why in likely_outputs(q, n, tile):
            if torch.equal(came, likely) and not torch.equal(came, expected):
                return wrong(f"{name}: {why}")
        if came[tile:].isnan().all() and not came[:tile].isnan().any():
            return wrong(f"{name}: only the first tile is written. Begin at `tl.program_id(0) * TILE`.")
        if came.isnan().any():
            where = int(came.isnan().nonzero()[0])
            return wrong(f"{name}: nothing is written at number {where}, or NaN is.")
        if not written[n:].isnan().all():
            return wrong(f"{name}: you write past the end, into somebody else's memory: `mask=i < n` in `tl.store`.")
        if not torch.equal(came, expected):
            where = int((came != expected).nonzero()[0])
            return wrong(
                f"{name}: at number {where} it writes {came[where]:.6g}, expected {expected[where]:.6g}; "
                f"{(came != expected).float().mean():.0%} of the numbers differ."
            )
    return right("Equal to the package's in every bit, the ragged end included.")


NO_TRITON = (
    "cannot be done here: Triton is not installed, and exists for Linux only (there: pip install -e '.[triton]'); "
    "your checklist does not wait for it."
)
