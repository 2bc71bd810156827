"""Conversations in two models' own templates: only what was said is aligned, only the assistant's words are learnt."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvgraft.align.tokens import align_encoded
from kvgraft.data.batching import IGNORED, encode_example
from kvgraft.data.chat import encode_text, render, template_fingerprint
from kvgraft.data.datasets import Example, load_examples
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.errors import DataError
from kvgraft.models.loading import load_tokenizer
from kvgraft.plan import make_plan
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.run import run

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips what was said, calls the assistant otherwise and says something of its own first, as Gemma's and Llama's do.
STRIPPED = (
    "{{ bos_token }}user rules: be kind\n{% for message in messages %}<turn>{{ 'model' if message.role == 'assistant' "
    "else message.role }}\n{{ message.content | trim }}<end>\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": " user Zoë has 3 äpples,\nand 4 more. How many? "},
    {"role": "assistant", "content": "3 + 4 = 7"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "  7 💡 äpples\n"},
    {"role": "user", "content": "Thanks."},
]
SAID = [message["content"].strip() for message in CHAT[:4]]
READ = [{"role": turn["role"], "content": said} for turn, said in zip(CHAT, SAID, strict=False)]


def tokenizer_of(template: str | None, vocab_size: int, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([" ".join(SAID), "How many apples are there in all? user assistant"], vocab_size)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special), "bos_token": "<bos>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return tokenizer_of(CHATML, 300, "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def stripped() -> PreTrainedTokenizerFast:
    return tokenizer_of(STRIPPED, 320, "<turn>", "<end>")


@pytest.fixture
def example(tmp_path: Path) -> Example:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    return load_examples(str(path), keep_turns=True)[0]


def covered(example: Example, spans: np.ndarray) -> bytes:
    text = example.text.encode()
    return b"".join(text[first:last] for first, last in spans)


def test_plain_form_holds_what_was_said_where_it_says(example: Example) -> None:
    assert [example.text[first:last] for first, last in example.contents] == SAID
    assert example.text.startswith("user: user Zoë")


def test_tokens_of_the_template_stand_for_nothing(
    example: Example, chatml: PreTrainedTokenizerFast, stripped: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (chatml, stripped):
        encoded = encode_text(example, tokenizer, 512)
        assert encoded.input_ids == tokenizer.apply_chat_template(READ, tokenize=True, return_dict=False)
        assert covered(example, encoded.spans).decode() == "".join(SAID)
        special = [index for index, token in enumerate(encoded.input_ids) if token in tokenizer.all_special_ids]
        assert len(special) >= 8
        assert all(encoded.spans[index, 0] == encoded.spans[index, 1] for index in special)


def test_only_what_was_said_is_aligned_and_never_a_wrong_pair(
    example: Example, chatml: PreTrainedTokenizerFast, stripped: PreTrainedTokenizerFast
) -> None:
    student, teacher = encode_text(example, chatml, 512), encode_text(example, stripped, 512)
    for policy in ("cover", "causal", "mean"):
        alignment = align_encoded(student, teacher, policy)
        own, other = alignment.pairs()
        assert (student.spans[own, 1] > student.spans[own, 0]).all()
        assert (teacher.spans[other, 1] > teacher.spans[other, 0]).all()
        assert alignment.dropped["special"] == int((student.spans[:, 0] == student.spans[:, 1]).sum()) > 8
        assert int(alignment.aligned.sum()) + sum(alignment.dropped.values()) == len(student.input_ids)
    mean_own, mean_other = align_encoded(student, teacher, "mean").pairs()
    assert (np.maximum(student.spans[mean_own, 0], teacher.spans[mean_other, 0]) <
            np.minimum(student.spans[mean_own, 1], teacher.spans[mean_other, 1])).all()  # fmt: skip
    assert set(mean_own.tolist()) == set(np.flatnonzero(student.spans[:, 1] > student.spans[:, 0]).tolist())


def test_loss_is_on_the_assistants_words_and_the_end_of_each_turn(
    example: Example, chatml: PreTrainedTokenizerFast
) -> None:
    encoded = encode_example(example, chatml, 512, "completion")
    learnt = [label for label in encoded.labels if label != IGNORED]
    assert chatml.decode(learnt) == "3 + 4 = 7<|im_end|>7 💡 äpples<|im_end|>"
    assert encoded.input_ids == encode_text(example, chatml, 512).input_ids
    cut = encode_example(example, chatml, 30, "completion")
    assert len(cut.input_ids) == 30
    assert cut.truncated_bytes > 0
    assert covered(example, cut.spans) in covered(example, encoded.spans)


# Writes a place for thoughts into the last answer alone, as Qwen's do.
THINKING = CHATML.replace(
    "{{ message.content }}", "{{ '<think></think>' if loop.last and message.role == 'assistant' }}{{ message.content }}"
)


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "3 + 4 = 7<|im_end|>  7 💡 äpples\n<|im_end|>\n"),
        (THINKING, "3 + 4 = 7<|im_end|><think></think>  7 💡 äpples\n<|im_end|>\n"),
        ("{{ bos_token }}" + CHATML, "3 + 4 = 7<|im_end|>  7 💡 äpples\n<|im_end|>\n"),
        ("{{ bos_token }}" + CHATML.replace("message.content", "message.content | trim"),
         "3 + 4 = 7<|im_end|>7 💡 äpples<|im_end|>\n"),
        (None, " 3 + 4 = 7\n   7 💡 äpples\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_template_for_all_learns_every_answer_too(
    tmp_path: Path, template: str | None, learnt: str, adds_bos: bool
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    tokenizer = tokenizer_of(template, 300, "<|im_start|>", "<|im_end|>")
    if adds_bos:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    (example,) = load_examples(str(path), tokenizer=tokenizer)
    encoded = encode_example(example, tokenizer, 512, "completion")
    labels = [label for label in encoded.labels if label not in (IGNORED, tokenizer.eos_token_id)]
    assert tokenizer.decode(labels) == learnt


@pytest.mark.parametrize("keep_turns", [False, True])
def test_of_a_conversation_given_as_prompt_and_completion_the_completion_alone_is_learnt(
    tmp_path: Path, keep_turns: bool
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": CHAT[:-2], "completion": CHAT[-2:-1]}) + "\n", encoding="utf-8")
    tokenizer = tokenizer_of(CHATML, 300, "<|im_start|>", "<|im_end|>")
    (example,) = load_examples(str(path), tokenizer=tokenizer, keep_turns=keep_turns)
    encoded = encode_example(example, tokenizer, 512, "completion")
    assert "3 + 4 = 7" in tokenizer.decode(encoded.input_ids)
    learnt = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    assert learnt.strip().startswith("7 💡 äpples")


@pytest.mark.parametrize("row", [
    {"prompt": CHAT[:-1], "completion": []},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "How many?", "completion": CHAT[-2:-1]},
    {"prompt": CHAT[:-1], "completion": ["7"]},
])  # fmt: skip
def test_lists_that_are_not_a_prompt_and_one_answer_are_refused(tmp_path: Path, row: dict) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: where `completion` is a list it must hold one message"):
        load_examples(str(path))


def test_an_answer_that_a_template_leaves_out_or_will_not_change_is_not_learnt(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    refuses = "{{ raise_exception('no') if '3 + 4' not in messages[1].content and messages | length == 4 }}"
    last_alone = "{% for message in messages %}{{ message.content if loop.last }}{% endfor %}"
    for template in (refuses + CHATML, last_alone):
        tokenizer = tokenizer_of(template, 300, "<|im_start|>", "<|im_end|>")
        (example,) = load_examples(str(path), tokenizer=tokenizer)
        learnt = [label for label in encode_example(example, tokenizer, 512, "completion").labels if label != IGNORED]
        assert "3 + 4 = 7" not in tokenizer.decode(learnt)
        assert "7 💡 äpples" in tokenizer.decode(learnt)


def test_a_tokenizer_without_a_template_is_refused(example: Example) -> None:
    with pytest.raises(DataError, match=r"has no chat template, which data\.chat_template: own asks for"):
        encode_text(example, tokenizer_of(None, 300), 512)


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{% for message in messages %}{{ message.content if loop.last }}{% endfor %}",
        "{% for message in messages %}{{ message.content }}{{ message.content }}{% endfor %}",
    ],
)
def test_a_template_that_changes_what_was_said_is_refused(example: Example, template: str) -> None:
    with pytest.raises(DataError, match="changes or drops the text of a turn"):
        render(example.turns, tokenizer_of(template, 300))


def test_a_template_that_refuses_is_an_error(example: Example) -> None:
    with pytest.raises(DataError, match=r"refuses the turns of .*: no Zoë"):
        render(example.turns, tokenizer_of("{{ raise_exception('no Zoë') }}", 300))


def test_text_without_turns_is_read_as_it_is(chatml: PreTrainedTokenizerFast, example: Example) -> None:
    plain = Example("3 + 4")
    assert chatml.decode(encode_text(plain, chatml, 512).input_ids) == "3 + 4"
    assert template_fingerprint([plain], chatml) == ""
    assert template_fingerprint([plain, example], chatml) != ""


def test_a_run_where_each_model_has_its_own_template(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": str(n + 1)}] for n in range(40)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    folders = {}
    for name, source, template in (("teacher", tiny_teacher, STRIPPED), ("student", tiny_student, CHATML)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for file in source.iterdir():
            (folders[name] / file.name).write_bytes(file.read_bytes())
        tokenizer = load_tokenizer(str(source))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folders[name])
    recipe = tiny_recipe(
        data={
            "train": str(path),
            "train_samples": None,
            "chat_template": "own",
            "loss_on": "completion",
            "max_length": 128,
        },
        teachers=[{"name": "teacher", "model": str(folders["teacher"])}],
        alignment={"skip_first_tokens": 0},
        arms=["kv"],
        training={"steps": 2, "evaluate_every": 2},
    ).model_copy(update={"student": StudentRecipe(model=str(folders["student"]))})
    result = run(recipe, tmp_path / "run")
    assert result.teachers[0].alignment_coverage == 1
    assert result.teachers[0].alignment_dropped["special"] > 0
    assert result.arms[0].last["kv_loss"] > 0

    new = tiny_recipe(data={"train": str(path), "train_samples": None, "chat_template": "own"})
    assert "a new student's tokenizer has no chat template" in make_plan(new).problems[0]
    lacking = recipe.model_copy(update={"student": StudentRecipe(model=str(tiny_student))})
    assert "has no chat template" in make_plan(lacking).problems[0]


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
MESSAGES = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "18 C"},
    {"role": "assistant", "content": "It is 18 C."},
]


def _rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("keep_turns", [False, True])
def test_tool_calls_that_would_be_dropped_are_refused(tmp_path: Path, keep_turns: bool) -> None:
    source = _rows(tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: `messages` hold `tool_calls`"):
        load_examples(source, keep_turns=keep_turns)


def test_a_template_whose_filter_fails_names_the_line(tmp_path: Path, tiny_student: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_student))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
    )
    source = _rows(tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the tokenizer's chat template refuses"):
        load_examples(source, tokenizer=tokenizer)
