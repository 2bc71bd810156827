"""How final numbers are read, sums are solved and answers are scored."""

import pytest

from kvgraft.data.datasets import Example
from kvgraft.data.word_problems import generate
from kvgraft.errors import DataError
from kvgraft.evaluate import gsm8k
from kvgraft.evaluate.generation import Generation
from kvgraft.evaluate.gsm8k import AnswerSettings, Problem, answer_problems, final_number, problems_of, prompt_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 * 4 = <<3*4=12>>12.\n#### 12", "12"),
        ("#### 1,234", "1234"),
        ("#### -5\n\nQuestion\n#### 7", "-5"),
        ("#### 0.5 dollars", "0.5"),
        ("#### $5", None),
        ("####5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_final_number_is_read_as_the_authors_read_it(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = $<<48/2=", "24>>"),
        ("<<1,200*3=", "3600>>"),
        ("<<(2+3)*-.5=", "-2.5>>"),
        ("<<10/3=", "3.333333333>>"),
        ("<<1/0=", None),
        ("<<2**9=", None),
        ("<<2+=", None),
        ("<<48/2=24>>24 =", None),
        ("48/2 =", None),
        # What a student that repeats itself may write: no number that can be written, no room for its signs.
        (f"<<1{'0' * 320}/3=", None),
        (f"<<{'9' * 2200}*{'9' * 2200}=", None),
        (f"<<{'-' * 30000}1=", None),
    ],
)
def test_open_sums_are_solved(text: str, answer: str | None) -> None:
    assert gsm8k.solve_open_sum(text) == answer


def test_the_calculator_agrees_with_every_annotation_of_the_word_problems() -> None:
    for problem in generate("train", 50, seed=1):
        pieces = problem["answer"].split("<<")[1:]
        assert pieces
        for piece in pieces:
            total, _, rest = piece.partition("=")
            assert gsm8k.solve_open_sum(f"<<{total}=") == rest[: rest.index(">>") + 2]


def test_only_texts_with_a_question_and_a_final_number_are_problems(caplog: pytest.LogCaptureFixture) -> None:
    good = Example("How many?\n2 and 2.\n#### 4", 10)
    found = problems_of([good, Example("How many?\nMany.", 10), Example("#### 4")], "here")
    assert found == [Problem("How many?\n", "2 and 2.\n#### 4")]
    assert "2 of 3 texts of here have no final number" in caplog.text
    with pytest.raises(DataError, match="here holds no problems in GSM8K's form"):
        problems_of([Example("a text")], "here")


def test_prompt_shows_solved_problems_first() -> None:
    first, second = Problem("One?\n", "#### 1\n"), Problem("Two?\n", "#### 2")
    assert prompt_of(first) == "One?\n"
    assert prompt_of(second, [first]) == "One?\n#### 1\n\nTwo?\n"


def test_score_counts_right_wrong_missing_and_empty_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(f"{n}?\n", f"#### {n},000") for n in range(1, 5)]
    written = [Generation("#### 1000", 4), Generation("#### 7", 4), Generation("so many", 2), Generation("", 0, False)]
    monkeypatch.setattr(gsm8k, "generate_greedy", lambda *_, **__: written)
    score, samples = answer_problems("kv", None, None, problems, AnswerSettings())
    assert (score.problems, score.correct, score.answered, score.empty, score.without_room) == (4, 1, 2, 1, 1)
    assert score.accuracy == 0.25
    assert score.tokens == 10
    # Wilson 1927, from its formula for 1 of 4 at z = 1.95996.
    assert score.interval == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert [sample.correct for sample in samples] == [True, False, False, False]
    assert [sample.predicted_number for sample in samples] == ["1000", "7", None, None]
