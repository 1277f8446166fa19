"""The fast step gives the plain loop's losses, gradients and updates. On a CPU Triton interprets its kernels: fp32."""

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

from qlora_lab.adapters.quantized_linear import nf4_double
from qlora_lab.finetuning import (
    Batches,
    TokenizedSample,
    TrainingDiverged,
    add_adapter,
    add_lora,
    collate,
    merge,
    quantize_linears,
    train,
    train_steps,
)
from qlora_lab.quantization import quantize_affine
from qlora_lab.training.loss import token_loss_sum
from qlora_lab.training.optimizers import make_optimizer
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.steps import choice
from qlora_lab.training.steps.fast import host_memory
from qlora_lab.training.steps.fast import kernels as step_kernels
from qlora_lab.training.steps.fast.batch import flatten, rounded_up
from qlora_lab.training.steps.fast.limits import NoFastStep
from qlora_lab.training.steps.fast.step import FastStep
from tests.conftest import tiny_config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
interpreted = pytest.mark.skipif(CUDA, reason="a GPU is here: nothing is interpreted")


def model(adapters="ours", quantized=True, targets="all-linear", rank=8, quantizer=nf4_double, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    causal_lm = LlamaForCausalLM(tiny_config(vocab_size=97, **changes)).to(DEVICE)
    if quantized:
        quantize_linears(causal_lm, quantizer=quantizer)
    if adapters == "ours":
        adapted = add_lora(causal_lm, rank, 16, targets)
    else:
        adapted = add_adapter(causal_lm, rank=rank, alpha=16, targets=targets)
    draw = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: then A has no gradient
            p.data = 0.1 * torch.randn(p.shape, generator=draw).to(p)
    return adapted.train()


def samples(*lengths, prompt=3):
    draw = torch.Generator().manual_seed(2)
    return [TokenizedSample(tuple(torch.randint(3, 97, (n,), generator=draw).tolist()), prompt) for n in lengths]


def plain_gradients(adapted, micro_batches, targets):
    loss = 0.0
    for micro_batch in micro_batches:
        share = token_loss_sum(adapted, collate([[sample] for sample in micro_batch], 0)) / targets
        share.backward()
        loss += share.item()
    return loss, {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}


def optimizer_of(adapted):
    return make_optimizer("adamw_torch", [p for p in adapted.parameters() if p.requires_grad], 1e-3, 0.0)


@interpreted  # slowly: one layer, unless two show more
@pytest.mark.parametrize(
    ("case", "accumulation", "checkpointing"),
    [
        ({"num_hidden_layers": 2}, 1, True),
        ({"num_hidden_layers": 3}, 1, "offloading"),
        ({"num_hidden_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": False}, 1, False),
        ({"adapters": "PEFT's", "quantized": False}, 2, False),
        ({"targets": ["q_proj", "v_proj"]}, 1, False),
        ({"targets": ["k_proj", "o_proj", "up_proj", "down_proj"], "rank": 16}, 1, True),
    ],
    ids=str,
)
def test_gradients_are_the_plain_loops(case, accumulation, checkpointing):
    case = {"num_hidden_layers": 1, **case}
    micro_batches = [samples(20, 31, 5), samples(17, 40)][:accumulation]
    targets = sum(len(s.ids) - s.prompt_length for batch in micro_batches for s in batch)
    loss, expected = plain_gradients(model(**case), micro_batches, targets)

    adapted = model(**case)
    step = FastStep(
        adapted,
        optimizer_of(adapted),
        make_accelerator(torch.float32, torch.device(DEVICE)),
        accumulation=accumulation,
        gradient_checkpointing=bool(checkpointing),
        activation_offloading=checkpointing == "offloading",
        dtype=torch.float32,
    )
    step.gradients(step.flattened([[[sample] for sample in batch] for batch in micro_batches]), targets)
    assert step.loss.item() == pytest.approx(loss, rel=1e-5)
    ours = {id(p): g for p, g in zip(step.adapters.parameters, split(step), strict=True)}
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[id(p)], expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max())


def split(step):
    parameters = step.adapters.parameters
    pieces = step.adapters.gradient.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


@interpreted
def test_offloaded_inputs_are_let_go_of(monkeypatch):
    sent, alive = [], []
    send, fetch = host_memory.HostMemory.send, host_memory.HostMemory.fetch

    def sending(self, i, x):
        sent.append(weakref.ref(x))
        send(self, i, x)

    def fetching(self, i):
        fetch(self, i)
        alive.append(sum(reference() is not None for reference in sent))

    monkeypatch.setattr(host_memory.HostMemory, "send", sending)
    monkeypatch.setattr(host_memory.HostMemory, "fetch", fetching)
    adapted = model(num_hidden_layers=4)
    step = FastStep(
        adapted,
        optimizer_of(adapted),
        make_accelerator(torch.float32, torch.device(DEVICE)),
        gradient_checkpointing=True,
        activation_offloading=True,
        dtype=torch.float32,
    )
    step.gradients(step.flattened([[[sample] for sample in samples(20, 31)]]), 40)
    assert len(sent) == len(alive) == 3 and alive[0] == 0


