"""A model as it answers, in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and its like are off in ``model`` while this is entered, and then as they were."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
