"""What only a GPU can show: fp16 with a scaled loss, paged optimizers, a model larger than the memory."""

import pytest
import torch

from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, build_random, train, train_steps
from qlora_lab.memory.shapes import Shape
from qlora_lab.training.checkpoints import newest_checkpoint, restore
from qlora_lab.training.optimizers import make_optimizer, parameter_groups
from qlora_lab.training.processes import make_accelerator

pytestmark = pytest.mark.gpu
SHAPE = Shape(1024, 2752, 4, 16, 16, 1000)  # adapters of more than 100,000 elements: smaller states are not paged


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def samples(count: int = 16) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(0)
    return [TokenizedSample(tuple(torch.randint(3, 1000, (40,), generator=draw).tolist()), 10) for _ in range(count)]


def model(dtype=torch.bfloat16):
    return add_adapter(build_random(SHAPE, "nf4", device="cuda", compute_dtype=dtype), rank=128, alpha=128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_compute_dtype_learns(dtype):
    records = train(
        model(dtype), Batches(samples(4), 4), steps=40, learning_rate=1e-3, compute_dtype=dtype, progress=False
    )
    assert records[-1].loss < 0.7 * records[0].loss


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_resumed_run_goes_on_with_its_optimizer(optimizer, tmp_path):
    settings = {"steps": 8, "optimizer": optimizer, "compute_dtype": torch.bfloat16, "checkpoint_every": 4}
    whole = train(model(), Batches(samples(), 4), progress=False, **settings)
    steps = train_steps(model(), Batches(samples(), 4), checkpoints=tmp_path, **settings)
    for record in steps:
        if record.step == 5:
            steps.close()
    assert newest_checkpoint(tmp_path).path.name == "checkpoint-000004"
    resumed = train(model(), Batches(samples(), 4), checkpoints=tmp_path, resume=True, progress=False, **settings)
    assert [r.loss for r in resumed] == pytest.approx([r.loss for r in whole], rel=1e-3)  # a GPU adds in any order


def test_restored_states_are_paged_again(tmp_path):
    settings = {"steps": 4, "optimizer": "paged_adamw_32bit", "compute_dtype": torch.bfloat16, "checkpoint_every": 2}
    steps = train_steps(model(), Batches(samples(), 4), checkpoints=tmp_path, **settings)
    for record in steps:
        if record.step == 3:
            steps.close()
    other = model()
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("paged_adamw_32bit", parameter_groups(trained), 1e-3, 0.0)
    accelerator = make_accelerator(torch.bfloat16, torch.device("cuda"))
    restore(newest_checkpoint(tmp_path), trained, optimizer, accelerator)
    large = [optimizer.state[p]["state1"] for p in trained.values() if p.numel() >= 100_000]
    assert large
    assert all(getattr(state, "is_paged", False) for state in large)


def test_checkpointing_saves_memory():
    peaks = []
    for checkpointing in (False, True):
        torch.cuda.empty_cache()
        adapted = model()
        torch.cuda.reset_peak_memory_stats()
        train(
            adapted,
            Batches(samples(64), 64),
            steps=2,
            compute_dtype=torch.bfloat16,
            gradient_checkpointing=checkpointing,
            progress=False,
        )
        peaks.append(torch.cuda.max_memory_allocated())
        del adapted
    assert peaks[1] < 0.9 * peaks[0]


def test_folder_loads_onto_the_gpu_in_4_bits(tmp_path, tiny):
    tiny.unload().save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    from qlora_lab.models.loading import bnb_config

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": torch.device("cuda", 0)}, quantization_config=bnb_config("nf4", True, torch.bfloat16)
    )
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert loaded.device.type == "cuda"
