"""What came out of a run: the numbers of each arm, and what compares them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvgraft.align.evidence import LayerEvidence
from kvgraft.errors import ResultError
from kvgraft.memory import PeakMemory
from kvgraft.report.environment import Environment
from kvgraft.store.atomic_file import write_text_atomically

RECIPE_FILE, RESULT_FILE, METRICS_FILE, LOG_FILE = "recipe.yaml", "result.json", "metrics.jsonl", "experiment.yaml"
FORMAT_VERSION = 1
CONVERGENCE_RULE = "first evaluated step at which 95 % of the loss's whole fall was done"


class Record(BaseModel):
    """A measured result, or a part of one."""

    # Of a training that diverged, a loss is NaN or infinite: null, pydantic's default, could not be read again.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class SavedResult(Record):
    """A result with a file of its own. ``format_version`` rises when a reader of today could not read it any more."""

    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Save as JSON."""
        write_text_atomically(path, self.model_dump_json(indent=2) + "\n")


Saved = TypeVar("Saved", bound=SavedResult)


class _Version(BaseModel):
    format_version: int = FORMAT_VERSION


def read_result(kind: type[Saved], path: Path) -> Saved:
    """Load what ``kind``'s ``write`` saved.

    Raises:
        ResultError: no such file, one of a newer version, or one that does not hold what ``kind`` holds.
    """
    if not path.is_file():
        raise ResultError(f"no result at {path}: what should have written it did not finish; run it again to go on")
    text = path.read_text(encoding="utf-8")
    try:
        version = _Version.model_validate_json(text).format_version
        if version > FORMAT_VERSION:
            raise ResultError(
                f"{path} was written by a newer kvgraft (format {version}; this one reads up to {FORMAT_VERSION}); "
                "upgrade kvgraft to read it"
            )
        return kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ResultError(
            f"{path} is not what kvgraft writes: {field}: {problem['msg']} ({error.error_count()} problems in all); "
            "remove it and run again what wrote it"
        ) from error


class Evaluation(Record):
    """Held-out metrics after ``step`` steps."""

    step: int
    metrics: dict[str, float]


class ArmResult(Record):
    """One training: its held-out evaluations in order (the first before any step), and what it took.

    ``seconds`` is the wall time of the process that finished it; ``seconds_at`` that of the training up to an evaluated
    step, evaluations included, over all processes that went on with it. ``real_token_share`` is the part of what the
    student ran over that was no padding.
    """

    arm: str
    steps: int
    seconds: float
    evaluations: list[Evaluation]
    gradient_shares: dict[str, float] = {}
    non_finite_steps: int = 0
    projector_parameters: int = 0
    seconds_at: dict[int, float] = {}
    real_token_share: float | None = None

    @property
    def first(self) -> dict[str, float]:
        """Held-out metrics before training."""
        return self.evaluations[0].metrics

    @property
    def last(self) -> dict[str, float]:
        """Held-out metrics after training."""
        return self.evaluations[-1].metrics

    @property
    def has_diverged(self) -> bool:
        """Whether training left a student whose held-out loss is no number."""
        return not math.isfinite(self.last["loss"])

    @property
    def training_seconds(self) -> float:
        """Wall time of the training over all processes that went on with it, where that was recorded."""
        return max(self.seconds_at.values(), default=self.seconds)

    def steps_to(self, loss: float) -> int | None:
        """The first evaluated step whose held-out loss is at most ``loss``; None if there is none."""
        return next((point.step for point in self.evaluations if point.metrics["loss"] <= loss), None)

    def kv_reduction(self) -> float | None:
        """Share of the held-out KV loss that training took away."""
        if "kv_loss" not in self.last or not self.first["kv_loss"]:
            return None
        return 1 - self.last["kv_loss"] / self.first["kv_loss"]

    def convergence_step(self, metric: str) -> int | None:
        """Step by :data:`CONVERGENCE_RULE` for a held-out loss; None where it did not fall or was not measured."""
        if metric not in self.last or not -math.inf < self.last[metric] < self.first[metric] < math.inf:
            return None
        bar = self.last[metric] + 0.05 * (self.first[metric] - self.last[metric])
        return next(point.step for point in self.evaluations if point.metrics[metric] <= bar)


class TeacherResult(Record):
    """What one teacher's KV cost, and how much of the student's text it answers for."""

    name: str
    model: str
    layer_map: list[tuple[int, int]]
    tokens: int
    captured_tokens: int
    tokens_per_second: float | None
    store_bytes: int
    bytes_per_token: float
    truncated_texts: int
    alignment_coverage: float
    alignment_mean_span: float | None = None
    alignment_dropped: dict[str, int]
    store_fingerprint: str = ""
    layer_evidence: LayerEvidence | None = None


class RunResult(SavedResult):
    """Everything that a run measured; ``seconds`` holds the wall time of each phase.

    ``started_embeddings`` is the share of the student's tokens whose embeddings started from a teacher's.
    ``peak_memory`` is that of the main process, the one that finished the run.
    """

    name: str
    date: str
    seed: int
    student: str
    student_parameters: int
    started_embeddings: float | None = None
    train_texts: int
    train_tokens: int
    held_out_texts: int
    truncated_train_texts: int
    teachers: list[TeacherResult]
    arms: list[ArmResult] = []
    seconds: dict[str, float] = {}
    peak_memory: PeakMemory | None = None
    versions: dict[str, str] = {}
    environment: Environment | None = None

    def arm(self, name: str) -> ArmResult | None:
        """The result of arm ``name``, or None if the run has none."""
        return next((arm for arm in self.arms if arm.arm == name), None)

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Load what :meth:`write` saved; see :func:`read_result`."""
        return read_result(cls, path)


def as_plain(value: Any) -> Any:
    """``value`` with floats rounded to what a reader can use."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
