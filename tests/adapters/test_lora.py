"""LoRA held against PEFT, against arithmetic, and against what a user gets wrong."""

import copy
import errno
import json
import math
import pathlib

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from qlora_lab.adapters.files import base_fingerprint, read_adapter
from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    LoraLinear,
    add_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    merge,
    quantize_linears,
    save_lora,
    trainable_parameters,
    unload,
    unmerge,
)
from qlora_lab.training.run_folder import save_adapter
from tests.conftest import tiny_config

IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(vocab_size=97, **changes)).eval()


def llama_linears(model) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


def randomize(model) -> None:
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit_of_the_output(dtype, adapter_dtype):
    model = llama().to(dtype)
    before = logits(model)
    assert torch.equal(logits(add_lora(model, dtype=adapter_dtype)), before)


def test_the_correction_is_what_the_formula_says():
    base = nn.Linear(6, 4, dtype=torch.float64)
    layer = LoraLinear(base, rank=2, alpha=3, dtype=torch.float64)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x @ (base.weight + 3 / 2 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta(), (3 / 2 * layer.lora_B @ layer.lora_A).float())


def test_dropout_spares_the_base_and_sleeps_in_evaluation():
    layer = LoraLinear(nn.Linear(64, 8), rank=4, alpha=4, dropout=0.5)
    layer.lora_B.data.normal_()
    x = torch.randn(3, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["layers.1.mlp.up_proj"]])
