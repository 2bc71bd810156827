"""What the page shows of one run, or of runs of one recipe with a seed each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kvgraft.report.page.commands import again_command, evaluate_command, report_command
from kvgraft.report.page.data import PageData, Phrase, Section, TableFigure, TextFigure, Tile, Words
from kvgraft.report.page.evaluation import evaluation_figures
from kvgraft.report.page.measures import (
    arm_names,
    detail_table,
    difference_to_baseline,
    headline_table,
    values_of,
    values_text,
)
from kvgraft.report.page.metrics import main_curves, other_curves, share_curves
from kvgraft.report.page.seeds import SeedMeasurements, measurements_of
from kvgraft.report.page.setting import setting_table
from kvgraft.report.page.teachers import alignment_counts, layer_maps, strips
from kvgraft.report.results import LOG_FILE, METRICS_FILE, RECIPE_FILE
from kvgraft.report.run_folder import RunFolder, read_seeds
from kvgraft.report.tables import size_text

logger = logging.getLogger(__name__)

_TILES = 4
_STORED, _ONLINE = Phrase("not run: all KV was stored"), Phrase("run in every step")


def page_of_runs(folders: Sequence[Path], with_strips: bool = True) -> PageData:
    """Everything that finished runs of one recipe hold.

    Args:
        folders: one for each seed.
        with_strips: whether to load the tokenizers and show a text in both.

    Raises:
        ReportError: as :func:`kvgraft.report.run_folder.read_seeds`, or a file of an evaluation that cannot be read.
    """
    runs = read_seeds(folders)
    first = runs[0]
    train, report = again_command(runs), report_command(run.path for run in runs)
    measured = [measurements_of(run) for run in runs]
    evaluation = evaluation_figures(runs)
    held_out, others = main_curves(measured, train), other_curves(measured, train)
    sections = [
        Section("results", Phrase("Results"), [headline_table(measured, train)], [detail_table(measured, train)]),
        Section("curves", Phrase("Curves"), held_out, others),
        Section(
            "gradients",
            Phrase("What moves the student"),
            share_curves(measured, train),
            missing=Phrase("No arm of this run has a second loss part whose share was measured."),
        ),
        Section("evaluation", Phrase("Evaluation"), evaluation.tables),
        Section("layers", Phrase("Layers"), [*layer_maps(first.result.teachers, train), *evaluation.heat_maps]),
        Section(
            "tokens",
            Phrase("Tokens"),
            [
                *alignment_counts(first.result.teachers, first.result.train_tokens, train),
                *(strips(first, report) if with_strips else []),
            ],
        ),
        Section(
            "samples",
            Phrase("What the students write"),
            evaluation.samples,
            missing=Phrase("No answers yet: {command} writes them.", {"command": evaluate_command(first.path)}),
        ),
        Section("setup", Phrase("What was run, and where"), [_setting(runs, train)], [_costs(run) for run in runs]),
        Section(
            "log",
            Phrase("Experiment log"),
            [_file(run, LOG_FILE, run.log) for run in runs if run.log],
            [_recipe(first)],
        ),
    ]
    return PageData(
        title=first.result.name,
        subtitle=_subtitle(runs),
        arms=arm_names(measured),
        sections=[section for section in sections if section.figures or section.missing],
        tiles=_tiles(measured),
        notices=_notices(runs),
    )


def _subtitle(runs: Sequence[RunFolder]) -> list[Words]:
    seeds = ", ".join(str(run.seed) for run in runs)
    teachers = ", ".join(teacher.name for teacher in runs[0].result.teachers)
    words: list[Words] = [
        Phrase("from {teachers} to {student}", {"teachers": teachers, "student": runs[0].result.student}),
        Phrase("seeds {seeds}", {"seeds": seeds}) if len(runs) > 1 else Phrase("seed {seeds}", {"seeds": seeds}),
    ]
    return [*words, *dict.fromkeys(run.result.date for run in runs)]


def _tiles(measured: Sequence[SeedMeasurements]) -> list[Tile]:
    """Where the arms ended against the baseline, the best first; the first arms' losses where there is no baseline."""
    differences = {arm: values_of(measured, arm, difference_to_baseline) for arm in arm_names(measured)}
    against = sorted((sum(values) / len(values), arm) for arm, values in differences.items() if values)
    tiles = []
    for arm in [arm for _, arm in against] or arm_names(measured):
        losses = values_of(measured, arm, lambda found, baseline: found.last["loss"])
        end = Phrase("held-out loss {loss}", {"loss": values_text(losses, ".3f")})
        if differences[arm]:
            label = Phrase("{arm} against the baseline", {"arm": arm})
            tiles.append(Tile(label, values_text(differences[arm], "+.3f"), end))
        else:
            tiles.append(Tile(arm, values_text(losses, ".3f"), Phrase("held-out loss after")))
    return tiles[:_TILES]


def _notices(runs: Sequence[RunFolder]) -> list[Phrase]:
    notices = []
    for run in runs:
        if not run.metrics:
            logger.warning("%s has no %s: the page shows no training curves of it", run.path, METRICS_FILE)
            notices.append(
                Phrase(
                    "{folder} has no {file}: training curves and gradient shares of seed {seed} are missing.",
                    {"folder": str(run.path), "file": METRICS_FILE, "seed": str(run.seed)},
                )
            )
    if all(run.result.arm("baseline") is None for run in runs):
        notices.append(Phrase("There is no baseline arm: nothing here says what the teacher's knowledge was worth."))
    return notices


def _setting(runs: Sequence[RunFolder], command: str) -> TableFigure:
    result = runs[0].result
    return setting_table(
        runs[0].recipe,
        teachers=result.teachers,
        student=f"{result.student} ({result.student_parameters:,})",
        text=f"{result.train_texts:,} / {result.train_tokens:,}",
        environments=[run.result.environment for run in runs],
        versions=result.versions,
        command=command,
    )


def _costs(run: RunFolder) -> TableFigure:
    result = run.result
    rows: list[list[Words]] = [
        [Phrase("held-out texts"), f"{result.held_out_texts:,}"],
        [Phrase("training texts cut to the maximum length"), f"{result.truncated_train_texts:,}"],
    ]
    for teacher in result.teachers:
        name, speed = {"teacher": teacher.name}, teacher.tokens_per_second
        store = {"size": size_text(teacher.store_bytes), "bytes": f"{teacher.bytes_per_token:,.0f}"}
        idle = _STORED if teacher.store_bytes else _ONLINE
        rows += [
            [Phrase("{teacher}: tokens per second", name), f"{speed:,.0f}" if speed else idle],
            [Phrase("{teacher}: store", name), Phrase("{size}, {bytes} bytes a token", store)],
        ]
    rows += [[Phrase("time: {phase}", {"phase": phase}), f"{time:,.1f} s"] for phase, time in result.seconds.items()]
    title = Phrase("Costs, seed {seed}", {"seed": str(run.seed)})
    return TableFigure(title=title, command=again_command([run]), columns=[], rows=rows)


def _file(run: RunFolder, name: str, text: str) -> TextFigure:
    title = Phrase("{file}, seed {seed}", {"file": name, "seed": str(run.seed)})
    return TextFigure(title=title, command=again_command([run]), text=text)


def _recipe(run: RunFolder) -> TextFigure:
    return _file(run, RECIPE_FILE, run.recipe.to_yaml())
