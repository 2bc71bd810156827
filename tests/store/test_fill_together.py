"""A KV store and a logit store filled together: one pass for both, and each goes on from its own place."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kvgraft.store import fill as filling
from kvgraft.store.fill import FillReport, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.fill_logits import LogitStoreToFill
from tests.store.test_fill import identity as kv_identity
from tests.store.test_fill import teacher
from tests.store.test_logits import encoded
from tests.store.test_logits import identity as logit_identity

Stores = tuple[KVStoreToFill, LogitStoreToFill]
# What runs a teacher over a batch, by what it gives.
PASSES = ("capture", "hidden_states", "kv_and_hidden_states")


def stores_in(folder: Path) -> Stores:
    return (
        KVStoreToFill(folder / "kv", kv_identity(encoded()), shard_bytes=1),
        LogitStoreToFill(folder / "logits", logit_identity(), shard_bytes=1),
    )


def fill(*stores: KVStoreToFill | LogitStoreToFill, load=teacher, token_budget: int = 1) -> list[FillReport]:
    return fill_stores(stores, "tiny", load, encoded(), token_budget=token_budget)


def require_same(stores: Stores, expected: Stores) -> None:
    (kv, logits), (other_kv, other_logits) = ([store.open() for store in both] for both in (stores, expected))
    assert len(kv) == len(logits) == len(encoded())
    for key in kv.keys():  # noqa: SIM118 - a store is not a mapping
        assert torch.equal(kv.read(key).kv.keys, other_kv.read(key).kv.keys)
        assert torch.equal(kv.read(key).kv.values, other_kv.read(key).kv.values)
        assert torch.equal(logits.words(key), other_logits.words(key))
        assert torch.equal(logits.token_log_likelihood(key), other_logits.token_log_likelihood(key))


def count_passes(patch: pytest.MonkeyPatch, stop_after: int = 1000) -> list[str]:
    """Names of the passes, as they come; the one after ``stop_after`` is a Ctrl-C."""
    seen: list[str] = []

    def counted(name: str):
        original = getattr(filling, name)

        def run(*args, **options):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(name)
            return original(*args, **options)

        return run

    for name in PASSES:
        patch.setattr(filling, name, counted(name))
    return seen


@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_one_pass_gives_what_two_give(tmp_path: Path, token_budget: int) -> None:
    model, passes = teacher(), []

    def load() -> LlamaForCausalLM:
        return model

    apart, together = stores_in(tmp_path / "apart"), stores_in(tmp_path / "together")
    for store in apart:
        fill(store, load=load, token_budget=token_budget)
    # By now what is checked once for a model, by passes of its own, was.
    handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: passes.append(1))
    reports = fill(*together, load=load, token_budget=token_budget)
    handle.remove()
    batches = len(filling.length_buckets([len(text.input_ids) for text in encoded()], token_budget))
    assert len(passes) == batches
    assert {report.tokens for report in reports} == {sum(len(text.input_ids) for text in encoded())}
    assert all(report.seconds > 0 for report in reports)
    require_same(together, apart)
    assert [report.tokens for report in fill(*together, load=lambda: pytest.fail("the teacher was loaded"))] == [0, 0]


def test_stopped_in_the_middle_both_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, whole = stores_in(tmp_path), stores_in(tmp_path / "whole")
    fill(*whole)
    with monkeypatch.context() as patch:
        count_passes(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            fill(*stores)
    seen = count_passes(monkeypatch)
    reports = fill(*stores)
    assert seen == ["kv_and_hidden_states"] * (len(encoded()) - 2)
    assert reports[0].tokens == reports[1].tokens > 0
    require_same(stores, whole)


def test_texts_that_one_store_lacks_get_only_its_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, whole = stores_in(tmp_path), stores_in(tmp_path / "whole")
    fill(*whole)
    for store, done in zip(stores, (2, 1), strict=True):
        with monkeypatch.context() as patch:
            count_passes(patch, stop_after=done)
            with pytest.raises(KeyboardInterrupt):
                fill(store)
    with monkeypatch.context() as patch:
        seen = count_passes(patch)
        kv, logits = fill(*stores)
    # Longest first: both have the longest, the KV store the second too.
    assert sorted(seen) == ["hidden_states"] + ["kv_and_hidden_states"] * (len(encoded()) - 2)
    assert 0 < kv.tokens < logits.tokens
    require_same(stores, whole)
    (tmp_path / "logits" / "manifest.json").unlink()
    seen = count_passes(monkeypatch)
    kv, logits = fill(*stores)
    assert seen == ["hidden_states"] * len(encoded())
    assert kv.tokens == 0
    require_same(stores, whole)
