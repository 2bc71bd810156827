"""``kvgraft ablate``: the guide's ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvgraft.cli.shared import AsJson, Overrides, app, console, recipe_at, require_recipe_for, show, whole_numbers


@app.command()
def ablate(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Take real KV from its store; default: synthetic numbers.")
    ] = None,
    overrides: Overrides = None,
    kind: Annotated[
        Literal["keys", "values"] | None, typer.Option(help="With RECIPE: one kind of KV alone; default both.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP", help="width, layer_norm, activation, init, learning_rate, dropout; may be repeated."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Whole numbers between commas or blanks.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Steps of AdamW; the guide takes 40.")] = 40,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step; all where there are fewer.")] = 1024,
    width_divisor: Annotated[
        int | None, typer.Option(help="Synthetic scenario: divide 5120 and 1536 by this. Default 8; the guide 1.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for ablation.json, .md and .png.")] = Path("runs/ablation"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the ablation in the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train adapters that differ in one setting, over several seeds, and put the guide's claims beside ours.

    LayerNorm, activation, initialisation, learning rate, dropout, width, and least squares. Without RECIPE the guide's
    scenario of random targets runs, which is not evidence about real models.

    Quick look: kvgraft ablate --only width --seeds 0 --width-divisor 32
    """
    require_recipe_for(overrides, recipe)
    loaded = None if recipe is None else recipe_at(recipe, overrides)
    from kvgraft.ablate import run_ablations
    from kvgraft.report.ablation import ablation_tables

    report = run_ablations(
        loaded,
        output,
        kind=kind,
        only=only or (),
        seeds=whole_numbers(seeds),
        steps=steps,
        batch_tokens=batch_tokens,
        width_divisor=width_divisor,
        overwrite=overwrite,
    )
    show(report, ablation_tables(report), as_json)
    if not as_json:
        console.print(report.warning, style="yellow", end="\n" if report.warning else "")
        console.print(f"everything is in {output}: ablation.json, ablation.md, ablation.png", soft_wrap=True)
