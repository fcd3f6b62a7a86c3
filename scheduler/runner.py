"""Runs one iteration: a batch of rows through the model, and a token out of each row that ends."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedConfig

from qllm_ops import PriorityFlag, invariant
from qllm_ops.models import preemptible, warming_up
from qllm_ops.models.experts import is_dispatched
from qllm_ops.models.install import EXPERTS
from qllm_ops.scheduler import attention, flash
from qllm_ops.scheduler.attention import KVPool, Ragged, RaggedCache, Segment, ragged
from qllm_ops.scheduler.core import Batch, Outcome
from qllm_ops.scheduler.log import Log
from qllm_ops.scheduler.policies import FOREGROUND
from qllm_ops.scheduler.request import BE, Request
from qllm_ops.scheduler.sampling import sample
from qllm_ops.scheduler.shared import changed_by

PROBE_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference between the engine's logits and the model's own, relative to the largest logit.
Wrong attention differs by the size of the logits; rounding stays well below."""


def _positions(config: PreTrainedConfig) -> int | None:
    """How many positions the engine gives a model: those that it is made for, None if its config does not
    say; the first chunk of one that attends in chunks (Llama 4), inside which that is full attention."""
    positions = getattr(config, "max_position_embeddings", None)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return min(config.attention_chunk_size, positions or config.attention_chunk_size)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is not None and rope.get("rope_type") == "dynamic":
        return int(positions * rope.get("factor", 1.0))  # here, the config gives what it was trained for
    return positions


def attention_limits(device: torch.device, batch_invariant: bool) -> tuple[int, int]:
    """`block_scores` and `padded_bytes` of rows that are attended one after the other."""
    if device.type == "cpu":
        block_scores, padded_bytes = attention.BLOCK_SCORES, attention.PADDED_BYTES
    else:  # a GPU gets through any attention, and copies keys, faster than calls can be launched
        block_scores, padded_bytes = 2**62, 64 * attention.PADDED_BYTES
    # How long a padded batch is depends on the other rows in it.
    return block_scores, 0 if batch_invariant else padded_bytes


def chunk_multiple(device: torch.device, batch_invariant: bool) -> int:
    """Of what chunks of a prompt are a multiple, so that attention makes the same blocks of any chunks."""
    return attention.largest_block(attention_limits(device, True)[0]) if batch_invariant else 1


