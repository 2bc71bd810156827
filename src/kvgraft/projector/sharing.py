"""How many parameters each way of sharing takes."""

from __future__ import annotations

from typing import get_args

import torch

from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.settings import Sharing


def parameters_by_sharing(projector: KVDimensionProjector) -> dict[str, int]:
    """Parameters that ``projector`` would have with every way of sharing, all else as it is.

    ``grouped`` and ``trunk`` count with the projector's own ``num_groups``.
    """
    counts = {}
    for sharing in get_args(Sharing):
        with torch.device("meta"):
            counts[sharing] = KVDimensionProjector(**{**projector.config, "sharing": sharing}).count_parameters()
    return counts
