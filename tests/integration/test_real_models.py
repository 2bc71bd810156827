"""The whole way on real weights: the pretrained teacher that the recipes use."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvgraft.align.tokens import align_encoded
from kvgraft.data.datasets import load_examples
from kvgraft.data.spans import encode_with_spans
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.graft import graft
from kvgraft.models import loading
from kvgraft.models.capture import capture, record_kv
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.rope import rotate
from kvgraft.plan import make_plan
from kvgraft.recipe import load_recipe
from kvgraft.run import run
from tests.graft.students import identity_projector

QUICKSTART = load_recipe("recipes/quickstart.yaml")
TEACHER = QUICKSTART.teachers[0].model
GSM8K = Path(os.environ.get("KVGRAFT_GSM8K", "../shared/data/gsm8k"))

pytestmark = pytest.mark.real_models


@pytest.fixture(scope="module")
def teacher():
    return loading.load_model(TEACHER, device="cpu")


def test_captured_kv_is_the_pretrained_models_own(teacher) -> None:
    tokenizer = loading.load_tokenizer(TEACHER)
    texts = ["Tom has 3 apples. He buys 4 more. How many apples does he have?", "2 + 2 = 4, 你好 🙂"]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = teacher(**batch, position_ids=positions, use_cache=True)
        with record_kv(teacher) as recorder:
            recorded = teacher(**batch, position_ids=positions, use_cache=True)
    assert torch.equal(plain.logits, recorded.logits)
    kv = capture(teacher, batch["input_ids"], batch["attention_mask"])
    real = kv.mask[:, None, :, None]
    for layer, cached in enumerate(plain.past_key_values.layers):
        rerotated = rotate(kv.keys[:, layer], *recorder.rotation(layer))
        assert float(((rerotated - cached.keys) * real).abs().max()) < 1e-3
        assert float(((kv.values[:, layer] - cached.values) * real).abs().max()) < 1e-3
        # Keys reach some twenties here: relative to that the difference is rounding.
        assert float(((rerotated - cached.keys) * real).norm() / (cached.keys * real).norm()) < 1e-5


def test_the_teacher_has_learned_something(teacher) -> None:
    tokenizer = loading.load_tokenizer(TEACHER)
    right, wrong = (
        tokenizer(f"The capital of France is {city}", return_tensors="pt")["input_ids"] for city in ("Paris", "Banana")
    )
    with torch.no_grad():
        losses = [float(teacher(ids, labels=ids).loss) for ids in (right, wrong)]
    assert losses[0] < losses[1] - 0.5


def test_quickstart_goes_the_whole_way(tmp_path: Path) -> None:
    overrides = [
        f"store.path={tmp_path}/stores",
        "data.train_samples=24",
        "data.held_out_samples=8",
        "training.steps=8",
        "training.evaluate_every=4",
    ]
    recipe = load_recipe("recipes/quickstart.yaml", overrides)
    result = run(recipe, tmp_path / "run")
    teacher = result.teachers[0]
    assert teacher.tokens_per_second > 0
    assert teacher.alignment_coverage > 0.99
    assert result.arm("kv").last["kv_loss"] < result.arm("kv").first["kv_loss"]
    assert result.arm("kv").first["loss"] == result.arm("baseline").first["loss"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "kv" / "student")
    assert student.num_parameters() == result.student_parameters
    # The same text again, by another seed: nothing of the teacher is run.
    again = run(recipe.model_copy(update={"seed": 1, "arms": ["baseline"]}), tmp_path / "again")
    assert again.teachers[0].tokens_per_second is None


def test_plan_of_the_quickstart_has_no_problem() -> None:
    plan = make_plan(QUICKSTART)
    assert plan.problems == []
    teacher = plan.teachers[0].model
    assert (teacher.num_layers, teacher.num_kv_heads, teacher.head_dim) == (30, 3, 64)
    assert teacher.parameters == 134_515_008


@pytest.mark.gsm8k
@pytest.mark.skipif(not GSM8K.is_dir(), reason="set KVGRAFT_GSM8K to the folder of GSM8K")
def test_gsm8k_reads_and_aligns() -> None:
    examples = load_examples(str(GSM8K), "train", 60)
    assert all("####" in example.text for example in examples)
    own, theirs = train_tokenizer((e.text for e in examples), 2048), loading.load_tokenizer(TEACHER)
    for example in examples:
        alignment = align_encoded(encode_with_spans(own, example.text), encode_with_spans(theirs, example.text))
        assert alignment.coverage == 1.0


def test_a_graft_of_the_models_own_kv_goes_on_as_the_model_itself(teacher) -> None:
    tokenizer = loading.load_tokenizer(TEACHER)
    text = "Tom has 3 apples. He buys 4 more."
    context = tokenizer(text, return_tensors="pt")["input_ids"]
    question = tokenizer(" How many apples does he have now?", return_tensors="pt")["input_ids"]
    geometry = kv_geometry(teacher.config)
    projector = identity_projector(geometry.kv_dim, geometry.num_layers)
    greedy = {"max_new_tokens": 10, "do_sample": False}
    whole = torch.cat([context, question], 1)
    plain = teacher.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **greedy)
    with torch.no_grad():
        kv = capture(teacher, context)
        cache = graft(teacher, projector, kv, teacher="self", token_ids=context.tolist())
        output = teacher.generate(**cache.generate_inputs(question), **greedy)
        other = capture(teacher, context.roll(1, 1))
        mixed_up = graft(teacher, projector, other, teacher="self", token_ids=context.tolist())
        expected = teacher(input_ids=whole).logits[:, -question.shape[1] :]
        near, far = (
            teacher(**made.forward_inputs(question)).logits
            for made in (graft(teacher, projector, kv, teacher="self"), mixed_up)
        )
    assert plain.shape[1] > whole.shape[1] + 3
    assert torch.equal(output, plain)
    # Logits reach some twenties here; plain decoding from a cache is as far from one pass over all.
    assert float((near - expected).abs().max()) < 1e-4
    assert float((far - expected).abs().max()) > 1
