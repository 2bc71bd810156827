"""A small part of a recipe, run for real on this machine: what :mod:`kvgraft.forecast` reckons the whole from."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvgraft.align.evidence import EVIDENCE_METHODS
from kvgraft.data.batching import EncodedExample, batches_by_length
from kvgraft.data.datasets import Example
from kvgraft.data.spans import sample_key
from kvgraft.distill.arms import tokens_per_batch, train_arm
from kvgraft.distill.dataset import TeacherSource
from kvgraft.identify import identify
from kvgraft.memory import PeakMemory, peak_memory
from kvgraft.plan import existing_parent
from kvgraft.prepare import PreparedTeacher, Texts, prepare, read_texts
from kvgraft.prepare_kv import not_stored
from kvgraft.prepare_log_probs import log_probs_to_fill
from kvgraft.progress import progress_bar
from kvgraft.recipe import Recipe, TeacherRecipe
from kvgraft.run import arm_data
from kvgraft.store.fill import encode_for_teacher
from kvgraft.store.format import stored_bytes_per_token
from kvgraft.store.logits import LogitManifest
from kvgraft.store.reader import KVStore

# One step that is slower than the others, and three to take the mean of.
CALIBRATION_STEPS = 4
_HELD_OUT_BATCHES = 2


@dataclass(frozen=True)
class StorePart:
    """Tokens of a teacher's training or held-out text.

    ``pass_tokens`` are what it has to read yet: texts that lack their KV, or the log-probabilities or likelihoods that
    the run needs.
    """

    tokens: int
    pass_tokens: int


@dataclass(frozen=True)
class TeacherCalibration:
    """What capturing a teacher's KV took over a few texts.

    Attributes:
        load_seconds: until the teacher could run.
        tokens_per_second: capture and writing, of log-probabilities too where arms need them from a store.
        bytes_per_token: on disk, of KV alone.
        once_bytes: on disk for each store beside it, much the same however many tokens it holds.
        captured_tokens: in each of the two small stores.
        whole: training and held-out text of the recipe.
    """

    load_seconds: float
    tokens_per_second: float
    bytes_per_token: int
    once_bytes: int
    captured_tokens: tuple[int, int]
    whole: tuple[StorePart, StorePart]


@dataclass(frozen=True)
class CaptureCalibration:
    """``phase_seconds`` are those of preparing the few texts; ``text_seconds`` of reading all of the text."""

    text_seconds: float
    phase_seconds: dict[str, float]
    text_share: float
    teachers: dict[str, TeacherCalibration]
    peak: PeakMemory


@dataclass(frozen=True)
class ArmCalibration:
    """Seconds of each part of an arm's training. With a teacher the first step measures gradient shares too."""

    setup: float
    evaluation: float
    first_step: float
    step: float
    checkpoint: float
    closing: float


@dataclass(frozen=True)
class TrainingCalibration:
    """``evaluation_share`` is how much of the held-out work one evaluation of the few texts was."""

    arms: dict[str, ArmCalibration]
    phase_seconds: dict[str, float]
    evaluation_share: float
    peak: PeakMemory


@dataclass(frozen=True)
class Calibration:
    """Both halves of a run on a few texts, each measured in a process of its own, and the seconds that took."""

    capture: CaptureCalibration
    training: TrainingCalibration
    seconds: float


def calibrate(recipe: Recipe) -> Calibration:
    """Capture the KV of a few texts and train a few steps of every arm; nothing of it stays on disk.

    The texts are spread evenly over all lengths and include the longest, which set the peak of memory.

    Raises:
        KVGraftError: what would stop the run stops this.
    """
    started = time.monotonic()
    place = existing_parent(recipe.store.path)
    # The disk that the stores are on, unless they lie there to be read only.
    writable = place if os.access(place, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="kvgraft-plan-", dir=writable) as folder,
        progress_bar("calibrating", 2, "parts") as advance,
    ):
        advance(0, note="capturing a few texts")
        capture = _in_fresh_process(_measure_capture, recipe, Path(folder))
        advance(1, note=f"training {', '.join(recipe.arms)} for {CALIBRATION_STEPS} steps")
        training = _in_fresh_process(_measure_training, recipe, Path(folder))
        advance(1, note="")
    return Calibration(capture, training, time.monotonic() - started)


