"""Two processes that fill one store: disjoint shares, one manifest, the content of one process, and a kill between."""

from pathlib import Path

import torch

from kvgraft.store.format import Manifest, read_manifest
from kvgraft.store.likelihoods import TokenLikelihoods
from kvgraft.store.logits import LogitManifest
from kvgraft.store.reader import KVStore
from kvgraft.store.shares import share_folder
from kvgraft.store.writer import KVStoreWriter
from tests.store.process import TORCHRUN, encoded, fill, logits_beside, run_in_two_processes
from tests.store.test_fill import identity

# Without --multi_gpu it starts one process where there is no accelerator; port 0 is any that is free.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


def fill_in_two_processes(folder: Path, launcher: list[str], *options: str) -> int:
    return run_in_two_processes(["tests.store.process", str(folder), *options], launcher)


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def require_same_content(folder: Path, other: Path) -> None:
    (store, report), (whole, _) = fill(folder), fill(other)
    assert report.tokens == 0
    KVStore.open(store.folder)
    assert set(store.keys()) == set(whole.keys())
    for key in whole.keys():  # noqa: SIM118 - a store is not a mapping
        one, expected = store.read(key), whole.read(key)
        assert torch.equal(one.kv.keys, expected.kv.keys)
        assert torch.equal(one.kv.values, expected.kv.values)
        assert (one.spans == expected.spans).all()
    assert store.num_tokens == whole.num_tokens
    logits, whole_logits = logits_beside(folder).open(), logits_beside(other).open()
    assert logits.num_tokens == whole_logits.num_tokens == store.num_tokens
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(logits.words(key), whole_logits.words(key))
        assert torch.equal(logits.token_log_likelihood(key), whole_logits.token_log_likelihood(key))
    likelihoods, whole_likelihoods = TokenLikelihoods.open(folder), TokenLikelihoods.open(other)
    assert likelihoods.missing(whole.keys()) == []
    for key in whole.keys():  # noqa: SIM118
        torch.testing.assert_close(likelihoods.read(key), whole_likelihoods.read(key), equal_nan=True)
    torch.testing.assert_close(store.statistics().variance, whole.statistics().variance)


def test_one_process_is_killed_and_only_the_rest_is_done_again(tmp_path: Path) -> None:
    folder, whole = tmp_path / "shared", tmp_path / "whole"
    assert fill_in_two_processes(folder, TORCHRUN, "2") != 0
    first, second = (manifest_of(share_folder(folder, process)).samples for process in (0, 1))
    assert len(second) == 2
    assert not first.keys() & second.keys()
    assert not manifest_of(folder).complete
    second_logits = LogitManifest.read(share_folder(logits_beside(folder).folder, 1))
    assert second_logits is not None
    assert second_logits.samples.keys() == second.keys()

    assert fill_in_two_processes(folder, ACCELERATE) == 0
    assert (folder / "processes").read_text() == "2"
    kept = sum(sample.tokens for sample in [*first.values(), *second.values()])
    assert int((folder / "tokens").read_text()) == sum(len(text.input_ids) for text in encoded()) - kept
    assert not list(tmp_path.glob("*/share-*"))
    require_same_content(folder, whole)


def write_share(folder: Path, source: Path, indices: list[int], shard_bytes: int = 1) -> None:
    store, _ = fill(source)
    texts = encoded()
    with KVStoreWriter(folder, identity(texts), shard_bytes) as writer:
        for index in indices:
            sample = store.read(texts[index].sample_key)
            writer.add(
                texts[index].sample_key, sample.kv, sample.spans, sample.truncated_bytes, sample.text_bytes,
                torch.arange(len(sample.spans)) >= 2,
            )  # fmt: skip


def test_one_process_goes_on_from_what_several_left(tmp_path: Path) -> None:
    folder, whole = tmp_path / "shared", tmp_path / "whole"
    write_share(share_folder(folder, 0), whole, [0, 1])
    # A run of more processes, a shard that was cut short, and one that holds a text which is there already.
    write_share(share_folder(folder, 3), whole, [2, 3])
    damaged = share_folder(folder, 3) / "kv-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    write_share(share_folder(folder, 4), whole, [1, 4], shard_bytes=10**6)
    with KVStoreWriter(folder, identity(encoded()), 1) as writer:
        kept = set(manifest_of(folder).samples)
        assert kept == {encoded()[index].sample_key for index in (0, 1, 2)}
        assert len(writer.missing([text.sample_key for text in encoded()])) == 9
    _, report = fill(folder)
    assert report.tokens == sum(len(text.input_ids) for text in encoded()[3:])
    require_same_content(folder, whole)
