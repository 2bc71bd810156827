"""Every word of the page is there in both languages."""

import ast
import re
from pathlib import Path

from kvgraft.report import page
from kvgraft.report.page.translations import CHINESE

FOLDER = Path(page.__file__).parent


def phrases_in_python(path: Path) -> set[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Phrase"]
    return {call.args[0].value for call in named if isinstance(call.args[0], ast.Constant)}


def test_every_phrase_has_chinese_and_every_chinese_is_used() -> None:
    used = set().union(*(phrases_in_python(path) for path in FOLDER.glob("*.py")))
    used |= set(re.findall(r'phrase\("([^"]+)"', (FOLDER / "templates" / "page.html").read_text(encoding="utf-8")))
    from kvgraft.report.page.metrics import _TITLES_BY_TEACHER

    used |= set(_TITLES_BY_TEACHER.values())
    assert used - CHINESE.keys() == set()
    assert CHINESE.keys() - used == set()


def test_translations_keep_the_values() -> None:
    for english, chinese in CHINESE.items():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese)), english
