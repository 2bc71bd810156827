"""The KV losses against plain references, and what must not reach them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvgraft.distill.losses import KVScale, compute_kv_loss, kv_regression_loss
from kvgraft.errors import KVGraftError
from kvgraft.kv import KV

BATCH, LAYERS, TOKENS, WIDTH = 2, 3, 5, 4


def pair(seed: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, BATCH, LAYERS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return keys, values


def mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()


def reference(form: str, predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], weights: tuple[float, float]):
    """Loops over every real token, layer and side; scaled by the target's centre and spread over real tokens."""
    total = 0.0
    real = [(b, t) for b in range(BATCH) for t in range(TOKENS) if mask()[b, t]]
    for side in range(2):
        for layer in range(LAYERS):
            rows = torch.stack([target[side][b, layer, t] for b, t in real])
            centre, deviation = rows.mean(0), rows.var(0, unbiased=False).mean().sqrt()
            for b, t in real:
                p = (predicted[side][b, layer, t] - centre) / deviation
                q = (target[side][b, layer, t] - centre) / deviation
                error = {
                    "mse": lambda p=p, q=q: ((p - q) ** 2).mean(),
                    "l1": lambda p=p, q=q: (p - q).abs().mean(),
                    "smooth_l1": lambda p=p, q=q: torch.where(
                        (p - q).abs() < 1, 0.5 * (p - q) ** 2, (p - q).abs() - 0.5
                    ).mean(),
                    "cosine": lambda p=p, q=q: 1 - (p @ q) / (p.norm() * q.norm()),
                }[form]()
                total = total + weights[side] * error / LAYERS
    return total / (sum(weights) * len(real))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("form", ["mse", "l1", "smooth_l1", "cosine"])
def test_every_form_equals_its_reference(form: str, weights: tuple[float, float]) -> None:
    predicted, target = pair(0), pair(1)
    loss = kv_regression_loss(predicted, target, mask(), form=form, keys_weight=weights[0], values_weight=weights[1])
    torch.testing.assert_close(loss, reference(form, predicted, target, weights), atol=1e-6, rtol=1e-5)


def test_predicting_the_mean_costs_one_and_the_target_nothing() -> None:
    target = pair(0)
    scale = KVScale.from_tokens(target, mask())
    centre = tuple(scale.mean[side][None, :, None].expand(BATCH, LAYERS, TOKENS, WIDTH) for side in range(2))
    assert float(kv_regression_loss(centre, target, mask())) == pytest.approx(1, abs=1e-5)
    assert float(kv_regression_loss(target, target, mask())) == 0


def test_masked_tokens_give_no_loss_and_no_gradient_even_if_they_are_nan() -> None:
    keys, values = (tensor.requires_grad_() for tensor in pair(0))
    target = tuple(tensor.masked_fill(~mask()[:, None, :, None], float("nan")) for tensor in pair(1))
    loss = kv_regression_loss((keys, values), target, mask())
    loss.backward()
    assert torch.isfinite(loss)
    for tensor in (keys, values):
        ignored = tensor.grad.transpose(1, 2)[~mask()]
        assert torch.equal(ignored, torch.zeros_like(ignored))
        assert tensor.grad.transpose(1, 2)[mask()].abs().min() > 0


def test_nothing_to_compare_is_zero_with_zero_gradient() -> None:
    keys, values = (tensor.requires_grad_() for tensor in pair(0))
    scale = KVScale.from_tokens(pair(1), mask())
    loss = kv_regression_loss((keys, values), pair(1), torch.zeros_like(mask()), scale=scale)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(keys.grad, torch.zeros_like(keys))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    predicted, target = pair(0), pair(1)
    scale = KVScale.from_tokens(target, mask())
    whole = kv_regression_loss(predicted, target, mask(), scale=scale)
    parts = [
        kv_regression_loss(
            tuple(side[row : row + 1] for side in predicted),
            tuple(side[row : row + 1] for side in target),
            mask()[row : row + 1],
            scale=scale,
            num_tokens=mask().sum(),
        )
        for row in range(BATCH)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_layer_weights() -> None:
    predicted, target = pair(0), pair(1)
    only_second = kv_regression_loss(predicted, target, mask(), layer_weights=[0, 2, 0])
    alone = kv_regression_loss(
        tuple(side[:, 1:2] for side in predicted), tuple(side[:, 1:2] for side in target), mask()
    )
    torch.testing.assert_close(only_second, alone)
    with pytest.raises(KVGraftError, match="3 weights"):
        kv_regression_loss(predicted, target, mask(), layer_weights=[1, 1])


def test_teachers_are_averaged_by_weight() -> None:
    student, first, second = pair(0), pair(1), pair(2)
    losses = [float(compute_kv_loss(student, {"a": target})) for target in (first, second)]
    both = compute_kv_loss(student, {"a": first, "b": second}, teacher_weights={"a": 3.0, "b": 1.0})
    assert float(both) == pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-5)


