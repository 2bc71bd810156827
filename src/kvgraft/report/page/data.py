"""What a page shows, before it is HTML: titles, figures and tables of a run, of several seeds, or of a comparison.

Whoever has something to show makes a :class:`PageData`; :func:`kvgraft.report.page.render_page` makes HTML of it.
Words come in two kinds: a :class:`Phrase` is the page's own and is shown in every language of the page, a ``str`` is
the reader's (a name, a number, a text) and is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Phrase:
    """English words of the page, with ``{names}`` for what ``values`` holds.

    Every phrase has a Chinese counterpart in :mod:`kvgraft.report.page.translations`.
    """

    english: str
    values: Mapping[str, str] = field(default_factory=dict)


Words = Phrase | str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Anything with a title on the page. ``command`` is what a reader types to get it again."""

    kind: ClassVar[str]
    title: Words
    note: Phrase | None = None
    command: str


@dataclass(frozen=True)
class Curve:
    """One measured quantity of one arm and seed: ``steps`` int ``[points]`` in order, ``values`` float ``[points]``."""

    arm: str
    seed: int
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CurveFigure(Figure):
    """Curves of one quantity: a line for each arm, and a band where an arm has several seeds.

    ``share`` says that values run from 0 to 1.
    """

    kind: ClassVar[str] = "curves"
    curves: Sequence[Curve]
    share: bool = False


@dataclass(frozen=True, kw_only=True)
class TableFigure(Figure):
    """Rows of words; the first column names the row."""

    kind: ClassVar[str] = "table"
    columns: Sequence[Words]
    rows: Sequence[Sequence[Words]]


@dataclass(frozen=True, kw_only=True)
class LayerMapFigure(Figure):
    """Which teacher layer each student layer learns from: pairs ``(student layer, teacher layer)``.

    The teacher may have more layers than the map tells of; they are not drawn.
    """

    kind: ClassVar[str] = "layer_map"
    pairs: Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class HeatMapFigure(Figure):
    """``values[row][column]``, None where nothing was measured.

    ``span`` is what the colours reach over; default from the lowest value to the highest.
    """

    kind: ClassVar[str] = "heat_map"
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    span: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class CountsFigure(Figure):
    """Parts of a whole, each with how many it has."""

    kind: ClassVar[str] = "counts"
    parts: Sequence[tuple[Phrase, int]]


@dataclass(frozen=True)
class StripToken:
    """A token as it is shown. ``partners`` are the teacher tokens that a student token learns from."""

    index: int
    text: str
    special: bool
    partners: Sequence[int] = ()


@dataclass(frozen=True)
class StripPiece:
    """Tokens of both sides that share bytes, and share none with those of another piece."""

    student: Sequence[StripToken]
    teacher: Sequence[StripToken]

    @property
    def differs(self) -> bool:
        """Whether the two tokenizers cut this piece differently."""
        return len(self.student) != 1 or len(self.teacher) != 1


@dataclass(frozen=True, kw_only=True)
class StripFigure(Figure):
    """One text in two tokenizations, piece by piece."""

    kind: ClassVar[str] = "strip"
    teacher: str
    pieces: Sequence[StripPiece]


@dataclass(frozen=True)
class SampleText:
    """A question and what each arm wrote; ``reference`` is the answer that was looked for, if there is one."""

    prompt: str
    reference: str | None
    answers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SamplesFigure(Figure):
    """Generations of all arms side by side."""

    kind: ClassVar[str] = "samples"
    samples: Sequence[SampleText]


@dataclass(frozen=True, kw_only=True)
class TextFigure(Figure):
    """A file as it is, for reading and copying."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page. ``more`` are figures that are folded away until asked for."""

    name: str
    title: Phrase
    figures: Sequence[Figure] = ()
    more: Sequence[Figure] = ()
    missing: Phrase | None = None


@dataclass(frozen=True)
class Tile:
    """One number that a reader should see first."""

    label: Words
    value: str
    note: Words


@dataclass(frozen=True)
class PageData:
    """A whole page. ``arms`` gives the order in which colours are taken; ``notices`` are what to know first."""

    title: str
    subtitle: Sequence[Words]
    arms: Sequence[str]
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()
    notices: Sequence[Phrase] = ()
