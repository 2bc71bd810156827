"""What was run, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvgraft.recipe import Recipe
from kvgraft.report.environment import Environment
from kvgraft.report.page.data import Phrase, TableFigure, Words
from kvgraft.report.results import TeacherResult


def setting_table(
    recipe: Recipe,
    *,
    teachers: Sequence[TeacherResult],
    student: str,
    text: str,
    environments: Sequence[Environment | None],
    versions: Mapping[str, str],
    command: str,
) -> TableFigure:
    """Models, text, objective, and every machine once; ``text`` counts the training texts and tokens."""
    rows: list[list[Words]] = [
        [Phrase("teacher"), ", ".join(f"{teacher.name} ({teacher.model})" for teacher in teachers)],
        [Phrase("student"), student],
        [Phrase("text"), recipe.data.train],
        [Phrase("training texts / tokens"), text],
        [Phrase("objective"), f"{recipe.kv_loss.objective}, {recipe.kv_loss.form}, x {recipe.kv_loss.weight:g}"],
        [Phrase("projector"), f"mlp_ratio {recipe.projector.mlp_ratio}, {recipe.projector.sharing}"],
        [Phrase("steps x batch"), f"{recipe.training.steps:,} x {_batch(recipe)}"],
    ]
    for machine in dict.fromkeys(_machine(environment) for environment in environments):
        rows.append([Phrase("machine"), machine or Phrase("not recorded by this run")])
    rows.append([Phrase("versions"), ", ".join(f"{name} {number}" for name, number in versions.items())])
    return TableFigure(title=Phrase("Setting"), command=command, columns=[], rows=rows)


def _batch(recipe: Recipe) -> str:
    training = recipe.training
    size = f"{training.tokens_per_batch:,} tokens" if training.tokens_per_batch else str(training.batch_size)
    return size if training.batching == "shuffled" else f"{size}, {training.batching}"


def _machine(environment: Environment | None) -> str:
    if environment is None:
        return ""
    hardware = environment.hardware
    parts = [hardware.processor, f"{hardware.cpus} CPUs", f"{hardware.memory_gb:g} GB", *hardware.accelerators]
    return ", ".join([*parts, hardware.platform])
