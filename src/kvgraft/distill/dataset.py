"""Student tokens joined with the teachers' stored KV: what a training batch is made of."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from kvgraft.align.likelihood import move_log_likelihood
from kvgraft.align.tokens import AlignmentPolicy, TokenAlignment, align_tokens, gather_aligned
from kvgraft.data.batch_plan import Batch
from kvgraft.data.batching import IGNORED, EncodedExample, batches_by_length
from kvgraft.data.spans import EncodedText
from kvgraft.distill.logit_sources import LogitSource, collate_targets
from kvgraft.errors import AlignmentError
from kvgraft.kv import KV, stack_kv
from kvgraft.models.packing import packed_positions
from kvgraft.store.likelihoods import TokenLikelihoods
from kvgraft.store.online import OnlineKV
from kvgraft.store.reader import KVStore

_UNKNOWN = float("nan")


@dataclass(frozen=True)
class AlignmentCounts:
    """How much of the student's text a teacher answers for.

    ``coverage`` is the share of the student's text tokens that have a teacher token, ``mean_span`` how many teacher
    tokens those have on average, ``dropped`` the student tokens without one, by reason (:class:`TokenAlignment`).
    ``compared_tokens`` are those that have one and are not skipped at the start of a text.
    """

    compared_tokens: int
    coverage: float
    mean_span: float
    dropped: Mapping[str, int]


@dataclass
class TeacherSource:
    """One teacher's KV, seen from the student's tokens and layers.

    Args:
        name: the teacher.
        store: its KV on disk, or the teacher itself.
        teacher_layers: the teacher layer for each compared student layer.
        policy: token alignment (``cover``, ``causal`` or ``mean``).
        skip_first_tokens: student tokens at the start of each text that take no part.
        likelihoods: how likely the teacher finds each token, where that is asked for.
    """

    name: str
    store: KVStore | OnlineKV
    teacher_layers: Sequence[int]
    policy: AlignmentPolicy = "cover"
    skip_first_tokens: int = 2
    likelihoods: TokenLikelihoods | None = None
    _alignments: dict[str, TokenAlignment] = field(default_factory=dict, repr=False)

    def hold(self, examples: Sequence[EncodedExample | EncodedText]) -> None:
        """Fetch the KV of ``examples`` together, or let a teacher that runs beside the student read them together."""
        keys = [example.sample_key for example in examples]
        if isinstance(self.store, OnlineKV):
            self.store.hold(keys)
        else:
            self.store.ask_ahead(keys, self.teacher_layers)

    def alignment(self, example: EncodedExample | EncodedText) -> TokenAlignment:
        """Teacher tokens for each student token of ``example``."""
        key = example.sample_key
        if key not in self._alignments:
            self._alignments[key] = align_tokens(example.spans, self.store.read_spans(key), self.policy)
        return self._alignments[key]

    def aligned(self, example: EncodedExample | EncodedText) -> KV:
        """Teacher KV ``[1, layers, heads, student tokens, head_dim]`` of the stored dtype, or of float32.

        The mask says which tokens count.
        """
        # Widened where batches are made of them; a mean over several tokens has to be taken in float32.
        as_stored = self.policy != "mean"
        stored = self.store.read(example.sample_key, layers=list(self.teacher_layers), as_stored=as_stored)
        kv = gather_aligned(stored.kv, self.alignment(example))
        mask = kv.mask.clone()
        mask[:, : self.skip_first_tokens] = False
        return replace(kv, mask=mask)

    def log_likelihood(self, example: EncodedExample | EncodedText) -> Tensor | None:
        """The teacher's log-likelihood of what each student token covers: ``[student tokens]``, NaN where unknown."""
        if self.likelihoods is None:
            return None
        key = example.sample_key
        return move_log_likelihood(self.likelihoods.read(key), self.store.read_spans(key), example.spans)

    def counts(self, examples: Sequence[EncodedExample | EncodedText]) -> AlignmentCounts:
        """Coverage and reasons for dropped tokens over all texts."""
        compared, covered, chosen, text_tokens = 0, 0, 0, 0
        dropped: Counter[str] = Counter()
        for example in examples:
            alignment = self.alignment(example)
            compared += int(alignment.aligned[self.skip_first_tokens :].sum())
            covered += int(alignment.aligned.sum())
            chosen += len(alignment.pairs()[0])
            text_tokens += len(alignment.ranges) - alignment.dropped["special"]
            dropped.update(alignment.dropped)
        return AlignmentCounts(compared, covered / max(text_tokens, 1), chosen / max(covered, 1), dict(dropped))


