"""What a comparison runs: every arm with every seed, each a run with a folder and a command of its own."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvgraft.compare.arms import BASELINE, LOGITS, ComparisonArm, choose_arms
from kvgraft.errors import RecipeError
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.recipe.differences import differences
from kvgraft.recipe.sections import ACROSS_VOCABULARIES

# What a loss is measured on; another makes another scale.
_SAME_FOR_ALL = ("data", "student.model", "student.revision", "student.tokenizer", "student.vocab_size")
# What a student trained without a teacher has too.
_OF_THE_BASELINE = ("student", "training")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: ``arm`` with ``seed``, done by ``command`` into ``folder``."""

    arm: ComparisonArm
    seed: int
    folder: Path
    recipe: Recipe
    command: str


@dataclass(frozen=True)
class Matrix:
    """A comparison that is to be run.

    Attributes:
        against: the arm that the others are compared with.
        cells: in the order in which they run: all arms of a seed, then those of the next. Arms that learn from logits
            come first, so that the pass of a teacher that stores its KV stores these too.
        notes: what a reader has to know of the arms.
        command: runs all of it, and goes on with it.
    """

    recipe: Recipe
    arms: tuple[ComparisonArm, ...]
    seeds: tuple[int, ...]
    against: str
    folder: Path
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    command: str


def plan_matrix(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
    against: str = BASELINE,
    controls: bool = True,
) -> Matrix:
    """Every arm with every seed; reads the recipe and runs nothing.

    Args:
        recipe: a YAML file.
        overrides: changes of every arm, each ``a.b=value``.
        arms: see :func:`kvgraft.compare.arms.choose_arms`; default those of the recipe.
        seeds: each of them once.
        folder: of the comparison, default ``runs/NAME-comparison``; a cell's is ``ARM/seed-SEED`` in it.
        against: the arm that the others are compared with.
        controls: add the arms without which no gain is claimed.

    Raises:
        RecipeError: an arm or a recipe that cannot be run as written, or arms whose losses do not compare.
    """
    base = load_recipe(recipe, list(overrides))
    named = arms or base.arms
    chosen = choose_arms(named, controls=controls)
    folder = folder or Path("runs") / f"{base.name}-comparison"
    _require_distinct(seeds)
    if against not in {arm.name for arm in chosen}:
        raise RecipeError(
            f"the arms {', '.join(arm.name for arm in chosen)} are to be compared with {against}, which is not among "
            "them; add it to --arms, or name one of them with --against"
        )
    kept, notes = _without_repeats(chosen, recipe, overrides, against)
    if LOGITS not in named:
        kept, of_logits = _with_usable_logits(kept, base)
        notes += of_logits
    for arm in kept:
        notes += _notes_on(arm, base, load_recipe(recipe, [*overrides, *arm.overrides]))
    for note in notes:
        logger.warning("%s", note)
    cells = [_cell(arm, seed, recipe, overrides, folder) for seed in seeds for arm in kept]
    return Matrix(
        recipe=base,
        arms=tuple(kept),
        seeds=tuple(seeds),
        against=against,
        folder=folder,
        cells=tuple(sorted(cells, key=lambda cell: (seeds.index(cell.seed), not cell.recipe.stores_log_probs))),
        notes=tuple(notes),
        command=_command(recipe, overrides, arms, seeds, folder, against, controls),
    )


def _with_usable_logits(arms: Sequence[ComparisonArm], recipe: Recipe) -> tuple[list[ComparisonArm], list[str]]:
    """``arms``, the control by logits in a form that the vocabularies of student and teachers allow; a note if so."""
    if LOGITS not in {arm.name for arm in arms} or _logits_can_be_compared(recipe):
        return list(arms), []
    # As in recipes/gsm8k.yaml.
    changes = ["logit_loss.form=chunk_likelihood", "logit_loss.temperature=100", "logit_loss.gradient_share=0.3"]
    if recipe.kv_loss.gradient_share is not None:
        # Of a part that this arm has not; both shares might leave nothing to cross-entropy.
        changes.append("kv_loss.gradient_share=null")
    note = (
        f"{LOGITS}: student and teachers have different vocabularies; this control compares the likelihoods of chunks "
        f"of text ({', '.join(changes)})"
    )
    return [replace(arm, overrides=tuple(changes)) if arm.name == LOGITS else arm for arm in arms], [note]


