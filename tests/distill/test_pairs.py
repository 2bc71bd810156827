"""Every ordered pair of architectures, with tokenizers of eight kinds, at random weights: five steps on one batch."""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.align.tokens import align_tokens, gather_aligned
from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.distill.losses import KVScale
from kvgraft.distill.model import DistillationModel
from kvgraft.distill.objectives import projector_direction
from kvgraft.kv import KV, stack_kv
from kvgraft.models.capture import capture
from kvgraft.models.geometry import kv_geometry
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import KVLossRecipe
from tests.data.test_spans import CORPUS, sample_tokenizers
from tests.models.test_capture import CONFIGS, VOCABULARY, model_of

FAMILIES = list(CONFIGS)
TOKENIZERS = [*sample_tokenizers(), "byte_bpe"]


def tokenizer_of(family: str, role: int) -> str:
    """One kind for each family, another where it is the student, so that pairs mix."""
    return TOKENIZERS[(FAMILIES.index(family) + 3 * role) % len(TOKENIZERS)]


@lru_cache
def encoded(tokenizer: str) -> list[EncodedText]:
    # The models know fewer entries than the tokenizers; which one a token is makes no difference here.
    texts = [encode_with_spans(sample_tokenizers()[tokenizer], text, 40) for text in CORPUS[:2]]
    return [replace(text, input_ids=[3 + token % (VOCABULARY - 3) for token in text.input_ids]) for text in texts]


@lru_cache
def teacher_kv(family: str) -> list[KV]:
    model = model_of(family)
    return [capture(model, torch.tensor([text.input_ids])) for text in encoded(tokenizer_of(family, 0))]


def aligned(teacher: str, student: str) -> KV:
    texts = zip(encoded(tokenizer_of(student, 1)), encoded(tokenizer_of(teacher, 0)), teacher_kv(teacher), strict=True)
    kvs = [gather_aligned(kv, align_tokens(own.spans, other.spans)) for own, other, kv in texts]
    masks = [torch.from_numpy(np.arange(kv.mask.shape[1]) >= 2)[None] & kv.mask for kv in kvs]
    return stack_kv([replace(kv, mask=mask) for kv, mask in zip(kvs, masks, strict=True)])


def student_batch(student: str) -> dict[str, Tensor]:
    ids = [torch.tensor(text.input_ids) for text in encoded(tokenizer_of(student, 1))]

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": pad(ids, 0),
        "labels": pad(ids, -100),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
    }


def distillation(student: PreTrainedModel, batch: dict[str, Tensor], kv: KV, objective: str) -> DistillationModel:
    layers = [(layer, layer) for layer in range(kv.geometry.num_layers)]
    loss = KVLossRecipe(objective=objective, relation_heads=2)
    scales = {"t": KVScale.from_tokens(kv, kv.mask)}
    if objective == "relational":
        own = {"t": KVScale.from_tokens(capture(student, batch["input_ids"], batch["attention_mask"]), kv.mask)}
        return DistillationModel(student, layer_maps={"t": layers}, scales=scales, loss=loss, student_scales=own)
    projector = KVDimensionProjector(
        {"t": {"d_model": kv.geometry.kv_dim, "num_layers": len(layers)}},
        kv_geometry(student.config).kv_dim,
        per_layer=True,
        skip=True,
        dropout=0.0,
        direction=projector_direction(objective),
    )
    return DistillationModel(student, projector, layer_maps={"t": layers}, scales=scales, loss=loss)


@pytest.mark.parametrize(("teacher", "student"), product(FAMILIES, FAMILIES))
def test_the_kv_loss_of_a_repeated_batch_falls(teacher: str, student: str) -> None:
    kv, batch = aligned(teacher, student), student_batch(student)
    assert kv.mask.any(1).all()
    pair = FAMILIES.index(teacher) + FAMILIES.index(student)
    torch.manual_seed(pair)
    # Every fourth pair compares relations, the others what training compares by default.
    objective = "student_to_teacher" if pair % 4 else "relational"
    model = distillation(model_of(student).eval(), batch, kv, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        outputs = model(**batch, teacher_kv={"t": kv})
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs["kv_loss"].item())
    losses.append(model(**batch, teacher_kv={"t": kv})["kv_loss"].item())
    assert all(later < earlier for earlier, later in pairwise(losses)), losses
