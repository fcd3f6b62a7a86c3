"""What requests get of an engine, one by one or all at once, and of transformers."""

import random

import torch

from qllm_ops.scheduler.engine import Engine


def served(model, prompts: list[list[int]], new: int, *, together: bool, **options) -> list[tuple]:
    """The tokens of each, and how far the best logits lay above the second best. Every other is urgent."""
    with Engine(model, **options) as engine:
        handles = []
        for i, ids in enumerate(prompts):
            handles.append(engine.submit(ids, max_new_tokens=new, priority=i % 2))
            if not together:
                handles[-1].result(60)
        return [(handle.result(60), handle.request.margins) for handle in handles]


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{length}/{seed}")
    return [draw.randrange(128) for _ in range(length)]


def generated(model, ids: list[int], new: int) -> list[int]:
    ids = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return out[0, ids.shape[1] :].tolist()
