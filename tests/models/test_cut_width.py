"""MLPs cut by width: importance by its definition, no channel that does nothing is kept, and the same after saving."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.errors import ModelError
from kvgraft.models.capture import capture
from kvgraft.models.cut import cut_model, origin_layers
from kvgraft.models.cut_width import channel_importance, cut_intermediate, largest, require_channels
from kvgraft.models.loading import load_config, load_model
from tests.models.test_capture import model_of
from tests.models.test_cut import TOKENS, logits_of

TEXTS = [TOKENS[0].tolist(), TOKENS[1, :6].tolist()]
GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"]


@torch.no_grad()
def test_importance_is_what_a_channel_adds_to_the_residual_stream() -> None:
    model = model_of("llama")
    added = []
    for text in TEXTS:
        hidden = model.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        layer = model.model.layers[0]
        middle = (
            hidden[0]
            + layer.self_attn(
                layer.input_layernorm(hidden[0]), model.model.rotary_emb(hidden[0], torch.arange(len(text))[None]), None
            )[0]
        )
        mlp, read = layer.mlp, layer.post_attention_layernorm(middle)
        entering = nn.functional.silu(mlp.gate_proj(read)) * mlp.up_proj(read)
        # Each token's and channel's own vector in the residual stream.
        vectors = entering[0, :, :, None] * mlp.down_proj.weight.T
        added.append(vectors.square().sum(-1))
    expected = torch.cat(added).mean(0).sqrt()
    importance = channel_importance(model, TEXTS)
    assert [layer.shape for layer in importance] == [(48,)] * 3
    torch.testing.assert_close(importance[0], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", GATED)
def test_channels_that_add_nothing_go_first(family: str, tmp_path: Path) -> None:
    whole, student = model_of(family), model_of(family)
    dead = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:20]
    for model in (whole, student):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[:, dead] = 0
    kept = largest(channel_importance(student, TEXTS), 28)
    assert all(set(layer.tolist()).isdisjoint(dead.tolist()) for layer in kept)
    cut_intermediate(student, kept)
    torch.testing.assert_close(logits_of(student), logits_of(whole), rtol=1e-4, atol=1e-6)
    ours, theirs = capture(student, TOKENS), capture(whole, TOKENS)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.get_text_config().intermediate_size == 28
    assert torch.equal(logits_of(loaded), logits_of(student))


def test_layers_and_width_are_cut_together(tiny_teacher: Path, tmp_path: Path) -> None:
    command = ["cut", str(tiny_teacher), str(tmp_path / "student"), "--intermediate", "36", "--samples", "4"]
    result = CliRunner().invoke(app, [*command, "--layers", "0,2"])
    assert result.exit_code == 0, result.output
    assert "2 of 4 layers" in result.output
    assert "36 of 48 MLP channels" in result.output
    student = load_model(str(tmp_path / "student"))
    assert origin_layers(student.config, load_config(str(tiny_teacher))) == [0, 2]
    shallow = cut_model(load_model(str(tiny_teacher)), [0, 2])
    assert student.model.layers[1].mlp.up_proj.weight.shape == (36, 32)
    assert torch.equal(student.model.layers[1].self_attn.k_proj.weight, shallow.model.layers[1].self_attn.k_proj.weight)
    rows = shallow.model.layers[1].mlp.up_proj.weight.tolist()
    assert all(row in rows for row in student.model.layers[1].mlp.up_proj.weight.tolist())
    alone = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "4 of 4 layers" in alone.output


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_other_mlps_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="not one gate_proj, up_proj and down_proj"):
        channel_importance(model_of(family), TEXTS)


def test_more_channels_than_there_are_is_refused() -> None:
    for count in (0, 49):
        with pytest.raises(ModelError, match=rf"cannot keep {count} of the 48 channels of each MLP; give 1\.\.48"):
            require_channels(model_of("llama"), count)
