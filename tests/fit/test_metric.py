"""The metric of queries: what an error of a key does to scores, in place of the error itself."""

from collections.abc import Callable

import torch

from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import build_projector
from kvgraft.fit.train import RegressionModel, key_metric_from
from kvgraft.models.attention import read_attention
from kvgraft.recipe import Recipe

TEACHER = "org/teacher-1.0"


def test_the_loss_of_keys_is_that_of_scores(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe()
    data = prepare_fit(recipe)
    projector = build_projector(recipe, data, [[0], [1], [2]]).eval()
    moments = read_attention(data.student.load(), torch.tensor([data.train.texts[0].input_ids])).query_moments
    rows = data.train.rows(40)
    plain = RegressionModel(projector, TEACHER)(rows.source, rows.target)
    found = RegressionModel(projector, TEACHER, key_metric_from(moments, [0, 1, 2]))(rows.source, rows.target)
    assert torch.equal(found["values_loss"], plain["values_loss"])
    keys, _ = projector.targets_of(TEACHER, *rows.target[:, None])
    sources, _ = projector.sources_of_rows(TEACHER, *rows.source[:, None])
    errors = (projector.adapters(TEACHER)[0](sources) - keys)[0]
    heads = errors.unflatten(-1, moments.shape[1:3])
    scores = torch.einsum("lthd,lhde,lthe->lth", heads, moments, heads)
    level = moments.diagonal(dim1=-2, dim2=-1).mean((1, 2))
    expected = (scores / level[:, None, None]).mean() / moments.shape[-1]
    torch.testing.assert_close(found["keys_loss"], expected)
    assert not torch.isclose(found["keys_loss"], plain["keys_loss"])


def test_queries_of_all_directions_alike_change_nothing(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe()
    data = prepare_fit(recipe)
    projector = build_projector(recipe, data, [[0], [1], [2]]).eval()
    geometry, rows = data.student.geometry, data.train.rows(40)
    moments = 3 * torch.eye(geometry.head_dim).expand(5, geometry.num_kv_heads, -1, -1)
    metric = key_metric_from(moments, [4, 0, 2])
    assert metric.shape == (3, geometry.num_kv_heads, geometry.head_dim, geometry.head_dim)
    plain, found = (RegressionModel(projector, TEACHER, m)(rows.source, rows.target) for m in (None, metric))
    torch.testing.assert_close(found["loss"], plain["loss"])