def _logits_can_be_compared(recipe: Recipe) -> bool:
    if recipe.logit_loss.form in ACROSS_VOCABULARIES:
        return True
    # Imported here, since a mistake in the recipe is told without waiting for them.
    from kvgraft.align.predictions import share_vocabulary
    from kvgraft.models.loading import load_tokenizer
    from kvgraft.prepare import existing_tokenizer

    own = existing_tokenizer(recipe)
    return own is not None and all(
        share_vocabulary(own, load_tokenizer(teacher.model, teacher.revision)) for teacher in recipe.teachers
    )


def _cell(arm: ComparisonArm, seed: int, recipe: Path, overrides: Sequence[str], folder: Path) -> Cell:
    changes = [*overrides, *arm.overrides, f"arms=[{arm.trains_as}]", f"seed={seed}"]
    own_folder = folder / arm.name / f"seed-{seed}"
    words = ["kvgraft", "train", str(recipe), *_options("--set", changes), "--output", str(own_folder), "--resume"]
    return Cell(arm, seed, own_folder, load_recipe(recipe, changes), shlex.join(words))


def _command(
    recipe: Path,
    overrides: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    against: str,
    controls: bool,
) -> str:
    words = ["kvgraft", "compare", str(recipe), *_options("--set", overrides)]
    words += ["--arms", *arms] if arms else []
    words += ["--seeds", *map(str, seeds), "--output", str(folder)]
    words += ["--against", against] if against != BASELINE else []
    return shlex.join(words if controls else [*words, "--no-controls"])


def _options(name: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (name, value)]


def _require_distinct(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"give at least one seed, each once: a repeated seed is no new evidence; got {list(seeds)}")


def _without_repeats(
    arms: Sequence[ComparisonArm], recipe: Path, overrides: Sequence[str], against: str
) -> tuple[list[ComparisonArm], list[str]]:
    """Arms that differ under this recipe, and a note on each that is left out; what others need is never left out."""
    needed = {against, *(arm.control for arm in arms)}
    first: dict[tuple[str, str], ComparisonArm] = {}
    notes = []
    for arm in sorted(arms, key=lambda arm: arm.name not in needed):
        identity = (arm.trains_as, load_recipe(recipe, [*overrides, *arm.overrides]).fingerprint())
        kept = first.setdefault(identity, arm)
        if kept is not arm:
            notes.append(f"{arm.name} is left out: under this recipe it is what {kept.name} is")
    return [arm for arm in arms if arm in first.values()], notes


def _notes_on(arm: ComparisonArm, base: Recipe, changed: Recipe) -> list[str]:
    fields = differences(base, changed)
    other_text = [field for field in fields if any(_is_in(field, part) for part in _SAME_FOR_ALL)]
    if other_text:
        raise RecipeError(
            f"arm {arm.name} changes {', '.join(other_text)}: arms of different data or tokenizers have losses that do "
            "not compare; change it for all arms with --set, or make two comparisons"
        )
    confounded = [
        field
        for field in fields
        if any(_is_in(field, part) for part in _OF_THE_BASELINE) and field != "training.projector_learning_rate"
    ]
    if confounded and arm.trains_as != BASELINE:
        return [
            f"{arm.name} changes {', '.join(confounded)}, which cross-entropy alone could change too: what it gains "
            "may come from that; a baseline with the same change tells"
        ]
    return []


def _is_in(field: str, part: str) -> bool:
    return field == part or field.startswith(f"{part}.")
