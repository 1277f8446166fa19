"""What the course promises of a model, held for one architecture after another, each tiny and with random weights.

It trains, in 4 bits and in 16; what was trained is loaded again by PEFT, and merged by us, saved, loaded and answers
alike; samples that share a row do not see one another, or packing is refused; the loss in chunks is the loss, or
chunks are refused; checkpointing changes nothing; two processes are one. `make sweep` asks all that transformers has,
and prints a table; every other run asks those in EVERY_RUN.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from peft import PeftModel

from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    Batches,
    TokenizedSample,
    add_adapter,
    collate,
    dequantize_linears,
    load_adapter,
    load_lora,
    load_model,
    merge,
    train,
    unload,
)
from qlora_lab.models import tiny as tiny_module
from qlora_lab.models.trying import Tried, require_trainable, try_out
from qlora_lab.training import loss as training_loss
from qlora_lab.training.loss import token_loss_sum
from tests.conftest import in_two_processes
from tests.models.architectures import NOT_MADE, TYPES, tiny

EVERY_RUN = (
    "llama qwen3 gemma2 gemma3 gpt2 mixtral opt falcon granite modernbert-decoder bart mamba llama4_text".split()
)
# What is known of them today. Where transformers or PEFT learn more, a test says so.
NOT_TRAINED = {
    **dict.fromkeys(["cpmant", "xlnet"], "see those that come after them"),
    **dict.fromkeys(
        "falcon_h1 falcon_mamba mamba mamba2 nemotron_h".split(), "is incompatible with Mamba-based models"
    ),
    **dict.fromkeys("deepseek_v4 llama4 llama4_text phimoe".split(), "cannot be trained: .* can be trained"),
    "prophetnet": "cannot be trained: `position_ids` are incorrect",
    "xlstm": "cannot be trained: matC_old has wrong shape",
    **dict.fromkeys(["inkling2_text", "laguna"], "PEFT loses . of its tensors when it loads it .* can be trained"),
}
NOT_IN_4_BITS = {
    "falcon": "would quantize nothing",
    **dict.fromkeys(
        "gemma3n_text jamba longcat_flash rwkv".split(), "in 4 bits, a .* cannot be trained: .* --method lora"
    ),
}
NOT_MERGED = {"zamba": "shares its weight with another layer"}
NOT_CHECKPOINTED = {"ctrl", "git", "gpt_neox_japanese", "jetmoe", "openai-gpt", "xlm"}

all_types = [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.sweep) for name in TYPES]
each_type = pytest.mark.parametrize("name", all_types)
each_that_trains = pytest.mark.parametrize(
    "name", [p for p in all_types if (p if isinstance(p, str) else p.values[0]) not in NOT_TRAINED]
)


def samples(count: int = 6) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (count,), generator=draw).tolist()
    return [TokenizedSample(tuple(torch.randint(3, 90, (n,), generator=draw).tolist()), 2) for n in lengths]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """A function (name) -> folder with that model. Its weights are larger than usual: what it reads matters."""
    folders = {}

    def make(name: str):
        if name not in folders:
            config = tiny(name)
            for part in (config, config.get_text_config()):
                part.initializer_range = 0.1
            torch.manual_seed(0)
            folders[name] = tmp_path_factory.mktemp(name)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return make


@pytest.fixture
def found(record_property, request):
    """A function (column, what) that fills a cell of the table that `make sweep` prints."""
    return lambda column, what: record_property("sweep", (request.node.callspec.params["name"], column, what))


@each_type
def test_what_a_tiny_copy_says_before_anything_is_loaded(name, found, monkeypatch):
    """And of nine layers as many are tried as need be: with all of them, no more is found."""
    tried, cut = try_out(tiny(name), max_length=129), try_out(tiny(name, layers=9), max_length=129)
    monkeypatch.setattr(tiny_module, "FEW", 9)
    whole = try_out(tiny(name, layers=9), max_length=129)
    said = [(bool(t.training), bool(t.packing), bool(t.chunks), t.longest, t.unreached) for t in (cut, whole)]
    assert said[0] == said[1]
    assert bool(tried.checkpoints) == (name in NOT_CHECKPOINTED)
    if name in NOT_TRAINED:
        with pytest.raises(UserError, match=NOT_TRAINED[name]):
            require_trainable(tiny(name), quantize=False)
        found("training", "refused")
    else:
        assert tried.training == ""
        found("training", f"{len(tried.unreached)} adapters unreached" if tried.unreached else "")


def test_what_is_no_causal_language_model_is_refused():
    for config in (transformers.BertConfig(), transformers.XLMConfig(), transformers.RoFormerConfig()):
        assert "see those that come after them" in try_out(config).training
    assert "no causal language model" in try_out(transformers.T5Config()).training


def test_all_architectures_are_asked():
    """As many as transformers has, but for those of which a line says why not."""
    assert all(NOT_MADE.values()) and len(TYPES) > 150
    assert set(EVERY_RUN) | set(NOT_TRAINED) | set(NOT_IN_4_BITS) | set(NOT_MERGED) | NOT_CHECKPOINTED <= set(TYPES)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT, of patterns of its own
@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
@each_that_trains
def test_trained_reloaded_merged_saved_and_answering_alike(name, quantization, folder_of, tmp_path, found):
    """Long because each of its parts starts from what the one before has made."""
    column = "qlora" if quantization else "lora"
    if name in NOT_IN_4_BITS and quantization:
        with pytest.raises(UserError, match=NOT_IN_4_BITS[name]):
            require_trainable(folder_of(name), quantize=True)
        found(column, "refused")
        return

    def base():
        return load_model(folder_of(name), quantization, device="cpu", compute_dtype=torch.float32)[0]

    losses = []
    for checkpointing in (False, True) if name not in NOT_CHECKPOINTED else (False,):
        model = add_adapter(base(), rank=2, alpha=64, seed=1)
        records = train(
            model,
            Batches(samples(), 3),
            steps=2,
            learning_rate=0.05,
            warmup_steps=0,
            gradient_checkpointing=checkpointing,
            progress=False,
        )
        losses.append([record.loss for record in records])
    assert losses[-1] == pytest.approx(losses[0], rel=1e-5) and all(map(math.isfinite, losses[0]))
    unmoved = {n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n and not p.abs().sum() > 0}
    unreached = [part for part in try_out(tiny(name)).unreached if ".experts." not in part]
    assert len(unmoved) == 0 or unreached, f"adapters that never got a gradient: {unmoved}"

    ids = torch.tensor([samples(1)[0].ids])

    @torch.no_grad()
    def logits(model):
        return model.eval()(ids).logits

    expected = logits(model)
    assert not torch.allclose(logits(base()), expected, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)

    if name in NOT_MERGED:
        with pytest.raises(UserError, match=NOT_MERGED[name]):
            merge(load_lora(dequantize_linears(base()) if quantization else base(), tmp_path / "adapter"))
        found(column, "reloaded, not merged")
        return
    dense, merged_by = dequantize_linears(base()) if quantization else base(), ""
    try:
        merged = unload(merge(load_lora(dense, tmp_path / "adapter")))
    except UserError as error:  # PEFT adapts bare parameters, too: then it is PEFT that merges
        assert "target_parameters" in str(error) or "not plain LoRA" in str(error)
        merged, merged_by = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload(), ", PEFT merges"
    merged.save_pretrained(tmp_path / "merged")
    load_model(folder_of(name))[1].save_pretrained(tmp_path / "merged")
    saved, _ = load_model(tmp_path / "merged", device="cpu", compute_dtype=torch.float32)
    torch.testing.assert_close(logits(saved), expected, rtol=1e-3, atol=1e-3)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 2}
    assert torch.equal(saved.generate(ids, **how), merged.generate(ids, **how))
    found(column, f"equal{merged_by}")
    if len(losses) == 1:
        found("training", "no checkpointing")


@each_that_trains
def test_packed_samples_are_as_if_alone_or_packing_is_refused(name, folder_of, found):
    """The loss of a row is the sum of its samples' losses. Where it is not, training in packed rows is refused."""
    model = add_adapter(load_model(folder_of(name), device="cpu", compute_dtype=torch.float32)[0], rank=2)
    with torch.no_grad():
        alone = sum(token_loss_sum(model, collate([[sample]], 2)).item() for sample in samples(3))
        packed = token_loss_sum(model, collate([samples(3)], 2)).item()
    batches = Batches(samples(), 2, packing=True, max_length=64)
    if packed == pytest.approx(alone, rel=1e-5):
        assert math.isfinite(train(model, batches, steps=1, progress=False)[0].loss)
        found("packing", "isolated")
    else:
        with pytest.raises(UserError, match="samples that share a row see one another"):
            train(model, batches, steps=1, progress=False)
        found("packing", "refused")


