import pytest
import torch

from kvgraft.errors import ProjectorError
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.presets import PRESETS
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.sizing import adapter_parameters, advise, auto_mlp_ratio

B = 10**9


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "ratio", "millions"),
    [
        (5120, 1536, "linear", 7.86),
        (5120, 1536, 0.5, 17.0),
        (5120, 1536, 1.0, 34.1),
        (5120, 1536, 2.0, 68.2),
        (3584, 2048, 0.5, 10.1),
        (8192, 2048, 2.0, 167.8),
    ],
)
def test_weight_matrices_hold_what_ruling_r2_says(
    in_dim: int, out_dim: int, ratio: float | str, millions: float
) -> None:
    counted = adapter_parameters(in_dim, out_dim, ratio, weights_only=True)
    assert counted / 1e6 == pytest.approx(millions, abs=0.06)
    with torch.device("meta"):
        adapter = ElasticBottleneck(in_dim, out_dim, ratio)
    assert counted == sum(
        p.numel() for name, p in adapter.named_parameters() if "weight" in name and "norm" not in name
    )


@pytest.mark.parametrize("ratio", ["linear", 0.3, 1.0])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_counts_equal_real_modules(ratio: float | str, skip: bool, layer_norm: bool, num_layers: int) -> None:
    adapter = ElasticBottleneck(11, 7, ratio, num_layers=num_layers, layer_norm=layer_norm, skip=skip)
    counted = adapter_parameters(11, 7, ratio, skip=skip, layer_norm=layer_norm, num_layers=num_layers)
    assert counted == sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("teacher_parameters", "mlp_ratio", "dropout"),
    [
        (7 * B, 0.5, 0.1),
        (14 * B - 1, 0.5, 0.1),
        (14 * B, 1.0, 0.1),
        (30 * B - 1, 1.0, 0.1),
        (30 * B, 2.0, 0.15),
        (70 * B, 2.0, 0.15),
        (100 * B, 2.0, 0.15),
    ],
)
def test_closing_table(teacher_parameters: int, mlp_ratio: float, dropout: float) -> None:
    advice = advise(teacher_parameters, 4096, 2048, 32)
    assert (advice.mlp_ratio, advice.dropout) == (mlp_ratio, dropout)
    assert PRESETS[advice.preset].mlp_ratio == mlp_ratio
    assert f"mlp_ratio {mlp_ratio}" in advice.reasons[0]


def test_a_size_beside_a_border_is_not_rounded_onto_it() -> None:
    """Phi-3-medium, which is called 14B and is not."""
    assert advise(13_960_238_080, 5120, 2048, 40).reasons[0] == (
        "mlp_ratio 0.5: the teacher has 13.96B parameters, under 14B."
    )


@pytest.mark.parametrize(
    ("teacher_parameters", "num_samples", "dropout"),
    [
        (7 * B, 9_999, 0.2),
        (7 * B, 10_000, 0.1),
        (7 * B, 100_000, 0.1),
        (7 * B, 100_001, 0.05),
        (None, 100_001, 0.05),
        (70 * B, 100_001, 0.15),
        (70 * B, 9_999, 0.2),
    ],
)
def test_dropout_by_data(teacher_parameters: int | None, num_samples: int, dropout: float) -> None:
    advice = advise(teacher_parameters, 4096, 2048, 32, num_samples)
    assert advice.dropout == dropout
    assert any(f"dropout {dropout}" in reason for reason in advice.reasons)


@pytest.mark.parametrize(("d_model", "ratio"), [(4095, 0.5), (4096, 1.0), (6143, 1.0), (6144, 2.0)])
def test_auto_ratio(d_model: int, ratio: float) -> None:
    assert auto_mlp_ratio(d_model) == ratio
    assert advise(None, d_model, 2048, 32).mlp_ratio == ratio


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_costs_equal_a_real_projector(per_layer: bool, direction: str) -> None:
    advice = advise(
        7 * B,
        64,
        48,
        3,
        1000,
        teacher_kv_dim=16,
        student_kv_dim=12,
        per_layer=per_layer,
        skip=True,
        direction=direction,
        tokens_per_sample=50,
    )
    configs = {"t": {"d_model": 64, "num_layers": 3, "kv_dim": 16}}
    projector = KVDimensionProjector(configs, 12, advice.mlp_ratio, per_layer=per_layer, direction=direction, skip=True)
    assert advice.projector_parameters == projector.count_parameters() == 2 * advice.adapter_parameters
    assert advice.parameter_memory_bytes == sum(p.numel() * p.element_size() for p in projector.parameters())
    assert advice.training_memory_bytes == 4 * advice.parameter_memory_bytes
    assert advice.teacher_kv_bytes == 1000 * 50 * 2 * 3 * 16 * 2


def test_unknown_length_gives_bytes_for_a_token() -> None:
    advice = advise(7 * B, 3584, 2048, 28, teacher_kv_dim=512)
    assert advice.teacher_kv_bytes is None
    assert "57,344 bytes a token" in advice.reasons[-1]


def test_presets_are_the_guides_schemes() -> None:
    schemes = {name: (preset.mlp_ratio, preset.dropout, preset.init_method) for name, preset in PRESETS.items()}
    assert schemes == {
        "fast": (0.5, 0.1, "xavier"),
        "standard": (1.0, 0.1, "xavier"),
        "enhanced": (2.0, 0.15, "xavier"),
    }


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ProjectorError, match="teacher_parameters"):
        advise(0, 4096, 2048, 32)
    with pytest.raises(ProjectorError, match="num_samples"):
        advise(None, 4096, 2048, 32, -5)
    with pytest.raises(ProjectorError, match=r"bytes_per_number.*inf"):
        advise(None, 4096, 2048, 32, bytes_per_number=float("inf"))


def test_an_unknown_direction_is_named() -> None:
    with pytest.raises(ProjectorError, match=r"direction must be one of teacher_to_student.*'teacher-to-student'"):
        advise(None, 4096, 2048, 32, direction="teacher-to-student")
