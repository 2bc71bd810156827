"""One of several processes that fill a store together: ``python -m tests.store.process FOLDER [KILL_AFTER]``.

With KILL_AFTER the second process kills itself once that many of its batches are on disk.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.processes import process_state
from kvgraft.store import fill as filling
from kvgraft.store.fill import FillReport, encode_for_teacher, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.fill_logits import LogitStoreToFill
from kvgraft.store.format import read_manifest, text_fingerprint
from kvgraft.store.likelihoods import LikelihoodsToFill
from kvgraft.store.logits import LogitIdentity
from kvgraft.store.reader import KVStore
from kvgraft.store.shares import share_folder
from tests.store.test_fill import identity, teacher

TEXTS = [f"{number} apples and {number * 7} pears" + " in a basket" * (number % 3) for number in range(12)]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run_in_two_processes(command: list[str], launcher: list[str] = TORCHRUN) -> int:
    """Exit status of ``python -m COMMAND`` in two processes on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, "-m", *launcher, "-m", *command]
    return subprocess.run(whole, env=environment, timeout=300, check=False).returncode


def encoded() -> list[EncodedText]:
    return encode_for_teacher([Example(text) for text in TEXTS], train_tokenizer(TEXTS, 300), 64)


def fill(folder: Path) -> tuple[KVStore, FillReport]:
    """A pass of the teacher and a shard for every text, of KV, of log-probabilities and of token likelihoods."""
    texts = encoded()
    store = KVStoreToFill(folder, identity(texts), shard_bytes=1)
    likelihoods = LikelihoodsToFill(folder, tuple(text.sample_key for text in texts))
    stores = [store, logits_beside(folder), likelihoods]
    report, *_ = fill_stores(stores, "tiny", teacher, texts, token_budget=1)
    return store.open(), report


def logits_beside(folder: Path) -> LogitStoreToFill:
    """The logit store that goes with the KV store in ``folder``."""
    fingerprint = text_fingerprint(text.sample_key for text in encoded())
    identity = LogitIdentity("model", "tokenizer", fingerprint, max_length=64, vocabulary=300, top_k=8)
    return LogitStoreToFill(folder.with_name(f"{folder.name}-logits"), identity, shard_bytes=1)


def kill_second_process_after(batches: int, folder: Path) -> None:
    run, done = filling.kv_and_hidden_states, []

    def run_or_die(*args, **options):
        if process_state().process_index == 1 and len(done) == batches:
            while len(read_manifest(share_folder(folder, 1)).samples) < batches:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return run(*args, **options)

    filling.kv_and_hidden_states = run_or_die


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        kill_second_process_after(int(sys.argv[2]), folder)
    _, report = fill(folder)
    if process_state().is_main_process:
        (folder / "tokens").write_text(str(report.tokens))
        (folder / "processes").write_text(str(process_state().num_processes))
