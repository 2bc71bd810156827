"""Pairs of KV to fit on: what two frozen models make of the same tokens, from a store for each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from kvgraft.align.evidence import EVIDENCE_METHODS
from kvgraft.bfloat16 import warn_where_slow
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.distill.dataset import AlignmentCounts, TeacherSource
from kvgraft.errors import RecipeError
from kvgraft.identify import IdentifiedModel, identify
from kvgraft.kv import KV
from kvgraft.prepare import (
    Phases,
    existing_tokenizer,
    find_layer_evidence,
    layer_map_of,
    load_examples_of,
    read_texts,
    require_coverage,
    require_long_context,
    student_context_problem,
    teacher_max_length,
)
from kvgraft.prepare_kv import store_kv
from kvgraft.projector.scenario import AblationData
from kvgraft.projector.settings import Direction
from kvgraft.projector.sources import with_previous_tokens
from kvgraft.recipe import Recipe, TeacherRecipe
from kvgraft.store.fill import encode_for_teacher
from kvgraft.store.reader import KVStatistics, KVStore

# Tokens from which a step's are drawn, over those of a step: enough to mix many texts, little enough to hold.
_BUFFER_STEPS = 8
AblationKind = Literal["keys", "values"]
_ABLATION_LAYERS, _ABLATION_TOKENS, _ABLATION_HELD_OUT_TOKENS = 4, 8192, 2048


@dataclass(frozen=True)
class KVPair:
    """KV of the same tokens in two models, pre-RoPE keys.

    Attributes:
        source: what the adapters read, ``[1, source layers, heads, tokens, head_dim]``.
        target: what they should give, ``[1, target layers, heads, tokens, head_dim]``.
        mask: ``[1, tokens]`` bool, true where both models have the token and it counts.
        input_ids: ``[1, tokens]``, the tokens as the student reads them.
    """

    source: KV
    target: KV
    mask: Tensor
    input_ids: Tensor

    def to(self, device: torch.device) -> KVPair:
        """The same on ``device``."""
        return KVPair(self.source.to(device), self.target.to(device), self.mask.to(device), self.input_ids.to(device))

    def rows(self, context_tokens: int = 0, weights: Tensor | None = None) -> KVRows:
        """The tokens that count, each with so many before it; ``weights [target layers, tokens]`` go along."""
        chosen = self.mask[0]
        read = [with_previous_tokens(part[0], context_tokens) for part in self.source.flatten()]
        source, target = (
            torch.stack([part[:, chosen] for part in parts])
            for parts in (read, [part[0] for part in self.target.flatten()])
        )
        return KVRows(source, target, None if weights is None else weights[:, chosen])


@dataclass(frozen=True)
class KVRows:
    """Tokens of any texts: ``source [2, source layers, tokens, width]`` and ``target`` likewise, keys first.

    ``weights [target layers, tokens]`` say how much each counts, default alike. With context, the source layers are
    those of :func:`kvgraft.projector.sources.with_previous_tokens`.
    """

    source: Tensor
    target: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.source.shape[2]

    def take(self, index: Tensor | slice) -> KVRows:
        """Some of the tokens."""
        weights = None if self.weights is None else self.weights[:, index]
        return KVRows(self.source[:, :, index], self.target[:, :, index], weights)


def join_rows(rows: Sequence[KVRows]) -> KVRows:
    """The tokens of all, in order."""
    weights = [part.weights for part in rows if part.weights is not None]
    return KVRows(
        torch.cat([part.source for part in rows], 2),
        torch.cat([part.target for part in rows], 2),
        torch.cat(weights, 1) if weights else None,
    )


@dataclass(frozen=True)
class PairDataset(Dataset[KVPair]):
    """Texts as both models store them.

    Attributes:
        texts: as the student's tokenizer reads them.
        student_store: the student's KV.
        teacher: the teacher's KV, seen from the student's tokens.
        student_layers: which of the student's are read.
        direction: ``teacher_to_student``: the student's KV is the target; or ``student_to_teacher``.
        context_tokens: tokens before each that its row brings along.
        token_weights: for each text how much each token counts in each target layer ``[target layers, tokens]``,
            about 1 on average; default alike.
    """

    texts: Sequence[EncodedText]
    student_store: KVStore
    teacher: TeacherSource
    student_layers: Sequence[int]
    direction: Direction
    context_tokens: int = 0
    token_weights: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> KVPair:
        text = self.texts[index]
        student = self.student_store.read(text.sample_key, layers=list(self.student_layers)).kv
        teacher = self.teacher.aligned(text).to(torch.float32)
        source, target = (teacher, student) if self.direction == "teacher_to_student" else (student, teacher)
        return KVPair(source, target, teacher.mask, torch.tensor([text.input_ids]))

    @property
    def num_source_layers(self) -> int:
        """Layers that are read of the model that the adapters read."""
        read = self.teacher.teacher_layers if self.direction == "teacher_to_student" else self.student_layers
        return len(read)

    def subset(self, indices: Sequence[int]) -> PairDataset:
        """Some of the texts."""
        weights = None if self.token_weights is None else [self.token_weights[index] for index in indices]
        return replace(self, texts=[self.texts[index] for index in indices], token_weights=weights)

    def reading(
        self, *, teacher_layers: Sequence[int] | None = None, student_layers: Sequence[int] | None = None
    ) -> PairDataset:
        """The same texts, read in other layers of either model."""
        teacher = self.teacher if teacher_layers is None else replace(self.teacher, teacher_layers=list(teacher_layers))
        return replace(self, teacher=teacher, student_layers=student_layers or self.student_layers)

    def rows_of(self, index: int) -> KVRows:
        """The tokens of one text that count."""
        return self[index].rows(self.context_tokens, None if self.token_weights is None else self.token_weights[index])

    def rows(self, limit: int, seed: int = 0) -> KVRows:
        """About ``limit`` tokens, whole texts drawn by ``seed``; the last is cut."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        found: list[KVRows] = []
        for index in order:
            found.append(self.rows_of(index))
            if sum(len(rows) for rows in found) >= limit:
                break
        return join_rows(found).take(slice(0, limit))

    def statistics(self) -> tuple[KVStatistics, KVStatistics]:
        """Mean and variance of each channel of the source and of the target, from what their stores keep."""
        student = self.student_store.statistics(layers=self.student_layers)
        teacher = self.teacher.store.statistics(layers=self.teacher.teacher_layers)
        return (teacher, student) if self.direction == "teacher_to_student" else (student, teacher)


