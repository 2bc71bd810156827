"""What a projected cache is worth over several seeds: means, spread, and differences with intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import model_validator
from rich.table import Table

from kvgraft.evaluate.statistics import PairedDifference, Spread, paired_difference, spread
from kvgraft.report.graft import CONTROL, GraftReport, draw_sums, graft_title
from kvgraft.report.graft_picture import save_caches
from kvgraft.report.results import Record
from kvgraft.report.tables import markdown_table

_HEADER = ("cache at the question's tokens", "nats per answer token", "retention", "each seed", "transfer in nats")
_AGAINST = ("cache", "against", "nats", "each seed", "95 % over seeds", "95 % over questions")

_SHOWN_DEVIATION = 0.0005


class GraftSeeds(Record):
    """Reports of one recipe with several seeds, over the same questions.

    Attributes:
        reports: one for each seed.

    Raises:
        ValueError: reports of other questions or other caches than the first one's.
    """

    reports: list[GraftReport]

    @model_validator(mode="after")
    def _of_the_same_questions(self) -> GraftSeeds:
        first = self.reports[0]
        for report in self.reports[1:]:
            if report.question_tokens != first.question_tokens or report.tokens != first.tokens:
                raise ValueError(f"seed {report.seed} was measured on other questions than seed {first.seed}")
            if set(report.nats) != set(first.nats):
                differing = sorted(set(report.nats) ^ set(first.nats))
                raise ValueError(f"seeds {first.seed} and {report.seed} do not share the caches {', '.join(differing)}")
        return self

    @property
    def caches(self) -> list[str]:
        """Every cache, the lowest mean loss first."""
        return sorted(self.reports[0].nats, key=lambda cache: self.nats(cache).mean)

    def nats(self, cache: str) -> Spread:
        """Per answer token."""
        return spread({report.seed: report.nats[cache] for report in self.reports})

    def retention(self, cache: str) -> Spread:
        """Share of the gap between no question and the student's own cache that this cache closes."""
        return spread({report.seed: report.retention(cache) for report in self.reports})

    def transfer(self, cache: str) -> Spread | None:
        """Nats by which the right question's cache beats another question's, where that was measured."""
        if cache == "own":
            return spread(
                {report.seed: report.nats["another question, own"] - report.nats["own"] for report in self.reports}
            )
        if f"{cache}, another question" not in self.reports[0].nats:
            return None
        return spread({report.seed: report.transfer(cache) for report in self.reports})

    def over_seeds(self, cache: str, other: str) -> PairedDifference:
        """Nats of ``cache`` less those of ``other``, seed by seed."""
        return paired_difference(self.nats(cache).by_seed, self.nats(other).by_seed)

    def over_questions(self, cache: str, other: str) -> tuple[float, float]:
        """95 % of the seeds' mean difference over draws of the questions with replacement."""
        difference = np.mean([np.subtract(report.sums[cache], report.sums[other]) for report in self.reports], axis=0)
        low, high = np.percentile(draw_sums(difference, self.reports[0].tokens), [2.5, 97.5])
        return float(low), float(high)


def graft_seeds_rows(seeds: GraftSeeds) -> list[tuple[str, ...]]:
    """Every cache, the lowest loss first."""
    rows: list[tuple[str, ...]] = []
    for cache in seeds.caches:
        transfer = seeds.transfer(cache)
        rows.append(
            (
                cache,
                _spread_text(seeds.nats(cache)),
                _spread_text(seeds.retention(cache)),
                ", ".join(f"{value:.3f}" for value in seeds.retention(cache).by_seed.values()),
                "" if transfer is None else _spread_text(transfer),
            )
        )
    return rows


def difference_rows(seeds: GraftSeeds) -> list[tuple[str, ...]]:
    """Every projector against the student's own cache and against the control that has tuned the student."""
    rows: list[tuple[str, ...]] = []
    first = seeds.reports[0]
    for cache in first.parameters:
        for other in ("own", CONTROL):
            if other in first.nats and cache != other:
                found = seeds.over_seeds(cache, other)
                rows.append(
                    (
                        cache,
                        other,
                        f"{found.mean:+.3f}",
                        ", ".join(f"{value:+.3f}" for value in found.by_seed.values()),
                        _interval_text(found.interval),
                        _interval_text(seeds.over_questions(cache, other)),
                    )
                )
    return rows


def graft_seeds_table(seeds: GraftSeeds) -> Table:
    """For a terminal."""
    table = Table(title=_title(seeds), title_justify="left")
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in graft_seeds_rows(seeds):
        table.add_row(*row)
    return table


def write_graft_seeds(seeds: GraftSeeds, folder: Path) -> None:
    """``graft.md`` and ``graft.png`` of all seeds."""
    lines = [_title(seeds), "", *markdown_table(_HEADER, graft_seeds_rows(seeds))]
    lines += ["", "Nats against other caches:", "", *markdown_table(_AGAINST, difference_rows(seeds))]
    (folder / "graft.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    nats = {cache: list(seeds.nats(cache).by_seed.values()) for cache in seeds.caches}
    title = f"{graft_title(seeds.reports[0])}, seeds {_numbers(seeds)}: mean, lowest and highest"
    save_caches(nats, title, folder / "graft.png")


def _title(seeds: GraftSeeds) -> str:
    return f"{graft_title(seeds.reports[0])}, seeds {_numbers(seeds)}; mean (standard deviation between seeds)."


def _numbers(seeds: GraftSeeds) -> str:
    return ", ".join(str(report.seed) for report in seeds.reports)


def _spread_text(values: Spread) -> str:
    # The closed forms and the controls are the same for every seed, up to rounding.
    varies = values.deviation is not None and values.deviation >= _SHOWN_DEVIATION
    return f"{values.mean:.3f} ({values.deviation:.3f})" if varies else f"{values.mean:.3f}"


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
