"""Embeddings that start from a teacher's: which rows, their map, and that a run's arms all start from them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvgraft.compare.matrix import plan_matrix
from kvgraft.distill.arms import build_arm
from kvgraft.errors import AlignmentError
from kvgraft.identify import identify
from kvgraft.models.embeddings import EmbeddingStart, aligned_embeddings, principal_rows, start_embeddings
from kvgraft.models.students import new_student
from kvgraft.prepare import make_student, prepare
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.report.tables import markdown
from kvgraft.run import arm_data, run

TEACHER = "org/teacher-1.0"


def text(*tokens: tuple[int, int, int]) -> SimpleNamespace:
    """Tokens as (id, first byte, byte after the last)."""
    return SimpleNamespace(input_ids=[token for token, _, _ in tokens], spans=[list(span) for _, *span in tokens])


def test_a_token_starts_from_the_teachers_tokens_of_the_same_bytes() -> None:
    embeddings = torch.eye(6)
    texts = [
        # Student token 3 stands for bytes 0..4, which teacher tokens 1 and 2 stand for; token 0 for no byte.
        (text((3, 0, 4), (1, 4, 6), (0, 6, 6)), text((5, 0, 0), (1, 0, 3), (2, 3, 5), (4, 5, 6))),
        (text((3, 0, 4)), text((1, 0, 4))),
    ]
    seen, means = aligned_embeddings(texts, 5, embeddings)
    assert seen.tolist() == [1, 3]
    torch.testing.assert_close(means[0], (embeddings[2] + embeddings[4]) / 2)
    torch.testing.assert_close(means[1], (2 * embeddings[1] + embeddings[2]) / 3)


def test_principal_rows_keep_what_differs_most() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 12) * torch.arange(1, 13) + 5
    found = principal_rows(rows, 12)
    # All components: the rows turned, so that distances stay.
    torch.testing.assert_close(torch.pdist(found), torch.pdist(rows), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    # Fewer: those of the singular values, largest first.
    expected = torch.linalg.svdvals(rows - rows.mean(0))[:3]
    torch.testing.assert_close(principal_rows(rows, 3).norm(dim=0), expected, rtol=1e-4, atol=1e-3)
    assert principal_rows(rows, 20).shape == (40, 12)
    assert principal_rows(rows[:3], 12).shape == (3, 2)
    for same in (rows[:1], torch.ones(4, 12)):
        with pytest.raises(AlignmentError, match="at least two that differ are needed; give more text"):
            principal_rows(same, 12)


@pytest.mark.parametrize("tied", [True, False])
def test_starting_keeps_the_spread_and_what_no_text_tells(tied: bool, tiny_recipe: Callable[..., Recipe]) -> None:
    fields = {**(tiny_recipe().student.new or {}), "tie_word_embeddings": tied}
    tokenizer = prepare(tiny_recipe()).texts.tokenizer
    before, after = (new_student(fields, tokenizer, seed=0) for _ in range(2))
    start = EmbeddingStart(torch.arange(10, 60), 3 * torch.randn(50, 14))
    start_embeddings(after, start)
    old, new = (model.get_input_embeddings().weight.detach() for model in (before, after))
    # The student is 16 wide: two columns have no component.
    torch.testing.assert_close(new[10:60, :14], start.rows * (new[10, 0] / start.rows[0, 0]))
    assert new[10:60, :14].square().mean().sqrt().item() == pytest.approx(old[10:60, :14].std().item(), rel=1e-5)
    assert torch.equal(new[60:], old[60:])
    assert torch.equal(new[:10], old[:10])
    assert torch.equal(new[:, 14:], old[:, 14:])
    head = after.get_output_embeddings().weight
    assert torch.equal(head, new if tied else before.get_output_embeddings().weight)


def test_a_student_with_its_teachers_tokenizer_starts_from_its_teachers_embeddings(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path
) -> None:
    new = {**(tiny_recipe().student.new or {}), "hidden_size": 32}
    recipe = tiny_recipe(student={"new": new, "tokenizer": str(tiny_teacher), "embeddings_from": TEACHER})
    prepared = prepare(recipe)
    assert prepared.embeddings is not None
    seen = prepared.embeddings.token_ids
    # Every token of the text but the end-of-text, which stands for no byte of it.
    ids = {token for example in prepared.texts.train for token in example.input_ids}
    assert set(seen.tolist()) == ids - {prepared.texts.tokenizer.eos_token_id}
    theirs = identify(recipe.teachers[0]).load().get_input_embeddings().weight.detach()[seen]
    ours = prepared.make_student().get_input_embeddings().weight.detach()[seen]
    distances, expected = torch.pdist(ours), torch.pdist(theirs)
    torch.testing.assert_close(distances / distances.max(), expected / expected.max(), rtol=1e-3, atol=1e-4)


def test_every_arm_of_a_run_starts_from_them(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(student={"embeddings_from": TEACHER}, training={"steps": 2})
    result = run(recipe, tmp_path / "run")
    share = result.started_embeddings
    assert share is not None
    # 46 bytes of 16 texts do not have all 300 tokens.
    assert 0.2 < share < 0.5
    assert f"started from a teacher's embeddings | {share:.2%} |" in markdown(result)
    # What is on disk is used again, without the teacher.
    monkeypatch.setattr("kvgraft.models.loading.load_model", None)
    prepared = prepare(recipe)
    assert prepared.embeddings is not None
    data = arm_data(prepared)
    first, second = (build_arm(recipe, arm, data).student.state_dict() for arm in ("baseline", "kv"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    plain = make_student(recipe, prepared.texts.tokenizer).state_dict()
    assert [name for name in plain if not torch.equal(plain[name], first[name])] == ["model.embed_tokens.weight"]


def test_only_a_new_student_starts_from_a_teacher_that_is_named(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path
) -> None:
    with pytest.raises(ValueError, match=r"embeddings_from is 'nobody'; name one of the teachers: \['org/teacher-1.0'"):
        tiny_recipe(student={"embeddings_from": "nobody"})
    with pytest.raises(ValueError, match="is for a `new` student"):
        StudentRecipe(model=str(tiny_teacher), embeddings_from=TEACHER)


def test_a_comparison_can_tell_what_they_are_worth(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe().to_yaml())
    arms = [f"{name}:{arm} student.embeddings_from={TEACHER}" for name, arm in (("own", "baseline"), ("both", "kv"))]
    matrix = plan_matrix(path, arms=["kv", *arms], seeds=[0], folder=tmp_path)
    assert [arm.name for arm in matrix.arms] == ["baseline", "mismatched", "logits", "kv", "own", "both"]
    # Cross-entropy alone could start from them too, and here does.
    assert [note.split()[0] for note in matrix.notes] == ["logits:", "both"]
