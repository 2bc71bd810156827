import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from kvgraft.errors import ProjectorError
from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.settings import teacher_config_from

CONFIGS = {
    "Qwen2.5-7B": {"d_model": 24, "num_layers": 3},
    "Qwen2_5-7B": {"d_model": 16, "num_layers": 2},
    "org/model.v1": {"d_model": 32, "num_layers": 3, "kv_dim": 8},
}
STUDENT = 10


def pair(width: int, layers: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(2, layers, 5, width), torch.randn(2, layers, 5, width)


def kv(layers: int, heads: int, head_dim: int) -> KV:
    keys, values = torch.randn(2, 2, layers, heads, 5, head_dim).unbind(0)
    return KV(keys, values, torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool), tuple(range(layers)))


def test_guide_defaults() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT)
    assert projector.config["mlp_ratio"] == 1.0
    assert projector.config["dropout"] == 0.1
    assert projector.config["init_method"] == "xavier"
    assert projector.direction == "teacher_to_student"
    key, value = projector.adapters("org/model.v1")
    assert (key.in_dim, key.out_dim, key.num_layers, key.activation) == (8, STUDENT, 1, "silu")
    assert key.norm is not None
    assert key.skip is None
    assert key is not value


@pytest.mark.parametrize("per_layer", [False, True])
def test_every_name_has_its_own_adapters_and_order_is_kept(per_layer: bool) -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT, per_layer=per_layer).eval()
    kvs = {"org/model.v1": pair(8), "Qwen2_5-7B": pair(16, 2), "Qwen2.5-7B": pair(24)}
    projected = projector.project_multi_teacher_kv(kvs)
    assert list(projected) == list(kvs)
    for name, (keys, values) in kvs.items():
        key_adapter, value_adapter = projector.adapters(name)
        assert torch.equal(projected[name][0], key_adapter(keys))
        assert torch.equal(projected[name][1], value_adapter(values))
        assert projected[name][0].shape == (2, CONFIGS[name]["num_layers"], 5, STUDENT)
    assert not torch.equal(projected["org/model.v1"][0], projector.adapters("org/model.v1")[1](kvs["org/model.v1"][0]))


def test_heads_pairs_and_kv_give_the_same() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT).eval()
    with_heads = kv(3, 2, 4)
    joined = with_heads.flatten()
    assert torch.equal(joined[0][0, 1, 2], with_heads.keys[0, 1, :, 2].flatten())
    expected = projector.project_teacher_kv("org/model.v1", *joined)
    for given in ((with_heads,), (with_heads.keys, with_heads.values), (joined,)):
        assert torch.equal(projector.project_teacher_kv("org/model.v1", *given)[1], expected[1])


def test_student_to_teacher_goes_the_other_way() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT, 1.5, direction="student_to_teacher", per_layer=True)
    key, _ = projector.adapters("Qwen2.5-7B")
    assert (key.in_dim, key.up.weight.shape[1], key.out_dim, key.num_layers) == (STUDENT, 15, 24, 3)
    keys, values = projector.project_student_kv("org/model.v1", kv(3, 2, 5))
    assert keys.shape == values.shape == (2, 3, 5, 8)


def test_the_wrong_direction_says_which_it_was_built_for() -> None:
    forwards = KVDimensionProjector(CONFIGS, STUDENT)
    backwards = KVDimensionProjector(CONFIGS, STUDENT, direction="student_to_teacher")
    with pytest.raises(ProjectorError, match="built for 'teacher_to_student'"):
        forwards.project_student_kv("Qwen2.5-7B", *pair(STUDENT))
    with pytest.raises(ProjectorError, match="built for 'student_to_teacher'"):
        backwards.project_teacher_kv("Qwen2.5-7B", *pair(24))
    with pytest.raises(ProjectorError, match="built for 'student_to_teacher'"):
        backwards.project_multi_teacher_kv({"Qwen2.5-7B": pair(24)})


def test_unknown_teacher_lists_the_known() -> None:
    with pytest.raises(ProjectorError, match=r"'Qwen2'.*Qwen2\.5-7B, Qwen2_5-7B, org/model\.v1"):
        KVDimensionProjector(CONFIGS, STUDENT).project_teacher_kv("Qwen2", *pair(24))


