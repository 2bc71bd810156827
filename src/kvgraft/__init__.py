"""Move knowledge between language models through their key/value caches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvgraft.align.layers import map_layers
    from kvgraft.align.tokens import align_tokens, gather_aligned
    from kvgraft.data.spans import encode_with_spans
    from kvgraft.distill.losses import compute_kv_loss
    from kvgraft.errors import KVGraftError
    from kvgraft.kv import KV, KVGeometry
    from kvgraft.models.capture import capture, record_kv
    from kvgraft.models.geometry import kv_geometry
    from kvgraft.projector.projector import KVDimensionProjector
    from kvgraft.projector.settings import teacher_config_from
    from kvgraft.recipe import Recipe, load_recipe
    from kvgraft.store.reader import KVStore

__all__ = [
    "KV",
    "KVDimensionProjector",
    "KVGeometry",
    "KVGraftError",
    "KVStore",
    "Recipe",
    "align_tokens",
    "capture",
    "compute_kv_loss",
    "encode_with_spans",
    "gather_aligned",
    "kv_geometry",
    "load_recipe",
    "map_layers",
    "record_kv",
    "teacher_config_from",
]

# Imported once asked for: torch and transformers take seconds, which `kvgraft --help` need not wait for.
_MODULES = {
    "KV": "kv",
    "KVDimensionProjector": "projector.projector",
    "KVGeometry": "kv",
    "KVGraftError": "errors",
    "KVStore": "store.reader",
    "Recipe": "recipe",
    "align_tokens": "align.tokens",
    "capture": "models.capture",
    "compute_kv_loss": "distill.losses",
    "encode_with_spans": "data.spans",
    "gather_aligned": "align.tokens",
    "kv_geometry": "models.geometry",
    "load_recipe": "recipe",
    "map_layers": "align.layers",
    "record_kv": "models.capture",
    "teacher_config_from": "projector.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
