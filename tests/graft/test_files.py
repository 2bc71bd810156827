"""Grafted KV on disk: what comes back, and what is refused."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from kvgraft.data.spans import sample_key
from kvgraft.errors import GraftError
from kvgraft.graft import cache_from_kv, load_graft, save_graft
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.models.identity import weights_fingerprint
from tests.graft.students import GREEDY, student_of
from tests.graft.test_pieces import ids
from tests.models.test_capture import padded_batch

HASHES = [sample_key("one text"), sample_key("another")]


def saved(path: Path, family: str = "gemma3_text") -> tuple[KV, list[list[int]]]:
    student = student_of(family)
    input_ids, mask, _ = padded_batch()
    kv = capture(student, input_ids, mask)
    token_ids = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
    save_graft(path, kv, student, text_sha256=HASHES, teacher="org/t-1.0", projector="runs/p", token_ids=token_ids)
    return kv, token_ids


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_a_loaded_cache_goes_on_as_the_one_that_was_saved(tmp_path: Path, family: str) -> None:
    path = tmp_path / "new" / "document.safetensors"
    kv, token_ids = saved(path, family)
    student, following = student_of(family), ids(2, 3)
    loaded = load_graft(path, student, expected_sha256=HASHES)
    assert torch.equal(loaded.kv.keys, kv.keys)
    assert torch.equal(loaded.kv.mask, kv.mask)
    assert loaded.origin.teacher == "org/t-1.0"
    assert loaded.origin.projector == "runs/p"
    assert loaded.origin.text_sha256 == tuple(HASHES)
    assert loaded.origin.kvgraft == version("kvgraft")
    answers = [
        student.generate(**cache.generate_inputs(following), max_new_tokens=6, **GREEDY)
        for cache in (loaded.cache(student), cache_from_kv(student, kv, token_ids=token_ids))
    ]
    assert torch.equal(*answers)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_student_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "document.safetensors"
    saved(path)
    trained = student_of("gemma3_text")
    with torch.no_grad():
        trained.model.layers[2].self_attn.k_proj.weight.mul_(1.02)
    for student in (trained, student_of("llama")):
        with pytest.raises(GraftError, match=rf"another student: Gemma3ForCausalLM.*{type(student).__name__}"):
            load_graft(path, student)


def test_one_model_has_one_fingerprint_in_any_precision() -> None:
    student = student_of("llama").to(torch.bfloat16).float()
    fingerprint = weights_fingerprint(student)
    assert weights_fingerprint(student.to(torch.bfloat16)) == fingerprint
    assert weights_fingerprint(student_of("qwen3")) != fingerprint


def test_other_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "document.safetensors"
    saved(path)
    with pytest.raises(GraftError, match=f"{HASHES[0][:12]}.*{HASHES[1][:12]}.*expected.*{HASHES[1][:12]}"):
        load_graft(path, student_of("gemma3_text"), expected_sha256=HASHES[::-1])
    student = student_of("llama")
    kv = capture(student, ids(2, 5))
    with pytest.raises(GraftError, match=r"2 texts of \[5, 5\] tokens; got 1 hashes"):
        save_graft(path, kv, student, text_sha256=HASHES[:1])
    with pytest.raises(GraftError, match=r"ids of \[5, 4\] tokens"):
        save_graft(path, kv, student, text_sha256=HASHES, token_ids=[[3] * 5, [3] * 4])
    with pytest.raises(GraftError, match="rotated=False"):
        save_graft(path, replace(kv, rotated=True), student, text_sha256=HASHES)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    student = student_of("gemma3_text")
    path = tmp_path / "document.safetensors"
    with pytest.raises(GraftError, match=r"no file .*document\.safetensors.*save_graft"):
        load_graft(path, student)
    saved(path)
    whole, tensors = path.read_bytes(), load(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GraftError, match="damaged"):
        load_graft(path, student)
    for metadata in (None, {"kvgraft": json.dumps({"format_version": 99})}):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(GraftError, match=r"format version (None|99); this kvgraft reads 1"):
            load_graft(path, student)
