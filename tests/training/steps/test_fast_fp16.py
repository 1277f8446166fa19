"""The fast step in fp16, as on a T4: a scaled loss, skipped steps, no bf16 anywhere, no flash attention."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

from qlora_lab.finetuning import Batches, train, train_steps
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.steps import choice
from qlora_lab.training.steps.fast.attention import Samples, attend, attend_backward, has_flash
from qlora_lab.training.steps.fast.description import Attention
from qlora_lab.training.steps.fast.limits import NoFastStep, require_machine
from qlora_lab.training.steps.fast.loss_scale import LossScale
from qlora_lab.training.steps.fast.step import FastStep
from tests.training.steps.test_fast import batches as random_batches
from tests.training.steps.test_fast import in_float32, optimizer_of, random_model
from tests.training.steps.test_fast_families import (
    BY_TYPE,
    GEMMA2,
    GEMMA3,
    GRANITE,
    LLAMA3,
    family_model,
    interpreted,
    plain,
    samples,
)

CPU = torch.device("cpu")
NUMPY_OVERFLOWS = "ignore:(overflow|invalid value) encountered:RuntimeWarning"  # in Triton's interpreter


class NoBfloat16(TorchDispatchMode):
    """Raises if an operator of PyTorch reads or makes a bf16 tensor. Triton's kernels read and write such tensors."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16:
                raise AssertionError(f"{operator} has a bf16 tensor of shape {tuple(leaf.shape)}")
        return made


def scaled(**scaler):
    """An accelerator with a scaler, which Accelerate itself makes on a GPU only."""
    accelerator = make_accelerator(torch.float32, CPU)
    accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
    return accelerator


# ----------------------------------------------------------------------------------------------------------- the scale


def test_the_scale_goes_as_torchs_scaler_has_it():
    """Through overflows, growth and a restart in the middle. An SGD step of torch's scaler is the oracle."""
    numbers = {"init_scale": 2.0**10, "growth_interval": 3, "backoff_factor": 0.25, "growth_factor": 4.0}
    torchs, ours = torch.amp.GradScaler("cpu", **numbers), torch.amp.GradScaler("cpu", **numbers)
    p = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([p], lr=0.0)
    for i, finite in enumerate([True, False, False, True, True, True, True, True, False, True, True, True, True]):
        p.grad = torch.full((1,), 1.0 if finite else math.inf)
        torchs.scale(p.detach())  # makes the scaler's tensors
        torchs.step(sgd)
        torchs.update()
        LossScale(ours).update(finite)
        assert ours.state_dict() == torchs.state_dict(), i
        assert LossScale(ours).value == torchs.get_scale()
        if i == 5:
            state, ours = ours.state_dict(), torch.amp.GradScaler("cpu")
            ours.load_state_dict(state)
    assert LossScale(None).value == 1.0


# ---------------------------------------------------------------------------------------------------- the step on a CPU


def fp16_step(adapted, optimizer, accelerator, settings, accumulation, pad_token_id=0) -> FastStep:
    """As `choice.make_step`, without asking the machine."""
    return FastStep(adapted, optimizer, accelerator, max_grad_norm=settings.max_grad_norm, dtype=torch.float16)


