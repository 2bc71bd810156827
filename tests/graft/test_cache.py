"""Grafting through a projector, and what is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from kvgraft.errors import GraftError, KVGraftError, ProjectorError
from kvgraft.graft import cache_from_kv, graft
from kvgraft.models.capture import capture
from kvgraft.projector.projector import KVDimensionProjector
from tests.graft.students import identity_projector, student_of
from tests.graft.test_pieces import ids
from tests.models.test_capture import BART, mixed, tiny, turned_by_half_the_angle

WIDTH, LAYERS = 16, 3  # of the grouped students


def test_a_teacher_of_another_width_is_projected() -> None:
    student, teacher = student_of("llama"), student_of("gpt2")
    projector = KVDimensionProjector({"gpt2": {"d_model": 32, "num_layers": LAYERS}}, WIDTH, dropout=0.5)
    kv = capture(teacher, ids(2, 6))
    with torch.no_grad():
        caches = [graft(student, projector, kv, teacher="gpt2") for _ in range(2)]
        projector.eval()
        keys, values = projector.project_teacher_kv("gpt2", kv)
    # No rotation at position 0.
    grafted = caches[0].layers[1]
    torch.testing.assert_close(grafted.keys[:, :, 0], keys[:, 1, 0].reshape(2, 2, 8))
    torch.testing.assert_close(grafted.values[:, :, 4], values[:, 1, 4].reshape(2, 2, 8))
    assert torch.equal(grafted.keys, caches[1].layers[1].keys)


def test_the_projector_keeps_its_mode_and_its_gradient() -> None:
    student = student_of("llama").requires_grad_(False)
    projector = identity_projector(WIDTH, LAYERS)
    cache = graft(student, projector, capture(student, ids(1, 6)), teacher="self")
    assert projector.training
    student(**cache.forward_inputs(ids(1, 2))).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())
    graft(student, projector.eval(), capture(student, ids(1, 6)), teacher="self")
    assert not projector.training


def test_a_projector_for_another_student_is_refused() -> None:
    student = student_of("llama")
    kv = capture(student, ids(2, 6))
    wide = KVDimensionProjector({"self": {"d_model": WIDTH, "num_layers": LAYERS}}, 32)
    with pytest.raises(GraftError, match=r"keys of teacher 'self' into \[2, 3, 6, 32\].*takes \[2, 3, 6, 16\]"):
        graft(student, wide, kv, teacher="self")
    with pytest.raises(GraftError, match=r"\[2, 2, 6, 16\].*\[2, 3, 6, 16\]"):
        graft(student, identity_projector(WIDTH, LAYERS), kv.select_layers([0, 1]), teacher="self")
    with pytest.raises(ProjectorError, match=r"no adapter for teacher 'other'.*self"):
        graft(student, identity_projector(WIDTH, LAYERS), kv, teacher="other")


def test_own_tokens_need_own_kv() -> None:
    student = student_of("llama")
    kv, projector = capture(student, ids(2, 6)), identity_projector(WIDTH, LAYERS)
    with pytest.raises(GraftError, match=r"own_first_tokens is 2.*own_kv"):
        graft(student, projector, kv, teacher="self", own_first_tokens=2)
    with torch.no_grad():
        mixed = graft(student, projector, replace(kv, keys=kv.keys + 1), teacher="self", own_kv=kv, own_first_tokens=2)
        plain = cache_from_kv(student, kv)
    same = [torch.allclose(mixed.layers[0].keys[:, :, token], plain.layers[0].keys[:, :, token]) for token in range(6)]
    assert same == [True, True, False, False, False, False]


def test_one_vector_for_key_and_value_is_the_mean_of_what_both_say() -> None:
    student = student_of("deepseek_v3")
    kv = capture(student, ids(2, 6))
    apart = replace(kv, keys=kv.keys + 1, values=kv.values - 1)
    for own, mean in zip(cache_from_kv(student, kv).layers, cache_from_kv(student, apart).layers, strict=True):
        torch.testing.assert_close(mean.keys, own.keys)
        torch.testing.assert_close(mean.values, own.values)


def test_rotated_keys_are_refused() -> None:
    student = student_of("llama")
    kv = capture(student, ids(2, 6), rotated=True)
    with pytest.raises(GraftError, match="rotated=False"):
        cache_from_kv(student, kv)
    with pytest.raises(GraftError, match=r"teacher 'self' are rotated.*rotated=False"):
        graft(student, identity_projector(WIDTH, LAYERS), kv, teacher="self")


def test_kv_of_another_geometry_is_refused() -> None:
    student = student_of("llama")
    with pytest.raises(GraftError, match=r"4 heads x 8 is not of LlamaForCausalLM.*2 heads x 8"):
        cache_from_kv(student, capture(student_of("gpt2"), ids(2, 6)))
    with pytest.raises(GraftError, match=r"layers \[0, 2, 1\].*is not of LlamaForCausalLM"):
        cache_from_kv(student, capture(student, ids(2, 6), layers=[0, 2, 1]))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    student = student_of("llama")
    kv = capture(student, ids(2, 6))
    kv.values[1, 2, 0, 4] = wrong
    with pytest.raises(KVGraftError, match=r"values of the KV for LlamaForCausalLM .* sample 1, layer 2, token 4"):
        cache_from_kv(student, kv)


def test_texts_of_another_length_are_refused() -> None:
    student = student_of("llama")
    kv = capture(student, ids(2, 6))
    with pytest.raises(GraftError, match=r"\[6, 6\] tokens, but token_ids holds \[6, 5\]"):
        cache_from_kv(student, kv, token_ids=[[3] * 6, [3] * 5])
    moved = replace(kv, positions=kv.positions + 2)
    with pytest.raises(GraftError, match=r"\[8, 8\] tokens, but token_ids holds \[6, 6\]"):
        cache_from_kv(student, moved, token_ids=[[3] * 6] * 2)


def test_more_tokens_than_the_context_are_refused() -> None:
    student = student_of("llama")
    long = capture(student, ids(1, 65))
    with pytest.raises(GraftError, match=r"holds 65 tokens, but the context of LlamaForCausalLM is 64"):
        cache_from_kv(student, long)
    cache = cache_from_kv(student, capture(student, ids(1, 60)))
    assert cache.forward_inputs(ids(1, 4))["position_ids"].tolist() == [[60, 61, 62, 63]]
    with pytest.raises(GraftError, match=r"reach position 64, but the student's context is 64"):
        cache.forward_inputs(ids(1, 5))


def test_what_follows_must_go_with_the_cache() -> None:
    student = student_of("llama")
    cache = cache_from_kv(student, capture(student, ids(2, 6)))
    with pytest.raises(GraftError, match=r"\[2, tokens\]; got \[3, 4\]"):
        cache.forward_inputs(ids(3, 4))
    with pytest.raises(GraftError, match=r"attention_mask must be \[2, 4\].*got \[2, 10\]"):
        cache.generate_inputs(ids(2, 4), torch.ones(2, 10))
    with torch.no_grad():
        student(**cache.forward_inputs(ids(2, 4)))
    with pytest.raises(GraftError, match=r"read 4 tokens after its grafted part and input_ids holds 4.*deepcopy"):
        cache.forward_inputs(ids(2, 4))


def test_a_student_that_counts_its_positions_reads_on_where_it_counts_right() -> None:
    bart = tiny("bart", **BART)
    text, following = ids(2, 6), ids(2, 3)
    with torch.no_grad():
        cache = cache_from_kv(bart, capture(bart, text))
        logits = bart(**cache.forward_inputs(following)).logits
        whole = bart(input_ids=torch.cat([text, following], 1), use_cache=False).logits
    torch.testing.assert_close(logits, whole[:, 6:], atol=1e-5, rtol=0)
    mask = torch.ones_like(text)
    mask[1, 4:] = 0
    ragged = cache_from_kv(bart, capture(bart, text, mask))
    with pytest.raises(GraftError, match="BartForCausalLM takes no position_ids"):
        ragged.forward_inputs(following)


def unsupported(family: str) -> PreTrainedModel:
    if family == "mamba":
        config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
        return AutoModelForCausalLM.from_config(config)
    if family == "t5":
        config = AutoConfig.for_model("t5", vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        return AutoModelForSeq2SeqLM.from_config(config)
    fields = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if family == "bert":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **fields, num_attention_heads=4)).bert
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layer_types = ["linear_attention", "full_attention"]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_next", **fields, layer_types=layer_types))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mamba", "MambaForCausalLM cannot take a grafted cache|the config of mamba names no layer"),
        ("t5", "T5ForConditionalGeneration cannot take a grafted cache"),
        ("bert", "BertModel cannot take a grafted cache"),
        ("qwen3_next", "Qwen3NextForCausalLM cannot take a grafted cache: its own holds"),
    ],
)
def test_students_without_a_cache_of_keys_and_values_are_refused(family: str, message: str) -> None:
    kv = capture(student_of("llama"), ids(1, 5))
    with pytest.raises(KVGraftError, match=message):
        cache_from_kv(unsupported(family), kv)


def test_a_student_whose_layers_keep_unlike_kv_is_refused() -> None:
    model = mixed("gemma4_text")
    with pytest.raises(GraftError, match="5 of the 6 layers that hold KV do so in one shape"):
        cache_from_kv(model, capture(model, ids(1, 5)))


def test_a_student_that_rotates_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = capture(student_of("llama"), ids(1, 5))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", turned_by_half_the_angle)
    with pytest.raises(KVGraftError, match="LlamaForCausalLM"):
        cache_from_kv(student_of("llama"), kv)
