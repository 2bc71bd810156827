"""The sections of a recipe: each one capability, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Objective = Literal["student_to_teacher", "teacher_to_student", "alternating", "shared", "relational"]
Arm = Literal["baseline", "kv", "mismatched", "shared_objective", "logits", "kv_logits"]
# Those that learn from what teachers say comes next.
LOGIT_ARMS: tuple[Arm, ...] = ("logits", "kv_logits")
LogitForm = Literal["forward_kl", "reverse_kl", "jsd", "sorted_probability", "chunk_likelihood"]
# Of these, those that compare models of different vocabularies too.
ACROSS_VOCABULARIES: tuple[LogitForm, ...] = ("sorted_probability", "chunk_likelihood")
Schedule = Literal["constant", "linear_decay"]
Combination = Literal["mean", "weights", "learned", "confidence"]
TokenPolicy = Literal["cover", "causal", "mean"]
LayerSpec = Literal["auto", "ratio", "last", "origin", "cka", "predictive"] | list[tuple[int, int]]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherAlignmentRecipe(Section):
    """What one teacher does otherwise than the recipe's ``alignment`` says; what is left out stays as it is there."""

    tokens: TokenPolicy | None = None
    layers: LayerSpec | None = None
    skip_first_tokens: Annotated[int, Field(ge=0)] | None = None


class TeacherRecipe(Section):
    """A model whose KV is the target.

    ``model`` is a hub id, a local folder, a ``.gguf`` file, or ``package:MODULE/FILE`` for a file that an installed
    Python package carries. ``weight`` goes with ``kv_loss.combine: weights``. ``long_texts: cut`` lets a teacher whose
    context is shorter than what the student reads of a text answer for the part that it can read.

    ``quantization`` loads the weights in few bits (extra ``quantization``): ``8bit`` and ``4bit`` with bitsandbytes,
    ``torchao_8bit`` with torchao. ``device_map`` puts parts of the model on several devices, in memory or on disk:
    ``auto``, or parts and places as accelerate reads them; without it the whole model is on ``device``.
    ``tensor_parallel`` shares the model among the processes that run, each with some of its heads.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["8bit", "4bit", "torchao_8bit"] | None = None
    device: str = "auto"
    device_map: Literal["auto"] | dict[str, int | str] | None = None
    tensor_parallel: bool = False
    weight: Weight | None = None
    alignment: TeacherAlignmentRecipe = TeacherAlignmentRecipe()
    long_texts: Literal["refuse", "cut"] = "refuse"

    @model_validator(mode="after")
    def _one_place(self) -> TeacherRecipe:
        if self.device != "auto" and self.device_map is not None:
            raise ValueError(
                f"device {self.device} and device_map {self.device_map} both say where the teacher is; leave one out"
            )
        device = None if self.device == "auto" else self.device
        others = {"device": device, "device_map": self.device_map, "quantization": self.quantization}
        given = [f"{name} {value}" for name, value in others.items() if value is not None]
        if self.tensor_parallel and given:
            raise ValueError(
                "tensor_parallel puts a part of the weights as they are on each process's own device, and does not go "
                f"with {', '.join(given)}; leave one out"
            )
        return self


class LoraRecipe(Section):
    """Low-rank adapters in place of full fine-tuning, as peft's LoraConfig has them.

    ``target_modules`` names modules of the student, as ``q_proj``; ``all-linear`` is every linear one but the head.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"


class StudentRecipe(Section):
    """The model that is trained: an existing one (``model``), a new one (``new``: fields of a transformers config), or
    one cut from a larger model (``cut_from``).

    ``layers`` says which layers of ``cut_from`` are kept, or how many, spread evenly; ``every`` keeps every so many.
    ``lora`` trains adapters of an existing one and leaves its weights as they are.

    ``tokenizer`` names one to use; without it an existing model brings its own, and for a new one a byte-level BPE
    of ``vocab_size`` entries, 256 bytes and an end of text among them, is trained on the training text.
    ``embeddings_from`` names a teacher: a new student's token starts from the mean embedding of the teacher's tokens
    that stand for the same text, in as many principal components as the student is wide.
    """

    model: str | None = None
    revision: str | None = None
    new: dict[str, Any] | None = None
    cut_from: str | None = None
    layers: list[int] | Positive | None = None
    every: Positive | None = None
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=257)] = 2048
    embeddings_from: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    lora: LoraRecipe | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> StudentRecipe:
        if sum(origin is not None for origin in (self.model, self.new, self.cut_from)) != 1:
            raise ValueError(
                "give either `model` (an existing one), or `new` (config fields of a new one), or `cut_from` (a model "
                "of which some layers are kept)"
            )
        if (self.layers is not None) + (self.every is not None) != (self.cut_from is not None):
            raise ValueError("`cut_from` takes either `layers` or `every`, and they take `cut_from`")
        if self.embeddings_from is not None and self.new is None:
            raise ValueError("`embeddings_from` is for a `new` student; one that exists or was cut has embeddings")
        if self.lora is not None and self.model is None:
            raise ValueError(
                "`lora` adapts a model that exists; write it (`kvgraft cut`, say) and give `model`, or leave it out"
            )
        return self