@interpreted
def test_adamw_is_torchs():
    draw = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3000, generator=draw))
    ours, first, second = p.detach().clone(), torch.zeros(3000), torch.zeros(3000)
    adamw = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn(3000, generator=draw) * (10 if step == 2 else 1e-3)
        p.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([p], 1.0)
        adamw.step()
        scale = 2.0**step  # of the loss, and so of the gradient that the kernel is given
        step_kernels.adamw(
            ours, scale * gradient, first, second, norm, step, 1e-2, 0.1, 1.0, (0.9, 0.999), 1e-8, 1 / scale
        )
        torch.testing.assert_close(ours, p.detach(), rtol=1e-6, atol=1e-6)


@interpreted
def test_training_loop_and_resume(monkeypatch, tmp_path):
    """`train_steps(fast=True)` gives the plain loop's losses, and goes on after a resume as if nothing had happened."""

    monkeypatch.setattr(choice, "require_machine", lambda device, compute_dtype: None)  # on a CPU it is slow, but right
    make = lambda: model("PEFT's", False, num_hidden_layers=1)  # noqa: E731
    stream, settings = Batches(samples(*range(9, 25, 2)), 4), {"steps": 3, "learning_rate": 5e-3}
    plain = list(train_steps(make(), stream, **settings))
    steps = train_steps(make(), stream, fast=True, checkpoints=tmp_path, checkpoint_every=2, **settings)
    fast = [next(steps) for _ in range(3)]
    steps.close()  # before the third step's checkpoint
    assert [r.loss for r in fast] == pytest.approx([r.loss for r in plain], rel=1e-4)
    assert [r.gradient_norm for r in fast] == pytest.approx([r.gradient_norm for r in plain], rel=1e-4)

    resumed = list(train_steps(make(), stream, fast=True, checkpoints=tmp_path, resume=True, **settings))
    assert [r.loss for r in resumed] == [r.loss for r in fast]


@interpreted
def test_without_a_gpu_the_plain_step_takes_over(capsys):
    stream = Batches(samples(9, 11), 2)
    records = train(model("PEFT's", False), stream, steps=2, fast=True, progress=False)
    assert capsys.readouterr().err == "no fast step, the plain one takes over: it needs a GPU\n"
    assert [r.loss for r in records] == [r.loss for r in train_steps(model("PEFT's", False), stream, steps=2)]


def refused(adapted, optimizer=None, **changes):
    accelerator = make_accelerator(torch.float32, torch.device(DEVICE))
    for name, value in changes.items():
        setattr(adapted.config, name, value)
    with pytest.raises(NoFastStep) as reason:
        FastStep(adapted, optimizer or optimizer_of(adapted), accelerator, dtype=torch.float32)
    return str(reason.value)


def test_what_it_was_not_written_for_is_refused_with_the_reason():
    assert "this model is a gpt2" in refused(model(), model_type="gpt2")
    assert "not all multiples of 8" in refused(model(), intermediate_size=132)
    assert "activation is gelu" in refused(model(), hidden_act="gelu")
    assert "'dynamic'" in refused(model(), rope_parameters={"rope_type": "dynamic"})
    adapted = model(quantized=False)
    merge(adapted)
    assert "has its adapter merged" in refused(adapted)
    adapted = model()
    adapted.model.layers[0].mlp.up_proj.alpha = 3
    assert "several ranks, scalings or dropouts" in refused(adapted)
    adapted = model()
    adapted.model.layers[1].mlp.up_proj.dropout = 0.1
    assert "several ranks, scalings or dropouts" in refused(adapted)
    assert "neither dense nor in 4 bits" in refused(model(quantizer=lambda weight: quantize_affine(weight, 4, 64)))
    adapted = model()
    adapted.model.norm.weight.requires_grad_()
    assert "something besides" in refused(adapted)
    adapted = model().bfloat16()
    assert "must be float32" in refused(adapted)
    adapted = model()
    eight_bits = make_optimizer("adamw_8bit", [p for p in adapted.parameters() if p.requires_grad], 1e-3, 0.0)
    assert "paged_adamw_32bit" in refused(adapted, eight_bits)


def test_samples_end_to_end():
    first, second = TokenizedSample((5, 6, 7, 8), 2), TokenizedSample((9, 10, 11), 0)
    batch = flatten([first, second], pad_token_id=1)
    ids, positions, starts, rows, targets = (part.tolist() for part in batch.parts())
    assert ids == [5, 6, 7, 8, 9, 10, 11] + [1] * 57
    assert positions == [0, 1, 2, 3, 0, 1, 2, *range(57)]
    assert starts == [0, 4, 7, 64, 64]  # the padding is a sample, and a fourth one is empty
    assert rows == [1, 2, 4, 5] + [0] * 60 and targets == [7, 8, 10, 11] + [-100] * 60
    assert batch.longest == 64
    for n in range(1, 5000):
        assert n <= rounded_up(n) < n + max(64, n / 8)
    assert len({rounded_up(n) for n in range(2048, 4096)}) == 9


# ------------------------------------------------------------------------------------------------------------ on a GPU


