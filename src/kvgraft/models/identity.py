"""Which weights a model in memory has, told from a sample of them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

# Numbers looked at in each tensor: training changes all of them, so a few tell two models apart.
_SAMPLED = 64


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape and 64 evenly spaced numbers of every parameter, 64 hexadecimal digits.

    Numbers are compared as bfloat16, so that one model loaded in bfloat16 and in float32 is the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLED, flat.numel()), dtype=torch.float64)
        sample = flat[index.long().to(flat.device)].to("cpu", torch.bfloat16).float()
        digest.update(f"{name} {list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
