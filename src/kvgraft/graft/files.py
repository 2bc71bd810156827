"""Grafted KV on disk: one safetensors file with what made it, for the student it was made for.

Keys are kept before rotation and tokens of every layer in full, so that a file can stand behind another one, serve as
the student's own first tokens, and be loaded under any later transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kvgraft.errors import GraftError
from kvgraft.graft.cache import TokenIds, cache_from_kv
from kvgraft.graft.pieces import text_lengths
from kvgraft.kv import KV
from kvgraft.models.cache import GraftedCache
from kvgraft.models.identity import weights_fingerprint

FORMAT_VERSION = 1

_METADATA = "kvgraft"
_TENSORS = ("keys", "values", "positions", "mask")


@dataclass(frozen=True)
class GraftOrigin:
    """What a file of grafted KV was made of.

    Attributes:
        student: class of the student.
        student_fingerprint: :func:`kvgraft.models.identity.weights_fingerprint` of the student.
        teacher: name of the teacher; empty for the student's own KV.
        projector: name or folder of the projector; empty for the student's own KV.
        text_sha256: ``sample_key`` of each row's text.
        kvgraft: version that wrote the file.
    """

    student: str
    student_fingerprint: str
    teacher: str
    projector: str
    text_sha256: tuple[str, ...]
    kvgraft: str


@dataclass(frozen=True)
class SavedGraft:
    """KV of the student's geometry, keys before rotation, with the ids of its texts and where it came from."""

    kv: KV
    token_ids: list[list[int]] | None
    origin: GraftOrigin

    def cache(self, student: PreTrainedModel) -> GraftedCache:
        """The cache that ``student`` goes on from; see :func:`kvgraft.graft.cache_from_kv`."""
        return cache_from_kv(student, self.kv, token_ids=self.token_ids)


def save_graft(
    path: str | Path,
    kv: KV,
    student: PreTrainedModel,
    *,
    text_sha256: Sequence[str],
    teacher: str = "",
    projector: str = "",
    token_ids: TokenIds | None = None,
) -> GraftOrigin:
    """Write ``kv`` to ``path``, replaced whole; load it with :func:`load_graft`.

    Args:
        path: a ``.safetensors`` file.
        kv: of the student's geometry, all layers, keys before rotation; :func:`kvgraft.graft.project` gives it.
        student: the model that the KV was made for.
        text_sha256: ``sample_key`` of each row's text.
        teacher, projector, token_ids: kept with it; the ids must be of the texts' lengths.

    Raises:
        GraftError: rotated keys, or texts or ids that do not go with the rows.
    """
    if kv.rotated:
        raise GraftError(f"the keys for {path} are rotated; capture with rotated=False")
    lengths = text_lengths(kv).tolist()
    given = lengths if token_ids is None else [len(ids) for ids in token_ids]
    if len(text_sha256) != len(lengths) or given != lengths:
        raise GraftError(
            f"the KV for {path} is of {len(lengths)} texts of {lengths} tokens; got {len(text_sha256)} hashes and "
            f"ids of {given} tokens"
        )
    origin = GraftOrigin(
        type(student).__name__, weights_fingerprint(student), teacher, projector, tuple(text_sha256), version("kvgraft")
    )
    content = {
        "format_version": FORMAT_VERSION,
        "origin": asdict(origin),
        "token_ids": None if token_ids is None else [list(map(int, ids)) for ids in token_ids],
    }
    tensors = {name: getattr(kv, name).detach().cpu().contiguous() for name in _TENSORS}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(content)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return origin


def load_graft(
    path: str | Path, student: PreTrainedModel, *, expected_sha256: Sequence[str] | None = None
) -> SavedGraft:
    """What :func:`save_graft` wrote, on the CPU.

    Args:
        path: the file.
        student: the model that is to go on from it.
        expected_sha256: ``sample_key`` of the texts that the file must be of; default whatever it holds.

    Raises:
        GraftError: no such file, a damaged one, another student's, or one of other texts.
    """
    content, tensors = _read(Path(path))
    origin = GraftOrigin(**{**content["origin"], "text_sha256": tuple(content["origin"]["text_sha256"])})
    fingerprint = weights_fingerprint(student)
    if origin.student_fingerprint != fingerprint:
        raise GraftError(
            f"{path} was made for another student: {origin.student} with weights {origin.student_fingerprint[:12]}, "
            f"and this is {type(student).__name__} with weights {fingerprint[:12]}. Make the cache again for this one; "
            "a student that was trained since is another one"
        )
    if expected_sha256 is not None and tuple(expected_sha256) != origin.text_sha256:
        held, wanted = ([key[:12] for key in keys] for keys in (origin.text_sha256, expected_sha256))
        raise GraftError(f"{path} is of other texts: it holds sha256 {held}, expected {wanted}; make the cache again")
    kv = KV(**tensors, layers=tuple(range(tensors["keys"].shape[1])))
    return SavedGraft(kv, content["token_ids"], origin)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise GraftError(f"no file {path}; give one that save_graft wrote")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            found = content.get("format_version")
            if found == FORMAT_VERSION:
                # Copies: numbers handed out must not change or vanish with the file that they are mapped from.
                return content, {name: file.get_tensor(name).clone() for name in _TENSORS}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise GraftError(f"{path} is damaged or not a file of grafted KV ({error}); make the cache again") from error
    raise GraftError(
        f"{path} has format version {found}; this kvgraft reads {FORMAT_VERSION}. Give a file that save_graft "
        "wrote, or make the cache again"
    )
