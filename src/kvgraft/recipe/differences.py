"""In what two recipes differ."""

from __future__ import annotations

from collections.abc import Collection

from kvgraft.recipe.recipe import Recipe


def differences(one: Recipe, other: Recipe, *, but: Collection[str] = ()) -> dict[str, tuple[object, object]]:
    """Both values of every field in which two recipes differ, by its dotted name.

    Args:
        but: top fields that are passed over.
    """
    first, second = (recipe.model_dump(mode="json", exclude=set(but)) for recipe in (one, other))
    return _differences(first, second, "")


def _differences(one: object, other: object, field: str) -> dict[str, tuple[object, object]]:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {field: (one, other)}
    found: dict[str, tuple[object, object]] = {}
    for name in dict.fromkeys([*one, *other]):
        found |= _differences(one.get(name), other.get(name), f"{field}.{name}" if field else name)
    return found