class Routes:
    """Which experts each layer of a model chose for the tokens of a probe, at which weights.

    Two right computations of one model round differently, and where two experts are all but equal they
    may choose differently, after which their logits have little in common. So that logits tell right
    attention from wrong, a probe takes the experts that the pass that it is compared with took.
    """

    def __init__(self, model: torch.nn.Module):
        modules = [module for module in model.modules() if is_dispatched(module)]
        self._chosen: dict[torch.nn.Module, list[tuple[torch.Tensor, ...]]] = {m: [] for m in modules}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside the body, a pass over the whole probe is remembered."""
        with self._hooked(lambda module, args: self._chosen[module].append(args[1:])):
            yield

    @contextlib.contextmanager
    def again(self, positions: list[int]) -> Iterator[None]:
        """Inside the body, tokens of these positions of the probe go where they went then."""
        calls = {module: iter(chosen) for module, chosen in self._chosen.items()}

        def choose(module, args):
            return (args[0], *(of[positions] for of in next(calls[module])))

        with self._hooked(choose):
            yield

    @contextlib.contextmanager
    def _hooked(self, hook) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(hook) for module in self._chosen]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()


class Runner:
    """Executes batches on a model that both lanes share. What differs per lane is thread-local: grad
    mode, the stream, which rows attention sees, and what the experts poll."""

    def __init__(
        self,
        model: torch.nn.Module,
        kv_tokens: int,
        flag: PriorityFlag,
        log: Log,
        batch_invariant: bool = False,
    ):
        self.model, self.flag, self.log, self.batch_invariant = model, flag, log, batch_invariant
        self.device = next(model.parameters()).device
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.max_positions = _positions(model.config.get_text_config())
        self.pool = KVPool(model, kv_tokens)
        self._cache = attention.cache_argument(model)
        self._limits = attention_limits(self.device, batch_invariant)
        self._launch = None
        if flash.refusal(self.device) is None:
            self._launch = partial(flash.attend_rows, batch_invariant=batch_invariant)
        routes = Routes(model)
        with warming_up(flag, BE), routes.recorded(), self._invariance():
            expected = self._probe_plain()
        self._check_unchanged()
        attention.ATTENTION.remember(model)
        try:
            model.set_attn_implementation(attention.NAME)
            self._chosen = [
                (choice.name, config)
                for choice in (attention.ATTENTION, EXPERTS)
                for config, name in choice.read(model)
                if name == attention.NAME
            ]
            self._check_attention(expected, routes)
        except BaseException:
            self.close()
            raise
        if self.device.type == "cuda":
            self._load_attention()
            torch.cuda.synchronize(self.device)  # the lanes' streams do not wait for this one

    def close(self) -> None:
        attention.ATTENTION.put_back(self.model)
        self.pool.layers.clear()  # the memory, which a next engine may need while this object is still there

    def check(self, request: Request) -> None:
        """Raises ValueError if the model cannot take it."""
        ids, max_new_tokens = request.prompt, request.max_new_tokens
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt: token id {bad} is outside the vocabulary of {self.vocab_size}")
        never = next((token for token in request.ends if not 0 <= token < self.vocab_size), None)
        if never is not None:
            raise ValueError(
                f"eos_token_id: token id {never} is outside the vocabulary of {self.vocab_size}, so that no "
                "request ends with it; None says that none shall"
            )
        if self.max_positions is not None and len(ids) + max_new_tokens > self.max_positions:
            raise ValueError(
                f"prompt: {len(ids)} prompt + {max_new_tokens} new tokens are more than the "
                f"{self.max_positions} positions that the model has"
            )

    @contextlib.contextmanager
    def lane(self, name: str) -> Iterator[None]:
        """The thread-local state of a lane, for the life of its thread."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.device.type == "cuda":
                least, most = torch.cuda.Stream.priority_range()
                stream = torch.cuda.Stream(self.device, priority=most if name == FOREGROUND else least)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def warm_up_lane(self) -> None:
        """Have this lane's thread and stream make what they make once, as cuBLAS does with its handle and its
        workspace: that waits for the whole device, so it has to be done before anything can be paused."""
        if self.device.type == "cuda":
            self._probe_beside(0)

    def run(self, batch: Batch, granularity: str | None) -> list[Outcome]:
        """One forward pass; one outcome per row. ``granularity`` is where it stops while its class is
        paused: None (nowhere), "layer" or "tile"."""
        self._check_still_ours()
        rows = sorted(batch.rows, key=lambda row: row.request.region)  # in the order of their keys
        segments, start = [], 0
        for row in rows:
            request = row.request
            segments.append(
                Segment(start, len(row.tokens), row.start, request.region, reach=request.kv_tokens - 1)
            )
            start += len(row.tokens)
        ragged_rows = self._ragged(segments, self._attention_gate if granularity == "tile" else None)
        with preemptible(self.flag if granularity else None, BE, granularity) as preemption:
            logits = self._forward([t for row in rows for t in row.tokens], ragged_rows)
        self.log.count_waste(preemption.wasted_tiles)
        ending = [i for i, row in enumerate(rows) if row.samples]
        requests = [rows[i].request for i in ending]
        outcomes = dict(zip((r.id for r in requests), sample(requests, logits[ending]), strict=True))
        return [outcomes.get(row.request.id) for row in batch.rows]

    def _check_still_ours(self) -> None:
        """Whoever has the model can change it while it is served: to other tokens, or to no preemption."""
        if self.model.training:
            raise RuntimeError("the model was put into training mode while it is served; call model.eval()")
        for attribute, config in self._chosen:
            if (name := getattr(config, attribute)) != attention.NAME:
                raise RuntimeError(
                    f"{attribute.strip('_')} of the model was changed to {name!r} while it is served; close "
                    "the engine first"
                )

    def _ragged(self, segments: list[Segment], gate: Callable[[], None] | None = None) -> Ragged:
        # The library's kernel for one row divides its keys among programs, also where heads share none.
        one_token = len(segments) == 1 and segments[0].length == 1 and not self.batch_invariant
        return Ragged(segments, gate, *self._limits, launch=None if one_token else self._launch)

    def _forward(self, ids: list[int], rows: Ragged) -> torch.Tensor:
        """Logits of each row's last token, (rows, vocabulary)."""
        position = [p for s in rows.segments for p in range(s.past, s.total)]
        last = [s.query + s.length - 1 for s in rows.segments]
        try:
            with ragged(rows), self._invariance():
                out = self.model(
                    input_ids=torch.tensor([ids], device=self.device),
                    position_ids=torch.tensor([position], device=self.device),
                    **{self._cache: RaggedCache(self.pool, rows)},
                    use_cache=True,
                    logits_to_keep=torch.tensor(last, device=self.device),
                )
        finally:
            self._settle()
        logits = out.logits[0]
        if len(logits) != len(last):  # not every model knows logits_to_keep
            logits = logits[last]
        return logits

    def _settle(self) -> None:
        """Wait for what a pass has enqueued: its time and its failures are its own, and one that failed may
        still write keys where the next request will be."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _invariance(self) -> contextlib.AbstractContextManager:
        return invariant.batch_invariant() if self.batch_invariant else contextlib.nullcontext()

    def _attention_gate(self) -> None:
        """Where a pass that is paused between tiles also stops: between two blocks of queries."""
        self.log.where = "attention"
        self.flag.wait(BE)
        self.log.where = "tile"

    @torch.inference_mode()
    def _load_attention(self) -> None:
        """Run those kernels of the library that it chooses by the number of rows and keys, so that none is
        loaded later: a load may wait for a stream that stands at a gate."""
        for rows in (1, 2, 4, 8):
            total = 128  # keys of a row that are not divided
            while rows * total <= self.pool.tokens and total <= (self.max_positions or total):
                self._forward(
                    [0] * rows, self._ragged([Segment(i, 1, total - 1, i * total) for i in range(rows)])
                )
                total *= 2

    # -- proof that two lanes can share the model, and that its attention is ours to replace -----------

    PROBE = 7  # tokens, computed in three chunks with another row beside the second and the third

    def _probe_ids(self) -> list[int]:
        return [(i * 7 + 1) % self.vocab_size for i in range(self.PROBE)]

    @torch.inference_mode()
    def _probe_plain(self) -> torch.Tensor:
        ids = torch.tensor([self._probe_ids()], device=self.device)
        out = self.model(
            input_ids=ids, **{self._cache: DynamicCache(config=self.model.config)}, use_cache=True
        )
        return out.logits[0].float().cpu()

    @torch.inference_mode()
    def _probe_both_ends(self) -> None:
        for first in (0, max((self.max_positions or 0) - 2, 0)):
            self.model(
                input_ids=torch.tensor([[0, 1]], device=self.device),
                position_ids=torch.tensor([[first, first + 1]], device=self.device),
                **{self._cache: DynamicCache(config=self.model.config)},
                use_cache=True,
            )

    def _check_unchanged(self) -> None:
        changed = changed_by(self.model, self._probe_both_ends)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{type(self.model).__name__}: a forward pass changes {', '.join(changed[:3])}{more}; lanes "
                "that run it at once would overwrite each other's, so the engine cannot serve this model"
            )

    def _probe_rows(self, routes: Routes) -> torch.Tensor:
        ids, n = self._probe_ids(), self.PROBE

        def forward(rows: Ragged) -> torch.Tensor:
            positions = [p for s in rows.segments for p in range(s.past, s.total)]
            with routes.again(positions):
                return self._forward([ids[p] for p in positions], rows)

        first = self._ragged([Segment(0, 4, 0, 0)])
        forward(first)
        self.pool.expands = first.expanded
        # More of the first row beside most of a second one, which is two tokens shorter; then one of each.
        middle = forward(self._ragged([Segment(0, n - 5, 4, 0), Segment(n - 5, n - 3, 0, n)]))
        last = forward(self._ragged([Segment(0, 1, n - 1, 0), Segment(1, 1, n - 3, n)]))
        return torch.cat([last, middle]).float().cpu()

    def _check_attention(self, expected: torch.Tensor, routes: Routes) -> None:
        """That the engine's attention is the model's; row by row, if it is not in one launch."""
        try:
            self._check(expected, routes)
            if self.batch_invariant:
                self._check_batch_invariant()
        except ValueError as error:
            if self._launch is None:
                raise
            self._launch = None
            self._check_attention(expected, routes)
            warnings.warn(f"rows are attended one after the other: in one launch, {error}", stacklevel=4)

    @torch.inference_mode()
    def _check(self, expected: torch.Tensor, routes: Routes) -> None:
        n, name = self.PROBE, type(self.model).__name__
        if self.pool.tokens < 2 * n:
            raise ValueError(f"kv_tokens must be at least {2 * n}, got {self.pool.tokens}")
        try:
            got = self._probe_rows(routes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name}: its attention or cache asks for what the engine does not have: "
                f"{type(error).__name__}: {error}"
            ) from error
        want = expected[[n - 1, n - 3, n - 2, n - 4]]
        if not want.isfinite().all():
            raise ValueError(f"{name}: its logits for a few tokens are not finite numbers")
        error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()
        allowed = PROBE_ERROR.get(self.model.dtype, 5e-2)
        if not error <= allowed:
            raise ValueError(
                f"{name}: with the engine's attention the logits of a probe differ by "
                f"{error:.2g} of the largest one (at most {allowed:.0e} is rounding): this model's attention "
                "is not supported"
            )

    COMPANY = 300  # most tokens of another row beside the probe: a few blocks of each size

    @torch.inference_mode()
    def _check_batch_invariant(self) -> None:
        n = self.PROBE
        room = min(self.COMPANY, self.pool.tokens - n - 1, (self.max_positions or self.COMPANY + 1) - 1)
        alone = self._probe_beside(0)
        for company in (1, room):
            difference = (self._probe_beside(company) - alone).abs().max() / alone.abs().max().clamp_min(1e-6)
            if not difference == 0:
                raise ValueError(
                    f"{type(self.model).__name__}: batch_invariant=True cannot be had: the logits of a probe "
                    f"change by {difference:.2g} of the largest one beside {company} tokens of another row"
                )

    def _probe_beside(self, company: int) -> torch.Tensor:
        """The probe's logits, all tokens but the last as a prompt and then the last, behind a row that has
        so many tokens and then one more; 0 for no such row."""
        n, ids = self.PROBE, self._probe_ids()
        logits = []
        for past, length, other in ((0, n - 1, company), (n - 1, 1, min(company, 1))):
            segments = [Segment(other, length, past, self.pool.tokens - n)]
            if other:
                segments.insert(0, Segment(0, other, company if past else 0, 0))
            others = [(i * 5 + 3) % self.vocab_size for i in range(other)]
            logits.append(self._forward(others + ids[past : past + length], self._ragged(segments))[-1])
        return torch.stack(logits)
