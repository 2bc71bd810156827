"""Top log-probabilities in words: what comes back, how exactly, and in how many bytes."""

import pytest
import torch

from kvgraft.errors import StoreError
from kvgraft.store.top_log_probs import WORD_BYTES, code_bits, pack_top, unpack_top


@pytest.mark.parametrize(
    ("vocabulary", "largest_error"), [(100, 4e-4), (49_152, 4e-4), (65_537, 8e-4), (262_144, 2e-3)]
)
def test_ids_come_back_exactly_and_probabilities_closely(vocabulary: int, largest_error: float) -> None:
    torch.manual_seed(0)
    # From nearly even to nearly certain.
    logits = torch.randn(8, vocabulary) * torch.logspace(-1, 1, 8)[:, None]
    ids, log_probs, rest = unpack_top(pack_top(logits, 32), vocabulary)
    full = logits.double().log_softmax(-1)
    expected, expected_ids = full.topk(32, -1)
    assert torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values)
    likely = expected > -20
    relative = (log_probs.double() - full.gather(-1, ids)).abs()[likely]
    # A code is half a step off at most; the error of a token adds up over the tokens before it.
    assert float(relative.max()) < 4 * largest_error
    expected_rest = full.scatter(-1, expected_ids, -torch.inf).logsumexp(-1)
    some = expected_rest > -20
    assert float((rest.double() - expected_rest).abs()[some].max()) < 4 * largest_error
    assert torch.allclose(log_probs.exp().sum(-1) + rest.exp(), torch.ones(8), atol=1e-5)


def test_a_certain_token_keeps_a_small_rest() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 18.0
    ids, log_probs, rest = unpack_top(pack_top(logits, 1), 1000)
    assert int(ids) == 7
    assert float(log_probs.exp()) == pytest.approx(1, abs=1e-4)
    assert float(rest) == pytest.approx(float(logits.double().log_softmax(-1)[0, 0]) + 6.9068, abs=1e-3)


def test_32_of_any_vocabulary_take_128_bytes() -> None:
    words = pack_top(torch.randn(3, 70_000), 32)
    assert words.dtype == torch.int32
    assert words[0].numel() * WORD_BYTES == words[0].nbytes == 128
    assert [code_bits(size) for size in (300, 65_536, 65_537, 131_072, 262_144, 262_208)] == [16, 16, 15, 15, 14, 13]
    with pytest.raises(StoreError, match=r"5,000,000 tokens do not fit"):
        code_bits(5_000_000)


def test_no_top_token_is_all_rest_and_too_many_are_refused() -> None:
    ids, log_probs, rest = unpack_top(pack_top(torch.randn(3, 50), 0), 50)
    assert ids.shape == log_probs.shape == (3, 0)
    assert (rest == 0).all()
    with pytest.raises(StoreError, match="below the vocabulary's 50 tokens; got 50"):
        pack_top(torch.randn(3, 50), 50)
