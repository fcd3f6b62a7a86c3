"""The engine on transformers' architectures: the tokens of generate, or a refusal; never other tokens."""

import pytest
import torch
from conformity import first_model, table
from served import served

from qllm_ops.models import UnsupportedExpertsError
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine

SERVED = {
    "afmoe", "aria", "axk1", "beam", "cohere2_moe", "dbrx", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "jetmoe", "kolibri1", "laguna", "llama4", "longcat_flash", "mellum",
    "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_moe", "qwen3_omni_moe", "qwen3_vl_moe", "solar_open", "step3p7",
}  # fmt: skip
"""Those that must not be refused. The others have an indexer or a state that is no list of keys and values,
or experts that `install` refuses. One that is served all the same must be served right."""

ROWS = {row.folder: row for row in reversed(table())}  # the first experts class of each


def prompt(length: int) -> list[int]:
    return torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def generated(model, ids: list[int]) -> list[int]:
    ids = torch.tensor([ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


def choices(model):
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return [(c._attn_implementation, getattr(c, "_experts_implementation", None)) for c in configs]


@pytest.mark.parametrize("folder", sorted(ROWS))
def test_the_tokens_of_generate_or_a_refusal(folder):
    model, _, reason = first_model(*ROWS[folder].load())
    if model is None or not model.can_generate():
        pytest.skip(f"no tiny language model of {folder}: {reason or 'it has no head'}")
    model.generation_config.eos_token_id = None
    requests = [prompt(n) for n in (40, 5, 17)]
    expected, before = [generated(model, ids) for ids in requests], choices(model)
    try:
        with Engine(model, limits=Limits(kv_tokens=256, kv_reserve=0, prefill_tokens=16)) as engine:
            handles = [engine.submit(ids, max_new_tokens=5, priority=i % 2) for i, ids in enumerate(requests)]
            assert [handle.result(60) for handle in handles] == expected
    except (ValueError, UnsupportedExpertsError):
        # transformers has dispatched this one since 5.23.
        assert folder not in SERVED or (folder == "aria" and not ROWS[folder].dispatched)
    assert choices(model) == before


@pytest.mark.parametrize("folder", sorted(SERVED & ROWS.keys()))
def test_batch_invariance(folder):
    """How far the best logit lies above the second best has the bits that it has for the request alone."""
    model, _, reason = first_model(*ROWS[folder].load())
    if model is None or not model.can_generate():
        pytest.skip(f"no tiny language model of {folder}: {reason or 'it has no head'}")
    if folder == "aria" and not ROWS[folder].dispatched:
        pytest.skip("transformers does not dispatch it before 5.23")
    requests = [prompt(n) for n in (40, 5, 17, 3, 33)]
    options = {"limits": Limits(kv_tokens=512, kv_reserve=0), "batch_invariant": True}
    alone = served(model, requests, 4, together=False, **options)
    assert served(model, requests, 4, together=True, **options) == alone


def test_a_model_that_attends_in_chunks_is_served_within_the_first():
    """Its mask says where a chunk ends, and the engine looks at no mask."""
    model, _, _ = first_model(*ROWS["llama4"].load())
    model.config.get_text_config().attention_chunk_size = 32
    model.generation_config.eos_token_id = None
    expected = generated(model, prompt(27))
    with Engine(model, limits=Limits(kv_tokens=256, kv_reserve=0, prefill_tokens=16)) as engine:
        assert engine.submit(prompt(27), max_new_tokens=5).result(60) == expected
        with pytest.raises(ValueError, match="more than the 32 positions"):
            engine.submit(prompt(28), max_new_tokens=5)
