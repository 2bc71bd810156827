"""The problems of the task ``kvgraft_word_problems``; lm-eval imports this file by itself."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from kvgraft.data.word_problems import generate

COUNT, SEED = 100, 0


def load(**_: Any) -> dict[str, Dataset]:
    """The ``test`` part: question, worked steps, four final numbers and the place of the right one."""
    return {
        "test": Dataset.from_list([_row(index, row) for index, row in enumerate(generate("held_out", COUNT, SEED))])
    }


def _row(index: int, problem: Any) -> dict[str, Any]:
    steps, _, last = problem["answer"].rpartition("\n#### ")
    number = int(last)
    wrong = [number + 1, number + 10, number + 2]
    right = index % (len(wrong) + 1)
    choices = [*wrong[:right], number, *wrong[right:]]
    return {
        "question": problem["question"],
        "steps": steps,
        "choices": [str(choice) for choice in choices],
        "right": right,
    }
