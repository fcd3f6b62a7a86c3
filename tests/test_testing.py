"""A kernel that is broken on purpose is found, in every run: nothing here is drawn."""

import functools
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings

from qllm_ops import ACTIVATIONS, Activation, MoeRun, PriorityFlag, moe_reference, testing

BACKENDS = ["torch"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")

spec = importlib.util.spec_from_file_location(
    "property_test", Path(__file__).parent.parent / "examples" / "property_test.py"
)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


class Whole(example.TokenByToken):
    """The example's kernel, with a method for each thing that may be broken."""

    left = False

    def route(self, index, weights):
        return index, weights

    def options_of(self):
        return self.options

    def token(self, number):
        x, index, weights = (of[number : number + 1] for of in self.batch)
        wide = [weight.float() for weight in self.weights]
        return moe_reference(x.float(), *wide, *self.route(index, weights), **self.options_of())[0]

    def may_run(self):
        return not (self.flag and self.flag.paused(self.priority))

    def step(self, max_tiles=None):
        end = self.tiles_total if max_tiles is None else min(self.tiles_done + max_tiles, self.tiles_total)
        while self.tiles_done < end and self.may_run():
            self.output[self.tiles_done] = self.token(self.tiles_done)
            self.tiles_done += 1
        self.left |= not self.done
        return self.done

    @property
    def num_experts(self):
        return len(self.weights[1])


def routes(change):
    """A kernel whose routing is ``change(kernel, index, weights)``."""
    return type(change.__name__, (Whole,), {"route": change})


def without(name, value=None):
    """A kernel that knows nothing of an option."""
    known = lambda self: {**self.options, name: value} if name in self.options else self.options  # noqa: E731
    return type(f"without_{name}", (Whole,), {"options_of": known})


def takes(kind, other):
    """A kernel that computes another activation in place of those for which ``kind`` holds."""

    def options_of(self):
        activation = self.options["activation"]
        return {**self.options, "activation": other(activation) if kind(activation) else activation}

    return type(f"takes_{other.__name__}", (Whole,), {"options_of": options_of})


@routes
def forgets_the_last_expert(self, index, weights):
    return index.where(index != self.num_experts - 1, -1), weights


@routes
def forgets_the_first_expert(self, index, weights):
    return index.where(index != 0, -1), weights


@routes
def takes_an_index_below_for_the_first_expert(self, index, weights):
    return index.clamp(min=0), weights


@routes
def takes_an_index_above_for_the_last_expert(self, index, weights):
    return index.clamp(max=self.num_experts - 1), weights


@routes
def counts_experts_from_the_end(self, index, weights):
    return torch.where(index == -1, self.num_experts - 1, index), weights


@routes
def sums_in_another_order_after_it_was_left(self, index, weights):
    return (index.flip(1), weights.flip(1)) if self.left else (index, weights)


@routes
def knows_an_expert_once(self, index, weights):
    again = [(index[0, :k] == index[0, k]).any() for k in range(index.shape[1])]
    return index.masked_fill(torch.tensor([again]), -1), weights


@routes
def adds_what_is_negative(self, index, weights):
    return index, weights.abs()


@routes
def has_three_places(self, index, weights):
    return index[:, :3], weights[:, :3]


class DropsATileAfterAPause(Whole):
    waited = False

    def step(self, max_tiles=None):
        if self.may_run() and self.waited and not self.done:
            self.waited = False
            self.tiles_done += 1
        self.waited |= not self.may_run() and self.tiles_done > 0
        return super().step(max_tiles)


class DropsTheLastTile(Whole):
    def token(self, number):
        token = super().token(number)
        return token if number + 1 < self.tiles_total else torch.full_like(token, float("nan"))


class AddsATileTwiceAfterItWasLeft(Whole):
    def step(self, max_tiles=None):
        if self.left and self.tiles_done > 0 and not self.done:
            self.output[self.tiles_done - 1] += self.token(self.tiles_done - 1)
        return super().step(max_tiles)


class WritesNoTokenThatNobodyTakes(Whole):
    def token(self, number):
        index = self.batch[1][number]
        taken = ((index >= 0) & (index < self.num_experts)).any()
        return super().token(number) if taken else self.output[number]


class RunsWhilePaused(Whole):
    def may_run(self):
        return True


class LeavesInTheMiddleOfATile(Whole):
    """And counts it: what was to come of it is missing."""

    def route(self, index, weights):
        return (index[:, :1], weights[:, :1]) if self.left and self.tiles_done % 2 else (index, weights)


class KnowsNoQuantum(Whole):
    def step(self, max_tiles=None):
        return super().step()


class SaysThatItIsDone(Whole):
    def step(self, max_tiles=None):
        super().step(max_tiles)
        return True


class SaysThatNothingIsNotDone(Whole):
    def step(self, max_tiles=None):
        return super().step(max_tiles) and self.tiles_total > 0


class ThrowsATileAway(Whole):
    @property
    def tiles_taken(self):
        return self.tiles_done + self.left


clamped = lambda activation: isinstance(activation, Activation)  # noqa: E731

BROKEN = [
    forgets_the_last_expert, forgets_the_first_expert, takes_an_index_below_for_the_first_expert,
    takes_an_index_above_for_the_last_expert, counts_experts_from_the_end,
    sums_in_another_order_after_it_was_left, knows_an_expert_once, adds_what_is_negative, has_three_places,
    DropsATileAfterAPause, DropsTheLastTile, AddsATileTwiceAfterItWasLeft, WritesNoTokenThatNobodyTakes,
    RunsWhilePaused, LeavesInTheMiddleOfATile, KnowsNoQuantum, SaysThatItIsDone, SaysThatNothingIsNotDone,
    ThrowsATileAway, without("gate_up_bias"), without("down_bias"), without("expert_norm"),
    without("weights_on_input", False), without("interleaved", False),
    takes(clamped, lambda act: Activation(act.kind, act.alpha, None, act.up_offset)),
    takes(clamped, lambda act: Activation(act.kind, act.alpha, act.limit)),
    takes(clamped, lambda act: Activation(act.kind, 1.0, act.limit, act.up_offset)),
    *(takes(lambda act, kind=kind: act == kind, lambda act: "silu") for kind in ACTIVATIONS[1:]),
    takes(lambda act: act == "gelu", lambda act: "gelu_tanh"),
    takes(lambda act: act == "gelu_tanh", lambda act: "gelu"),
    takes(lambda act: act == "relu2", lambda act: "relu"),
]  # fmt: skip


def property_of(kernel):
    """What the example holds its kernel against, of what is tried in every run only."""

    @settings(phases=[Phase.explicit])
    @testing.telling()
    @given(case=testing.moe_cases(), schedule=testing.schedules())
    def holds(case, schedule):
        flag = PriorityFlag()
        with testing.poisoned_empty():
            alone = kernel(**case.tensors())
            alone.step()
            testing.assert_close(alone.output, case)
            make_run = lambda: kernel(**case.tensors(), flag=flag)  # noqa: E731
            testing.assert_preemptible(make_run, alone.output, schedule, flag)

    return holds


@pytest.mark.parametrize("kernel", [Whole, *(functools.partial(MoeRun, backend=name) for name in BACKENDS)])
def test_a_whole_kernel_is_left_alone(kernel):
    property_of(kernel)()


@pytest.mark.parametrize("kernel", BROKEN, ids=[kernel.__name__ for kernel in BROKEN])
def test_a_broken_kernel_is_found(kernel):
    with pytest.raises(AssertionError):
        property_of(kernel)()


def test_the_example_tries_them():
    tried = example.test_token_by_token.hypothesis_explicit_examples
    assert [one.kwargs["case"] for one in tried] == list(testing.TELLING)


def test_who_computes_less_says_so():
    tried = []

    @settings(phases=[Phase.explicit])
    @testing.telling(lambda case: case.dtype == torch.float32 and case.num_tokens)
    @given(case=testing.moe_cases(), schedule=testing.schedules())
    def holds(case, schedule):
        tried.append(case)

    holds()
    assert 0 < len(tried) < len(testing.TELLING)
    assert all(case.dtype == torch.float32 for case in tried)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "foo"}, "layout must be one of concatenated, .* got 'foo'"),
        ({"routing": "foo"}, "routing must be one of distinct, .* got 'foo'"),
        ({"quantized": "int3"}, "quantized must be one of None, fp8, .* got 'int3'"),
        ({"top_k": 6}, "top_k must be at most num_experts = 5 .* got 6"),
    ],
)
def test_a_case_that_there_is_none_of(changes, words):
    """It was made as some other one."""
    with pytest.raises(ValueError, match=words):
        replace(testing.MoeCase(3, 4, 4, 5, 2), **changes)


