"""Run folders written by hand, with curves that a test can compute."""

import json
from pathlib import Path

from scipy.stats import binomtest

from kvgraft.evaluate.gsm8k import AnswerSample, ProblemScore
from kvgraft.evaluate.similarity import KINDS, LayerSimilarity
from kvgraft.recipe import Recipe
from kvgraft.report.environment import Environment, Hardware
from kvgraft.report.evaluation import ArmEvaluation, EvaluationReport, write_evaluation
from kvgraft.report.results import ArmResult, Evaluation, RunResult, TeacherResult

ARMS = ("baseline", "kv", "mismatched")
RECIPE = {"name": "made", "teachers": [{"name": "big", "model": "some/big"}], "student": {"new": {}}}


def held_out_loss(arm_index: int, seed: int, step: int) -> float:
    """Falls with the step; arms are 0.5 apart and seeds 0.1."""
    return 3 + 0.5 * arm_index + 0.1 * seed + 4 / (1 + step / 10)


def make_run(
    folder: Path,
    seed: int = 0,
    arms: tuple[str, ...] = ARMS,
    steps: tuple[int, ...] = tuple(range(0, 110, 10)),
    teacher: str = "big",
    recipe: dict | None = None,
    first_arm: int = 0,
) -> Path:
    """What ``kvgraft train`` leaves, as far as a page reads it; ``first_arm`` is the index of the first of ``arms``."""
    folder.mkdir(parents=True)
    fields = {**(recipe or RECIPE), "seed": seed}
    (folder / "recipe.yaml").write_text(Recipe.model_validate(fields).to_yaml(), encoding="utf-8")
    (folder / "experiment.yaml").write_text("experiment:\n  name: made\n", encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for index, arm in enumerate(arms, first_arm):
            for step in steps:
                loss = held_out_loss(index, seed, step)
                record = {"arm": arm, "step": step, "loss": loss, "ce_loss": loss - 0.2, "grad_norm": 1.0 + index}
                if arm != "baseline":
                    record |= {"kv_loss": 1 / (1 + step), "gradient_share/ce": 0.4, "gradient_share/kv": 0.6}
                file.write(json.dumps(record) + "\n")
    result = RunResult(
        name="made",
        date="2026-01-02",
        seed=seed,
        student="new llama",
        student_parameters=1000,
        train_texts=10,
        train_tokens=1000,
        held_out_texts=2,
        truncated_train_texts=1,
        teachers=[
            TeacherResult(
                name=teacher,
                model="some/big",
                layer_map=[(0, 0), (1, 3)],
                tokens=900,
                captured_tokens=900,
                tokens_per_second=450.0,
                store_bytes=9000,
                bytes_per_token=10.0,
                truncated_texts=0,
                alignment_coverage=0.99,
                alignment_dropped={"special": 10, "no_match": 10},
            )
        ],
        arms=[_arm(index, arm, seed, steps) for index, arm in enumerate(arms, first_arm)],
        seconds={"train baseline": 3.0},
        versions={"kvgraft": "0.1.0"},
        environment=Environment(
            versions={"kvgraft": "0.1.0"},
            hardware=Hardware(
                platform="Linux", processor="a processor", cpus=2, memory_gb=16.0, accelerators=["a card"]
            ),
            git_commit=None,
        ),
    )
    result.write(folder / "result.json")
    return folder


def _arm(index: int, arm: str, seed: int, steps: tuple[int, ...]) -> ArmResult:
    evaluations = []
    for step in steps:
        loss = held_out_loss(index, seed, step)
        metrics = {"loss": loss, "perplexity": 2.0, "student_kv_deviation": 1.0, "student_kv_effective_rank": 4.0}
        if arm != "baseline":
            metrics |= {"kv_loss": 1 / (1 + step), "keys_r2/big": 0.5, "values_r2/big": 0.4}
        evaluations.append(Evaluation(step=step, metrics=metrics))
    return ArmResult(arm=arm, steps=steps[-1], seconds=3.0, evaluations=evaluations)


def make_evaluation(
    folder: Path, answers: dict[str, str], *, prompt: str = "Question", teacher: str = "big", problems: int = 1
) -> None:
    """What ``kvgraft evaluate`` leaves where every arm gives its answer to all ``problems``, whose result is 4."""
    samples, arms = [], []
    for index, (arm, answer) in enumerate(answers.items()):
        correct = answer == "#### 4"
        samples += [
            AnswerSample(
                arm=arm,
                prompt=f"{prompt} {problem}",
                answer="#### 4",
                prediction=answer,
                expected_number="4",
                predicted_number="4" if correct else None,
                correct=correct,
            )
            for problem in range(problems)
        ]
        right = problems * correct
        interval = binomtest(right, problems).proportion_ci(method="wilson")
        score = ProblemScore(
            problems=problems,
            correct=right,
            interval=(interval.low, interval.high),
            answered=right,
            empty=0,
            without_room=0,
            tokens=100,
            seconds=2.0,
        )
        arms.append(
            ArmEvaluation(
                arm=arm,
                quality={"loss": 3 - index / 2, "bits_per_byte": 1.5 - index / 4},
                similarity={teacher: _similarity(with_projector=index > 0)},
                problems=score,
                tasks={"made": {"acc": index / 2}},
            )
        )
    asked = {"gsm8k": {"data": "word_problems", "problems": problems, "shots": 2, "calculator": False}}
    asked["gsm8k"] |= {"max_new_tokens": None, "batch_size": 16}
    report = EvaluationReport(name="made", held_out_texts=2, asked=asked, arms=arms)
    write_evaluation(report, samples, folder / "evaluation")


def _similarity(with_projector: bool) -> list[LayerSimilarity]:
    return [
        LayerSimilarity(
            kind=kind,
            student_layer=student,
            teacher_layer=teacher,
            projector_r2=float(student) if with_projector else None,
            projector_cosine=float(student) if with_projector else None,
            least_squares_r2=0.5,
            least_squares_cosine=0.7,
            cka=0.3,
            student_effective_rank=4.0,
            teacher_effective_rank=9.0,
        )
        for kind in KINDS
        for student, teacher in ((0, 0), (1, 3))
    ]
