"""Students cut from a larger model, as folders in the Hugging Face layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from kvgraft.data.chat import encode_text
from kvgraft.data.datasets import load_train_and_held_out
from kvgraft.errors import ModelError
from kvgraft.models import loading
from kvgraft.models.cut import chosen_layers, cut_model
from kvgraft.models.cut_width import channel_importance, cut_intermediate, largest, require_channels
from kvgraft.models.geometry import depth_of

# Tokens of a text that say which channels of an MLP matter.
CALIBRATION_LENGTH = 512


def write_cut(
    name: str,
    output: Path,
    *,
    layers: Sequence[int] | int | None = None,
    every: int | None = None,
    intermediate: int | None = None,
    text: str = "word_problems",
    samples: int = 64,
    revision: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> PreTrainedModel:
    """Cut model ``name`` and write it with its tokenizer into ``output``, in the Hugging Face layout.

    Args:
        name, revision: as :func:`kvgraft.models.loading.load_model`.
        output: a folder to create.
        layers, every: as :func:`kvgraft.models.cut.chosen_layers`; default all where ``intermediate`` is given.
        intermediate: channels of each MLP to keep, default all: those that do most in the kept layers on ``samples``
            training texts of ``text``, as ``data.train`` in a recipe.
        dtype: of the weights that are written.
        overwrite: replace what is in ``output``.

    Raises:
        ModelError: the folder is not empty, or the model cannot be loaded or cut.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise ModelError(f"{output} exists; give another folder, or --overwrite to replace it")
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ModelError(f"{output} holds no model and is left alone; give another folder")
    depth = depth_of(loading.load_config(name, revision))
    whole_depth = intermediate is not None and layers is None and every is None
    kept = list(range(depth)) if whole_depth else chosen_layers(depth, layers, every)
    tokenizer = loading.load_tokenizer(name, revision)
    model = cut_model(loading.load_model(name, revision, dtype=dtype, device="cpu"), kept)
    if intermediate is not None:
        require_channels(model, intermediate)
        examples, _ = load_train_and_held_out(text, None, samples, 1, 0, tokenizer=tokenizer)
        texts = [encode_text(example, tokenizer, CALIBRATION_LENGTH).input_ids for example in examples]
        cut_intermediate(model, largest(channel_importance(model, texts), intermediate))
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".cutting-", dir=output.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        if output.is_dir():
            shutil.rmtree(output)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model
