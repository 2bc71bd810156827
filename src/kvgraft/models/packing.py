"""Short texts one behind the other in one row, each read as if it stood alone.

transformers tells texts apart by their positions, which start again with each, where it gets no attention mask: its
``sdpa`` and ``eager`` masks become block-diagonal. Only the student's pass runs on rows; what comes out of it goes back
to one row for each text, so that no loss has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.batching import IGNORED
from kvgraft.errors import ModelError
from kvgraft.kv import KV
from kvgraft.models.decoder import decoder_of
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.head import record_hidden

FILL = -1

# Tokens of the texts in each row of the check. How far a text may be from what it is beside another neighbour: the same
# shapes are computed, so that it should not differ at all; and from what it is alone, where only rounding differs.
_PROBE_ROWS, _PROBE_LEAK = ((5, 8), (9,)), 1e-5
_PROBE_TOLERANCE, _PROBE_TOLERANCE_OF_LOW_PRECISION = 1e-3, 5e-2


def packed_positions(rows: Sequence[Sequence[int]]) -> Tensor:
    """Where each token stands in its text: ``[rows, longest row]`` int64, ``FILL`` behind the last text of a row.

    ``rows`` holds the number of tokens of every text, row by row.
    """
    counted = [torch.cat([torch.arange(tokens) for tokens in row]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(counted, batch_first=True, padding_value=FILL)


@dataclass(frozen=True)
class Packing:
    """The places that the texts of a padded batch take in rows.

    Attributes:
        positions: as :func:`packed_positions` gives it; the texts stand in the order of the batch.
        mask: ``[texts, tokens]``, true where a token of the padded batch is real.
    """

    positions: Tensor
    mask: Tensor

    @property
    def real(self) -> Tensor:
        """``[rows, row tokens]``, true where a text stands."""
        return self.positions != FILL

    @property
    def position_ids(self) -> Tensor:
        """What the model is given, ``[rows, row tokens]``: each token that fills up counts as a text of its own."""
        return self.positions.clamp_min(0)

    def inputs(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Arguments of the model, from those of the padded batch. No text predicts the first token of the next."""
        packed_labels = self.pack(labels, IGNORED).masked_fill(self.positions == 0, IGNORED)
        return {"input_ids": self.pack(input_ids, 0), "position_ids": self.position_ids, "labels": packed_labels}

    def pack(self, padded: Tensor, fill: int) -> Tensor:
        """``[rows, row tokens]`` of ``padded [texts, tokens]``."""
        packed = padded.new_full(self.positions.shape, fill)
        packed[self.real] = padded[self.mask]
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """``[texts, tokens, ...]`` of ``packed [rows, row tokens, ...]``; arbitrary where the mask is false."""
        return packed.flatten(0, 1)[self._places()]

    def unpack_kv(self, packed: KV) -> KV:
        """KV of the rows as KV of the texts; arbitrary where the mask is false."""
        keys, values = (self.unpack(part.movedim(3, 1)).movedim(1, 3) for part in (packed.keys, packed.values))
        return replace(packed, keys=keys, values=values, positions=self.unpack(packed.positions), mask=self.mask)

    def _places(self) -> Tensor:
        """``[texts, tokens]``: the token of the flattened rows where each of the padded batch stands; 0 for none."""
        places = torch.zeros_like(self.mask, dtype=torch.long)
        places[self.mask] = self.real.flatten().nonzero()[:, 0]
        return places


@torch.no_grad()
def require_exact_packing(model: PreTrainedModel) -> None:
    """Refuse a model that reads a text otherwise where others stand in its row.

    Raises:
        ModelError: it lets a text see its neighbours, or counts positions on from them.
    """
    with evaluation_mode(model):
        packing, input_ids = _probe(model)
        together = packing.unpack(_hidden(model, packing, input_ids))
        neighbour = input_ids.clone()
        neighbour[0] = (neighbour[0] + 1) % model.get_input_embeddings().num_embeddings
        beside_another = packing.unpack(_hidden(model, packing, neighbour))
        alone = torch.zeros_like(together)
        for text, tokens in enumerate(packing.mask.sum(1).tolist()):
            positions = torch.arange(tokens, device=model.device)[None]
            one = Packing(positions, torch.ones_like(positions, dtype=torch.bool))
            alone[text, :tokens] = _hidden(model, one, input_ids[text : text + 1, :tokens])[0]
    second = packing.mask[1]
    leaked = _difference(beside_another[1][second], together[1][second])
    error = _difference(together[packing.mask], alone[packing.mask])
    tolerance = _PROBE_TOLERANCE if together.dtype == torch.float32 else _PROBE_TOLERANCE_OF_LOW_PRECISION
    if not (leaked < _PROBE_LEAK and error < tolerance):
        raise ModelError(
            f"{type(model).__name__} cannot be trained with training.batching: packed: it reads a text otherwise where "
            f"another stands before it in the row (relative difference {max(leaked, error):.1e}). Use "
            "training.batching: buckets, which needs nothing of the model and pads almost as little"
        )


def _probe(model: PreTrainedModel) -> tuple[Packing, Tensor]:
    """Texts in rows, and their token ids ``[texts, tokens]``, padded."""
    lengths = torch.tensor([tokens for row in _PROBE_ROWS for tokens in row], device=model.device)
    columns = torch.arange(int(lengths.max()), device=model.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = (columns + 11 * lengths[:, None]) * 37 % vocabulary
    return Packing(packed_positions(_PROBE_ROWS).to(model.device), columns < lengths[:, None]), input_ids


def _hidden(model: PreTrainedModel, packing: Packing, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[rows, row tokens, hidden_size]``."""
    with record_hidden(model) as recorded:
        decoder_of(model)(input_ids=packing.pack(input_ids, 0), position_ids=packing.position_ids, use_cache=False)
    return recorded.states


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))
