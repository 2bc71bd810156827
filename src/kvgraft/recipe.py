"""What a run is: the YAML a user writes, as types that say what is wrong with it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvgraft.errors import RecipeError

Objective = Literal["student_to_teacher", "teacher_to_student", "alternating", "shared"]
Arm = Literal["baseline", "kv", "mismatched", "shared_objective"]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherRecipe(_Section):
    """A model whose KV is the target.

    ``model`` is a hub id, a local folder, a ``.gguf`` file, or ``package:MODULE/FILE`` for a file that an installed
    Python package carries.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    weight: Weight = 1.0


class StudentRecipe(_Section):
    """The model that is trained: an existing one (``model``) or a new one (``new``: fields of a transformers config).

    ``tokenizer`` names one to use; without it an existing model brings its own, and for a new one a byte-level BPE
    of ``vocab_size`` entries is trained on the training text.
    """

    model: str | None = None
    revision: str | None = None
    new: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: Positive = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> StudentRecipe:
        if (self.model is None) == (self.new is None):
            raise ValueError("give either `model` (an existing one) or `new` (config fields of a new one)")
        return self


class DataRecipe(_Section):
    """The text. ``train`` and ``held_out`` are ``word_problems``, ``gsm8k``, a JSONL file or a hub data set.

    ``held_out`` defaults to the held-out part of ``train``. ``seed`` draws the word problems. Lengths are in tokens of
    the student.
    """

    train: str = "word_problems"
    held_out: str | None = None
    train_samples: Positive | None = None
    held_out_samples: Positive | None = None
    seed: int = 0
    max_length: Annotated[int, Field(gt=1)] = 512
    loss_on: Literal["all", "completion"] = "all"


class AlignmentRecipe(_Section):
    """Which teacher token and layer answers for which of the student's.

    ``skip_first_tokens`` leaves the first tokens of every text out of the KV loss: they act as attention sinks and
    carry norms unlike the rest.
    """

    tokens: Literal["cover", "causal", "mean"] = "cover"
    layers: Literal["ratio", "last"] | list[tuple[int, int]] = "ratio"
    skip_first_tokens: Annotated[int, Field(ge=0)] = 2


class ProjectorRecipe(_Section):
    """The adapters between the two widths. ``mlp_ratio: linear`` is one linear map, without the bottleneck."""

    mlp_ratio: Annotated[float, Field(gt=0)] | Literal["auto", "linear"] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init_method: Literal["xavier", "kaiming", "normal", "least_squares"] = "xavier"
    sharing: Literal["shared", "per_layer", "grouped", "trunk"] = "per_layer"
    num_groups: Positive = 1
    layer_norm: bool = True
    activation: Literal["silu", "relu", "gelu"] = "silu"
    skip: bool = True


class FitRecipe(_Section):
    """How ``kvgraft fit`` fits the projector between two frozen models.

    ``sources`` is how many layers each adapter reads: 1 is the layer of ``alignment.layers``, more are those chosen by
    what each adds on held-out tokens. ``source_kinds: both`` makes keys and values each from keys and values.
    ``context_tokens`` lets them read so many tokens before each.
    ``weighting: attention`` counts a token by how much the other model's attention reads it; ``metric: queries`` weighs
    errors of keys by the queries that will meet them. ``ridge: auto`` is chosen on texts that are kept out of the fit.
    """

    direction: Literal["teacher_to_student", "student_to_teacher"] = "teacher_to_student"
    sources: Positive = 1
    source_kinds: Literal["same", "both"] = "both"
    context_tokens: Annotated[int, Field(ge=0)] = 0
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    weighting: Literal["none", "attention"] = "none"
    metric: Literal["plain", "queries"] = "plain"
    steps: Annotated[int, Field(ge=0)] = 600
    tokens_per_step: Positive = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.01
    evaluate_every: Positive = 100
    save_every: Positive = 100
    scan_tokens: Positive = 4096


class GraftRecipe(_Section):
    """How ``kvgraft graft`` measures what a projected cache is worth to the student.

    ``own_first_tokens`` of every text keep the student's own KV: they act as attention sinks. ``texts`` limits how many
    held-out texts are measured.
    """

    own_first_tokens: Annotated[int, Field(ge=0)] = 4
    texts: Positive | None = None


