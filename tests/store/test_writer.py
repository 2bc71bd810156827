"""Writing: what is refused, what survives a kill, a full disk and a damaged shard."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvgraft.data.spans import sample_key
from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.store import shard_queue
from kvgraft.store.atomic_file import AtomicFile
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.moments import Moments
from kvgraft.store.reader import KVStore
from kvgraft.store.shard import GrowingShard, PendingSample
from kvgraft.store.writer import KVStoreWriter

TEXTS = [f"text number {index}" for index in range(7)]
KEYS = [sample_key(text) for text in TEXTS]
SHARD_BYTES = 1500  # Three samples a shard: 192 bytes a token, 3 to 5 tokens a sample.

IDENTITY = StoreIdentity(
    model="teacher-a",
    tokenizer="tokenizer-a",
    text=text_fingerprint(KEYS),
    layers=(1, 4, 5),
    num_kv_heads=2,
    head_dim=4,
    dtype="float32",
    max_length=16,
)


def make_kv(index: int, tokens: int | None = None) -> KV:
    generator = torch.Generator().manual_seed(index)
    tokens = tokens or 3 + index % 3
    keys, values = torch.randn(2, 1, 3, 2, tokens, 4, generator=generator)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return KV(keys + 3.0, values, torch.arange(tokens)[None], mask, IDENTITY.layers)


def make_spans(index: int) -> np.ndarray:
    tokens = make_kv(index).mask.shape[1]
    return np.stack([np.arange(tokens), np.arange(tokens) + 1 + index], axis=1).astype(np.int32)


def add(writer: KVStoreWriter, index: int, kv: KV | None = None) -> None:
    writer.add(KEYS[index], kv or make_kv(index), make_spans(index), index, len(TEXTS[index]))


def fill(folder: Path, order: list[int], identity: StoreIdentity = IDENTITY) -> KVStore:
    with KVStoreWriter(folder, identity, SHARD_BYTES) as writer:
        for index in order:
            add(writer, index)
        writer.finish()
    return KVStore.open(folder, identity)


def assert_same_content(store: KVStore, reference: KVStore) -> None:
    assert sorted(store.keys()) == sorted(reference.keys())
    for key in reference.manifest.samples:
        one, other = store.read(key), reference.read(key)
        assert torch.equal(one.kv.keys, other.kv.keys)
        assert torch.equal(one.kv.values, other.kv.values)
        np.testing.assert_array_equal(one.spans, other.spans)
        assert (one.text_bytes, one.truncated_bytes) == (other.text_bytes, other.truncated_bytes)
    one, other = store.statistics(), reference.statistics()
    assert one.count == other.count
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-6, atol=1e-7)


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_order_of_adding_makes_no_difference(tmp_path: Path) -> None:
    forward = fill(tmp_path / "forward", list(range(7)))
    backward = fill(tmp_path / "backward", [6, 2, 4, 0, 5, 1, 3])
    assert len(shard_names(tmp_path / "forward")) > 2
    assert_same_content(backward, forward)


def test_missing_keeps_the_order_and_adding_twice_changes_nothing(tmp_path: Path) -> None:
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        add(writer, 2)
        add(writer, 2, make_kv(5))
        assert writer.missing([KEYS[3], KEYS[2], KEYS[0], KEYS[3]]) == [KEYS[3], KEYS[0]]
        writer.finish()
        add(writer, 2, make_kv(5))
        writer.finish()
    store = KVStore.open(tmp_path)
    assert len(store) == 1
    assert torch.equal(store.read(KEYS[2]).kv.keys, make_kv(2).keys)


KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
from kvgraft.store.format import read_manifest
from kvgraft.store.writer import KVStoreWriter
from tests.store import test_writer as t

folder, adds, in_write = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "in_write"
fsync = os.fsync


def kill_in_second_shard(descriptor):
    # The thread that writes may still be with the folder of the first.
    if "kv-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)


with KVStoreWriter(folder, t.IDENTITY, t.SHARD_BYTES) as writer:
    for index in range(7):
        if index == adds:
            while not read_manifest(folder).samples:
                time.sleep(0.01)
            if not in_write:
                os.kill(os.getpid(), signal.SIGKILL)
            os.fsync = kill_in_second_shard
        t.add(writer, index)
"""


