"""The experiment log: the guide's YAML template, filled from the run, and one line of metrics for every log event.

The log also holds what repeats the run: ``kvgraft train RUN/experiment.yaml`` reads the recipe out of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvgraft.recipe import Recipe
from kvgraft.report.notes import added_notes, noticed
from kvgraft.report.results import CONVERGENCE_RULE, RunResult, as_plain


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line to ``path``."""
    with path.open("ab+") as file:
        # A kill in the middle of a line leaves it open; what follows must not become part of it.
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of ``path``; lines that a kill cut short are left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def experiment_log(recipe: Recipe, result: RunResult, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The guide's experiment log ("实验日志模板"), every field measured or taken from the recipe.

    ``results`` tells the held-out KV loss of the ``kv`` arm (the guide's ``loss``); where a run has no such arm, the
    held-out cross-entropy of its first arm. ``environment`` has what it ran on and the recipe whole. ``notes`` go
    behind those that the run gathered.
    """
    arm = result.arm("kv") or result.arms[0]
    measure = "kv_loss" if "kv_loss" in arm.last else "loss"
    initial, final = arm.first[measure], arm.last[measure]
    log = {
        "experiment": {"name": result.name, "date": result.date},
        "model": {"teacher": ", ".join(teacher.name for teacher in result.teachers), "student": result.student},
        "projector": {
            "mlp_ratio": recipe.projector.mlp_ratio,
            "dropout": recipe.projector.dropout,
            "init_method": recipe.projector.init_method,
            "params": _in_millions(arm.projector_parameters),
        },
        "training": {
            "learning_rate": recipe.training.projector_learning_rate,
            "student_learning_rate": recipe.training.learning_rate,
            "batch_size": recipe.training.batch_size,
            "steps": arm.steps,
        },
        "results": {
            "measure": f"held-out {measure} of the {arm.arm} arm",
            "initial_loss": initial,
            "final_loss": final,
            "reduction": f"{1 - final / initial:.1%}" if initial else "0.0%",
            "convergence_step": arm.convergence_step(measure),
            "convergence_rule": CONVERGENCE_RULE,
        },
        "notes": [*noticed(result), *notes],
    }
    environment = {
        **(result.environment.model_dump() if result.environment else {"versions": result.versions}),
        "seeds": {"run": recipe.seed, "data": recipe.data.seed},
        "stores": {teacher.name: teacher.store_fingerprint for teacher in result.teachers},
        "recipe": recipe.model_dump(mode="json"),
    }
    # Rounding is for what was measured; the recipe must come back as it was.
    return {**as_plain(log), "environment": environment}


def write_experiment_log(path: Path, recipe: Recipe, result: RunResult) -> None:
    """Save :func:`experiment_log` as YAML, with the notes that people added to the run."""
    log = experiment_log(recipe, result, added_notes(path.parent))
    text = yaml.safe_dump(log, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else str(count)
