from dataclasses import replace

import pytest
import torch

from kvgraft.errors import ProjectorError
from kvgraft.projector.scenario import AblationData, synthetic


def test_synthetic_has_the_guides_statistics() -> None:
    data = synthetic(seed=3)
    assert data.x.shape == (1, 1, 256, 640)
    assert data.y.shape == data.held_out_y.shape == (1, 1, 256, 192)
    assert data.x.mean().item() == pytest.approx(0.15, abs=0.02)
    assert data.x.std().item() == pytest.approx(1.2, abs=0.02)
    assert data.y.var().item() == pytest.approx(1.0, abs=0.03)
    assert data.synthetic
    assert torch.equal(data.x, synthetic(seed=3).x)
    assert not torch.equal(data.x, synthetic(seed=4).x)
    assert not torch.equal(data.x, data.held_out_x)


@pytest.mark.parametrize("width_divisor", [0, -1, 1537])
def test_width_divisor_out_of_range_is_refused(width_divisor: int) -> None:
    with pytest.raises(ProjectorError, match=rf"1 to 1536; got {width_divisor}"):
        synthetic(width_divisor=width_divisor)


def test_standardised_targets_come_in_their_own_units() -> None:
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.1, 30.0])[None, :, None, None], torch.randn(1, 2, 1, 3) * 50
    x, y = torch.randn(1, 2, 40, 4), torch.randn(1, 2, 40, 3)
    data = AblationData(x, y * scale + shift, x[:, :, :9], y[:, :, :9] * scale + shift, "here").standardised()
    torch.testing.assert_close(data.y.mean(2), torch.zeros(1, 2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.y.square().mean((2, 3)), torch.ones(1, 2), atol=1e-4, rtol=1e-4)
    # The held-out tokens are moved by what the fitting tokens say, not by their own.
    torch.testing.assert_close(data.held_out_y, data.y[:, :, :9], atol=1e-3, rtol=1e-3)


def test_constant_targets_stay_finite() -> None:
    x = torch.randn(1, 1, 5, 4)
    data = AblationData(x, torch.full((1, 1, 5, 3), 7.0), x, torch.full((1, 1, 5, 3), 7.0), "here").standardised()
    assert data.y.abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(1, 2, 6, 3)}, "same layers and tokens"),
        ({"x": torch.zeros(2, 2, 5, 4), "y": torch.zeros(2, 2, 5, 3)}, r"must be \[1, layers"),
        ({"held_out_x": torch.zeros(1, 2, 5, 7)}, r"differ in .*\(2, 4, 3\) and \(2, 7, 3\)"),
        ({"held_out_x": torch.zeros(1, 2, 1, 4), "held_out_y": torch.zeros(1, 2, 1, 3)}, "1 tokens"),
        ({"y": torch.full((1, 2, 5, 3), float("nan"))}, "NaN or Inf"),
    ],
)
def test_data_that_does_not_fit_is_refused(changes: dict[str, torch.Tensor], message: str) -> None:
    x, y = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3)
    with pytest.raises(ProjectorError, match=message):
        replace(AblationData(x, y, x, y, "here"), **changes)
