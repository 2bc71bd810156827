"""A tiny random teacher with a tokenizer of its own, and a recipe that distils it in seconds.

They check arithmetic and plumbing, not worth; what claims worth runs on real weights (tests/integration, benchmarks).
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.data.word_problems import generate
from kvgraft.recipe import Recipe

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # accelerate collects garbage after every training; what is imported is none, and takes a third of a second.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: behind all others, one process runs them and the other waits."""
    items.sort(key=lambda item: item.path.name != "test_on_accelerator.py")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of 4 layers, 2 KV heads x 8, with a byte-level BPE of 400 entries."""
    return _save_llama(tmp_path_factory.mktemp("teacher"), 400, hidden_size=32, num_hidden_layers=4)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of 3 layers, 2 KV heads x 6, with a byte-level BPE of 300 entries."""
    return _save_llama(tmp_path_factory.mktemp("student"), 300, hidden_size=24, num_hidden_layers=3)


def _save_llama(folder: Path, vocab_size: int, **sizes: int) -> Path:
    texts = [f"{problem['question']} {problem['answer']}" for problem in generate("train", 60, seed=7)]
    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_fields(tiny_teacher: Path, tmp_path: Path) -> dict:
    """Fields of a recipe that trains in seconds."""
    return fields_of_tiny_recipe(tiny_teacher, tmp_path / "stores")


def fields_of_tiny_recipe(teacher: Path, stores: Path) -> dict:
    """For fixtures that outlive a test."""
    return {
        "name": "tiny",
        "teachers": [{"name": "org/teacher-1.0", "model": str(teacher)}],
        "student": {
            "new": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 256,
            },
            "vocab_size": 300,
        },
        "data": {"train_samples": 16, "held_out_samples": 4, "max_length": 48},
        "projector": {"dropout": 0.0},
        "store": {"path": str(stores)},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "evaluate_every": 2,
            "save_every": 2,
        },
    }


def fields_of_fit_recipe(teacher: Path, student: Path, stores: Path) -> dict:
    """For fixtures that outlive a test: a projector between ``teacher`` and ``student``."""
    return _changed(
        fields_of_tiny_recipe(teacher, stores) | {"student": {"model": str(student)}},
        data={"train_samples": 30, "held_out_samples": 8, "max_length": 96},
        projector={"init_method": "least_squares"},
        fit={"steps": 0, "tokens_per_step": 64, "scan_tokens": 600},
    )


def _changed(fields: dict, **changes: object) -> dict:
    return fields | {
        name: {**fields.get(name, {}), **change} if isinstance(change, dict) else change
        for name, change in changes.items()
    }


@pytest.fixture
def tiny_recipe(tiny_fields: dict) -> Callable[..., Recipe]:
    """The tiny recipe, with sections changed: ``tiny_recipe(training={"steps": 2})``."""
    return lambda **changes: Recipe.model_validate(_changed(tiny_fields, **changes))


@pytest.fixture
def fit_recipe(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that fits a projector between the tiny teacher and the tiny student in seconds, changed likewise."""
    fields = fields_of_fit_recipe(tiny_teacher, tiny_student, tmp_path / "stores")
    return lambda **changes: Recipe.model_validate(_changed(fields, **changes))


@pytest.fixture
def short_teacher(tmp_path: Path) -> Path:
    (tmp_path / "short").mkdir()
    folder = _save_llama(tmp_path / "short", 400, hidden_size=32, num_hidden_layers=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return folder