def test_wrong_width_explains_grouped_query_attention() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT)
    with pytest.raises(
        ProjectorError, match=r"Qwen2\.5-7B.* 4 wide.*take 24.*num_kv_heads \* head_dim.*_from"
    ) as raised:
        projector.project_multi_teacher_kv({"Qwen2.5-7B": pair(4)})
    assert '"kv_dim": 4' in str(raised.value)
    with pytest.raises(ProjectorError, match=r"org/model\.v1.* 32 wide.*take 8.*hidden size"):
        projector.project_teacher_kv("org/model.v1", *pair(32))
    backwards = KVDimensionProjector(CONFIGS, STUDENT, direction="student_to_teacher")
    with pytest.raises(ProjectorError, match=r"Qwen2\.5-7B.* 7 wide.*student_d_model is 10.*kv_dim"):
        backwards.project_student_kv("Qwen2.5-7B", *pair(7))


@pytest.mark.parametrize(("per_layer", "layers"), [(False, 4), (True, 4), (True, 2)])
def test_wrong_layer_count(per_layer: bool, layers: int) -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT, per_layer=per_layer)
    with pytest.raises(ProjectorError, match=rf"Qwen2\.5-7B.*{layers} layers.*num_layers=3"):
        projector.project_teacher_kv("Qwen2.5-7B", *pair(24, layers))


def test_shared_adapter_takes_layers_mapped_to_a_shallower_student() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT).eval()
    keys, values = pair(24)
    whole, _ = projector.project_teacher_kv("Qwen2.5-7B", keys, values)
    part, _ = projector.project_teacher_kv("Qwen2.5-7B", keys[:, :2], values[:, :2])
    torch.testing.assert_close(part, whole[:, :2])


def test_standardised_outputs_are_target_units_and_survive_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    projector = KVDimensionProjector(CONFIGS, STUDENT, per_layer=True, direction="student_to_teacher").eval()
    keys, values = pair(STUDENT)
    plain = projector.project_student_kv("Qwen2.5-7B", keys, values)
    mean, deviation = torch.randn(2, 3, 24), torch.rand(2, 3) + 0.5
    parameters = projector.count_parameters()
    projector.standardise_outputs("Qwen2.5-7B", mean, deviation)
    assert projector.count_parameters() == parameters
    projector.save_pretrained(tmp_path)
    loaded = KVDimensionProjector.from_pretrained(tmp_path).eval()
    for made in (projector, loaded):
        for kind, output in enumerate(made.project_student_kv("Qwen2.5-7B", keys, values)):
            expected = mean[kind][None, :, None] + deviation[kind][None, :, None, None] * plain[kind]
            torch.testing.assert_close(output, expected)
    with pytest.raises(ProjectorError, match=r"Qwen2\.5-7B.*\[2, 3, 24\]"):
        projector.standardise_outputs("Qwen2.5-7B", mean[:, :2], deviation)


