"""The built-in word problems: worked answers that are right, and splits that share nothing."""

from __future__ import annotations

import hashlib
import random
import re
from fractions import Fraction
from typing import Any, Literal, get_args

import pytest

from kvgraft.data.word_problem_templates import WORDS, Template
from kvgraft.data.word_problems import TEMPLATES, WordProblem, _write, generate
from kvgraft.errors import DataError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
ANNOTATION = re.compile(r"([^ ]+(?: [-+*/x] [^ ]+)*) ?= ?(\$?)<<([^<>=]+)=(\d+)>>(\d+)")
PUT_IN = re.compile(r"\[[^\]]*\]|\([^)]*\|[^)]*\)|\{[^}]*\}")  # what a template leaves to the draw


class Scripted:
    """A source of randomness that is none: the shares it is given, then zeros, which take the first of any choice."""

    def __init__(self, *shares: float) -> None:
        self.shares = [*shares]

    def random(self) -> float:
        return self.shares.pop(0) if self.shares else 0.0


def calculate(expression: str) -> Fraction:
    """The value of a sum without parentheses, times and division first, in exact numbers."""
    total = Fraction(0)
    for sign, product in re.findall(r"(^|[-+])([\d*/]+)", expression):
        value = Fraction(1)
        for operation, number in re.findall(r"(^|[*/])(\d+)", product):
            value = value / int(number) if operation == "/" else value * int(number)
        total += -value if sign == "-" else value
    return total


@pytest.fixture(scope="module", params=SPLITS)
def problems(request: pytest.FixtureRequest) -> list[WordProblem]:
    return generate(request.param, 1500, seed=3)


def test_calculator_of_this_test_knows_arithmetic() -> None:
    assert calculate("2+3*4-10/5") == 12
    assert calculate("7-2-3") == 2
    assert calculate("100*20/100") == 20


def test_every_annotation_is_right_and_its_result_is_written_after_it(problems: list[WordProblem]) -> None:
    for problem in problems:
        lines = problem["answer"].split("\n")
        assert len(lines) >= 2
        for line in lines[:-1]:
            found = ANNOTATION.search(line)
            assert found is not None, line
            assert line.count("<<") == line.count(">>") == 1, line
            written, _, tight, inside, after = found.groups()
            assert inside == after
            assert calculate(tight) == int(inside) >= 2
            assert written.replace(" ", "").replace("x", "*").endswith(tight), line


def test_last_line_is_the_last_result(problems: list[WordProblem]) -> None:
    for problem in problems:
        *steps, last = problem["answer"].split("\n")
        assert last == f"#### {ANNOTATION.findall(steps[-1])[-1][-1]}"


def test_questions_are_distinct_and_nothing_is_left_unfilled(problems: list[WordProblem]) -> None:
    assert len({problem["question"] for problem in problems}) == len(problems)
    for problem in problems:
        assert problem["question"].endswith("?")
        assert "####" not in problem["question"]
        text = problem["question"] + "\n" + problem["answer"]
        assert not re.search(r"[{}\[\]|()#]", text.replace("####", "")), text
        assert not re.search(r"  |^ | $| [.?,%]|[.?,]{2}", text, re.MULTILINE), text
        assert not re.search(r"(?:^|[.?] )[a-z]", text, re.MULTILINE), text
        assert not re.search(r"[a-z]%|\$[a-z]|(?<!\w)1/2 ", text), text


def test_splits_share_no_template_and_no_text() -> None:
    train, held_out = (TEMPLATES[split] for split in SPLITS)
    assert not set(train) & set(held_out)
    for part in ("question", "steps"):
        assert not {getattr(template, part) for template in train} & {getattr(template, part) for template in held_out}
    texts = [{(problem["question"], problem["answer"]) for problem in generate(split, 1500)} for split in SPLITS]
    assert not texts[0] & texts[1]
    questions = [{question for question, _ in side} for side in texts]
    assert not questions[0] & questions[1]


@pytest.mark.parametrize("split", SPLITS)
def test_shorter_list_is_the_start_of_a_longer_one(split: Split) -> None:
    longer = generate(split, 300, seed=7)
    assert generate(split, 300, seed=7) == longer
    for count in (1, 2, 50, 299):
        assert generate(split, count, seed=7) == longer[:count]


