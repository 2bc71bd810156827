from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvgraft.models.geometry import kv_geometry
from kvgraft.models.known import KnownModel, known_models

ROOT = Path(__file__).parents[2]
# Fields that are no setting of a transformers configuration.
NOT_CONFIG = {"name", "hub_name", "model_type", "parameters"}


@pytest.mark.parametrize("model", known_models().values(), ids=known_models())
def test_counts_and_geometry_are_those_of_transformers(model: KnownModel) -> None:
    settings = model.model_dump(exclude=NOT_CONFIG, exclude_none=True)
    config = AutoConfig.for_model(model.model_type, **settings)
    assert kv_geometry(config) == model.geometry
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == model.parameters


def test_the_guides_models_ship_smallest_first() -> None:
    assert list(known_models()) == ["Qwen2-1.5B", "Qwen2-7B", "Qwen1.5-14B", "Llama-3-70B", "Qwen2-72B"]
    kv_dims = {name: model.geometry.kv_dim for name, model in known_models().items()}
    assert kv_dims == {
        "Qwen2-1.5B": 256,
        "Qwen2-7B": 512,
        "Qwen1.5-14B": 5120,
        "Llama-3-70B": 1024,
        "Qwen2-72B": 1024,
    }


def test_the_files_are_part_of_the_package() -> None:
    # Read as text: tomllib is younger than the oldest Python that is supported.
    assert '"models/known/*.json"' in (ROOT / "pyproject.toml").read_text()
