"""Planned batches in training: losses and gradients of packed texts, and which batches arms, processes and resumed
trainings see."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from torch import Tensor

from kvgraft.data.batch_plan import real_token_share
from kvgraft.distill.arms import build_arm, training_arguments, training_batches
from kvgraft.distill.dataset import DistillationDataset, PlannedBatches
from kvgraft.distill.model import DistillationModel
from kvgraft.distill.trainer import KVTrainer
from kvgraft.errors import ModelError
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data, run
from tests.distill.test_trainer import relative_difference

TEACHER = "org/teacher-1.0"
OBJECTIVES = ("student_to_teacher", "teacher_to_student", "relational")


def losses_and_gradients(model: DistillationModel, batch: dict) -> tuple[dict[str, float], dict[str, Tensor]]:
    outputs = model(**batch)
    outputs["loss"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {name: float(value.detach()) for name, value in outputs.items()}, found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_texts_give_the_losses_and_gradients_of_padded_ones(
    tiny_recipe: Callable[..., Recipe], objective: str
) -> None:
    recipe = tiny_recipe(kv_loss={"objective": objective})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data)
    samples = [data.train_set("kv", 0)[text] for text in range(6)]
    # Unlike lengths, so that rows are unlike too.
    padded = data.collator(samples)
    packed = data.collator(samples, [3, 1, 2])
    assert packed["packed_positions"].shape[0] == 3
    (own, own_gradients), (other, other_gradients) = (losses_and_gradients(model, b) for b in (padded, packed))
    assert own.keys() == other.keys() >= {"ce_loss", "kv_loss"}
    for name, value in own.items():
        assert other[name] == pytest.approx(value, rel=1e-5)
    assert relative_difference(own_gradients, other_gradients) < 1e-5


@pytest.mark.parametrize(
    "logit_loss", [{"source": "store"}, {"source": "online"}, {"form": "chunk_likelihood", "temperature": 100.0}]
)
def test_packed_texts_give_the_logit_loss_of_padded_ones(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, logit_loss: dict
) -> None:
    changes: dict = {"student": {"tokenizer": str(tiny_teacher)}, "arms": ["logits"], "logit_loss": logit_loss}
    recipe = tiny_recipe(**changes)
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "logits", data)
    samples = [data.train_set("logits", 0)[text] for text in range(4)]
    padded, packed = (model(**data.collator(samples, rows))["logit_loss"].item() for rows in (None, [2, 2]))
    assert packed == pytest.approx(padded, rel=1e-5)
    assert padded > 0


class Seen(DistillationDataset):
    """Keeps which texts were asked for."""

    def __init__(self, dataset: DistillationDataset) -> None:
        super().__init__(dataset.examples, dataset.sources)
        self.partner, self.texts = dataset.partner, []

    def __getitem__(self, index: int) -> dict:
        self.texts.append(index)
        return super().__getitem__(index)


def trained(recipe: Recipe, arm: str, folder: Path, resume: bool = False) -> tuple[list[int], KVTrainer]:
    """The texts that a training reads, in order, and what trained."""
    data = arm_data(prepare(recipe))
    seen = Seen(data.train_set(arm, recipe.seed))
    trainer = KVTrainer(
        build_arm(recipe, arm, data),
        training_arguments(recipe, folder),
        training_batches(recipe, seen, data.collator),
        data.held_out_set(arm),
        data.tokenizer,
        data_collator=data.collator,
    )
    trainer.evaluate = lambda *_, **__: {"eval_loss": 0.0}
    trainer.train(resume_from_checkpoint=resume)
    return seen.texts, trainer


@pytest.mark.parametrize("batching", ["buckets", "packed"])
def test_every_arm_and_a_resumed_training_read_the_plan(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, batching: str
) -> None:
    recipe = tiny_recipe(
        training={"steps": 6, "batching": batching, "batch_size": 6, "gradient_accumulation_steps": 4, "save_every": 4},
        projector={"dropout": 0.5},
    )
    data = arm_data(prepare(recipe))
    batches = training_batches(recipe, data.train_set("kv", 0), data.collator)
    assert isinstance(batches, PlannedBatches)
    assert len(batches) == 6 * 4
    planned = list(chain.from_iterable(chain.from_iterable(batches.plan)))
    # More than one epoch.
    assert len(planned) > len(data.train)
    read, trainer = trained(recipe, "kv", tmp_path / "kv")
    assert read == planned
    assert trained(recipe, "baseline", tmp_path / "baseline")[0] == planned
    # From step 4 on, of which a checkpoint is left.
    (tmp_path / "kv" / "checkpoint-6").rename(tmp_path / "later")
    done = len(list(chain.from_iterable(chain.from_iterable(batches.plan[: 4 * 4]))))
    read, resumed = trained(recipe, "kv", tmp_path / "kv", resume=True)
    assert read == planned[done:]
    last, again = ([record for record in of.state.log_history if "kv_loss" in record][-1] for of in (trainer, resumed))
    assert again["kv_loss"] == pytest.approx(last["kv_loss"], rel=1e-5)
    assert again["processed_tokens"] == last["processed_tokens"]
    assert again["epoch"] == last["epoch"] == len(planned) / len(data.train)


def test_two_processes_share_the_batches_of_each_step(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    class Two:
        num_processes = 2

    one = tiny_recipe(training={"batching": "packed", "batch_size": 8, "gradient_accumulation_steps": 2})
    two = tiny_recipe(training={"batching": "packed", "batch_size": 8})
    data = arm_data(prepare(one))
    whole = training_batches(one, data.train_set("kv", 0), data.collator)
    monkeypatch.setattr("kvgraft.distill.arms.process_state", Two)
    halves = training_batches(two, data.train_set("kv", 0), data.collator)
    assert isinstance(whole, PlannedBatches)
    assert isinstance(halves, PlannedBatches)
    assert halves.plan == whole.plan
    assert training_arguments(two, tmp_path).per_device_train_batch_size == 1
    shards = [
        list(BatchSamplerShard(BatchSampler(range(len(halves)), 1, False), num_processes=2, process_index=process))
        for process in (0, 1)
    ]
    assert shards == [[[index] for index in range(process, len(halves), 2)] for process in (0, 1)]


def test_results_say_how_much_was_no_padding(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shares = {}
    for batching in ("shuffled", "buckets"):
        recipe = tiny_recipe(arms=["baseline"], training={"steps": 4, "batching": batching}, data={"max_length": 200})
        (arm,) = run(recipe, tmp_path / batching).arms
        shares[batching] = arm.real_token_share
    data = arm_data(prepare(recipe))
    batches = training_batches(recipe, data.train_set("kv", 0), data.collator)
    assert isinstance(batches, PlannedBatches)
    lengths = [len(example.input_ids) for example in data.train]
    assert shares["buckets"] == pytest.approx(real_token_share(lengths, batches.plan), rel=1e-5)
    assert shares["shuffled"] < shares["buckets"] <= 1
    written = json.loads((tmp_path / "buckets" / "result.json").read_text())["arms"][0]
    assert written["real_token_share"] == shares["buckets"]
    assert f"| real tokens of those processed | {shares['buckets']:.1%} |" in (
        tmp_path / "buckets" / "results.md"
    ).read_text(encoding="utf-8")


def test_a_student_that_cannot_be_packed_is_refused_before_any_capture(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    opt = {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16}
    student = {"new": {**opt, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, "vocab_size": 300}
    recipe = tiny_recipe(student=student, training={"batching": "packed"})
    with pytest.raises(ModelError, match=r"OPTForCausalLM cannot be trained with training\.batching: packed"):
        prepare(recipe)
    assert not recipe.store.path.exists()


def test_tokens_per_batch_is_shared_by_accumulation_steps(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(training={"batching": "buckets", "tokens_per_batch": 400, "gradient_accumulation_steps": 3})
    data = arm_data(prepare(recipe))
    batches = training_batches(recipe, data.train_set("kv", 0), data.collator)
    sizes = [batches[index]["input_ids"].numel() for index in range(len(batches))]
    assert max(sizes) <= 400 // 3 < 2 * max(sizes)
    assert not any("packed_positions" in batches[index] for index in range(3))
