"""What a student goes on from: a teacher's projected KV in place of its own, beside it, or mixed into it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvgraft.errors import GraftError
from kvgraft.fit.data import KVPair
from kvgraft.fit.measure import project_pair
from kvgraft.graft.pieces import concatenate, first_tokens, in_order, side_by_side, with_own_tokens
from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector

Fusion = Literal["none", "gated", "both", "joint"]

SETTINGS_FILE = "grafter.json"
_GATES_START: dict[Fusion, float] = {"gated": 0.0, "joint": 1.0}
_PROJECTOR_FOLDER, _GATES_FILE = "projector", "gates.safetensors"


class Grafter(nn.Module):
    """From a text that a teacher has read, the KV that the student goes on from.

    ``fusion`` says what becomes of the student's own KV of the text:

    - ``none``: the projected KV stands in its place, but for the first tokens and those that the teacher has none for.
    - ``gated``: own KV, moved towards the projected by a gate for each layer and head, of keys and of values. All gates
      start closed, and where a gate is closed the own KV stays as it is, bit by bit, in training and afterwards.
    - ``joint``: own KV, changed by adapters that read both models' (:func:`kvgraft.graft.pieces.side_by_side`), through
      such gates. They start open and their adapters at no change; a gate at zero is as exact.
    - ``both``: the projected KV as a text of its own in front of the student's.

    Args:
        projector: from ``teacher`` to the student.
        teacher: its name in the projector.
        num_kv_heads: of the student.
        own_first_tokens: of every text that stay the student's own (attention sinks), default 4.
        fusion: default ``none``.
    """

    def __init__(
        self,
        projector: KVDimensionProjector,
        teacher: str,
        num_kv_heads: int,
        own_first_tokens: int = 4,
        fusion: Fusion = "none",
    ) -> None:
        super().__init__()
        self.projector, self.teacher, self.own_first_tokens = projector, teacher, own_first_tokens
        self.fusion: Fusion = fusion
        self.num_kv_heads = num_kv_heads
        shape = (2, projector.num_output_layers(teacher), num_kv_heads)
        start = _GATES_START.get(fusion)
        self.gates = None if start is None else nn.Parameter(torch.full(shape, start))

    def forward(self, text: KVPair, read: KVPair | None = None) -> KV:
        """KV in the student's geometry, slots in order, keys before rotation.

        Args:
            text: what the student goes on from, with its own KV of it as target.
            read: what the teacher has read; default ``text``. Another text is the control.
        """
        device = next(self.parameters()).device
        text, read = text.to(device), (text if read is None else read).to(device)
        if self.fusion == "joint":
            return in_order(self._changed(text.target, read))
        projected = project_pair(self.projector, self.teacher, read)
        if self.fusion == "gated":
            return in_order(self._mixed(text.target, first_tokens(projected, text.target.mask.shape[1])))
        own_tokens = min(self.own_first_tokens, read.target.mask.shape[1])
        grafted = in_order(with_own_tokens(projected, read.target, own_tokens))
        return grafted if self.fusion == "none" else in_order(concatenate([grafted, text.target]))

    def _mixed(self, own: KV, projected: KV) -> KV:
        return self._moved(own, projected.keys - own.keys, projected.values - own.values, projected.mask)

    def _changed(self, own: KV, read: KVPair) -> KV:
        source = first_tokens(replace(read.source, mask=read.mask), own.mask.shape[1])
        keys, values = self.projector.project_teacher_kv(self.teacher, side_by_side(own, source))
        change = own.unflatten(keys, values, own.geometry)
        return self._moved(own, change.keys, change.values, source.mask)

    def _moved(self, own: KV, keys: Tensor, values: Tensor, mask: Tensor) -> KV:
        """``own``, moved by keys and values as far as the gates let it; not where ``mask`` is false nor at first."""
        assert self.gates is not None
        given = mask & (own.positions >= self.own_first_tokens)
        # Adding zero times a finite number changes nothing: a closed gate is exact and still has a gradient.
        keys_gate, values_gate = self.gates.tanh()[:, None, :, :, None, None] * given[:, None, None, :, None]
        return replace(own, keys=own.keys + keys_gate * keys, values=own.values + values_gate * values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the projector, the settings and, where there are any, the gates into ``folder``."""
        folder = Path(folder)
        self.projector.save_pretrained(folder / _PROJECTOR_FOLDER)
        if self.gates is not None:
            save_file({"gates": self.gates.detach().cpu().contiguous()}, folder / _GATES_FILE)
        settings = {
            "teacher": self.teacher,
            "num_kv_heads": self.num_kv_heads,
            "own_first_tokens": self.own_first_tokens,
            "fusion": self.fusion,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Grafter:
        """What :meth:`save_pretrained` wrote, with dropout off.

        Raises:
            GraftError: a file is missing or is not a grafter's.
            ProjectorError: the projector in it is damaged.
        """
        folder = Path(folder)
        projector = KVDimensionProjector.from_pretrained(folder / _PROJECTOR_FOLDER)
        try:
            settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            grafter = cls(projector, **settings)
            if grafter.gates is not None:
                grafter.load_state_dict(load_file(folder / _GATES_FILE), strict=False)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise GraftError(f"{folder} holds no grafter that can be read: {error}") from error
        return grafter.eval()
