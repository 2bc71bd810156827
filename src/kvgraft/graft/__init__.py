"""Decode a student from another model's cache."""

from kvgraft.graft.cache import cache_from_kv, graft, project
from kvgraft.graft.files import load_graft, save_graft
from kvgraft.graft.pieces import concatenate, with_own_tokens
from kvgraft.graft.sources import graft_live, graft_stored, live_kv, own_beginning, stored_kv

__all__ = [
    "cache_from_kv",
    "concatenate",
    "graft",
    "graft_live",
    "graft_stored",
    "live_kv",
    "load_graft",
    "own_beginning",
    "project",
    "save_graft",
    "stored_kv",
    "with_own_tokens",
]
