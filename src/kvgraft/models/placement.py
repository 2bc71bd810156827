"""Where a model is put, and in how many bits: what transformers' loading has to be told."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from kvgraft.errors import ModelError
from kvgraft.processes import process_state

Quantization = Literal["8bit", "4bit", "torchao_8bit"]
DeviceMap = Literal["auto"] | Mapping[str, int | str]

# Bytes that one weight of a quantised layer takes.
QUANTIZED_BYTES: dict[str, float] = {"8bit": 1, "4bit": 0.5, "torchao_8bit": 1}
_PACKAGES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "torchao_8bit": "torchao"}
_BITSANDBYTES_LOGGER = "bitsandbytes.autograd._functions"


def placement_options(
    dtype: torch.dtype, device: str, quantization: Quantization | None, device_map: DeviceMap | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a model in few bits or on several devices; none for a plain one.

    Args:
        dtype: what a quantised model computes in.
        device: where a quantised model is put without ``device_map``.
        quantization: ``8bit`` (LLM.int8, arXiv:2208.07339) and ``4bit`` (NF4, arXiv:2305.14314) of bitsandbytes, or
            ``torchao_8bit``: weights in int8, everything else in ``dtype``.
        device_map: as accelerate reads it.

    Raises:
        ModelError: the package of ``quantization`` is not installed, or several processes would each spread the model
            over all devices.
    """
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
        options["device_map"] = {"": device}
    if device_map is not None:
        if device_map == "auto" and process_state().num_processes > 1:
            raise ModelError(
                f"device_map: auto spreads one model over all devices, and {process_state().num_processes} processes "
                "would each do so; run one process, or leave device_map out so that each gets a device of its own"
            )
        options["device_map"] = device_map if device_map == "auto" else dict(device_map)
    return options


def input_device(model: PreTrainedModel) -> torch.device:
    """Where ``model`` takes its tokens: the device of its embeddings, or where they run if they lie on disk."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    package = _PACKAGES[quantization]
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"quantization {quantization} needs the package {package}, which is not installed: "
            "`pip install 'kvgraft[quantization]'`, or leave quantization out"
        )
    if quantization == "torchao_8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "8bit":
        # A line for every linear layer of every batch, unless the dtype is float16; LLM.int8 is made of this cast.
        logging.getLogger(_BITSANDBYTES_LOGGER).addFilter(_tells_no_cast)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _tells_no_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in record.getMessage()
