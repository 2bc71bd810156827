"""Batched greedy generation against `generate` on one prompt at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvgraft.data.word_problems import generate
from kvgraft.errors import DataError
from kvgraft.evaluate.generation import Generation, generate_greedy
from kvgraft.evaluate.gsm8k import solve_open_sum

Student = tuple[PreTrainedModel, PreTrainedTokenizerBase]
PROMPTS = [f"{problem['question']}\n" for problem in generate("held_out", 7, seed=3)] + ["Tom"]


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Student:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_student).eval()
    with torch.no_grad():
        # Random weights alone repeat one token whatever the prompt.
        model.lm_head.weight.normal_(std=0.5)
    return model, AutoTokenizer.from_pretrained(tiny_student)


def one_by_one(student: Student, prompt: str, tokens: int) -> list[int]:
    model, tokenizer = student
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_do_not_depend_on_the_batch(student: Student, batch_size: int) -> None:
    model, tokenizer = student
    written = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    for prompt, generation in zip(PROMPTS, written, strict=True):
        expected = one_by_one(student, prompt, 12)
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert generation.tokens == len(expected)
    assert len({generation.text for generation in written}) > 1


@pytest.fixture
def writes(student: Student, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model write a given text, whatever the prompt."""
    model, tokenizer = student

    def script(text: str) -> None:
        tokens = iter(tokenizer.encode(text, add_special_tokens=False))

        def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> object:
            logits = torch.zeros(*input_ids.shape, model.config.vocab_size)
            logits[..., next(tokens, tokenizer.eos_token_id)] = 1.0
            return CausalLMOutputWithPast(logits=logits)

        monkeypatch.setattr(model, "forward", forward)

    return script


def test_an_answer_ends_where_it_is_complete(student: Student, writes: Callable[[str], None]) -> None:
    text = "one line\nthe last line\nand a line too many\n"
    writes(text)
    ended = generate_greedy(
        *student, ["Tom", "Ann has"], max_new_tokens=60, is_complete=lambda text: "last line\n" in text
    )
    assert [generation.text for generation in ended] == ["one line\nthe last line\n"] * 2
    assert ended[0].tokens == len(student[1].encode("one line\nthe last line\n"))
    writes(text)
    assert generate_greedy(*student, ["Tom"], max_new_tokens=60)[0].text == text
    writes("")
    assert generate_greedy(*student, ["Tom"], max_new_tokens=60)[0] == Generation("", 1)


def test_what_must_follow_a_sign_is_put_in(student: Student, writes: Callable[[str], None]) -> None:
    forced = len(student[1].encode("24>>"))
    writes("48/2 = <<48/2=" + "x" * forced + "24 and x = y")
    written = generate_greedy(*student, ["Tom", "Ann has"], max_new_tokens=60, must_continue=solve_open_sum)
    assert [generation.text for generation in written] == ["48/2 = <<48/2=24>>24 and x = y"] * 2


def test_prompts_without_room(student: Student) -> None:
    model, tokenizer = student
    long = "Tom has many apples. " * 200
    written = generate_greedy(model, tokenizer, ["Tom", long], max_new_tokens=4)
    assert [generation.had_room for generation in written] == [True, False]
    assert written[1].text == ""
    with pytest.raises(DataError, match=r"none of 1 prompts leaves room for 4 tokens.*fewer --shots"):
        generate_greedy(model, tokenizer, [long], max_new_tokens=4)


def test_the_most_likely_token_is_taken_whatever_the_model_ships(tiny_student: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_student), AutoTokenizer.from_pretrained(tiny_student)
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    model.generation_config.repetition_penalty = 1.3
    ids = tokenizer("Tom has 3 apples", return_tensors="pt")["input_ids"]
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    (found,) = generate_greedy(model, tokenizer, ["Tom has 3 apples"], max_new_tokens=12)
    assert found.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert model.generation_config.repetition_penalty == 1.3