class TokenBatches(IterableDataset[KVRows]):
    """Endless batches of ``tokens`` tokens drawn from many texts, the same for a seed.

    Texts come in a new order each time round and fill a buffer from which tokens are drawn, so that memory does not
    grow with the number of texts.
    """

    def __init__(self, pairs: PairDataset, tokens: int, seed: int) -> None:
        self.pairs, self.tokens, self.seed = pairs, tokens, seed

    def __iter__(self) -> Iterator[KVRows]:
        order, generator = random.Random(self.seed), torch.Generator().manual_seed(self.seed)
        waiting: list[KVRows] = []
        for index in self._texts(order):
            waiting.append(self.pairs.rows_of(index))
            if sum(len(rows) for rows in waiting) < _BUFFER_STEPS * self.tokens:
                continue
            mixed = join_rows(waiting)
            mixed = mixed.take(torch.randperm(len(mixed), generator=generator))
            # Half a buffer stays to be mixed with what comes, however long the texts are.
            batches = len(mixed) // self.tokens - _BUFFER_STEPS // 2
            for start in range(batches):
                yield mixed.take(slice(start * self.tokens, (start + 1) * self.tokens))
            waiting = [mixed.take(slice(batches * self.tokens, None))]

    def _texts(self, order: random.Random) -> Iterator[int]:
        indices = list(range(len(self.pairs)))
        while True:
            order.shuffle(indices)
            yield from indices


