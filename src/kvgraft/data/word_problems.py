"""Grade-school word problems with worked answers in GSM8K's form, made from templates and a seed.

The two splits share no template, so a held-out problem asks for steps in an order and in sentences that training never
showed. No text of GSM8K is used. The templates are in ``word_problem_templates``, in this notation:

- ``draws``: ``name LOW..HIGH`` draws a whole number, ``name LOW..HIGH/STEP`` one of LOW, LOW + STEP, ...;
- ``{name}`` puts a drawn number (``{name#}``: never spelled out) or an entry of ``WORDS`` (``{name.one}``: singular);
  ``{person}``, ``{friend}`` and ``{other}`` are three people, ``{they}``, ``{their}``, ``{them}`` the pronouns of the
  first;
- ``(this|that)`` takes one of the choices, which may be empty;
- ``[total = price * count]`` in an answer computes, names the result for later steps, and is written as GSM8K does:
  ``3 * 4 = <<3*4=12>>12``; ``[$total = ...]`` puts a dollar sign before the result.

A draw whose results are not all whole numbers of 2 or more is thrown away, so that sums come out even and every noun
stays plural. Randomness comes from ``random.Random.random`` alone, whose stream Python keeps from release to release.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, TypedDict, TypeVar

from kvgraft.data.word_problem_templates import HELD_OUT, MEN, TRAIN, WOMEN, WORDS, Template
from kvgraft.errors import DataError

TEMPLATES: dict[str, tuple[Template, ...]] = {"train": TRAIN, "held_out": HELD_OUT}
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SPELLED = dict(enumerate(NUMBER_WORDS, start=2))
SPELLED_SHARE = 0.3  # of the questions write small numbers as words
# How an annotator writes the sum before its annotation: around operators and the equals sign, and the sign for times.
SURFACES = ((" ", "*"), ("", "*"), (" ", "x"))
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
DRAWS_BEFORE_GIVING_UP = 10_000

Choice = TypeVar("Choice")


class WordProblem(TypedDict):
    """A question and its worked answer, whose last line is ``#### `` and the final number."""

    question: str
    answer: str


def generate(split: Literal["train", "held_out"], count: int, seed: int = 0) -> list[WordProblem]:
    """``count`` problems with distinct questions; the same on every machine, and a prefix of any longer list."""
    if split not in TEMPLATES or count < 1:
        raise DataError(f"word problems: split must be train or held_out and count at least 1; got {split!r}, {count}")
    source = random.Random(f"{split} {seed}")
    problems: dict[str, WordProblem] = {}
    discarded = 0
    while len(problems) < count:
        problem = _write(_pick(source, TEMPLATES[split]), source)
        if problem is None or problem["question"] in problems:
            discarded += 1
            if discarded > DRAWS_BEFORE_GIVING_UP + 100 * count:
                raise DataError(
                    f"cannot make {count} distinct {split} problems; {len(problems)} came out. Ask for fewer."
                )
            continue
        problems[problem["question"]] = problem
    return list(problems.values())


def _write(template: Template, source: random.Random) -> WordProblem | None:
    """One problem, or None if its numbers do not come out even."""
    numbers = _draw(template.draws, source)
    words = _people(source) | _nouns(source)
    steps = []
    surface = _pick(source, SURFACES)
    for step in template.steps:
        match = re.search(r"\[(\$?)(\w+) = ([^\]]+)\]", step)
        if match is None:
            raise DataError(f"word problem step without [name = sum]: {step!r}")
        dollar, name, expression = match.groups()
        filled = re.sub(r"[a-z]+", lambda found: str(numbers[found[0]]), expression)
        result = _evaluate(ast.parse(filled, mode="eval").body)
        if result.denominator != 1 or result < 2:
            return None
        numbers[name] = result.numerator
        steps.append(step.replace(match[0], _annotated(filled, result.numerator, dollar, surface)))
    spelled = source.random() < SPELLED_SHARE
    question = _fill(template.question, numbers, words, source, spelled)
    lines = [_fill(step, numbers, words, source, spelled=False) for step in steps]
    return {"question": question, "answer": "\n".join([*lines, f"#### {numbers[name]}"])}


def _draw(draws: str, source: random.Random) -> dict[str, int]:
    numbers = {}
    for name, low, high, step in re.findall(r"(\w+) (\d+)\.\.(\d+)(?:/(\d+))?", draws):
        numbers[name] = _pick(source, range(int(low), int(high) + 1, int(step or 1)))
    return numbers


def _people(source: random.Random) -> dict[str, str]:
    names: list[str] = []
    while len(names) < 3:
        name = _pick(source, (*WOMEN, *MEN))
        if name not in names:
            names.append(name)
    pronouns = ("she", "her", "her") if names[0] in WOMEN else ("he", "his", "him")
    return dict(zip(("person", "friend", "other", "they", "their", "them"), (*names, *pronouns), strict=True))


def _nouns(source: random.Random) -> dict[str, str]:
    nouns = {}
    for pool, entries in WORDS.items():
        one, _, many = _pick(source, entries).partition("/")
        nouns[f"{pool}.one"] = one
        nouns[pool] = many or one
    return nouns


def _fill(text: str, numbers: dict[str, int], words: dict[str, str], source: random.Random, spelled: bool) -> str:
    """``text`` with choices taken, names put in, and a capital at the start of every sentence."""

    def put(match: re.Match[str]) -> str:
        dollar, name, digits = match.groups()
        if name in words:
            return words[name]
        number = numbers[name]
        return SPELLED.get(number, str(number)) if spelled and not dollar and not digits else f"{dollar}{number}"

    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda match: _pick(source, match[1].split("|")), text)
    text = re.sub(r"(\$?)\{([\w.]+)(#?)\}", put, text)
    text = re.sub(r"\b(2|two) times\b", "twice", text.replace("1/2 ", "half "))
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _annotated(expression: str, result: int, dollar: str, surface: tuple[str, str]) -> str:
    space, times = surface
    tight = expression.replace(" ", "")
    written = expression.replace(" ", space).replace("*", times)
    return f"{written}{space}={space}{dollar}<<{tight}={result}>>{result}"


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise DataError(f"word problem sums are made of + - * / and whole numbers; got {ast.unparse(node)}")


def _pick(source: random.Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(source.random() * len(choices))]
