"""The fast step's losses and gradients are the plain loop's for each family; what it does not know it refuses."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

from qlora_lab.finetuning import (
    Batches,
    TokenizedSample,
    add_adapter,
    add_lora,
    collate,
    quantize_linears,
    train_steps,
)
from qlora_lab.training.loss import token_loss_sum
from qlora_lab.training.optimizers import make_optimizer
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.steps import choice
from qlora_lab.training.steps.fast import adapter_kernels, kernels
from qlora_lab.training.steps.fast import step as step_module
from qlora_lab.training.steps.fast.attention import Samples, attend, attend_backward
from qlora_lab.training.steps.fast.description import Attention
from qlora_lab.training.steps.fast.limits import NoFastStep
from qlora_lab.training.steps.fast.step import FastStep

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing is interpreted")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 512}
BY_TYPE = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
ODD = {"hidden_size": 72, "head_dim": 16, "num_hidden_layers": 1}  # rows of 72 numbers are not as far apart as usual
GEMMA2 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 30,
    "sliding_window": 7,
    "attn_logit_softcapping": 0.7,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 30,
    "sliding_window": 7,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": 3.0,
}


def family_model(
    kind, adapters="ours", rank=8, quantized=False, dropout=0.0, rank_stabilized=False, targets="all-linear", **changes
):
    """A tiny random model of a family, each norm and bias of which is random as well, with adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    draw = torch.Generator().manual_seed(1)
    for p in causal_lm.parameters():
        if p.dim() == 1:  # norms and biases, which begin at 0 or 1
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    if quantized:
        quantize_linears(causal_lm)
    if adapters == "ours":
        adapted = add_lora(causal_lm, rank, 16, targets, dropout, rank_stabilized=rank_stabilized)
    else:
        adapted = add_adapter(causal_lm, rank=rank, alpha=16, dropout=dropout)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: then A has no gradient
            p.data = 0.1 * torch.randn(p.shape, generator=draw)
    return adapted.train()


class GivenDropout(torch.nn.Module):
    """The dropout of the fast step's adapter number `stream`, for rows of samples of these lengths."""

    def __init__(self, probability, seed, stream, lengths):
        super().__init__()
        self.p, self.seed, self.stream, self.lengths = probability, seed, stream, lengths

    def forward(self, x):
        ones = torch.ones(sum(self.lengths), x.shape[-1])
        factors = torch.empty_like(ones)
        adapter_kernels.dropout(ones, factors, self.p, self.seed, self.stream)
        whole = torch.zeros(x.shape)
        for row, of_sample in zip(whole, factors.split(self.lengths), strict=True):
            row[: len(of_sample)] = of_sample
        return x * whole


def samples(*lengths):
    draw = torch.Generator().manual_seed(2)
    return [TokenizedSample(tuple(torch.randint(3, 97, (n,), generator=draw).tolist()), 3) for n in lengths]


def plain(adapted, batch, targets):
    """The plain loop's loss and gradients."""
    loss = token_loss_sum(adapted, collate([[sample] for sample in batch], 0)) / targets
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}


def fast_step(adapted, **settings):
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw_torch", parameters, 1e-3, 0.0)
    return FastStep(adapted, optimizer, make_accelerator(torch.float32, CPU), dtype=torch.float32, **settings)


def require_the_plain_gradients(adapted, **settings):
    """Both sum the same float32 products in another order: 1e-4 of a gradient's entry, 1e-5 of its largest."""
    batch = samples(20, 27)
    targets = sum(len(sample.ids) - sample.prompt_length for sample in batch)
    loss, expected = plain(adapted, batch, targets)
    step = fast_step(adapted, **settings)
    step.gradients(step.flattened([[[sample] for sample in batch]]), targets)
    assert step.loss.item() == pytest.approx(loss, rel=1e-5)
    names = {id(p): name for name, p in adapted.named_parameters()}
    pieces = step.adapters.gradient.split([p.numel() for p in step.adapters.parameters])
    for p, ours in zip(step.adapters.parameters, pieces, strict=True):
        wanted = expected.pop(names[id(p)])
        torch.testing.assert_close(ours.view_as(p), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert not expected


@interpreted
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("llama", {"rope_parameters": LLAMA3, "num_hidden_layers": 1}),
        ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True, **ODD}),
        ("mistral", {"sliding_window": 7, "head_dim": 24, "num_hidden_layers": 1}),
        ("qwen2", {**BY_TYPE, "adapters": "PEFT's"}),
        ("qwen3", {"head_dim": 24, "num_hidden_layers": 1}),
        ("phi3", {"sliding_window": 9, "quantized": True, "num_hidden_layers": 1}),
        ("gemma2", GEMMA2),
        ("gemma3_text", GEMMA3),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("olmo2", {}),
        ("granite", GRANITE),
    ],
    ids=str,
)
def test_gradients_are_the_plain_loops(kind, case):
    require_the_plain_gradients(family_model(kind, **case), gradient_checkpointing=kind != "olmo2")


