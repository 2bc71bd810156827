"""Does bfloat16 save time on this machine?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from kvgraft.processes import on_cpu

logger = logging.getLogger(__name__)

_PRODUCTS_OF_X86 = ("avx512_bf16", "amx_bf16")


def warn_where_slow(settings: Mapping[str, bool]) -> None:
    """Name those of ``settings`` that are on, where this processor has no products in bfloat16 and only imitates them.

    Args:
        settings: fields of the recipe by which matrix products are computed in bfloat16.
    """
    names = [name for name, is_on in settings.items() if is_on]
    if names and on_cpu() and _is_imitated():
        logger.warning(
            "this processor has no matrix products in bfloat16 (%s) and takes longer for them than in float32; "
            "set %s to false to save time",
            " or ".join(_PRODUCTS_OF_X86),
            " and ".join(names),
        )


def _is_imitated() -> bool:
    # Older torch does not say; of other architectures none was measured.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [capabilities[name] for name in _PRODUCTS_OF_X86 if name in capabilities]
    return bool(known) and not any(known)
