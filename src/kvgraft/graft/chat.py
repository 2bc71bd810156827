"""Talk with a student about documents that only its teacher has read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from kvgraft.data.datasets import Example
from kvgraft.data.spans import encode_with_spans
from kvgraft.errors import GraftError, RecipeError
from kvgraft.evaluate.generation import greedily
from kvgraft.fit.run import PROJECTOR_FOLDER
from kvgraft.graft.cache import cache_from_kv, project
from kvgraft.graft.grafter import SETTINGS_FILE, Grafter
from kvgraft.graft.pieces import concatenate, with_own_tokens
from kvgraft.graft.sources import own_beginning, stored_kv
from kvgraft.identify import identify
from kvgraft.kv import KV
from kvgraft.models.cache import GraftedCache, context_length
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.loading import load_model
from kvgraft.prepare import existing_tokenizer
from kvgraft.prepare_kv import store_kv
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.results import RECIPE_FILE

_SUFFIXES = (".txt", ".md")
# What a student without a chat template is asked in; such a one often goes on after its answer with the next question.
_QUESTION, _ANSWER = "\nQuestion:", "\nAnswer:"


class Conversation:
    """A student that goes on from a grafted cache, question after question.

    Args:
        student, tokenizer: the small model.
        cache: of what it is to have read.
    """

    def __init__(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: GraftedCache) -> None:
        self.student, self.tokenizer, self.cache = student, tokenizer, cache
        self._said = torch.zeros(1, 0, dtype=torch.int64)

    def ask(self, question: str, max_new_tokens: int = 256) -> Iterator[str]:
        """The answer, piece by piece as it is decoded, greedily.

        A student without a chat template is stopped where it begins a question of its own.

        Raises:
            GraftError: documents, conversation and answer are longer than the student's context.
        """
        said = torch.cat([self._said, self._prompt(question)], 1)
        room = context_length(self.student) - int(self.cache.next_positions.max()) - said.shape[1]
        if room < 1:
            raise GraftError(
                f"the conversation fills the student's context of {context_length(self.student)} tokens; start anew, "
                "with fewer documents if need be"
            )
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        # Kept as it was until the answer is whole, so that one that is broken off can be asked again.
        cache = copy.deepcopy(self.cache)
        inputs = cache.generate_inputs(said.to(self.student.device))
        outcome: list[Tensor | BaseException] = []
        stop = None if self.tokenizer.chat_template else _QUESTION

        def decode() -> None:
            try:
                with torch.no_grad(), greedily(self.student):
                    outcome.append(
                        self.student.generate(
                            **inputs,
                            max_new_tokens=min(max_new_tokens, room),
                            do_sample=False,
                            streamer=streamer,
                            stop_strings=stop,
                            tokenizer=self.tokenizer,
                            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                        )
                    )
            except BaseException as error:
                outcome.append(error)
                streamer.end()

        worker = Thread(target=decode, daemon=True)
        worker.start()
        yield from _before(stop, streamer) if stop else streamer
        worker.join()
        (found,) = outcome
        if isinstance(found, BaseException):
            raise found
        self._said = found[:, self.cache.attention_mask.shape[1] :].cpu()
        self.cache = cache

    def _prompt(self, question: str) -> Tensor:
        """Ids ``[1, tokens]`` of a question, in the student's chat template where it has one."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            # Where the answer before this ended in the beginning of a question, this is that question.
            begun = self.tokenizer.decode(self._said[0]).endswith(_QUESTION)
            text = f"{'' if begun else _QUESTION} {question}{_ANSWER}"
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def open_conversation(run: Path, documents: Sequence[Path], graft: str | None = None) -> Conversation:
    """A conversation over ``documents``, one behind the other in the student's cache.

    The teacher reads every document once; its KV stays in the store of ``run``'s recipe, and the next time it is not
    loaded at all.

    Args:
        run: a folder that `kvgraft fit` or `kvgraft graft` wrote.
        documents: UTF-8 text files.
        graft: which of the run's projectors: ``projector``, ``least_squares``, or one of ``graft.trained``; default the
            one trained on answers where the run has it.

    Raises:
        GraftError: no such projector, an empty document, or more text than the student's context.
        RecipeError: ``run`` is no such folder.
    """
    if not (run / RECIPE_FILE).is_file():
        seeds = ", ".join(str(path.parent) for path in sorted(run.glob(f"seed-*/{RECIPE_FILE}")))
        raise RecipeError(
            f"{run} is no run folder: it has no {RECIPE_FILE}; name "
            + (f"the run of one seed: {seeds}" if seeds else "one that `kvgraft graft` wrote")
        )
    recipe = load_recipe(run / RECIPE_FILE)
    if recipe.student.model is None:
        raise RecipeError(
            f"{run} has no projector to chat through: `kvgraft train` made a new student in it, and a projector is "
            "fitted for a student that exists (student.model); name a run that `kvgraft graft` or `kvgraft fit` wrote"
        )
    student = load_model(recipe.student.model, recipe.student.revision, dtype=recipe.student.dtype)
    tokenizer = existing_tokenizer(recipe)
    assert tokenizer is not None
    grafter = _grafter_of(run, recipe, graft).to(student.device)
    if recipe.graft.bf16:
        grafter.projector.compute_in(torch.bfloat16)
    texts = [_read(document) for document in documents]
    with torch.no_grad():
        pieces = _grafted_pieces(recipe, grafter, student, tokenizer, texts)
    return Conversation(student.eval(), tokenizer, cache_from_kv(student, concatenate(pieces)))


