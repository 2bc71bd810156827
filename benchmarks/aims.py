"""What the benchmarks found beside what is aimed at, in one table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Aim:
    """A number in a benchmark's tables, and how large it may or has to be.

    Attributes:
        part: the benchmark.
        row: the beginning of a row, cells between bars.
        column: the header of the number's column.
        limit: in the units of the table.
        at_most: whether it is the most, and not the least.
        what: what the number is, where row and column do not say it.
    """

    part: str
    row: str
    column: str
    limit: float
    at_most: bool
    what: str = ""


SMOLLM2, GEMMA = "SmolLM2-135M", "gemma-3-270m"
ALL, HALF, PLAIN = "all layers over trunk", "lower half over trunk", "plain way over all layers"
RATE, STEP, PRODUCTS = "rate over the plain way", "over cross-entropy alone", "share of product rate"

AIMS = (
    *(Aim("capture", model, ALL, 1.03, True) for model in (SMOLLM2, GEMMA)),
    *(Aim("capture", model, HALF, 0.55, True) for model in (SMOLLM2, GEMMA)),
    Aim("capture", SMOLLM2, PLAIN, 1.4, False),
    Aim("capture", GEMMA, PLAIN, 2.5, False),
    Aim("batches", "buckets", "real tokens", 97, False),
    Aim("store", "write float16", RATE, 0.8, False),
    Aim("caching", "caching", "time over capture alone", 1.05, True),
    *(Aim("store", f"read float16, {state} |", RATE, 0.8, False) for state in ("warm", "cold")),
    *(
        Aim("store", f"{row}, {state}", RATE, 3, False, f"{what}, {state}, over all")
        for row, what in (
            ("a quarter of the layers", "a quarter of the layers"),
            ("a quarter likewise", "a quarter in batches of 8"),
        )
        for state in ("warm", "cold")
    ),
    Aim("fused loss", "0.1 | fused |", "memory over plain", 0.125, True, "dropout 0.1, fused: memory over plain"),
    Aim("fused loss", "0.1 | fused |", "time over plain", 1, True, "dropout 0.1, fused: time over plain"),
    *(
        Aim("fused loss", f"0.1 | {way} |", PRODUCTS, 85, False, f"dropout 0.1, {way}: {PRODUCTS}")
        for way in ("fused", "fused, compiled")
    ),
    Aim("training step", "step, kv |", STEP, 1.25, True, "with KV over cross-entropy alone"),
    Aim("training step", "step, kv, compiled |", STEP, 1.25, True, "with KV, compiled, over the same"),
    Aim("training step", "waiting for a batch", STEP, 2, True, "waiting for a batch, share of a step"),
    *(Aim("logit distillation", loss, "memory", 0.25, True) for loss in ("forward KL", "JSD")),
    *(Aim("logit distillation", loss, "time", 1, True) for loss in ("forward KL", "JSD")),
    Aim("whole run", "teacher in every step", "over the store's", 2, False),
)


def aims_table(tables: Mapping[str, str]) -> str:
    """The aims of the parts in ``tables`` (Markdown, by part) beside what was found; empty if there are none."""
    lines = ["| part | what | measured | aim | met |\n| --- | --- | ---: | ---: | --- |"]
    for aim in AIMS:
        if aim.part not in tables:
            continue
        text = found(tables[aim.part], aim)
        digits = re.match(r"[\d.]+", text.replace(",", ""))
        number = float(digits[0]) if digits else None
        met = number is not None and (number <= aim.limit if aim.at_most else number >= aim.limit)
        what = aim.what or f"{aim.row.strip(' |').replace(' |', ',')}: {aim.column}"
        bound = f"{'at most' if aim.at_most else 'at least'} {aim.limit:g}{'%' if '%' in text else ''}"
        shown = text.split(" ")[0] or "not measured"
        lines.append(f"| {aim.part} | {what} | {shown} | {bound} | {'yes' if met else '**no**'} |")
    return "\n".join(lines) if len(lines) > 1 else ""


def found(table: str, aim: Aim) -> str:
    """The cell that ``aim`` is about; empty where the table lacks it."""
    header: list[str] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if aim.column in cells:
            header = cells
        elif header and line.startswith(f"| {aim.row}") and len(cells) == len(header):
            return cells[header.index(aim.column)]
    return ""