def _measure_capture(recipe: Recipe, folder: Path) -> CaptureCalibration:
    started = time.perf_counter()
    texts = read_texts(recipe)
    text_seconds = time.perf_counter() - started
    prepared = prepare(_small(recipe, folder), few_texts(texts, recipe))
    seconds = prepared.phases.seconds
    return CaptureCalibration(
        text_seconds=text_seconds,
        phase_seconds=dict(seconds),
        text_share=len(prepared.texts.train) / len(texts.train),
        teachers={
            teacher.recipe.name: _teacher_calibration(recipe, teacher, texts, seconds)
            for teacher in prepared.teachers
            if isinstance(teacher.train.store, KVStore)
        },
        peak=peak_memory(),
    )


def _teacher_calibration(
    recipe: Recipe, teacher: PreparedTeacher, texts: Texts, seconds: dict[str, float]
) -> TeacherCalibration:
    name = teacher.recipe.name
    train, held_out = teacher.train.store, teacher.held_out.store
    assert isinstance(train, KVStore)
    assert isinstance(held_out, KVStore)
    held_out_seconds = seconds[f"capture {name} (held-out text)"]
    bytes_per_token = stored_bytes_per_token(train.identity.geometry, train.identity.dtype)
    return TeacherCalibration(
        load_seconds=seconds[f"capture {name} (training text)"] - teacher.report.seconds,
        tokens_per_second=(train.num_tokens + held_out.num_tokens) / (teacher.report.seconds + held_out_seconds),
        bytes_per_token=bytes_per_token,
        once_bytes=train.total_bytes - bytes_per_token * train.num_tokens,
        captured_tokens=(train.num_tokens, held_out.num_tokens),
        whole=(
            store_part(recipe, teacher.recipe, teacher.train, texts.train_examples),
            store_part(recipe, teacher.recipe, teacher.held_out, texts.held_out_examples),
        ),
    )


def store_part(recipe: Recipe, teacher: TeacherRecipe, small: TeacherSource, examples: Sequence[Example]) -> StorePart:
    """Tokens of ``examples`` in a store like that of ``small``, and of those that the recipe's own stores lack."""
    model, identity = identify(teacher), small.store.identity
    encoded = encode_for_teacher(examples, model.tokenizer, identity.max_length)
    tokens = {text.sample_key: len(text.input_ids) for text in encoded}
    # Those that the few texts speak for need not be those that the whole does.
    layers = None if recipe.alignment_of(teacher).layers in EVIDENCE_METHODS else identity.layers
    with_likelihoods = small.likelihoods is not None
    lacking = not_stored(model, examples, layers, identity.max_length, recipe.store, with_likelihoods=with_likelihoods)
    unread = {sample_key(example.text) for example in lacking}
    if recipe.stores_log_probs:
        logits = LogitManifest.read(log_probs_to_fill(model, examples, encoded, identity.max_length, recipe).folder)
        unread |= tokens.keys() - ({} if logits is None else logits.samples).keys()
    return StorePart(sum(tokens.values()), sum(count for key, count in tokens.items() if key in unread))


def _measure_training(recipe: Recipe, folder: Path) -> TrainingCalibration:
    texts = read_texts(recipe)
    small = _small(recipe, folder)
    prepared = prepare(small, few_texts(texts, recipe))
    data = arm_data(prepared)
    arms: dict[str, ArmCalibration] = {}
    for arm in recipe.arms:
        clock = _StepClock(min(CALIBRATION_STEPS, recipe.training.steps))
        train_arm(small, arm, data, folder / arm, callbacks=[clock])
        arms[arm] = clock.calibration()
    batch_size = recipe.training.eval_batch_size
    few, whole = (_padded_tokens(part.held_out, batch_size) for part in (prepared.texts, texts))
    return TrainingCalibration(arms, dict(prepared.phases.seconds), few / whole, peak_memory())