class KVLossRecipe(_Section):
    """How the student's KV is compared with the teachers'.

    ``student_to_teacher`` (default) predicts the teacher's fixed KV from the student's; ``teacher_to_student`` pulls
    the student to a projector that was fitted once and frozen; ``alternating`` and ``shared`` train the projector and
    the student on each other and are kept for comparison. A kind (keys or values) whose weight is 0 is left out.
    """

    objective: Objective = "student_to_teacher"
    form: Literal["mse", "l1", "smooth_l1", "cosine"] = "mse"
    weight: Weight = 10.0
    schedule: Literal["constant", "linear_decay"] = "constant"
    keys_weight: Weight = 1.0
    values_weight: Weight = 1.0
    layer_weights: list[Weight] | None = None

    @model_validator(mode="after")
    def _something_weighs(self) -> KVLossRecipe:
        if self.keys_weight + self.values_weight == 0:
            raise ValueError("keys_weight and values_weight are both 0, which compares nothing; give one a weight")
        return self


class StoreRecipe(_Section):
    """Where the teachers' KV is kept. Each teacher and text set gets its own folder below ``path``."""

    path: Path = Path("stores")
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_megabytes: Positive = 64
    token_budget: Positive = 2048
    verify: bool = True


class TrainingRecipe(_Section):
    """Steps, batches and rates. ``batch_size`` counts texts over all processes and accumulation steps."""

    steps: Positive = 300
    batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    projector_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Weight = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    evaluate_every: Positive = 25
    save_every: Positive = 100
    eval_batch_size: Positive = 16
    bf16: bool = False
    report_to: list[str] = []


class Recipe(_Section):
    """One run: teachers, a student, text, and how the first teach the second."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    teachers: list[TeacherRecipe] = Field(min_length=1)
    student: StudentRecipe
    data: DataRecipe = DataRecipe()
    alignment: AlignmentRecipe = AlignmentRecipe()
    projector: ProjectorRecipe = ProjectorRecipe()
    kv_loss: KVLossRecipe = KVLossRecipe()
    fit: FitRecipe = FitRecipe()
    graft: GraftRecipe = GraftRecipe()
    store: StoreRecipe = StoreRecipe()
    training: TrainingRecipe = TrainingRecipe()
    arms: list[Arm] = ["baseline", "kv"]

    @field_validator("teachers")
    @classmethod
    def _distinct_names(cls, teachers: list[TeacherRecipe]) -> list[TeacherRecipe]:
        names = [teacher.name for teacher in teachers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two teachers are named {repeated}; give each its own name")
        return teachers

    @field_validator("arms")
    @classmethod
    def _distinct_arms(cls, arms: list[Arm]) -> list[Arm]:
        if not arms or len(set(arms)) != len(arms):
            raise ValueError(f"name at least one arm, each once; got {arms}")
        return arms

    @model_validator(mode="after")
    def _batch_divides(self) -> Recipe:
        if self.training.batch_size % self.training.gradient_accumulation_steps:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not a multiple of "
                f"training.gradient_accumulation_steps {self.training.gradient_accumulation_steps}"
            )
        return self

    def fingerprint(self) -> str:
        """Identity of the run: sha256 of every field that changes what an arm computes.

        Arms may be added to a run, so they do not count.
        """
        return hashlib.sha256(self.model_dump_json(exclude={"name", "store", "arms"}).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read ``path`` and apply ``overrides`` of the form ``a.b=value`` (lists by index: ``teachers.0.model=...``).

    Raises RecipeError naming the file, the line where it can be told, the field, and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}; name a YAML file, for example recipes/quickstart.yaml")
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold fields such as `teachers:` and `student:`; got {type(content).__name__}")
    for override in overrides or []:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_describe(error, path, text)) from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"--set {override}: expected a.b=value, for example --set training.steps=100")
    target: Any = content
    *parents, last = dotted.split(".")
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if isinstance(target, list):
            target[int(last)] = yaml.safe_load(value)
        else:
            target[last] = yaml.safe_load(value)
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"--set {override}: there is no field {dotted} in this recipe ({error})") from error


def _describe(error: ValidationError, path: Path, text: str) -> str:
    lines = [f"{path} cannot be run as written:"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
        where = _line_of(text, problem["loc"])
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
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return f"; known here: {', '.join(section.model_fields)}"