@interpreted
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("phi3", {"sliding_window": 9, "quantized": True, "num_hidden_layers": 1}),
        ("gemma3_text", {**GEMMA3, "num_hidden_layers": 1, "adapters": "PEFT's"}),
    ],
    ids=str,
)
def test_gradients_are_those_of_float32_without_bf16_anywhere(kind, case):
    """fp16 has 11 bits, and some dozens of roundings lie between a gradient and float32's: 2^-5 of the largest entry.

    (Over six families, 2^-6.2 at most. bf16, with 8 bits, is 8 times as far off.)
    """
    adapted = family_model(kind, **case)
    batch = samples(20, 27)
    targets = sum(len(sample.ids) - sample.prompt_length for sample in batch)
    loss, expected = plain(adapted, batch, targets)
    names = {id(p): name for name, p in adapted.named_parameters()}
    scale = 2.0**12
    with NoBfloat16():
        accelerator = scaled(init_scale=scale)
        step = FastStep(adapted, optimizer_of(adapted), accelerator, dtype=torch.float16, gradient_checkpointing=True)
        result = step.run([[[sample] for sample in batch]], targets, 1e-3)
    assert step.adapters.gradient.dtype == torch.float16
    torch.testing.assert_close(step.adapters.moments[0], 0.1 * step.adapters.gradient.float() / scale)
    assert result.updated and result.loss.item() == pytest.approx(loss, rel=2**-11)
    squares = sum(wanted.square().sum().item() for wanted in expected.values())
    assert result.norm.item() == pytest.approx(math.sqrt(squares), rel=0.01)
    pieces = step.adapters.gradient.split([p.numel() for p in step.adapters.parameters])
    for p, ours in zip(step.adapters.parameters, pieces, strict=True):
        wanted = expected[names[id(p)]]
        assert (ours.float().view_as(p) / scale - wanted).abs().max() < 2**-5 * wanted.abs().max()


@interpreted
def test_bf16_anywhere_would_have_been_seen():
    adapted = family_model("llama", num_hidden_layers=1).bfloat16()
    with pytest.raises(AssertionError, match="has a bf16 tensor"), NoBfloat16():
        adapted.model.embed_tokens(torch.tensor([[5]]))


@interpreted
@pytest.mark.filterwarnings(NUMPY_OVERFLOWS)
def test_an_overflow_skips_the_step_and_a_resumed_run_has_the_same_scale(tmp_path):
    """Steps 1 and 3 of 3 overflow. Step 2 is AdamW's first: its largest change is the learning rate."""
    numbers = {"init_scale": 2.0**24, "growth_interval": 1, "backoff_factor": 2.0**-12, "growth_factor": 2.0**12}
    settings = {"steps": 3, "learning_rate": 5e-3, "checkpoint_every": 2, "schedule": "constant", "warmup_steps": 0}

    def run(folder, **more):
        adapted, accelerator = family_model("llama", num_hidden_layers=1, targets=["o_proj"]), scaled(**numbers)
        more |= {"accelerator": accelerator, "make_step": fp16_step, "checkpoints": folder}
        before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
        records = list(train_steps(adapted, Batches(samples(9, 12, 10), 1), **settings, **more))
        return before, [(r.loss, r.gradient_norm) for r in records], accelerator.scaler.state_dict()

    before, whole, scale = run(tmp_path / "whole")
    assert [math.isfinite(norm) for _, norm in whole] == [False, True, False]
    assert all(math.isfinite(loss) for loss, _ in whole)
    second = tmp_path / "whole" / "checkpoint-000002"
    after = load_file(second / "adapter.safetensors")
    changes = [(after[name] - p).abs().max().item() for name, p in before.items()]
    assert max(changes) == pytest.approx(5e-3, rel=1e-3)
    assert json.loads((second / "progress.json").read_text())["scaler"]["scale"] == 2.0**24

    shutil.copytree(second, tmp_path / "again" / second.name)
    _, resumed, scale_of_resumed = run(tmp_path / "again", resume=True)
    assert repr(resumed) == repr(whole)  # NaN is no NaN's equal
    assert scale_of_resumed == scale


