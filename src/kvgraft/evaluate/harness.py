"""Any task of lm-eval (EleutherAI's lm-evaluation-harness) on a saved student."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvgraft.errors import DataError
from kvgraft.models.lora import ADAPTER_WEIGHTS, base_of

# Tasks that kvgraft brings along; lm-eval finds them beside its own.
TASKS_FOLDER = Path(__file__).parent / "tasks"


def own_tasks() -> list[str]:
    """Names of the tasks that kvgraft brings along; they need no network."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml"))


def require_tasks(tasks: Sequence[str]) -> None:
    """Raise DataError where lm-eval is missing or does not know one of ``tasks``."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(f"--tasks {','.join(tasks)} needs lm-eval: pip install 'kvgraft[eval]'")
    others = set(tasks) - set(own_tasks())
    for task in sorted(others - known_tasks() if others else ()):
        near = difflib.get_close_matches(task, known_tasks(), n=5) or own_tasks()
        raise DataError(f"lm-eval knows no task {task!r}; near it are {', '.join(near)}. `lm-eval ls tasks` has all")


def known_tasks() -> set[str]:
    """Tasks, groups and tags that lm-eval knows, ours among them."""
    return set(_task_manager(include_defaults=True).all_tasks)


@lru_cache(2)
def _task_manager(include_defaults: bool) -> Any:
    """lm-eval's index of tasks, which takes a while to read; ours alone unless ``include_defaults``."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=include_defaults)


def task_scores(
    student: Path, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 16, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Every metric of every task (and of the groups they form) of the student saved in ``student``.

    Args:
        tasks: names that :func:`require_tasks` has accepted.
        limit: examples of each task, default all.

    Raises:
        DataError: a task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate

    only_ours = set(tasks) <= set(own_tasks())
    try:
        found = simple_evaluate(
            model="hf",
            model_args=_model_args(student, device),
            tasks=list(tasks),
            task_manager=_task_manager(include_defaults=not only_ours),
            limit=limit,
            batch_size=batch_size,
            device=device,
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"lm-eval cannot run {', '.join(tasks)} on {student}: {error}. Tasks fetch their data from the hub; "
            f"without a network take {', '.join(own_tasks())}"
        ) from error
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _model_args(student: Path, device: str) -> dict[str, Any]:
    if not (student / ADAPTER_WEIGHTS).is_file():
        return {"pretrained": str(student)}
    # lm-eval looks for config.json, which adapters do not have. Given the base and the adapters by name, it cuts the
    # embeddings to the length of the tokenizer; a model that is loaded already it takes as it is.
    model = AutoModelForCausalLM.from_pretrained(student, revision=base_of(student)[1], dtype="auto")
    return {"pretrained": model.to(device).eval(), "tokenizer": AutoTokenizer.from_pretrained(student)}


def _numbers(scores: dict[str, object]) -> dict[str, float]:
    """``acc,none`` and ``acc_stderr,none`` as ``acc`` and ``acc_stderr``; other filters keep their name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in scores.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len"
    }
