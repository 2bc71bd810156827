"""The import path that the guide prints."""

from kvgraft.projector.projector import KVDimensionProjector

__all__ = ["KVDimensionProjector"]
