"""Matching a teacher to a student: tokens by the bytes they stand for, layers by a map."""

from kvgraft.align.layers import map_layers, uniform_layer_map
from kvgraft.align.tokens import AlignmentPolicy, TokenAlignment, align_encoded, align_tokens, gather_aligned

__all__ = [
    "AlignmentPolicy",
    "TokenAlignment",
    "align_encoded",
    "align_tokens",
    "gather_aligned",
    "map_layers",
    "uniform_layer_map",
]