@interpreted
@pytest.mark.parametrize(("kind", "rank", "rank_stabilized"), [("llama", 3, True), ("olmo2", 5, False)])
def test_any_rank_tied_or_not(kind, rank, rank_stabilized):
    adapted = family_model(kind, rank=rank, tie_word_embeddings=rank == 3, rank_stabilized=rank_stabilized)
    require_the_plain_gradients(adapted, gradient_checkpointing=True)


@interpreted
def test_logits_a_few_rows_at_a_time(monkeypatch):
    """41 targets have 64 rows: 7 at a time, and one is left."""
    monkeypatch.setattr(step_module, "LOGITS_AT_A_TIME", 1)
    monkeypatch.setattr(step_module, "FEWEST_ROWS_OF_LOGITS", 7)
    made = []
    monkeypatch.setattr(kernels, "cross_entropy", lambda *a, whole=kernels.cross_entropy: made.append(a) or whole(*a))
    require_the_plain_gradients(family_model("llama", num_hidden_layers=1))
    assert [len(logits) for logits, *_ in made] == [7] * 9 + [1]


@interpreted
@pytest.mark.parametrize(("kind", "layers", "rank"), [("llama", 2, 5), ("phi3", 1, 8), ("olmo2", 1, 8)])
def test_dropout_with_the_same_masks(kind, layers, rank):
    """A plain step whose adapters are given the fast step's masks: one for each adapter, the same in both passes."""
    adapted = family_model(kind, adapters="PEFT's", dropout=0.4, rank=rank, num_hidden_layers=layers)
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    if kind == "phi3":
        groups = (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",))
    torch.manual_seed(7)
    seed = torch.randint(1 << 62, (1,))
    for i, layer in enumerate(adapted.get_base_model().model.layers):
        for j, names in enumerate(groups):
            for k, name in enumerate(names):
                linear = getattr(layer.self_attn if j < 2 else layer.mlp, name)
                linear.lora_dropout["default"] = GivenDropout(0.4, seed, 16 * i + 4 * j + k, (20, 27))
    torch.manual_seed(7)
    require_the_plain_gradients(adapted, gradient_checkpointing=True)


@interpreted
def test_a_dropout_drops_as_much_as_it_should_and_never_twice_the_same():
    x = torch.ones(64, 3000)

    def dropped(seed, stream):
        out = torch.empty_like(x)
        adapter_kernels.dropout(x, out, 0.3, torch.tensor([seed]), stream)
        return out

    first = dropped(5, 1)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    share = (first == 0).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / x.numel()) ** 0.5)  # five standard deviations
    for other in (dropped(6, 1), dropped(5, 2), *(first.roll(n, 1) for n in (64, 256)), first.roll((1, 1), (0, 1))):
        both = ((first == 0) & (other == 0)).double().mean().item()
        assert both == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / x.numel()) ** 0.5)  # independent
    assert torch.equal(first, dropped(5, 1))


@interpreted
def test_with_dropout_a_resumed_run_draws_what_the_whole_one_drew(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "require_machine", lambda device, compute_dtype: None)  # on a CPU it is slow, but right

    def run(**settings):
        adapted = family_model("llama", dropout=0.2, targets=["o_proj"], num_hidden_layers=1)
        torch.manual_seed(11)
        stream = Batches(samples(20, 27), 2)
        return train_steps(adapted, stream, steps=3, learning_rate=5e-3, fast=True, checkpoints=tmp_path, **settings)

    steps = run(checkpoint_every=2)
    whole = [next(steps).loss for _ in range(3)]
    steps.close()  # before the third step's checkpoint
    assert len(set(whole)) == 3
    assert [r.loss for r in run(checkpoint_every=2, resume=True)] == whole


