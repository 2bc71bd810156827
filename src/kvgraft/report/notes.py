"""What a run noticed about itself, in sentences; and what a person adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from kvgraft.errors import RecipeError
from kvgraft.report.results import LOG_FILE, RECIPE_FILE, ArmResult, RunResult

NOTES_FILE = "notes.txt"
# Below these a reader should look closer.
_SMALL_SHARE = 0.01
_COLLAPSED = 0.5
_DEAD = 0.01


def noticed(result: RunResult) -> list[str]:
    """One sentence for each thing worth knowing, outcomes first."""
    baseline = result.arm("baseline")
    notes = []
    for arm in result.arms:
        line = f"{arm.arm}: held-out loss {arm.first['loss']:.3f} -> {arm.last['loss']:.3f}"
        if baseline is not None and arm is not baseline:
            line += f", {arm.last['loss'] - baseline.last['loss']:+.3f} against the baseline"
        notes.append(line)
    for teacher in result.teachers:
        notes.append(
            f"{teacher.name}: {teacher.alignment_coverage:.1%} of the student's tokens aligned, "
            f"{teacher.bytes_per_token:,.0f} bytes of KV per token"
        )
    notes += _truncation(result)
    for arm in result.arms:
        notes += [f"{arm.arm}: {sign}" for sign in _signs(arm)]
    return notes


def _truncation(result: RunResult) -> Iterator[str]:
    if result.truncated_train_texts:
        yield (
            f"{result.truncated_train_texts:,} of {result.train_texts:,} training texts were cut to data.max_length; "
            "their ends were never learned"
        )
    for teacher in result.teachers:
        if teacher.truncated_texts:
            # Where it stops is in `teacher_max_length` of prepare; a student that stops sooner has lost nothing by it.
            yield (
                f"{teacher.name}: {teacher.truncated_texts:,} texts were read only in part, as far as the teacher's "
                "context and twice data.max_length reach"
            )


def _signs(arm: ArmResult) -> Iterator[str]:
    for name, what in (("student_kv_deviation", "deviation"), ("student_kv_effective_rank", "effective rank")):
        before, after = arm.first.get(name), arm.last.get(name)
        if before and after is not None and after < _COLLAPSED * before:
            yield f"the student's KV lost {1 - after / before:.0%} of its {what} ({before:.3g} -> {after:.3g})"
    for part, share in arm.gradient_shares.items():
        if share < _SMALL_SHARE:
            yield (
                f"{part} made up {share:.2%} of the gradient norm, so it hardly taught anything; give it more weight "
                "or leave it out"
            )
    for name, share in arm.last.items():
        teacher = name.removeprefix("dead_units/")
        if teacher != name and share >= _DEAD:
            yield f"{share:.0%} of the hidden units of {teacher}'s adapters are dead; SiLU and GELU leave none"
    if arm.non_finite_steps:
        yield f"{arm.non_finite_steps} of the logged steps had a loss or gradient that is not finite"


def added_notes(folder: Path) -> list[str]:
    """What people added to the run in ``folder``, in order."""
    path = folder / NOTES_FILE
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def add_note(folder: Path, text: str) -> Path:
    """Keep ``text`` as one line in the run's notes, and in its log if that is written already.

    Returns:
        the file to read it in: the log, or the notes alone where there is none yet.

    Raises:
        RecipeError: ``folder`` is no run, or the note is empty.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} is no run folder: it has no {RECIPE_FILE}; name one that `kvgraft train` wrote")
    line = " ".join(text.split())
    if not line:
        raise RecipeError('the note is empty; write what should be remembered: kvgraft note RUN "..."')
    with (folder / NOTES_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    log_path = folder / LOG_FILE
    if not log_path.is_file():
        return folder / NOTES_FILE
    log = yaml.safe_load(log_path.read_text(encoding="utf-8"))
    log["notes"].append(line)
    log_path.write_text(yaml.safe_dump(log, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return log_path
