"""``kvgraft evaluate``: measure a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import AsJson, app, console, hide_bars_of_transformers, show


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `kvgraft train` wrote.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="quality, similarity, gsm8k, tasks; may be repeated. Default: all."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Problems in GSM8K's form. Default: RUN's held-out text.")
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many problems.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved training problems before each question.")] = 0,
    calculator: Annotated[
        bool, typer.Option("--calculator", help="Work out every <<48/2= that a student writes.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer. Default 256, or half the context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems answered together.")] = 16,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, such as arc_easy,kvgraft_word_problems.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task. Default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to. Default: RUN/evaluation.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the saved students of RUN: held-out quality, KV beside the teacher's, exact match, tasks of lm-eval.

    Quick look: kvgraft evaluate RUN --only gsm8k --problems 20
    """
    from kvgraft.evaluate.gsm8k import AnswerSettings
    from kvgraft.evaluate.run import EvaluationSettings
    from kvgraft.evaluate.run import evaluate as evaluate_run
    from kvgraft.report.evaluation import EVALUATION_FOLDER, evaluation_tables

    hide_bars_of_transformers()
    settings = EvaluationSettings(
        only=only or (),
        data=data,
        problems=problems,
        answers=AnswerSettings(shots, calculator, max_new_tokens, batch_size),
        tasks=[name for name in (tasks or "").split(",") if name],
        task_limit=task_limit,
    )
    report = evaluate_run(run_folder, settings, output)
    show(report, evaluation_tables(report), as_json)
    if not as_json:
        console.print(f"everything is in {output or run_folder / EVALUATION_FOLDER}", soft_wrap=True)