@pytest.mark.parametrize("moment", ["between", "in_write"])
def test_a_killed_run_continues_from_its_whole_shards(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "killed"
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), str(root)])
    run = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder), "5", moment],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert any(path.name.startswith("kv-00001.safetensors.") for path in folder.glob("*.tmp"))
    with pytest.raises(StoreError, match=r"incomplete: 3 samples .* cache command"):
        KVStore.open(folder)

    with KVStoreWriter(folder, IDENTITY, SHARD_BYTES) as writer:
        assert not list(folder.glob("*.tmp"))
        assert writer.missing(KEYS) == KEYS[3:]
        for index in (3, 4, 5, 6):
            add(writer, index)
        writer.finish()
    assert_same_content(KVStore.open(folder, IDENTITY), fill(tmp_path / "whole", list(range(7))))


def test_a_shard_that_no_manifest_names_is_removed(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1, 2])
    known = shard_names(tmp_path)
    (tmp_path / "kv-00009.safetensors").write_bytes(b"renamed, then killed before the manifest")
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES):
        assert shard_names(tmp_path) == known


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, code = os.fsync, errno.EINVAL

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert len(fill(tmp_path / "store", [0, 1])) == 2
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fill(tmp_path / "other", [0, 1])


def test_a_full_disk_leaves_whole_shards_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync
    full = [True]

    def fsync(descriptor: int) -> None:
        # Not a matter of when: a thread writes.
        if full and "kv-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with (  # noqa: PT012 - the block is what a run does
        pytest.raises(StoreError, match=r"disk is full.* needs \d+ bytes and \d+ are free.*stay usable") as caught,
        KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer,
    ):
        for index in range(6):
            add(writer, index)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.glob("*.tmp"))

    full.clear()
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        assert writer.missing(KEYS[:6]) == KEYS[3:6]
        for index in (3, 4, 5):
            add(writer, index)
        writer.finish()
    assert_same_content(KVStore.open(tmp_path), fill(tmp_path / "whole", list(range(6))))


def test_an_error_saves_what_is_whole_and_stays_the_error_that_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (  # noqa: PT012 - the block is what a run does
        pytest.raises(RuntimeError, match="teacher failed"),
        KVStoreWriter(tmp_path, IDENTITY, 10**6) as writer,
    ):
        add(writer, 0)
        raise RuntimeError("teacher failed")
    with KVStoreWriter(tmp_path, IDENTITY, 10**6) as writer:
        assert writer.missing(KEYS[:2]) == [KEYS[1]]

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (  # noqa: PT012 - the block is what a run does
        caplog.at_level(logging.WARNING),
        pytest.raises(RuntimeError, match="teacher failed"),
        KVStoreWriter(tmp_path, IDENTITY, 10**6) as writer,
    ):
        add(writer, 1)
        monkeypatch.setattr(os, "fsync", fsync)
        raise RuntimeError("teacher failed")
    assert "disk is full" in caplog.text


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_only_the_samples_of_a_damaged_shard_are_redone(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = fill(tmp_path, list(range(7)))
    name = shard_names(tmp_path)[1]
    lost = [key for key in KEYS if store.manifest.samples[key].shard == name]
    assert 0 < len(lost) < 7
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if harm == "flip":
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-8])
    else:
        path.unlink()

    with pytest.raises(StoreError, match=rf"{name}.*Delete {name}.*{len(lost)} samples"):
        KVStore.open(tmp_path)
    with caplog.at_level(logging.WARNING), KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        assert name in caplog.text
        assert writer.missing(KEYS) == lost
        for key in lost:
            add(writer, KEYS.index(key))
        writer.finish()
    assert_same_content(KVStore.open(tmp_path), fill(tmp_path / "whole", list(range(7))))


def test_a_second_writer_is_refused_while_the_first_is_open(tmp_path: Path) -> None:
    with (
        KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES),
        pytest.raises(StoreError, match=rf"process {os.getpid()} is writing .*Wait"),
    ):
        KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES)
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        add(writer, 0)
    with pytest.raises(StoreError, match="closed"):
        add(writer, 1)


