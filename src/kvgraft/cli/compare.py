"""``kvgraft compare``: arms over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import (
    AsJson,
    Overrides,
    RecipePath,
    SeveralValues,
    app,
    console,
    hide_bars_of_transformers,
    show,
    whole_numbers,
)
from kvgraft.compare.arms import BASELINE, KNOWN_ARMS


@app.command(cls=SeveralValues)
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARM ...",
            help=f"Default: those of RECIPE. Known: {', '.join(KNOWN_ARMS)}. One of your own is NAME:CHANGES, such as "
            "'wide:projector.mlp_ratio=4.0', several changes between blanks, a known arm to start from before them: "
            "'long:baseline training.steps=900'.",
        ),
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(metavar="SEED ...", help="Default 0 1 2. One seed gives no intervals.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME-comparison.")] = None,
    against: Annotated[str, typer.Option(metavar="ARM", help="What the arms are compared with.")] = BASELINE,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Add cross-entropy alone, KV of another text and logits.")
    ] = True,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Run nothing: print one command for each run, for a job array.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Run what is missing, or only compare what is there.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run everything anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train RECIPE with every arm and every seed, and say which arm is better than cross-entropy alone.

    Every arm of a seed starts from the same weights and sees the same batches. Differences are paired by seed, with
    interval, effect size and a p-value corrected for the number of arms. The verdict is "no difference shown" where the
    seeds show none, and "not from the teacher's knowledge" where KV of another text does as well.

    The same command goes on where it was stopped; finished runs are not run again.

    Example: kvgraft compare recipes/quickstart.yaml --arms kv linear 'wide:projector.mlp_ratio=4.0' --seeds 0 1 2

    On a cluster: kvgraft cache RECIPE once, --print-commands > jobs.txt, line N of it as job N, then --no-train.
    """
    from kvgraft.compare.matrix import plan_matrix

    matrix = plan_matrix(
        recipe,
        overrides or (),
        arms=arms or (),
        seeds=whole_numbers(" ".join(seeds or ["0 1 2"])),
        folder=output,
        against=against,
        controls=controls,
    )
    if print_commands:
        for cell in matrix.cells:
            typer.echo(cell.command)
        return
    from kvgraft.compare.run import compare as run_comparison
    from kvgraft.errors import TrainingInterruptedError
    from kvgraft.processes import process_state
    from kvgraft.report.comparison import comparison_tables

    hide_bars_of_transformers()
    try:
        comparison = run_comparison(matrix, train=train, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        console.print(f"{stopped or 'stopped'}; go on with: {matrix.command}", soft_wrap=True)
        raise typer.Exit(130) from stopped
    if process_state().is_main_process:
        show(comparison, comparison_tables(comparison), as_json)
        if not as_json:
            left = "comparison.md, curves.png, a run folder for each cell"
            console.print(f"everything is in {matrix.folder}: {left}", soft_wrap=True)
