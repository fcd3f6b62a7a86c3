"""Presets: the same seed gives the same model, and its tokens are worth comparing."""

import json

import pytest
import torch
from tiny_models import SUPPORTED

from qllm_ops.models import PRESETS, load, make_preset, save_preset


@pytest.mark.parametrize("name", SUPPORTED)
def test_same_seed_same_files(name, tmp_path):
    state = torch.get_rng_state()
    a, b, c = (save_preset(name, tmp_path / folder, seed) for folder, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(f.name for f in a.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    whole = [(folder / "model.safetensors").read_bytes() for folder in (a, b, c)]
    assert whole[0] == whole[1] != whole[2]


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_tokens_depend_on_the_prompt_and_not_on_rounding(name):
    model = make_preset(name)
    ids = torch.randint(0, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1]).median() > 0.05 * logits.std()
    # The last token alone does not decide: with the same one everywhere, the answers still differ.
    ids[:, -1] = 5
    assert len(model(ids).logits[:, -1].argmax(-1).unique()) > 4


@torch.no_grad()
def test_length_is_the_requests(tmp_path):
    model = load(save_preset("tiny", tmp_path))
    for config in (model.config, model.generation_config):
        assert config.eos_token_id is config.pad_token_id is config.bos_token_id is None
    assert "eos_token_id" not in json.loads((tmp_path / "generation_config.json").read_text())
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=200, do_sample=False).shape == (1, 203)


def test_dtype(tmp_path):
    assert load(save_preset("tiny", tmp_path, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"preset must be one of tiny, .*, got 'huge'"):
        save_preset("huge", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "millions"), [("demo", 54), ("mixtral-84m", 84)])
def test_sizes_of_the_larger_ones(name, millions):
    with torch.device("meta"):
        model = make_preset(name)
    assert round(model.num_parameters() / 1e6) == millions
    assert f"{millions} M" in PRESETS[name].about
    assert model.config.max_position_embeddings == 16384
