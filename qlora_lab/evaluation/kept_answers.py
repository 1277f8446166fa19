"""A run's answers, before training and after, as the lines of its `answers.jsonl`.

{"split": "test", "asked": [{"role": "user", "content": ...}], "expected": ...,
 "before": {"answer": ..., "exact": false, "scores": {"f1": 0.5}}, "after": {...}}
"""

from __future__ import annotations

from qlora_lab.evaluation.judge import Judge, Judgement


def rows_of(judge: Judge, judgement: Judgement, moment: str) -> list[dict]:
    """One row for each conversation, split by split. moment: "before" or "after"."""
    references = judge.references()
    return [
        {
            "split": split,
            "asked": [{"role": turn["role"], "content": turn["content"]} for turn in chat[:-1]],
            "expected": references[split][i],
            moment: {
                "answer": judgement.answers[split][i],
                "exact": judgement.exact[split][i] == "1",
                "scores": {name: splits[split][i] for name, splits in judgement.scores.items()},
            },
        }
        for split, chats in judge.conversations.items()
        for i, chat in enumerate(chats)
    ]


def before_only(rows: list[dict]) -> list[dict]:
    """The rows without the answers after training: a run that goes on will answer again."""
    return [{key: value for key, value in row.items() if key != "after"} for row in rows]


def joined(before: list[dict], after: list[dict]) -> list[dict]:
    """The rows with both answers; without those before training if they are of other conversations, or there are none.

    So it is if the run began with a version that did not keep them, or the data has changed since.
    """
    of_before, of_after = ([(row["split"], row["expected"]) for row in rows] for rows in (before, after))
    if of_before != of_after:
        return after
    return [{**one, **other} for one, other in zip(before, after, strict=True)]
