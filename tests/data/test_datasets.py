"""Reading text in every form we know, and saying what is wrong with the rest."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvgraft.data import word_problems
from kvgraft.data.datasets import Example, load_examples, load_train_and_held_out
from kvgraft.errors import DataError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat_tokenizer(template: str | None = CHAT_TEMPLATE, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    wrapped.chat_template = template
    return wrapped


@pytest.mark.parametrize(
    ("row", "text", "completion"),
    [
        ({"text": "Just text.\n"}, "Just text.\n", "Just text.\n"),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=2", "2"),
        ({"prompt": "", "completion": "all"}, "all", "all"),
        ({"question": "Why?", "answer": "So."}, "Why?\nSo.", "So."),
        ({"messages": CHAT}, "system: Be brief.\nuser: 2+2?\nassistant: 4", " 4"),
        ({"messages": CHAT[2:3]}, "assistant: 4", " 4"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, "system: Be brief.\nuser: 2+2?\nassistant: 4", " 4"),
        # The first form that a row has, other columns aside.
        ({"text": "no", "question": "Why?", "answer": "So."}, "Why?\nSo.", "So."),
        ({"text": "yes", "prompt": "no completion", "id": 3}, "yes", "yes"),
        ({"text": "no", "prompt": "你好", "completion": "😀"}, "你好😀", "😀"),
        ({"text": "yes", "prompt": None, "completion": None, "messages": None}, "yes", "yes"),
        ({"question": "q", "answer": "a", "prompt": "p", "completion": None}, "q\na", "a"),
    ],
)
def test_every_form_gives_its_text_and_completion(
    tmp_path: Path, row: dict[str, Any], text: str, completion: str
) -> None:
    (example,) = load_examples(write_jsonl(tmp_path / "rows.jsonl", row))
    assert example.text == text
    assert example.text[example.prompt_characters :] == completion


@pytest.mark.parametrize("adds_bos", [False, True])
def test_messages_go_through_the_chat_template_up_to_the_last_assistant_turn(tmp_path: Path, adds_bos: bool) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"messages": CHAT})
    (example,) = load_examples(source, tokenizer=chat_tokenizer(adds_bos=adds_bos))
    # One BOS in all: the tokenizer's own, or the template's where the tokenizer adds none.
    assert example.text == ("" if adds_bos else "<s>") + "[system]Be brief.;[user]2+2?;[assistant]4;"
    assert example.text[example.prompt_characters :] == "4;"


def test_assistant_that_speaks_first_goes_through_the_chat_template(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"messages": CHAT[2:3]})
    assert load_examples(source, tokenizer=chat_tokenizer(adds_bos=True)) == [Example("[assistant]4;", 0)]


def test_template_that_rewrites_earlier_turns_leaves_only_the_common_prompt(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ '<last>' if loop.last else '<turn>' }}{{ message.content }}{% endfor %}"
    source = write_jsonl(tmp_path / "rows.jsonl", {"messages": CHAT[1:3]})
    assert load_examples(source, tokenizer=chat_tokenizer(template)) == [Example("<turn>2+2?<last>4", 1)]


def test_tokenizer_without_chat_template_gives_lines(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"messages": CHAT})
    assert load_examples(source, tokenizer=chat_tokenizer(None)) == load_examples(source)


def test_chat_template_that_refuses_names_the_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"text": "fine"}, {"messages": CHAT})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the tokenizer's chat template refuses .*: no system"):
        load_examples(source, tokenizer=chat_tokenizer("{{ raise_exception('no system') }}"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        ([1, 2], "holds a list; expected a JSON object"),
        (
            {"id": 1, "body": "x"},
            r"found columns \['body', 'id'\] that are not null; known forms are `messages` or `conv.*data.columns",
        ),
        ({"prompt": "alone"}, r"found columns \['prompt'\]"),
        ({"text": ""}, "`text` is empty"),
        ({"text": " \n"}, "`text` is empty"),
        ({"prompt": "p", "completion": " "}, "`completion` is empty"),
        ({"question": "", "answer": "a"}, "`question` is empty"),
        ({"question": "q", "answer": ""}, "`answer` is empty"),
        ({"text": None}, r"found columns \[\] that are not null"),
        ({"question": "q", "answer": None}, r"found columns \['question'\] that are not null"),
        ({"question": "q", "answer": 4}, "`answer` must be text; got int '4'"),
        ({"text": "half \ud83d"}, "`text` holds a character that is no valid Unicode"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": ["hello"]}, "`messages` must be a list"),
        ({"messages": []}, r"need an assistant turn with text; the roles are \[\]"),
        ({"messages": CHAT[:2]}, r"need an assistant turn with text; the roles are \['system', 'user'\]"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "need an assistant turn with text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "`content` must be text; got NoneType"),
        ({"messages": [{"role": "assistant"}]}, r"`content` is missing; found \['role'\]"),
        ({"messages": [{"from": "human", "text": "x"}]}, r"`role` is missing; found \['from', 'text'\]"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    bad = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path.write_bytes(b'{"text": "fine"}\n\n' + bad + b"\n")
    with pytest.raises(DataError, match=rf"{path}, line 3: .*{message}"):
        load_examples(str(path))


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two"}')
    assert [example.text for example in load_examples(str(path))] == ["one", "two"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no examples"):
        load_examples(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "~/missing-kvgraft-folder", "sub/missing.json"])
def test_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file or folder at .*missing.*looked in .*; give word_problems, "):
        load_examples(name)


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_source_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"the data source is '.*'; name word_problems"):
        load_examples(source)


@pytest.mark.parametrize("held_out_name", ["test", "held_out", "validation", "valid", "eval", "dev"])
def test_folder_in_gsm8k_form(tmp_path: Path, held_out_name: str) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(5)]
    write_jsonl(tmp_path / "train.jsonl", *rows[:4])
    write_jsonl(tmp_path / f"{held_out_name}.jsonl", *rows[4:])
    assert len(load_examples(str(tmp_path))) == 4
    train, held_out = load_train_and_held_out(str(tmp_path))
    assert [example.text for example in train] == [f"{row['question']}\n{row['answer']}" for row in rows[:4]]
    assert [example.text[example.prompt_characters :] for example in held_out] == [rows[4]["answer"]]


def test_held_out_file_comes_before_the_test_file(tmp_path: Path) -> None:
    for name in ("test", "held_out"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    assert load_examples(str(tmp_path), "held_out") == [Example("held_out")]


def test_folder_without_the_part_says_what_it_has(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", {"text": "x"})
    with pytest.raises(DataError, match=r"holds train\.jsonl but no held_out part; expected held_out\.jsonl or test\."):
        load_examples(str(tmp_path), "held_out")


def test_blank_rows_of_a_corpus_are_passed_over_and_keep_their_numbers(tmp_path: Path) -> None:
    texts = ["", "One.", None, "  \n", "Two."]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "corpus")
    assert [example.text for example in load_examples(str(tmp_path / "corpus"))] == ["One.", "Two."]
    numbered = datasets.Dataset.from_dict({"text": texts, "number": [1, 2, 3, 4, 5]})
    numbered.select([1, 3]).save_to_disk(tmp_path / "numbered")
    with pytest.raises(DataError, match="numbered, row 2: `text` is empty"):
        load_examples(str(tmp_path / "numbered"))


@pytest.mark.parametrize("source", ["{folder}", "~/tables"])
def test_folder_of_other_files_is_read_by_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("question,answer\nWhy?,So.\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = source.format(folder=tmp_path / "tables")
    assert load_examples(source) == [Example("Why?\nSo.", 5)]
    with pytest.raises(DataError, match="has no held_out part: it has train"):
        load_examples(source, "held_out")


def test_streaming_reads_the_same_rows_and_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"Why {number}?,So." for number in range(50)]
    (tmp_path / "tables").mkdir()
    for name in ("train", "test"):
        (tmp_path / "tables" / f"{name}.csv").write_text("\n".join(["question,answer", *lines]))
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    source = str(tmp_path / "tables")
    streamed = load_examples(source, limit=5, streaming=True)
    assert [example.text for example in streamed] == [f"Why {number}?\nSo." for number in range(5)]
    assert not list(cache.rglob("*.arrow"))
    assert load_examples(source, limit=5) == streamed
    assert list(cache.rglob("*.arrow"))


@pytest.mark.parametrize("held_out", [None, "{train}"])
def test_a_file_is_read_no_further_than_the_limits_need(tmp_path: Path, held_out: str | None) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", *({"text": f"text {number}"} for number in range(100)), "no object")
    with pytest.raises(DataError, match="line 101"):
        load_train_and_held_out(source)
    train, tested = load_train_and_held_out(
        source, held_out and held_out.format(train=source), 40, 2, shuffle_buffer=10 if held_out is None else None
    )
    assert len(tested) == 2
    assert len(train) == (40 if held_out is None else 38)


def test_a_shuffle_buffer_mixes_what_was_read_by_the_seed(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    source = write_jsonl(tmp_path / "rows.jsonl", *({"text": text} for text in texts))

    def read(limit: int | None = None, seed: int = 0, size: int = 8) -> list[str]:
        return [example.text for example in load_examples(source, limit=limit, seed=seed, shuffle_buffer=size)]

    mixed = read()
    assert mixed != texts
    assert sorted(mixed) == sorted(texts)
    # What comes out at a place was read at most the buffer's size ahead.
    assert all(texts.index(text) < place + 8 for place, text in enumerate(mixed))
    assert read() == mixed
    assert read(limit=12) == mixed[:12]
    assert read(seed=1) != mixed
    assert read(size=1) == texts


def test_hub_data_set_without_a_network_is_a_data_error(tmp_path: Path) -> None:
    code = (
        "from kvgraft.data.datasets import load_examples\n"
        "from kvgraft.errors import DataError\n"
        "for source in ('nobody/nothing', 'nobody/nothing:main', 'gsm8k'):\n"
        "    try:\n"
        "        load_examples(source)\n"
        "    except DataError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("nobody/nothing:", "nobody/nothing:main:", "openai/gsm8k:main:"), strict=True):
        assert line.startswith(f"cannot load data set {name}")
        assert line.endswith("without a network, one that is in the cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_whatever_fails_while_a_data_set_is_read_is_a_data_error(
    monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionRefusedError("gone")

    def load(*_: Any, streaming: bool, **__: Any) -> Iterator[dict[str, str]]:
        if streaming:
            return rows()
        raise RuntimeError("While reading.") from ConnectionRefusedError("gone")

    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr("datasets.load_dataset", load)
    told = "gone" if streaming else "While reading: gone"
    with pytest.raises(DataError, match=rf"^cannot load data set owner/name: {told}\. Give "):
        load_examples("owner/name", streaming=streaming)


def test_what_was_streamed_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(4):
            fetched.append(number)
            yield {"text": f"text {number}"}
        if is_cut_off:
            raise ConnectionRefusedError("gone")

    def read(limit: int | None) -> list[int]:
        fetched.clear()
        examples = load_examples("owner/name", limit=limit, streaming=True)
        assert [example.text for example in examples] == [f"text {number}" for number in range(limit or 4)]
        return fetched

    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    is_cut_off = True
    assert read(2) == [0, 1]
    assert read(2) == []
    assert read(3) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="gone"):
            read(None)
    is_cut_off = False
    assert read(None) == [0, 1, 2, 3]
    assert read(None) == []


def test_a_missing_held_out_part_is_told_before_training_text_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split, **__: fetched.append(split) or [{"text": "one"}])
    with pytest.raises(DataError, match="has no held_out part: it has train"):
        load_train_and_held_out("owner/name", "owner/other")
    assert not fetched


def test_a_part_that_datasets_saved_is_read_as_a_file_is(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [f"text {number}" for number in range(40)]
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    source = write_jsonl(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    assert load_examples(str(tmp_path / "saved"), "held_out") == load_examples(source)
    assert load_train_and_held_out(str(tmp_path / "saved")) == load_train_and_held_out(source)
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DataError, match=r"cannot load data set .*saved: "):
        load_examples(str(tmp_path / "saved"))


def test_one_file_is_split_by_the_hash_of_each_text(tmp_path: Path) -> None:
    rows = [{"text": f"text {number % 90}"} for number in range(100)]  # ten texts come twice
    train, held_out = load_train_and_held_out(write_jsonl(tmp_path / "all.jsonl", *rows))
    train_texts, held_out_texts = {example.text for example in train}, {example.text for example in held_out}
    assert not train_texts & held_out_texts
    assert len(train) + len(held_out) == 100
    assert held_out_texts == {
        row["text"]
        for row in rows
        if int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], "big") % 10 == 0
    }

    more = [{"text": f"another {number}"} for number in range(50)]
    grown_train, grown_held_out = load_train_and_held_out(write_jsonl(tmp_path / "grown.jsonl", *more, *rows[::-1]))
    assert train_texts <= {example.text for example in grown_train}
    assert held_out_texts <= {example.text for example in grown_held_out}

    few = load_train_and_held_out(str(tmp_path / "all.jsonl"), train_limit=7, held_out_limit=2)
    assert few == (train[:7], held_out[:2])


@pytest.mark.parametrize("rows", [1, 40])
def test_file_too_small_to_split_is_refused(tmp_path: Path, rows: int) -> None:
    source = write_jsonl(tmp_path / "one.jsonl", *[{"text": "only"}] * rows)
    message = rf"holds {rows} examples of 1 texts that differ, too few to hold one in ten out; name a second file"
    with pytest.raises(DataError, match=message):
        load_train_and_held_out(source)


def test_training_texts_that_are_held_out_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, {"text": "three"})
    held_out = write_jsonl(tmp_path / "b.jsonl", {"text": "two"}, {"text": "four"})
    assert load_train_and_held_out(train, held_out) == (
        [Example("one"), Example("three")],
        [Example("two"), Example("four")],
    )
    assert "left out 1 training texts" in caplog.text


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    with pytest.raises(DataError, match=r"every training text of .* is a held-out text"):
        load_train_and_held_out(source, source)


def test_word_problems_are_examples_with_the_answer_as_completion() -> None:
    (problem,) = word_problems.generate("held_out", 1, seed=4)
    (example,) = load_examples("word_problems", "held_out", 1, seed=4)
    assert example.text == f"{problem['question']}\n{problem['answer']}"
    assert example.text[example.prompt_characters :] == problem["answer"]
    train, held_out = load_train_and_held_out("word_problems")
    assert (len(train), len(held_out)) == (4000, 400)
    assert not {example.text for example in train} & {example.text for example in held_out}


def test_limit_takes_the_first_and_warns_where_there_are_fewer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", *({"text": str(number)} for number in range(5)))
    assert [example.text for example in load_examples(source, limit=3)] == ["0", "1", "2"]
    assert not caplog.records
    assert len(load_examples(source, limit=9)) == 5
    assert "holds 5 examples, fewer than the 9 asked for" in caplog.text


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(tmp_path: Path, limit: int) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", *({"text": str(number)} for number in range(50)))
    with pytest.raises(DataError, match=f"cannot take {limit} examples"):
        load_examples(source, limit=limit)
    with pytest.raises(DataError, match=f"cannot take {limit} examples"):
        load_train_and_held_out(source, train_limit=limit)
    with pytest.raises(DataError, match=f"cannot take {limit} examples"):
        load_train_and_held_out(source, held_out_limit=limit)


def test_shuffle_draws_an_order_from_the_seed(tmp_path: Path) -> None:
    texts = [str(number) for number in range(30)]
    source = write_jsonl(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    shuffled = [example.text for example in load_examples(source, seed=1, shuffle=True)]
    assert shuffled != texts
    assert sorted(shuffled) == sorted(texts)
    assert [example.text for example in load_examples(source, limit=4, seed=1, shuffle=True)] == shuffled[:4]
    assert [example.text for example in load_examples(source, seed=2, shuffle=True)] != shuffled


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_a_file_of_any_kind_is_read_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, streaming: bool
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{number}+1?", "answer": "a [few]"} for number in range(40)]
    table, place = datasets.Dataset.from_list(rows), tmp_path / f"mine.{suffix}"
    if suffix == "json":
        place.write_text(json.dumps(rows, indent=1))
    elif suffix == "parquet":
        table.to_parquet(place)
    else:
        table.to_csv(place, sep="\t" if suffix == "tsv" else ",")
    expected = load_train_and_held_out(write_jsonl(tmp_path / "rows.jsonl", *rows))
    assert load_train_and_held_out(str(place), streaming=streaming) == expected
    place.write_bytes(b"[" if suffix == "json" else b"")
    with pytest.raises(DataError, match=rf"cannot load data set .*mine\.{suffix}: "):
        load_train_and_held_out(str(place), streaming=streaming)


def test_files_that_are_not_there_are_told_apart_from_hub_data_sets() -> None:
    with pytest.raises(DataError, match=r"no file or folder at absent\.parquet"):
        load_examples("absent.parquet", "train")