@pytest.mark.parametrize("split", SPLITS)
def test_seed_changes_the_problems(split: Split) -> None:
    assert generate(split, 20, seed=0) != generate(split, 20, seed=1)


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "e8628ffad37fd754"), ("held_out", "225884cbf84b95f0")],
)
def test_problems_are_the_same_on_every_machine(split: Split, digest: str) -> None:
    text = "\n\n".join(problem["question"] + "\n" + problem["answer"] for problem in generate(split, 100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_is_used(split: Split) -> None:
    frames = [
        re.compile(".*".join(re.escape(part) for part in PUT_IN.split(template.steps[0])), re.IGNORECASE)
        for template in TEMPLATES[split]
    ]
    answers = [problem["answer"].split("\n")[0] for problem in generate(split, 1500)]
    unused = [frame.pattern for frame in frames if not any(frame.fullmatch(answer) for answer in answers)]
    assert unused == []


def used_in(text: str) -> list[str]:
    return re.findall(r"\{([\w.]+)#?\}", text)


@pytest.mark.parametrize("template", [*TEMPLATES["train"], *TEMPLATES["held_out"]], ids=lambda template: template.draws)
def test_names_of_a_template_are_drawn_computed_or_words(template: Template) -> None:
    drawn = re.findall(r"(\w+) \d+\.\.", template.draws)
    computed = re.findall(r"\[\$?(\w+) =", "".join(template.steps))
    words = {"person", "friend", "other", "they", "their", "them", *WORDS, *(f"{name}.one" for name in WORDS)}
    assert len({*drawn, *computed}) == len(drawn) + len(computed)
    assert not {*drawn, *computed} & words
    assert {*used_in(template.question), *used_in("".join(template.steps))} <= {*drawn, *words}
    known = {*drawn}
    for step in template.steps:
        name, expression = re.findall(r"\[\$?(\w+) = ([^\]]+)\]", step)[0]
        needed = {*re.findall(r"[a-z]+", expression)}
        assert needed <= known
        assert needed & {*drawn} <= {*used_in(template.question)}, "a number that the question does not tell"
        known.add(name)


def test_uneven_numbers_are_thrown_away() -> None:
    source: Any = random.Random(0)
    assert _write(Template("all 7..7; share 2..2", "{all} by {share}?", ("[each = all / share].",)), source) is None
    assert _write(Template("all 7..7; less 6..6", "{all} less {less}?", ("[left = all - less].",)), source) is None
    kept = _write(Template("all 8..8; share 2..2", "{all#} by {share#}?", ("Is [$each = all / share].",)), source)
    assert kept is not None
    assert kept["question"] == "8 by 2?"
    assert kept["answer"].replace(" ", "") == "Is8/2=$<<8/2=4>>4.\n####4"


def test_choices_plurals_pronouns_and_number_words() -> None:
    source: Any = Scripted(0.0, 0.0, 0.0, 0.0, 0.1, 0.2)  # three draws, three people
    template = Template(
        "count 3..3; price 2..2; percent 10..10",
        "(first|second) {person} has {count} {fruit}, one {fruit.one}, ${price} and {count#} more. {they} is {price} "
        "times as old? {their} 1/{price#} is {them}?",
        ("{they} has [total = count * price].", "(|So )[$end = total + percent]."),
    )
    assert _write(template, source) == {
        "question": "First Amara has three apples, one apple, $2 and 3 more. She is twice as old? Her half is her?",
        "answer": "She has 3 * 2 = <<3*2=6>>6.\n6 + 10 = $<<6+10=16>>16.\n#### 16",
    }


@pytest.mark.parametrize(("split", "count"), [("test", 5), ("train", 0), ("held_out", -1)])
def test_bad_split_or_count_is_refused(split: Any, count: int) -> None:
    with pytest.raises(DataError, match=rf"train or held_out and count at least 1; got '{split}', {count}"):
        generate(split, count)


def test_more_problems_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "train", (Template("all 4..5", "Twice {all#}?", ("[two = all * 2].",)),))
    monkeypatch.setattr("kvgraft.data.word_problems.DRAWS_BEFORE_GIVING_UP", 10)
    with pytest.raises(DataError, match="cannot make 5 distinct train problems; 2 came out"):
        generate("train", 5)


@pytest.mark.parametrize("step", ["no sum", "[x = all ** 2]", "[x = -all]"])
def test_template_that_is_no_template_is_refused(step: str) -> None:
    source: Any = random.Random(0)
    with pytest.raises(DataError, match="word problem"):
        _write(Template("all 4..9", "{all}?", (step,)), source)