class ColumnsRecipe(Section):
    """One form of a row: what stands for each of its columns, another column or text with ``{column}`` in it."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    question: str | None = None
    answer: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ColumnsRecipe:
        given = self.model_dump(exclude_none=True).keys()
        if given not in ({"messages"}, {"prompt", "completion"}, {"question", "answer"}, {"text"}):
            raise ValueError(
                "columns name messages, prompt and completion, question and answer, or text; got "
                + (", ".join(given) or "none")
            )
        return self


class DataRecipe(Section):
    """The text. ``train`` and ``held_out`` are ``word_problems``, ``gsm8k``, a file or a hub data set.

    ``held_out`` defaults to the held-out part of ``train``. ``seed`` draws the word problems. Lengths are in tokens of
    the student. ``chat_template`` says how ``messages`` are read: ``student``: both models read the text that the
    student's template makes (lines of ``role: content`` where it has none); ``own``: each model reads them in its own
    template, and only what was said is aligned. ``loss_on: completion`` learns every turn of the assistant.

    ``streaming`` reads hub data no further than ``train_samples`` needs, without storing it. ``shuffle_buffer`` mixes
    the training texts: it reads so many rows ahead and takes one of them each time, by ``seed``.
    ``columns`` is for rows of other columns, in ``held_out`` too.
    """

    train: str = "word_problems"
    held_out: str | None = None
    train_samples: Positive | None = None
    held_out_samples: Positive | None = None
    seed: int = 0
    max_length: Annotated[int, Field(gt=1)] = 512
    loss_on: Literal["all", "completion"] = "all"
    chat_template: Literal["student", "own"] = "student"
    streaming: bool = False
    shuffle_buffer: Positive | None = None
    columns: ColumnsRecipe | None = None

    @model_validator(mode="after")
    def _streams_end(self) -> DataRecipe:
        if self.streaming and self.train_samples is None:
            raise ValueError("streaming needs train_samples: how many texts of the stream to take")
        return self


class AlignmentRecipe(Section):
    """Which teacher token and layer answers for which of the student's.

    ``layers: auto`` is ``origin`` (the layer that it was) for a student cut from the teacher, else ``ratio``; ``cka``
    and ``predictive`` are what both models' KV of the first training texts says. ``skip_first_tokens`` leaves the first
    tokens of every text out of the KV loss: they act as attention sinks and carry norms unlike the rest.
    """

    tokens: TokenPolicy = "cover"
    layers: LayerSpec = "auto"
    skip_first_tokens: Annotated[int, Field(ge=0)] = 2


class ProjectorRecipe(Section):
    """The adapters between the two widths. ``mlp_ratio: linear`` is one linear map, without the bottleneck.

    ``init_method: identity`` starts from the KV as it is, for a student cut from its teacher; ``least_squares`` from
    the best linear map. In a file or an override, ``preset: fast``, ``standard`` or ``enhanced`` stands for the first
    three fields as in the founding guide (docs/mlp-ratio.md).
    """

    mlp_ratio: Annotated[float, Field(gt=0)] | Literal["auto", "linear"] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init_method: Literal["xavier", "kaiming", "normal", "least_squares", "identity"] = "xavier"
    sharing: Literal["shared", "per_layer", "grouped", "trunk"] = "per_layer"
    num_groups: Positive = 1
    layer_norm: bool = True
    activation: Literal["silu", "relu", "gelu"] = "silu"
    skip: bool = True

    @model_validator(mode="after")
    def _identity_of_each_layer(self) -> ProjectorRecipe:
        if self.init_method == "identity" and self.sharing not in ("per_layer", "trunk"):
            raise ValueError("init_method identity needs a linear part for each layer; set sharing: per_layer or trunk")
        return self


class ContinuationRecipe(Section):
    """How a projector is trained through the frozen student, on texts with a prompt and a completion.

    ``target: text`` is cross-entropy of the completion; ``own_reading`` is KL from what the student says of it after
    reading the prompt itself. A step takes completions of like length, as many as have the tokens of
    ``texts_per_step`` on average. ``bf16`` trains with matrix products in bfloat16, through the student too.
    """

    target: Literal["text", "own_reading"] = "text"
    bf16: bool = False
    steps: Positive = 40
    texts_per_step: Positive = 4
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.01
    evaluate_every: Positive = 20
    save_every: Positive = 20


class FitRecipe(Section):
    """How ``kvgraft fit`` fits the projector between two frozen models.

    ``sources`` is how many layers each adapter reads: 1 is the layer of ``alignment.layers``, more are those chosen by
    what each adds on held-out tokens. ``fewer_sources`` fits least squares from the first one, two and so on of them
    too, in the same pass. ``source_kinds: both`` makes keys and values each from keys and values.
    ``context_tokens`` lets them read so many tokens before each.
    ``objective`` is what is trained for, from least squares on: ``regression`` on the other model's KV; ``attention``,
    the same with each token counted by how much the student's attention reads it, in least squares too; or
    ``continuation``, which after the regression trains on what follows a prompt, through the frozen student.
    ``metric: queries`` whitens errors of keys by the queries that will meet them. ``ridge: auto`` is chosen on texts
    that are kept out of the fit. ``bf16`` computes the regression's matrix products in bfloat16; weights, closed form
    and what is reported stay in float32.
    """

    objective: Literal["regression", "attention", "continuation"] = "regression"
    continuation: ContinuationRecipe = ContinuationRecipe()
    direction: Literal["teacher_to_student", "student_to_teacher"] = "teacher_to_student"
    sources: Positive = 1
    fewer_sources: bool = False
    source_kinds: Literal["same", "both"] = "both"
    context_tokens: Annotated[int, Field(ge=0)] = 0
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    metric: Literal["plain", "queries"] = "plain"
    steps: Annotated[int, Field(ge=0)] = 600
    tokens_per_step: Positive = 1024
    bf16: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.01
    evaluate_every: Positive = 100
    save_every: Positive = 100
    scan_tokens: Positive = 4096


class GraftRecipe(Section):
    """How ``kvgraft graft`` measures what a projected cache is worth to the student.

    ``own_first_tokens`` of every text keep the student's own KV: they act as attention sinks. ``texts`` limits how many
    held-out texts are measured.
    ``trained`` are grafts that go on from the fitted projector and are trained on what follows, as
    ``fit.continuation`` says: ``continuation`` replaces the student's cache; ``gated`` mixes into it, by a gate for
    each layer and head; ``joint`` changes it by adapters that read both; ``both`` stands in front of it; ``own`` is the
    control, the same adapters on the student's own KV. ``layer_groups`` says in how many groups of layers the projected
    cache is tried alone. ``first_token`` is after how many tokens of text the time to the first token is measured, 0
    for not at all. ``bf16`` projects in bfloat16 when all this is measured and in `kvgraft chat`; what is trained is
    trained as ``fit`` says.
    """

    own_first_tokens: Annotated[int, Field(ge=0)] = 4
    texts: Positive | None = None
    trained: list[Literal["continuation", "own", "gated", "both", "joint"]] = Field(default_factory=list)
    layer_groups: Annotated[int, Field(ge=0)] = 0
    first_token: Annotated[int, Field(ge=0)] = 1024
    bf16: bool = False


class KVLossRecipe(Section):
    """How the student's KV is compared with the teachers'.

    ``student_to_teacher`` (default) predicts the teacher's fixed KV from the student's; ``teacher_to_student`` pulls
    the student to a projector that was fitted once and frozen; ``alternating`` and ``shared`` train the projector and
    the student on each other and are kept for comparison. ``relational`` needs no projector: tokens of the student
    should stand to each other as the teacher's do, in each of ``relation_heads`` pieces of the KV width (``form`` then
    means nothing). A kind (keys or values) whose weight is 0 is left out.
    ``gradient_share`` sets the weight again and again so that this part has that share of the student's gradient norm.
    ``combine`` makes one loss of several teachers' (:mod:`kvgraft.distill.fusion`): ``mean``, ``weights`` (those of
    the teachers), ``learned``, or ``confidence``, by how likely each teacher finds the text.
    ``source: online`` runs the teachers in every step, and again in every evaluation, in place of reading a store; the
    centre and spread of their KV then come from the first ``calibration_texts`` training texts.
    ``compile`` lets ``torch.compile`` make the adapters' steps, which takes some seconds at first and, on a CPU, a C++
    compiler.
    """

    objective: Objective = "student_to_teacher"
    combine: Combination = "mean"
    form: Literal["mse", "l1", "smooth_l1", "cosine"] = "mse"
    weight: Weight = 10.0
    gradient_share: Share | None = None
    schedule: Schedule = "constant"
    keys_weight: Weight = 1.0
    values_weight: Weight = 1.0
    layer_weights: list[Weight] | None = None
    relation_heads: Positive = 4
    source: Literal["store", "online"] = "store"
    compile: bool = False
    calibration_texts: Positive = 128

    @model_validator(mode="after")
    def _confidence_needs_a_store(self) -> KVLossRecipe:
        if self.source == "online" and self.combine == "confidence":
            raise ValueError(
                "combine: confidence reads likelihoods that lie beside a store, and source: online keeps none; set "
                "source: store, or another combine"
            )
        return self

    @model_validator(mode="after")
    def _something_weighs(self) -> KVLossRecipe:
        if self.keys_weight + self.values_weight == 0:
            raise ValueError("keys_weight and values_weight are both 0, which compares nothing; give one a weight")
        if self.layer_weights is not None and not any(self.layer_weights):
            raise ValueError(f"layer_weights {self.layer_weights} compare nothing; give a layer a weight above 0")
        return self


class LogitLossRecipe(Section):
    """How the student's next-token distributions are compared with the teachers', in the arms that do so.

    For one tokenizer: ``forward_kl``, ``reverse_kl`` or ``jsd`` with its ``beta``. For different ones:
    ``sorted_probability`` or ``chunk_likelihood``, whose paper uses a ``temperature`` of 100. ``source: store`` keeps
    the ``top_k`` most likely tokens of each place and the mass of the rest; ``online`` runs the teacher in every step
    and compares whole distributions. ``gradient_share`` as in ``kv_loss``.
    """

    form: LogitForm = "forward_kl"
    weight: Weight = 1.0
    gradient_share: Share | None = None
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    schedule: Schedule = "constant"
    source: Literal["store", "online"] = "store"
    top_k: Positive = 32


class StoreRecipe(Section):
    """Where the teachers' KV is kept. Each teacher and text set gets its own folder below ``path``.

    ``int8`` and ``float8`` take 0.52 of the bytes of ``float16``, ``int4`` 0.29, ``compact`` 0.055; docs/performance.md
    has what they lose, ``compact`` by far the most.
    """

    path: Path = Path("stores")
    dtype: Literal["float16", "bfloat16", "float32", "int8", "float8", "int4", "compact"] = "float16"
    shard_megabytes: Positive = 64
    token_budget: Positive = 2048
    verify: bool = True


class TrainingRecipe(Section):
    """Steps, batches and rates. ``batch_size`` counts texts over all processes and accumulation steps.

    ``batching`` says which texts make a batch: ``shuffled``: ``batch_size`` of them as they come, padded to the
    longest; ``buckets``: texts of like length; ``packed``: several texts in one row, each read as if it stood alone,
    where the student's architecture allows that. The latter two take ``tokens_per_batch``, padding included and counted
    over the same as ``batch_size``; default ``batch_size`` times the mean length of a text.
    ``report_to`` names trackers as transformers does; ``tensorboard`` writes into each arm's folder.
    """

    steps: Positive = 300
    batch_size: Positive = 8
    batching: Literal["shuffled", "buckets", "packed"] = "shuffled"
    tokens_per_batch: Positive | None = None
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
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])

    @model_validator(mode="after")
    def _tokens_need_batching(self) -> TrainingRecipe:
        if self.tokens_per_batch is not None and self.batching == "shuffled":
            raise ValueError(
                "tokens_per_batch goes with batching: buckets or packed; with shuffled, batch_size says how many texts"
            )
        return self