def test_malformed_kv() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT)
    keys, values = pair(24)
    with pytest.raises(ProjectorError, match="share one shape"):
        projector.project_teacher_kv("Qwen2.5-7B", keys, values[:, :, :4])
    with pytest.raises(ProjectorError, match=r"got \[3, 5, 24\]"):
        projector.project_teacher_kv("Qwen2.5-7B", keys[0], values[0])
    with pytest.raises(ProjectorError, match="got Tensor and NoneType"):
        projector.project_teacher_kv("Qwen2.5-7B", keys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_configs": {}}, r"teacher_configs must be \{.*got \{\}"),
        ({"teacher_configs": ["big"]}, r"teacher_configs must be \{.*got \['big'\]"),
        ({"teacher_configs": {"a": {"d_model": 4}}}, "'a'.*num_layers"),
        ({"teacher_configs": {"a": {"d_model": 4, "num_layers": 1, "kvdim": 2}}}, "'a'.*kvdim"),
        ({"teacher_configs": {"a": {"d_model": 0, "num_layers": 1}}}, "d_model of teacher 'a'"),
        ({"student_d_model": -1}, "student_d_model"),
        ({"mlp_ratio": "wide"}, "mlp_ratio"),
        ({"mlp_ratio": -1.0}, "mlp_ratio"),
        ({"dropout": 1.5}, "dropout"),
        ({"init_method": "zeros"}, "init_method"),
        ({"activation": "tanh"}, "activation"),
        ({"direction": "both"}, "direction"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ProjectorError, match=message):
        KVDimensionProjector(**{"teacher_configs": CONFIGS, "student_d_model": STUDENT, **settings})


def test_auto_ratio_goes_by_each_teachers_width() -> None:
    configs = {
        "small": {"d_model": 4095, "num_layers": 1},
        "middle": {"d_model": 4096, "num_layers": 1},
        "wide": {"d_model": 6144, "num_layers": 1},
        "grouped": {"d_model": 8192, "num_layers": 1, "kv_dim": 1024},
    }
    with torch.device("meta"):
        projector = KVDimensionProjector(configs, 64, "auto")
    hidden = {name: projector.adapters(name)[0].up.weight.shape[1] for name in configs}
    assert hidden == {"small": 2047, "middle": 4096, "wide": 12288, "grouped": 512}


@pytest.mark.parametrize("per_layer", [False, True])
def test_parameters_are_adapter_times_teachers_times_two(per_layer: bool) -> None:
    config = {"d_model": 12, "num_layers": 4}
    projector = KVDimensionProjector({"a": config, "b": config, "c": config}, STUDENT, per_layer=per_layer)
    adapter = sum(parameter.numel() for parameter in projector.adapters("a")[0].parameters())
    one = 2 * 12 + 12 * 12 + 12 + 12 * STUDENT + STUDENT
    assert adapter == (4 if per_layer else 1) * one
    assert projector.count_parameters() == adapter * 3 * 2


def test_trainable_false_freezes() -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT, trainable=False)
    assert projector.count_parameters() > 0
    assert not any(parameter.requires_grad for parameter in projector.parameters())
    assert not projector.project_teacher_kv("Qwen2.5-7B", *pair(24))[0].requires_grad


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_saved_and_loaded_is_the_same(tmp_path: Path, direction: str) -> None:
    projector = KVDimensionProjector(
        CONFIGS, STUDENT, 0.5, 0.2, "kaiming", False, per_layer=True, direction=direction, activation="gelu", skip=True
    )
    projector.save_pretrained(tmp_path / "deep" / "folder")
    loaded = KVDimensionProjector.from_pretrained(tmp_path / "deep" / "folder")
    assert loaded.config == projector.config
    assert loaded.state_dict().keys() == projector.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in projector.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "config.json",
        "projector.safetensors",
    ]


def test_loaded_projector_trains(tmp_path: Path) -> None:
    KVDimensionProjector(CONFIGS, STUDENT).save_pretrained(tmp_path)
    loaded = KVDimensionProjector.from_pretrained(tmp_path)
    loaded.project_teacher_kv("Qwen2.5-7B", *pair(24))[0].sum().backward()
    assert loaded.adapters("Qwen2.5-7B")[0].up.weight.grad is not None


def test_saves_weights_gathered_elsewhere(tmp_path: Path) -> None:
    projector = KVDimensionProjector(CONFIGS, STUDENT)
    weights = {name: torch.full_like(tensor, 0.5) for name, tensor in projector.state_dict().items()}
    projector.save_pretrained(tmp_path, state_dict=weights)
    loaded = KVDimensionProjector.from_pretrained(tmp_path)
    assert all((parameter == 0.5).all() for parameter in loaded.parameters())
    weights.pop("key_adapters.0.up.weight")
    with pytest.raises(ProjectorError, match=r"key_adapters\.0\.up\.weight"):
        projector.save_pretrained(tmp_path, state_dict=weights)


