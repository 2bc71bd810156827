"""What an ablation leaves for people: tables, a picture, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from kvgraft.projector.ablation import CONVERGENCE_RULE, Ablation, ArmResult, Measure, measure_of
from kvgraft.projector.scenario import SYNTHETIC_WARNING
from kvgraft.projector.verdicts import Judgement
from kvgraft.report.plots import set_title

ABLATION_FILES = ("ablation.json", "ablation.md", "ablation.png")
CLAIM_COLUMNS = ("claim", "guide", "measured", "verdict", "why")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#555555")
_GROUPS_IN_A_ROW = 3
_VERDICT_STYLES = {"reproduced": "green", "not reproduced": "red", "not comparable": "yellow"}

Column = tuple[str, Callable[[Ablation, ArmResult], str]]


class AblationReport(BaseModel):
    """What ``ablation.json`` holds; ``warning`` is empty for real KV."""

    warning: str
    convergence_rule: str
    ablation: Ablation
    claims: list[Judgement]


def ablation_report(ablation: Ablation, claims: list[Judgement]) -> AblationReport:
    """Measurements and claims, with what a reader has to know of them."""
    warning = SYNTHETIC_WARNING if ablation.synthetic else ""
    return AblationReport(warning=warning, convergence_rule=CONVERGENCE_RULE, ablation=ablation, claims=claims)


def ablation_tables(report: AblationReport) -> list[Table]:
    """One table for each group, and the guide's claims."""
    ablation = report.ablation
    tables = []
    for group, names in ablation.groups.items():
        table = Table(
            title=f"{group} ({_setting(ablation)})", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column("arm", overflow="fold")
        for label, _ in COLUMNS:
            table.add_column(label, justify="right", overflow="fold")
        for row in group_rows(ablation, names):
            table.add_row(*row)
        tables.append(table)
    tables[-1].caption = legend(ablation)
    return [*tables, claims_table(report.claims)]


def claims_table(claims: Sequence[Judgement]) -> Table:
    """The guide's claims beside ours."""
    table = Table(title="what the guide claims", title_justify="left")
    for column in CLAIM_COLUMNS:
        table.add_column(column)
    for claim in claims:
        verdict = Text(claim.verdict, style=_VERDICT_STYLES[claim.verdict])
        table.add_row(claim.claim, claim.guide, claim.measured, verdict, claim.why)
    return table


def group_rows(ablation: Ablation, names: Sequence[str]) -> list[list[str]]:
    """One row of cells for each arm in ``names``: its name, then :data:`COLUMNS`."""
    results = [result for name in names for result in ablation.arms if result.name == name]
    return [[result.name, *(cell(ablation, result) for _, cell in COLUMNS)] for result in results]


def legend(ablation: Ablation) -> str:
    """What the columns mean."""
    return (
        f"Mean over seeds {', '.join(map(str, ablation.seeds))}, deviation between them in brackets. The standard arm "
        "is LayerNorm, SiLU, xavier, dropout 0.1, lr 1e-3. Losses: mean squared error without dropout, before the "
        f"first and after the last step; predicting the mean costs {ablation.target_variance:.3g}. Steps: "
        f"{CONVERGENCE_RULE} (how many seeds got there, where not all). Time: processor time of a step, Linear = "
        "1. Dead: hidden units that give 0 on every token."
    )


def ablation_markdown(report: AblationReport) -> str:
    """The tables of :func:`ablation_tables` in Markdown."""
    ablation = report.ablation
    lines = [f"# Ablations: {ablation.source}", "", _setting(ablation), ""]
    lines += [f"**{report.warning}**", ""] if report.warning else []
    for group, names in ablation.groups.items():
        lines += [f"## {group}", "", *_markdown_table(["arm", *(label for label, _ in COLUMNS)], right=len(COLUMNS))]
        lines += [f"| {' | '.join(row)} |" for row in group_rows(ablation, names)]
        lines.append("")
    lines += [legend(ablation), "", "## What the guide claims", "", *_markdown_table(CLAIM_COLUMNS)]
    for claim in report.claims:
        lines.append(f"| {claim.claim} | {claim.guide} | {claim.measured} | {claim.verdict} | {claim.why} |")
    return "\n".join([*lines, ""])


def save_ablation_plot(ablation: Ablation, path: Path) -> None:
    """Training loss over steps (above) and held-out loss (below) of every group, as a PNG.

    Lines and bars are means over seeds; bands and whiskers reach from the lowest to the highest.
    """
    groups = ablation.groups
    columns = min(_GROUPS_IN_A_ROW, len(groups))
    rows = 2 * -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns + 1, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, (group, names) in enumerate(groups.items()):
        row, column = 2 * (index // columns), index % columns
        results = [result for name in names for result in ablation.arms if result.name == name]
        _draw_training(axes[row, column], ablation, results, group)
        _draw_held_out(axes[row + 1, column], ablation, results)
    for axis in figure.axes:
        axis.set_visible(axis.has_data())
    note = "\nrandom targets: not evidence about real models" if ablation.synthetic else ""
    set_title(figure, f"{ablation.source}\n{_setting(ablation)}{note}")
    figure.savefig(path, dpi=100)


def write_ablation(report: AblationReport, folder: Path) -> None:
    """Write :data:`ABLATION_FILES` into ``folder``, which is created where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown, picture = (folder / name for name in ABLATION_FILES)
    as_json.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    as_markdown.write_text(ablation_markdown(report), encoding="utf-8")
    save_ablation_plot(report.ablation, picture)


def _draw_training(axes: Axes, ablation: Ablation, results: Sequence[ArmResult], group: str) -> None:
    for colour, result in zip(_COLOURS, results, strict=False):
        curves = list(zip(*(run.curve for run in result.runs), strict=True))
        if curves:
            axes.plot([mean(losses) for losses in curves], color=colour, label=result.name)
            lows, highs = ([pick(losses) for losses in curves] for pick in (min, max))
            axes.fill_between(range(len(curves)), lows, highs, color=colour, alpha=0.2, linewidth=0)
        else:
            loss = mean(run.final_loss for run in result.runs)
            # A closed form can fit to the last bit, and a logarithmic axis must not stretch to that.
            if loss > 1e-4 * ablation.target_variance:
                axes.axhline(loss, color=colour, label=result.name, linestyle="--")
    axes.axhline(ablation.target_variance, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(title=group, xlabel="step", ylabel="training loss (with dropout)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_held_out(axes: Axes, ablation: Ablation, results: Sequence[ArmResult]) -> None:
    losses = [[run.held_out_loss for run in result.runs] for result in results]
    heights = [mean(found) for found in losses]
    spread = [
        [height - min(found) for height, found in zip(heights, losses, strict=True)],
        [max(found) - height for height, found in zip(heights, losses, strict=True)],
    ]
    axes.barh([result.name for result in results], heights, xerr=spread, color=_COLOURS[: len(results)], capsize=3)
    axes.axvline(ablation.target_variance, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("held-out loss (dotted: predicting the mean)")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")


def _setting(ablation: Ablation) -> str:
    layers = f"{ablation.num_layers} layers, " if ablation.num_layers > 1 else ""
    return (
        f"{layers}{ablation.in_dim} to {ablation.out_dim}, {ablation.tokens:,} tokens, {ablation.held_out_tokens:,} "
        f"held out, {ablation.steps} steps of {ablation.batch_tokens:,}"
    )


def _markdown_table(columns: Sequence[str], right: int = 0) -> list[str]:
    marks = ["---"] * (len(columns) - right) + ["---:"] * right
    return [f"| {' | '.join(columns)} |", f"| {' | '.join(marks)} |"]


def _parameters(ablation: Ablation, result: ArmResult) -> str:
    return f"{result.runs[0].parameters:,}"


def _steps(ablation: Ablation, result: ArmResult) -> str:
    if not result.runs[0].curve:
        return "-"
    reached = measure_of([run.steps for run in result.runs if run.steps is not None])
    if reached is None:
        return f"not in {ablation.steps}"
    count = sum(run.steps is not None for run in result.runs)
    return _with_deviation(reached, ".0f") + (f", {count} of {len(result.runs)}" if count < len(result.runs) else "")


def _measured(field: str, form: str) -> Callable[[Ablation, ArmResult], str]:
    return lambda ablation, result: _with_deviation(result.measure(field), form)


def _with_deviation(measure: Measure | None, form: str) -> str:
    if measure is None:
        return "-"
    return f"{measure.mean:{form}}" + ("" if measure.deviation is None else f" ({measure.deviation:{form}})")


COLUMNS: tuple[Column, ...] = (
    ("parameters", _parameters),
    ("first loss", _measured("first_loss", ".3f")),
    ("final loss", _measured("final_loss", ".3f")),
    ("held-out loss", _measured("held_out_loss", ".3f")),
    ("held-out R2", _measured("held_out_r2", ".3f")),
    ("steps", _steps),
    ("time", lambda ablation, result: _with_deviation(ablation.relative_time(result), ".1f")),
    ("dead", _measured("dead_units", ".1%")),
)
