"""From text to a cache: a teacher with its own tokenizer, live and from a store, and a student with another one."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.align.tokens import align_encoded, gather_aligned
from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.errors import AlignmentError, GraftError, StoreError
from kvgraft.graft import graft, graft_live, graft_stored, live_kv, own_beginning, stored_kv
from kvgraft.models import loading
from kvgraft.models.capture import capture
from kvgraft.models.geometry import kv_geometry
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.store.fill import fill_store
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.reader import KVStore

TEXTS = ["Tom has 3 apples and buys 4 more.", "Anna reads 12 pages a day for a week. How many is that?"]
LAYERS = [1, 1, 3]  # teacher layers of the three student layers


class Pair:
    """The tiny teacher, a student of three layers with its own tokenizer, and a projector between them."""

    def __init__(self, folder: Path) -> None:
        self.teacher: PreTrainedModel = loading.load_model(str(folder), device="cpu")
        self.teacher_tokenizer: PreTrainedTokenizerBase = loading.load_tokenizer(str(folder))
        self.tokenizer = train_tokenizer(TEXTS, 300)
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=128,
        )
        self.student = LlamaForCausalLM(config).eval()
        width = kv_geometry(self.teacher.config).kv_dim
        self.projector = KVDimensionProjector({"t": {"d_model": width, "num_layers": 3}}, 8, 1.0, per_layer=True)

    def encoded(self, texts: list[str] = TEXTS) -> list[EncodedText]:
        return [encode_with_spans(self.tokenizer, text) for text in texts]

    def store(self, folder: Path) -> KVStore:
        encoded = [encode_with_spans(self.teacher_tokenizer, text) for text in TEXTS]
        geometry = kv_geometry(self.teacher.config)
        identity = StoreIdentity(
            model="tiny",
            tokenizer="tiny",
            text=text_fingerprint(text.sample_key for text in encoded),
            layers=(1, 3),
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype="float32",
            max_length=128,
        )
        to_fill = KVStoreToFill(folder, identity, shard_bytes=1 << 20)
        store, _ = fill_store(to_fill, "t", lambda: self.teacher, encoded, token_budget=512)
        return store


@pytest.fixture(scope="module")
def pair(tiny_teacher: Path) -> Pair:
    return Pair(tiny_teacher)


def test_stored_and_live_kv_are_the_teachers_on_the_students_tokens(pair: Pair, tmp_path: Path) -> None:
    store = pair.store(tmp_path)
    for text, student_text in zip(TEXTS, pair.encoded(), strict=True):
        teacher_text = encode_with_spans(pair.teacher_tokenizer, text)
        own = capture(pair.teacher, torch.tensor([teacher_text.input_ids]), layers=LAYERS)
        expected = gather_aligned(own, align_encoded(student_text, teacher_text, "mean"))
        stored = stored_kv(store, student_text, layers=LAYERS, policy="mean")
        live = live_kv(pair.teacher, pair.teacher_tokenizer, text, student_text, layers=LAYERS, policy="mean")
        for kv in (stored, live):
            assert kv.layers == tuple(LAYERS)
            assert torch.equal(kv.mask, expected.mask)
            torch.testing.assert_close(kv.keys, expected.keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(kv.values, expected.values, atol=1e-5, rtol=0)


def test_a_student_goes_on_from_a_store_as_from_the_live_teacher(pair: Pair, tmp_path: Path) -> None:
    store, encoded = pair.store(tmp_path), pair.encoded()
    options = {"layers": LAYERS, "own_first_tokens": 4, "teacher": "t"}
    question = torch.tensor([pair.tokenizer("How many?")["input_ids"]] * 2)
    with torch.no_grad():
        own = own_beginning(pair.student, encoded, 4)
        stored = graft_stored(pair.student, pair.projector, store, encoded, own_kv=own, **options)
        live = graft_live(
            pair.student, pair.projector, pair.teacher, pair.teacher_tokenizer, TEXTS, encoded, own_kv=own, **options
        )
        alone = [
            graft_stored(
                pair.student,
                pair.projector,
                store,
                [text],
                own_kv=own_beginning(pair.student, [text], 4),
                **options,
            )
            for text in encoded
        ]
        logits = [pair.student(**cache.forward_inputs(question)).logits for cache in (stored, live)]
        row_by_row = [pair.student(**cache.forward_inputs(question[:1])).logits for cache in alone]
    assert stored.next_positions.tolist() == [len(text.input_ids) for text in encoded]
    assert stored.token_ids[1].tolist() == encoded[1].input_ids
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[0], torch.cat(row_by_row), atol=1e-5, rtol=0)


def test_the_first_tokens_are_the_students_own(pair: Pair, tmp_path: Path) -> None:
    store, encoded = pair.store(tmp_path), pair.encoded()[1:]
    with torch.no_grad():
        own = own_beginning(pair.student, encoded, 4)
        whole = capture(pair.student, torch.tensor([encoded[0].input_ids]))
        torch.testing.assert_close(own.keys, whole.keys[:, :, :, :4], atol=1e-6, rtol=0)
        mixed, without = (
            graft_stored(pair.student, pair.projector, store, encoded, teacher="t", layers=LAYERS, **options)
            for options in ({"own_kv": own, "own_first_tokens": 4}, {})
        )
    for layer in range(3):
        values, others = mixed.layers[layer].values, without.layers[layer].values
        assert torch.equal(values[:, :, :4], own.values[:, layer])
        assert torch.equal(values[:, :, 4:], others[:, :, 4:])
        assert not torch.allclose(others[:, :, :4], own.values[:, layer], atol=1e-3)


def test_the_text_decides_the_answer(pair: Pair, tmp_path: Path) -> None:
    store, encoded = pair.store(tmp_path), pair.encoded()
    question = torch.tensor([pair.tokenizer("How many?")["input_ids"]])
    with torch.no_grad():
        logits = [
            pair.student(
                **graft_stored(pair.student, pair.projector, store, [text], teacher="t", layers=LAYERS).forward_inputs(
                    question
                )
            ).logits
            for text in encoded
        ]
    assert not torch.allclose(*logits, atol=1e-5)


def test_texts_that_are_missing_or_others_are_refused(pair: Pair, tmp_path: Path) -> None:
    store, encoded = pair.store(tmp_path), pair.encoded()
    with pytest.raises(StoreError, match="is not in the KV store"):
        stored_kv(store, encode_with_spans(pair.tokenizer, "Something else."))
    with pytest.raises(AlignmentError, match="different texts"):
        live_kv(pair.teacher, pair.teacher_tokenizer, TEXTS[0], encoded[1])
    with pytest.raises(GraftError, match="no text to graft"):
        graft_stored(pair.student, pair.projector, store, [], teacher="t")
    with pytest.raises(GraftError, match="got 1 texts and 2"):
        graft_live(pair.student, pair.projector, pair.teacher, pair.teacher_tokenizer, TEXTS[:1], encoded, teacher="t")
    shortest = min(len(text.input_ids) for text in encoded)
    with pytest.raises(GraftError, match=f"1 to {shortest} tokens.*got {shortest + 1}"):
        own_beginning(pair.student, encoded, shortest + 1)


def test_a_text_without_any_teacher_token_is_refused(pair: Pair, tmp_path: Path) -> None:
    """As where the teacher's tokens were cut off before it began: nothing is grafted silently."""
    kv = stored_kv(pair.store(tmp_path), pair.encoded()[0], layers=LAYERS)
    kv.mask[:] = False
    with pytest.raises(GraftError, match="row 0 has no token to graft"):
        graft(pair.student, pair.projector, kv, teacher="t")