def test_loading_says_what_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ProjectorError, match=r"no config\.json"):
        KVDimensionProjector.from_pretrained(tmp_path / "absent")
    KVDimensionProjector(CONFIGS, STUDENT).save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    weights = (tmp_path / "projector.safetensors").read_bytes()
    for text, message in [
        ("{", "not JSON"),
        ("[]", "format_version None"),
        (json.dumps({**json.loads(saved), "format_version": 99}), "format_version 99"),
        (json.dumps({**json.loads(saved), "color": "red"}), "color"),
        (json.dumps({**json.loads(saved), "teacher_configs": [1]}), r"config\.json"),
        (json.dumps({**json.loads(saved), "student_d_model": STUDENT + 1}), "does not go with"),
        (json.dumps({**json.loads(saved), "skip": True}), "does not go with"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ProjectorError, match=message):
            KVDimensionProjector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(saved)
    (tmp_path / "projector.safetensors").write_bytes(weights[:40])
    with pytest.raises(ProjectorError, match="damaged"):
        KVDimensionProjector.from_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").unlink()
    with pytest.raises(ProjectorError, match=r"no projector\.safetensors"):
        KVDimensionProjector.from_pretrained(tmp_path)


def test_weight_decay_spares_norms_and_biases() -> None:
    """The Trainer finds what not to decay by name; ours have to look like everybody's."""
    projector = KVDimensionProjector(CONFIGS, STUDENT, skip=True)
    decayed = Trainer.get_decay_parameter_names(SimpleNamespace(), projector)
    assert {name.split(".", 2)[2] for name in decayed} == {"up.weight", "down.weight", "skip.weight"}


def test_teacher_config_from_a_grouped_query_model() -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
        vocab_size=16,
    )
    expected = {"d_model": 32, "num_layers": 2, "kv_dim": 16}
    assert teacher_config_from(config) == expected
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert teacher_config_from(model) == expected
    assert KVDimensionProjector({"t": teacher_config_from(config)}, STUDENT).adapters("t")[0].in_dim == 16
    with pytest.raises(ProjectorError, match="got dict"):
        teacher_config_from({"d_model": 3})


SOURCES = {"wide": [[2, 0], [1, 1], [0, 2], [3, 2], [1, 0]]}


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
@pytest.mark.parametrize("kinds", ["same", "both"])
def test_sources_are_the_chosen_layers_joined(kinds: str, direction: str) -> None:
    configs = {"wide": {"d_model": 12, "num_layers": 4}}
    projector = KVDimensionProjector(
        configs, 8, sharing="per_layer", direction=direction, source_layers=SOURCES, source_kinds=kinds
    )
    width = 12 if direction == "teacher_to_student" else 8
    keys, values = torch.randn(2, 4, 3, width), torch.randn(2, 4, 3, width)
    sources = projector.sources_of("wide", keys, values)
    for layer, (first, second) in enumerate(SOURCES["wide"]):
        of_keys = torch.cat([keys[:, first], keys[:, second]], -1)
        of_values = torch.cat([values[:, first], values[:, second]], -1)
        both = torch.cat([of_keys, of_values], -1)
        expected = (both, both) if kinds == "both" else (of_keys, of_values)
        assert torch.equal(sources[0][:, layer], expected[0])
        assert torch.equal(sources[1][:, layer], expected[1])
    project = getattr(projector, _METHODS[direction])
    assert project("wide", keys, values)[0].shape == (2, 5, 3, 20 - width)


_METHODS = {"teacher_to_student": "project_teacher_kv", "student_to_teacher": "project_student_kv"}


