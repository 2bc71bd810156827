"""What a page shows of each teacher: its layers, how much of the text it answers for, and a text in both tokenizers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvgraft.errors import ReportError
from kvgraft.report.page.data import CountsFigure, Figure, LayerMapFigure, Phrase, TextFigure
from kvgraft.report.page.strip import alignment_strip
from kvgraft.report.results import TeacherResult
from kvgraft.report.run_folder import RunFolder

logger = logging.getLogger(__name__)

_DROPPED = {
    "special": Phrase("stand for no text (such as end-of-text)"),
    "beyond_teacher": Phrase("lie beyond the teacher's last token"),
    "no_match": Phrase("overlap no teacher token"),
}


def layer_maps(teachers: Sequence[TeacherResult], command: str) -> list[Figure]:
    """Which layers of each teacher answer for which of the student."""
    return [
        LayerMapFigure(
            title=Phrase("Layers of the student (below) and of {teacher} (above)", {"teacher": teacher.name}),
            command=command,
            pairs=teacher.layer_map,
        )
        for teacher in teachers
    ]


def alignment_counts(teachers: Sequence[TeacherResult], train_tokens: int, command: str) -> list[Figure]:
    """How many of the student's tokens each teacher answers for, and why not for the rest."""
    return [
        CountsFigure(
            title=Phrase(
                "{share} of the student's text tokens have a teacher token ({teacher})",
                {"share": f"{teacher.alignment_coverage:.2%}", "teacher": teacher.name},
            ),
            note=Phrase("All tokens of the training text, by whether and why not they are aligned."),
            command=command,
            parts=_count_parts(train_tokens, teacher),
        )
        for teacher in teachers
    ]


def strips(run: RunFolder, command: str) -> list[Figure]:
    """The first training text in the student's and each teacher's tokenization, or why it cannot be shown."""
    figures: list[Figure] = []
    for teacher in run.recipe.teachers:
        try:
            figures.append(alignment_strip(run.path, run.recipe, teacher, command))
        except ReportError as error:
            logger.warning("%s", error)
            title = Phrase("One text, two tokenizations: the student and {teacher}", {"teacher": teacher.name})
            figures.append(TextFigure(title=title, command=command, text=str(error)))
    return figures


def _count_parts(tokens: int, teacher: TeacherResult) -> list[tuple[Phrase, int]]:
    dropped = [
        (_DROPPED.get(name, Phrase("{reason}", {"reason": name})), count)
        for name, count in teacher.alignment_dropped.items()
    ]
    return [(Phrase("have a teacher token"), tokens - sum(count for _, count in dropped)), *dropped]
