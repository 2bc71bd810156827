"""The snippet of docs/graft.md runs as printed."""

import re
from pathlib import Path

from tests.graft.test_sources import LAYERS, TEXTS, Pair


def test_the_snippet_answers_from_a_store(tiny_teacher: Path, tmp_path: Path) -> None:
    pair = Pair(tiny_teacher)
    pair.store(tmp_path / "store")
    pair.projector.save_pretrained(tmp_path / "projector")
    pair.student.save_pretrained(tmp_path / "student")
    pair.tokenizer.save_pretrained(tmp_path / "student")
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("docs/graft.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {
        "STUDENT": str(tmp_path / "student"),
        "PROJECTOR": tmp_path / "projector",
        "STORE": tmp_path / "store",
        "DOCUMENT": TEXTS[0],
        "TEACHER": "t",
        "LAYERS": LAYERS,
    }
    exec(snippet, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["output"][0].tolist()[: len(names["text"].input_ids)] == names["text"].input_ids
    assert names["cache"].next_positions.tolist() == [len(names["text"].input_ids)]
