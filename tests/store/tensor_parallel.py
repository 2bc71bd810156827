"""One of several processes that hold a teacher together: ``python -m tests.store.tensor_parallel TEACHER FOLDER``."""

import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from kvgraft.data.datasets import Example
from kvgraft.models.loading import load_model
from kvgraft.models.tensor_parallel import is_tensor_parallel
from kvgraft.store.fill import encode_for_teacher, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.fill_logits import LogitStoreToFill
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.likelihoods import LikelihoodsToFill
from kvgraft.store.logits import LogitIdentity
from tests.store.test_fill import TEXTS


def fill(name: str, model: PreTrainedModel, folder: Path) -> tuple[KVStoreToFill, LogitStoreToFill, LikelihoodsToFill]:
    """Stores of layers 1 and 3 and of the log-probabilities and likelihoods of ``model``, filled together."""
    texts = encode_for_teacher([Example(text) for text in TEXTS], AutoTokenizer.from_pretrained(name), 64)
    text = text_fingerprint(text.sample_key for text in texts)
    kv = StoreIdentity("model", "tokenizer", text, (1, 3), num_kv_heads=2, head_dim=8, dtype="float32", max_length=64)
    log_probs = LogitIdentity("model", "tokenizer", text, max_length=64, vocabulary=400, top_k=8)
    stores = (
        KVStoreToFill(folder / "kv", kv, shard_bytes=1),
        LogitStoreToFill(folder / "logits", log_probs, 1),
        LikelihoodsToFill(folder / "kv", tuple(text.sample_key for text in texts)),
    )
    fill_stores(stores, "tiny", lambda: model, texts, token_budget=40)
    return stores


if __name__ == "__main__":
    shared = load_model(sys.argv[1], device="cpu", tensor_parallel=True)
    assert is_tensor_parallel(shared)
    assert shared.model.layers[0].self_attn.k_proj.weight.to_local().shape == (8, 32)
    fill(sys.argv[1], shared, Path(sys.argv[2]))
