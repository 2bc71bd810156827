"""What the page shows of a comparison: verdicts and what they stand on, and the curves of all arms over the seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from kvgraft.compare.comparison import Comparison
from kvgraft.errors import ReportError
from kvgraft.recipe import Recipe
from kvgraft.report.notes import added_notes, noticed
from kvgraft.report.page.commands import evaluate_command, report_command
from kvgraft.report.page.comparison_evaluation import evaluation_tables
from kvgraft.report.page.comparison_tables import (
    VERDICTS,
    arm_table,
    comparison_table,
    seed_table,
    share_table,
)
from kvgraft.report.page.data import PageData, Phrase, Section, TableFigure, TextFigure, Tile, Words
from kvgraft.report.page.measures import detail_table
from kvgraft.report.page.metrics import main_curves, other_curves, share_curves
from kvgraft.report.page.seeds import SeedMeasurements
from kvgraft.report.page.setting import setting_table
from kvgraft.report.page.teachers import alignment_counts, layer_maps, strips
from kvgraft.report.results import RECIPE_FILE, RESULT_FILE
from kvgraft.report.run_folder import RunFolder, read_run_folder

logger = logging.getLogger(__name__)

_TILES = 4
Cells = Mapping[tuple[str, int], RunFolder]


def page_of_comparison(comparison: Comparison, folder: Path, with_strips: bool = True) -> PageData:
    """Everything that a comparison holds, and what its runs logged where they still lie in ``folder``.

    Args:
        folder: the comparison's, with a run in ``ARM/seed-SEED`` for each arm and seed.
        with_strips: whether to load the tokenizers and show a text in both.

    Raises:
        ReportError: the comparison's recipe, or a run or evaluation in ``folder``, is none that this version can read.
    """
    recipe = _recipe(comparison, folder)
    cells = _read_cells(comparison, folder)
    measured = _measurements(comparison, cells)
    command = f"{comparison.command}\n{report_command([folder])}"
    notes = [*comparison.notes, *_each(cells, lambda cell: added_notes(cell.path))]
    noticed_by_runs = _each(cells, lambda cell: noticed(cell.result))
    first = next(iter(cells.values()), None)
    sections = [
        Section(
            "results",
            Phrase("Results"),
            [comparison_table(comparison, command), arm_table(comparison, command)],
            [seed_table(comparison, command), detail_table(measured, command)],
        ),
        Section("curves", Phrase("Curves"), main_curves(measured, command), other_curves(measured, command)),
        Section(
            "gradients",
            Phrase("What moves the student"),
            [*share_curves(measured, command), *share_table(comparison, command)],
            missing=Phrase("No arm of this run has a second loss part whose share was measured."),
        ),
        Section(
            "evaluation",
            Phrase("Evaluation"),
            evaluation_tables(cells),
            missing=Phrase(
                "No run of this comparison was evaluated: {command} does it for one.",
                {"command": evaluate_command(first.path if first is not None else folder / "ARM" / "seed-0")},
            ),
        ),
        Section("layers", Phrase("Layers"), layer_maps(comparison.teachers, command)),
        Section(
            "tokens",
            Phrase("Tokens"),
            [
                *alignment_counts(comparison.teachers, comparison.train_tokens, command),
                *(strips(first, command) if first is not None and with_strips else []),
            ],
        ),
        Section(
            "notes",
            Phrase("Notes"),
            [_lines(Phrase("Notes on the arms and from people"), notes, command)] if notes else [],
            [_lines(Phrase("What each run noticed"), noticed_by_runs, command)] if noticed_by_runs else [],
        ),
        Section(
            "setup",
            Phrase("What was run, and where"),
            [_setting(comparison, recipe, cells, command), _commands(comparison)],
            [TextFigure(title=RECIPE_FILE, command=command, text=recipe.to_yaml())],
        ),
    ]
    return PageData(
        title=comparison.name,
        subtitle=_subtitle(comparison),
        arms=[arm.name for arm in comparison.arms],
        sections=[section for section in sections if section.figures or section.more or section.missing],
        tiles=_tiles(comparison),
        notices=_notices(comparison, cells),
    )


def _recipe(comparison: Comparison, folder: Path) -> Recipe:
    try:
        return Recipe.model_validate(comparison.recipe)
    except ValidationError as error:
        raise ReportError(f"the recipe in {folder}'s comparison cannot be read by this version: {error}") from error


def _read_cells(comparison: Comparison, folder: Path) -> Cells:
    """The runs that are still in ``folder`` as they were compared, by arm and seed."""
    cells = {}
    for arm in comparison.arms:
        for run in arm.runs:
            place = folder / arm.name / f"seed-{run.seed}"
            if (place / RESULT_FILE).is_file():
                cell = read_run_folder(place)
                if cell.result.arms == [run.result]:
                    cells[arm.name, run.seed] = cell
    return cells


def _measurements(comparison: Comparison, cells: Cells) -> list[SeedMeasurements]:
    """By seed; a run knows its arm by what it trains as, a comparison by a name of its own."""
    return [
        SeedMeasurements(
            seed=seed,
            arms=[
                run.result.model_copy(update={"arm": arm.name})
                for arm in comparison.arms
                for run in arm.runs
                if run.seed == seed
            ],
            events=[
                {**event, "arm": arm.name}
                for arm in comparison.arms
                if (arm.name, seed) in cells
                for event in cells[arm.name, seed].metrics
            ],
        )
        for seed in comparison.seeds
    ]


def _each(cells: Cells, notes: Callable[[RunFolder], Sequence[str]]) -> list[str]:
    return [f"{arm}, seed {seed}: {note}" for (arm, seed), cell in cells.items() for note in notes(cell)]


def _lines(title: Phrase, lines: Sequence[str], command: str) -> TextFigure:
    return TextFigure(title=title, command=command, text="\n".join(lines))


def _subtitle(comparison: Comparison) -> list[Words]:
    seeds = ", ".join(map(str, comparison.seeds))
    teachers = ", ".join(teacher.name for teacher in comparison.teachers)
    return [
        Phrase("from {teachers} to {student}", {"teachers": teachers, "student": comparison.student}),
        Phrase("{count} arms", {"count": str(len(comparison.arms))}),
        Phrase("seeds {seeds}", {"seeds": seeds})
        if len(comparison.seeds) > 1
        else Phrase("seed {seeds}", {"seeds": seeds}),
        comparison.date,
    ]


def _tiles(comparison: Comparison) -> list[Tile]:
    """Verdicts on the arms with the lowest losses."""
    found = sorted(
        (arm.statistics.difference.mean, arm.name, arm.verdict.kind)
        for arm in comparison.arms
        if arm.statistics.difference is not None
    )
    return [
        Tile(
            Phrase("{arm} against {against}", {"arm": name, "against": comparison.against}),
            f"{mean:+.3f}",
            VERDICTS[kind],
        )
        for mean, name, kind in found[:_TILES]
    ]


def _notices(comparison: Comparison, cells: Cells) -> list[Phrase]:
    notices = []
    if len(comparison.seeds) == 1:
        notices.append(
            Phrase(
                "One seed: how far another seed would land is unknown, so small differences between arms prove nothing."
            )
        )
    runs = [(arm.name, run.seed) for arm in comparison.arms for run in arm.runs]
    missing = [run for run in runs if run not in cells or not cells[run].metrics]
    if missing:
        logger.warning("%d of %d runs have no log beside the comparison: no training curves", len(missing), len(runs))
        notices.append(
            Phrase(
                "{some} of {all} runs do not lie beside the comparison as they were compared: their training curves "
                "are missing.",
                {"some": str(len(missing)), "all": str(len(runs))},
            )
        )
    return notices


def _setting(comparison: Comparison, recipe: Recipe, cells: Cells, command: str) -> TableFigure:
    return setting_table(
        recipe,
        teachers=comparison.teachers,
        student=f"{comparison.student} ({comparison.student_parameters:,})",
        text=f"{comparison.train_texts:,} / {comparison.train_tokens:,}",
        environments=[cell.result.environment for cell in cells.values()],
        versions=comparison.versions,
        command=command,
    )


def _commands(comparison: Comparison) -> TextFigure:
    lines = [
        line for arm in comparison.arms for run in arm.runs for line in (f"# {arm.name}, seed {run.seed}", run.command)
    ]
    return _lines(Phrase("The command of each run"), lines, comparison.command)
