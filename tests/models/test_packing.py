"""Texts packed into rows against the same texts alone, on tiny random models of every family."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.models.capture import record_kv
from kvgraft.models.packing import Packing, packed_positions, require_exact_packing
from tests.models.test_capture import CONFIGS, GROUPED, MULTI_HEAD, VOCABULARY, model_of

# Longer than the sliding window of 4 that two families have; one row is filled up, one is full.
ROWS = ((7, 5, 2), (9,), (6, 8))
LENGTHS = [tokens for row in ROWS for tokens in row]
# Convolutions and recurrences read on from one text into the next; OPT counts positions over the whole row.
INEXACT = {
    "opt": {**MULTI_HEAD, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
}


def padded_texts() -> tuple[Tensor, Tensor]:
    """Token ids ``[texts, longest]`` and their mask."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(3, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


def packing() -> Packing:
    return Packing(packed_positions(ROWS), padded_texts()[1])


def test_rows_hold_the_texts_in_order() -> None:
    input_ids, mask = padded_texts()
    positions = packed_positions(ROWS)
    assert positions.shape == (3, 14)
    assert positions[1].tolist() == [*range(9), *[-1] * 5]
    rows = packing().pack(input_ids, 0)
    assert torch.equal(rows[0, 7:12], input_ids[1, :5])
    assert torch.equal(packing().unpack(rows)[mask], input_ids[mask])
    assert torch.equal(packing().unpack(positions)[mask], torch.arange(9).expand_as(mask)[mask])


def test_no_text_predicts_the_next() -> None:
    input_ids, mask = padded_texts()
    labels = packing().inputs(input_ids, input_ids.masked_fill(~mask, -100))["labels"]
    assert [labels[0, start].item() for start in (0, 7, 12)] == [-100] * 3
    assert (labels != -100).sum() == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_kv_equal_those_of_the_text_alone(family: str, attention: str) -> None:
    model = model_of(family, attention)
    input_ids, mask = padded_texts()
    rows = packing()
    with torch.no_grad(), record_kv(model) as recorder:
        logits = rows.unpack(
            model(input_ids=rows.pack(input_ids, 0), position_ids=rows.position_ids, use_cache=False).logits
        )
    kv = rows.unpack_kv(recorder.kv(rows.real, rows.position_ids))
    assert torch.equal(kv.mask, mask)
    for text, tokens in enumerate(LENGTHS):
        with torch.no_grad(), record_kv(model) as recorder:
            alone = model(input_ids=input_ids[text : text + 1, :tokens], use_cache=False).logits
        own = recorder.kv(mask[text : text + 1, :tokens])
        torch.testing.assert_close(logits[text, :tokens], alone[0], atol=1e-5, rtol=1e-5)
        for packed, expected in ((kv.keys, own.keys), (kv.values, own.values)):
            torch.testing.assert_close(packed[text, ..., :tokens, :], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_exact_families_pass(family: str) -> None:
    require_exact_packing(model_of(family))


@pytest.mark.parametrize("family", INEXACT)
def test_a_family_that_reads_over_the_border_is_refused_by_name(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **INEXACT[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ModelError, match=rf"{type(model).__name__} cannot be trained .*packed.*Use .*buckets"):
        require_exact_packing(model)
    assert model.training
