"""``kvgraft ablate``: from a recipe, or from the guide's synthetic scenario, to tables, a picture and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvgraft.errors import ProjectorError
from kvgraft.fit.data import AblationKind, ablation_data
from kvgraft.projector.ablation import ablate
from kvgraft.projector.claims import judge
from kvgraft.projector.scenario import DEFAULT_WIDTH_DIVISOR, AblationData, synthetic
from kvgraft.recipe import Recipe
from kvgraft.report.ablation import ABLATION_FILES, AblationReport, ablation_report, write_ablation


def run_ablations(
    recipe: Recipe | None,
    folder: Path,
    *,
    kind: AblationKind | None = None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 40,
    batch_tokens: int = 1024,
    width_divisor: int | None = None,
    overwrite: bool = False,
) -> AblationReport:
    """Train the guide's ablations, judge its claims, and write ``ablation.json``, ``.md`` and ``.png`` into ``folder``.

    Args:
        recipe: whose teacher's stored KV is used, in units of its targets; None takes the synthetic scenario.
        kind: of that KV, default keys and values, with adapters of their own.
        only, seeds, steps, batch_tokens: see :func:`kvgraft.projector.ablation.ablate`.
        width_divisor: of the synthetic scenario, default 8; see :func:`kvgraft.projector.scenario.synthetic`.
        overwrite: replace an ablation that is in ``folder``.

    Raises:
        ProjectorError: a setting out of its range, or ``folder`` holds an ablation already.
    """
    present = [name for name in ABLATION_FILES if (folder / name).exists()]
    if (present and not overwrite) or (folder.exists() and not folder.is_dir()):
        raise ProjectorError(
            f"{folder} already holds {', '.join(present) or 'something that is no folder'}; give another --output, or "
            "--overwrite to replace an ablation"
        )
    data_of_seed = _data_of_seed(recipe, kind, width_divisor)
    measured = ablate(data_of_seed, only=only, seeds=seeds, steps=steps, batch_tokens=batch_tokens)
    report = ablation_report(measured, judge(measured))
    write_ablation(report, folder)
    return report


def _data_of_seed(
    recipe: Recipe | None, kind: AblationKind | None, width_divisor: int | None
) -> Callable[[int], AblationData]:
    if recipe is None:
        if kind is not None:
            raise ProjectorError(
                f"--kind {kind} is of the KV of a recipe, and the synthetic scenario has none; give a RECIPE"
            )
        return lambda seed: synthetic(seed, DEFAULT_WIDTH_DIVISOR if width_divisor is None else width_divisor)
    if width_divisor is not None:
        raise ProjectorError(
            f"--width-divisor {width_divisor} is of the synthetic scenario, and recipe {recipe.name} brings KV of its "
            "own width; leave one of them out"
        )
    data = ablation_data(recipe, kind).standardised()
    return lambda seed: data