def test_heads_and_kv_objects_are_taken_too() -> None:
    student, target = pair(0), pair(1)
    with_heads = tuple(side.reshape(BATCH, LAYERS, TOKENS, 2, 2).transpose(2, 3) for side in student)
    positions = torch.arange(TOKENS).expand(BATCH, TOKENS)
    kv = KV(*with_heads, positions, mask(), tuple(range(LAYERS)))
    expected = compute_kv_loss(student, {"a": target}, mask=mask())
    torch.testing.assert_close(compute_kv_loss(with_heads, {"a": target}, mask=mask()), expected)
    # A KV brings its own mask.
    torch.testing.assert_close(compute_kv_loss(kv, {"a": target}), expected)


def test_a_token_counts_where_student_and_teacher_have_one() -> None:
    student, target, seen = pair(0), pair(1), mask()
    heads = [tuple(side[:, :, None] for side in kv) for kv in (student, target)]
    student_kv, aligned = (
        KV(*kv, torch.arange(TOKENS).expand(BATCH, TOKENS), its, tuple(range(LAYERS)))
        for kv, its in zip(heads, (seen | seen.flip(1), seen), strict=True)
    )
    expected = compute_kv_loss(student, {"a": target}, mask=seen)
    # What has no teacher token holds zeros, which are no target.
    torch.testing.assert_close(compute_kv_loss(student, {"a": aligned}), expected)
    torch.testing.assert_close(compute_kv_loss(student_kv, {"a": aligned}), expected)
    both = compute_kv_loss(student_kv, {"a": aligned, "b": target})
    alone = compute_kv_loss(student, {"b": target}, mask=student_kv.mask)
    torch.testing.assert_close(both, (expected + alone) / 2)
    with pytest.raises(KVGraftError, match="teacher 'a' one has rotated keys"):
        compute_kv_loss(replace(student_kv, rotated=True), {"a": aligned})


def test_what_does_not_fit_is_named() -> None:
    keys, values = pair(0)
    with pytest.raises(KVGraftError, match=r"\[2, 3, 5, 4\].*\[2, 2, 5, 4\]"):
        kv_regression_loss((keys, values), (keys[:, :2], values[:, :2]), mask())
    with pytest.raises(KVGraftError, match=r"keys .* values .* differ in shape"):
        kv_regression_loss((keys, values[:, :2]), (keys, values), mask())
    with pytest.raises(KVGraftError, match=r"mask must be \[2, 5\]"):
        kv_regression_loss((keys, values), (keys, values), mask()[:, :3])
    with pytest.raises(KVGraftError, match=r"predicted: expected two tensors .* got Tensor"):
        compute_kv_loss(keys, {"a": (keys, values)})
    with pytest.raises(KVGraftError, match=r"aligned_kvs must be .* got tuple"):
        compute_kv_loss((keys, values), (keys, values))
    with pytest.raises(KVGraftError, match="aligned_kvs is empty"):
        compute_kv_loss((keys, values), {})
    with pytest.raises(KVGraftError, match="teacher_weights"):
        compute_kv_loss((keys, values), {"a": (keys, values)}, teacher_weights={"a": -1.0})


def pair_of(seed: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(seed)))


def test_a_mask_of_numbers_is_refused() -> None:
    student, target = pair_of(0), pair_of(1)
    scales = {"t": KVScale.from_tokens(target, torch.ones(2, 4, dtype=torch.bool))}
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with pytest.raises(KVGraftError, match=r"attention_mask\.bool\(\)"):
        compute_kv_loss(student, {"t": target}, mask=attention_mask, scales=scales)


@pytest.mark.parametrize("case", ["one token", "constant target"])
def test_a_target_without_spread_gives_a_finite_loss(case: str) -> None:
    student, target = pair_of(0), pair_of(1)
    student[0].requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    if case == "one token":
        mask[:] = False
        mask[0, 0] = True
    else:
        target = tuple(torch.full_like(part, 0.5) for part in target)
    loss = compute_kv_loss(student, {"t": target}, mask=mask)
    errors = [(s - t).square().mean((1, 3))[mask].mean() for s, t in zip(student, target, strict=True)]
    torch.testing.assert_close(loss, sum(errors) / 2)
    (gradient,) = torch.autograd.grad(loss, student[0])
    assert gradient.abs().max() < 10


@pytest.mark.parametrize(
    "options",
    [
        {"form": "huber"},
        {"keys_weight": 0.0, "values_weight": 0.0},
        {"keys_weight": -1.0, "values_weight": 2.0},
        {"layer_weights": [-1.0, 2.0]},
        {"layer_weights": [float("nan"), 1.0]},
        {"teacher_weights": {"teachr": 3.0}},
        {"teacher_weights": {"t": float("nan")}},
    ],
)
def test_settings_out_of_range_are_refused(options: dict) -> None:
    pair = tuple(torch.randn(2, 1, 2, 4, 6))
    with pytest.raises(KVGraftError, match=next(iter(options))):
        compute_kv_loss(pair, {"t": pair}, **options)
