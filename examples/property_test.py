"""Hold a kernel of your own against the reference, under any schedule of pauses, without a GPU.

    pytest examples/property_test.py

The kernel here computes one token after another in plain torch. Break it (poll in the middle of a token and
return, or add in another order after a pause) and see that it is found: by `telling` in every run, and what
nobody thought of by what Hypothesis draws.
"""

import torch
from hypothesis import given

import qllm_ops
from qllm_ops import moe_reference, testing


class TokenByToken:
    """An MoE layer whose tile is a token: the surface that `qllm_ops.testing` asks of a run."""

    def __init__(
        self, hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights,
        *, flag=None, priority=0, **options,
    ):  # fmt: skip
        # The arguments are those of `qllm_ops.moe`.
        self.batch, self.weights = (hidden_states, top_k_index, top_k_weights), (gate_up_proj, down_proj)
        self.options, self.flag, self.priority = options, flag, priority
        self.tiles_done = 0
        self.output = torch.empty_like(hidden_states)

    @property
    def tiles_total(self):
        return len(self.output)

    @property
    def tiles_taken(self):
        return self.tiles_done

    @property
    def done(self):
        return self.tiles_done == self.tiles_total

    def step(self, max_tiles=None):
        wide = [weight.float() for weight in self.weights]
        end = self.tiles_total if max_tiles is None else min(self.tiles_done + max_tiles, self.tiles_total)
        while self.tiles_done < end and not (self.flag and self.flag.paused(self.priority)):
            x, index, weights = (of[self.tiles_done : self.tiles_done + 1] for of in self.batch)
            self.output[self.tiles_done] = moe_reference(x.float(), *wide, index, weights, **self.options)[0]
            self.tiles_done += 1
        return self.done


@testing.telling()
@given(case=testing.moe_cases(max_tokens=6, max_size=9), schedule=testing.schedules())
def test_token_by_token(case, schedule):
    flag = qllm_ops.PriorityFlag()
    with testing.poisoned_empty():
        alone = TokenByToken(**case.tensors())
        alone.step()
        testing.assert_close(alone.output, case)
        make_run = lambda: TokenByToken(**case.tensors(), flag=flag)  # noqa: E731
        testing.assert_preemptible(make_run, alone.output, schedule, flag)
