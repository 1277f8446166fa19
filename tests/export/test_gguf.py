"""GGUF files of every family, held against transformers in a real llama.cpp."""

import json
import re
import urllib.error
import urllib.request

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lab.errors import UserError
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.export import architectures, gguf_files, llama_cpp
from qlora_lab.export.__main__ import export, main
from qlora_lab.export.llama_cpp import LlamaCpp
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.trained_run import read_run
from qlora_lab.training.chat import TokenizedSample
from tests.export.conftest import FAMILIES, WORDS, family_config, make_run, needs_llama_cpp, trained_model

IDS = [int(id) for id in torch.randint(17, WORDS, (24,), generator=torch.Generator().manual_seed(3))]


NAME = "model.layers.0.mlp.down_proj.weight"


def log_probabilities(model) -> numpy.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].double().log_softmax(-1).numpy()


def rounding_to_f16(model) -> float:
    """How much the log probabilities move when every product's factors are rounded to F16, as llama.cpp rounds them."""
    exact = log_probabilities(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.half().float()
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(), *inputs[1:]))
    return float(numpy.abs(log_probabilities(model) - exact).max())


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_the_trained_model_does(family, small_tokenizer, tmp_path):
    """F16 rounds weights and activations, and keys and values once more: twice the products' rounding, and as much
    again for another order of it. A wrong permutation, norm, window or rope moves them by 1 and more."""
    run = make_run(tmp_path, family_config(family), small_tokenizer)
    export(read_run(run), tmp_path / "out", "gguf", "f16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    theirs = LlamaCpp(file, context=128).log_probabilities(IDS, WORDS)
    expected = log_probabilities(trained_model(run))
    export(read_run(run), tmp_path / "merged", "merged", "f32")
    tolerance = 4 * rounding_to_f16(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert tolerance < 0.15, "the rounding is as large as a fault would be"
    assert numpy.abs(theirs - expected).max() < tolerance


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_weights_are_rounded_by_no_more_than_their_type_does(kind, small_tokenizer, tmp_path):
    """Read back by gguf. Half a step of a block of 32: its largest / 127 for Q8_0, / 8 for Q4_0 (one side has 7 steps
    only, so a whole one), range / 15 for Q4_1; scales are F16 themselves, hence a little more."""
    run = read_run(make_run(tmp_path, family_config("llama"), small_tokenizer))
    weights = MergedWeights(run, rounded=run.rounded_for(kind))
    export(run, tmp_path / "out", "gguf", kind)
    (file,) = (tmp_path / "out").glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert len(tensors) == len(weights.shapes)
    for entry in gguf_files.plan(weights, kind):
        expected = architectures.as_theirs(weights.config, entry.source, weights[entry.source]).float().numpy()
        stored = tensors[entry.name]
        found = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(expected.shape)
        assert stored.n_bytes == entry.nbytes
        blocks = expected.reshape(-1, 32)
        largest, spread = abs(blocks).max(1), blocks.max(1) - blocks.min(1)
        step = {
            "F32": 0 * largest,
            "F16": largest * 2**-11,
            "BF16": largest * 2**-8,
            "Q8_0": largest / 127 / 2 * 1.1,
            "Q4_0": largest / 8 * 1.01,
            "Q4_1": spread / 15 / 2 * 1.05,
        }[stored.tensor_type.name]
        assert (abs(found.reshape(-1, 32) - blocks).max(1) <= step + 1e-7).all(), entry.name
        if expected.ndim > 1:
            spared = kind.startswith("q4") and entry.name in ("token_embd.weight", "output.weight")
            assert stored.tensor_type.name.lower() == ("q8_0" if spared else kind)


@pytest.mark.parametrize(
    ("kind", "settings", "rounded"),
    [("q8_0", {}, True), ("q4_0", {}, False), ("q4_1", {}, True)]
    + [("q4_0", {"merge_aware": "q4_0"}, True), ("q4_0", {"init": "loftq"}, True)],
)
def test_q4_0_is_rounded_once_unless_it_was_trained_for_twice(kind, settings, rounded, small_tokenizer, tmp_path):
    """Which weights it was made of: those are nearer by far."""
    run = read_run(make_run(tmp_path, family_config("llama"), small_tokenizer, **settings))
    for form in ("gguf", "base"):
        export(run, tmp_path / f"{form}-out", form, kind)
        (file,) = (tmp_path / f"{form}-out").glob("*.gguf")
        assert ("-nf4-" in file.name) == (rounded and form == "base")
        stored = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.0.ffn_down.weight")
        found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        off = {
            twice: (found - MergedWeights(run, form == "gguf", twice)[NAME]).square().mean().item()
            for twice in (True, False)
        }
        assert off[rounded] < 0.8 * off[not rounded]


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_llama_cpp_computes_what_other_adapters_do(kind, small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, b=0.1, kind=kind)
    export(read_run(run), tmp_path / "out", "gguf", "f16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    theirs = LlamaCpp(file, context=128).log_probabilities(IDS, WORDS)
    assert numpy.abs(theirs - log_probabilities(trained_model(run))).max() < 0.1


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "kind"), [("llama tied", "lora"), ("llama tied", "rslora"), ("qwen3", "lora"), ("gemma2", "lora")]
)
def test_an_adapter_beside_its_base_computes_what_the_trained_model_does(family, kind, small_tokenizer, tmp_path):
    run = make_run(tmp_path / "trained", family_config(family), small_tokenizer, b=0.1, kind=kind)
    bare = make_run(tmp_path / "bare", family_config(family), small_tokenizer, b=0.0)
    export(read_run(run), tmp_path / "lora", "adapter")
    export(read_run(run), tmp_path / "base", "base")
    (adapter,), (base,) = (tmp_path / "lora").glob("*.gguf"), (tmp_path / "base").glob("*.gguf")
    expected, without = log_probabilities(trained_model(run)), log_probabilities(trained_model(bare))
    served = LlamaCpp(base, adapter, context=128)
    assert numpy.abs(expected - without).max() > 1, "this adapter changes nothing"
    assert numpy.abs(served.log_probabilities(IDS, WORDS) - expected).max() < 0.1
    served.use(None)
    assert numpy.abs(served.log_probabilities(IDS, WORDS) - without).max() < 0.1


@needs_llama_cpp
def test_a_model_without_a_run_is_a_base_as_it_is_stored(small_tokenizer, tmp_path, capsys):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, "lora", b=0.0)
    arguments = ["--to", str(tmp_path / "out"), "--as", "base"]
    assert main([str(tmp_path / "base"), *arguments]) == 0
    file = tmp_path / "out" / "base-F16.gguf"
    assert capsys.readouterr().out.startswith(f"{file}: {file.stat().st_size / 1e6:,.1f} MB\nllama-server -m {file}\n")
    served = LlamaCpp(file, context=128)
    expected = log_probabilities(trained_model(run))
    assert numpy.abs(served.log_probabilities(IDS, WORDS) - expected).max() < 0.1
    with urllib.request.urlopen(f"{served.address}/health", timeout=60) as answer:
        assert answer.status == 200


