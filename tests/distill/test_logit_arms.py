"""Logit arms from recipe to report, on tiny random models: stored and online teachers, both kinds of vocabularies."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kvgraft.distill.arms import build_arm
from kvgraft.distill.callbacks import ProgressCallback
from kvgraft.distill.trainer import weights_for_shares
from kvgraft.errors import RecipeError, TrainingInterruptedError
from kvgraft.evaluate.run import EvaluationSettings, evaluate
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.report.log import read_metrics
from kvgraft.run import arm_data, run
from tests.distill.gradients import gradients
from tests.distill.test_trainer import relative_difference

NAME = "org/teacher-1.0"
ARMS = ["baseline", "logits", "kv", "kv_logits"]


@pytest.fixture
def shared_recipe(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Callable[..., Recipe]:
    """The tiny recipe with the teacher's tokenizer for the student."""

    def make(**changes: object) -> Recipe:
        student = {**tiny_recipe().student.model_dump(), "tokenizer": str(tiny_teacher)}
        return tiny_recipe(**{"student": student, "arms": ARMS, **changes})

    return make


def test_four_arms_from_one_recipe(shared_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = shared_recipe(logit_loss={"gradient_share": 0.3, "schedule": "linear_decay"})
    result = run(recipe, tmp_path / "run")
    assert [arm.arm for arm in result.arms] == ARMS
    assert len({arm.first["loss"] for arm in result.arms}) == 1
    assert len({arm.last["loss"] for arm in result.arms}) == 4
    for arm in result.arms:
        assert ("logit_loss" in arm.last) == ("logits" in arm.arm)
        assert ("kv_loss" in arm.last) == ("kv" in arm.arm)
        # Held-out text under a random teacher: what is learnt is the training text's, so only that it is measured.
        assert all(value == value for value in arm.last.values())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shares = [record["gradient_share/logit"] for record in records if "gradient_share/logit" in record]
    # Logged every second step, so that step 1 is the last measured: five sixths of the weight that gives 0.3.
    assert shares[0] == pytest.approx(0.25 / (0.7 + 0.25), abs=1e-4)
    assert {"logit_loss", f"logit_loss/{NAME}", "weight/logit"} <= {key for record in records for key in record}
    table = (tmp_path / "run" / "results.md").read_text()
    assert "logit loss at the end (held out)" in table
    for again in evaluate(tmp_path / "run", EvaluationSettings(only=["quality"])).arms:
        assert again.quality["loss"] == pytest.approx(result.arm(again.arm).last["loss"], rel=1e-5)


@pytest.mark.parametrize("form", ["forward_kl", "sorted_probability", "chunk_likelihood"])
def test_a_store_of_all_tokens_but_one_teaches_what_the_teacher_itself_does(
    shared_recipe: Callable[..., Recipe], tiny_teacher: Path, form: str
) -> None:
    # The rest is one token then and nothing is merged: what is left is the rounding of words.
    top_k = len(AutoTokenizer.from_pretrained(tiny_teacher)) - 1
    found = []
    for source in ("store", "online"):
        recipe = shared_recipe(logit_loss={"form": form, "source": source, "top_k": top_k, "temperature": 1.5})
        data = arm_data(prepare(recipe))
        model = build_arm(recipe, "logits", data)
        train = data.train_set("logits", 0)
        loss = model(**data.collator([train[0], train[3], train[5]]))["logit_loss"]
        loss.backward()
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((float(loss.detach()), gradient))
    (stored, stored_gradient), (online, online_gradient) = found
    assert stored > 0
    assert stored == pytest.approx(online, rel=2e-3)
    # A distance of sorted probabilities has gradients of one size: where two sides nearly meet, rounding turns them.
    assert relative_difference(stored_gradient, online_gradient) < (0.05 if form == "sorted_probability" else 0.01)


@pytest.mark.parametrize("form", ["sorted_probability", "chunk_likelihood"])
def test_different_tokenizers_and_the_loss_falls_on_a_repeated_batch(
    tiny_recipe: Callable[..., Recipe], form: str
) -> None:
    recipe = tiny_recipe(arms=["logits"], logit_loss={"form": form})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "logits", data)
    train = data.train_set("logits", 0)
    batch = data.collator([train[0], train[1], train[2]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch)["logit_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_one_vocabulary_is_asked_for_where_the_loss_needs_it(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(arms=["logits"])
    with pytest.raises(RecipeError, match=r"forward_kl .* teacher org/teacher-1.0 has another tokenizer .* 300 tokens"):
        prepare(recipe)
    # Known before any teacher ran.
    assert not recipe.store.path.exists()


def test_one_pass_of_the_teacher_fills_both_stores(
    shared_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for alone in ("capture", "hidden_states"):
        monkeypatch.setattr(f"kvgraft.store.fill.{alone}", lambda *_, **__: pytest.fail("a pass for one store"))
    data = arm_data(prepare(shared_recipe(arms=["logits", "kv"])))
    for kv, logits in (
        (data.train_sources, data.train_logit_sources),
        (data.held_out_sources, data.held_out_logit_sources),
    ):
        assert logits[0].store is not None
        assert logits[0].store.num_tokens == kv[0].store.num_tokens > 0


def test_stored_targets_stand_where_the_student_predicts(shared_recipe: Callable[..., Recipe]) -> None:
    recipe = shared_recipe(data={"loss_on": "completion", "max_length": 200})
    data = arm_data(prepare(recipe))
    sample = data.train_set("logits", 0)[0]
    mask, labels = sample["teacher_logits"][NAME]["mask"], sample["labels"]
    assert torch.equal(mask[:-1], labels[1:] != -100)
    assert not mask[-1]
    assert "teacher_kv" in sample
    assert not sample["teacher_kv"]


def test_gradients_do_not_depend_on_accumulation(shared_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 4):
        training = {"steps": 1, "batch_size": 8, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1e9}
        recipe = shared_recipe(training=training, data={"loss_on": "completion", "max_length": 200})
        found.append(gradients(recipe, tmp_path / str(accumulation), "kv_logits")[0][0])
    assert relative_difference(*found) < 1e-5


def test_weights_give_parts_their_share_of_the_gradient() -> None:
    norms = {"ce": 2.0, "kv": 0.5, "logit": 4.0}
    weights = {"kv": 3.0, "logit": 1.0}
    one = weights_for_shares(norms, weights, {"logit": 0.3})
    assert one["logit"] * 4 / (2 + 1.5 + one["logit"] * 4) == pytest.approx(0.3)
    both = weights_for_shares(norms, weights, {"logit": 0.3, "kv": 0.2})
    parts = {"ce": 2.0, "kv": both["kv"] * 0.5, "logit": both["logit"] * 4}
    assert parts["logit"] / sum(parts.values()) == pytest.approx(0.3)
    assert parts["kv"] / sum(parts.values()) == pytest.approx(0.2)
    assert weights_for_shares({"ce": 2.0, "kv": 0.5, "logit": 0.0}, weights, {"logit": 0.3}) == {}


def test_measured_weights_survive_a_stop(
    shared_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured at steps 0, 2, 4 ...; stopped at 3, so that the next step needs a weight it did not measure.
    recipe = shared_recipe(
        arms=["kv_logits"],
        training={"steps": 20, "save_every": 100, "evaluate_every": 20, "batch_size": 2},
        data={"held_out_samples": 1, "train_samples": 4},
        kv_loss={"gradient_share": 0.2},
        logit_loss={"gradient_share": 0.3},
    )
    whole = run(recipe, tmp_path / "whole")
    advance = ProgressCallback.on_step_end

    def stop_at_three(self, args, state, control, **options):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return advance(self, args, state, control, **options)

    monkeypatch.setattr(ProgressCallback, "on_step_end", stop_at_three)
    with pytest.raises(TrainingInterruptedError):
        run(recipe, tmp_path / "stopped")
    monkeypatch.undo()
    resumed = run(recipe, tmp_path / "stopped", resume=True)
    assert resumed.arms[0].last == whole.arms[0].last
    weights = json.loads((tmp_path / "whole" / "kv_logits" / "student" / "loss_weights.json").read_text())
    assert set(weights) == {"kv", "logit"}


def test_shares_that_leave_nothing_are_refused(shared_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="leave nothing to cross-entropy"):
        shared_recipe(kv_loss={"gradient_share": 0.5}, logit_loss={"gradient_share": 0.5})
