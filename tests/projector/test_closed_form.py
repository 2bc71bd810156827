import pytest
import torch
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.processes import process_state
from kvgraft.projector.closed_form import DEFAULT_RIDGE, LeastSquares, choose_ridge, solve_with_chosen_ridge


def sample(rows: int = 60, layers: int = 2, width: int = 7, out: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, layers, rows, width)
    y = x @ torch.randn(layers, width, out) + 2 + 0.3 * torch.randn(4, layers, rows, out)
    mask = torch.rand(4, rows) < 0.8
    return x, y, mask


def lstsq(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.lstsq of rows with a constant column: weight [out, in], bias [out]."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(design, y.double()).solution
    return solution[:-1].T, solution[-1]


def fit(x: Tensor, y: Tensor, mask: Tensor, ridge: float, num_layers: int | None = None) -> tuple[Tensor, Tensor]:
    solver = LeastSquares(num_layers or x.shape[1], x.shape[3], y.shape[3])
    solver.add(x, y, mask)
    return solver.solve(ridge)


def squared_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    predicted = torch.einsum("blti,loi->blto", x.double(), weight) + bias[:, None]
    return float((predicted - y.double()).square().mean())


def test_equals_lstsq() -> None:
    x, y, mask = sample()
    weight, bias = fit(x, y, mask, ridge=0)
    for layer in range(2):
        expected = lstsq(x[:, layer][mask], y[:, layer][mask])
        torch.testing.assert_close((weight[layer], bias[layer]), expected, atol=1e-6, rtol=1e-6)


def test_shared_map_takes_the_tokens_of_all_layers() -> None:
    x, y, mask = sample()
    weight, bias = fit(x, y, mask, ridge=0, num_layers=1)
    rows_x, rows_y = (tensor.transpose(1, 2)[mask].flatten(0, 1) for tensor in (x, y))
    torch.testing.assert_close((weight[0], bias[0]), lstsq(rows_x, rows_y), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_streaming_equals_one_pass(ridge: float) -> None:
    x, y, mask = sample()
    x[..., 0] = x[..., 0] * 0.01 + 1000  # a mean that dwarfs the spread
    streamed = LeastSquares(2, 7, 3)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        streamed.add(x[:, :, part], y[:, :, part], mask[:, part])
    streamed.add(x, y, torch.zeros_like(mask))
    torch.testing.assert_close(streamed.solve(ridge), fit(x, y, mask, ridge), atol=1e-6, rtol=1e-6)


def test_padding_does_not_count_even_if_not_finite() -> None:
    x, y, mask = sample()
    expected = fit(x, y, mask, ridge=0)
    x.transpose(1, 2)[~mask] = float("nan")
    torch.testing.assert_close(fit(x, y, mask, ridge=0), expected)


def test_ridge_is_the_textbook_one_on_standardised_inputs() -> None:
    x, y, mask = sample(layers=1)
    weight, bias = fit(x, y, mask, ridge=0.5)
    rows_x, rows_y = x[:, 0][mask].double(), y[:, 0][mask].double()
    deviation = rows_x.std(0, unbiased=False)
    standard = (rows_x - rows_x.mean(0)) / deviation
    gram = standard.T @ standard / len(standard) + 0.5 * torch.eye(7)
    expected = torch.linalg.solve(gram, standard.T @ (rows_y - rows_y.mean(0)) / len(standard)) / deviation[:, None]
    torch.testing.assert_close(weight[0], expected.T, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(weight[0] @ rows_x.mean(0) + bias[0], rows_y.mean(0), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_rank_deficient_input_predicts_as_well(ridge: float) -> None:
    x, y, mask = sample()
    repeated = torch.cat([x, x[..., :4] + x[..., 1:5], torch.full_like(x[..., :1], 3.7)], -1)
    weight, bias = fit(repeated, y, mask, ridge)
    assert torch.isfinite(weight).all()
    assert weight.abs().max() < 100
    plain = squared_error(x, y, *fit(x, y, mask, ridge))
    assert squared_error(repeated, y, weight, bias) == pytest.approx(plain, rel=1e-3)


def test_fewer_tokens_than_channels_stay_finite() -> None:
    x, y, _ = sample(rows=3)
    one = torch.zeros(4, 3, dtype=torch.bool)
    one[0, 0] = True
    weight, bias = fit(x, y, one, ridge=0)
    torch.testing.assert_close(weight, torch.zeros_like(weight))
    torch.testing.assert_close(bias, y[0, :, 0].double())


def test_outlier_channel_does_not_drown_the_others() -> None:
    x, y, mask = sample()
    loud = x.clone()
    loud[..., 0] *= 1e5
    weight, bias = fit(loud, y, mask, ridge=1e-3)
    expected_weight, expected_bias = fit(x, y, mask, ridge=1e-3)
    expected_weight[..., 0] /= 1e5
    torch.testing.assert_close((weight, bias), (expected_weight, expected_bias), atol=1e-5, rtol=1e-4)


def test_errors_name_what_is_wrong() -> None:
    x, y, mask = sample()
    solver = LeastSquares(2, 7, 3)
    with pytest.raises(ProjectorError, match="no token"):
        solver.solve()
    with pytest.raises(ProjectorError, match="x must be"):
        solver.add(x[..., :5], y, mask)
    with pytest.raises(ProjectorError, match="y must be"):
        solver.add(x, y[:, :1], mask)
    with pytest.raises(ProjectorError, match="mask must be"):
        solver.add(x, y, mask[:, :5])
    y[0, 1] = float("inf")
    with pytest.raises(ProjectorError, match="y of layer 1"):
        solver.add(x, y, torch.ones_like(mask))
    solver = LeastSquares(2, 7, 3)
    solver.add(x, x[..., :3], mask)
    with pytest.raises(ProjectorError, match="ridge"):
        solver.solve(-1.0)


def test_weights_count_like_repeated_tokens() -> None:
    x, y = torch.randn(1, 2, 30, 4), torch.randn(1, 2, 30, 3)
    times = torch.randint(0, 4, (30,))
    mask = torch.ones(1, 30, dtype=torch.bool)
    weighted, repeated = LeastSquares(2, 4, 3), LeastSquares(2, 4, 3)
    for half in (slice(0, 15), slice(15, 30)):
        weights = times[half].float().expand(1, 2, 15)
        weighted.add(x[:, :, half], y[:, :, half], mask[:, half], weights)
    again = [tensor.repeat_interleave(times, 2) for tensor in (x, y)]
    repeated.add(*again, torch.ones(1, int(times.sum()), dtype=torch.bool))
    for one, other in zip(weighted.solve(0.01), repeated.solve(0.01), strict=True):
        torch.testing.assert_close(one, other)


def test_merging_equals_adding() -> None:
    x, y, mask = torch.randn(1, 2, 40, 4) + 50, torch.randn(1, 2, 40, 3), torch.ones(1, 40, dtype=torch.bool)
    whole, first, second = (LeastSquares(2, 4, 3) for _ in range(3))
    whole.add(x, y, mask)
    first.add(x[:, :, :25], y[:, :, :25], mask[:, :25])
    second.add(x[:, :, 25:], y[:, :, 25:], mask[:, 25:])
    first.merge(second)
    for one, other in zip(first.solve(), whole.solve(), strict=True):
        torch.testing.assert_close(one, other)


def test_r2_from_moments_is_r2_from_tokens() -> None:
    x, y, mask = torch.randn(1, 2, 200, 4) * 3 + 7, torch.randn(1, 2, 200, 3), torch.ones(1, 200, dtype=torch.bool)
    y = y + x[..., :3]
    fit, other = LeastSquares(2, 4, 3), LeastSquares(2, 4, 3)
    fit.add(x[:, :, :100], y[:, :, :100], mask[:, :100])
    other.add(x[:, :, 100:], y[:, :, 100:], mask[:, 100:])
    weight, bias = fit.solve(0.1)
    rows = y[0, :, 100:].double()
    predicted = torch.einsum("lti,loi->lto", x[0, :, 100:].double(), weight) + bias[:, None]
    spread = (rows - rows.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(other.r2(weight, bias), 1 - (predicted - rows).square().sum((1, 2)) / spread)


def test_the_chosen_ridge_is_the_best_on_held_out_tokens_for_each_map() -> None:
    torch.manual_seed(0)
    fit, other = LeastSquares(2, 20, 2), LeastSquares(2, 20, 2)
    x, noise = torch.randn(1, 2, 330, 20), torch.randn(1, 2, 330, 2)
    # Layer 0 is noise, where only a strong penalty helps; layer 1 is exactly linear.
    y = torch.cat([noise[:, :1], x[:, 1:] @ torch.randn(20, 2)], 1)
    fit.add(x[:, :, :30], y[:, :, :30], torch.ones(1, 30, dtype=torch.bool))
    other.add(x[:, :, 30:], y[:, :, 30:], torch.ones(1, 300, dtype=torch.bool))
    chosen = choose_ridge(fit, other, (1e-6, 1e-2, 10.0))
    assert chosen.tolist() == [10.0, 1e-6]
    best = other.r2(*fit.solve(chosen))
    for ridge in (1e-6, 1e-2, 10.0):
        assert bool((other.r2(*fit.solve(ridge)) <= best + 1e-12).all())


def test_sums_on_an_accelerator_give_the_same_map(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of use where there is one, as in tests/test_on_accelerator.py, whose device has float64 then.
    monkeypatch.setenv("IMAGINED_FLOAT64", "1")
    maps = []
    for device in (torch.device("cpu"), process_state().device):
        sums = [LeastSquares(2, 7, 3, device) for _ in range(2)]
        for each in sums:
            each.add(*(part.to(device) for part in sample()))
        maps.append([part.cpu() for part in solve_with_chosen_ridge(*sums)])
    torch.testing.assert_close(maps[1], maps[0])


def test_without_held_out_tokens_there_is_nothing_to_choose_by() -> None:
    fit = LeastSquares(2, 4, 3)
    fit.add(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3), torch.ones(1, 5, dtype=torch.bool))
    assert choose_ridge(fit, LeastSquares(2, 4, 3)).tolist() == [DEFAULT_RIDGE] * 2


def test_bad_weights_are_refused() -> None:
    fit, mask = LeastSquares(1, 4, 3), torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ProjectorError, match="none negative"):
        fit.add(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 3), mask, -torch.ones(1, 1, 5))


def test_joined_parts_are_added_as_the_inputs_they_make() -> None:
    torch.manual_seed(3)
    parts, y, joined = torch.randn(4, 50, 3) + 5, torch.randn(2, 50, 2), [[2, 0], [0, 3]]
    x = torch.stack([torch.cat([parts[part] for part in chosen], 1) for chosen in joined])
    plain, shared = LeastSquares(2, 6, 2), LeastSquares(2, 6, 2)
    for rows in (slice(0, 30), slice(30, 50), slice(50, 50)):
        plain.add(x[None, :, rows], y[None, :, rows], torch.ones(1, len(x[0, rows]), dtype=torch.bool))
        shared.add_joined(parts[:, rows], joined, y[:, rows])
    for expected, found in zip(plain.solve(1e-3), shared.solve(1e-3), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(shared.r2(*shared.solve()), plain.r2(*plain.solve()))


def test_joined_parts_that_do_not_fit_are_refused() -> None:
    solver = LeastSquares(2, 6, 2)
    with pytest.raises(ProjectorError, match=r"2 maps of 6 to 2 do not go with 2 inputs of width \[3, 6\]"):
        solver.add_joined(torch.randn(4, 5, 3), [[0, 1], [2]], torch.randn(2, 5, 2))
    broken = torch.randn(4, 5, 3)
    broken[3, 2, 1] = float("inf")
    with pytest.raises(ProjectorError, match="x of layer 1 has NaN or Inf"):
        solver.add_joined(broken, [[0, 1], [2, 3]], torch.randn(2, 5, 2))