def text_files(places: Sequence[Path]) -> list[Path]:
    """Files as they are named, and of folders the ``.txt`` and ``.md`` files in them, in the order of their names.

    Raises:
        GraftError: a place that is not there, or a folder without such files.
    """
    found = []
    for place in places:
        inside = [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix in _SUFFIXES)
        if not inside:
            raise GraftError(f"{place} is neither a file nor a folder with {' or '.join(_SUFFIXES)} files")
        found += inside
    return found


def _grafted_pieces(
    recipe: Recipe, grafter: Grafter, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[KV]:
    """Each text's projected KV, its first tokens the student's own."""
    teacher = identify(recipe.teachers[0])
    for text in texts:
        if encode_with_spans(teacher.tokenizer, text, teacher.context).truncated_bytes:
            raise GraftError(
                f"the document {text[:40]!r} is longer than the context of teacher {teacher.recipe.name}, which is "
                f"{teacher.context} tokens; give it in parts"
            )
    layers = tuple(range(teacher.geometry.num_layers))
    store, _ = store_kv(teacher, [Example(text) for text in texts], layers, teacher.context or 2**20, recipe.store)
    policy, pieces = recipe.alignment_of(teacher.recipe).tokens, []
    for text in texts:
        encoded = encode_with_spans(tokenizer, text)
        kv = stored_kv(store, encoded, policy=policy).to(student.device)
        kv = project(grafter.projector, kv, kv_geometry(student.config), teacher=grafter.teacher)
        own = own_beginning(student, [encoded], max(1, min(grafter.own_first_tokens, len(encoded.input_ids))))
        pieces.append(with_own_tokens(kv, own, min(grafter.own_first_tokens, own.mask.shape[1])))
    return pieces


def _grafter_of(run: Path, recipe: Recipe, graft: str | None) -> Grafter:
    chosen = graft or ("continuation" if (run / "continuation" / SETTINGS_FILE).is_file() else PROJECTOR_FOLDER)
    folder = run / chosen
    if (folder / SETTINGS_FILE).is_file():
        grafter = Grafter.from_pretrained(folder)
        if grafter.fusion != "none" or grafter.teacher not in {teacher.name for teacher in recipe.teachers}:
            raise GraftError(
                f"the graft {chosen!r} of {run} goes on from the student's own reading as well, and here the student "
                "has not read the documents; take `continuation`, `projector` or `least_squares`"
            )
        return grafter
    if not folder.is_dir():
        found = sorted(path.name for path in run.iterdir() if path.is_dir())
        raise GraftError(f"{run} has no projector {chosen!r}; it holds {', '.join(found) or 'none'}")
    projector = KVDimensionProjector.from_pretrained(folder)
    return Grafter(projector, recipe.teachers[0].name, 0, recipe.graft.own_first_tokens).eval()


def _before(stop: str, pieces: Iterable[str]) -> Iterator[str]:
    """``pieces`` up to ``stop``; what may be its beginning waits for what follows."""
    held = ""
    for piece in pieces:
        text, found, _ = (held + piece).partition(stop)
        begun = 0 if found else max(length for length in range(len(stop)) if text.endswith(stop[:length]))
        held = text[len(text) - begun :]
        yield text[: len(text) - begun]
        if found:
            return
    yield held


def _read(document: Path) -> str:
    try:
        text = document.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"{document} cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise GraftError(f"{document} is empty: there is nothing to read; leave it out")
    return text
