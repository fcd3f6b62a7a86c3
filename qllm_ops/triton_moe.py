"""The MoE layer in Triton: routes the (token, k) pairs once, then launches its phases until they are done.

The kernels, and the memory that they share, are described in `qllm_ops.kernels.moe`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qllm_ops.activation import Activation
from qllm_ops.flag import FULL, PriorityFlag
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.kernels import tickets
from qllm_ops.plan import SORTED_PAIRS, Phase, Plan, plan_of
from qllm_ops.quantized import QuantizedWeight
from qllm_ops.tiles import token_counts
from qllm_ops.torch_moe import checked

ROUNDS = {"gate_up": 2, "down": 2, "combine": 1}
"""How often a launch of each phase may be left under a stream gate. What is left then is computed by one more
launch, which nothing stops; where nothing is left, each of them costs a launch that ends at once."""

SORTS = (4096, 8192)
"""Up to so many pairs torch sorts by a kernel of its own each, and all beyond the first by the same."""


class TritonMoe:
    """One MoE layer and its progress on the device.

    A backend of `qllm_ops.MoeRun`, which documents the arguments. Making one enqueues the routing
    on the current stream and waits for nothing.

    Memory beside inputs and output, in elements of hidden_states' dtype, with P = T * K and S the tiles
    that share an output block of the second product (1 to 4)::

        P * I + S * P * W

    W is H as long as the second term is below 64 MiB or below the first; beyond that, the output is computed
    in chunks of W columns (at most 15), which make it about as large as the first. Besides, 4 * (98 + 3 *
    (E + 1)) + 16 * P bytes of state and order, and a word for each program where tiles have an exit inside.
    An activation of yours makes the first term P * 2I floats, an expert_norm the second one P * H floats; so
    do quantised weights with bfloat16 (S * P * W of them); weights_on_input takes P weights of one.

    Args:
        plan: instead of the one that layers like this have.
        one_stream: the run is begun and finished on the current stream. Else any step may be on another one.
    """

    def __init__(
        self,
        inputs: MoeInputs,
        flag: PriorityFlag | None,
        priority: int,
        *,
        plan: Plan | None = None,
        one_stream: bool = False,
    ):
        self.inputs = inputs
        self.device = inputs.hidden_states.device
        self.plan = plan or plan_of(inputs)
        self._own_activation = not isinstance(inputs.activation, Activation)
        self._stages = self._cut_into_stages()
        self._applied: set[str] = set()
        self._flag, self._priority = flag, priority
        self._word = None if flag is None else flag.words[priority:]
        # What the host knows about the phases; totals are None until the device was asked.
        nothing = (0,) * len(self.plan.phases)
        self._done, self._given_back = nothing, 0
        self._totals: tuple[int, ...] | None = None if inputs.num_tokens else nothing
        self._unread = False
        self._one_stream, self._given = one_stream, None
        with self._on_device():
            self._allocate()
            if inputs.num_tokens:
                self._route()
            self._mark()

    @classmethod
    def warm_up(cls, inputs: MoeInputs, flag: PriorityFlag | None = None, priority: int = 0) -> None:
        """Compile and load every kernel that layers like this one may need, whatever their number of tokens.

        The runs are of tokens that no expert here takes: their output is zero. T must be at least 1.
        """
        counts = token_counts(inputs.top_k, inputs.num_experts)
        sorts = {max(1, pairs // inputs.top_k) for pairs in SORTED_PAIRS}
        for num_tokens in sorted({*counts, *sorts, SORTED_PAIRS[-1] // inputs.top_k + 1}):
            nobody = replace(
                inputs,
                hidden_states=inputs.hidden_states.new_empty(num_tokens, inputs.hidden_size),
                top_k_index=torch.full_like(inputs.top_k_index[:1], -1).repeat(num_tokens, 1),
                top_k_weights=inputs.top_k_weights.new_empty(num_tokens, inputs.top_k),
            )
            run = cls(nobody, flag, priority, one_stream=True)
            with run._on_device():
                for phase in run.plan.phases if flag is not None else ():
                    run._launch(phase)
            run.launch_all()
        for pairs in SORTS:
            torch.sort(inputs.top_k_index.new_zeros(pairs), stable=True)

    # -- the run ---------------------------------------------------------------------------------

    def step(self, max_tiles: int | None) -> bool:
        """One launch of every phase that has tiles left; waits for it. True when all tiles are done.

        The tiles of a quantum are the next ones in order, the phases one after another.

        Raises:
            RuntimeError: a CUDA graph is being captured, which cannot wait.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'a step waits for the device, and so does moe with a flag of gate="host"; in a CUDA graph '
                'take moe without a flag, or with PriorityFlag(gate="stream")'
            )
        if self._flag is not None:
            self._flag.expire()
        if self._unread:
            self._read()
        if self._done == self._totals:
            return True
        with self._on_device():
            self._catch_up()
            if self._flag is not None:
                self._flag.fence()
            if max_tiles is not None:
                self._state[:1].fill_(min(max_tiles, FULL))
            for phases, apply in self._stages:
                for phase in phases:
                    if self._totals is None or self._done[phase.number] < self._totals[phase.number]:
                        self._launch(phase, quantum=max_tiles is not None, share=self._share(phase))
                self._read()
                if apply is not None and not self._apply(phases[-1], apply):
                    break
        return self._done == self._totals

    def launch_all(self, gated: bool = False) -> None:
        """Enqueue all that is left on the current stream, and wait for nothing.

        For a run that has not been stepped. The output may be used in stream order.

        Args:
            gated: the stream stands still while the flag pauses the class, at the next tile of the launches
                that ROUNDS says, and before every launch. Without it, nothing looks at the flag.
        """
        if self.inputs.num_tokens:
            self._unread = True
            with self._on_device():
                self._catch_up()
                for phases, apply in self._stages:
                    for phase in phases:
                        for _ in range(ROUNDS[phase.kernel] if gated else 0):
                            self._flag.hold(self._priority)
                            self._launch(phase)
                        if gated:
                            self._flag.hold(self._priority)
                        self._launch(phase, poll=False)
                    if apply is not None:
                        apply()
                self._mark()

    @property
    def tiles_done(self) -> int:
        if self._unread:
            self._read()
        return sum(self._done)

    @property
    def tiles_taken(self) -> int:
        """How often a tile was started, but for those that wait unfinished to be taken again."""
        return self.tiles_done + self._given_back

    @property
    def tiles_total(self) -> int:
        """Tiles of all phases. They depend on the routing, so the first look waits for the device."""
        if self._totals is None:
            # And no more: another thread may be in a step, whose tiles count when it has returned.
            self._totals = self._of_phases(self._words(), tickets.TOTAL.value)
        return sum(self._totals)

    @property
    def output(self) -> torch.Tensor:
        return self._output

    # -- what the kernels do not compute ---------------------------------------------------------

    def _cut_into_stages(self) -> list[tuple[list[Phase], Callable[[], None] | None]]:
        """Phases that are launched together, and what is done by torch when they are finished."""
        after = {}
        if self._own_activation:
            after["gate_up"] = self._activate
        if self.inputs.expert_norm is not None:
            after["down"] = self._norm
        stages: list[tuple[list[Phase], Callable[[], None] | None]] = [([], None)]
        for phase in self.plan.phases:
            stages[-1][0].append(phase)
            if phase.kernel in after:
                stages[-1] = (stages[-1][0], after[phase.kernel])
                stages.append(([], None))
        return stages

    def _apply(self, phase: Phase, apply: Callable[[], None]) -> bool:
        """Once the phase is finished, once; False while it is not."""
        if self._done[phase.number] < self._totals[phase.number]:
            return False
        if apply.__name__ not in self._applied:
            apply()
            self._applied.add(apply.__name__)
        return True

    def _activate(self) -> None:
        gated = self.inputs.activation(self._intermediate)
        shape = (self.plan.pairs, self.inputs.intermediate_size)
        gated = checked("activation", gated, shape, self._intermediate.device)
        if self.device.type == "cuda":
            # Read on this stream, and let go to the one that the run was made on.
            self._intermediate.record_stream(torch.cuda.current_stream())
        self._intermediate = gated.to(self._output.dtype).contiguous()

    def _norm(self) -> None:
        rows = self._partial[0]
        rows.copy_(checked("expert_norm", self.inputs.expert_norm(rows), rows.shape, rows.device))

    # -- before the first launch -----------------------------------------------------------------

    def _allocate(self) -> None:
        x, plan = self.inputs, self.plan
        new = functools.partial(torch.empty, dtype=x.hidden_states.dtype, device=self.device)
        self._output = torch.empty_like(x.hidden_states)
        if self._own_activation:
            # The whole first product, not yet rounded: a fused activation comes before that, too.
            self._intermediate = new(plan.pairs, x.gate_up_size, dtype=torch.float32)
        else:
            self._intermediate = new(plan.pairs, x.intermediate_size)
        parts = plan.tiles["down"].split_k
        self._partial = new(parts, plan.pairs, plan.width, dtype=plan.partial_dtype)
        self._state = new(plan.state_words, dtype=torch.int32)

    def _route(self) -> None:
        """Sort the pairs by expert and let the device write the state: nothing here knows the routing."""
        x = self.inputs
        if self.plan.sorted_pairs:
            experts = x.top_k_index
            self._order = torch.empty(self.plan.pairs, dtype=torch.int64, device=self.device)
        else:
            experts, self._order = torch.sort(x.top_k_index.view(-1), stable=True)
        self._weights_of_sum = torch.ones_like(x.top_k_weights) if x.weights_on_input else x.top_k_weights
        self.plan.route((self._order, self._state), (experts,))

    # -- launching -------------------------------------------------------------------------------

    def _launch(self, phase: Phase, *, quantum: bool = False, poll: bool = True, share: int = FULL) -> Any:
        """Enqueue the phase. Returns what was launched, as Triton compiled it; None in the interpreter.

        Args:
            quantum: it takes no more tiles than the state's budget has.
            poll: it leaves while its class is paused.
            share: it leaves once the flag allows more programs than that.
        """
        x, state = self.inputs, self._state
        word = self._word if poll else None
        launch = self.plan.launch(phase, word is not None)
        # Where there is no flag, or no bias, any tensor will do: the kernel is compiled without it.
        flag = (state if word is None else word, share, int(quantum))
        if phase.kernel == "gate_up":
            weight = stored(x.gate_up_proj, x.gate_up_bias, state)
            tensors = (x.hidden_states, *weight, self._intermediate, self._order, state)
            return launch(tensors, (x.top_k_weights, *flag))
        if phase.kernel == "down":
            weight = stored(x.down_proj, x.down_bias, state)
            return launch((self._intermediate, *weight, self._partial, self._order, state), flag)
        routing = (x.top_k_index, self._weights_of_sum)
        return launch((self._partial, self._output, state), (*routing, *flag))

    def _share(self, phase: Phase) -> int:
        """How many programs a launch begins with, if the flag could let it have more later; else FULL."""
        if self._flag is None:
            return FULL
        share = self._flag.read()[self._priority]
        return share if 0 < share < self.plan.programs(phase) else FULL

    def _read(self) -> None:
        """Wait for the current stream and learn how far the phases are."""
        if self.inputs.num_tokens == 0:
            return
        words = self._words()
        self._done = self._of_phases(words, tickets.DONE.value)
        self._totals = self._of_phases(words, tickets.TOTAL.value)
        self._given_back = words[tickets.GIVEN_BACK.value]
        self._unread = False

    def _words(self) -> list[int]:
        with self._on_device():
            self._catch_up()
            return self._state[: tickets.OFFSETS.value].tolist()

    def _of_phases(self, words: list[int], first: int) -> tuple[int, ...]:
        return tuple(words[first : first + len(self.plan.phases)])

    def _rewind(self, finished: int = 0) -> None:
        """Back to where the first phases are finished and the others not begun, for measurements.

        In stream order. No tile may wait to be taken again.
        """
        done, total = tickets.DONE.value, tickets.TOTAL.value
        self._state[:total].zero_()
        self._state[done : done + finished] = self._state[total : total + finished]
        self._done, self._given_back = (0,) * len(self.plan.phases), 0

    def _mark(self) -> None:
        """Remember what the current stream was given, for whoever goes on with the run on another one."""
        if self.device.type == "cuda" and not self._one_stream:
            self._given = torch.cuda.current_stream().record_event()

    def _catch_up(self) -> None:
        if self._given is not None:
            torch.cuda.current_stream().wait_event(self._given)

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def stored(
    weight: Weight, bias: torch.Tensor | None, nothing: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a product's weights as its kernel takes them: weight, scales, zero points, bias."""
    bias = nothing if bias is None else bias
    if isinstance(weight, QuantizedWeight):
        return weight.values.view(torch.uint8), weight.scales, weight.zero_words, bias
    return weight, nothing, None, bias
