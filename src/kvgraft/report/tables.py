"""The table of a run, for a terminal and for a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from kvgraft.evaluate.statistics import Spread
from kvgraft.migration import Migration
from kvgraft.plan import Forecast, ModelPlan, Plan, TextPlan
from kvgraft.report.results import ArmResult, RunResult

Row = tuple[str, list[str]]


def result_table(result: RunResult) -> Table:
    """Everything a reader asks of a run, one column for each arm."""
    table = Table(title=f"{result.name}: what it bought", title_justify="left")
    table.add_column("")
    for arm in result.arms:
        table.add_column(arm.arm, justify="right")
    for label, cells in arm_rows(result):
        table.add_row(label, *cells)
    return table


def cost_table(result: RunResult) -> Table:
    """What the teachers' KV and each phase cost."""
    table = Table(title=f"{result.name}: what it cost", title_justify="left")
    table.add_column("")
    table.add_column("measured", justify="right")
    for label, value in cost_rows(result):
        table.add_row(label, value)
    return table


# Characters of a text in a table, from its beginning and from its end.
_SHOWN = 200


def plan_tables(plan: Plan) -> list[Table]:
    """Models, and what each teacher takes."""
    models = Table(title=f"{plan.name}: models", title_justify="left")
    models.add_column("")
    planned = [*([plan.student] if plan.student else []), *(teacher.model for teacher in plan.teachers)]
    for model in planned:
        models.add_column(model.name, justify="right")
    models.add_row("architecture", *(model.architecture for model in planned))
    models.add_row("parameters", *(f"{model.parameters:,}" for model in planned))
    models.add_row("num_layers", *(_layers_text(model) for model in planned))
    for field in ("num_kv_heads", "head_dim", "kv_dim", "hidden_size", "vocab_size", "context"):
        sizes = (getattr(model, field) for model in planned)
        models.add_row(field, *("-" if size is None else f"{size:,}" for size in sizes))
    tables = [models]
    for teacher in plan.teachers:
        table = Table(title=f"teacher {teacher.model.name}", title_justify="left", show_header=False)
        table.add_row("layers (student <- teacher)", ", ".join(f"{s} <- {t}" for s, t in teacher.layer_map))
        table.add_row("adapters", f"2 of {teacher.adapter_parameters:,} parameters, mlp_ratio {teacher.mlp_ratio}")
        table.add_row(
            "KV on disk", f"{teacher.kv_bytes_per_token:,} bytes a token, {size_text(teacher.kv_bytes)} in all"
        )
        table.add_row("advice", f"mlp_ratio {teacher.advised_mlp_ratio}, dropout {teacher.advised_dropout}")
        for reason in teacher.reasons:
            table.add_row("", reason)
        tables.append(table)
    total = Table(title="in all", title_justify="left", show_header=False)
    total.add_row("texts", f"{plan.train_texts:,} to train on, {plan.held_out_texts:,} held out")
    total.add_row("memory, activations aside", size_text(plan.training_memory_bytes))
    total.add_row("disk for KV", f"{size_text(plan.store_bytes)} of {size_text(plan.free_disk_bytes)} free")
    tables += [] if plan.first_text is None else [_text_table(plan.first_text)]
    return [*tables, total, *([] if plan.forecast is None else [_forecast_table(plan.forecast)])]


def _layers_text(model: ModelPlan) -> str:
    if model.num_layers == model.depth:
        return f"{model.depth:,}"
    return f"{model.num_layers} with KV of {model.depth}: {', '.join(map(str, model.kv_layers))}"


def _text_table(text: TextPlan) -> Table:
    table = Table(title="first text to train on", title_justify="left", show_header=False)
    for name, part in (("prompt", text.prompt), ("completion" if text.prompt else "text", text.completion)):
        if part:
            shown = part if len(part) <= 2 * _SHOWN else f"{part[:_SHOWN]} ... {part[-_SHOWN:]}"
            # Quoted, so that line breaks and spaces at the ends are seen.
            table.add_row(name, repr(shown))
    return table


def _forecast_table(forecast: Forecast) -> Table:
    table = Table(
        title=f"as `kvgraft train` will take here, by a calibration of {forecast.calibration_seconds:,.0f} s",
        title_justify="left",
        show_header=False,
    )
    table.add_row("disk", size_text(forecast.store_bytes))
    table.add_row("peak memory", size_text(forecast.peak_memory.host_bytes))
    if forecast.peak_memory.device_bytes:
        table.add_row("peak memory of the accelerator", size_text(forecast.peak_memory.device_bytes))
    for phase, seconds in forecast.seconds.items():
        table.add_row(f"time: {phase}", f"{seconds:,.1f} s")
    table.add_row("time in all", f"{forecast.total_seconds:,.0f} s")
    return table


def migration_table(migration: Migration, folder: Path) -> Table:
    """What became of an old checkpoint, and that nothing was lost."""
    table = Table(title=f"migrated to {folder}", title_justify="left", show_header=False)
    for teacher in migration.teachers:
        table.add_row(teacher.name, f"{teacher.width} -> {migration.student_width}, {teacher.num_layers} layers")
    table.add_row("parameters", f"{migration.old_parameters:,} -> {migration.new_parameters:,}")
    table.add_row("largest difference at step 0", f"{migration.largest_difference:.1e}")
    return table


def markdown(result: RunResult) -> str:
    """Both tables in Markdown."""
    names = [arm.arm for arm in result.arms]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in arm_rows(result)]
    lines += ["", "| | measured |", "| --- | ---: |"]
    lines += [f"| {label} | {value} |" for label, value in cost_rows(result)]
    return "\n".join(lines) + "\n"


