"""Two teachers of different architectures and tokenizers teach one student, from recipe to results."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kvgraft.distill.arms import build_arm, training_arguments
from kvgraft.distill.trainer import KVTrainer
from kvgraft.errors import RecipeError, StoreError
from kvgraft.models import loading
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.report.log import read_metrics
from kvgraft.run import arm_data, run
from tests.data.test_spans import unigram
from tests.distill.gradients import gradients
from tests.distill.test_trainer import relative_difference


def save_gpt2(folder: Path, context: int) -> str:
    tokenizer = unigram()
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=3, n_head=3, n_positions=context)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random GPT-2 of 3 layers, 3 heads x 8, with a Unigram tokenizer."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), 512)


@pytest.fixture
def two_teachers(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, gpt2: str) -> Callable[..., Recipe]:
    """The tiny recipe with a Llama and a GPT-2 as teachers; ``weights`` and fields of the second can be given."""

    def make(weights: tuple[float, float] | None = None, second: dict | None = None, **changes: object) -> Recipe:
        teachers = [{"name": "llama", "model": str(tiny_teacher)}, {"name": "gpt2", "model": gpt2, **(second or {})}]
        for teacher, weight in zip(teachers, weights or (), strict=False):
            teacher["weight"] = weight
        return tiny_recipe(arms=["kv"], teachers=teachers, **changes)

    return make


@pytest.mark.parametrize("combine", ["weights", "learned", "confidence"])
def test_two_tokenizers_and_two_architectures_teach_one_student(
    two_teachers: Callable[..., Recipe], tmp_path: Path, combine: str
) -> None:
    recipe = two_teachers(
        (0.25, 0.75) if combine == "weights" else None,
        {"alignment": {"tokens": "mean", "layers": [[0, 2]]}},
        kv_loss={"combine": combine},
        training={"steps": 10, "projector_learning_rate": 1e-2, "evaluate_every": 5},
    )
    result = run(recipe, tmp_path / "run")
    llama, gpt2 = result.teachers
    assert llama.layer_map == [(0, 0), (1, 3)]
    assert gpt2.layer_map == [(0, 2)]
    for teacher in result.teachers:
        assert teacher.alignment_coverage > 0.9
        assert teacher.alignment_mean_span is not None
    assert llama.alignment_mean_span == 1
    assert gpt2.alignment_mean_span > 1  # `mean` over a finer tokenizer
    # The student's end-of-text stands for no byte, once in every text that was not cut.
    assert set(llama.alignment_dropped) == {"special", "beyond_teacher", "no_match"}
    table = (tmp_path / "run" / "results.md").read_text()
    assert "gpt2: teacher tokens to each" in table
    assert "llama: student tokens without one" in table
    first, last = result.arms[0].first, result.arms[0].last
    for name in ("llama", "gpt2"):
        assert last[f"kv_loss/{name}"] < first[f"kv_loss/{name}"]
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "teacher_share/gpt2" in record]
    shares = [record["teacher_share/llama"] + record["teacher_share/gpt2"] for record in records]
    assert len(records) == 2
    if combine != "learned":
        assert shares == pytest.approx([1, 1], rel=1e-4)
    if combine == "weights":
        assert records[0]["teacher_share/gpt2"] > records[0]["teacher_share/llama"]
    saved = tmp_path / "run" / "kv" / "projector" / "teacher_weights.safetensors"
    assert saved.is_file() == (combine == "learned")
    if combine == "learned":
        assert float(load_file(saved)["log_errors"].abs().min()) > 0


def test_a_teacher_of_a_short_context_is_refused_or_answers_for_what_it_reads(
    two_teachers: Callable[..., Recipe], tmp_path: Path
) -> None:
    short = save_gpt2(tmp_path / "short", 24)
    with pytest.raises(RecipeError, match=r"teacher gpt2 reads 24 tokens.*of 20 of 20 texts.*long_texts: cut"):
        prepare(two_teachers(second={"model": short}))
    assert not (tmp_path / "stores").exists()  # nothing was captured before it was said
    recipe = two_teachers(second={"model": short, "long_texts": "cut"})
    data = arm_data(prepare(recipe))
    model, train = build_arm(recipe, "kv", data), data.train_set("kv", 0)
    batch = data.collator([train[0], train[1]])
    masks = {name: kv.mask for name, kv in batch["teacher_kv"].items()}
    assert masks["gpt2"].sum() < masks["llama"].sum()
    batch["teacher_kv"]["gpt2"].mask[1] = False  # and it is missing for one text
    model.eval()
    outputs = model(**batch)
    errors = {
        name: model.token_errors(model.student_pass(**_texts(batch))[1], name, kv)
        for name, kv in batch["teacher_kv"].items()
    }
    expected, places = 0.0, {"llama": 0, "gpt2": 0}
    for row, token in (masks["llama"] | masks["gpt2"]).nonzero().tolist():
        answering = [name for name in masks if masks[name][row, token]]
        for name in answering:
            expected += float(errors[name][places[name]].detach()) / len(answering)
            places[name] += 1
    count = int((masks["llama"] | masks["gpt2"]).sum())
    assert outputs["kv_loss"].item() == pytest.approx(expected / count, rel=1e-5)


def _texts(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def test_one_teacher_is_let_go_before_the_next_is_loaded(
    two_teachers: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = loading.load_model, []

    def load_alone(*args: Any, **options: Any) -> PreTrainedModel:
        assert not [model for model in loaded if model() is not None]
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", load_alone)
    prepare(two_teachers())
    assert len(loaded) == 2
    assert loaded[1]() is None


def test_likelihoods_are_added_to_stores_that_are_there(two_teachers: Callable[..., Recipe]) -> None:
    plain = prepare(two_teachers())
    source = plain.teachers[0].train
    before = {path: path.stat().st_mtime_ns for path in source.store.folder.glob("kv-*")}
    with_numbers = prepare(two_teachers(kv_loss={"combine": "confidence"}))
    assert [teacher.report.tokens for teacher in with_numbers.teachers] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in source.store.folder.glob("kv-*")} == before
    for teacher in with_numbers.teachers:
        for example in with_numbers.texts.train:
            moved = teacher.train.log_likelihood(example)
            assert moved is not None
            text_tokens = example.spans[:, 1] > example.spans[:, 0]
            told = moved[torch.from_numpy(text_tokens)].isfinite()
            # Nothing predicts the first teacher token, which may reach into a few of the student's.
            assert told.float().mean() > 0.8
            assert told[-1]


def test_a_store_that_lost_its_likelihoods_says_so(two_teachers: Callable[..., Recipe]) -> None:
    prepared = prepare(two_teachers(kv_loss={"combine": "confidence"}))
    source = prepared.teachers[0].train
    assert source.likelihoods is not None
    source.likelihoods.numbers.clear()  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="`kvgraft cache`"):
        source.log_likelihood(prepared.texts.train[0])


@pytest.mark.parametrize("combine", ["learned", "confidence"])
def test_gradients_do_not_depend_on_accumulation(
    two_teachers: Callable[..., Recipe], tmp_path: Path, combine: str
) -> None:
    found = []
    for accumulation in (1, 4):
        recipe = two_teachers(
            training={"steps": 1, "batch_size": 4, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1e9},
            kv_loss={"combine": combine},
        )
        steps, _ = gradients(recipe, tmp_path / str(accumulation))
        found.append(steps[0])
    assert relative_difference(*found) < 1e-5
    assert ("fusion.log_errors" in found[0]) == (combine == "learned")


def test_learned_weights_resume_exactly(two_teachers: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = two_teachers(kv_loss={"combine": "learned"}, training={"steps": 4, "save_every": 2})
    data = arm_data(prepare(recipe))

    def trained(checkpoint: str | None) -> torch.Tensor:
        trainer = KVTrainer(
            build_arm(recipe, "kv", data),
            training_arguments(recipe, tmp_path / "checkpoints"),
            data.train_set("kv", 0),
            data.held_out_set("kv"),
            data.tokenizer,
            data_collator=data.collator,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.distillation.fusion.log_errors.detach()

    whole = trained(None)
    assert torch.equal(trained(str(tmp_path / "checkpoints" / "checkpoint-2")), whole)
    assert whole.abs().min() > 0


@pytest.mark.parametrize(
    ("weights", "combine", "message"),
    [
        ((0.5, 0.6), "weights", r"must sum to 1; got .*which sum to 1\.1"),
        (None, "weights", r"every teacher needs a `weight`"),
        ((-0.5, 1.5), "weights", r"greater than or equal to 0"),
        ((0.5, 0.5), "mean", r"kv_loss\.combine is mean, which uses none"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    two_teachers: Callable[..., Recipe], weights: tuple[float, float] | None, combine: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        two_teachers(weights, kv_loss={"combine": combine})
