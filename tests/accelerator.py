"""An accelerator that is none: a device whose tensors lie in memory, for tests of what meets a real one.

Like a card, it refuses tensors of the processor beside its own; like Apple's, it has no float64, unless the environment
sets ``IMAGINED_FLOAT64``. What it computes, the processor computes, so that numbers are the processor's own. ``pytest
-p tests.accelerator`` imports it, and models go there then as they go to a card. The hooks into torch are those for
backends written in Python, which are experimental.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "imagined"
_aten = torch.ops.aten
# What takes tensors of the processor and of a card together: indices for tensors of the card, and copies between them.
_PUTTING = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_INDEXING = {_aten.index.Tensor, *_PUTTING}
_MIXED = {_aten.copy_.default, _aten._to_copy.default, *_INDEXING}
# What takes not even a single number of the processor along, by name: what does not go number by number.
_NOT_ALONG = {"cat", "stack", "mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "gather", "index_select"}


class _Backend(_DummyBackendModule):
    """What ``torch.imagined`` is. Random numbers are those of the processor's generator, which has its own state."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def set_device(self, device: object) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class AcceleratorTensor(Tensor):
    """A tensor on the device; ``held`` is where its numbers are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> AcceleratorTensor:
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{self.held} on {DEVICE}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied = self.clone()
        return copied.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Read again, it is on the processor.
        return self.detach().held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that remembers that it was made for the device."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        on_device = torch.device(device).type == NAME  # type: ignore[call-overload]
        generator = super().__new__(cls, "cpu" if on_device else device)  # type: ignore[arg-type]
        generator.on_device = on_device  # type: ignore[attr-defined]
        return generator


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives, computed by the processor; on the device where an argument is, or where it is asked for."""
    leaves = [*_leaves(args), *_leaves(kwargs.values())]
    ours = [leaf for leaf in leaves if isinstance(leaf, AcceleratorTensor)]
    _refuse_what_is_not_there(func, leaves, bool(ours))
    if func in _INDEXING and not isinstance(args[0], AcceleratorTensor):
        raise RuntimeError(f"{func} of a tensor on the processor by indices on {DEVICE}")
    if func in _PUTTING and ours and not isinstance(args[2], AcceleratorTensor) and args[2].dim():
        raise RuntimeError(f"{func} of numbers {list(args[2].shape)} on the processor into a tensor on {DEVICE}")
    asked = kwargs.get("device")
    on_device = bool(ours) if asked is None else torch.device(asked).type == NAME
    with no_dispatch():
        out = func(*_map(_held, args), **{name: _map(_held, value) for name, value in kwargs.items()})
    if func is _aten.copy_.default:
        return args[0]
    if not on_device:
        return out
    out = _map(_on_device, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and _aliases(func) else out


@cache
def _aliases(func: Any) -> bool:
    """Whether what ``func`` gives shares memory with what it takes."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each leaf of its lists and tuples changed; torch's own for any tree takes most of a run's time."""
    return type(value)(_map(change, part) for part in value) if isinstance(value, list | tuple) else change(value)


def _refuse_what_is_not_there(func: Any, leaves: list[Any], has_ours: bool) -> None:
    if not has_ours:
        return
    # A single number of the processor may come along.
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, AcceleratorTensor)]
    takes_none = func.overloadpacket.__name__ in _NOT_ALONG
    shapes = [list(other.shape) for other in others if other.dim() or takes_none]
    if shapes and func not in _MIXED:
        raise RuntimeError(f"{func} of tensors on {DEVICE} and of tensors {shapes} on the processor")
    if any(isinstance(leaf, torch.Generator) and not getattr(leaf, "on_device", False) for leaf in leaves):
        raise RuntimeError(f"{func} on {DEVICE} by a generator of the processor")


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.held if isinstance(value, AcceleratorTensor) else value


def _on_device(value: Any) -> Any:
    if type(value) is not Tensor:
        return value
    if value.dtype == torch.float64 and "IMAGINED_FLOAT64" not in os.environ:
        raise TypeError(f"{DEVICE} has no float64")
    return AcceleratorTensor(value)


def _make(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and its like, which do not reach backends written in Python."""

    @wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, list | tuple):
            data = _map(lambda leaf: leaf.item() if isinstance(leaf, AcceleratorTensor) else leaf, data)
        if device is not None and torch.device(device).type == NAME:
            return make(data, *args, **kwargs).to(device)
        return make(data, *args, **kwargs) if device is None else make(data, *args, device=device, **kwargs)

    return made


def _new(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Tensor.new_tensor`` likewise."""

    @wraps(make)
    def made(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        on_device = isinstance(like, AcceleratorTensor)
        made = make(like.held if on_device else like, *args, **kwargs)  # type: ignore[attr-defined]
        return made.to(like.device) if on_device else made

    return made


def _through_held(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of tensors that looks at memory."""

    @wraps(method)
    def called(tensor: Tensor, *args: Any) -> Any:
        return method(tensor.detach().held if isinstance(tensor, AcceleratorTensor) else tensor, *args)

    return called


def _with_index(method: Callable[..., Any]) -> Callable[..., Any]:
    """Indexing, whose lists would be made tensors of the device on a way that does not reach it."""

    def as_tensors(index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(as_tensors(part) for part in index)
        return torch.tensor(index) if isinstance(index, list) else index

    @wraps(method)
    def called(tensor: Tensor, index: Any, *value: Any) -> Any:
        return method(tensor, as_tensors(index) if isinstance(tensor, AcceleratorTensor) else index, *value)

    return called


def _refuse_numpy(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(tensor: Tensor, **kwargs: Any) -> Any:
        if isinstance(tensor, AcceleratorTensor):
            raise TypeError(f"numpy cannot read a tensor on {DEVICE}")
        return method(tensor, **kwargs)

    return called


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
# Looked up once, so that ``with torch.device`` knows them as they were.
_device_constructors()
torch.tensor, torch.as_tensor = _make(torch.tensor), _make(torch.as_tensor)
torch.Generator = _Generator  # type: ignore[misc]
for name in ("tolist", "untyped_storage", "data_ptr"):
    setattr(Tensor, name, _through_held(getattr(Tensor, name)))
for name in ("__getitem__", "__setitem__"):
    setattr(Tensor, name, _with_index(getattr(Tensor, name)))
Tensor.new_tensor = _new(Tensor.new_tensor)  # type: ignore[method-assign]
Tensor.numpy = _refuse_numpy(Tensor.numpy)  # type: ignore[method-assign]
Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign, assignment]
torch.accelerator.synchronize = lambda device=None: None  # type: ignore[assignment]
# Read by accelerate, and so by the Trainer.
os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