# ------------------------------------------------------------------------------------------------------- which machines


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), torch.float16, "it needs compute capability 7.5, a T4's, and this GPU has 7.0"),
        ((7, 5), torch.bfloat16, "this GPU does not compute in bfloat16: it wants compute_dtype=torch.float16"),
        ((9, 0), torch.float32, "it computes in bfloat16 or float16, and compute_dtype is torch.float32"),
        ((7, 5), torch.float16, None),
        ((8, 9), torch.float16, None),
        ((8, 0), torch.bfloat16, None),
    ],
)
def test_which_gpus_it_takes_and_why_not(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if reason is None:
        require_machine(torch.device("cuda"), dtype)
    else:
        with pytest.raises(NoFastStep) as refused:
            require_machine(torch.device("cuda"), dtype)
        assert str(refused.value) == reason


def test_flash_attention_is_for_gpus_that_have_it_unless_it_is_turned_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_flash(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert has_flash(torch.device("cuda"))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert not has_flash(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def like_a_t4():
    """Newer GPUs take the path of a T4, too, if flash attention is turned off and fp16 is asked for."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # MATH: for transformers' own forward pass
        assert not has_flash(torch.device("cuda"))
        yield


def accelerator_on_gpu(dtype, init_scale=2.0**10):
    """Its first scale is low, so that no step is skipped and runs can be compared step by step."""
    accelerator = make_accelerator(dtype, torch.device("cuda"))
    if dtype == torch.float16:
        accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=init_scale)
    return accelerator


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "window", "scale"), [(64, None, None), (128, 32, 0.2), (256, 100, None)])
def test_memory_efficient_attention_is_the_cpus(head_dim, window, scale):
    """fp16 has 11 bits: outputs are right to 2^-10 of the largest, and gradients, each a sum of such, to 2^-9.

    The last sample is empty, and `longest` is more than all tokens together. The bits repeat.
    """
    draw = torch.Generator().manual_seed(4)
    kind = Attention(4, 2, head_dim, window=window, scale=scale)
    q, k, v, gradient = (torch.randn(300, heads, head_dim, generator=draw).half() for heads in (4, 2, 2, 4))
    starts = torch.tensor([0, 100, 300, 300], dtype=torch.int32)
    exact = [tensor.float() for tensor in (q, k, v)]
    on_cpu, on_gpu = Samples(starts, 512), Samples(starts.cuda(), 512, flash=False)
    expected, _ = attend(*exact, on_cpu, kind)
    wanted = attend_backward(gradient.float(), *exact, expected, (), on_cpu, kind)
    there = [tensor.cuda() for tensor in (q, k, v)]

    def run():
        out, kept = attend(*there, on_gpu, kind)
        return out, *attend_backward(gradient.cuda(), *there, out, kept, on_gpu, kind)

    first = run()
    for ours, right, share in zip(first, (expected, *wanted), (2**-10, 2**-9, 2**-9, 2**-9), strict=True):
        assert ours.shape == right.shape
        assert (ours.cpu().float() - right).abs().max() < share * right.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def of_family(kind, case):
    return family_model(kind, **case).cuda()


def some_batches():
    return Batches(samples(20, 27, 9, 33, 41, 12, 25, 18), 4)


FAMILIES = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": 7, "head_dim": 24}),
    ("qwen2", {**BY_TYPE, "adapters": "PEFT's"}),
    ("qwen3", {"head_dim": 24}),
    ("phi3", {"sliding_window": 9, "quantized": True}),
    ("gemma2", GEMMA2),
    ("gemma3_text", GEMMA3),
    ("smollm3", {"no_rope_layers": [0, 1]}),
    ("olmo2", {}),
    ("granite", GRANITE),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "case"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
def test_each_family_fifty_steps_beside_float32(like_a_t4, kind, case):
    """As near to float32 as fp16's rounding lets it be (half a unit in the last of 11 bits, over all layers and steps).

    Or as near as the plain step is in fp16, where that is further off.
    """
    settings = {"steps": 50, "learning_rate": 1e-3, "progress": False}

    def run(dtype, fast):
        accelerator = accelerator_on_gpu(dtype)
        return train(
            of_family(kind, case), some_batches(), compute_dtype=dtype, fast=fast, accelerator=accelerator, **settings
        )

    exact, plain_one, fast = run(torch.float32, False), run(torch.float16, False), run(torch.float16, True)
    off = [max(abs(r.loss / e.loss - 1) for r, e in zip(run, exact, strict=True)) for run in (plain_one, fast)]
    print(f"\n{kind}: loss off float32: fast {off[1]:.1e}, plain {off[0]:.1e} at most; {exact[0].loss:.3f} to", end=" ")
    print(f"{exact[-1].loss:.3f} in float32, {fast[-1].loss:.3f} fast in fp16")
    assert exact[-2].loss + exact[-1].loss < 0.95 * (exact[0].loss + exact[1].loss)  # there are two batches
    assert off[1] < max(2**-9, 1.5 * off[0])
    assert all(math.isfinite(r.gradient_norm) for r in fast)


@pytest.mark.gpu
def test_dropout_with_the_same_masks_fifty_steps_beside_float32(like_a_t4, monkeypatch):
    """The fast step in float32 draws the same masks. (It is refused otherwise: there is nothing fast about it.)"""
    monkeypatch.setattr(choice, "require_machine", lambda device, compute_dtype: None)

    def run(dtype, seed=7):
        adapted = of_family("qwen3", {"head_dim": 24, "dropout": 0.3})
        torch.manual_seed(seed)
        accelerator = accelerator_on_gpu(dtype)
        settings = {"steps": 50, "learning_rate": 1e-3, "progress": False, "fast": True, "gradient_checkpointing": True}
        return train(adapted, some_batches(), compute_dtype=dtype, accelerator=accelerator, **settings)

    exact, fast, with_other_masks = run(torch.float32), run(torch.float16), run(torch.float16, seed=8)
    off = [max(abs(r.loss / e.loss - 1) for r, e in zip(run, exact, strict=True)) for run in (fast, with_other_masks)]
    print(f"\ndropout: loss off float32 {off[0]:.1e} at most, {off[1]:.1e} with other masks")
    assert off[0] < 2**-8 < off[1]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bitsandbytes_and_peft_fifty_steps_beside_float32(like_a_t4, checkpointing):
    settings = {"steps": 50, "learning_rate": 1e-3, "progress": False, "gradient_checkpointing": checkpointing}

    def run(adapted, dtype, fast):
        accelerator = accelerator_on_gpu(dtype)
        return train(adapted, random_batches(), compute_dtype=dtype, fast=fast, accelerator=accelerator, **settings)

    exact = run(in_float32(random_model(dtype=torch.float16)), torch.float32, False)
    plain_one = run(random_model(dtype=torch.float16), torch.float16, False)
    fast = run(random_model(dtype=torch.float16), torch.float16, True)
    off = [max(abs(r.loss / e.loss - 1) for r, e in zip(run, exact, strict=True)) for run in (plain_one, fast)]
    print(f"\nloss off float32: fast {off[1]:.1e}, plain {off[0]:.1e} at most")
    assert exact[-1].loss < 0.8 * exact[0].loss
    assert off[1] < max(2**-9, 1.5 * off[0])


@pytest.mark.gpu
def test_no_bf16_anywhere_on_a_gpu(like_a_t4):
    """Launched one by one: the operators in a graph are not seen when it is replayed."""
    adapted = random_model(dtype=torch.float16)
    step = FastStep(
        adapted, optimizer_of(adapted), accelerator_on_gpu(torch.float16), dtype=torch.float16, capture=False,
        gradient_checkpointing=True,
    )  # fmt: skip
    [rows] = next(iter(random_batches()))
    targets = sum(sample.target_count for row in rows for sample in row)
    with NoBfloat16():
        assert step.run([rows], targets, 1e-3).updated


@pytest.mark.gpu
def test_the_same_bits_each_time_and_after_a_resume(like_a_t4, tmp_path):
    """From a scale that no gradient survives: the skipped steps are the same ones, too."""
    settings = {"steps": 16, "learning_rate": 1e-3, "fast": True, "compute_dtype": torch.float16}

    def run(**more):
        adapted = random_model(dtype=torch.float16)
        accelerator = accelerator_on_gpu(torch.float16, 2.0**26)
        steps = train_steps(adapted, random_batches(), accelerator=accelerator, **settings, **more)
        return adapted, steps, accelerator

    first, steps, accelerator = run()
    whole = list(steps)
    assert not math.isfinite(whole[0].gradient_norm) and math.isfinite(whole[-1].gradient_norm)
    _, steps, _ = run(checkpoints=tmp_path, checkpoint_every=5)
    for _ in range(7):
        next(steps)
    steps.close()
    third, steps, again = run(checkpoints=tmp_path, resume=True)
    assert [r.loss for r in steps] == [r.loss for r in whole]
    for (name, p), q in zip(first.named_parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert again.scaler.state_dict() == accelerator.scaler.state_dict()
