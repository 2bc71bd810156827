"""A graft of the student's own KV against the student reading the text itself, on every architecture of SPEC."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.errors import GraftError
from kvgraft.graft import cache_from_kv, graft
from kvgraft.models.capture import capture
from kvgraft.models.rotary import rotations_at
from tests.graft.students import (
    GREEDY,
    identity_projector,
    plain_answer,
    plain_logits,
    ragged_batch,
    sharpened,
    student_of,
)
from tests.models.test_capture import CONFIGS, TURNINGS, VOCABULARY, mixed

LENGTH = 11  # of the longest text; the windows of Mistral and Gemma hold 4


def following_ids(tokens: int = 3) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(3, VOCABULARY, (3, tokens))


def require_exact_graft(student: PreTrainedModel) -> None:
    """``student`` goes on from its own captured KV as from the text itself."""
    input_ids, mask = ragged_batch()
    following = following_ids()
    with torch.no_grad():
        cache = cache_from_kv(student, capture(student, input_ids, mask))
        logits = student(**cache.forward_inputs(following)).logits
    for row in range(3):
        expected = plain_logits(student, input_ids[row][mask[row].bool()], following[row])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_plain_decoding_padded_left_and_right(family: str, attention: str) -> None:
    student = student_of(family, attention)
    input_ids, mask = ragged_batch()
    following = following_ids()
    with torch.no_grad():
        kv = capture(student, input_ids, mask)
        projector = identity_projector(kv.geometry.kv_dim, kv.geometry.num_layers)
        cache = graft(student, projector, kv, teacher="self")
        first = student(**cache.forward_inputs(following[:, :2])).logits
        # The cache has grown: what it has read is given again and not read again.
        second = student(**cache.forward_inputs(following)).logits
    assert (first.shape[1], second.shape[1]) == (2, 1)
    for row in range(3):
        expected = plain_logits(student, input_ids[row][mask[row].bool()], following[row])
        torch.testing.assert_close(torch.cat([first, second], 1)[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", TURNINGS)
def test_keys_that_turn_otherwise_than_by_halves(family: str) -> None:
    require_exact_graft(student_of(family, "eager"))


@pytest.mark.parametrize("family", [*CONFIGS, "gemma3n_text"])
def test_greedy_generation_is_identical(family: str) -> None:
    # The last layers of a Gemma 3n read what those before them keep.
    student = student_of(family) if family in CONFIGS else sharpened(mixed(family))
    input_ids, mask = ragged_batch()
    following = following_ids()
    token_ids = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
    cache = cache_from_kv(student, capture(student, input_ids, mask), token_ids=token_ids)
    inputs = cache.generate_inputs(following)
    output = student.generate(**inputs, max_new_tokens=8, **GREEDY)
    for row in range(3):
        text = torch.tensor(token_ids[row])
        shown = output[row][: inputs["input_ids"].shape[1]]
        assert torch.equal(shown[-len(text) - 3 :], torch.cat([text, following[row]]))
        expected = plain_answer(student, text, following[row], 8)
        assert torch.equal(output[row, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize(
    "several", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_beams_and_samples_need_the_cache_repeated(several: dict[str, int]) -> None:
    student = student_of("llama")
    text, following = ragged_batch()[0][:2], following_ids()[:2]
    settings: dict = {"max_new_tokens": 8, **GREEDY, **several}
    whole = torch.cat([text, following], 1)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = student.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **settings)
        cache = cache_from_kv(student, capture(student, text), token_ids=text.tolist())
        with pytest.raises(GraftError, match=r"holds 2 rows and the model reads 6.*batch_repeat_interleave"):
            student.generate(**copy.deepcopy(cache).generate_inputs(following), **settings)
        inputs = cache.generate_inputs(following)
        cache.batch_repeat_interleave(3)
        torch.manual_seed(0)
        found = student.generate(**inputs, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_prompts_of_unequal_length(family: str) -> None:
    """Padding between the grafted part and a prompt; windows count it, so Gemma's prompts are of one length."""
    student = student_of(family)
    input_ids, mask = ragged_batch()
    following = following_ids(4)
    lengths = [4, 4, 4] if family == "gemma3_text" else [2, 4, 1]
    left = torch.stack([torch.arange(4) >= 4 - length for length in lengths]).long()
    cache = cache_from_kv(student, capture(student, input_ids, mask))
    inputs = copy.deepcopy(cache).generate_inputs(following, left)
    answers = student.generate(**inputs, max_new_tokens=5, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = student(**cache.forward_inputs(following.flip(1), left.flip(1))).logits
    for row in range(3):
        text, prompt = input_ids[row][mask[row].bool()], following[row][left[row].bool()]
        assert torch.equal(answers[row], plain_answer(student, text, prompt, 5))
        expected = plain_logits(student, text, prompt.flip(0))
        torch.testing.assert_close(logits[row, : lengths[row]], expected, atol=1e-5, rtol=0)


SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rotation(scaling: str) -> None:
    student = student_of("llama", rope_parameters={"rope_theta": 10000.0, **SCALED[scaling]})
    positions = torch.arange(LENGTH)[None]
    plain = rotations_at(student_of("llama"), positions)[0]
    assert not torch.allclose(plain[0], rotations_at(student, positions)[0][0])
    require_exact_graft(student)


def test_gemmas_local_and_global_layers_turn_by_their_own_theta() -> None:
    student = student_of("gemma3_text")
    rotations = rotations_at(student, torch.tensor([[0, 7]]))
    assert torch.equal(rotations[0][0], rotations[2][0])
    assert not torch.allclose(rotations[0][0][0, 1], rotations[1][0][0, 1])
    assert torch.equal(rotations[1][0][0, 0], torch.ones(8))
    assert rotations_at(student_of("gpt2"), torch.tensor([[0, 7]])) == [None] * 3


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"gpt2"}))
def test_positions_matter_here(family: str) -> None:
    """The bar above can fail: the same cache one position off, or one key turned wrongly, is seen in the logits."""
    student = student_of(family)
    input_ids, following = following_ids(8)[:1], following_ids()[:1]
    with torch.no_grad():
        cache = cache_from_kv(student, capture(student, input_ids))
        inputs = cache.forward_inputs(following)
        inputs["position_ids"] = inputs["position_ids"] + 1
        logits = student(**inputs).logits[0]
    assert float((logits - plain_logits(student, input_ids[0], following[0])).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_layers_keep_what_they_would_have_kept(family: str) -> None:
    student = student_of(family)
    input_ids = following_ids(LENGTH)
    with torch.no_grad():
        own = student(input_ids=input_ids, use_cache=True).past_key_values
        cache = cache_from_kv(student, capture(student, input_ids))
    assert [layer.keys.shape[2] for layer in cache.layers] == [layer.keys.shape[2] for layer in own.layers]
    assert min(layer.keys.shape[2] for layer in cache.layers) == 3
    assert cache.get_seq_length() == own.get_seq_length() == LENGTH
    for grafted, kept in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(grafted.keys, kept.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grafted.values, kept.values)


def test_a_half_precision_student_takes_float32_kv() -> None:
    student = student_of("llama").to(torch.bfloat16)
    input_ids, following = following_ids(8)[:1], following_ids()[:1]
    with torch.no_grad():
        cache = cache_from_kv(student, capture(student, input_ids).to(torch.float32))
        logits = student(**cache.forward_inputs(following)).logits[0]
    expected = plain_logits(student, input_ids[0], following[0])
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert float((logits - expected).float().norm() / expected.float().norm()) < 0.03
