"""What test_loop.py starts twice: python -m torch.distributed.run --nproc_per_node 2 -m tests.training.two_processes

Trains, with and without dropout, stops and goes on, judges; each process writes down what it saw in the folder given.
"""

import json
import pathlib
import sys
from types import SimpleNamespace

import torch
from accelerate import PartialState

from qlora_lab.evaluation import judge
from qlora_lab.evaluation.scores import parse_score
from qlora_lab.finetuning import Batches, train
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.validation import Validation
from tests.conftest import tiny_model
from tests.training.test_loop import RISING_AGAIN, random_samples, stopped_at

BATCHES = Batches(random_samples(40), 4, seed=5)
SETTINGS = {"steps": 6, "checkpoint_every": 2, "learning_rate": 1e-2}


def seen(folder: pathlib.Path) -> dict:
    accelerator = make_accelerator(torch.float32, torch.device("cpu"))
    own = {"accelerator": accelerator, "progress": False, **SETTINGS}
    results = {"processes": accelerator.num_processes}
    for name, dropout in (("plain", 0.0), ("dropout", 0.5)):
        model = tiny_model(dropout=dropout)
        torch.manual_seed(accelerator.process_index)
        results[name] = [[r.loss, r.gradient_norm] for r in train(model, BATCHES, **own)]
    model = tiny_model(dropout=0.5)
    torch.manual_seed(accelerator.process_index)
    stopped_at(5, model, BATCHES, folder, accelerator=accelerator, **SETTINGS)
    accelerator.wait_for_everyone()
    model = tiny_model(dropout=0.5)  # and the generators stand where this leaves them
    records = train(model, BATCHES, checkpoints=folder, resume=True, **own)
    results["resumed"] = [[r.loss, r.gradient_norm] for r in records]
    results["judged"] = judged(accelerator)
    results["validated"] = validated(accelerator)
    return results


def validated(accelerator) -> dict:
    """Validates after each step, the second process with fewer samples, until the loss rises again."""
    model, texts = tiny_model(), {"validation": random_samples(5, seed=9)}
    held_out = judge.Judge({}, texts, SimpleNamespace(pad_token_id=0), torch.float32, accelerator)
    validation = Validation(lambda model: held_out.loss(model, "validation").per_token, 1, patience=2, keep_best=True)
    records = train(model, BATCHES, validation=validation, accelerator=accelerator, progress=False, **RISING_AGAIN)
    step = validation.restore_best(model)
    return {
        "losses": [record.validation_loss for record in records],
        "best": [step, held_out.loss(model, "validation").per_token],
    }


def judged(accelerator) -> dict:
    """Five answers of a split, three of them right, one right one of another; perplexities of five texts and of one."""

    class Words:
        pad_token_id = 0

        def __call__(self, text: str) -> dict:
            return {"input_ids": text.split()}

    splits = {"test": [str(n) for n in range(5)], "shifted": ["5"]}
    chats = {
        split: [[{"role": "user", "content": n}, {"role": "assistant", "content": f"answer {n}"}] for n in numbers]
        for split, numbers in splits.items()
    }
    judge.generate = lambda model, tokenizer, conversations, **_: [
        f"answer {chat[-1]['content']}" if chat[-1]["content"] in "0125" else "no idea" for chat in conversations
    ]

    f1 = judge.Judge(chats, {}, Words(), torch.float32, accelerator, [parse_score("f1")])(None)

    def judgement(conversations: dict, texts: dict, model=None) -> dict:
        return judge.Judge(conversations, texts, Words(), torch.float32, accelerator)(model).as_dict()

    texts = {"five": random_samples(5), "one": random_samples(1)}
    return {
        "f1": f1.scores["f1"],
        "exact": judgement(chats, {})["exact_match"],
        "one": judgement({"shifted": chats["shifted"]}, {})["exact_match"],
        "none": judgement({}, {})["exact_match"],
        "perplexity": judgement({}, texts, tiny_model())["perplexity"],
    }


if __name__ == "__main__":
    results = seen(pathlib.Path(sys.argv[1]))
    (pathlib.Path(sys.argv[1]) / f"process-{PartialState().process_index}.json").write_text(json.dumps(results))
