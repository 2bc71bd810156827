from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvgraft.errors import ProjectorError
from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import FitData, prepare_fit
from kvgraft.fit.measure import measure_fits
from kvgraft.fit.run import build_projector, start_from_closed_form
from kvgraft.recipe import Recipe

TEACHER = "org/teacher-1.0"
SOURCES = [[0, 1], [3, 1], [2, 3]]


def fitted(recipe: Recipe, data: FitData, sources: list[list[int]], **options: object):
    linear = build_projector(recipe, data, sources, "linear")
    return linear, fit_closed_form(linear, TEACHER, data.train, **options)


@pytest.mark.parametrize("kinds", ["same", "both"])
def test_equals_least_squares_on_all_rows_at_once(fit_recipe: Callable[..., Recipe], kinds: str) -> None:
    recipe = fit_recipe(fit={"source_kinds": kinds})
    data = prepare_fit(recipe)
    linear, found = fitted(recipe, data, SOURCES, ridge=0.0)
    rows = data.train.rows(10**6)
    assert found.tokens == len(rows)
    keys, values = linear.project_teacher_kv(TEACHER, *rows.source[:, None])
    for layer, sources in enumerate(SOURCES):
        for kind, projected in enumerate((keys, values)):
            parts = [rows.source[k, sources] for k in ((0, 1) if kinds == "both" else (kind,))]
            x = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).double()
            x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
            y = rows.target[kind, layer].double()
            expected = x @ torch.linalg.lstsq(x, y).solution
            torch.testing.assert_close(projected[0, layer].double(), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("ridge", [0.0, None])
@pytest.mark.parametrize(
    "options", [{"source_kinds": "same"}, {"source_kinds": "both"}, {"context_tokens": 1}], ids=str
)
def test_fewer_layers_are_fitted_in_the_same_pass(
    fit_recipe: Callable[..., Recipe], options: dict[str, object], ridge: float | None
) -> None:
    recipe = fit_recipe(fit=options)
    data = prepare_fit(recipe)
    first = [read[:1] for read in SOURCES]
    smaller = build_projector(recipe, data, first, "linear")
    both, found = fitted(recipe, data, SOURCES, ridge=ridge, fewer=[smaller])
    alone = {"smaller": fitted(recipe, data, first, ridge=ridge), "both": fitted(recipe, data, SOURCES, ridge=ridge)}
    assert torch.equal(found.ridges, alone["both"][1].ridges)
    pair = data.held_out[0]
    for projector, (expected, _) in ((smaller, alone["smaller"]), (both, alone["both"])):
        for one, other in zip(
            projector.project_teacher_kv(TEACHER, pair.source),
            expected.project_teacher_kv(TEACHER, pair.source),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_context_is_the_same_in_text_and_out_of_it(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe(fit={"context_tokens": 2})
    data = prepare_fit(recipe)
    projector = build_projector(recipe, data, SOURCES)
    pair = data.train[0]
    whole = projector.sources_of(TEACHER, pair.source)
    rows = projector.sources_of_rows(TEACHER, *data.train.rows_of(0).source[:, None])
    for in_text, alone in zip(whole, rows, strict=True):
        assert torch.equal(in_text[:, :, pair.mask[0]], alone)
    # Two layers, keys and values, and of each the token itself and the two before it.
    assert whole[0].shape[-1] == 2 * 2 * 3 * 16
    steps = whole[0].reshape(1, 3, -1, 2, 3, 2 * 16)
    assert torch.equal(steps[:, :, 2:, :, 2], steps[:, :, :-2, :, 0])
    assert torch.equal(steps[:, :, 0, :, 1], steps[:, :, 0, :, 0])


def test_context_predicts_more(fit_recipe: Callable[..., Recipe]) -> None:
    fits = {}
    for count in (0, 1):
        recipe = fit_recipe(fit={"context_tokens": count})
        data = prepare_fit(recipe)
        linear, _ = fitted(recipe, data, [[0], [1], [3]], ridge=0.0)
        # On the texts themselves, where more to read can only help.
        fits[count] = measure_fits({"linear": linear}, TEACHER, data.train)["linear"]
    assert all(more > less for more, less in zip(fits[1].keys_r2, fits[0].keys_r2, strict=True))


@pytest.mark.parametrize("sharing", ["shared", "grouped", "trunk", "per_layer"])
def test_an_elastic_bottleneck_starts_as_the_linear_map(fit_recipe: Callable[..., Recipe], sharing: str) -> None:
    recipe = fit_recipe(projector={"sharing": sharing, "num_groups": 2})
    data = prepare_fit(recipe)
    linear, _ = fitted(recipe, data, SOURCES)
    elastic = build_projector(recipe, data, SOURCES)
    start_from_closed_form(elastic, linear, TEACHER)
    fits = measure_fits({"linear": linear, "elastic": elastic}, TEACHER, data.held_out)
    assert fits["elastic"].keys_r2 == pytest.approx(fits["linear"].keys_r2, abs=1e-5)
    assert fits["elastic"].values_r2 == pytest.approx(fits["linear"].values_r2, abs=1e-5)
    assert min(fits["linear"].values_r2) > -0.5
    assert elastic.adapters(TEACHER)[0].up is not None


def test_ridge_is_chosen_on_held_out_texts(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe()
    data = prepare_fit(recipe)
    linear, chosen = fitted(recipe, data, [[0], [1], [3]])
    overfitted, _ = fitted(recipe, data, [[0], [1], [3]], ridge=0.0)
    fits = measure_fits({"chosen": linear, "none": overfitted}, TEACHER, data.held_out)
    assert chosen.ridges.shape == (2, 3)
    assert sum(fits["chosen"].values_r2) >= sum(fits["none"].values_r2) - 1e-6


def test_weighting_draws_the_map_to_the_tokens_that_count(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe()
    data = prepare_fit(recipe)

    lengths = [len(text.input_ids) for text in data.train.texts]
    early_tokens = [torch.where(torch.arange(tokens) < 12, 1.0, 1e-4).expand(3, tokens) for tokens in lengths]
    errors = {}
    for name, weights in (("alike", None), ("early", early_tokens)):
        weighted = replace(data, train=replace(data.train, token_weights=weights))
        linear, _ = fitted(recipe, weighted, [[0], [1], [3]], ridge=1e-3)
        error = 0.0
        for index in range(len(data.train)):
            pair = data.train[index]
            with torch.no_grad():
                keys, _ = linear.project_teacher_kv(TEACHER, pair.source)
            early = pair.mask[0] & (torch.arange(pair.mask.shape[1]) < 12)
            error += float((keys - pair.target.flatten()[0])[:, :, early].square().sum())
        errors[name] = error
    assert errors["early"] < 0.9 * errors["alike"]


def test_adapters_without_a_linear_part_are_refused(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe(projector={"init_method": "xavier", "skip": False})
    data = prepare_fit(recipe)
    with pytest.raises(ProjectorError, match="no linear part"):
        fit_closed_form(build_projector(recipe, data, [[0], [1], [3]]), TEACHER, data.train)
