"""A teacher that runs beside the student: its KV is made when a batch asks for it, and nothing is kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from transformers import PreTrainedModel

from kvgraft.data.batching import length_buckets
from kvgraft.data.spans import EncodedText, Spans
from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.store.fill import kv_of_texts
from kvgraft.store.fill_kv import counted_tokens
from kvgraft.store.format import StoreIdentity, short_key
from kvgraft.store.moments import Moments
from kvgraft.store.reader import KVStatistics, StoredSample


@dataclass
class OnlineKV:
    """One teacher's KV over the texts of a run, read like a :class:`~kvgraft.store.reader.KVStore`.

    Args:
        teacher: name shown in errors.
        identity: what a store of the same KV in float32 would hold.
        load: gives the teacher, at every call the same.
        texts: as the teacher's tokenizer reads them, by sample key.
        calibration_texts: how many of the first texts :meth:`statistics` is over.
        token_budget: most tokens, padding included, in one pass of the teacher.
    """

    teacher: str
    identity: StoreIdentity
    load: Callable[[], PreTrainedModel]
    texts: Mapping[str, EncodedText]
    calibration_texts: int
    token_budget: int
    _held: dict[str, KV] = field(default_factory=dict, repr=False)

    def hold(self, keys: Iterable[str]) -> None:
        """Run the teacher over the texts ``keys`` together, for :meth:`read`; what was held before is let go.

        Raises:
            ModelError, KVGraftError: the teacher cannot be captured, or gives NaN or Inf.
        """
        wanted = dict.fromkeys(keys)
        self._held = {key: kv for key, kv in self._held.items() if key in wanted}
        texts = [self._text(key) for key in wanted if key not in self._held]
        for bucket in length_buckets([len(text.input_ids) for text in texts], self.token_budget):
            batch = [texts[index] for index in bucket]
            for text, kv in zip(batch, kv_of_texts(self.load(), batch, self.identity.layers), strict=True):
                where = f"teacher {self.teacher}, text {short_key(text.sample_key)}"
                self._held[text.sample_key] = kv.require_finite(where).to("cpu")

    def read(self, key: str, layers: Sequence[int] | None = None, *, as_stored: bool = False) -> StoredSample:
        """One text's KV in ``layers`` (default all that are captured); the teacher runs unless it is held.

        Args:
            as_stored: give the teacher's own dtype and not float32.

        Raises:
            StoreError: the text is none of this run's.
        """
        text = self._text(key)
        if key not in self._held:
            self.hold([key])
        kv = self._held[key].select_layers(self.identity.layers if layers is None else layers)
        return StoredSample(
            kv if as_stored else kv.to(torch.float32), text.spans, text.truncated_bytes, text.text_bytes
        )

    def read_spans(self, key: str) -> Spans:
        """The token spans of one text; the teacher is not run."""
        return self._text(key).spans

    def statistics(self, layers: Sequence[int] | None = None) -> KVStatistics:
        """Mean and variance of each channel over the calibration texts, by the tokens that count in a store's."""
        wanted = self.identity.layers if layers is None else layers
        return KVStatistics.from_moments(self._moments, [self.identity.layers.index(layer) for layer in wanted])

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text.input_ids) for text in self.texts.values())

    @property
    def total_bytes(self) -> int:
        """Bytes on disk: none."""
        return 0

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each token: none."""
        return 0.0

    @cached_property
    def _moments(self) -> Moments:
        total = Moments.empty(self.identity.geometry)
        texts = list(islice(self.texts.values(), self.calibration_texts))
        for bucket in length_buckets([len(text.input_ids) for text in texts], self.token_budget):
            self.hold(texts[index].sample_key for index in bucket)
            for kv in self._held.values():
                keys, values = kv.flatten()
                numbers = torch.stack([keys[0], values[0]], dim=1)
                total = total.merge(Moments.of(numbers, counted_tokens(numbers.shape[2])))
        return total

    def _text(self, key: str) -> EncodedText:
        if key not in self.texts:
            raise StoreError(
                f"text {short_key(key)} is none of the {len(self.texts)} that teacher {self.teacher} reads in this run"
            )
        return self.texts[key]
