"""From the YAML a user writes to a recipe, with errors that point at the line."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kvgraft.errors import RecipeError
from kvgraft.projector.presets import PRESETS
from kvgraft.recipe.recipe import Recipe


class _RecipeLoader(yaml.SafeLoader):
    """Refuses a field that is written twice, of which YAML would keep the last and drop the other without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is written twice, on lines {seen[key.value]} and {line}; keep one of them"
                )
            seen[key.value] = line
        return node


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read ``path`` and apply ``overrides`` of the form ``a.b=value`` (lists by index: ``teachers.0.model=...``).

    ``path`` is a recipe, or the ``experiment.yaml`` of a run, which is then repeated. ``projector.preset`` stands for
    its settings (:data:`kvgraft.projector.presets.PRESETS`): those beside it in the file win over it, and as an
    override it wins over the file.

    Raises RecipeError naming the file, the line where it can be told, the field, and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}; name a YAML file, for example recipes/quickstart.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text in UTF-8 ({error}); save it in UTF-8") from error
    try:
        content = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold fields such as `teachers:` and `student:`; got {type(content).__name__}")
    inside = _place_of_recipe(content, path)
    for part in inside:
        content = content[part]
    _write_out_preset(content, wins=False)
    for override in overrides or []:
        _apply_override(content, override)
        _write_out_preset(content, wins=override.startswith("projector.preset="))
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_describe(error, path, text, inside)) from error


def _place_of_recipe(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Where the recipe is: all of a recipe file, one block of an experiment log."""
    if "experiment" not in content:
        return ()
    environment = content.get("environment")
    if not isinstance(environment, dict) or not isinstance(environment.get("recipe"), dict):
        raise RecipeError(
            f"{path} is an experiment log without the recipe in it, as older versions wrote them; take recipe.yaml of "
            "the same run"
        )
    return ("environment", "recipe")


def _write_out_preset(content: dict[str, Any], *, wins: bool) -> None:
    """Settings in place of a ``projector.preset``; those that stand beside it give way where it ``wins``."""
    projector = content.get("projector")
    if not isinstance(projector, dict) or "preset" not in projector:
        return
    name = projector.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise RecipeError(f"projector.preset is one of {', '.join(PRESETS)}; got {name!r}")
    settings = asdict(PRESETS[name])
    content["projector"] = projector | settings if wins else settings | projector


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"--set {override}: expected a.b=value, for example --set training.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value {value} is not valid YAML: {error}") from error
    target: Any = content
    place = ""
    *parents, last = dotted.split(".")
    try:
        for part in parents:
            _require_number(override, place, target, part)
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
            place = f"{place}.{part}" if place else part
        _require_number(override, place, target, last)
        if isinstance(target, list):
            target[int(last)] = parsed
        else:
            target[last] = parsed
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"--set {override}: there is no field {dotted} in this recipe ({error})") from error


def _require_number(override: str, place: str, target: Any, part: str) -> None:
    if isinstance(target, list) and not part.isdigit():
        raise RecipeError(
            f"--set {override}: {place} is a list of {len(target)}; name one by number, as {place}.0.{part}"
        )


def _describe(error: ValidationError, path: Path, text: str, inside: tuple[str, ...]) -> str:
    lines = [f"{path} cannot be run as written:"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
        where = _line_of(text, (*inside, *problem["loc"]))
        hint = _known_fields(problem["loc"]) if problem["type"] == "extra_forbidden" else ""
        given = "" if problem["type"] in ("missing", "extra_forbidden") else f" (given {problem['input']!r})"
        lines.append(f"  {field or 'recipe'}{where}: {problem['msg']}{given}{hint}")
    return "\n".join(lines)


def _is_union_branch(part: str | int) -> bool:
    return isinstance(part, str) and re.search(r"[\[(]", part) is not None


def _line_of(text: str, location: tuple[str | int, ...]) -> str:
    """Line of the field in the file, found by walking YAML's own marks."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in location:
        child = None
        if isinstance(node, yaml.MappingNode):
            child = next((value for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
        if child is None:
            break
        node = child
    return f" (line {node.start_mark.line + 1})" if node is not None else ""


def _known_fields(location: tuple[str | int, ...]) -> str:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        # Python 3.10 takes list[...] for a class, of which issubclass then knows nothing.
        classes = (c for c in candidates if isinstance(c, type) and get_origin(c) is None)
        section = next((c for c in classes if issubclass(c, BaseModel)), section)
    return f"; known here: {', '.join(section.model_fields)}"
