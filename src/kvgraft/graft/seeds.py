"""``kvgraft graft --seeds``: the same recipe with several seeds, set beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvgraft.errors import RecipeError
from kvgraft.graft.run import graft
from kvgraft.recipe import Recipe
from kvgraft.report.graft_seeds import GraftSeeds, write_graft_seeds


def graft_over_seeds(
    recipe: Recipe, seeds: Sequence[int], folder: Path, *, resume: bool = False, overwrite: bool = False
) -> GraftSeeds:
    """Run :func:`kvgraft.graft.run.graft` with each of ``seeds`` into ``folder/seed-N``; ``folder/graft.md`` is of all.

    Stores are shared, and so are the questions. Seeds differ in first weights, dropout, the order of texts, and the
    tokens on which source layers are chosen.

    Args:
        resume: go on with what is there; finished seeds are not run again.
        overwrite: start over, removing what is there.

    Raises:
        RecipeError: fewer than two seeds, or one twice; or as ``graft``.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds must be two or more different numbers, such as 0 1 2; got {list(seeds)}")
    reports = [
        graft(recipe.model_copy(update={"seed": seed}), folder / f"seed-{seed}", resume=resume, overwrite=overwrite)
        for seed in seeds
    ]
    together = GraftSeeds(reports=reports)
    write_graft_seeds(together, folder)
    return together
