"""Exact match on problems in GSM8K's form: the student writes an answer, and its final number is held to the right one.

The final number is read as the data set's authors read it (Cobbe et al. 2021, openai/grade-school-math, dataset.py):
the first ``#### `` and the number after it, commas removed, compared as text.
"""

from __future__ import annotations

import ast
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.data.datasets import Example
from kvgraft.data.word_problems import OPERATORS
from kvgraft.errors import DataError
from kvgraft.evaluate.generation import Generation, generate_greedy

logger = logging.getLogger(__name__)

_FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_FINAL_LINE = re.compile(r"#### (\-?[0-9\.\,]+)[^\n]*\n")
_OPEN_SUM = re.compile(r"<<([0-9*+\-/.(), ]+)=$")


@dataclass(frozen=True)
class Problem:
    """A question as the student reads it in training, up to where its answer starts, and the answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class AnswerSettings:
    """How problems are put to a student.

    Attributes:
        shots: solved problems before each question.
        calculator: work out every ``<<48/2=`` that the student writes, and go on after ``<<48/2=24>>``, as the data
            set's authors do at test time.
        max_new_tokens, batch_size: as :func:`kvgraft.evaluate.generation.generate_greedy` takes them.
    """

    shots: int = 0
    calculator: bool = False
    max_new_tokens: int | None = None
    batch_size: int = 16


class AnswerSample(BaseModel):
    """One problem as a student answered it; ``prediction`` is as written, annotations and all."""

    model_config = ConfigDict(extra="forbid")

    arm: str
    prompt: str
    answer: str
    prediction: str
    expected_number: str
    predicted_number: str | None
    correct: bool


class ProblemScore(BaseModel):
    """Exact match of one student.

    Attributes:
        interval: 95 % Wilson interval of the accuracy.
        answered: predictions with a final number.
        empty: predictions without a character.
        without_room: prompts that left no room for an answer in the student's context; they count as wrong.
        tokens, seconds: of all predictions.
    """

    model_config = ConfigDict(extra="forbid")

    problems: int
    correct: int
    interval: tuple[float, float]
    answered: int
    empty: int
    without_room: int
    tokens: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of problems whose final number is right."""
        return self.correct / self.problems


def final_number(text: str) -> str | None:
    """The first number after ``#### ``, commas removed; None where there is none."""
    found = _FINAL_NUMBER.search(text)
    return found[1].strip().replace(",", "") if found else None


def solve_open_sum(text: str) -> str | None:
    """What follows where ``text`` ends in an open annotation such as ``<<48/2=``: ``24>>``. None where it does not.

    Whole results have no decimal point, as in the data set; a sum that makes no sense, or is too large to write, is
    left to the student.
    """
    found = _OPEN_SUM.search(text)
    if not found:
        return None
    try:
        result = _value(ast.parse(found[1].replace(",", "").strip(), mode="eval").body)
        return f"{result if result.denominator == 1 else f'{float(result):.10g}'}>>"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def problems_of(examples: Sequence[Example], source: str) -> list[Problem]:
    """Those of ``examples`` that have a question and an answer with a final number.

    Raises:
        DataError: there are none.
    """
    found = [
        Problem(example.text[: example.prompt_characters], example.text[example.prompt_characters :])
        for example in examples
        if example.prompt_characters and final_number(example.text[example.prompt_characters :]) is not None
    ]
    if not found:
        raise DataError(
            f"{source} holds no problems in GSM8K's form: a question, and an answer that ends in `#### 24`. Name a "
            "source that does with --data (word_problems, gsm8k, a file with question and answer)"
        )
    if len(found) < len(examples):
        logger.warning(
            "%d of %d texts of %s have no final number and are not asked",
            len(examples) - len(found),
            len(examples),
            source,
        )
    return found


def prompt_of(problem: Problem, shots: Sequence[Problem] = ()) -> str:
    """The question, after solved problems with a blank line between them."""
    return "".join(f"{shot.question}{shot.answer.rstrip()}\n\n" for shot in shots) + problem.question


def answer_problems(
    arm: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    settings: AnswerSettings,
    shots: Sequence[Problem] = (),
) -> tuple[ProblemScore, list[AnswerSample]]:
    """Let ``model`` answer every problem; the samples are in the order of ``problems``."""
    prompts = [prompt_of(problem, shots) for problem in problems]
    started = time.perf_counter()
    written = generate_greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        # After solved problems a student may go on with a problem of its own, whose number is none of this one's.
        is_complete=lambda text: bool(_FINAL_LINE.search(text) or (shots and "\n\n" in text)),
        must_continue=solve_open_sum if settings.calculator else None,
        description=f"answering ({arm})",
    )
    seconds = time.perf_counter() - started
    samples = [
        _sample(arm, prompt, problem, generation.text)
        for prompt, problem, generation in zip(prompts, problems, written, strict=True)
    ]
    return _score(samples, written, seconds), samples


def _sample(arm: str, prompt: str, problem: Problem, prediction: str) -> AnswerSample:
    expected, predicted = final_number(problem.answer), final_number(prediction)
    assert expected is not None
    return AnswerSample(
        arm=arm,
        prompt=prompt,
        answer=problem.answer,
        prediction=prediction,
        expected_number=expected,
        predicted_number=predicted,
        correct=predicted == expected,
    )


def _score(samples: Sequence[AnswerSample], written: Sequence[Generation], seconds: float) -> ProblemScore:
    correct = sum(sample.correct for sample in samples)
    interval = binomtest(correct, len(samples)).proportion_ci(method="wilson")
    without_room = sum(not generation.had_room for generation in written)
    if without_room:
        logger.warning("%d of %d prompts leave no room for an answer and count as wrong", without_room, len(samples))
    return ProblemScore(
        problems=len(samples),
        correct=correct,
        interval=(float(interval.low), float(interval.high)),
        answered=sum(sample.predicted_number is not None for sample in samples),
        empty=sum(not sample.prediction.strip() for sample in samples),
        without_room=without_room,
        tokens=sum(generation.tokens for generation in written),
        seconds=seconds,
    )


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not a sum: {ast.unparse(node)}")
