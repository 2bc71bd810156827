"""One training text as the student and as a teacher read it, aligned as the run aligned it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvgraft.align.tokens import align_tokens
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText, Spans, encode_with_spans
from kvgraft.distill.arms import STUDENT_FOLDER
from kvgraft.errors import KVGraftError, ReportError
from kvgraft.models.loading import load_tokenizer
from kvgraft.prepare import load_examples_of
from kvgraft.recipe import Recipe, TeacherRecipe
from kvgraft.report.page.data import Phrase, StripFigure, StripPiece, StripToken

STUDENT_TOKENS = 64


def alignment_strip(folder: Path, recipe: Recipe, teacher: TeacherRecipe, command: str) -> StripFigure:
    """The beginning of the run's first training text in both tokenizations.

    Args:
        folder: of the finished run, whose saved students bring their tokenizer.

    Raises:
        ReportError: the text or a tokenizer is not where the recipe says any more.
    """
    try:
        student_tokenizer = load_tokenizer(str(folder / recipe.arms[0] / STUDENT_FOLDER))
        text = _first_training_text(recipe)
        student = encode_with_spans(student_tokenizer, text)
        other = encode_with_spans(load_tokenizer(teacher.model, teacher.revision), text)
    except (KVGraftError, OSError) as error:
        raise ReportError(f"the two tokenizations cannot be shown: {error}") from error
    return StripFigure(
        title=Phrase("One text, two tokenizations: the student and {teacher}", {"teacher": teacher.name}),
        note=Phrase(
            "The first {tokens} student tokens of the first training text. Each box is a token; what stands above each "
            "other has the same bytes. Point at a student token, or move through them with the arrow keys, to see the "
            "teacher tokens it learns from (policy: {policy}).",
            {"tokens": str(min(STUDENT_TOKENS, len(student.input_ids))), "policy": recipe.alignment.tokens},
        ),
        command=command,
        teacher=teacher.name,
        pieces=strip_pieces(text, student, other, recipe),
    )


def strip_pieces(text: str, student: EncodedText, teacher: EncodedText, recipe: Recipe) -> list[StripPiece]:
    """Pieces of the text's beginning, cut where neither tokenization has a token across the cut."""
    alignment = align_tokens(student.spans, teacher.spans, recipe.alignment.tokens)
    partners: list[list[int]] = [[] for _ in student.spans]
    for student_index, teacher_index in zip(*alignment.pairs(), strict=True):
        partners[student_index].append(int(teacher_index))
    text_utf8 = text.encode()
    student_tokens = _tokens(text_utf8, student.spans, partners)
    teacher_tokens = _tokens(text_utf8, teacher.spans, None)
    pieces = []
    for student_indices, teacher_indices in _pieces(student.spans, teacher.spans):
        if student_indices and student_indices[-1] >= STUDENT_TOKENS:
            break
        pieces.append(
            StripPiece(
                student=[student_tokens[index] for index in student_indices],
                teacher=[teacher_tokens[index] for index in teacher_indices],
            )
        )
    return pieces


def _first_training_text(recipe: Recipe) -> str:
    data = recipe.data.model_copy(update={"train_samples": 1})
    train: list[Example]
    train, _ = load_examples_of(recipe.model_copy(update={"data": data}), None)
    return train[0].text


def _pieces(student: Spans, teacher: Spans) -> list[tuple[list[int], list[int]]]:
    """Indices of the tokens of each piece: tokens that overlap are in one piece, special tokens are alone."""
    # A special token is empty, at the end of the token before it.
    places = sorted(
        (int(start), int(end), side, index)
        for side, spans in enumerate((student, teacher))
        for index, (start, end) in enumerate(spans)
    )
    pieces: list[tuple[list[int], list[int]]] = []
    reach = 0
    for start, end, side, index in places:
        if not pieces or start >= reach:
            pieces.append(([], []))
        pieces[-1][side].append(index)
        reach = max(reach, end)
    return pieces


def _tokens(text: bytes, spans: Spans, partners: Sequence[Sequence[int]] | None) -> list[StripToken]:
    return [
        StripToken(
            index=index,
            text=_visible(text[start:end]),
            special=bool(start == end),
            partners=() if partners is None else partners[index],
        )
        for index, (start, end) in enumerate(spans)
    ]


def _visible(part: bytes) -> str:
    """Text with its spaces seen; bytes that are no whole character as hexadecimal digits."""
    shown = part.decode(errors="surrogateescape")
    shown = "".join(f"⟨{ord(letter) - 0xDC00:02X}⟩" if "\udc80" <= letter <= "\udcff" else letter for letter in shown)
    return shown.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