@dataclass(frozen=True)
class FitData:
    """What two frozen models give to fit on.

    Attributes:
        layer_map: pairs of (student layer, teacher layer).
        train, held_out: every layer of the source; of the target those that ``layer_map`` names, in its order.
        examples, held_out_examples: the texts, which say where their prompts end.
    """

    student: IdentifiedModel
    teacher: IdentifiedModel
    layer_map: list[tuple[int, int]]
    train: PairDataset
    held_out: PairDataset
    examples: list[Example]
    held_out_examples: list[Example]
    alignment: AlignmentCounts
    phases: Phases


def prepare_fit(recipe: Recipe) -> FitData:
    """Store the KV of the recipe's student and teacher over its text; what is stored already is not done again.

    Raises:
        RecipeError: several teachers, or a student that is new or would read beyond its context, or held-out text of
            which fewer than two tokens are compared.
        KVGraftError: of the room where it went wrong.
    """
    _require_two_frozen_models(recipe)
    fit = recipe.fit
    warn_where_slow(
        {"fit.bf16": fit.bf16, "fit.continuation.bf16": fit.continuation.bf16, "graft.bf16": recipe.graft.bf16}
    )
    phases = Phases()
    settings, model = recipe.student, str(recipe.student.model)
    with phases.timed("identify models"):
        student = identify(
            TeacherRecipe(name="student", model=model, revision=settings.revision, dtype=settings.dtype),
            existing_tokenizer(recipe),
        )
        teacher = identify(recipe.teachers[0])
    too_long = student_context_problem(recipe, student.config)
    if too_long is not None:
        raise RecipeError(too_long)
    with phases.timed("read text"):
        examples, held_out_examples = load_examples_of(recipe, student.tokenizer)
        read, held_out_read = (
            encode_for_teacher(texts, student.tokenizer, recipe.data.max_length)
            for texts in (examples, held_out_examples)
        )
        require_long_context(recipe, teacher, [*examples, *held_out_examples], [*read, *held_out_read])
    layer_map = _layer_map(recipe, student, teacher, phases)
    train, held_out = (
        _pairs(recipe, student, teacher, layer_map, *texts, phases)
        for texts in ((examples, read), (held_out_examples, held_out_read))
    )
    # What is trained has the card to itself and the student; a graft loads the teacher again to ask it.
    teacher.let_go()
    counts = train.teacher.counts(train.texts)
    require_coverage(teacher.recipe.name, counts)
    _require_measurable(teacher.recipe.name, held_out)
    return FitData(student, teacher, layer_map, train, held_out, examples, held_out_examples, counts, phases)


def _require_measurable(teacher: str, held_out: PairDataset) -> None:
    tokens = held_out.teacher.counts(held_out.texts).compared_tokens
    if tokens < 2:
        raise RecipeError(
            f"the {len(held_out)} held-out texts leave {tokens} tokens to compare with teacher {teacher}, and R2 needs "
            "two at least: alignment.skip_first_tokens leaves out the first of each text; set it to 0, raise "
            "data.held_out_samples, or give longer texts"
        )


def _layer_map(
    recipe: Recipe, student: IdentifiedModel, teacher: IdentifiedModel, phases: Phases
) -> list[tuple[int, int]]:
    if recipe.alignment_of(teacher.recipe).layers not in EVIDENCE_METHODS:
        return layer_map_of(recipe, teacher.recipe, student.config, teacher.config)
    with phases.timed("find layers"):
        return find_layer_evidence(recipe, teacher, read_texts(recipe), recipe.fit.direction).layer_map


