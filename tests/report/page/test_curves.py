"""Means, bands and pooling, beside plain sums."""

import numpy as np
import pytest

from kvgraft.report.page.charts import arm_styles, heat_map_item
from kvgraft.report.page.curves import arm_lines, settled_range, whole_range
from kvgraft.report.page.data import Curve, HeatMapFigure


def curve(arm: str, seed: int, steps: list[int], values: list[float]) -> Curve:
    return Curve(arm, seed, np.array(steps), np.array(values))


def test_one_seed_is_drawn_as_it_is() -> None:
    (line,) = arm_lines([curve("kv", 0, [0, 5, 10], [3.0, 2.0, 1.0])], 100)
    assert line.steps.tolist() == [0, 5, 10]
    assert line.mean.tolist() == [3.0, 2.0, 1.0]
    assert line.low is None


def test_seeds_become_a_mean_and_a_band() -> None:
    first, second = curve("kv", 0, [0, 5, 10], [3.0, 2.0, 1.0]), curve("kv", 1, [0, 5], [5.0, 1.0])
    (line,) = arm_lines([first, second], 100)
    assert line.seeds == (0, 1)
    assert line.steps.tolist() == [0, 5, 10]
    # Step 10 was reached by one seed alone.
    assert line.mean.tolist() == [4.0, 1.5, 1.0]
    assert (line.low.tolist(), line.high.tolist()) == ([3.0, 1.0, 1.0], [5.0, 2.0, 1.0])


@pytest.mark.parametrize(("points", "most"), [(10, 10), (11, 10), (999, 100), (1000, 1), (7, 3)])
def test_pooling_keeps_mean_extremes_and_the_last_step(points: int, most: int) -> None:
    generator = np.random.default_rng(0)
    steps, values = np.sort(generator.choice(5000, points, replace=False)), generator.normal(size=points)
    (line,) = arm_lines([Curve("kv", 0, steps, values)], most)
    per_point = -(-points // most)
    assert len(line.steps) <= most
    for index, step in enumerate(line.steps):
        pool = slice(index * per_point, (index + 1) * per_point)
        assert step == steps[pool][-1]
        assert line.mean[index] == pytest.approx(values[pool].mean())
        if per_point > 1:
            assert (line.low[index], line.high[index]) == (values[pool].min(), values[pool].max())


def test_settled_range_leaves_the_fall_of_the_beginning_out() -> None:
    lines = arm_lines([curve("kv", 0, list(range(6)), [100.0, 50.0, 3.0, 2.0, 1.5, 1.0])], 100)
    assert settled_range(lines) == pytest.approx((0.9, 3.1))
    assert whole_range(lines)[1] > 100
    assert whole_range(arm_lines([curve("kv", 0, [0], [2.0])], 9)) == pytest.approx((1.9, 2.1))


def test_an_arm_looks_the_same_on_every_page_and_no_two_alike() -> None:
    pages = [arm_styles(arms) for arms in (["kv"], ["mismatched", "baseline", "kv"], ["logits", "wide", "kv"])]
    assert len({page["kv"] for page in pages}) == 1
    many = arm_styles([*(f"arm-{index}" for index in range(31)), "kv", "mismatched", "logits", "baseline"])
    assert len({(style.colour, style.dash) for style in many.values()}) == len(many) == 35


@pytest.mark.parametrize(("columns", "turned"), [(4, False), (30, True)])
def test_names_of_many_layers_have_room(columns: int, turned: bool) -> None:
    names = [f"{layer}\u2190{layer}" for layer in range(columns)]
    shown = HeatMapFigure(title="made", command="", rows=["keys"], columns=names, values=[[0.5] * columns])
    plot = heat_map_item(shown)["doc"]["roots"][0]["attributes"]
    (axis,) = [part["attributes"] for part in plot["below"] if part["name"] == "CategoricalAxis"]
    assert (axis.get("major_label_orientation") == "vertical") == turned
    # Bokeh writes what differs from its own default, which draws all labels, over each other too.
    assert "major_label_policy" in axis
