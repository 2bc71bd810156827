"""A teacher that two processes hold together: whole KV heads and whole distributions, written by one of them."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from kvgraft.errors import ModelError
from kvgraft.models import tensor_parallel
from kvgraft.models.loading import load_model
from kvgraft.recipe import Recipe
from tests.models.test_capture import config_of
from tests.store.process import run_in_two_processes
from tests.store.tensor_parallel import fill

can_share = pytest.mark.skipif(
    "tp_plan" not in {field.name for field in fields(DistributedConfig)},
    reason="this transformers cannot share a model among processes",
)


@pytest.fixture
def plain(tiny_teacher: Path) -> PreTrainedModel:
    # One process: as any other model.
    return load_model(str(tiny_teacher), device="cpu", tensor_parallel=True)


@can_share
def test_two_processes_with_one_teacher_store_what_one_does(
    tiny_teacher: Path, plain: PreTrainedModel, tmp_path: Path
) -> None:
    command = ["tests.store.tensor_parallel", str(tiny_teacher), str(tmp_path / "shared")]
    assert run_in_two_processes(command) == 0
    alone = fill(str(tiny_teacher), plain, tmp_path / "alone")
    # Filled already, so that these only open it.
    shared = fill(str(tiny_teacher), plain, tmp_path / "shared")
    assert not list(tmp_path.glob("shared/*/share-*"))
    (kv, log_probs, likelihoods), (whole_kv, whole_log_probs, whole_likelihoods) = (
        [store.open() for store in stores] for stores in (shared, alone)
    )
    assert len(kv) == len(log_probs) == len(whole_kv) > 0
    for key in whole_kv.keys():  # noqa: SIM118 - a store is not a mapping
        found, expected = kv.read(key).kv, whole_kv.read(key).kv
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            log_probs.token_log_likelihood(key), whole_log_probs.token_log_likelihood(key), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            likelihoods.read(key), whole_likelihoods.read(key), atol=1e-5, rtol=1e-5, equal_nan=True
        )


class ThreeProcesses:
    num_processes = 3


def test_heads_that_do_not_divide_are_refused(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "process_state", ThreeProcesses)
    with pytest.raises(ModelError, match=r"has 2 KV heads, which 3 processes cannot share evenly"):
        load_model(str(tiny_teacher), device="cpu", tensor_parallel=True)


@can_share
def test_latents_are_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "process_state", ThreeProcesses)
    assert tensor_parallel.tensor_parallel_options("latents", config_of("deepseek_v3")).keys() == {"distributed_config"}


def test_what_does_not_go_with_it_is_refused_by_name(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> None:
    teacher = {"name": "shared", "model": str(tiny_teacher), "tensor_parallel": True}
    assert tiny_recipe(teachers=[teacher]).teachers[0].tensor_parallel
    for place in ({"device_map": "auto"}, {"quantization": "8bit"}, {"device": "cpu"}):
        ((name, value),) = place.items()
        with pytest.raises(ValueError, match=rf"does not go with {name} {value}"):
            tiny_recipe(teachers=[{**teacher, **place}])
    for changes, name in (
        ({"kv_loss": {"source": "online"}}, "kv_loss.source online"),
        ({"logit_loss": {"source": "online"}}, "logit_loss.source online"),
    ):
        with pytest.raises(ValueError, match=f"teacher shared has tensor_parallel, .* for {name}"):
            tiny_recipe(teachers=[teacher], **changes)
