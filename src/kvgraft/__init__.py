"""Move knowledge between language models through their key/value caches."""

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