def test_another_identity_is_refused_and_gives_the_lock_back(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    with pytest.raises(StoreError, match="the teacher: the store holds teacher-a, this run needs teacher-b"):
        KVStoreWriter(tmp_path, replace(IDENTITY, model="teacher-b"), SHARD_BYTES)
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        assert writer.missing(KEYS[:1]) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: float, kind: str) -> None:
    kv = make_kv(0)
    getattr(kv, kind)[0, 1, 1, 2, 3] = number
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        with pytest.raises(
            StoreError, match=rf"sample {KEYS[0][:12]} has NaN or Inf in the {kind} of layer 4, token 2"
        ):
            add(writer, 0, kv)
        assert writer.missing(KEYS[:1]) == KEYS[:1]


def test_numbers_beyond_float16_are_refused_where_bfloat16_takes_them(tmp_path: Path) -> None:
    kv = make_kv(0)
    kv.keys[0, 2, 0, 1, 0] = 1e5
    half, brain = replace(IDENTITY, dtype="float16"), replace(IDENTITY, dtype="bfloat16")
    with (
        KVStoreWriter(tmp_path / "half", half, SHARD_BYTES) as writer,
        pytest.raises(StoreError, match=r"range of float16 in the keys of layer 5, token 1.*bfloat16 or float32"),
    ):
        add(writer, 0, kv)
    with KVStoreWriter(tmp_path / "brain", brain, SHARD_BYTES) as writer:
        add(writer, 0, kv)
        kv.keys[0, 2, 0, 1, 0] = torch.finfo(torch.float32).max
        with pytest.raises(StoreError, match=r"range of bfloat16.*to float32"):
            add(writer, 3, kv)
        writer.finish()
    assert KVStore.open(tmp_path / "brain").read(KEYS[0]).kv.keys[0, 2, 0, 1, 0] == torch.tensor(1e5).bfloat16().float()


def test_samples_that_do_not_fit_the_store_are_refused(tmp_path: Path) -> None:
    kv, spans = make_kv(0), make_spans(0)
    tokens = kv.mask.shape[1]
    two = KV(*(torch.cat([part, part]) for part in (kv.keys, kv.values, kv.positions, kv.mask)), kv.layers)
    narrow = replace(kv, keys=kv.keys[..., :2], values=kv.values[..., :2])
    half_masked = torch.arange(tokens)[None] < 2
    empty = KV(kv.keys[..., :0, :], kv.values[..., :0, :], kv.positions[:, :0], kv.mask[:, :0], kv.layers)
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        for bad, match in [
            (two, "got 2 texts"),
            (empty, "0 tokens"),
            (replace(kv, mask=half_masked), "padding: 1 of 3"),
            (replace(kv, layers=(1, 4, 6)), r"layers \[1, 4, 6\]; the store holds layers \[1, 4, 5\]"),
            (narrow, "head_dim=2.*head_dim=4"),
            (replace(kv, rotated=True), "rotated=True"),
        ]:
            with pytest.raises(StoreError, match=match):
                writer.add(KEYS[0], bad, spans, 0, 3)
        with pytest.raises(StoreError, match=r"spans .* must be \[3, 2\]"):
            writer.add(KEYS[0], kv, spans[:2], 0, 3)
        with pytest.raises(StoreError, match="float64"):
            writer.add(KEYS[0], kv, spans.astype(np.float64), 0, 3)
        with pytest.raises(StoreError, match="-1 cut off"):
            writer.add(KEYS[0], kv, spans, -1, 3)
        with pytest.raises(StoreError, match=r"counted .* must be \[3\] bool"):
            writer.add(KEYS[0], kv, spans, 0, 3, counted=torch.ones(3))
        assert writer.missing(KEYS[:1]) == KEYS[:1]


