"""How alike two layers arrange the same tokens, whatever their widths."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA of every pair of layers: ``[first layers, second layers]`` in [0, 1].

    Kornblith et al. 2019 (arXiv 1905.00414): the squared norm of the products between the centred features, over the
    norms of each with itself; 1 where one is the other turned and scaled.

    Args:
        first: ``[layers, tokens, width]``.
        second: ``[layers, tokens, other width]`` of the same tokens.
    """
    left, right = (side.double() - side.double().mean(1, keepdim=True) for side in (first, second))
    norms = [torch.linalg.matrix_norm(side.transpose(1, 2) @ side) for side in (left, right)]
    shared = torch.stack([torch.linalg.matrix_norm(layer.T @ right).square() for layer in left])
    return shared / (norms[0][:, None] * norms[1]).clamp_min(torch.finfo(shared.dtype).tiny)
