"""Token likelihoods beside a store's KV: added once, found again, damaged and missing ones named."""

from pathlib import Path

import pytest
import torch

from kvgraft.errors import StoreError
from kvgraft.models.head import head_of, hidden_states
from kvgraft.store import likelihoods
from kvgraft.store.fill import fill_store, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.likelihoods import LikelihoodsToFill, TokenLikelihoods, likelihoods_of_text
from tests.store.test_fill import encoded, fill, identity, teacher


def to_fill(folder: Path, texts=None) -> LikelihoodsToFill:
    return LikelihoodsToFill(folder, tuple(text.sample_key for text in texts or encoded()))


def add(folder: Path, load=teacher, texts=None) -> TokenLikelihoods:
    texts = texts or encoded()
    return fill_store(to_fill(folder, texts), "tiny", load, texts, token_budget=40)[0]


def require_the_models_own(found: TokenLikelihoods) -> None:
    model = teacher()
    for text in encoded():
        with torch.no_grad():
            logits = model(torch.tensor([text.input_ids])).logits[0].float()
        own = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(text.input_ids[1:])[:, None])[:, 0]
        numbers = found.read(text.sample_key)
        torch.testing.assert_close(numbers[1:], own, atol=1e-5, rtol=0)
        assert numbers[0].isnan()


def test_added_to_a_finished_store_they_are_what_the_model_gives(tmp_path: Path) -> None:
    fill(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    require_the_models_own(add(tmp_path))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    # And the store is still what it was to those who open it.
    _, report = fill(tmp_path, load=lambda: pytest.fail("the teacher was loaded"))
    assert report.tokens == 0


def test_the_pass_that_fills_the_store_gives_them_too(tmp_path: Path) -> None:
    kv = KVStoreToFill(tmp_path, identity(encoded()), shard_bytes=1)
    reports = fill_stores([kv, to_fill(tmp_path)], "tiny", teacher, encoded(), token_budget=40)
    assert reports[0].tokens == reports[1].tokens > 0
    assert reports[0].seconds == reports[1].seconds
    require_the_models_own(TokenLikelihoods.open(tmp_path))
    fill(tmp_path / "alone")
    alone = KVStoreToFill(tmp_path / "alone", identity(encoded()), shard_bytes=1).open()
    for text in encoded():
        assert torch.equal(kv.open().read(text.sample_key).kv.keys, alone.read(text.sample_key).kv.keys)


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "_TOKENS_PER_FILE", 1)
    add(tmp_path, texts=encoded()[:2])
    seen = []
    monkeypatch.setattr(
        likelihoods, "likelihoods_of_text", lambda *text: seen.append(text) or likelihoods_of_text(*text)
    )
    add(tmp_path)
    assert len(seen) == len(encoded()) - 2
    found = add(tmp_path, load=lambda: pytest.fail("the teacher was loaded"))
    require_the_models_own(found)


def test_what_was_computed_before_a_kill_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(hidden, head, input_ids):
        if seen:
            raise KeyboardInterrupt
        seen.append(input_ids)
        return likelihoods_of_text(hidden, head, input_ids)

    seen: list = []
    with monkeypatch.context() as patch:
        patch.setattr(likelihoods, "likelihoods_of_text", stopped)
        with pytest.raises(KeyboardInterrupt):
            add(tmp_path)
    assert len(to_fill(tmp_path).open().missing(text.sample_key for text in encoded())) == len(encoded()) - 1
    require_the_models_own(add(tmp_path))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_change_them(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = teacher(), encoded()[1]
    assert len(text.input_ids) > 4
    input_ids = torch.tensor([text.input_ids])
    hidden = hidden_states(model, input_ids, torch.ones_like(input_ids))[0]
    monkeypatch.setattr(likelihoods, "_CHUNK_TOKENS", chunk)
    found = likelihoods_of_text(hidden, head_of(model), text.input_ids)
    expected = head_of(model).log_likelihood(hidden[:-1], input_ids[0, 1:])
    torch.testing.assert_close(found[1:], expected)
    assert likelihoods_of_text(hidden[:1], head_of(model), text.input_ids[:1]).isnan().all()


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
        # A head is checked with multiples of 37.
        token = next(token for token in encoded()[1].input_ids if token % 37)
        model.model.embed_tokens.weight.data[token] = float("nan")
        return model

    with pytest.raises(StoreError, match=r"teacher tiny: token likelihoods of text .* are not finite"):
        add(tmp_path, broken)
