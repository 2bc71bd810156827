"""Matching a teacher to a student: tokens by the bytes they stand for, layers by a map."""

from kvgraft.align.layers import map_layers, uniform_layer_map
from kvgraft.align.spans import EncodedText, encode_with_spans
from kvgraft.align.tokens import AlignmentPolicy, TokenAlignment, align_encoded, align_tokens, gather_aligned

__all__ = [
    "AlignmentPolicy",
    "EncodedText",
    "TokenAlignment",
    "align_encoded",
    "align_tokens",
    "encode_with_spans",
    "gather_aligned",
    "map_layers",
    "uniform_layer_map",
]
