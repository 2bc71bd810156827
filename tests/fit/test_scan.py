import pytest
import torch

from kvgraft.align.layers import map_layers
from kvgraft.fit.data import KVRows
from kvgraft.fit.scan import Scan, scan_layers


class MadeUpPairs:
    """Target layer 0 is source layer 2 turned around; target layer 1 is the sum of source layers 1 and 3."""

    def __init__(self, texts: int = 20) -> None:
        generator = torch.Generator().manual_seed(0)
        self.source = torch.randn(texts, 2, 4, 40, 6, generator=generator)
        turn = torch.randn(6, 6, generator=generator)
        target = torch.stack([self.source[:, :, 2] @ turn, self.source[:, :, 1] + 1.1 * self.source[:, :, 3]], 2)
        self.target = target + 0.01 * torch.randn(target.shape, generator=generator)
        self.indices = list(range(texts))

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: list[int]) -> "MadeUpPairs":
        other = MadeUpPairs()
        other.indices = indices
        return other

    def rows(self, limit: int, seed: int = 0) -> KVRows:
        source, target = (
            side[self.indices].permute(1, 2, 0, 3, 4).flatten(2, 3) for side in (self.source, self.target)
        )
        return KVRows(source, target).take(slice(0, limit))


def test_finds_the_layer_that_predicts_and_the_layers_that_add() -> None:
    scan = scan_layers(MadeUpPairs(), sources=2, tokens=500)
    assert scan.best[0] == 2
    assert scan.chosen[1] == [3, 1]
    assert scan.keys_r2[0, 2] > 0.95
    assert scan.keys_r2[0, [0, 1, 3]].max() < 0.3
    assert 0.4 < scan.values_r2[1, 3] < 0.7


def test_never_chooses_more_layers_than_there_are() -> None:
    assert [len(layers) for layers in scan_layers(MadeUpPairs(), sources=9, tokens=300).chosen] == [4, 4]


@pytest.mark.parametrize(
    ("direction", "layer_map", "suggested"),
    [
        # Each of the student's layers 0 and 2 is predicted best by teacher layer 1.
        ("teacher_to_student", [(0, 0), (2, 2)], [(0, 1), (2, 1)]),
        # Both teacher layers are predicted best by student layer 1; student layers 0 and 2 predict layer 3 best.
        ("student_to_teacher", [(0, 0), (1, 0), (2, 3)], [(0, 3), (1, 0), (2, 3)]),
    ],
)
def test_the_suggested_map_is_one_that_a_recipe_takes(direction: str, layer_map: list, suggested: list) -> None:
    r2 = torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.9, 0.2], [0.3, 0.8, 0.4]])[-len(layer_map) :]
    scan = Scan(r2, r2, [[1]] * len(layer_map))
    found = scan.suggested_layers(layer_map, direction)
    assert found == suggested
    assert map_layers(found, 3, 4) == suggested
