"""What a forward pass keeps, as `experiments kept` counted it on a GPU: the arithmetic agrees byte by byte."""

import itertools
import json
import pathlib
from dataclasses import replace

import pytest

from qlora_lab.facts import LINEARS
from qlora_lab.memory.activations import layer_activation_bytes, layer_activations
from qlora_lab.memory.moments import when_the_loss_goes_back
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.memory.training_step import TrainingStep

RECORD = json.loads((pathlib.Path(__file__).parents[2] / "data/records/kept-nvidia-h200.json").read_text())
SHAPE, RANK = Shape(*RECORD["settings"]["shape"]), RECORD["settings"]["rank"]
CASE = ("method", "adapter_dtype", "full_precision", "targets", "gradient_checkpointing", "loss_chunk")


def by_case() -> dict[tuple, dict[tuple[int, int], int]]:
    """Bytes that were kept, by layers and tokens, for each way to train."""
    found: dict[tuple, dict[tuple[int, int], int]] = {}
    for row in RECORD["runs"]:
        targets = row["targets"] if isinstance(row["targets"], str) else tuple(row["targets"])
        case = tuple(targets if name == "targets" else row[name] for name in CASE)
        found.setdefault(case, {})[row["layers"], row["tokens"]] = row["kept"]
    return found


KEPT = by_case()


def step_of(case: tuple, layers: int, tokens: int) -> TrainingStep:
    return TrainingStep(
        replace(SHAPE, num_hidden_layers=layers),
        rank=RANK,
        batch_size=1,
        sequence_length=tokens,
        optimizer="adamw_torch",
        quant_type="nf4",
        double_quant=True,
        update_in_backward=False,
        embeddings_on_cpu=False,
        **dict(zip(CASE, case, strict=True)),
    )


def predicted(case: tuple, layers: int, tokens: int) -> int:
    """Activations and bf16 copies; of logits and loss the log-softmax is left, and none of it in chunks."""
    step = step_of(case, layers, tokens)
    parts = when_the_loss_goes_back(step)
    log_softmax = parts["logits and loss"] // 3 if step.loss_chunk is None else 0
    return parts["activations"] + parts["bf16 copies"] + log_softmax


def test_every_way_was_measured():
    ways = {case[:3] for case in KEPT}
    assert len(ways) == 6 and len(KEPT) == 4 * (2 * 1 + 4 * 10)
    assert {(name,) for name in LINEARS} < {case[3] for case in KEPT}
    assert all(set(sizes) == set(itertools.product((2, 3), (256, 512))) for sizes in KEPT.values())


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_a_layer_keeps_for_each_token_what_the_arithmetic_says(case):
    sizes = KEPT[case]
    a_layer = {tokens: sizes[3, tokens] - sizes[2, tokens] for tokens in (256, 512)}
    measured = (a_layer[512] - a_layer[256]) / 256
    step = step_of(case, 2, 256)
    assert measured == (step.layer_input if step.gradient_checkpointing else step.layer) / step.tokens


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_all_else_that_is_kept_is_known_too(case):
    """Beside what is predicted there are whole numbers: token ids, positions and targets, 8 bytes each; and 16 bytes
    for the random state of each attention whose backward pass is to come. The last token has no target, so its row is
    nowhere in the head, nor in the chunks (and the head of `full` keeps none either)."""
    for (layers, tokens), kept in KEPT[case].items():
        step = step_of(case, layers, tokens)
        integers = 8 * (2 + step.gradient_checkpointing + step.full)
        attention_is_below = not step.full and not {"q_proj", "k_proj", "v_proj"} & set(
            LINEARS if step.targets == "all-linear" else step.targets
        )
        states = 0 if step.gradient_checkpointing else layers - attention_is_below
        row = 2 * SHAPE.hidden_size
        rows_left_out = (step.loss_chunk is not None) + (step.full and not (step.masters and step.loss_chunk))
        fp32_sum = 4 * (step.loss_chunk is not None)  # the chunks' losses are summed: nothing keeps the first zero
        expected = integers * tokens - 8 + 16 * states - row * rows_left_out - fp32_sum
        assert kept - predicted(case, layers, tokens) == expected


def test_the_first_layer_keeps_nothing_below_its_first_adapter():
    shape = SHAPES["llama-7b"]
    for method, autocast in itertools.product(("lora", "qlora"), (True, False)):
        for name in LINEARS:
            first = sum(layer_activations(shape, method, 8, [name], autocast, first=True).values())
            assert first < layer_activation_bytes(shape, method, 8, [name], autocast)
        alone = layer_activations(shape, method, 8, "down_proj", autocast, first=True)
        assert sum(alone.values()) == 2 * shape.intermediate_size + 2 * 8  # x of down, and A x
    full = layer_activations(shape, "full", first=True)
    assert sum(full.values()) == layer_activation_bytes(shape, "full")


@pytest.mark.parametrize(
    ("name", "setting", "moment"),
    [
        ("llama-7b", {}, "backward"),
        ("llama-7b", {"sequence_length": 64, "gradient_checkpointing": False}, "forward"),  # in the last layer
        ("llama-7b", {"sequence_length": 2048}, "forward"),  # when the logits are a loss
        ("smollm2-135m", {"sequence_length": 2048}, "loss"),
        ("llama-7b", {"method": "full"}, "update"),
    ],
)
def test_each_moment_can_be_the_peak(name, setting, moment):
    assert estimate(SHAPES[name], **setting).moment == moment
