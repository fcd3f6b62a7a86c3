"""The Triton kernels left at any place and resumed, under the interpreter.

What a flag, a quantum, a share and a gate do to a run, and to no bit of its output.
"""

import os
import random
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; tests/test_triton_gpu.py is for GPUs", allow_module_level=True)

from interpreted import (
    TILES,
    assert_close,
    at_shared_words,
    finish,
    flipping,
    hooked,
    layer,
    layers,
    uninterrupted,
    width,
)

from qllm_ops import FULL, PriorityFlag, moe
from qllm_ops.kernels import tickets
from qllm_ops.plan import SORTED_PAIRS, plan_of
from qllm_ops.triton_moe import ROUNDS, TritonMoe

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@given(
    layers(),
    st.sampled_from(TILES),
    st.lists(st.integers(0, 12), max_size=12),
    st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from((1, 2, 2**31 - 1)),
    st.booleans(),
    st.booleans(),
)
def test_preemption_changes_no_bit(inputs, tiles, gaps, quanta, share, in_chunks, sorts):
    expected = uninterrupted(inputs, tiles)
    assert_close(inputs, expected)
    flag = PriorityFlag()
    flag.share(0, share)
    with mock.patch("qllm_ops.plan.SORTED_PAIRS", SORTED_PAIRS if sorts else ()):
        plan = plan_of(inputs, tiles, width(inputs, tiles) if in_chunks else None)
    run = TritonMoe(inputs, flag, 0, plan=plan)
    done = 0
    with flipping(flag, gaps):
        for quantum in finish(run, flag, quanta):
            assert done <= run.tiles_done <= run.tiles_total
            assert quantum is None or run.tiles_done <= done + quantum
            done = run.tiles_done
    assert torch.equal(run.output, expected)
    assert not run.output.isnan().any()


@given(layers(fused=True), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_launches_resume_without_the_host_knowing(inputs, gaps):
    """What a gate on the stream does: launches one after another, and nobody reads how far they came."""
    expected = uninterrupted(inputs)
    flag = PriorityFlag()
    run = TritonMoe(inputs, flag, 0)
    if inputs.num_tokens:
        with flipping(flag, gaps):
            for _ in range(len(gaps) + 2):
                for phase in run.plan.phases:
                    run._launch(phase)
                flag.resume(0, "test")
        run._read()
    assert run.tiles_done == run.tiles_total
    assert torch.equal(run.output, expected)


class StreamGate(PriorityFlag):
    """A stream gate that opens as soon as something is held by it.

    What really waits is a stream. Here launches run where they are enqueued, so nobody else would open it.
    """

    def __init__(self):
        super().__init__(gate="stream")
        self.held = 0

    def hold(self, priority):
        self.held += self.paused(priority)
        self.resume(priority, "test")
        super().hold(priority)


@given(
    layers(), st.sampled_from(TILES), st.lists(st.integers(0, 12), max_size=30), st.booleans(),
    st.sampled_from((1, 2, 2**31 - 1)),
)  # fmt: skip
def test_a_gated_layer_is_whole_however_often_it_is_paused(inputs, tiles, gaps, in_chunks, share):
    expected = uninterrupted(inputs, tiles)
    flag = StreamGate()
    flag.share(0, share)
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, tiles, width(inputs, tiles) if in_chunks else None))
    with flipping(flag, gaps):
        run.launch_all(gated=True)
    assert torch.equal(run.output, expected)
    assert run.tiles_done == run.tiles_total


def test_the_last_launch_of_a_gated_phase_ignores_the_flag():
    """Paused again and again: every launch that may be left is, and none after the last is waited for."""
    inputs = layer(9, 29, 19, 3, 2)
    flag = StreamGate()
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, TILES[1]))
    launches, launch = [], run._launch

    def paused_at_once(phase, poll=True):
        launches.append((phase.kernel, poll))
        flag.pause(0, "test")
        launch(phase, poll=poll)

    run._launch = paused_at_once
    run.launch_all(gated=True)
    assert torch.equal(run.output, uninterrupted(inputs, TILES[1]))
    assert {kernel: launches.count((kernel, True)) for kernel in ROUNDS} == ROUNDS
    assert [launches.count((kernel, False)) for kernel in ROUNDS] == [1, 1, 1]
    assert flag.held == len(launches) - 1  # before each but the first it was paused


