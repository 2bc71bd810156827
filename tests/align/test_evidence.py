"""Layer maps by evidence: CKA and the monotone map against plain references, and whole runs."""

from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch

from kvgraft.align.cka import pairwise_cka
from kvgraft.align.evidence import monotone_map
from kvgraft.errors import AlignmentError
from kvgraft.models import loading
from kvgraft.plan import make_plan
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import run


def test_cka_equals_its_definition_on_centred_gram_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 40, 5, generator=generator) + 3
    second = torch.randn(3, 40, 7, generator=generator)
    second[1, :, :5] = first[0] @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0] * 4
    second[1, :, 5:] = 2.0
    centre = torch.eye(40) - 1 / 40
    expected = torch.zeros(2, 3)
    for i in range(2):
        for j in range(3):
            one, other = (centre @ (x @ x.T) @ centre for x in (first[i], second[j]))
            expected[i, j] = (one * other).sum() / (one.norm() * other.norm())
    found = pairwise_cka(first, second)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)
    assert found[0, 1].item() == pytest.approx(1, abs=1e-6)  # turned, scaled and moved: the same


@pytest.mark.parametrize("seed", range(20))
def test_monotone_map_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    students, teachers = (int(torch.randint(1, 6, (1,), generator=generator)) for _ in range(2))
    scores = torch.rand(students, teachers, generator=generator).tolist()
    best = max(
        combinations_with_replacement(range(teachers), students),
        key=lambda chosen: sum(row[teacher] for row, teacher in zip(scores, chosen, strict=True)),
    )
    assert monotone_map(scores) == list(enumerate(best))


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(AlignmentError, match="at least one student layer"):
        monotone_map([])


@pytest.mark.parametrize("method", ["cka", "predictive"])
def test_a_teacher_is_matched_with_itself_and_is_asked_only_once(
    tiny_recipe: Callable[..., Recipe],
    tiny_teacher: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe(
        arms=["kv"], alignment={"layers": method}, training={"steps": 2}, student=_existing(tiny_teacher)
    )
    assert make_plan(recipe).problems == []
    result = run(recipe, tmp_path / "run")
    (teacher,) = result.teachers
    assert teacher.layer_map == [(layer, layer) for layer in range(4)]
    assert teacher.layer_evidence is not None
    scores = torch.tensor(teacher.layer_evidence.scores)
    assert scores.shape == (4, 4)
    assert scores.diagonal().min() > 0.99
    assert (tmp_path / "run" / "layers-org-teacher-1.0.png").read_bytes().startswith(b"\x89PNG")
    assert f"Layers of org/teacher-1.0 by {method}:" in (tmp_path / "run" / "results.md").read_text()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded again"))
    assert prepare(recipe).teachers[0].evidence == teacher.layer_evidence


def _existing(folder: Path) -> dict:
    return {"model": str(folder), "new": None}


def test_a_new_student_has_no_evidence_to_give(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=r"the student is new: .* use ratio, last or"):
        tiny_recipe(alignment={"layers": "cka"})
    changed = tiny_recipe().model_dump()
    changed["teachers"][0]["alignment"] = {"layers": "predictive"}
    with pytest.raises(ValueError, match="the student is new"):
        Recipe.model_validate(changed)