def random_model(rank=16, layers=4, dtype=torch.bfloat16):
    """A small LLaMA in bitsandbytes' NF4, bf16 or fp16, with PEFT's adapters."""
    from qlora_lab.finetuning import build_random
    from qlora_lab.memory.shapes import Shape

    shape = Shape(1024, 2752, layers, 16, 8, 1000)
    return add_adapter(build_random(shape, "nf4", device="cuda", compute_dtype=dtype), rank=rank, alpha=32)


def in_float32(adapted):
    """The same numbers, computing in float32."""
    for module in adapted.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for p in adapted.parameters():
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return adapted


def batches(**settings):
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(20, 200, (32,), generator=draw).tolist()
    return Batches([replaced(sample, 1000, draw) for sample in samples(*lengths, prompt=8)], 8, **settings)


def replaced(sample, vocabulary, draw):
    ids = torch.randint(3, vocabulary, (len(sample.ids),), generator=draw).tolist()
    return TokenizedSample(tuple(ids), sample.prompt_length)


SETTINGS = {"learning_rate": 1e-3, "compute_dtype": torch.bfloat16, "progress": False}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stream", [{}, {"accumulation": 2}, {"packing": True, "max_length": 300}], ids=str)
def test_fifty_steps_beside_float32(stream, checkpointing):
    """At every step as near to float32 as bf16's rounding lets it be: half a unit in the last place of 8 bits."""
    steps = {"steps": 50, **SETTINGS, "gradient_checkpointing": checkpointing}
    exact = train(in_float32(random_model()), batches(**stream), **{**steps, "compute_dtype": torch.float32})
    plain = train(random_model(), batches(**stream), **steps)
    fast = train(random_model(), batches(**stream), fast=True, **steps)
    deviation = lambda records: [abs(r.loss / e.loss - 1) for r, e in zip(records, exact, strict=True)]  # noqa: E731
    print(f"\nloss off float32: fast {max(deviation(fast)):.2e}, plain {max(deviation(plain)):.2e} at most")
    assert exact[-1].loss < 0.8 * exact[0].loss
    assert max(deviation(fast)) < max(2**-8, 1.5 * max(deviation(plain)))
    for record, e in zip(fast, exact, strict=True):
        assert record.gradient_norm == pytest.approx(e.gradient_norm, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit"])
def test_the_same_bits_each_time_and_after_a_resume(optimizer, tmp_path):
    steps = {"steps": 12, "optimizer": optimizer, "fast": True, "gradient_checkpointing": True, **SETTINGS}
    first, second = random_model(rank=128), random_model(rank=128)
    whole = train(first, batches(), **steps)
    assert [r.loss for r in train(second, batches(), **steps)] == [r.loss for r in whole]
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    steps.pop("progress")
    running = train_steps(random_model(rank=128), batches(), checkpoints=tmp_path, checkpoint_every=5, **steps)
    for record in running:
        if record.step == 7:
            running.close()
    third = random_model(rank=128)
    resumed = list(train_steps(third, batches(), checkpoints=tmp_path, resume=True, **steps))
    assert [r.loss for r in resumed] == [r.loss for r in whole]
    for (name, p), q in zip(first.named_parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
def test_activations_in_the_hosts_memory(fast):
    """The same bits (as far as any two plain runs have), without most of 16 layers' inputs on the GPU."""
    data = Batches(samples(*[512] * 32), 16)
    steps = {"steps": 4, "fast": fast, "gradient_checkpointing": True, **SETTINGS}

    def run(**offloading):
        gc.collect()
        adapted = random_model(layers=16)
        torch.cuda.reset_peak_memory_stats()
        records = train(adapted, data, **steps, **offloading)
        return [r.loss for r in records], torch.cuda.max_memory_allocated()

    losses, peak = run()
    there, peak_there = run(activation_offloading=True)
    print(f"\n{'fast' if fast else 'plain'}: {peak / 1e6:.0f} MB, {peak_there / 1e6:.0f} with offloading")
    assert there == (losses if fast else pytest.approx(losses, rel=1e-3))
    assert peak - peak_there > 12 * 16 * 512 * 1024 * 2  # bytes: twelve inputs of 16 x 512 tokens in bf16


@pytest.mark.gpu
def test_what_was_trained_answers_as_usual(tmp_path):
    """The adapter is in the model's own parameters: transformers' forward pass sees the last update."""
    adapted = random_model()
    records = train(adapted, batches(), steps=30, fast=True, **SETTINGS)
    rows = [[sample] for sample in batches().samples[:8]]
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        loss = token_loss_sum(adapted, collate(rows, 0)) / sum(len(r[0].ids) - r[0].prompt_length for r in rows)
    assert loss < 0.9 * records[0].loss


@pytest.mark.gpu
def test_a_loss_that_is_no_number_changes_nothing():
    adapted = random_model()
    before = copy.deepcopy({name: p for name, p in adapted.named_parameters() if p.requires_grad})
    adapted.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(TrainingDiverged, match="first step"):
        train(adapted, batches(), steps=2, fast=True, **SETTINGS)
    for name, p in before.items():
        assert torch.equal(adapted.get_parameter(name), p), name