def _pairs(
    recipe: Recipe,
    student: IdentifiedModel,
    teacher: IdentifiedModel,
    layer_map: list[tuple[int, int]],
    examples: list[Example],
    texts: list[EncodedText],
    phases: Phases,
) -> PairDataset:
    """Both models' KV over ``examples``: all layers of the source, the mapped ones of the target.

    ``texts`` are the same as the student reads them.
    """

    def store_of(model: IdentifiedModel, max_length: int) -> KVStore:
        with phases.timed(f"capture {model.recipe.name}"):
            layers = tuple(range(model.geometry.num_layers))
            return store_kv(model, examples, layers, max_length, recipe.store)[0]

    teacher_store = store_of(teacher, teacher_max_length(recipe, teacher.config))
    student_store = store_of(student, recipe.data.max_length)
    mapped_students, mapped_teachers = (list(layers) for layers in zip(*layer_map, strict=True))
    forwards = recipe.fit.direction == "teacher_to_student"
    alignment = recipe.alignment_of(teacher.recipe)
    source = TeacherSource(
        teacher.recipe.name,
        teacher_store,
        list(range(teacher.geometry.num_layers)) if forwards else mapped_teachers,
        alignment.tokens,
        alignment.skip_first_tokens,
    )
    student_layers = mapped_students if forwards else list(range(student.geometry.num_layers))
    return PairDataset(texts, student_store, source, student_layers, recipe.fit.direction, recipe.fit.context_tokens)


def require_all_layers(data: FitData) -> None:
    """Raise RecipeError where some student layer has no teacher layer: a student cannot go on without its cache."""
    layers = data.student.geometry.num_layers
    if list(data.train.student_layers) != list(range(layers)):
        raise RecipeError(
            f"alignment.layers gives a teacher layer to student layers {list(data.train.student_layers)}; a graft "
            f"needs one for each of 0..{layers - 1}, in order: use `ratio` or name them all"
        )


def _require_two_frozen_models(recipe: Recipe) -> None:
    if len(recipe.teachers) != 1:
        raise RecipeError(
            f"fit takes one teacher and the recipe names {len(recipe.teachers)}; fit them one by one, each with a "
            "recipe that names it alone"
        )
    if recipe.kv_loss.source == "online":
        raise RecipeError("fit reads both models' KV from stores again and again; leave kv_loss.source: online out")
    if recipe.student.model is None:
        raise RecipeError(
            "fit takes a student that exists (student.model): the KV of a new one, with random weights, is not worth "
            "predicting. To train a new student on a teacher's KV use `kvgraft train`."
        )


def ablation_data(recipe: Recipe, kind: AblationKind | None = None) -> AblationData:
    """KV of a few mapped layers of the recipe's models, in the direction of ``fit.direction``.

    Keys and values, or one ``kind``, each with adapters of its own: keys are made from keys, values from values.
    """
    data = prepare_fit(recipe)
    step = max(1, len(data.layer_map) // _ABLATION_LAYERS)
    chosen = data.layer_map[step // 2 :: step][:_ABLATION_LAYERS]
    students, teachers = zip(*chosen, strict=True)
    kinds: tuple[AblationKind, ...] = get_args(AblationKind)
    taken = slice(None) if kind is None else slice(kinds.index(kind), kinds.index(kind) + 1)

    def chosen_rows(pairs: PairDataset, limit: int) -> tuple[Tensor, Tensor]:
        alone = replace(pairs, context_tokens=0)
        rows = alone.reading(teacher_layers=teachers, student_layers=students).rows(limit)
        return rows.source[taken].flatten(0, 1)[None], rows.target[taken].flatten(0, 1)[None]

    layers = ", ".join(f"{teacher} and {student}" for student, teacher in chosen)
    return AblationData(
        *chosen_rows(data.train, _ABLATION_TOKENS),
        *chosen_rows(data.held_out, _ABLATION_HELD_OUT_TOKENS),
        f"{' and '.join(kinds[taken])} of {data.teacher.recipe.name} and {recipe.student.model}, layers {layers}",
    )