def test_moe_stands_still_before_it_launches_anything():
    flag = PriorityFlag(gate="stream")
    flag.pause(0, "test")
    threading.Timer(0.2, flag.resume, (0, "test")).start()
    began = time.monotonic()
    inputs = layer(5)
    output = moe(
        inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj, inputs.top_k_index, inputs.top_k_weights,
        flag=flag, backend="triton",
    )  # fmt: skip
    assert time.monotonic() - began > 0.15
    assert torch.equal(output, uninterrupted(inputs))


def test_a_quantum_is_used_up_exactly_across_phases():
    inputs = layer(9, 29, 19, 3, 2)
    run = TritonMoe(inputs, PriorityFlag(), 0, plan=plan_of(inputs, TILES[1]))
    counts = [run.tiles_done for _ in finish(run, quanta=(7,))]
    assert counts == [*range(7, run.tiles_total, 7), run.tiles_total]
    assert torch.equal(run.output, uninterrupted(inputs, TILES[1]))


def test_a_paused_class_does_nothing():
    flag = PriorityFlag()
    flag.pause(0)
    inputs = layer()
    run = TritonMoe(inputs, flag, 0)
    assert not run.step(None)
    assert run.tiles_done == run.tiles_taken == 0
    other = TritonMoe(inputs, flag, 1)
    assert other.step(None)
    flag.resume(0)
    assert run.step(None)
    flag.pause(0)
    assert run.step(None)  # nothing left to be paused
    assert torch.equal(run.output, other.output)


def test_a_pause_past_its_deadline_ends_at_the_next_step():
    now = [0.0]
    flag = PriorityFlag(clock=lambda: now[0])
    flag.pause(0, timeout_s=1.0)
    run = TritonMoe(layer(), flag, 0)
    assert not run.step(None)
    now[0] = 2.0
    assert run.step(None)


def test_a_flag_leaves_within_one_tile():
    """Paused at any poll and any atomic operation of a launch, no program takes another tile."""
    inputs = layer(9, 29, 19, 3, 2)
    whole = TritonMoe(inputs, None, 0, plan=plan_of(inputs, TILES[1]))
    whole.launch_all()
    assert whole.tiles_total == whole.tiles_done
    for place in range(0, 2 * whole._totals[0], 5):
        flag = PriorityFlag()
        run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, TILES[1]))
        with flipping(flag, [place]):
            run.step(None)
        # A poll and a ticket take turns; a pause between the two comes too late for that tile.
        assert run.tiles_done == -(-place // 2)


def test_an_exit_inside_of_a_tile_gives_it_back():
    """Paused at any atomic operation: what was begun is left, and the next step takes it first."""
    inputs = layer(9, 29, 19, 3, 2)
    expected = uninterrupted(inputs, TILES[3])
    halfway = 0
    for place in range(0, 60, 3):
        flag = PriorityFlag()
        run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, TILES[3]))
        with flipping(flag, [place]):
            run.step(None)
        returned = run._state[-run.plan.slots :]
        waiting = returned[returned >= 0].tolist()
        assert len(waiting) == run.tiles_taken - run.tiles_done <= 1  # programs run one after another
        halfway += len(waiting)
        # A quantum of one takes a fresh tile only if none waits.
        flag.resume(0, "test")
        taken = run._state[tickets.TICKETS.value].item()
        run.step(1)
        if waiting:
            assert run._state[tickets.TICKETS.value].item() == taken
            assert not (run._state[-run.plan.slots :] >= 0).any()
        list(finish(run, flag))
        assert torch.equal(run.output, expected)
        assert run.tiles_taken == run.tiles_total + len(waiting)
    assert halfway > 5


