"""Parameters of every way of sharing are those of a projector that is built so."""

from __future__ import annotations

import pytest

from kvgraft import KVDimensionProjector
from kvgraft.projector.settings import Sharing
from kvgraft.projector.sharing import parameters_by_sharing

TEACHERS = {"teacher": {"d_model": 8, "num_layers": 4}}


@pytest.mark.parametrize("sharing", ["shared", "per_layer", "grouped", "trunk"])
def test_counts_are_those_of_a_projector_built_so(sharing: Sharing) -> None:
    own = KVDimensionProjector(TEACHERS, 6, 2.0, sharing="per_layer", num_groups=2, skip=True)
    built = KVDimensionProjector(TEACHERS, 6, 2.0, sharing=sharing, num_groups=2, skip=True)
    assert parameters_by_sharing(own)[sharing] == sum(weight.numel() for weight in built.parameters())


def test_sharing_takes_fewer_parameters() -> None:
    counts = parameters_by_sharing(KVDimensionProjector(TEACHERS, 6, 2.0, num_groups=2, skip=True))
    assert counts["shared"] < counts["grouped"] < counts["trunk"] < counts["per_layer"]
