"""A conversation about documents that the student has not read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.errors import GraftError, RecipeError
from kvgraft.fit.run import fit
from kvgraft.graft.chat import Conversation, _before, open_conversation, text_files
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.report.results import RECIPE_FILE
from tests.conftest import fields_of_fit_recipe


@pytest.fixture(scope="module")
def fitted(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    fit(Recipe.model_validate(fields_of_fit_recipe(tiny_teacher, tiny_student, folder / "stores")), folder / "run")
    return folder / "run"


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted, tmp_path / "run"))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("Anna has 3 apples and buys 4 more of them.")
    (folder / "b.md").write_text("Ben has 12 pears in two boxes.")
    (folder / "c.png").write_text("no text")
    return folder


def test_goes_on_from_the_documents_and_from_what_was_said(run: Path, documents: Path) -> None:
    files = text_files([documents])
    assert [file.name for file in files] == ["a.txt", "b.md"]
    conversation = open_conversation(run, files)
    first = "".join(conversation.ask("How many apples?", max_new_tokens=6))
    said = conversation._said
    conversation_again = open_conversation(run, files)
    assert "".join(conversation_again.ask("How many apples?", max_new_tokens=6)) == first
    # The second answer is what reading all of it in one go gives.
    fresh = open_conversation(run, files)
    second = "".join(conversation.ask("And pears?", max_new_tokens=6))
    everything = torch.cat([said, conversation._prompt("And pears?")], 1)
    inputs = fresh.cache.generate_inputs(everything)
    found = fresh.student.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    new = found[0, inputs["input_ids"].shape[1] :]
    assert fresh.tokenizer.decode(new, skip_special_tokens=True).strip() == second.strip()


def test_a_question_of_the_students_own_ends_its_answer(run: Path, documents: Path) -> None:
    conversation = open_conversation(run, [documents / "a.txt"])
    colon = _says_after_every_colon(conversation, " 7\nQuestion:")
    assert "".join(conversation.ask("How many?", max_new_tokens=60)) == " 7"
    assert conversation.tokenizer.decode(conversation._said[0]).endswith("Answer: 7\nQuestion:")
    assert conversation._said[0, -1] == colon
    # What the student has begun is the question that comes next, and stands there once.
    assert "".join(conversation.ask("And pears?", max_new_tokens=60)) == " 7"
    said = "\nQuestion: How many?\nAnswer: 7\nQuestion: And pears?\nAnswer: 7\nQuestion:"
    assert conversation.tokenizer.decode(conversation._said[0]) == said


def _says_after_every_colon(conversation: Conversation, answer: str) -> int:
    """Makes the student say tokens of ``answer``, which ends in a colon, one after the other; the colon's id."""
    student = conversation.student
    ids = conversation.tokenizer(answer, add_special_tokens=False)["input_ids"]
    for layer in student.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    embeddings = student.model.embed_tokens.weight.data
    embeddings[ids] = torch.eye(len(ids), embeddings.shape[1])
    student.lm_head.weight.data.zero_()
    student.lm_head.weight.data[ids] = embeddings[ids[-1:] + ids[:-1]]
    return ids[-1]


def test_what_may_begin_the_next_question_waits() -> None:
    assert list(_before("\nQ:", ["7", "\n", "\nQ", ": and", " more"])) == ["7", "", "\n", ""]
    assert "".join(_before("\nQ:", ["7\nQ", "uestions\n"])) == "7\nQuestions\n"


def test_tokens_meet_as_the_teacher_in_the_recipe_says(
    run: Path, fit_recipe: Callable[..., Recipe], documents: Path
) -> None:
    def keys(**changes: object) -> torch.Tensor:
        (run / RECIPE_FILE).write_text(fit_recipe(**changes).model_dump_json())
        return open_conversation(run, [documents / "a.txt"]).cache.layers[0].keys

    (teacher,) = fit_recipe().model_dump()["teachers"]
    of_all = keys(alignment={"tokens": "causal"})
    assert torch.equal(keys(teachers=[teacher | {"alignment": {"tokens": "causal"}}]), of_all)
    assert not torch.equal(keys(), of_all)


def test_the_student_reads_by_the_tokenizer_that_the_recipe_names(
    fit_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path, tmp_path: Path, documents: Path
) -> None:
    student = StudentRecipe(model=str(tiny_teacher), tokenizer=str(tiny_student))
    fit(fit_recipe(student=student), tmp_path / "named")
    assert len(open_conversation(tmp_path / "named", [documents / "a.txt"]).tokenizer) == 300


def test_the_command_answers_and_ends(run: Path, documents: Path) -> None:
    arguments = ["chat", str(run), "--document", str(documents), "--question", "How many?", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["chat", str(run), "--document", str(documents)], input="\n").exit_code == 0


def test_an_answer_of_no_tokens_is_refused(run: Path, documents: Path) -> None:
    arguments = ["chat", str(run), "--document", str(documents), "--question", "How many?", "--max-new-tokens", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--max-new-tokens" in result.output


def test_a_run_of_a_new_student_is_refused(tiny_recipe: Callable[..., Recipe], documents: Path, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(tiny_recipe().model_dump_json())
    with pytest.raises(RecipeError, match="has no projector to chat through"):
        open_conversation(tmp_path, [documents / "a.txt"])


def test_bad_input_is_refused(run: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="neither a file nor a folder"):
        text_files([tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="no run folder"):
        open_conversation(tmp_path, [documents / "a.txt"])
    (tmp_path / "seeds" / "seed-0").mkdir(parents=True)
    (tmp_path / "seeds" / "seed-0" / RECIPE_FILE).write_text("")
    with pytest.raises(RecipeError, match=r"name the run of one seed: .*seed-0"):
        open_conversation(tmp_path / "seeds", [documents / "a.txt"])
    with pytest.raises(GraftError, match="it holds least_squares, projector"):
        open_conversation(run, [documents / "a.txt"], "continuation")
    (documents / "a.txt").write_text("  ")
    with pytest.raises(GraftError, match="is empty"):
        open_conversation(run, [documents / "a.txt"])
    (documents / "a.txt").write_text("long text " * 400)
    with pytest.raises(GraftError, match="context"):
        open_conversation(run, [documents / "a.txt"])


def test_a_document_beyond_the_teachers_context_is_refused(
    fit_recipe: Callable[..., Recipe], short_teacher: Path, tmp_path: Path
) -> None:
    fit(
        fit_recipe(teachers=[{"name": "org/teacher-1.0", "model": str(short_teacher)}], data={"max_length": 30}),
        tmp_path / "run",
    )
    (tmp_path / "a.txt").write_text("Anna has 3 apples and buys 4 more of them. " * 5)
    with pytest.raises(GraftError, match="context of teacher"):
        open_conversation(tmp_path / "run", [tmp_path / "a.txt"])
