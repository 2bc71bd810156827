"""Rows of data sets that were not made for kvgraft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvgraft.data.datasets import Example, load_examples, load_train_and_held_out
from kvgraft.errors import DataError, RecipeError
from kvgraft.prepare import load_examples_of
from kvgraft.recipe import load_recipe
from tests.data.test_datasets import write_jsonl

ALPACA = {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7", "text": "### Instruction: Add them."}


@pytest.mark.parametrize(
    ("columns", "row", "text", "prompt"),
    [
        ({"question": "instruction", "answer": "output"}, ALPACA, "Add the numbers.\n7", "Add the numbers.\n"),
        (
            {"prompt": "{instruction}\n{input}\n", "completion": "{output}."},
            ALPACA,
            "Add the numbers.\n3 and 4\n7.",
            "Add the numbers.\n3 and 4\n",
        ),
        (
            {"prompt": "{instruction}\n{input}\n", "completion": "{output}"},
            ALPACA | {"input": None, "output": 7},
            "Add the numbers.\n\n7",
            "Add the numbers.\n\n",
        ),
        ({"text": "the document"}, {"the document": "Once {upon} a time", "text": "no"}, "Once {upon} a time", ""),
        # What a column holds is never read as a name.
        ({"text": "{a}{b}"}, {"a": "{b}", "b": "{a}"}, "{b}{a}", ""),
        (
            {"messages": "turns"},
            {"turns": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
            "user: Why?\nassistant: So.",
            "user: Why?\nassistant:",
        ),
    ],
)
def test_other_columns_stand_for_those_of_a_form(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any], text: str, prompt: str
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", row)
    assert load_examples(source, columns=columns) == [Example(text, len(prompt))]


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_of_sharegpt(tmp_path: Path, column: str) -> None:
    turns = [("system", "Be brief."), ("human", "Why?"), ("gpt", "So."), ("human", "Thanks.")]
    row = {"id": "a", column: [{"from": who, "value": said} for who, said in turns]}
    (example,) = load_examples(write_jsonl(tmp_path / "rows.jsonl", row))
    prompt = "system: Be brief.\nuser: Why?\nassistant:"
    assert example == Example(f"{prompt} So.", len(prompt))
    (kept,) = load_examples(str(tmp_path / "rows.jsonl"), keep_turns=True)
    assert [turn.role for turn in kept.turns] == ["system", "user", "assistant"]


def test_a_column_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ALPACA | {"tags": ["sum"]})
    with pytest.raises(DataError, match=r"line 1: data.columns takes `response`, which is not there; found .*'output'"):
        load_examples(source, columns={"question": "instruction", "answer": "response"})
    with pytest.raises(DataError, match=r"makes text of `tags`, which holds a list: .*name one of text or numbers"):
        load_examples(source, columns={"text": "{tags}: {output}"})


def test_a_recipe_names_them_for_both_sides(tmp_path: Path) -> None:
    rows = [{"document": f"text {number}"} for number in range(40)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: other\nteachers: [{name: t, model: t}]\nstudent: {model: s}\n"
        f"data: {{train: {write_jsonl(tmp_path / 'rows.jsonl', *rows)}, columns: {{text: document}}}}\n"
    )
    train, held_out = load_examples_of(load_recipe(recipe), None)
    assert {example.text for example in [*train, *held_out]} == {row["document"] for row in rows}
    train, held_out = load_examples_of(load_recipe(recipe, ["data.columns.text=number {document}"]), None)
    assert {example.text for example in train + held_out} == {f"number {row['document']}" for row in rows}
    for form in ("{prompt: document}", "{text: document, answer: document}", "{}"):
        with pytest.raises(RecipeError, match="columns name messages, prompt and completion, question and answer, or"):
            load_recipe(recipe, [f"data.columns={form}"])
    with pytest.raises(RecipeError, match=r"data\.columns"):
        load_recipe(recipe, ["data.columns={texts: document}"])


@pytest.mark.parametrize("held_out", [None, 3])
def test_a_data_set_without_a_held_out_part_is_split_as_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int | None
) -> None:
    rows = [{"text": f"text {number}"} for number in range(100)]
    read: list[int] = []
    asked: list[str] = []

    def stream(*_: object, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        assert split == "train"
        for number, row in enumerate(rows):
            read.append(number)
            yield row

    def parts(name: str, config: str | None) -> list[str]:
        asked.append(name)
        return ["train"]

    monkeypatch.setattr("datasets.get_dataset_split_names", parts)
    monkeypatch.setattr("datasets.load_dataset", stream)
    of_a_file = load_train_and_held_out(write_jsonl(tmp_path / "rows.jsonl", *rows))
    assert load_train_and_held_out("owner/name") == of_a_file
    write_jsonl(tmp_path / "train.jsonl", *rows)
    assert load_train_and_held_out(str(tmp_path)) == of_a_file
    read.clear()
    train, tested = load_train_and_held_out("owner/two", None, 20, held_out, streaming=True)
    assert train == of_a_file[0][:20]
    assert tested == of_a_file[1][: len(tested)]
    assert len(tested) == held_out if held_out else tested
    assert 20 < len(read) < 60
    # A second run of a comparison asks the hub for nothing.
    read.clear()
    assert load_train_and_held_out("owner/two", None, 20, held_out, streaming=True) == (train, tested)
    assert not read
    assert asked == ["owner/name", "owner/two"]


def test_a_part_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"text": f"{split} {number}"} for number in range(40)]

    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train_sft", "test_sft"])
    monkeypatch.setattr("datasets.load_dataset", load)
    train, held_out = load_train_and_held_out("owner/name:chats[train_sft]", "owner/name[test_sft]")
    assert asked == [("owner/name", None, "test_sft"), ("owner/name", "chats", "train_sft")]
    assert {example.text.split()[0] for example in train} == {"train_sft"}
    # One part alone has none beside it.
    train, held_out = load_train_and_held_out("owner/name[train_sft]")
    assert len(train) + len(held_out) == 40
    told = r"owner/name:chats has no held_out part: it has train_sft, test_sft, and held_out would be held_out or test "
    with pytest.raises(DataError, match=rf"{told}.*; name one of these as owner/name\[part\], or another"):
        load_train_and_held_out("owner/name[train_sft]", "owner/name:chats")
    with pytest.raises(DataError, match=r"name\[train\] has no train part: it has train_sft, test_sft; name one of"):
        load_examples("owner/name[train]")
    with pytest.raises(DataError, match=r"owner/name\[train is no data set"):
        load_examples("owner/name[train")
