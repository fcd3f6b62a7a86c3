"""The MoE layer in Triton: routes the (token, k) pairs once, then launches its phases until they are done.

The kernels, and the memory that they share, are described in `qllm_ops.kernels.moe`.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch
import triton

from qllm_ops.flag import PriorityFlag
from qllm_ops.inputs import MoeInputs
from qllm_ops.kernels import moe as kernels
from qllm_ops.tiles import TileConfig, arch_of, layer_configs, token_counts

NO_LIMIT = 2**31 - 1


class TritonMoe:
    """One MoE layer and its progress on the device.

    A backend of `qllm_ops.MoeRun`, which documents the arguments. Making one enqueues the routing
    on the current stream and waits for nothing.

    Args:
        tiles: the configuration of each phase, instead of the one that `qllm_ops.tiles` picks.
    """

    def __init__(
        self,
        inputs: MoeInputs,
        flag: PriorityFlag | None,
        priority: int,
        *,
        tiles: dict[str, TileConfig] | None = None,
    ):
        self.inputs = inputs
        self.device = inputs.hidden_states.device
        self.tiles = tiles or layer_configs(
            num_tokens=inputs.num_tokens,
            top_k=inputs.top_k,
            num_experts=inputs.num_experts,
            hidden_size=inputs.hidden_size,
            intermediate_size=inputs.intermediate_size,
            dtype=inputs.hidden_states.dtype,
            arch=arch_of(self.device),
        )
        self._flag = flag
        self._word = None if flag is None else flag.words[priority:]
        # What the host knows about the phases; totals are None until the device was asked.
        self._taken = self._done = (0, 0, 0)
        self._totals: tuple[int, ...] | None = None if inputs.num_tokens else (0, 0, 0)
        self._overdrawn = self._unread = False
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
        for num_tokens in token_counts(inputs.top_k, inputs.num_experts):
            nobody = replace(
                inputs,
                hidden_states=inputs.hidden_states.new_empty(num_tokens, inputs.hidden_size),
                top_k_index=torch.full_like(inputs.top_k_index[:1], -1).repeat(num_tokens, 1),
                top_k_weights=inputs.top_k_weights.new_empty(num_tokens, inputs.top_k),
            )
            cls(nobody, None, 0).launch_all()
            if flag is not None:
                cls(nobody, flag, priority).step(None)

    # -- the run ---------------------------------------------------------------------------------

    def step(self, max_tiles: int | None) -> bool:
        """One launch of every phase that has tiles left; waits for it. True when all tiles are done.

        The tiles of a quantum are the next ones in order, the phases one after another.
        """
        if self._flag is not None:
            self._flag.expire()
        if self._unread or (max_tiles is not None and self._totals is None):
            self._read()
        if self._totals is not None and self._done == self._totals:
            return True
        limits = self._limits(max_tiles)
        with self._on_device():
            self._catch_up()
            if self._flag is not None:
                self._flag.fence()
            if self._overdrawn:
                # Tickets that were drawn beyond the quantum go back.
                self._state[:3].copy_(self._state[3:6])
            self._launch(limits)
            self._read(limits)
        return self._done == self._totals

    def launch_all(self) -> None:
        """Enqueue all that is left on the current stream, poll no flag, and wait for nothing.

        For a run that has not been stepped. The output may be used in stream order.
        """
        if self.inputs.num_tokens:
            self._unread = True
            with self._on_device():
                self._catch_up()
                self._launch((NO_LIMIT, NO_LIMIT, NO_LIMIT), poll=False)
                self._mark()

    @property
    def tiles_done(self) -> int:
        if self._unread:
            self._read()
        return sum(self._done)

    @property
    def tiles_taken(self) -> int:
        if self._unread:
            self._read()
        return sum(self._taken)

    @property
    def tiles_total(self) -> int:
        """Tiles of all phases. They depend on the routing, so the first look waits for the device."""
        if self._totals is None:
            self._read()
        return sum(self._totals)

    @property
    def output(self) -> torch.Tensor:
        return self._output

    # -- before the first launch -----------------------------------------------------------------

    def _allocate(self) -> None:
        x = self.inputs
        new = functools.partial(torch.empty, dtype=x.hidden_states.dtype, device=self.device)
        self._output = torch.empty_like(x.hidden_states)
        self._pairs = x.num_tokens * x.top_k
        self._intermediate = new(self._pairs, x.intermediate_size)
        self._partial = new(self.tiles["down"].split_k, self._pairs, x.hidden_size)
        self._state = new(9 + 3 * (x.num_experts + 1), dtype=torch.int32)

    def _route(self) -> None:
        """Sort the pairs by expert and let the device write the state: nothing here knows the routing."""
        x, tiles = self.inputs, self.tiles
        experts, self._order = torch.sort(x.top_k_index.view(-1), stable=True)
        combine = triton.cdiv(x.num_tokens, tiles["combine"].block_m)
        self._block_e = max(16, triton.next_power_of_2(x.num_experts + 1))
        kernels.route[(1,)](
            experts,
            self._state,
            self._pairs,
            x.num_experts,
            triton.cdiv(x.intermediate_size, tiles["gate_up"].block_n),
            triton.cdiv(x.hidden_size, tiles["down"].block_n) * tiles["down"].split_k,
            triton.cdiv(x.hidden_size, tiles["combine"].block_n) * combine,
            GATE_UP_M=tiles["gate_up"].block_m,
            DOWN_M=tiles["down"].block_m,
            BLOCK_E=self._block_e,
            num_warps=4,
            enable_fp_fusion=True,
        )

    # -- launching -------------------------------------------------------------------------------

    def _launch(self, limits: tuple[int, int, int], poll: bool = True) -> None:
        """Enqueue every phase that has a tile below its limit."""
        x = self.inputs
        word = self._word if poll else None
        run = {
            "state_ptr": self._state,
            # Without a flag any tensor will do: the kernel is compiled without the poll.
            "flag_ptr": self._state if word is None else word,
            "HAS_FLAG": word is not None,
            "num_experts": x.num_experts,
            "hidden_size": x.hidden_size,
        }
        products = {
            "order_ptr": self._order,
            "intermediate_size": x.intermediate_size,
            "BLOCK_E": self._block_e,
        }
        if limits[0] > self._done[0]:
            kernels.gate_up[self._grid("gate_up")](
                x.hidden_states,
                x.gate_up_proj,
                self._intermediate,
                limit=limits[0],
                top_k=x.top_k,
                ACTIVATION=x.activation,
                **run,
                **products,
                **self._loop("gate_up", x.hidden_size),
                **self._block("gate_up"),
            )
        if limits[1] > self._done[1]:
            kernels.down[self._grid("down")](
                self._intermediate,
                x.down_proj,
                self._partial,
                limit=limits[1],
                num_pairs=self._pairs,
                SPLIT_K=self.tiles["down"].split_k,
                **run,
                **products,
                **self._loop("down", x.intermediate_size),
                **self._block("down"),
            )
        if limits[2] > self._done[2]:
            kernels.combine[self._grid("combine")](
                self._partial,
                x.top_k_index,
                x.top_k_weights,
                self._output,
                limit=limits[2],
                num_tokens=x.num_tokens,
                TOP_K=x.top_k,
                SPLIT_K=self.tiles["down"].split_k,
                **run,
                **self._block("combine"),
            )

    def _block(self, phase: str) -> dict[str, int | bool]:
        config = self.tiles[phase]
        # Fusing is the compiler's default today and will not be; fixed here, the bits stay the same.
        compiled = {"num_warps": config.num_warps, "enable_fp_fusion": True}
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **compiled}

    def _loop(self, phase: str, length: int) -> dict[str, int | bool]:
        config = self.tiles[phase]
        even = length % config.block_k == 0
        return {"BLOCK_K": config.block_k, "STAGES": config.num_stages, "EVEN": even}

    def _grid(self, phase: str) -> tuple[int]:
        """Programs of a launch: as many as stay resident, or as tiles there may be. From T only."""
        x, config = self.inputs, self.tiles[phase]
        if phase == "combine":
            row_blocks, columns = triton.cdiv(x.num_tokens, config.block_m), x.hidden_size
        else:
            # Full blocks, and at most one more for each expert that has a row.
            row_blocks = self._pairs // config.block_m + min(x.num_experts, self._pairs)
            columns = x.intermediate_size if phase == "gate_up" else x.hidden_size
        tiles = row_blocks * triton.cdiv(columns, config.block_n) * config.split_k
        return (min(tiles, config.programs_per_sm * multiprocessors(self.device)),)

    def _limits(self, max_tiles: int | None) -> tuple[int, int, int]:
        """One past the last ticket of each phase, if no more than ``max_tiles`` are to be computed."""
        if max_tiles is None:
            return self._totals or (NO_LIMIT, NO_LIMIT, NO_LIMIT)
        limits = []
        for done, total in zip(self._done, self._totals, strict=True):
            share = min(max_tiles, total - done)
            limits.append(done + share)
            max_tiles -= share
        return tuple(limits)

    def _read(self, limits: tuple[int, ...] = (NO_LIMIT, NO_LIMIT, NO_LIMIT)) -> None:
        """Wait for the current stream and learn how far the phases are."""
        if self.inputs.num_tokens == 0:
            return
        with self._on_device():
            self._catch_up()
            words = self._state[:9].tolist()
        tickets, self._done, self._totals = (tuple(words[i : i + 3]) for i in (0, 3, 6))
        ends = [min(limit, total) for limit, total in zip(limits, self._totals, strict=True)]
        # A launch gives out tickets past its last one before everybody has left.
        self._taken = tuple(min(ticket, end) for ticket, end in zip(tickets, ends, strict=True))
        self._overdrawn = tickets != self._done
        self._unread = False

    def _mark(self) -> None:
        """Remember what the current stream was given, for whoever goes on with the run on another one."""
        self._given = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

    def _catch_up(self) -> None:
        if self._given is not None:
            torch.cuda.current_stream().wait_event(self._given)

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
