"""Decode a student from another model's cache."""

from kvgraft.graft.cache import cache_from_kv, graft, project
from kvgraft.graft.pieces import concatenate, with_own_tokens

__all__ = ["cache_from_kv", "concatenate", "graft", "project", "with_own_tokens"]
