"""lm-eval on a saved student; what runs it is skipped where lm-eval is not installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvgraft.errors import DataError
from kvgraft.evaluate.harness import TASKS_FOLDER, own_tasks, require_tasks, task_scores
from kvgraft.models.lora import add_lora, save_student

TASK = "kvgraft_word_problems"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'kvgraft[eval]'"
)


def test_our_task_has_one_right_choice_in_four_and_no_place_is_favoured() -> None:
    rows = _problems()
    assert own_tasks() == [TASK]
    assert len(rows) == 100
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["right"] == place for row in rows) for place in range(4)] == [25] * 4


def test_missing_lm_eval_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgraft.evaluate.harness.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"--tasks arc_easy needs lm-eval: pip install 'kvgraft\[eval\]'"):
        require_tasks(["arc_easy"])


@needs_lm_eval
@pytest.mark.parametrize("lora", [False, True])
def test_our_task_scores_what_a_plain_computation_scores(tiny_student: Path, tmp_path: Path, lora: bool) -> None:
    if lora:
        tiny_student = _with_adapters(tiny_student, tmp_path / "adapters")
    scores = task_scores(tiny_student, [TASK], limit=8)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_student), AutoTokenizer.from_pretrained(tiny_student)
    right = 0
    for row in _problems()[:8]:
        context = f"{row['question']}\n{row['steps']}\n####"
        losses = [_loss(model, tokenizer, context, f" {choice}") for choice in row["choices"]]
        right += losses.index(min(losses)) == row["right"]
    assert scores[TASK]["acc"] == pytest.approx(right / 8)
    assert scores[TASK]["acc_stderr"] >= 0


def test_unknown_tasks_are_named_with_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the whole index of lm-eval takes a minute.
    monkeypatch.setattr("kvgraft.evaluate.harness.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("kvgraft.evaluate.harness.known_tasks", lambda: {"arc_easy", "arc_challenge"})
    require_tasks([TASK])
    require_tasks(["arc_easy", TASK])
    with pytest.raises(DataError, match=r"lm-eval knows no task 'arc_eazy'; near it are arc_easy"):
        require_tasks(["arc_easy", "arc_eazy"])


def _with_adapters(base: Path, folder: Path) -> Path:
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), 2, 4, 0.0, "all-linear", seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    save_student(model, folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _problems() -> list[dict]:
    spec = importlib.util.spec_from_file_location("problems", TASKS_FOLDER / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.load()["test"])


@torch.no_grad()
def _loss(model: torch.nn.Module, tokenizer: object, context: str, choice: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
    return float(F.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum"))