def test_a_slow_disk_holds_back_who_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts gather, one of them refused, while none can be written; then no more are taken until some are."""
    reference = fill(tmp_path / "reference", list(range(7)))
    disk_is_free, held_back = threading.Event(), threading.Event()
    write = GrowingShard.write
    written: list[str] = []

    def late(shard: GrowingShard, sample: PendingSample) -> None:
        assert disk_is_free.wait(10)
        write(shard, sample)
        written.append(sample.key)

    monkeypatch.setattr(GrowingShard, "write", late)
    with KVStoreWriter(tmp_path / "slow", IDENTITY, SHARD_BYTES) as writer:
        for index in range(3):
            add(writer, index)
        bad = make_kv(3)
        bad.keys[0, 0, 0, 0, 0] = torch.nan
        with pytest.raises(StoreError, match="NaN"):
            add(writer, 3, bad)
        assert writer.missing(KEYS) == KEYS[3:]
        assert not written

        def add_more() -> None:
            for index in range(3, 7):
                add(writer, index)
            held_back.set()

        adding = threading.Thread(target=add_more)
        adding.start()
        assert not held_back.wait(0.2)
        disk_is_free.set()
        adding.join(10)
        writer.finish()
    assert written == KEYS
    assert_same_content(KVStore.open(tmp_path / "slow"), reference)


def test_a_sample_that_cannot_be_written_costs_its_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample has a shard of its own here; those after the one that fails are written."""
    write = GrowingShard.write

    def full(shard: GrowingShard, sample: PendingSample) -> None:
        if sample.key == KEYS[4]:
            raise StoreError("the disk is full")
        write(shard, sample)

    monkeypatch.setattr(GrowingShard, "write", full)
    failed = 0
    with KVStoreWriter(tmp_path, IDENTITY, 1) as writer:
        for index in range(7):
            try:
                add(writer, index)
            except StoreError:
                failed += 1
                add(writer, index)
        missing = writer.missing(KEYS)
        while missing == []:
            with pytest.raises(StoreError, match="disk is full"):
                writer.finish()
            failed += 1
            missing = writer.missing(KEYS)
        writer.finish()
    assert failed == 1
    assert not list(tmp_path.glob("*.tmp"))
    assert sorted(KVStore.open(tmp_path, verify=True).keys()) == sorted(set(KEYS) - {KEYS[4]})


def test_the_disk_is_set_to_work_before_a_shard_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails there, fails the shard."""
    monkeypatch.setattr(shard_queue, "_SYNC_BYTES", 1)
    synced: list[int] = []
    monkeypatch.setattr(GrowingShard, "sync", lambda shard: synced.append(shard.tokens))
    fill(tmp_path / "whole", [0, 1])
    assert len(synced) == 2

    def broken(shard: GrowingShard) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(GrowingShard, "sync", broken)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "broken", [0, 1])
    assert not shard_names(tmp_path / "broken")
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_two_that_write_one_file_at_once_both_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    first, second = AtomicFile(path, 8), AtomicFile(path, 8)
    first.write(memoryview(b"12345678"))
    first.sync()
    second.write(memoryview(b"12"))
    first.commit()
    assert path.read_bytes() == b"12345678"
    second.write(memoryview(b"345678"))
    second.commit()
    assert path.read_bytes() == b"12345678"
    assert os.listdir(tmp_path) == ["layers.json"]


def test_a_core_is_left_to_the_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, of = [], Moments.of

    def spied(*arguments: Any) -> Moments:
        seen.append(torch.get_num_threads())
        return of(*arguments)

    monkeypatch.setattr(Moments, "of", spied)
    before = torch.get_num_threads()
    try:
        with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
            for index, threads in enumerate((1, 4)):
                torch.set_num_threads(threads)
                add(writer, index)
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


def test_numbers_of_a_sample_do_not_change_those_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), GrowingShard.write

    def slow(shard: GrowingShard, sample: PendingSample) -> None:
        go_on.wait(10)
        write(shard, sample)

    monkeypatch.setattr(GrowingShard, "write", slow)
    with KVStoreWriter(tmp_path, IDENTITY, 10**9) as writer:
        for index in (0, 1):
            add(writer, index)
        go_on.set()
        writer.adopt_shares()  # Waits for what is written.
        for index in (3, 4):
            add(writer, index)
        writer.finish()
    store = KVStore.open(tmp_path)
    for index in (0, 1, 3, 4):
        assert torch.equal(store.read(KEYS[index]).kv.keys, make_kv(index).keys)