@pytest.mark.parametrize("tiles", TILES, ids=["default", "small", "uneven", "exits"])
def test_a_share_that_grows_is_taken_up_by_the_next_launch(tiles):
    inputs = layer(9, 29, 19, 3, 2)
    flag = PriorityFlag()
    flag.share(0, 1)
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, tiles))
    seen = []

    def before():
        seen.append(1)
        if len(seen) == 6:
            flag.share(0, FULL)

    with at_shared_words(before):
        assert not run.step(None)  # the one program that ran has left for the others' sake
        assert 0 < run.tiles_done < run._totals[0]
        list(finish(run))
    assert torch.equal(run.output, uninterrupted(inputs, tiles))
    # Shrinking needs no new launch: those that have to go go, and the others stay.
    run = TritonMoe(inputs, flag, 0, plan=plan_of(inputs, tiles))
    seen.clear()
    with at_shared_words(lambda: flag.share(0, 1)):
        assert run.step(None)


def test_who_looks_while_another_thread_steps_sees_no_tile_of_that_step():
    """A look in the middle, at every place: the output of a step that has not returned is not to be had."""
    operations = []
    run = TritonMoe(layer(3), None, 0)
    with hooked("create_atomic_rmw", lambda *_: operations.append(None)):
        assert run.step(1000)
    total = run.tiles_done
    for place in (0, len(operations) // 2, len(operations) - 1):
        run, looks = TritonMoe(layer(3), None, 0), iter(range(len(operations)))
        seen = []

        def look(*_, run=run, looks=looks, place=place, seen=seen):
            if next(looks) == place:
                seen.append((run.tiles_total, run.tiles_done))

        with hooked("create_atomic_rmw", look):
            assert run.step(1000)
        assert seen == [(total, 0)]
        assert run.tiles_done == total


def test_a_step_in_a_cuda_graph_is_refused_in_a_sentence(monkeypatch):
    run = TritonMoe(layer(3), None, 0)
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a step waits.* in a CUDA graph take moe without a flag"):
        run.step(None)


def test_a_phase_that_may_not_begin_gives_out_no_ticket():
    flag = PriorityFlag()
    run = TritonMoe(layer(9), flag, 0)
    # Paused at the second ticket, and running again when the four programs have all left.
    with flipping(flag, [3, 8]):
        run.step(None)
    assert flag.read()[0] > 0
    taken = run._state[tickets.TICKETS.value :][:3].tolist()
    assert taken[0] == 2 < run._totals[0]
    assert taken[1:] == [0, 0]


@pytest.mark.parametrize("gated", [False, True])
def test_launch_all_never_asks_the_device(monkeypatch, gated):
    expected = uninterrupted(layer(7))

    def refuse(*_, **__):
        raise AssertionError("this waits for the device")

    inputs = layer(7)
    run = TritonMoe(inputs, None, 0)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "bincount", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        run = TritonMoe(inputs, PriorityFlag(gate="stream"), 0)
        run.launch_all(gated)
    assert torch.equal(run.output, expected)


@pytest.mark.parametrize("gate", ["host", "stream"])
@pytest.mark.parametrize("seed", range(2))
def test_a_thread_that_flips_the_flag_at_random_changes_no_bit(seed, gate):
    inputs = layer(9, 29, 19, 3, 2, dtype=torch.bfloat16, seed=seed)
    expected = uninterrupted(inputs)
    flag = PriorityFlag(gate=gate)
    flag.pause(0, "thread")
    rng, finished = random.Random(seed), threading.Event()

    def flip():
        while not finished.is_set():
            rng.choice((flag.pause, flag.resume, flag.resume))(0, "thread")
            flag.share(0, rng.choice((1, 2, 2**31 - 1)))
            time.sleep(rng.random() * 0.02)
        flag.resume(0, "thread")

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(3):
            output = moe(
                inputs.hidden_states, inputs.gate_up_proj, inputs.down_proj, inputs.top_k_index,
                inputs.top_k_weights, flag=flag, backend="triton",
            )  # fmt: skip
            assert torch.equal(output, expected)
    finally:
        finished.set()
        thread.join()


def test_threads_take_turns_in_the_interpreter():
    """It has one program at a time: of two that ran at once, each would take the other's number."""
    inputs = [layer(2 + seed, seed=seed) for seed in range(2)]
    expected = [uninterrupted(each) for each in inputs]
    outputs, together = {}, threading.Barrier(2)

    def compute(number):
        together.wait(10)
        outputs[number] = uninterrupted(inputs[number])

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(2)]
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_interval)
    assert sorted(outputs) == [0, 1]
    for number, output in outputs.items():
        assert torch.equal(output, expected[number])
