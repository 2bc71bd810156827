"""Sizes of the real models that the founding guide names: public facts, shipped so that nothing has to be fetched."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kvgraft.kv import KVGeometry

_FOLDER = Path(__file__).parent / "known"


class KnownModel(BaseModel):
    """A model's published configuration, in transformers' field names.

    ``head_dim`` is given where it is not ``hidden_size / num_attention_heads``; ``parameters`` counts tied embeddings
    once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    hub_name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    parameters: int

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and their width."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return KVGeometry(self.num_hidden_layers, self.num_key_value_heads, head_dim)


@cache
def known_models() -> dict[str, KnownModel]:
    """Every model of ``known/*.json`` by its name, the file's own, smallest first."""
    models = [KnownModel(name=path.stem, **json.loads(path.read_text("utf-8"))) for path in _FOLDER.glob("*.json")]
    return {model.name: model for model in sorted(models, key=lambda model: model.parameters)}
