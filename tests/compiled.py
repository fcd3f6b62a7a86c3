"""Compute layers with compiled kernels on a device that is not there (tests/ptx_device.py).

    python tests/compiled.py DIRECTORY < requests.json > records.json

A request is {"name": one of tests/compiled_cases.py, "capability": 80 or 90}. The record says what went wrong
("error"), or how often a layer was interrupted. DIRECTORY holds Triton's cache. A program of its own for the
reason that tests/compile_kernels.py gives.
"""

import json
import random
import sys
import traceback
from dataclasses import replace
from unittest import mock

import torch
from compiled_cases import CASES
from ptx_device import Device
from triton.runtime.jit import JITFunction

from qllm_ops import FULL, PriorityFlag
from qllm_ops import plan as plan_module
from qllm_ops.inputs import MoeInputs, check_inputs
from qllm_ops.kernels import tickets
from qllm_ops.plan import Plan, signature_of
from qllm_ops.testing import assert_close, assert_same_bits, poisoned_empty
from qllm_ops.triton_moe import TritonMoe

MULTIPROCESSORS = 3
DEVICES = {capability: Device(capability) for capability in (80, 90)}


def compute(request: dict) -> dict:
    device, arch = DEVICES[request["capability"]], f"sm_{request['capability']}"
    device.use()
    with (
        mock.patch.object(plan_module, "arch_of", return_value=arch),
        mock.patch.object(plan_module, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(plan_module, "DEPENDENT_LAUNCHES", True),
        poisoned_empty(),
    ):
        return examine(device, *CASES[request["name"]])


def examine(device: Device, case, tiles, width) -> dict:
    inputs = check_inputs(**case.tensors())
    plan = Plan(signature_of(inputs), tiles, width)  # All but the first launch of a kernel are kept ones.
    whole = TritonMoe(inputs, None, 0, plan=plan)
    whole.launch_all()
    assert_close(whole.output, case)
    assert whole.tiles_done == whole.tiles_total
    record = {}
    for disturb in (pause_for_good, pause_and_share):
        flag, draw = PriorityFlag(), random.Random(case.seed)
        run = TritonMoe(inputs, flag, 0, plan=plan)
        record[disturb.__name__] = disturb(device, run, flag, draw)
        assert run.tiles_done == run.tiles_total == whole.tiles_total
        assert_same_bits(run.output, whole.output)
    for name, which in (("routing", ("top_k_index", "top_k_weights")), ("hidden_states", ("hidden_states",))):
        moved = replace(inputs, **{field: at_an_odd_address(getattr(inputs, field)) for field in which})
        record[f"{name}_moved"] = compare_launches(moved, plan, Plan(plan.signature, tiles, width))
    return record


def compare_launches(inputs: MoeInputs, used: Plan, new: Plan) -> dict:
    """Whether layers of both plans launch the same, and how many launches of each Triton had to look into."""
    found, launched = {}, {}
    for name, plan in (("used", used), ("new", new)):
        with (
            mock.patch("ptx.launch") as launch,
            mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as by_triton,
        ):
            TritonMoe(inputs, None, 0, plan=plan).launch_all()
        launched[name] = [
            # Addresses of buffers differ, their sizes do not.
            (code, threads, shared, [x if isinstance(x, int) else x.shape for x in passed], blocks)
            for code, threads, shared, passed, blocks in (call.args for call in launch.call_args_list)
        ]
        found[name] = {"launches": launch.call_count, "by_triton": by_triton.call_count}
    return {**found, "same": launched["used"] == launched["new"]}


def at_an_odd_address(x: torch.Tensor) -> torch.Tensor:
    """Like a slice of the routing of a larger batch: not a multiple of 16 bytes."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(x)


def pause_for_good(device: Device, run: TritonMoe, flag: PriorityFlag, draw: random.Random) -> dict:
    """Pause at any atomic operation of a step, until it has returned: nobody begins another tile."""
    left = given_back = 0
    before = {}

    def taken() -> int:
        return int(run._state[tickets.TICKETS.value : tickets.DONE.value].sum())

    while True:
        patience = draw.randrange(1, 12 + left)  # longer and longer, or a tile with exits might never be done

        def between() -> None:
            nonlocal patience
            patience -= 1
            if patience == 0:
                before["taken"] = taken()
                flag.pause(0)

        device.between = between
        done = run.step(None)
        device.between = lambda: None
        if patience <= 0:
            # A program that had looked at the flag before may still take a ticket; none does in later phases.
            assert taken() - before["taken"] <= programs(run)
            assert run.tiles_taken - run.tiles_done - given_back <= programs(run)
            given_back = run.tiles_taken - run.tiles_done
            flag.resume(0)
            left += not done
        if done:
            return {"left": left, "given_back": given_back}


def programs(run: TritonMoe) -> int:
    return max(run.plan.programs(phase) for phase in run.plan.phases)


def pause_and_share(device: Device, run: TritonMoe, flag: PriorityFlag, draw: random.Random) -> dict:
    """Pause, resume and share at any atomic operation, with quanta or without."""
    steps = 0

    def between() -> None:
        chance = draw.random()
        if chance < 0.1:
            flag.pause(0)
        elif chance < 0.2:
            flag.resume(0)
        elif chance < 0.3:
            flag.share(0, draw.choice([1, 2, FULL]))

    device.between = between
    done = run.tiles_done
    while not run.step(draw.choice([None, 1, 3, 8])):
        assert run.tiles_done >= done
        done, steps = run.tiles_done, steps + 1
        if steps % 8 == 0:  # or chance might let nothing run for long
            flag.share(0, FULL)
        flag.resume(0)
    device.between = lambda: None
    return {"left": steps, "given_back": run.tiles_taken - run.tiles_done}


if __name__ == "__main__":
    records = []
    for request in json.load(sys.stdin):
        try:
            records.append(compute(request))
        except Exception:
            records.append({"error": traceback.format_exc()})
    json.dump(records, sys.stdout)
