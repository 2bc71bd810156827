"""``kvgraft migrate``: from the old linear projector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvgraft.cli.shared import AsJson, app, show


@app.command()
def migrate(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="A .safetensors file, or a torch.saved state dict (.pt, .pth, .bin).")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Folder to create for the new projector.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LAYERS", help="Name of a teacher and layers of its KV; may be repeated."),
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers of every teacher that --teacher leaves out.")] = None,
    mlp_ratio: Annotated[
        str, typer.Option(help="Hidden width over the teacher's: a number, or auto by its width.")
    ] = "1.0",
    dropout: Annotated[float, typer.Option(help="Share of hidden units dropped in training.")] = 0.1,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="One adapter per layer, each from the old map.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of the old linear projector into an Elastic Bottleneck that starts where it stood.

    OLD holds one linear map for keys and one for values per teacher: key_adapters.NAME.weight and
    .bias, value_adapters.NAME.weight and .bias. The map becomes a skip beside a bottleneck whose last layer is zero, so
    that NEW gives the same output until it is trained. Widths are read from OLD, layers of the models that `kvgraft
    plan --guide` lists from their names. Train on with a learning rate of 1e-3 where the linear projector had 1e-4.

    Example: kvgraft migrate old.pt projector --teacher Qwen2-7B=28 --mlp-ratio 0.5

    Then: KVDimensionProjector.from_pretrained("projector")
    """
    from kvgraft.migration import migrate_checkpoint
    from kvgraft.report.tables import migration_table

    ratio = _number_or_auto(mlp_ratio)
    migrated = migrate_checkpoint(
        old, new, teachers=teacher or (), num_layers=num_layers, mlp_ratio=ratio, dropout=dropout, per_layer=per_layer
    )
    show(migrated, [migration_table(migrated, new)], as_json)


def _number_or_auto(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be a number or auto") from error