class DistillationDataset(Dataset[dict[str, Any]]):
    """Texts as the student reads them, each with every teacher's aligned KV.

    Args:
        examples: encoded texts.
        sources: the teachers; none for cross-entropy alone.
        mismatch_seed: if given, every text gets the teacher KV of another text (the control of SPEC R8).
        logit_sources: teachers whose predictions are compared; none by default.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        sources: Sequence[TeacherSource] = (),
        mismatch_seed: int | None = None,
        logit_sources: Sequence[LogitSource] = (),
    ) -> None:
        self.examples = examples
        self.sources = sources
        self.logit_sources = logit_sources
        self.partner = (
            list(range(len(examples)))
            if mismatch_seed is None
            else _derangement([example.sample_key for example in examples], mismatch_seed)
        )

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all texts whose tokens carry a label."""
        return sum(example.predicted_bytes for example in self.examples)

    @property
    def runs_teachers(self) -> bool:
        """Whether reading a text runs a teacher."""
        return any(isinstance(source.store, OnlineKV) for source in self.sources)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples of one batch, as a DataLoader asks for them."""
        for source in self.sources:
            source.hold([self.examples[self.partner[index]] for index in indices])
        return [self[index] for index in indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        partner = self.examples[self.partner[index]]
        labels = torch.tensor(example.labels)
        teacher_kv, likelihoods = {}, {}
        for source in self.sources:
            kv = _fit_length(source.aligned(partner), len(labels))
            # What the labels ignore takes no part in any loss.
            teacher_kv[source.name] = replace(kv, mask=kv.mask & (labels != IGNORED))
            log_likelihood = source.log_likelihood(partner)
            if log_likelihood is not None:
                missing = len(labels) - len(log_likelihood)
                likelihoods[source.name] = functional.pad(log_likelihood, (0, missing), value=_UNKNOWN)
        sample = {
            "input_ids": torch.tensor(example.input_ids),
            "labels": labels,
            "teacher_kv": teacher_kv,
            "teacher_log_likelihood": likelihoods,
        }
        if self.logit_sources:
            sample["teacher_logits"] = {source.name: source.targets(example) for source in self.logit_sources}
        return sample


@dataclass(frozen=True)
class DistillationCollator:
    """Pads samples to one batch: tokens with ``pad_token_id``, labels with -100, KV with zeros and a false mask.

    KV is float32 then, whatever it was stored in.

    ``texts_in_rows`` has the student read the samples packed: so many of them in the first row, so many in the next.
    """

    pad_token_id: int

    def __call__(
        self, samples: Sequence[Mapping[str, Any]], texts_in_rows: Sequence[int] | None = None
    ) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "input_ids": _pad([sample["input_ids"] for sample in samples], self.pad_token_id),
            "labels": _pad([sample["labels"] for sample in samples], IGNORED),
            "attention_mask": _pad([torch.ones_like(sample["input_ids"]) for sample in samples], 0),
        }
        if texts_in_rows is not None:
            lengths = iter([len(sample["input_ids"]) for sample in samples])
            batch["packed_positions"] = packed_positions([list(islice(lengths, texts)) for texts in texts_in_rows])
        teachers = samples[0]["teacher_kv"]
        if teachers:
            batch["teacher_kv"] = {
                name: stack_kv([sample["teacher_kv"][name] for sample in samples], torch.float32) for name in teachers
            }
        told = samples[0]["teacher_log_likelihood"]
        if told:
            batch["teacher_log_likelihood"] = {
                name: _pad([sample["teacher_log_likelihood"][name] for sample in samples], _UNKNOWN) for name in told
            }
        if "teacher_logits" in samples[0]:
            batch["teacher_logits"] = collate_targets([sample["teacher_logits"] for sample in samples])
        return batch


@dataclass(frozen=True)
class Batches:
    """The texts of ``dataset``, the longest first, so many at a time, on ``device``; may be gone through again."""

    dataset: DistillationDataset
    collator: DistillationCollator
    batch_size: int
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lengths = [len(example.input_ids) for example in self.dataset.examples]
        batches = batches_by_length(lengths, self.batch_size)
        for batch in DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collator):
            yield send_to_device(batch, self.device)


class PlannedBatches(Dataset[dict[str, Any]]):
    """The batches of a training in order: item ``i`` is the ``i``-th batch of ``plan``, collated.

    Args:
        dataset: the texts.
        collator: makes one batch of some.
        plan: as :func:`kvgraft.data.batch_plan.plan_batches` gives it.
        packed: let the student read the texts of a row as one sequence.
    """

    def __init__(
        self, dataset: DistillationDataset, collator: DistillationCollator, plan: Sequence[Batch], packed: bool
    ) -> None:
        self.dataset, self.collator, self.plan, self.packed = dataset, collator, plan, packed
        self._texts_read = [0, *accumulate(sum(map(len, batch)) for batch in plan)]

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def runs_teachers(self) -> bool:
        """Whether reading a text runs a teacher."""
        return self.dataset.runs_teachers

    def epochs(self, batches: int) -> float:
        """How often the first ``batches`` batches read the texts."""
        return self._texts_read[batches] / len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.plan[index]
        samples = self.dataset.__getitems__([text for row in rows for text in row])
        return self.collator(samples, [len(row) for row in rows] if self.packed else None)


def _pad(rows: list[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _derangement(keys: Sequence[str], seed: int) -> list[int]:
    """A fixed random partner for every text, never the same text: one step along a random cycle, or to the next other.

    ``keys`` tell which texts are the same.
    """
    if len(set(keys)) < 2:
        raise AlignmentError("KV of another text needs at least two different texts")
    order = list(range(len(keys)))
    random.Random(seed).shuffle(order)
    partner = [0] * len(keys)
    for index, text in enumerate(order):
        steps = 1
        while keys[order[(index + steps) % len(order)]] == keys[text]:
            steps += 1
        partner[text] = order[(index + steps) % len(order)]
    return partner


def _fit_length(kv: KV, tokens: int) -> KV:
    """``kv`` cut, or padded with masked zeros, to ``tokens``."""
    missing = tokens - kv.mask.shape[1]
    if missing == 0:
        return kv
    if missing < 0:
        return replace(
            kv,
            keys=kv.keys[..., :tokens, :],
            values=kv.values[..., :tokens, :],
            positions=kv.positions[:, :tokens],
            mask=kv.mask[:, :tokens],
        )
    pad_kv = (0, 0, 0, missing)
    return replace(
        kv,
        keys=functional.pad(kv.keys, pad_kv),
        values=functional.pad(kv.values, pad_kv),
        positions=functional.pad(kv.positions, (0, missing)),
        mask=functional.pad(kv.mask, (0, missing)),
    )