def test_a_class_that_nobody_can_flip():
    """The thread died, and the body went on undisturbed."""
    words = "priority must be an integer from 0 to 1, got 5"
    with pytest.raises(ValueError, match=words), testing.flipping(PriorityFlag(), 5):
        pass


def test_checks_of_what_no_kernel_should_give():
    case = testing.MoeCase(3, 4, 4, 5, 2)
    for output, words in ((None, "the output is a NoneType"), (torch.full((3, 4), torch.nan), "not finite")):
        with pytest.raises(AssertionError, match=words):
            testing.assert_close(output, case)
    eight = torch.tensor([1.0, -0.0]).to(torch.float8_e4m3fn)
    testing.assert_same_bits(eight, eight.clone())
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        testing.assert_same_bits(eight, eight.float().abs().to(torch.float8_e4m3fn))


def test_they_have_everything_that_is_drawn():
    cases = testing.TELLING
    assert {case.layout for case in cases} == set(testing.LAYOUTS)
    assert {case.routing for case in cases} == set(testing.ROUTINGS)
    assert {*ACTIVATIONS, *testing.CLAMPED, testing.own_gate} <= {case.activation for case in cases}
    assert {case.dtype for case in cases} == set(testing.DTYPES)
    for switch in ("biases", "weights_on_input", "batch_invariant", "expert_norm"):
        assert any(getattr(case, switch) for case in cases)
