import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM

from kvgraft.errors import GraftError, RecipeError
from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import build_projector
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.joint import joint_grafter
from kvgraft.graft.own import own_grafter, student_as_its_own_teacher
from kvgraft.graft.pieces import text_lengths
from kvgraft.graft.questions import Questions
from kvgraft.graft.run import graft
from kvgraft.graft.worth import Measured, cache_worth, teacher_alone
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe
from kvgraft.report.graft import GraftReport

WHOLE = {"data": {"max_length": 250, "train_samples": 20, "held_out_samples": 5}}


def test_questions_end_where_the_answer_begins(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(**WHOLE))
    items = Questions(data.held_out, data.held_out_examples)
    assert len(items) == 5
    for item, example in zip(items, data.held_out_examples, strict=True):
        decode = data.student.tokenizer.decode
        question, answer = decode(item.pair.input_ids[0]), decode(item.answer_ids[0])
        # Texts are cut at max_length.
        assert len(answer) > 5
        assert example.text.startswith(question + answer)
        assert example.text[: example.prompt_characters].startswith(question)
        assert item.pair.source.mask.shape[1] == item.pair.target.mask.shape[1] == item.pair.mask.shape[1]


def test_nothing_of_the_answer_is_in_the_cache(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Question and answer run into each other, so that a teacher token can cover both.
    lines = [f'{{"prompt": "aa{"bc" * n}", "completion": "{"bc" * 9} and {n} more words"}}' for n in range(3, 40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = prepare_fit(
        fit_recipe(data={"train": str(tmp_path / "data.jsonl"), "max_length": 250, "held_out_samples": 9})
    )
    items = Questions(data.held_out, data.held_out_examples)
    for item, example, text in zip(items, data.held_out_examples, data.held_out.texts, strict=True):
        spans = data.held_out.teacher.store.read_spans(text.sample_key)
        students, teachers = data.held_out.teacher.alignment(text).pairs()
        used = [
            t for s, t in zip(students, teachers, strict=True) if s < item.pair.mask.shape[1] and item.pair.mask[0, s]
        ]
        assert all(spans[token, 1] <= example.prompt_characters for token in used)


def test_own_cache_equals_reading_and_the_controls_differ(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe(**WHOLE, store={"dtype": "float32"})
    data = prepare_fit(recipe)
    student, items = data.student.load(), Questions(data.held_out, data.held_out_examples)
    config = {"org/teacher-1.0": {"d_model": 16, "num_layers": 4}}
    projector = KVDimensionProjector(config, 12, source_layers={"org/teacher-1.0": [[0], [1], [3]]})
    zero = torch.zeros(3, 12)
    measured = [Measured("random", Grafter(projector, "org/teacher-1.0", 2, own_first_tokens=2), items)]
    losses = cache_worth(student, items, measured, (zero, zero), 2, layer_groups=3)
    projector.train()  # dropout must not be measured
    assert cache_worth(student, items, measured, (zero, zero), 2)["random"] == losses["random"]
    with torch.no_grad():
        for index, item in enumerate(items):
            ids = torch.cat([item.pair.input_ids, item.answer_ids], 1)
            logits = student(input_ids=ids).logits[0, item.pair.mask.shape[1] : -1]
            read = torch.nn.functional.cross_entropy(logits, item.answer_ids[0, 1:], reduction="sum")
            assert losses["own"].sums[index] == pytest.approx(float(read), rel=1e-4)
    assert losses["mean"].sums == losses["zeros"].sums
    assert losses["none"].mean != losses["own"].mean
    # All groups of layers are tried, and each differs from the student's own cache.
    tried = [name for name in losses if name.endswith("alone")]
    assert tried == [f"random in layers {layer} to {layer} alone" for layer in range(3)]
    for name in (*tried, "random", "random, another question", "random, tokens shuffled", "another question, own"):
        assert losses[name].mean != losses["own"].mean


def test_no_question_still_has_what_stands_before_any_text(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(**WHOLE, store={"dtype": "float32"}))
    items = Questions(data.held_out, data.held_out_examples)
    assert items.before_text(0) is None
    # As if the first token of the first text were a BOS.
    first, *others = data.held_out.texts
    spans = first.spans.copy()
    spans[0] = 0
    pairs = replace(data.held_out, texts=[replace(first, spans=spans), *others])
    before = Questions(pairs, data.held_out_examples).before_text(0)
    assert before is not None
    assert before.mask.shape == (1, 1)
    assert torch.equal(before.keys, items[0].pair.target.keys[:, :, :, :1])


def test_what_a_tokenizer_adds_is_neither_question_nor_answer(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(**WHOLE))
    items = Questions(data.held_out, data.held_out_examples)
    # As if the first token of every text were a BOS and its last an end of text; the first two have no prompt.
    texts = []
    for text in data.held_out.texts:
        spans = text.spans.copy()
        spans[0], spans[-1] = 0, spans[-1, 1]
        texts.append(replace(text, spans=spans))
    no_prompts = [replace(example, prompt_characters=0) for example in data.held_out_examples[:2]]
    marked = Questions(replace(data.held_out, texts=texts), [*no_prompts, *data.held_out_examples[2:]])
    assert marked.lengths() == items.lengths()[2:]
    assert marked.answer_lengths() == [tokens - 1 for tokens in items.answer_lengths()[2:]]
    for place in range(3):
        assert torch.equal(marked[place].answer_ids, items[2 + place].answer_ids[:, :-1])
    with pytest.raises(GraftError, match="no text has a prompt"):
        Questions(replace(data.held_out, texts=texts[:2]), no_prompts)


def test_the_teacher_alone_answers_as_it_does_without_us(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(**WHOLE))
    teacher, tokenizer = data.teacher.load(), data.teacher.tokenizer
    questions = Questions(data.held_out, data.held_out_examples, limit=2)
    measured = teacher_alone(teacher, tokenizer, questions)
    for index, nats in enumerate(measured.sums):
        text, start, end = questions.answer_span(index)
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            likelihood = teacher(input_ids=ids[None]).logits[0].log_softmax(-1)
        # The text is ASCII, so that characters are bytes.
        places = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if i and a >= start and b <= end]
        assert nats == pytest.approx(-float(sum(likelihood[i - 1, ids[i]] for i in places)), rel=1e-4)
        assert measured.tokens[index] == questions[index].answer_ids.shape[1] - 1
    # An end of text that a tokenizer adds is no part of an answer.
    end_of_text = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {tokenizer.eos_token}", None, end_of_text)
    assert teacher_alone(teacher, tokenizer, questions) == measured


def test_goes_the_whole_way_and_is_not_done_twice(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    continuation = {"steps": 2, "texts_per_step": 2, "evaluate_every": 2, "save_every": 2}
    recipe = fit_recipe(
        **WHOLE,
        fit={"steps": 2, "evaluate_every": 2, "sources": 2, "fewer_sources": True, "continuation": continuation},
        graft={"trained": ["continuation", "own", "gated", "both"], "layer_groups": 2, "first_token": 20},
    )
    report = graft(recipe, tmp_path / "run")
    assert report.retention("own") == 1
    assert report.retention("none") == 0
    low, high = report.retention_interval("projector")
    assert low <= report.retention("projector") <= high
    nats, low, high = report.difference("projector", "own")
    assert low <= nats <= high
    longest = [length for _, length, _ in report.retention_by_length("own")]
    assert longest == [sorted(report.question_tokens)[place] for place in (1, 3, 4)]
    for name in ("continuation", "own", "gated", "both"):
        assert (tmp_path / "run" / name / "grafter.json").is_file()
        assert not (tmp_path / "run" / name / "checkpoints").exists()
    table = (tmp_path / "run" / "graft.md").read_text()
    assert all(f"| {name} |" in table for name in report.nats)
    assert "least squares, 1 layer" in report.nats
    assert "least squares, 1 layer" in (tmp_path / "run" / "fit.md").read_text()
    assert report.first_token is not None
    assert report.first_token.from_store.keys() == {"least squares", "projector", "least squares, 1 layer"}
    assert f"To the first token after {report.first_token.tokens} tokens" in table
    for seconds in (*report.first_token.from_store.values(), report.first_token.student, report.first_token.teacher):
        assert seconds > 0
    assert graft(recipe, tmp_path / "run", resume=True) == GraftReport.read(tmp_path / "run" / "graft.json")
    rounded = recipe.graft.model_copy(update={"trained": [], "first_token": 0, "bf16": True})
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    in_bfloat16 = graft(recipe.model_copy(update={"graft": rounded}), tmp_path / "run", resume=True)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert "Projected in bfloat16." in (tmp_path / "run" / "graft.md").read_text()
    for name in ("least squares", "projector"):
        assert in_bfloat16.nats[name] != report.nats[name]
        assert in_bfloat16.nats[name] == pytest.approx(report.nats[name], abs=0.01)
    other = recipe.model_copy(update={"graft": rounded.model_copy(update={"own_first_tokens": 2})})
    with pytest.raises(RecipeError, match="another recipe"):
        graft(other, tmp_path / "run", resume=True)
    assert GraftReport.read(tmp_path / "run" / "graft.json") == in_bfloat16


def test_a_student_that_takes_no_cache_is_refused_before_anything_runs(
    fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Lfm2ForCausalLM(Lfm2Config(**fields, layer_types=["conv", "full_attention"])).save_pretrained(tmp_path / "student")
    with pytest.raises(GraftError, match="Lfm2ForCausalLM cannot take a grafted cache"):
        graft(fit_recipe(student={"model": str(tmp_path / "student")}), tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_what_cannot_be_grafted_is_refused(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher_to_student"):
        graft(fit_recipe(fit={"direction": "student_to_teacher"}), tmp_path / "a")
    with pytest.raises(RecipeError, match=r"one for each of 0\.\.2"):
        graft(fit_recipe(alignment={"layers": [(0, 0), (2, 1)]}), tmp_path / "b")
    (tmp_path / "data.jsonl").write_text("\n".join(f'{{"text": "some text {n}"}}' for n in range(40)))
    data = prepare_fit(fit_recipe(data={"train": str(tmp_path / "data.jsonl")}))
    with pytest.raises(GraftError, match="no text has a prompt"):
        Questions(data.held_out, data.held_out_examples)


def test_text_without_questions_is_refused_before_anything_is_fitted(
    fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    plain = rows(tmp_path / "plain.jsonl", [{"text": f"some text {n}"} for n in range(40)])
    with pytest.raises(GraftError, match="no text has a prompt"):
        graft(fit_recipe(data={"train": plain}), tmp_path / "plain")
    with pytest.raises(GraftError, match=r"two held-out questions that differ; got 1 .* graft\.texts"):
        graft(fit_recipe(**WHOLE, graft={"texts": 1}), tmp_path / "one")
    with pytest.raises(RecipeError, match=r"one for each of 0\.\.2"):
        graft(fit_recipe(alignment={"layers": [(0, 0), (2, 1)]}), tmp_path / "layers")
    long = [{"prompt": f"Ann has {n} " * 60, "completion": "and no more"} for n in range(40)]
    twice = {"data": WHOLE["data"] | {"train": rows(tmp_path / "long.jsonl", long), "max_length": 512}}
    with pytest.raises(GraftError, match=r"the student's context is 512; lower data.max_length, or leave both out"):
        graft(fit_recipe(**twice, graft={"trained": ["both"]}), tmp_path / "twice")
    assert not list(tmp_path.glob("*/least_squares"))


def test_reaches_are_the_positions_that_caches_and_answers_take(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe(**WHOLE)
    data = prepare_fit(recipe)
    items = Questions(data.held_out, data.held_out_examples)
    projector = build_projector(recipe, data, [[0], [1], [2]], "linear")
    for fusion in ("none", "both"):
        grafter = Grafter(projector, "org/teacher-1.0", 2, fusion=fusion).eval()
        taken = [
            max(int(text_lengths(grafter(item.pair, read))) for read in (item.pair, items[items.another(place)].pair))
            for place, item in enumerate(items)
        ]
        read = [length + item.answer_ids.shape[1] - 1 for length, item in zip(taken, items, strict=True)]
        assert items.reaches(twice=fusion == "both", with_another=True) == read


FITS = {"data": {"train_samples": 20, "held_out_samples": 5, "max_length": 96}, "graft": {"first_token": 0}}


def rows(path: Path, found: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_the_teacher_alone_reads_no_further_than_the_student(
    fit_recipe: Callable[..., Recipe], short_teacher: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(short_teacher)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(short_teacher)
    teacher = {"name": "org/teacher-1.0", "model": str(short_teacher)}
    data = prepare_fit(fit_recipe(teachers=[teacher], data={"max_length": 120}))
    items = Questions(data.held_out, data.held_out_examples)
    alone = teacher_alone(data.teacher.load(), data.teacher.tokenizer, items)
    assert alone is not None
    assert all(torch.tensor(alone.sums).isfinite())


def test_another_question_is_not_the_same_one(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def texts(numbers: range) -> list[dict]:
        return [
            {"question": f"Tom has {n} apples and buys {n}. How many now?", "answer": f"He has {w} {2 * n} apples."}
            for n in numbers
            for w in ("then", "now", "in all")
        ]

    data = {"train": rows(tmp_path / "a.jsonl", texts(range(2, 12))), "train_samples": None, "held_out_samples": None}
    data["held_out"] = rows(tmp_path / "b.jsonl", texts(range(12, 15)))
    report = graft(fit_recipe(**FITS | {"data": data}, store={"dtype": "float32"}), tmp_path / "run")
    assert all(
        own != other for own, other in zip(report.sums["own"], report.sums["another question, own"], strict=True)
    )


def test_questions_may_be_shorter_than_the_first_tokens(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = [{"prompt": f"{a}{b}:", "completion": f"{a + b}, the sum of both"} for a in range(9) for b in range(9)]
    recipe = fit_recipe(**FITS | {"data": {"train": rows(tmp_path / "a.jsonl", found)}})
    assert graft(recipe, tmp_path / "run").questions > 1


def test_a_continuation_goes_on_from_one_that_was_fitted(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    steps = {"objective": "continuation", "continuation": {"steps": 2, "learning_rate": 3e-2, "texts_per_step": 2}}
    graft_settings = {"first_token": 0, "trained": ["continuation"]}
    recipe = fit_recipe(**FITS | {"data": {"max_length": 250, "train_samples": 20}, "graft": graft_settings}, fit=steps)
    report = graft(recipe, tmp_path / "run")
    assert report.nats["trained on answers"] != report.nats["projector"]


@pytest.mark.parametrize("context", [0, 1, 2])
def test_joint_adapters_are_about_as_large_as_the_control(fit_recipe: Callable[..., Recipe], context: int) -> None:
    recipe = fit_recipe(
        data={"train_samples": 6, "held_out_samples": 4},
        fit={"sources": 2, "context_tokens": context},
        projector={"mlp_ratio": 0.5},
    )
    data = prepare_fit(recipe)
    own = own_grafter(recipe, student_as_its_own_teacher(data), data.teacher.geometry.kv_dim)
    joint = joint_grafter(recipe, data, [[0, 1], [1, 2], [3, 2]])
    share = joint.projector.count_parameters() / own.projector.count_parameters()
    assert 0.9 < share <= 1
    question = data.held_out[0]
    with torch.no_grad():
        torch.testing.assert_close(joint.eval()(question).keys, question.target.keys)