class _StepClock(TrainerCallback):
    """Times the parts of a training and ends it after ``steps``, with an evaluation and a checkpoint."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._started = time.perf_counter()
        self._at: dict[str, float] = {}
        self._step_ends: list[float] = []

    def calibration(self) -> ArmCalibration:
        """To be called as soon as the training is over."""
        finished, at, ends = time.perf_counter(), self._at, self._step_ends
        first = ends[0] - at["train"]
        return ArmCalibration(
            setup=at["ready"] - self._started,
            evaluation=at["evaluated again"] - ends[-1],
            first_step=first,
            step=(ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else first,
            checkpoint=at["saved"] - at["evaluated again"],
            closing=finished - at["saved"],
        )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Everything is set up."""
        self._note("ready")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first evaluation comes before any step, and is slower than those after it."""
        self._note("evaluated again" if self._step_ends else "evaluated")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first batch is not read yet."""
        self._note("train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step done."""
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) == self._steps:
            control.should_evaluate = True
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is on disk."""
        self._note("saved")

    def _note(self, what: str) -> None:
        self._at.setdefault(what, time.perf_counter())


def _small(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` with stores in ``folder``, and without evaluations and checkpoints among its first steps."""
    beyond = recipe.training.steps + 1
    return recipe.model_copy(
        update={
            "store": recipe.store.model_copy(update={"path": folder}),
            "training": recipe.training.model_copy(update={"evaluate_every": beyond, "save_every": beyond}),
        }
    )


def few_texts(texts: Texts, recipe: Recipe) -> Texts:
    """As many of ``texts`` as the few steps and evaluations read."""
    train = _spread_over_lengths(texts.train, CALIBRATION_STEPS * _texts_per_step(texts.train, recipe))
    held_out = _spread_over_lengths(texts.held_out, _HELD_OUT_BATCHES * recipe.training.eval_batch_size)
    return replace(
        texts,
        train_examples=[texts.train_examples[index] for index in train],
        train=[texts.train[index] for index in train],
        held_out_examples=[texts.held_out_examples[index] for index in held_out],
        held_out=[texts.held_out[index] for index in held_out],
    )


def _texts_per_step(texts: Sequence[EncodedExample], recipe: Recipe) -> int:
    if recipe.training.batching == "shuffled":
        return recipe.training.batch_size
    lengths = [len(text.input_ids) for text in texts]
    return math.ceil(tokens_per_batch(recipe, lengths) * len(lengths) / sum(lengths))


class _Tokens(Protocol):
    @property
    def input_ids(self) -> Sequence[int]: ...


def _spread_over_lengths(texts: Sequence[_Tokens], count: int) -> list[int]:
    """Indices of ``count`` texts, evenly spread over all lengths with the longest among them, in their order."""
    by_length = sorted(range(len(texts)), key=lambda index: -len(texts[index].input_ids))
    count = min(count, len(texts))
    return sorted(by_length[turn * len(texts) // count] for turn in range(count))


def _padded_tokens(texts: Sequence[_Tokens], batch_size: int) -> int:
    lengths = [len(text.input_ids) for text in texts]
    return sum(len(batch) * lengths[batch[0]] for batch in batches_by_length(lengths, batch_size))


_Measured = TypeVar("_Measured")


def _in_fresh_process(measure: Callable[[Recipe, Path], _Measured], recipe: Recipe, folder: Path) -> _Measured:
    """``measure(recipe, folder)`` in a process that holds nothing else, so that its memory is that of the work."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_be_silent) as pool:
        return pool.submit(measure, recipe, folder).result()


def _be_silent() -> None:
    # Bars of so many steps that stop after a few would only puzzle; errors reach the caller as exceptions.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
