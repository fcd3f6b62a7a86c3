"""What an engine gives requests, served one by one or all at once."""

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
