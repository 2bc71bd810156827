"""What a run is, whole."""

from __future__ import annotations

import hashlib

import yaml
from pydantic import Field, field_validator, model_validator

from kvgraft.align.evidence import EVIDENCE_METHODS
from kvgraft.recipe.sections import (
    LOGIT_ARMS,
    AlignmentRecipe,
    Arm,
    DataRecipe,
    FitRecipe,
    GraftRecipe,
    KVLossRecipe,
    LogitLossRecipe,
    ProjectorRecipe,
    Section,
    StoreRecipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)

_DEFAULT_ARMS: tuple[Arm, ...] = ("baseline", "kv")
_WEIGHTS_TOLERANCE = 5e-3


class Recipe(Section):
    """One run: teachers, a student, text, and how the first teach the second."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    teachers: list[TeacherRecipe] = Field(min_length=1)
    student: StudentRecipe
    data: DataRecipe = DataRecipe()
    alignment: AlignmentRecipe = AlignmentRecipe()
    projector: ProjectorRecipe = ProjectorRecipe()
    kv_loss: KVLossRecipe = KVLossRecipe()
    logit_loss: LogitLossRecipe = LogitLossRecipe()
    fit: FitRecipe = FitRecipe()
    graft: GraftRecipe = GraftRecipe()
    store: StoreRecipe = StoreRecipe()
    training: TrainingRecipe = TrainingRecipe()
    arms: list[Arm] = Field(default_factory=lambda: list(_DEFAULT_ARMS))

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
        planned = self.training.batching != "shuffled"
        if self.training.batch_size % self.training.gradient_accumulation_steps and not planned:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not a multiple of "
                f"training.gradient_accumulation_steps {self.training.gradient_accumulation_steps}"
            )
        return self

    @model_validator(mode="after")
    def _shares_leave_room(self) -> Recipe:
        if (self.kv_loss.gradient_share or 0) + (self.logit_loss.gradient_share or 0) >= 1:
            raise ValueError(
                "kv_loss.gradient_share and logit_loss.gradient_share leave nothing to cross-entropy; "
                "their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _weights_go_with_combine(self) -> Recipe:
        weights = {teacher.name: teacher.weight for teacher in self.teachers}
        given = [weight for weight in weights.values() if weight is not None]
        if self.kv_loss.combine != "weights":
            if given:
                raise ValueError(
                    f"teachers have weights ({weights}) and kv_loss.combine is {self.kv_loss.combine}, which uses "
                    "none; set kv_loss.combine to weights, or leave the weights out"
                )
        elif len(given) < len(weights) or abs(sum(given) - 1) > _WEIGHTS_TOLERANCE:
            raise ValueError(
                f"kv_loss.combine is weights: every teacher needs a `weight` and they must sum to 1; got {weights}, "
                f"which sum to {sum(given):g}"
            )
        return self

    @model_validator(mode="after")
    def _evidence_needs_a_trained_student(self) -> Recipe:
        layers = {teacher.name: self.alignment_of(teacher).layers for teacher in self.teachers}
        found = {name: method for name, method in layers.items() if method in EVIDENCE_METHODS}
        if found and self.student.new is not None:
            raise ValueError(
                f"alignment.layers is {found} and the student is new: the KV of random weights says nothing about "
                "which layers go together; use ratio, last or [student, teacher] pairs"
            )
        return self

    @model_validator(mode="after")
    def _shared_teachers_only_fill_stores(self) -> Recipe:
        for teacher in self.teachers:
            one_process = {
                "kv_loss.source online": self.kv_loss.source == "online",
                "logit_loss.source online": self.logit_loss.source == "online",
                "alignment.layers cka and predictive": self.alignment_of(teacher).layers in EVIDENCE_METHODS,
                "student.embeddings_from": self.student.embeddings_from == teacher.name,
            }
            asked = [name for name, is_asked in one_process.items() if is_asked]
            if teacher.tensor_parallel and asked:
                raise ValueError(
                    f"teacher {teacher.name} has tensor_parallel, which fills stores, and "
                    f"one process alone runs it for {', '.join(asked)}; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _embeddings_from_a_teacher(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        if self.student.embeddings_from not in (None, *names):
            raise ValueError(
                f"student.embeddings_from is {self.student.embeddings_from!r}; name one of the teachers: {names}"
            )
        return self

    @property
    def needs_log_probs(self) -> bool:
        """Whether an arm learns from what teachers say comes next."""
        return bool(set(LOGIT_ARMS) & set(self.arms))

    @property
    def stores_log_probs(self) -> bool:
        """Whether :attr:`needs_log_probs`, and reads them from disk."""
        return self.needs_log_probs and self.logit_loss.source == "store"

    def alignment_of(self, teacher: TeacherRecipe) -> AlignmentRecipe:
        """The recipe's alignment with what ``teacher`` does otherwise."""
        return self.alignment.model_copy(update=teacher.alignment.model_dump(exclude_none=True))

    def fingerprint(self) -> str:
        """Identity of the run: sha256 of every field that changes what an arm computes.

        Arms may be added to a run, it may be watched elsewhere, and a graft may be measured otherwise, so none of this
        counts. Of the store, only its dtype, and of the graft, what its training depends on.
        """
        unwatched = self.model_copy(update={"training": self.training.model_copy(update={"report_to": []})})
        fields = unwatched.model_dump_json(exclude={"name", "store", "arms", "graft"})
        kept = f"{self.store.dtype} {self.graft.own_first_tokens}"
        return hashlib.sha256(f"{fields} {kept}".encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
