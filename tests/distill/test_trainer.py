"""The training step: the same gradients however a batch is split, nothing from ignored tokens, two learning rates."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from kvgraft.distill import callbacks
from kvgraft.distill.arms import build_arm
from kvgraft.distill.checkpoints import last_checkpoint, saving_into
from kvgraft.errors import AlignmentError, ResultError
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data
from tests.distill.gradients import gradients

OBJECTIVES = ("student_to_teacher", "teacher_to_student", "shared", "alternating", "relational")


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    return float(apart / torch.cat([gradient.flatten() for gradient in one.values()]).norm())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_do_not_depend_on_accumulation(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, objective: str
) -> None:
    found = []
    for accumulation in (1, 4, 8):
        recipe = tiny_recipe(
            training={"steps": 2, "batch_size": 8, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1e9},
            kv_loss={"objective": objective},
            # Prompts are ignored, so that micro-batches count very different numbers of tokens.
            data={"loss_on": "completion", "max_length": 200},
        )
        steps, trainer = gradients(recipe, tmp_path / str(accumulation))
        found.append((steps, trainer.state.log_history))
    for steps, log in found[1:]:
        # Only the first step starts from equal weights.
        assert relative_difference(found[0][0][0], steps[0]) < 1e-6
        first, logged = (next(record for record in history if "kv_loss" in record) for history in (found[0][1], log))
        for part in ("loss", "ce_loss", "kv_loss", "kv_loss/org/teacher-1.0"):
            assert logged[part] == pytest.approx(first[part], rel=1e-4)


def test_gradients_do_not_depend_on_the_number_of_processes(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(
        training={
            "steps": 2,
            "batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 1e9,
            "evaluate_every": 1,
        },
        # The second step has five texts left, which two processes cannot share evenly.
        data={"loss_on": "completion", "max_length": 200, "train_samples": 13},
    )
    of_one, trainer = gradients(recipe, tmp_path / "one")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "tests.distill.gradients", str(path), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    of_two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert of_two["processes"] == 2
    for one, other in zip(of_one, of_two["steps"], strict=True):
        assert relative_difference(one, other) < 1e-5
    logs = [[record for record in log if "kv_loss" in record] for log in (trainer.state.log_history, of_two["log"])]
    for one, other in zip(*logs, strict=True):
        for part in ("loss", "ce_loss", "kv_loss"):
            assert other[part] == pytest.approx(one[part], rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_that_the_labels_ignore_give_no_loss_and_no_gradient(
    tiny_recipe: Callable[..., Recipe], objective: str
) -> None:
    recipe = tiny_recipe(kv_loss={"objective": objective})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data)
    train = data.train_set("kv", 0)
    batch = data.collator([train[0], train[1]])
    batch["labels"][:] = -100
    for kv in batch["teacher_kv"].values():
        kv.mask[:] = False
    outputs = model(**batch)
    outputs["loss"].backward()
    assert all(float(part.detach()) == 0 for part in outputs.values())
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


def test_ignored_labels_take_kv_out_of_the_loss_too(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(data={"loss_on": "completion", "max_length": 200})
    train = arm_data(prepare(recipe)).train_set("kv", 0)
    sample = train[0]
    ignored = sample["labels"] == -100
    mask = sample["teacher_kv"]["org/teacher-1.0"].mask[0]
    assert ignored.sum() > 5
    assert mask.any()
    assert not (mask & ignored).any()


def test_student_and_projector_have_their_own_rates(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(training={"steps": 1, "learning_rate": 5e-5, "projector_learning_rate": 1e-3})
    _, trainer = gradients(recipe, tmp_path)
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["initial_lr"]
    model = trainer.distillation
    assert {rates[id(p)] for p in model.student.parameters()} == {5e-5}
    assert {rates[id(p)] for p in model.projector.parameters() if p.requires_grad} == {1e-3}


def test_every_arm_sees_the_same_batches(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Dropout in the projector draws random numbers that the baseline does not draw.
    recipe = tiny_recipe(training={"steps": 6}, projector={"dropout": 0.5})
    seen = {}
    for arm in ("baseline", "kv", "mismatched"):
        order: list[list[int]] = []
        data = arm_data(prepare(recipe))

        def collate(samples, order=order, collator=data.collator):
            order.append([len(sample["input_ids"]) for sample in samples] + samples[0]["input_ids"].tolist())
            return collator(samples)

        from kvgraft.distill.arms import training_arguments
        from kvgraft.distill.trainer import KVTrainer

        trainer = KVTrainer(
            build_arm(recipe, arm, data),
            training_arguments(recipe, tmp_path / arm),
            data.train_set(arm, recipe.seed),
            data.held_out_set(arm),
            data.tokenizer,
            data_collator=collate,
        )
        trainer.evaluate = lambda *_, **__: {"eval_loss": 0.0}
        trainer.train()
        seen[arm] = order
    assert len(seen["baseline"]) >= 6
    assert seen["baseline"] == seen["kv"] == seen["mismatched"]


def test_reading_ahead_changes_no_number(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several epochs, and steps of two micro-batches; dropout would show a random number drawn elsewhere.
    recipe = tiny_recipe(training={"steps": 12, "gradient_accumulation_steps": 2}, projector={"dropout": 0.5})
    steps, trainer = gradients(recipe, tmp_path / "ahead")
    assert trainer.state.epoch > 2
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    monkeypatch.setattr("kvgraft.distill.callbacks.read_ahead", lambda source, depth: (batch for batch in source))
    plain, _ = gradients(recipe, tmp_path / "plain")
    for one, other in zip(steps, plain, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_mismatched_arm_gets_the_kv_of_another_text(tiny_recipe: Callable[..., Recipe]) -> None:
    data = arm_data(prepare(tiny_recipe()))
    own, other = data.train_set("kv", 0), data.train_set("mismatched", 0)
    assert sorted(other.partner) == list(range(len(other)))
    assert all(partner != index for index, partner in enumerate(other.partner))
    name = "org/teacher-1.0"
    assert torch.equal(own[0]["input_ids"], other[0]["input_ids"])
    tokens = min(own[0]["teacher_kv"][name].keys.shape[3], 8)
    assert not torch.equal(
        own[0]["teacher_kv"][name].keys[..., 3:tokens, :], other[0]["teacher_kv"][name].keys[..., 3:tokens, :]
    )
    # Held-out KV is every text's own: it measures, and does not teach.
    held_out = data.held_out_set("mismatched")
    assert held_out.partner == list(range(len(held_out)))


def test_a_text_that_is_there_twice_is_not_another_text(tiny_recipe: Callable[..., Recipe]) -> None:
    data = arm_data(prepare(tiny_recipe()))
    repeated = [example for example in data.train[:3] for _ in range(4)]
    texts = replace(data, train=repeated).train_set("mismatched", 0)
    assert all(
        repeated[partner].sample_key != example.sample_key
        for example, partner in zip(repeated, texts.partner, strict=True)
    )
    with pytest.raises(AlignmentError, match="two different texts"):
        replace(data, train=repeated[:4]).train_set("mismatched", 0)


@pytest.mark.parametrize("objective", ["student_to_teacher", "relational"])
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, objective: str
) -> None:
    student = tiny_recipe().student.model_dump()
    found = []
    for checkpointing in (False, True):
        recipe = tiny_recipe(
            student={**student, "gradient_checkpointing": checkpointing},
            training={"steps": 1},
            kv_loss={"objective": objective},
        )
        steps, trainer = gradients(recipe, tmp_path / str(checkpointing))
        assert trainer.distillation.student.is_gradient_checkpointing == checkpointing
        found.append(steps[0])
    assert relative_difference(*found) < 1e-6


def test_only_one_process_writes_a_checkpoint(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in every process but the first.
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    _, trainer = gradients(tiny_recipe(training={"steps": 2}), tmp_path / "run")
    trainer.save_model(str(tmp_path / "run" / "student"))
    written = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert all(name.startswith("rng_state") for name in written)


def test_a_checkpoint_is_whole_once_every_process_wrote_its_part(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(accelerator: Accelerator) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Accelerator, "wait_for_everyone", lost)
    with pytest.raises(ResultError, match=r"another process .* ended while .*checkpoint-2 was written .*--resume"):
        gradients(tiny_recipe(training={"steps": 2}), tmp_path)
    assert (tmp_path / "checkpoint-2" / "rng_state.pth").is_file()
    assert last_checkpoint(tmp_path) == (None, 0)


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    for numbers in (10, 10**6):  # torch fails at the end, or with an error of its own before
        message = rf"cannot write weights into {tmp_path}.* bytes are free .*--resume"
        with pytest.raises(ResultError, match=message), saving_into(tmp_path):
            torch.save(torch.zeros(numbers), "/dev/full")
    with pytest.raises(torch.OutOfMemoryError), saving_into(tmp_path):
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt = callbacks.InterruptCallback()
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    interrupt.on_train_begin(arguments, state, control)
    try:
        assert signal.getsignal(number) is not before
        signal.raise_signal(number)
        # A launcher passes on what it gets.
        signal.raise_signal(signal.SIGTERM)
        interrupt.on_step_end(arguments, state, control)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.on_train_end(arguments, state, control)
    assert control.should_save
    assert control.should_training_stop
    assert signal.getsignal(number) is before


def test_processes_stop_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # One process alone was asked to, another one.
    monkeypatch.setattr(callbacks, "from_any_process", lambda said: True)
    interrupt, control = callbacks.InterruptCallback(), TrainerControl()
    interrupt.on_step_end(TrainingArguments(), TrainerState(), control)
    assert (interrupt.interrupted, control.should_save, control.should_training_stop) == (True, True, True)
