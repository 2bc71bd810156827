"""Identity and keys."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import pytest

from kvgraft.data.spans import sample_key
from kvgraft.errors import StoreError
from kvgraft.kv import KVGeometry
from kvgraft.store.format import StoreIdentity, text_fingerprint
from tests.store.test_writer import IDENTITY

OTHERS: dict[str, Any] = {
    "model": "teacher-b",
    "tokenizer": "tokenizer-b",
    "text": "text-b",
    "layers": (1, 4),
    "num_kv_heads": 3,
    "head_dim": 8,
    "dtype": "float16",
    "max_length": 17,
    "template": "chat",
    "rotated": True,
    "format_version": 9,
}


def test_every_field_changes_the_hash_and_is_named_when_it_differs() -> None:
    assert sorted(OTHERS) == sorted(field.name for field in fields(StoreIdentity))
    hashes = {IDENTITY.hash()}
    for name, value in OTHERS.items():
        other = replace(IDENTITY, **{name: value})
        hashes.add(other.hash())
        (sentence,) = IDENTITY.difference(other)
        shown = str(list(value)) if isinstance(value, tuple) else str(value)
        assert sentence.endswith(f"this run needs {shown}")
    assert len(hashes) == 1 + len(OTHERS)
    assert IDENTITY.difference(replace(IDENTITY)) == []


def test_an_absent_template_reads_as_nothing() -> None:
    assert IDENTITY.difference(replace(IDENTITY, template="chat")) == [
        "the template: the store holds nothing, this run needs chat"
    ]


def test_geometry_counts_the_layers_held() -> None:
    assert IDENTITY.geometry == KVGeometry(num_layers=3, num_kv_heads=2, head_dim=4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"layers": ()}, "distinct"),
        ({"layers": (1, 1)}, "distinct"),
        ({"layers": (-1, 2)}, "distinct"),
        ({"head_dim": 0}, "head_dim"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_an_impossible_identity_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(StoreError, match=match):
        replace(IDENTITY, **change)


def test_sample_key_is_sha256_of_utf8() -> None:
    assert sample_key("naïve ☃") == hashlib.sha256("naïve ☃".encode()).hexdigest()


def test_text_fingerprint_is_of_the_set() -> None:
    assert text_fingerprint(["b", "a", "b"]) == text_fingerprint(["a", "b"])
    assert text_fingerprint(["a", "b"]) != text_fingerprint(["a", "c"])
    assert text_fingerprint(["ab"]) != text_fingerprint(["a", "b"])
