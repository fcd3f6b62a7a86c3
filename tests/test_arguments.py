"""What is no number, no device and no copy of a flag is said in one sentence; NumPy's numbers are numbers."""

import copy
import pickle

import numpy as np
import pytest
import torch

from qllm_ops import FULL, Activation, MoeRun, PriorityFlag, moe
from qllm_ops.testing import MoeCase

NO_INTEGERS = [True, 0.0, "0", None, torch.tensor(0), np.float64(0), np.bool_(0)]
NO_NUMBERS = [True, "5", [], torch.tensor(5.0), float("nan")]


def run():
    return MoeRun(**MoeCase(9, 16, 12, 4, 2).tensors())


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("method", ["pause", "resume", "paused", "wait", "hold"])
def test_a_class_is_an_integer(method, value):
    with pytest.raises(ValueError, match="priority must be an integer from 0 to 1, got"):
        getattr(PriorityFlag(), method)(value)


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_other_integers(value):
    flag = PriorityFlag()
    with pytest.raises(ValueError, match="classes must be a positive integer, got"):
        PriorityFlag(classes=value)
    with pytest.raises(ValueError, match="programs must be an integer from 1 to FULL, got"):
        flag.share(0, value)
    with pytest.raises(ValueError, match="priority must be an integer of at least 0, got"):
        moe(**MoeCase(9, 16, 12, 4, 2).tensors(), flag=flag, priority=value)
    if value is not None:
        with pytest.raises(ValueError, match="max_tiles must be a positive integer or None, got"):
            run().step(value)


def test_integers_of_numpy():
    flag = PriorityFlag(classes=np.int64(3))
    assert flag.classes == 3
    flag.share(np.int32(0), np.int64(5))
    flag.pause(np.uint8(1))
    assert flag.read() == (5, 0, FULL)
    assert all(type(value) is int for value in flag.read())
    given = MoeCase(9, 16, 12, 4, 2).tensors()
    assert torch.equal(moe(**given, flag=flag, priority=np.int64(2)), moe(**given))
    stepped = run()
    stepped.step(np.int64(1))
    assert stepped.tiles_done == 1


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_times_are_numbers(value):
    flag = PriorityFlag()
    words = "timeout_s must be a positive number of seconds or None, got"
    with pytest.raises(ValueError, match=words):
        flag.pause(0, timeout_s=value)
    with pytest.raises(ValueError, match=words), flag.urgent(1, timeout_s=value):
        pass
    assert flag.read() == (FULL, FULL)
    with pytest.raises(ValueError, match="timeout_s must be a number of seconds or None, got"):
        flag.wait(0, value)


def test_times_of_numpy():
    flag = PriorityFlag(clock=lambda: 0.0)
    flag.pause(0, timeout_s=np.float32(2.5))
    assert flag.paused(0)
    assert not flag.wait(0, np.float64(0.0))


@pytest.mark.parametrize("value", ["foo", "mps", None, torch.float32], ids=repr)
def test_a_device_that_has_no_flags(value):
    with pytest.raises(ValueError, match=f"device must be a CPU or a CUDA device, got {value}"):
        PriorityFlag(value)


def test_a_device_that_is_not_here():
    count = torch.cuda.device_count()
    words = f"device must be a CPU or one of the {count} CUDA devices that torch finds here, got cuda"
    with pytest.raises(ValueError, match=words):
        PriorityFlag(f"cuda:{count}")
    if not count:
        with pytest.raises(ValueError, match=words):
            PriorityFlag("cuda")


@pytest.mark.parametrize("name", ["clock", "on_event"])
def test_a_function_of_the_flag_is_one(name):
    with pytest.raises(TypeError, match=f"{name} must be a function, got int"):
        PriorityFlag(**{name: 5})


def test_a_copy_of_a_model_listens_to_the_same_flag():
    model = torch.nn.Linear(2, 2)
    model.flag = PriorityFlag()
    copied = copy.deepcopy(model)
    assert copied.flag is model.flag
    assert copy.copy(model.flag) is model.flag
    with pytest.raises(TypeError, match="a PriorityFlag cannot be pickled"):
        pickle.dumps(model)


@pytest.mark.parametrize("value", [True, "1", [], torch.tensor(1.0), 1j], ids=repr)
@pytest.mark.parametrize("name", ["alpha", "limit", "up_offset"])
def test_what_an_activation_is_made_of(name, value):
    with pytest.raises(TypeError, match=f"activation: {name} must be a number"):
        Activation("silu", **{name: value})
    assert Activation("silu", **{name: np.float32(1)}) == Activation("silu", **{name: 1})
