"""A store of log-probabilities: filled as the teacher says, on from where it stopped, and what is refused."""

from pathlib import Path

import pytest
import torch

from kvgraft.align.predictions import vocabulary_size
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.errors import StoreError
from kvgraft.store.fill import encode_for_teacher, fill_store
from kvgraft.store.fill_logits import LogitStoreToFill
from kvgraft.store.format import text_fingerprint
from kvgraft.store.logits import LogitIdentity, LogitStore, LogitStoreWriter
from tests.store.test_fill import TEXTS, teacher

# The model's embedding matrix has 300 rows, more than its tokenizer has tokens.
TOKENIZER = train_tokenizer(TEXTS, 290)
VOCABULARY = vocabulary_size(TOKENIZER)


def encoded() -> list[EncodedText]:
    return encode_for_teacher([Example(text) for text in TEXTS], TOKENIZER, 64)


def identity(top_k: int = 8, temperature: float = 1.0) -> LogitIdentity:
    fingerprint = text_fingerprint(text.sample_key for text in encoded())
    return LogitIdentity("model", "tokenizer", fingerprint, 64, VOCABULARY, top_k, temperature)


def fill(folder: Path, wanted: LogitIdentity | None = None, load=teacher, token_budget: int = 40):
    store = LogitStoreToFill(folder, wanted or identity(), shard_bytes=300)
    return fill_store(store, "tiny", load, encoded(), token_budget=token_budget)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_is_what_the_model_says_text_by_text(tmp_path: Path, temperature: float) -> None:
    store, report = fill(tmp_path, identity(temperature=temperature))
    assert report.tokens == store.num_tokens
    assert len(store.manifest.shards) > 1
    assert VOCABULARY < 300
    model = teacher()
    for text in encoded():
        logits = model(input_ids=torch.tensor([text.input_ids])).logits[0, :, :VOCABULARY].detach()
        stored = store.read(text.sample_key)
        expected = (logits / temperature).log_softmax(-1)
        torch.testing.assert_close(stored.log_probs, expected.gather(-1, stored.ids), rtol=0, atol=2e-3)
        torch.testing.assert_close(stored.log_probs[:, 0], expected.max(-1).values, rtol=0, atol=2e-3)
        likelihood = logits[:-1].log_softmax(-1)[torch.arange(len(text.input_ids) - 1), text.input_ids[1:]]
        torch.testing.assert_close(stored.token_log_likelihood[1:], likelihood, rtol=1e-5, atol=1e-5)
        assert stored.token_log_likelihood[0] == 0


def test_likelihoods_alone_take_four_bytes_a_token(tmp_path: Path) -> None:
    store, _ = fill(tmp_path, identity(top_k=0))
    key = encoded()[0].sample_key
    assert store.distribution_bytes_per_token == 0
    assert store.words(key).shape[1] == 0
    with_words, _ = fill(tmp_path / "other")
    assert torch.equal(store.token_log_likelihood(key), with_words.token_log_likelihood(key))


def test_a_finished_store_is_not_made_again_and_a_damaged_shard_is(tmp_path: Path) -> None:
    store, _ = fill(tmp_path)
    _, report = fill(tmp_path, load=lambda: pytest.fail("the teacher was loaded"))
    assert report.tokens == 0
    shard = tmp_path / next(iter(store.manifest.shards))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="has another checksum"):
        LogitStore.open(tmp_path)
    again, report = fill(tmp_path)
    assert 0 < report.tokens < again.num_tokens


def test_stopped_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stopping(LogitStoreWriter):
        def finish(self) -> None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvgraft.store.fill_logits.LogitStoreWriter", Stopping)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path)
    with pytest.raises(StoreError, match=r"incomplete .* the KV store stays as it is"):
        LogitStore.open(tmp_path)
    store, report = fill(tmp_path)
    assert report.tokens == 0
    assert len(store) == len(encoded())


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no logit store in .* reads the text once more"):
        LogitStore.open(tmp_path)
    fill(tmp_path)
    with pytest.raises(StoreError, match="top_k: the store holds 8, this run needs 4"):
        LogitStore.open(tmp_path, identity(top_k=4))
    with pytest.raises(StoreError, match=r"temperature: the store holds 1\.0, this run needs 2\.0"):
        fill(tmp_path, identity(temperature=2.0))
    with pytest.raises(StoreError, match="sample 0000 is not in the logit store"):
        LogitStore.open(tmp_path).words("0000")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with (
        LogitStoreWriter(tmp_path, identity(top_k=0), 100) as writer,
        pytest.raises(StoreError, match="sample abc has log-likelihoods that are NaN"),
    ):
        writer.add("abc", torch.zeros(2, 0, dtype=torch.int32), torch.tensor([0.0, torch.nan]), 0, 3)
