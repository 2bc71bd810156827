"""Token likelihoods beside a store's KV: added once, found again, damaged and missing ones named."""

from pathlib import Path

import pytest
import torch

from kvgraft.errors import StoreError
from kvgraft.models.likelihood import token_log_likelihood
from kvgraft.store import likelihoods
from kvgraft.store.likelihoods import TokenLikelihoods, fill_likelihoods
from tests.store.test_fill import encoded, fill, teacher


def add(folder: Path, load=teacher, texts=None) -> TokenLikelihoods:
    return fill_likelihoods(folder, "tiny", load, texts or encoded(), token_budget=40)


def test_added_to_a_finished_store_they_are_what_the_model_gives(tmp_path: Path) -> None:
    fill(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found, model = add(tmp_path), teacher()
    for text in encoded():
        expected = token_log_likelihood(model, torch.tensor([text.input_ids]))[0]
        torch.testing.assert_close(found.read(text.sample_key), expected, atol=1e-5, rtol=0, equal_nan=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    # And the store is still what it was to those who open it.
    _, report = fill(tmp_path, load=lambda: pytest.fail("the teacher was loaded"))
    assert report.tokens == 0


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "_TOKENS_PER_FILE", 1)
    add(tmp_path, texts=encoded()[:2])
    seen = []
    monkeypatch.setattr(
        likelihoods,
        "token_log_likelihood",
        lambda model, input_ids, mask: seen.append(len(input_ids)) or token_log_likelihood(model, input_ids, mask),
    )
    add(tmp_path)
    assert sum(seen) == 2
    assert (
        add(tmp_path, load=lambda: pytest.fail("the teacher was loaded")).missing(text.sample_key for text in encoded())
        == []
    )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    add(tmp_path)
    (path,) = tmp_path.glob("likelihoods-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{path.name} is damaged.*the KV beside it stays"):
        TokenLikelihoods.open(tmp_path)


def test_a_store_without_them_says_how_to_add_them(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(StoreError, match=r"no token likelihoods of sample .*`kvgraft cache`.*leaves the stored KV"):
        TokenLikelihoods.open(tmp_path).read(encoded()[0].sample_key)


def test_nan_is_named_by_teacher_and_text(tmp_path: Path) -> None:
    def broken():
        model = teacher()
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    with pytest.raises(StoreError, match="teacher tiny gives token likelihoods that are not finite for text"):
        add(tmp_path, broken)
