"""Which arms a comparison has, from what a user names."""

from typing import get_args

import pytest

from kvgraft.compare.arms import KNOWN_ARMS, choose_arms
from kvgraft.errors import RecipeError
from kvgraft.recipe import Arm


def names(*specifications: str, controls: bool = True) -> list[str]:
    return [arm.name for arm in choose_arms(specifications, controls=controls)]


def test_every_arm_of_a_recipe_is_known() -> None:
    assert set(get_args(Arm)) <= set(KNOWN_ARMS)
    for name, arm in KNOWN_ARMS.items():
        assert arm.name == name
        assert arm.control is None or KNOWN_ARMS[arm.control].control is None


def test_controls_come_unless_told_otherwise() -> None:
    assert names("kv", "linear") == ["baseline", "mismatched", "logits", "kv", "linear"]
    assert names("kv", "baseline") == ["mismatched", "logits", "kv", "baseline"]
    assert names("kv", "logits") == ["baseline", "mismatched", "kv", "logits"]
    assert names("kv", "baseline", controls=False) == ["kv", "baseline"]
    # Nothing here takes knowledge from the teacher, so nothing needs the other controls.
    assert names("long:baseline training.steps=900") == ["baseline", "long"]


def test_an_arm_of_ones_own() -> None:
    (arm,) = choose_arms(["wide:projector.mlp_ratio=4.0"], controls=False)
    assert (arm.trains_as, arm.overrides, arm.control) == ("kv", ("projector.mlp_ratio=4.0",), "mismatched")
    (arm,) = choose_arms(["late:values_only alignment.layers=last kv_loss.weight=3"], controls=False)
    assert arm.overrides == ("kv_loss.keys_weight=0", "alignment.layers=last", "kv_loss.weight=3")
    (arm,) = choose_arms(["long:baseline training.steps=900"], controls=False)
    assert (arm.trains_as, arm.control) == ("baseline", None)
    (arm,) = choose_arms(["spaced:'alignment.layers=[[0, 1]]'"], controls=False)
    assert arm.overrides == ("alignment.layers=[[0, 1]]",)


@pytest.mark.parametrize(
    ("specifications", "message"),
    [
        (["elastic"], r"no arm 'elastic'; known: baseline, kv, .*wide:projector\.mlp_ratio=4\.0"),
        (["kv", "kv"], "two arms are named kv"),
        (["kv:projector.dropout=0"], "not that of a known arm; got 'kv'"),
        (["a/b:projector.dropout=0"], "got 'a/b'"),
        (["own:seed=3"], "of anything but arms, seed, name; got 'seed=3'"),
        (["own:kv projector.dropout"], "got 'projector.dropout'"),
        (["own:'projector.dropout=0"], "No closing quotation"),
    ],
)
def test_what_is_no_arm_is_refused(specifications: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_arms(specifications)
