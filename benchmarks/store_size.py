"""What does a store in fewer bits save, and what does a projector fitted on it lose? On real KV.

    python benchmarks/store_size.py recipes/fit.yaml --set data.train=FOLDER

Bytes: the teacher's KV over some held-out texts, written by the store's own writer in every dtype. Loss: least squares
from one mapped layer to another, fitted on training texts that went through each dtype, both models', and compared with
the exact (float16) KV of the held-out texts; what the projector reads of them went through the dtype as well. Training
and held-out text each have scales of their own, as two stores have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from torch import Tensor

from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import FitData, PairDataset, prepare_fit
from kvgraft.fit.measure import Fit, measure_fits
from kvgraft.fit.run import build_projector
from kvgraft.kv import KV
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.store.few_bits import FEW_BITS_DTYPES, FewBitsQuantizer, calibrate, calibration_tokens
from kvgraft.store.format import QUANTIZER_NAME
from kvgraft.store.reader import KVStore, StoredSample
from kvgraft.store.writer import KVStoreWriter

# The first tokens of a text are attention sinks; a store leaves them out of its scales likewise.
_SINK_TOKENS = 2


@dataclass(frozen=True)
class CodedStore(KVStore):
    """A store whose samples go through a quantizer each time they are read."""

    dtype: str = "int8"
    coded_layers: tuple[int, ...] = ()

    def read(self, key: str, layers: Sequence[int] | None = None, *, as_stored: bool = False) -> StoredSample:
        sample = super().read(key, layers)
        coded = _CODERS[self.folder, self.dtype, self.coded_layers]
        numbers = coded.decode(coded.encode(_packed(sample.kv)))
        keys, values = numbers.transpose(0, 1)[:, None]
        return replace(sample, kv=sample.kv.unflatten(keys, values, sample.kv.geometry))


_CODERS: dict[tuple[Path, str, tuple[int, ...]], FewBitsQuantizer] = {}


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft fit`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    texts: Annotated[int, typer.Option(help="Training texts to fit on.")] = 110,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Measure this one; default all.")] = None,
) -> None:
    """Print the table in Markdown."""
    typer.echo(measure(recipe, overrides or [], texts, dtypes or FEW_BITS_DTYPES)["table"])


def measure(
    recipe: Path, overrides: Sequence[str], texts: int = 110, dtypes: Sequence[str] = FEW_BITS_DTYPES
) -> dict[str, object]:
    """Ratios to float16 by dtype, and ``table``."""
    loaded = load_recipe(recipe, overrides)
    data = prepare_fit(loaded)
    lines = [
        f"{data.teacher.recipe.name} and {loaded.student.model}, {loaded.fit.direction}, {texts} training texts, "
        f"{len(data.held_out)} held out\n",
        "| dtype | bytes a token over float16 | once for a store | R2 of keys, values | lost |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    half, _ = written_bytes(data.held_out.teacher.store, "float16")
    exact = fit_through(loaded, data, None, texts)
    result: dict[str, object] = {}
    for dtype in (None, *dtypes):
        fit = exact if dtype is None else fit_through(loaded, data, dtype, texts)
        shards, once = (half, 0) if dtype is None else written_bytes(data.held_out.teacher.store, dtype)
        found, best = ((mean(one.keys_r2), mean(one.values_r2)) for one in (fit, exact))
        lost = [after - before for before, after in zip(found, best, strict=True)]
        lines.append(
            f"| {dtype or 'float16'} | {shards / half:.3f} | {once / 1e6:.1f} MB | {found[0]:.4f}, {found[1]:.4f} "
            f"| {lost[0]:.4f}, {lost[1]:.4f} |"
        )
        result[dtype or "float16"] = {"bytes": shards / half, "once_bytes": once, "r2_lost": lost}
    return {**result, "table": "\n".join(lines)}


def written_bytes(store: KVStore, dtype: str, texts: int = 20) -> tuple[int, int]:
    """Bytes of the shards of some texts of ``store`` written again in ``dtype``, and of its quantizer."""
    with tempfile.TemporaryDirectory() as folder:
        identity = replace(store.identity, dtype=dtype)
        with KVStoreWriter(Path(folder), identity, 1 << 26) as writer:
            for key in store.keys()[:texts]:
                sample = store.read(key)
                counted = torch.arange(len(sample.spans)) >= _SINK_TOKENS
                writer.add(key, sample.kv, sample.spans, sample.truncated_bytes, sample.text_bytes, counted)
            writer.finish()
        once = Path(folder) / QUANTIZER_NAME
        shards = sum(shard.bytes for shard in KVStore.open(Path(folder), verify=False).manifest.shards.values())
        return shards, once.stat().st_size if once.is_file() else 0


def fit_through(recipe: Recipe, data: FitData, dtype: str | None, texts: int) -> Fit:
    """Least squares on training texts that went through ``dtype``, on held-out texts whose source did."""
    middle = [data.layer_map[len(data.layer_map) // 4], data.layer_map[3 * len(data.layer_map) // 4]]
    students, teachers = zip(*middle, strict=True)
    train, exact = (
        pairs.reading(teacher_layers=teachers, student_layers=students) for pairs in (data.train, data.held_out)
    )
    train, held_out = train.subset(range(min(texts, len(train)))), exact
    if dtype is not None:
        train, held_out = (_coded(pairs, dtype, teachers, students) for pairs in (train, exact))
        if recipe.fit.direction == "teacher_to_student":
            held_out = replace(held_out, student_store=exact.student_store)
        else:
            held_out = replace(held_out, teacher=exact.teacher)
    chosen = replace(data, train=train, layer_map=[(index, index) for index in range(len(middle))])
    projector = build_projector(recipe, chosen, [[index] for index in range(len(middle))], "linear")
    fit_closed_form(projector, data.teacher.recipe.name, train)
    return measure_fits({"fit": projector}, data.teacher.recipe.name, held_out)["fit"]


def _coded(pairs: PairDataset, dtype: str, teachers: Sequence[int], students: Sequence[int]) -> PairDataset:
    teacher = replace(pairs.teacher, store=_coded_store(pairs.teacher.store, dtype, teachers))
    return replace(pairs, teacher=teacher, student_store=_coded_store(pairs.student_store, dtype, students))


def _coded_store(store: KVStore, dtype: str, layers: Sequence[int]) -> CodedStore:
    chosen: list[Tensor] = []
    for key in store.keys():  # noqa: SIM118 - a store is not a mapping
        chosen.append(_packed(store.read(key, layers).kv)[:, :, _SINK_TOKENS:])
        if sum(tokens.shape[2] for tokens in chosen) >= calibration_tokens(dtype):
            break
    _CODERS[store.folder, dtype, tuple(layers)] = calibrate(dtype, torch.cat(chosen, 2), store.identity.head_dim)
    return CodedStore(store.folder, store.manifest, dtype=dtype, coded_layers=tuple(layers))


def _packed(kv: KV) -> Tensor:
    keys, values = kv.flatten()
    return torch.stack([keys[0], values[0]], dim=1)


if __name__ == "__main__":
    typer.run(main)
