"""Files that a run folder may hold for its page beside what training writes; a page shows those that are there."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kvgraft.errors import ReportError

SAMPLES_FILE, LAYERS_FILE = "samples.json", "layers.json"
Content = TypeVar("Content", bound="_PageFile")


class _PageFile(BaseModel):
    """``command`` is what a reader types to make the file again."""

    model_config = ConfigDict(extra="forbid")
    command: str


class Sample(BaseModel):
    """A prompt and what each arm's student wrote after it; ``reference`` is the answer that was looked for."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    reference: str | None = None
    answers: dict[str, str]


class SamplesFile(_PageFile):
    """``samples.json``: generations to read side by side."""

    samples: list[Sample]


class LayerMeasure(BaseModel):
    """One quantity of every compared student layer: ``values[arm][i]`` belongs to ``layers[i]``."""

    model_config = ConfigDict(extra="forbid")
    name: str
    layers: list[int]
    values: dict[str, list[float | None]]

    @model_validator(mode="after")
    def _as_many_values_as_layers(self) -> LayerMeasure:
        for arm, values in self.values.items():
            if len(values) != len(self.layers):
                raise ValueError(f"{self.name} of arm {arm} has {len(values)} values for {len(self.layers)} layers")
        return self


class LayersFile(_PageFile):
    """``layers.json``: what was measured layer by layer, shown as heat maps."""

    measures: list[LayerMeasure]


def read_page_file(folder: Path, name: str, kind: type[Content]) -> Content | None:
    """The file ``name`` of ``folder``, or None where there is none.

    Raises:
        ReportError: it is there and is not what ``kind`` says.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its start"
        raise ReportError(f"{path} cannot be shown: {first['msg']} at {place}; make it again or remove it") from error