@each_that_trains
def test_the_loss_in_chunks_is_the_loss_or_chunks_are_refused(name, folder_of, monkeypatch, found):
    """Where they are refused, they would not be the loss: tried with the refusal taken out."""
    model = add_adapter(load_model(folder_of(name), device="cpu", compute_dtype=torch.float32)[0], rank=2)
    batch = collate([[sample] for sample in samples(3)], 2)
    whole = token_loss_sum(model, batch).item()
    try:
        assert token_loss_sum(model, batch, 4).item() == pytest.approx(whole, rel=1e-5)
        found("chunks", "equal")
    except UserError as error:
        assert "use loss_chunk=None" in str(error)
        monkeypatch.setattr(training_loss, "require_plain_head", lambda model: None)
        assert token_loss_sum(model, batch, 4).item() != pytest.approx(whole, rel=1e-5)
        found("chunks", "refused")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["llama", "gemma3", "mixtral", "gpt2", "bart"], id="every run"),
        *(
            pytest.param(TYPES[n : n + 40], id=f"from {TYPES[n]}", marks=pytest.mark.sweep)
            for n in range(0, len(TYPES), 40)
        ),
    ],
)
def test_two_processes_are_one(names, folder_of, tmp_path, record_property):
    """Three steps of each in two processes, and in one."""
    from tests.models.two_processes import losses_of

    names = [name for name in names if name not in NOT_TRAINED]
    (tmp_path / "folders.json").write_text(json.dumps({name: str(folder_of(name)) for name in names}))
    done = in_two_processes("tests.models.two_processes", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"process-{n}.json").read_text()) for n in (0, 1))
    assert first == second and set(first) == set(names)
    for name in names:
        assert first[name] == pytest.approx(losses_of(folder_of(name)), rel=1e-4), name
        record_property("sweep", (name, "two processes", "equal"))


def test_a_large_model_is_tried_as_quickly_as_a_small_one():
    """LLaMA-65B's config: 0.2 of 65 billion parameters are made."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
    )
    assert try_out(config) == Tried()
