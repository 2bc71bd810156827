"""A projector on disk: weights in safetensors, settings in JSON, each replaced whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvgraft.errors import ProjectorError

WEIGHTS_FILE = "projector.safetensors"
CONFIG_FILE = "config.json"
FORMAT_VERSION = 1


def write_projector(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Put ``weights`` and ``config`` into ``folder``, which is created where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration goes last: a first save that was cut short has none, and loading refuses it.
    temporary = folder / f"{WEIGHTS_FILE}.tmp"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary = folder / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps({"format_version": FORMAT_VERSION, **config}, indent=2), encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder, CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProjectorError(f"{path} is not JSON: {error}") from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ProjectorError(
            f"{path} has format_version {version}; this kvgraft reads {FORMAT_VERSION}. Save the projector again with "
            "KVDimensionProjector.save_pretrained."
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = _existing(folder, WEIGHTS_FILE)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ProjectorError(f"{path} is damaged or not a safetensors file: {error}") from error


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ProjectorError(f"no {name} in {folder}: give the folder that KVDimensionProjector.save_pretrained wrote")
    return path
