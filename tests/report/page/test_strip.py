"""A text in two tokenizations, cut into pieces that belong together."""

from pathlib import Path

import numpy as np
import pytest

from kvgraft.align.tokens import align_encoded
from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.models.loading import load_tokenizer
from kvgraft.recipe import Recipe
from kvgraft.report.page.strip import strip_pieces
from tests.report.page.made_runs import RECIPE


def encoded(*spans: tuple[int, int]) -> EncodedText:
    return EncodedText(list(range(len(spans))), np.array(spans, dtype=np.int32), 0, 99, "key")


def shown(pieces: list) -> list[tuple[list[str], list[str]]]:
    return [([token.text for token in piece.student], [token.text for token in piece.teacher]) for piece in pieces]


def test_pieces_are_cut_where_both_tokenizations_are() -> None:
    student = encoded((0, 0), (0, 2), (2, 4), (4, 6))
    teacher = encoded((0, 4), (4, 6), (6, 6))
    pieces = strip_pieces("ab cde", student, teacher, Recipe.model_validate(RECIPE))
    assert shown(pieces) == [([""], []), (["ab", "·c"], ["ab·c"]), (["de"], ["de"]), ([], [""])]
    assert [piece.differs for piece in pieces] == [True, True, False, True]
    assert pieces[0].student[0].special


def test_a_character_cut_by_a_token_is_shown_in_bytes() -> None:
    pieces = strip_pieces("é", encoded((0, 1), (1, 2)), encoded((0, 2)), Recipe.model_validate(RECIPE))
    assert shown(pieces) == [(["⟨C3⟩", "⟨A9⟩"], ["é"])]


@pytest.mark.parametrize("policy", ["cover", "causal", "mean"])
def test_real_tokenizers_spell_the_text_and_keep_the_alignment(
    tiny_teacher: Path, tiny_student: Path, policy: str
) -> None:
    text = "Tom has 3 apples.\nHe buys 你好 more."
    student, teacher = (encode_with_spans(load_tokenizer(str(folder)), text) for folder in (tiny_student, tiny_teacher))
    recipe = Recipe.model_validate({**RECIPE, "alignment": {"tokens": policy}})
    pieces = strip_pieces(text, student, teacher, recipe)
    tokens = [token for piece in pieces for token in piece.student]
    assert len({token.index for token in tokens}) == len(tokens) == len(student.input_ids)
    # The same text in other tokens, so that the pieces do differ.
    assert any(piece.differs for piece in pieces)
    pairs = [(token.index, partner) for token in tokens for partner in token.partners]
    expected = align_encoded(student, teacher, policy).pairs()
    assert pairs == list(zip(*(index.tolist() for index in expected), strict=True))
    for piece in pieces:
        sides = [
            b"".join(text.encode()[slice(*spans[token.index])] for token in side)
            for spans, side in ((student.spans, piece.student), (teacher.spans, piece.teacher))
        ]
        assert sides[0] == sides[1]
