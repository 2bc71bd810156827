"""``kvgraft migrate``: a checkpoint of the old linear projector becomes the folder of an Elastic Bottleneck."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from kvgraft.errors import ProjectorError
from kvgraft.models.known import known_models
from kvgraft.projector.migrate import LinearMaps, migrate_linear_checkpoint, plain_name, read_linear_maps
from kvgraft.projector.projector import KVDimensionProjector

_PROBE_TOKENS = 64


class MigratedTeacher(BaseModel):
    """One teacher of the new projector; ``width`` is that of its KV."""

    name: str
    width: int
    num_layers: int


class Migration(BaseModel):
    """What :func:`migrate_checkpoint` did. ``largest_difference`` is between old and new output at step 0."""

    teachers: list[MigratedTeacher]
    student_width: int
    old_parameters: int
    new_parameters: int
    largest_difference: float


def migrate_checkpoint(
    old: Path,
    new: Path,
    *,
    teachers: Sequence[str] = (),
    num_layers: int | None = None,
    mlp_ratio: float | Literal["auto"] = 1.0,
    dropout: float = 0.1,
    per_layer: bool = False,
) -> Migration:
    """Write a projector into ``new`` that gives what the old linear maps gave, and can learn more.

    Widths come from the checkpoint. It does not say how many layers a teacher's KV has: that is taken from
    ``teachers``, else ``num_layers``, else from the models that kvgraft knows by name.

    Args:
        old: see :func:`kvgraft.projector.migrate.migrate_linear_checkpoint`.
        new: folder to create; :meth:`KVDimensionProjector.from_pretrained` reads it.
        teachers: ``NAME=LAYERS`` each; the name replaces that of the checkpoint, which may have lost its dots.
        num_layers: of every teacher that ``teachers`` leaves out.
        mlp_ratio, dropout, per_layer: of the new bottleneck.

    Raises:
        ProjectorError: ``new`` exists, ``old`` cannot be read, or a teacher or its layers are unknown.
    """
    if new.exists():
        raise ProjectorError(f"{new} exists already and is left as it is; name a folder that does not exist yet")
    maps = read_linear_maps(old)
    layers = teacher_layers(list(maps), teachers, num_layers)
    maps = {name: maps[found] for name, (found, _) in layers.items()}
    configs = {
        name: {"d_model": maps[name]["key"][0].shape[1], "num_layers": count} for name, (_, count) in layers.items()
    }
    projector = migrate_linear_checkpoint(maps, configs, mlp_ratio=mlp_ratio, dropout=dropout, per_layer=per_layer)
    _save_whole(projector, new)
    return Migration(
        teachers=[
            MigratedTeacher(name=name, width=teacher.width, num_layers=teacher.num_layers)
            for name, teacher in projector.teachers.items()
        ],
        student_width=projector.student_d_model,
        old_parameters=sum(tensor.numel() for tensors in _tensors(maps) for tensor in tensors),
        new_parameters=projector.count_parameters(),
        largest_difference=largest_difference(projector, maps),
    )


def teacher_layers(
    found: Sequence[str], teachers: Sequence[str] = (), num_layers: int | None = None
) -> dict[str, tuple[str, int]]:
    """``{name: (name in the checkpoint, layers)}`` for every teacher ``found`` in a checkpoint.

    Args:
        teachers, num_layers: see :func:`migrate_checkpoint`.

    Raises:
        ProjectorError: a ``NAME=LAYERS`` in another form or for no teacher of the checkpoint, or unknown layers.
    """
    pairs = [_name_and_layers(text) for text in teachers]
    given = dict(pairs)
    source = {name: _old_name(name, found) for name in given}
    named = {old_name: name for name, old_name in source.items()}
    if len(given) != len(pairs) or len(named) != len(given):
        raise ProjectorError(
            f"several of {', '.join(teachers)} stand for one teacher of the old checkpoint, which has "
            f"{', '.join(found)}; name each once"
        )
    known = {plain_name(name): model.num_hidden_layers for name, model in known_models().items()}
    layers: dict[str, tuple[str, int]] = {}
    for old_name in found:
        name = named.get(old_name, old_name)
        count = given.get(name, known.get(plain_name(old_name)) if num_layers is None else num_layers)
        if count is None:
            raise ProjectorError(
                f"the old checkpoint does not say how many layers the KV of teacher {old_name!r} has; add --teacher "
                f"'{old_name}=LAYERS' (num_hidden_layers in the teacher's config.json), or --num-layers for all"
            )
        layers[name] = (old_name, count)
    return layers


@torch.no_grad()
def largest_difference(projector: KVDimensionProjector, maps: LinearMaps) -> float:
    """Between the outputs of ``projector`` and of the linear maps it came from, on normal random input."""
    projector.eval()
    generator = torch.Generator().manual_seed(0)
    differences = []
    for name, teacher in projector.teachers.items():
        x = torch.randn(1, teacher.num_layers, _PROBE_TOKENS, teacher.width, generator=generator)
        for kind, given in zip(("key", "value"), projector.project_teacher_kv(name, x, x), strict=True):
            weight, bias = maps[name][kind]
            expected = functional.linear(x, weight.float(), None if bias is None else bias.float())
            differences.append((given - expected).abs().max().item())
    return max(differences)


def _name_and_layers(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not count.isdecimal() or int(count) < 1:
        raise ProjectorError(f"a teacher must be given as NAME=LAYERS, such as Qwen2-7B=28; got {text!r}")
    return name, int(count)


def _old_name(name: str, found: Sequence[str]) -> str:
    """The teacher of an old checkpoint that ``name`` stands for: that very one, or the one that lost its dots."""
    alike = [name] if name in found else [old for old in found if plain_name(old) == plain_name(name)]
    if len(alike) != 1:
        reason = f"has no teacher {name}" if not alike else f"has {', '.join(alike)}, and {name} may be any of them"
        raise ProjectorError(
            f"the old checkpoint {reason}; it has {', '.join(found)}; give one of those as NAME=LAYERS"
        )
    return alike[0]


def _tensors(maps: Mapping[str, Mapping[str, tuple[Tensor, Tensor | None]]]) -> list[list[Tensor]]:
    return [[tensor for tensor in linear if tensor is not None] for kinds in maps.values() for linear in kinds.values()]


def _save_whole(projector: KVDimensionProjector, folder: Path) -> None:
    """Save beside ``folder`` and rename, so that a save that is cut short leaves nothing that looks like one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".migrating-", dir=folder.parent))
    try:
        projector.save_pretrained(unfinished / "projector")
        (unfinished / "projector").rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