def refused(adapted) -> str:
    with pytest.raises(NoFastStep) as reason:
        fast_step(adapted)
    return str(reason.value)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("llama", "sliding_window", 512),
        ("llama", "attention_dropout", 0.1),
        ("qwen3", "final_logit_softcapping", 30.0),
        ("phi3", "resid_pdrop", 0.1),
        ("phi3", "embd_pdrop", 0.1),
        ("granite", "sliding_window", 512),
        ("mistral", "residual_multiplier", 0.5),
        ("smollm3", "logits_scaling", 8.0),
        ("olmo2", "embedding_multiplier", 12.0),
        ("qwen2", "attention_multiplier", 0.1),
        ("llama", "query_pre_attn_scalar", 100),
        ("llama", "no_rope_layers", [0, 1]),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
    ],
)
def test_a_number_in_the_config_that_its_family_has_not_is_refused(kind, name, value):
    adapted = family_model(kind)
    setattr(adapted.config, name, value)
    assert f"this {kind}'s config sets {name} to {value}" in refused(adapted)


def test_parts_that_it_does_not_know_are_refused():
    def changed(change, kind="llama", **settings):
        adapted = family_model(kind, **settings)
        change(adapted.model.layers[1])
        return refused(adapted)

    norm = torch.nn.modules.normalization.RMSNorm(16)
    assert "layers.1 has a norm of q or of k" in changed(lambda layer: setattr(layer.self_attn, "q_norm", norm))
    assert "layers.1 has a mlp.gate.weight" in changed(lambda layer: setattr(layer.mlp, "gate", torch.nn.Linear(64, 2)))
    assert "layers.1 has a scale" in changed(
        lambda layer: layer.register_parameter("scale", torch.nn.Parameter(torch.ones(1), requires_grad=False))
    )
    assert "has a LayerNorm where" in changed(
        lambda layer: setattr(layer, "input_layernorm", torch.nn.LayerNorm(64)), kind="granite"
    )
    assert "self_attn has no v_proj" in changed(lambda layer: delattr(layer.self_attn, "v_proj"))
    assert "activation is gelu," in refused(family_model("gemma3_text", hidden_activation="gelu"))
    assert "is of type chunked_attention" in refused(family_model("qwen3", layer_types=["chunked_attention"] * 2))


def test_a_class_of_somebody_elses_is_refused():
    from transformers import LlamaForCausalLM

    class WithAnotherForward(LlamaForCausalLM):
        pass

    adapted = family_model("llama")
    adapted.__class__ = WithAnotherForward
    assert "a WithAnotherForward is not transformers' own class for llama" in refused(adapted)


def test_what_a_decoder_or_its_head_has_besides_is_refused():
    adapted = family_model("llama")
    adapted.model.projection = torch.nn.Linear(64, 64).requires_grad_(False)
    assert "this model has a projection.weight" in refused(adapted)
    adapted = family_model("llama")
    adapted.lm_head.bias = torch.nn.Parameter(torch.zeros(97), requires_grad=False)
    assert "output head has a bias" in refused(adapted)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"), ({"partial_rotary_factor": 0.5}, "only a part of each")],
)
def test_angles_that_it_does_not_know_are_refused(parameters, reason):
    adapted = family_model("phi3")
    adapted.config.rope_parameters = {**adapted.config.rope_parameters, **parameters}
    assert reason in refused(adapted)


@pytest.mark.gpu
def test_flash_attention_has_the_same_window_and_scale_as_the_cpu():
    """bf16 has 8 bits: outputs are right to 2^-7 of the largest, and gradients, each a sum of such, to 2^-6."""
    draw = torch.Generator().manual_seed(4)
    kind = Attention(4, 2, 64, window=32, scale=0.2)
    q, k, v, gradient = (torch.randn(300, heads, 64, generator=draw).bfloat16() for heads in (4, 2, 2, 4))
    samples_of = Samples(torch.tensor([0, 100, 300], dtype=torch.int32), 256)
    on_gpu = Samples(samples_of.starts.to("cuda"), 256)
    expected, _ = attend(q.float(), k.float(), v.float(), samples_of, kind)
    wanted = attend_backward(gradient.float(), q.float(), k.float(), v.float(), expected, (), samples_of, kind)
    there = [tensor.to("cuda") for tensor in (q, k, v)]
    out, kept = attend(*there, on_gpu, kind)
    found = attend_backward(gradient.to("cuda"), *there, out, kept, on_gpu, kind)
    for ours, right, share in [(out, expected, 2**-7), *((f, w, 2**-6) for f, w in zip(found, wanted, strict=True))]:
        assert (ours.cpu().float() - right).abs().max() < share * right.abs().max()