def test_standardised_both_ways_saves_loads_and_means_what_it_says(tmp_path) -> None:
    configs = {"wide": {"d_model": 12, "num_layers": 4}}
    projector = KVDimensionProjector(
        configs,
        8,
        sharing="trunk",
        num_groups=2,
        init_method="least_squares",
        source_layers=SOURCES,
        source_kinds="both",
    ).eval()
    mean, deviation = torch.randn(2, 4, 12), torch.rand(2, 4, 12) + 0.5
    out_mean, out_deviation = torch.randn(2, 5, 8), torch.rand(2, 5) + 0.5
    projector.standardise_inputs("wide", mean, deviation)
    projector.standardise_outputs("wide", out_mean, out_deviation)
    for adapter in projector.adapters("wide"):
        torch.nn.init.normal_(adapter.skip.weight)
    keys, values = torch.randn(1, 4, 3, 12), torch.randn(1, 4, 3, 12)
    projected = projector.project_teacher_kv("wide", keys, values)
    standard = [(part - mean[kind][:, None]) / deviation[kind][:, None] for kind, part in enumerate((keys, values))]
    plain = KVDimensionProjector(**projector.config).eval()
    plain.load_state_dict(projector.state_dict(), strict=False)
    for kind, (given, wanted) in enumerate(zip(plain.project_teacher_kv("wide", *standard), projected, strict=True)):
        expected = out_mean[kind][:, None] + out_deviation[kind][:, None, None] * given
        torch.testing.assert_close(wanted, expected)
    targets = projector.targets_of("wide", *projected)
    torch.testing.assert_close(targets[1], plain.project_teacher_kv("wide", *standard)[1], atol=1e-5, rtol=1e-5)
    projector.save_pretrained(tmp_path)
    loaded = KVDimensionProjector.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.project_teacher_kv("wide", keys, values)[0], projected[0])
    assert loaded.config == projector.config


@pytest.mark.parametrize("learning", [False, True])
def test_bfloat16_keeps_what_stands_far_from_zero(learning: bool, tmp_path: Path) -> None:
    """As outlier channels do: in bfloat16 a number of 1000 is off by up to 4."""
    torch.manual_seed(0)
    projector = KVDimensionProjector(
        {"wide": {"d_model": 12, "num_layers": 4}}, 8, per_layer=True, init_method="least_squares"
    )
    for side, shape in (("input", (2, 4, 12)), ("output", (2, 4))):
        mean = 1000 + torch.rand(2, 4, 12 if side == "input" else 8)
        getattr(projector, f"standardise_{side}s")("wide", mean, torch.ones(shape))
    for adapter in projector.eval().adapters("wide"):
        torch.nn.init.normal_(adapter.skip.weight, std=12**-0.5)
    keys, values = (1000 + torch.randn(2, 4, 50, 12) for _ in range(2))
    plain = projector.project_teacher_kv("wide", keys, values)
    halved = projector.compute_in(torch.bfloat16)
    halved.save_pretrained(tmp_path)
    with torch.set_grad_enabled(learning):
        for made in (halved, KVDimensionProjector.from_pretrained(tmp_path)):
            assert made.adapters("wide")[0].skip.weight.dtype == torch.bfloat16
            for found, expected in zip(made.project_teacher_kv("wide", keys, values), plain, strict=True):
                torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
                assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_layers": {"other": [[0]]}}, "names teachers"),
        ({"source_layers": {"wide": [[0], [1, 2]]}}, "equally many"),
        ({"source_layers": {"wide": [0, 2]}}, r"'wide' must be a list.*got \[0, 2\]"),
        ({"source_layers": {"wide": [[4]]}}, r"0\.\.3"),
        ({"source_layers": {"wide": 3}}, "source_layers must be .* got {'wide': 3}"),
        ({"source_layers": [[0]]}, r"source_layers must be .* got \[\[0\]\]"),
        ({"sharing": "some"}, "sharing must be one of"),
        ({"source_kinds": "keys"}, "source_kinds must be one of"),
        ({"per_layer": True, "sharing": "trunk"}, "contradict"),
        ({"sharing": "grouped", "num_groups": 5}, "more than the 4 layers"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ProjectorError, match=message):
        KVDimensionProjector({"wide": {"d_model": 12, "num_layers": 4}}, 8, **settings)


@pytest.mark.parametrize(("sharing", "sets"), [("shared", 1), ("grouped", 2), ("trunk", 4), ("per_layer", 4)])
def test_sharing_counts(sharing: str, sets: int) -> None:
    projector = KVDimensionProjector(
        {"wide": {"d_model": 12, "num_layers": 4}}, 8, 1.0, sharing=sharing, num_groups=2 if sharing != "shared" else 1
    )
    trunks = 2 if sharing == "trunk" else sets
    matrices, vectors = 12 * 12 + 12 * 8, 2 * 12 + 12 + 8
    assert projector.count_parameters() == 2 * (trunks * matrices + sets * vectors)
