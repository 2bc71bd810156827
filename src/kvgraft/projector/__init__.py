"""The adapters between a teacher's KV and the student's: built, fitted, sized, migrated."""

from kvgraft.projector.adapters import ElasticBottleneck, dead_unit_share
from kvgraft.projector.closed_form import LeastSquares
from kvgraft.projector.migrate import migrate_linear_checkpoint
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.settings import TeacherConfig, teacher_config_from
from kvgraft.projector.sizing import PRESETS, SizingAdvice, adapter_parameters, advise, auto_mlp_ratio

__all__ = [
    "PRESETS",
    "ElasticBottleneck",
    "KVDimensionProjector",
    "LeastSquares",
    "SizingAdvice",
    "TeacherConfig",
    "adapter_parameters",
    "advise",
    "auto_mlp_ratio",
    "dead_unit_share",
    "migrate_linear_checkpoint",
    "teacher_config_from",
]
