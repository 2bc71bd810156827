"""Held-out quality against a plain computation over all tokens at once."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kvgraft.distill.arms import build_arm
from kvgraft.evaluate.quality import held_out_quality
from kvgraft.models.capture import capture
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data

TEACHER = "org/teacher-1.0"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_quality_equals_a_plain_computation_however_text_is_batched(
    tiny_recipe: Callable[..., Recipe], batch_size: int
) -> None:
    recipe = tiny_recipe(projector={"dropout": 0.5})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data).train()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    held_out = data.held_out_set("kv")
    samples = [held_out[index] for index in range(len(held_out))]
    batches = [data.collator(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    quality = held_out_quality(model, batches, held_out.predicted_bytes)
    assert model.training

    model.eval()
    losses, predicted, target, own = [], [], [], []
    with torch.no_grad():
        for sample in samples:
            ids = sample["input_ids"][None]
            logits = model.student(ids).logits[0, :-1]
            losses.append(F.cross_entropy(logits, sample["labels"][1:], reduction="none", ignore_index=-100))
            kv, teacher = capture(model.student, ids), sample["teacher_kv"][TEACHER]
            mask = teacher.mask[0]
            projected = model.projector.project_student_kv(TEACHER, kv)
            predicted.append(torch.stack([side[0][:, mask] for side in projected]).double())
            target.append(torch.stack([side[0][:, mask] for side in teacher.flatten()]).double())
            own.append(torch.stack([side[0] for side in kv.flatten()]).double())
    assert quality.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert quality.tokens == sum(len(loss) for loss in losses)
    assert quality.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)

    # Every byte but those of the first token, which nothing predicts: that token is what decoding it gives.
    kept = [example.text_bytes - example.truncated_bytes for example in data.held_out]
    first = [len(data.tokenizer.decode(example.input_ids[:1]).encode()) for example in data.held_out]
    nats = float(torch.cat(losses).sum())
    assert quality.bits_per_byte == pytest.approx(nats / math.log(2) / (sum(kept) - sum(first)), rel=1e-5)
    assert quality.metrics()["bits_per_byte"] == quality.bits_per_byte

    predicted, target, own = (torch.cat(rows, 2) for rows in (predicted, target, own))
    spread = (target - target.mean(2, keepdim=True)).square().sum((2, 3))
    r2 = 1 - (predicted - target).square().sum((2, 3)) / spread
    similarity = quality.teachers[TEACHER]
    assert similarity.keys_r2 == pytest.approx(r2[0].tolist(), abs=1e-4)
    assert similarity.values_r2 == pytest.approx(r2[1].tolist(), abs=1e-4)
    variance = (predicted - predicted.mean(2, keepdim=True)).square().sum((2, 3)) / spread
    assert similarity.variance_ratio == pytest.approx(float(variance.mean()), rel=1e-4)
    scale = model.scales[TEACHER]
    error = ((predicted - target) / scale.deviation.double()[:, :, None, None]).square().mean()
    assert similarity.loss == pytest.approx(float(error), rel=1e-4)
    assert quality.kv_deviation == pytest.approx(float(own.var(2, unbiased=False).mean(-1).sqrt().mean()), rel=1e-5)


def test_what_balances_experts_is_no_part_of_the_loss(tiny_recipe: Callable[..., Recipe]) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 1.0}
    fields = tiny_recipe().student.new | experts

    def measured(balance: bool) -> tuple[float, float]:
        recipe = tiny_recipe(student={"new": fields | {"output_router_logits": balance}})
        data = arm_data(prepare(recipe))
        model, held_out = build_arm(recipe, "baseline", data), data.held_out_set("baseline")
        batch = data.collator([held_out[index] for index in range(len(held_out))])
        trained = model.train()(batch["input_ids"], batch["attention_mask"], batch["labels"])["loss"]
        return float(trained.detach()), held_out_quality(model, [batch], held_out.predicted_bytes).loss

    (trained, loss), (balanced, same) = measured(balance=False), measured(balance=True)
    assert same == pytest.approx(loss, rel=1e-6)
    # In training it counts, as the config says.
    assert balanced > trained + 1


def test_effective_rank_tells_a_collapsed_student(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "baseline", data)
    held_out = data.held_out_set("baseline")
    batches = [data.collator([held_out[index] for index in range(len(held_out))])]
    before = held_out_quality(model, batches, held_out.predicted_bytes)
    with torch.no_grad():
        for layer in model.student.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(projection.weight[:1].expand_as(projection.weight) * 0.1)
    after = held_out_quality(model, batches, held_out.predicted_bytes)
    assert before.kv_effective_rank > 3
    assert after.kv_effective_rank == pytest.approx(1, abs=1e-3)
    assert after.kv_deviation < 0.5 * before.kv_deviation
    assert before.teachers == {}


def test_dead_units_are_counted_where_the_activation_is_relu(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(projector={"activation": "relu"})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data)
    held_out = data.held_out_set("kv")
    batches = [data.collator([held_out[index]]) for index in range(len(held_out))]
    before = held_out_quality(model, batches, held_out.predicted_bytes).teachers[TEACHER]
    with torch.no_grad():
        for adapter in model.projector.adapters(TEACHER):
            adapter.up.bias[:, :2] = -1e3
    after = held_out_quality(model, batches, held_out.predicted_bytes)
    # Two of eight units in every layer of both adapters.
    assert before.dead_units == 0
    assert after.teachers[TEACHER].dead_units == pytest.approx(2 / 8)
    assert after.metrics()[f"dead_units/{TEACHER}"] == pytest.approx(2 / 8)