@needs_llama_cpp
def test_several_adapters_beside_one_base(small_tokenizer, tmp_path):
    """Each request has its own, and none of the others."""
    runs = [make_run(tmp_path / str(b), family_config("llama tied"), small_tokenizer, b=b) for b in (0.2, -0.3, 0.0)]
    for number, run in enumerate(runs):
        export(read_run(run), tmp_path / f"lora{number}", "adapter")
    export(read_run(runs[2]), tmp_path / "base", "gguf", "f16")
    (base,), adapters = (tmp_path / "base").glob("*.gguf"), sorted(tmp_path.glob("lora[01]/*.gguf"))
    served = LlamaCpp(base, adapters, context=128)
    expected = [log_probabilities(trained_model(run)) for run in runs]
    assert min(numpy.abs(expected[a] - expected[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1
    for adapter in (1, 0, None, 1):
        served.use(adapter)
        theirs = served.log_probabilities(IDS, WORDS)
        assert numpy.abs(theirs - expected[2 if adapter is None else adapter]).max() < 0.1


@pytest.fixture
def served(small_tokenizer, tmp_path):
    """A random model in llama.cpp's server."""
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer)
    export(read_run(run), tmp_path / "out", "gguf", "f16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    return LlamaCpp(file, context=128)


@needs_llama_cpp
def test_other_programs_ask_the_server_as_they_ask_openais(served):
    """Over HTTP: an answer in one piece, the same as a stream, the list of models, a request without messages."""
    chat = [{"role": "user", "content": "two teas"}]
    expected = served.chat(chat, 8)

    def send(path: str, request: dict | None = None) -> str:
        body, kind = json.dumps(request).encode() if request else None, {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(served.address + path, body, kind), timeout=60) as answer:
            return answer.read().decode()

    request = {"model": "any", "messages": chat, "max_tokens": 8, "temperature": 0}
    whole = json.loads(send("/v1/chat/completions", request))
    choice = whole["choices"][0]
    assert whole["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip() == expected.text != ""
    assert choice["finish_reason"] == ("stop" if expected.stopped else "length")
    assert whole["usage"]["completion_tokens"] == expected.tokens
    *events, end = re.findall(r"^data: (.*)$", send("/v1/chat/completions", {**request, "stream": True}), re.MULTILINE)
    pieces = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    said = choice["message"]["content"].rstrip("\ufffd")  # a stream leaves the first half of a character out
    assert end == "[DONE]" and len(pieces) > 2 and "".join(pieces) == said
    assert json.loads(send("/v1/models"))["data"][0]["object"] == "model"
    with pytest.raises(urllib.error.HTTPError) as refused:
        send("/v1/chat/completions", {"model": "any", "max_tokens": 8})
    assert refused.value.code >= 400 and "messages" in json.loads(refused.value.read())["error"]["message"]


@needs_llama_cpp
def test_openais_own_client_asks_the_server(served):
    """In one piece, as a stream, with a text to stop at, without messages."""
    openai = pytest.importorskip("openai", reason="no openai here: PyPI's client of OpenAI's service")
    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)
    chat = [{"role": "user", "content": "two teas"}]
    expected, request = served.chat(chat, 8), {"model": "any", "messages": chat, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**request)
    choice = whole.choices[0]
    assert choice.message.content.strip() == expected.text != "" and whole.usage.completion_tokens == expected.tokens
    assert choice.finish_reason == ("stop" if expected.stopped else "length")
    events = list(client.chat.completions.create(**request, stream=True))
    pieces = [choice.delta.content or "" for event in events for choice in event.choices]
    said = choice.message.content.rstrip("\ufffd")  # a stream leaves the first half of a character out
    assert len(pieces) > 2 and "".join(pieces) == said
    end = said[len(said) // 2 :]
    stopped = client.chat.completions.create(**request, stop=end).choices[0]
    assert stopped.message.content == said[: said.index(end)] != "" and stopped.finish_reason == "stop"
    with pytest.raises(openai.APIStatusError, match="messages"):
        client.chat.completions.create(model="any", messages=openai.omit, max_tokens=8)


@needs_llama_cpp
def test_more_rows_than_tokens_are_unused_tokens(small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config("llama", vocab_size=WORDS + 32), small_tokenizer)
    export(read_run(run), tmp_path / "out", "gguf")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert numpy.isfinite(LlamaCpp(file, context=128).log_probabilities(IDS, WORDS + 32)).all()


def test_numbers_that_f16_cannot_hold_are_refused(small_tokenizer, tmp_path):
    run = make_run(tmp_path, family_config("llama"), small_tokenizer, method="lora", b=1e6)
    with pytest.raises(UserError, match="F16 cannot hold: export with --weights bf16"):
        export(read_run(run), tmp_path / "out", "gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    export(read_run(run), tmp_path / "out", "gguf", "bf16")


REFUSED = [
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        "scales its rope by 'yarn'",
    ),
    ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "windows of attention"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
    ("gemma3", {"layer_types": ["full_attention"] * 7}, "windows of attention"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "soft caps"),
]


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, said):
    architectures.require_supported(family_config(family))
    with pytest.raises(UserError, match=said):
        architectures.require_supported(family_config(family, **changes))


def test_other_models_are_refused():
    from transformers import GPT2Config

    with pytest.raises(UserError, match="type gpt2 are not exported to GGUF"):
        architectures.require_supported(GPT2Config())


def test_interleaved_rows():
    rows = torch.arange(8)[:, None]  # two heads of four
    assert architectures.interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_told_in_a_sentence(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but nothing after it")
    with pytest.raises(UserError, match="llama.cpp cannot load .*bad.gguf"):
        LlamaCpp(tmp_path / "bad.gguf")


@needs_llama_cpp
def test_llama_cpp_reads_a_file_of_the_bundled_tokenizer_alike(tokenizer, tmp_path):
    """Template, special tokens, digits, spaces, letters of all kinds."""
    run = make_run(tmp_path, family_config("llama tied", vocab_size=len(tokenizer)), tokenizer)
    export(read_run(run), tmp_path / "out", "gguf")
    (file,) = (tmp_path / "out").glob("*.gguf")
    served = LlamaCpp(file, context=128)
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    chats = [
        [{"role": "user", "content": "Two teas,  and 12345 cakes: don't!\n\n\tÆther — 日本語 🙂  "}],
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "a  1  b   22"}],
    ]
    for chat in chats:
        text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert served.prompt(chat) == text
        assert served.ids(text, start=True) == ours(text, add_special_tokens=False)["input_ids"]


@needs_llama_cpp
def test_llama_cpp_tells_the_loss_of_a_sample(small_tokenizer, tmp_path, monkeypatch):
    """Of its targets only, be they among the likeliest or not; also where the likeliest is half a character."""
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer)
    export(read_run(run), tmp_path / "out", "gguf", "f16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    served, model = LlamaCpp(file, context=128), trained_model(run)
    sample = TokenizedSample(tuple(IDS), 5, ((9, 12),))
    expected = text_loss(model, [sample]).total
    assert served.loss(sample, WORDS) == pytest.approx(expected, rel=0.01)
    monkeypatch.setattr(llama_cpp, "FEW", 3)
    assert served.loss(sample, WORDS) == pytest.approx(expected, rel=0.01)