def arm_rows(result: RunResult) -> list[Row]:
    """Labels and one cell for each arm."""
    baseline = result.arm("baseline")
    rows: list[Row] = [
        _row(result, "held-out loss before", lambda arm: f"{arm.first['loss']:.3f}"),
        _row(result, "held-out loss after", lambda arm: f"{arm.last['loss']:.3f}"),
        _row(result, "held-out perplexity before", lambda arm: f"{arm.first['perplexity']:,.1f}"),
        _row(result, "held-out perplexity after", lambda arm: f"{arm.last['perplexity']:,.1f}"),
        _row(result, "held-out bits per byte after", lambda arm: number_text(arm.last.get("bits_per_byte"))),
    ]
    if baseline is not None:
        bar = baseline.last["loss"]
        rows.append(_row(result, "loss against the baseline", lambda arm: f"{arm.last['loss'] - bar:+.3f}"))
        rows.append(_row(result, "steps to the baseline's final loss", lambda arm: _steps(arm, bar)))
    rows += [
        _row(result, "KV loss at the start (held out)", lambda arm: number_text(arm.first.get("kv_loss"))),
        _row(result, "KV loss at the end (held out)", lambda arm: number_text(arm.last.get("kv_loss"))),
        _row(result, "KV loss reduction", lambda arm: number_text(arm.kv_reduction(), ".1%")),
    ]
    if any("logit_loss" in arm.last for arm in result.arms):
        rows.append(
            _row(result, "logit loss at the start (held out)", lambda arm: number_text(arm.first.get("logit_loss")))
        )
        rows.append(
            _row(result, "logit loss at the end (held out)", lambda arm: number_text(arm.last.get("logit_loss")))
        )
    for part, label in (("ce", "cross-entropy's"), ("kv", "KV loss's"), ("logit", "logit loss's")):
        if part == "logit" and not any(part in arm.gradient_shares for arm in result.arms):
            continue
        rows.append(_row(result, f"{label} share of the gradient norm", partial(_share, part=part)))
    rows += [
        _row(result, "student KV deviation, before / after", lambda arm: _before_after(arm, "student_kv_deviation")),
        _row(
            result,
            "student KV effective rank, before / after",
            lambda arm: _before_after(arm, "student_kv_effective_rank"),
        ),
        _row(result, "real tokens of those processed", lambda arm: number_text(arm.real_token_share, ".1%")),
        _row(result, "training time", lambda arm: f"{arm.training_seconds:,.0f} s"),
    ]
    return rows


def cost_rows(result: RunResult) -> list[tuple[str, str]]:
    """Labels and values of what the run cost."""
    rows = [
        ("student parameters", f"{result.student_parameters:,}"),
        ("training texts / tokens", f"{result.train_texts:,} / {result.train_tokens:,}"),
        ("held-out texts", f"{result.held_out_texts:,}"),
        ("training texts cut to the maximum length", f"{result.truncated_train_texts:,}"),
    ]
    if result.started_embeddings is not None:
        rows.append(("student tokens started from a teacher's embeddings", f"{result.started_embeddings:.2%}"))
    for teacher in result.teachers:
        idle = "not run: all KV was stored" if teacher.store_bytes else "run in every step"
        speed = f"{teacher.tokens_per_second:,.0f}" if teacher.tokens_per_second else idle
        rows += [
            (f"{teacher.name}: student tokens aligned", f"{teacher.alignment_coverage:.2%}"),
            (f"{teacher.name}: teacher tokens to each", number_text(teacher.alignment_mean_span, ".2f")),
            (f"{teacher.name}: student tokens without one", dropped_text(teacher.alignment_dropped)),
            (f"{teacher.name}: texts cut", f"{teacher.truncated_texts:,}"),
            (f"{teacher.name}: tokens per second", speed),
            (f"{teacher.name}: store bytes per token", f"{teacher.bytes_per_token:,.0f}"),
            (f"{teacher.name}: store in all", f"{teacher.store_bytes / 1e6:,.1f} MB"),
        ]
    rows += [(f"time: {phase}", f"{seconds:,.1f} s") for phase, seconds in result.seconds.items()]
    if result.peak_memory is not None:
        rows.append(("peak memory", size_text(result.peak_memory.host_bytes)))
        if result.peak_memory.device_bytes:
            rows.append(("peak memory of the accelerator", size_text(result.peak_memory.device_bytes)))
    return rows


def dropped_text(dropped: Mapping[str, int]) -> str:
    """Student tokens that no teacher token answers for, by reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count) or "none"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, all columns but the first to the right."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]


def number_text(value: float | None, form: str = ".3f") -> str:
    """A number as ``form`` has it; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def spread_text(found: Spread, form: str = ".3f") -> str:
    """The mean, and the standard deviation in brackets where there are several values."""
    deviation = "" if found.deviation is None else f" ({found.deviation:{form.lstrip('+')}})"
    return f"{found.mean:{form}}{deviation}"


def size_text(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _row(result: RunResult, label: str, cell: Callable[[ArmResult], str]) -> Row:
    return label, [cell(arm) for arm in result.arms]


def _steps(arm: ArmResult, loss: float) -> str:
    steps = arm.steps_to(loss)
    return f"not in {arm.steps}" if steps is None else f"{steps} ({steps / arm.steps:.0%})"


def _share(arm: ArmResult, part: str) -> str:
    return number_text(arm.gradient_shares.get(part), ".1%")


def _before_after(arm: ArmResult, name: str) -> str:
    return f"{arm.first[name]:.2f} / {arm.last[name]:.2f}"
