"""Who trains in bfloat16 on a processor that only imitates it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from kvgraft import bfloat16
from kvgraft.bfloat16 import warn_where_slow
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe

X86 = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "warned"),
    [
        (X86, True),
        ({**X86, "avx512_bf16": True}, False),
        ({**X86, "amx_bf16": True}, False),
        ({"architecture": "arm64", "bf16": False}, False),
    ],
)
def test_what_is_on_is_named_where_the_processor_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capabilities: dict[str, object], warned: bool
) -> None:
    monkeypatch.setattr(bfloat16, "on_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with caplog.at_level(logging.WARNING):
        warn_where_slow({"fit.bf16": True, "graft.bf16": False, "training.bf16": True})
    assert ("set fit.bf16 and training.bf16 to false" in caplog.text) == warned
    assert bool(caplog.records) == warned
    caplog.clear()
    monkeypatch.setattr(bfloat16, "on_cpu", lambda: False)
    warn_where_slow({"fit.bf16": True})
    assert not caplog.records


def test_a_run_says_so(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bfloat16, "on_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86, raising=False)
    with caplog.at_level(logging.WARNING):
        prepare(tiny_recipe())
        assert "bfloat16" not in caplog.text
        prepare(tiny_recipe(training={"bf16": True}))
    assert "set training.bf16 to false" in caplog.text