def test_the_same_layers_and_counts_as_peft(targets):
    ours = add_lora(llama(), rank=8, targets=targets)
    theirs = get_peft_model(llama(), LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    wrapped = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(lora_layers(ours)) == wrapped
    assert trainable_parameters(ours) == lora_parameters(ours) == trainable_parameters(theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_are_trained_and_they_are_what_was_asked_for(training, dtype):
    model = add_lora(llama().train(training), 4, alpha=12, targets="q_proj", dropout=0.25, dtype=dtype)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for layer in lora_layers(model).values():
        assert (layer.rank, layer.alpha, layer.dropout, layer.training) == (4, 12, 0.25, training)
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (dtype, dtype)
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_config(vocab_size=97))
    assert all(layer.lora_A.is_meta for layer in lora_layers(add_lora(empty)).values())


def test_autocast_decides_the_dtype():
    """fp32 adapters on a bf16 output: the sum is bf16, as the next layer expects."""
    layer = LoraLinear(nn.Linear(6, 4), rank=2, alpha=3)
    layer.lora_B.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 6)).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(torch.randn(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_target_is_a_name_or_the_end_of_a_dotted_one():
    top = nn.ModuleDict(
        {"up": nn.Linear(4, 4), "backup": nn.Linear(4, 4), "deep": nn.ModuleDict({"up": nn.Linear(4, 4)})}
    )
    assert list(lora_layers(add_lora(top, targets="up"))) == ["up", "deep.up"]


def test_the_seed_is_that_of_the_adapter_alone(tmp_path):
    """A is what torch's generator gives after this seed, layer by layer; that generator itself is left where it was."""
    linears = llama_linears(llama())
    torch.manual_seed(7)
    expected = [nn.init.kaiming_uniform_(torch.empty(4, layer.in_features), a=math.sqrt(5)) for layer in linears]
    model, before = llama(), torch.get_rng_state()
    add_lora(model, rank=4, seed=7)
    for layer, A in zip(lora_layers(model).values(), expected, strict=True):
        assert torch.equal(layer.lora_A, A)
    save_lora(model, tmp_path)
    load_lora(unload(model), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(lora_layers(add_lora(llama(), rank=4))["model.layers.0.mlp.up_proj"].lora_A, expected[4])


@pytest.mark.parametrize("way", ["from PEFT", "to PEFT"])
def test_files_go_to_peft_and_back(way, tmp_path):
    theirs = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if way == "from PEFT":
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        theirs.eval().save_pretrained(tmp_path)
        ours = load_lora(llama(), tmp_path)
    else:
        ours = add_lora(llama(), rank=4, alpha=8)
        randomize(ours)
        save_lora(ours, tmp_path)
        theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 32}},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [(0, 2), (0, 2)]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore")  # of PEFT, on saving tied embeddings
def test_other_kinds_of_lora_are_refused(settings, tmp_path):
    """Read as plain LoRA, most of them would have the right shapes and the wrong numbers."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is not plain LoRA \(.*\): load it with PEFT"):
        load_lora(llama(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian", "lora_dropout": 0.25},
        {"init_lora_weights": "orthogonal", "target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"init_lora_weights": False, "layers_to_transform": [1]},
    ],
)
def test_plain_lora_of_any_start_is_read(settings, tmp_path):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], **settings}
    theirs = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **settings)).to(torch.bfloat16).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(llama().to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}  # as it was saved
    assert {layer.dropout for layer in lora_layers(ours).values()} == {settings.get("lora_dropout", 0.0)}
    expected = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(lora_layers(ours)) == set(expected)
    for name, layer in lora_layers(ours).items():
        delta = expected[name].scaling["default"] * (
            expected[name].lora_B["default"].weight.float() @ expected[name].lora_A["default"].weight.float()
        )
        torch.testing.assert_close(layer.delta(), delta)


def test_gradients_equal_pefts(tmp_path):
    theirs = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    ours = load_lora(llama(), tmp_path)
    for model in (ours, theirs):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_saved_and_loaded_again_is_the_same(tmp_path):
    model = add_lora(llama(), rank=4, alpha=8, targets=["q_proj", "down_proj"])
    randomize(model)
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down_proj", "q_proj"]
    again = load_lora(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert list(lora_layers(again)) == list(lora_layers(model))
    other = add_lora(llama(), rank=4, alpha=99, targets=["q_proj", "down_proj"], dropout=0.5, seed=5)
    assert torch.equal(logits(load_lora(other, tmp_path)), logits(model))  # overwritten, alpha too
    assert {layer.dropout for layer in lora_layers(other).values()} == {0.0}


def test_peft_reads_every_setting_that_was_saved(tmp_path):
    model = add_lora(llama(), rank=4, alpha=12, targets=["layers.1.mlp.up_proj"], dropout=0.25)
    model.config._name_or_path = "owner/name"
    save_lora(model, tmp_path / "deep" / "down")
    config = LoraConfig.from_pretrained(tmp_path / "deep" / "down")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 12, 0.25, "none")
    assert config.target_modules == {"model.layers.1.mlp.up_proj"}  # `up_proj` would mean layer 0's too
    assert (config.base_model_name_or_path, config.task_type, config.inference_mode) == (
        "owner/name",
        "CAUSAL_LM",
        True,
    )


@pytest.mark.parametrize("failing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_failed_save_leaves_the_adapter_as_it_was(failing, tmp_path, monkeypatch):
    first = add_lora(llama(), rank=4, alpha=8)
    randomize(first)
    save_lora(first, tmp_path)
    second = add_lora(llama(), rank=4, alpha=99, seed=5)
    write = pathlib.Path.write_bytes

    def full_disk(path, *_, **__):
        write(pathlib.Path(path), b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "adapter_config.json":
        monkeypatch.setattr(pathlib.Path, "write_text", full_disk)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, metadata: full_disk(path))
    with pytest.raises(OSError, match="No space"):
        save_lora(second, tmp_path)
    assert torch.equal(logits(load_lora(llama(), tmp_path)), logits(first))


def test_the_fingerprint_is_that_of_the_base(tmp_path):
    """The same in 16 and in 4 bits and with an adapter around it; another with one bias or norm changed."""
    base = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    expected = base_fingerprint(base)
    same = [
        copy.deepcopy(base).to(torch.bfloat16),
        quantize_linears(copy.deepcopy(base)),
        add_lora(copy.deepcopy(base)),
    ]
    same += [add_lora(quantize_linears(copy.deepcopy(base)))]
    assert {base_fingerprint(model) for model in same} == {expected}
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.bias"):
        other = copy.deepcopy(base)
        other.get_parameter(name).data[0] += 1
        assert base_fingerprint(other) != expected


def test_an_adapter_of_pefts_can_carry_the_fingerprint(tmp_path):
    """As `train_qlora` saves them: with biases in the adapted layers, whose names PEFT changes."""
    base = llama(attention_bias=True)
    adapted = add_adapter(copy.deepcopy(base), rank=2)
    assert base_fingerprint(adapted) == base_fingerprint(base)
    save_adapter(adapted, tmp_path / "adapter")
    saved, (_, tensors, fingerprint) = get_peft_model_state_dict(adapted), read_adapter(tmp_path / "adapter")
    assert fingerprint == base_fingerprint(base) and len(tensors) == len(saved)
    for name, tensor in saved.items():
        assert torch.equal(tensors[name.removeprefix("base_model.model.").removesuffix(".weight")], tensor)
    load_lora(copy.deepcopy(base), tmp_path / "adapter")
    base.model.norm.weight.data[0] += 1
    with pytest.raises(UserError, match="another base"):
        load_lora(base, tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------------------------- merge


def test_merged_model_computes_the_same_and_unmerges_exactly():
    model = add_lora(llama(), rank=4)
    randomize(model)
    before, weights = logits(model), {n: layer.base.weight.clone() for n, layer in lora_layers(model).items()}
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.base.weight, weights[name] + layer.delta())
        assert layer.delta().abs().max() > 0.01
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base" in name)
    unmerge(model)
    assert torch.equal(logits(model), before)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base.weight, weights[name])


def test_merging_agrees_with_peft(tmp_path):
    model = add_lora(llama().to(torch.bfloat16), rank=4)
    randomize(model)
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path).merge_and_unload()
    ours = unload(merge(model))
    assert not lora_layers(ours)
    for (name, weight), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(
            weight, expected, rtol=2**-7, atol=1e-3
        )  # PEFT adds in bf16: a unit in the last place


def test_unload_without_merge_gives_the_base_back():
    before = logits(llama())
    model = add_lora(llama())
    randomize(model)
    assert torch.equal(logits(unload(model)), before)


# ------------------------------------------------------------------------------------------------------------ bad input


def raises(text, function, *arguments, **named):
    with pytest.raises(UserError, match=text):
        function(*arguments, **named)


def test_impossible_adapters_are_refused():
    raises("rank=0: must be at least 1", add_lora, llama(), rank=0)
    raises("no linear layer named 'q_projj': did you mean q_proj", add_lora, llama(), targets=["q_projj"])
    raises("no linear layer named 'zzz': it has down_proj, ", add_lora, llama(), targets=["zzz"])
    raises("no linear layer named 'proj'", add_lora, llama(), targets=["proj"])
    raises("targets is empty", add_lora, llama(), targets=[])
    raises("has LoRA layers already", add_lora, add_lora(llama()))
    raises("LayerNorm is not linear-like", LoraLinear, nn.LayerNorm(4), 2, 4)
    no_weight = nn.Module()
    no_weight.in_features = no_weight.out_features = 4
    raises("Module is not linear-like", LoraLinear, no_weight, 2, 4)
    nothing = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4))
    raises("no linear layer that LoRA could adapt: it is made of Embedding, LayerNorm", add_lora, nothing)


def test_merging_twice_or_nothing_is_refused():
    model = merge(add_lora(llama()))
    raises("merging twice would add it twice", merge, model)
    unmerge(model)
    raises("nothing to take back", unmerge, model)
    for function in (merge, unmerge, unload):
        raises("has no LoRA layers", function, llama())


def test_missing_or_damaged_files(tmp_path):
    raises("adapter_config.json and adapter_model.safetensors are missing", load_lora, llama(), tmp_path)
    save_lora(add_lora(llama(), rank=4), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.unlink()
    raises("is no adapter: adapter_model.safetensors is missing", load_lora, llama(), tmp_path)
    weights.write_bytes(whole[:1000])
    raises("cannot be read", load_lora, llama(), tmp_path)
    weights.write_bytes(whole)
    for broken in ('{"r": 4}', "{", "[]"):
        config.write_text(broken)
        raises("cannot be read", load_lora, llama(), tmp_path)
    config.write_text(json.dumps({**settings, "r": 5}))
    raises("does not agree with its own config: .*lora_A does not fit r=5", load_lora, llama(), tmp_path)
    config.write_text(json.dumps({**settings, "use_dora": True}))
    raises(r"config: .*lora_magnitude_vector is missing", load_lora, llama(), tmp_path)
    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    raises(r"not plain LoRA \(IA3\)", load_lora, llama(), tmp_path)
    config.write_text(json.dumps(settings))
    tensors = load_file(weights)
    lonely = dict(list(tensors.items())[1:])
    save_file(lonely, weights)
    raises("config: .*lora_A is missing", load_lora, llama(), tmp_path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(1)}, weights)
    raises("not plain LoRA .*lm_head", load_lora, llama(), tmp_path)
    save_file({}, weights)
    raises("config: every tensor is missing", load_lora, llama(), tmp_path)
    norm = {f"base_model.model.model.norm.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    save_file(norm, weights)
    raises("another base: this model has no linear layer model.norm", load_lora, llama(), tmp_path)


def test_another_base_is_refused(tmp_path):
    model = llama()
    model.model.norm.weight.data.normal_()
    save_lora(add_lora(model, rank=4), tmp_path)
    raises(
        "another base: this model has no linear layer model.layers.1", load_lora, llama(num_hidden_layers=1), tmp_path
    )
    raises(
        r"another base: its model.layers.0.mlp.down_proj is \(64, 128\), this model's is \(64, 256\)",
        load_lora,
        llama(intermediate_size=256),
        tmp_path,
    )
    raises("another base: shapes agree, weights do not", load_lora, llama(), tmp_path)
    load_lora(llama(), tmp_path, any_base=True)
    load_lora(unload(model).to(torch.bfloat16), tmp_path)  # rounded, but the same


def test_another_rank_or_other_layers_are_refused(tmp_path):
    save_lora(add_lora(llama(), rank=4), tmp_path)
    raises("the adapter has rank 4, the model's LoRA layers 8", load_lora, add_lora(llama(), rank=8), tmp_path)
    raises("the adapter has 14 layers", load_lora, add_lora(llama(), rank=4, targets=["q_proj"]), tmp_path)
    save_lora(add_lora(llama(), rank=4, targets=["v_proj"]), tmp_path / "v")
    raises("the adapter has 2 layers", load_lora, add_lora(llama(), rank=4, targets=["q_proj"]), tmp_path / "v")
    raises("is merged into this model", load_lora, merge(add_lora(llama(), rank=4)), tmp_path)


def test_layers_of_two_kinds_cannot_be_saved(tmp_path):
    model = add_lora(llama(), rank=4)
    lora_layers(model)["model.layers.0.mlp.up_proj"].alpha = 1
    raises("several", save_lora, model, tmp_path)
