"""The arms of a comparison: one recipe with something changed, under a name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvgraft.errors import RecipeError
from kvgraft.recipe.sections import Arm

BASELINE: Final = "baseline"
# KV of another text. What an arm gains that this one gains too is not the teacher's knowledge of the text.
MISMATCHED: Final = "mismatched"
# What the teacher can teach without its KV.
LOGITS: Final = "logits"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
# Each arm is trained with a seed of the comparison's, into a folder of its own.
_SET_BY_THE_COMPARISON = ("arms", "seed", "name")


@dataclass(frozen=True)
class ComparisonArm:
    """One arm.

    Attributes:
        name: of the arm, and of its folder.
        meaning: in words, for a reader of the table.
        trains_as: the recipe's arm that is trained.
        overrides: what it changes in the recipe, each ``a.b=value``.
        control: the arm that has to do worse before a gain counts as the teacher's knowledge; None where the arm takes
            none from the teacher's KV.
    """

    name: str
    meaning: str
    trains_as: Arm = "kv"
    overrides: tuple[str, ...] = ()
    control: str | None = MISMATCHED


KNOWN_ARMS = {
    arm.name: arm
    for arm in (
        ComparisonArm(BASELINE, "cross-entropy alone", BASELINE, control=None),
        ComparisonArm("kv", "with the teacher's KV, as the recipe says"),
        ComparisonArm(MISMATCHED, "control: KV of another text", MISMATCHED, control=None),
        ComparisonArm("shared_objective", "the guide's objective, both sides trained on one loss", "shared_objective"),
        ComparisonArm(LOGITS, "with the teacher's logits instead of its KV", LOGITS, control=None),
        ComparisonArm("kv_logits", "with the teacher's KV and its logits", "kv_logits"),
        ComparisonArm("linear", "linear adapters", overrides=("projector.mlp_ratio=linear",)),
        ComparisonArm("elastic_0.5", "Elastic Bottleneck of ratio 0.5", overrides=("projector.mlp_ratio=0.5",)),
        ComparisonArm("elastic_1.0", "Elastic Bottleneck of ratio 1.0", overrides=("projector.mlp_ratio=1.0",)),
        ComparisonArm("elastic_2.0", "Elastic Bottleneck of ratio 2.0", overrides=("projector.mlp_ratio=2.0",)),
        ComparisonArm("no_skip", "Elastic Bottleneck without the linear skip", overrides=("projector.skip=false",)),
        ComparisonArm("no_layer_norm", "adapters without LayerNorm", overrides=("projector.layer_norm=false",)),
        ComparisonArm("shared_adapters", "one adapter for all layers", overrides=("projector.sharing=shared",)),
        ComparisonArm("per_layer", "one adapter for each layer", overrides=("projector.sharing=per_layer",)),
        ComparisonArm("trunk", "adapters that share a trunk", overrides=("projector.sharing=trunk",)),
        ComparisonArm("keys_only", "keys alone", overrides=("kv_loss.values_weight=0",)),
        ComparisonArm("values_only", "values alone", overrides=("kv_loss.keys_weight=0",)),
        ComparisonArm("top_layers", "the teacher's top layers", overrides=("alignment.layers=last",)),
        ComparisonArm("causal_tokens", "teacher tokens that end before", overrides=("alignment.tokens=causal",)),
        ComparisonArm("mean_tokens", "mean over teacher tokens", overrides=("alignment.tokens=mean",)),
        ComparisonArm("l1", "absolute error", overrides=("kv_loss.form=l1",)),
        ComparisonArm("smooth_l1", "smooth absolute error", overrides=("kv_loss.form=smooth_l1",)),
        ComparisonArm("cosine", "cosine", overrides=("kv_loss.form=cosine",)),
        ComparisonArm("relational", "relations between tokens", overrides=("kv_loss.objective=relational",)),
        ComparisonArm("falling_weight", "a weight that falls to zero", overrides=("kv_loss.schedule=linear_decay",)),
    )
}


def choose_arms(specifications: Sequence[str], *, controls: bool = True) -> list[ComparisonArm]:
    """The arms that ``specifications`` name, each once, the controls they need first.

    A specification is the name of a known arm, or ``NAME:[KNOWN ARM] a.b=value ...``: a known arm (default ``kv``) with
    fields of the recipe changed.

    Raises:
        RecipeError: an arm that is not known, two of one name, or a change that an arm may not make.
    """
    arms = [read_arm(specification) for specification in specifications]
    named = {arm.name for arm in arms}
    if len(named) < len(arms):
        repeated = sorted({arm.name for arm in arms if sum(arm.name == other.name for other in arms) > 1})
        raise RecipeError(f"two arms are named {', '.join(repeated)}; give each its own name")
    needed = {BASELINE, *(arm.control for arm in arms)} if controls else set()
    if MISMATCHED in needed:
        needed.add(LOGITS)
    return [arm for name, arm in KNOWN_ARMS.items() if name in needed - named] + arms


def read_arm(specification: str) -> ComparisonArm:
    """One arm; see :func:`choose_arms`."""
    name, colon, changes = specification.partition(":")
    if not colon:
        if name not in KNOWN_ARMS:
            raise RecipeError(
                f"there is no arm {name!r}; known: {', '.join(KNOWN_ARMS)}. One of your own: "
                "'wide:projector.mlp_ratio=4.0', changes between blanks"
            )
        return KNOWN_ARMS[name]
    if not _NAME.match(name) or name in KNOWN_ARMS:
        raise RecipeError(
            f"arm {specification!r}: a name of your own must be letters, digits, '.', '_' and '-', and not that of a "
            f"known arm; got {name!r}"
        )
    try:
        words = shlex.split(changes)
    except ValueError as error:
        raise RecipeError(f"arm {specification!r}: {error}") from error
    start = KNOWN_ARMS["kv"] if not words or "=" in words[0] else read_arm(words.pop(0))
    for word in words:
        field = word.partition("=")[0]
        if "=" not in word or field in _SET_BY_THE_COMPARISON:
            raise RecipeError(
                f"arm {specification!r}: expected changes such as projector.mlp_ratio=4.0, of anything but "
                f"{', '.join(_SET_BY_THE_COMPARISON)}; got {word!r}"
            )
    return ComparisonArm(
        name, " ".join([start.name, *words]), start.trains_as, (*start.overrides, *words), start.control
    )
