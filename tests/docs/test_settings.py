"""Fields of recipes, imports and links of the README and of docs/ exist."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from kvgraft.recipe import Recipe
from tests.docs.pages import PAGES, blocks, code_spans

SETTING = re.compile(r"^(\w+)(\[\])?\.(\w+)(\.\w+)*(?=[:=]|$)")
FILE_ENDINGS = (".md", ".json", ".png", ".yaml")


def merged(recipe: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """``recipe`` with what a page shows of one in its place."""
    if {"model", "cut_from", "new"} & fragment.keys():
        return fragment
    return recipe | {
        name: merged(recipe.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in fragment.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(page: Path) -> None:
    base = yaml.safe_load(Path("recipes/quickstart.yaml").read_text(encoding="utf-8"))
    for body in blocks(page, "yaml"):
        fragment = yaml.safe_load(body)
        Recipe.model_validate(fragment if "name" in fragment else merged(base, fragment))


def require_field(path: list[str]) -> None:
    if path == ["projector", "preset"]:
        return  # stands for fields where a recipe is read
    section: Any = Recipe
    for name in path:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return  # fields of a transformers config, or an index
        assert name in section.model_fields, f"{section.__name__} has no {name}: {'.'.join(path)}"
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_settings_in_sentences_exist(page: Path) -> None:
    for span in code_spans(page):
        found = SETTING.match(span)
        if found and found[1] in Recipe.model_fields and not span.endswith(FILE_ENDINGS):
            require_field(found[0].replace("[]", "").split("."))


def test_a_wrong_setting_is_caught() -> None:
    with pytest.raises(AssertionError, match="KVLossRecipe has no wieght"):
        require_field(["kv_loss", "wieght"])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_imports_what_there_is(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).is_file()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = Path("zensical.toml").read_text(encoding="utf-8")
    pages = [path.relative_to("docs") for path in Path("docs").rglob("*.md")]
    assert [str(page) for page in pages if f'"{page}"' not in navigation] == []


def test_every_room_is_in_the_reference() -> None:
    rooms = [path.parent.name for path in Path("src/kvgraft").glob("*/__init__.py") if path.parent.name != "cli"]
    assert [room for room in rooms if not Path(f"docs/reference/{room}.md").is_file()] == []


def test_reference_names_modules_that_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in Path("docs/reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    places = {name: Path("src", *name.split(".")) for name in named}
    assert [name for name, place in places.items() if not (place.is_dir() or place.with_suffix(".py").is_file())] == []
