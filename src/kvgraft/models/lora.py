"""Students that are trained through low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), with peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvgraft.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

Targets = list[str] | Literal["all-linear"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Targets,
    seed: int,
    revision: str | None = None,
) -> PeftModel:
    """``model`` with frozen weights and trainable adapters that change nothing yet, in evaluation mode.

    Args:
        model: a causal language model; its modules are replaced in place.
        rank: width of each adapter.
        alpha: the adapter's output is scaled by ``alpha / rank``.
        dropout: share of the adapter's input dropped in training.
        target_modules: names of modules, as ``q_proj``, or ``all-linear`` for every linear one but the head.
        seed: draws the adapters' first weights; no other random state is touched.
        revision: of the hub repository that ``model`` is from, to be saved with the adapters.

    Raises:
        ModelError: a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    require_targets(model, target_modules)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers by a name that it had before, and sets by itself what layers as GPT-2's need.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out is set to False")
        torch.manual_seed(seed)
        return get_peft_model(model, settings, revision=revision).eval()


def require_targets(model: nn.Module, target_modules: Targets) -> None:
    """Raise ModelError where ``model`` has no module that one of ``target_modules`` names and LoRA can adapt."""
    if target_modules == "all-linear":
        return
    adaptable = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    ]
    unknown = [target for target in target_modules if not any(_names(target, name) for name in adaptable)]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in adaptable})
        raise ModelError(
            f"student.lora.target_modules {unknown}: {type(model).__name__} has no such modules; it has "
            f"{', '.join(known)}, or give all-linear"
        )


def save_student(student: PreTrainedModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a student in the Hugging Face layout, or only its adapters in peft's.

    ``state_dict`` holds weights gathered elsewhere (sharded training); default the student's own.
    """
    # By default peft asks the hub whether the vocabulary was changed, which no training here does.
    options = {"save_embedding_layers": False} if hasattr(student, "peft_config") else {}
    student.save_pretrained(folder, state_dict=state_dict, **options)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Put the adapters saved in ``folder`` into ``model``, which :func:`add_lora` made with the same settings.

    Raises:
        ModelError: the folder holds other adapters.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ModelError(
            f"the adapters in {folder} are not those of student.lora: missing {missing[:3]}, "
            f"not known {list(result.unexpected_keys)[:3]}; use the recipe that made them"
        )


def base_of(folder: Path) -> tuple[str | None, str | None]:
    """The model that the adapters in ``folder`` belong to, and its revision, which transformers does not look for.

    None for what is not told, and for both where ``folder`` holds no adapters.
    """
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config.get("base_model_name_or_path"), config.get("revision")


def _names(target: str, module: str) -> bool:
    """Whether ``target`` names ``module``, by peft's rule: the whole name, or its end after a dot."""
    return module == target or module.endswith(f".{target}")
