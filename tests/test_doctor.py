"""The doctor: says what is here, passes a healthy operator, and finds a sick one."""

import re

import pytest
import torch
from packaging.specifiers import SpecifierSet
from rich.console import Console

from qllm_ops import MoeRun, moe
from qllm_ops.scheduler import doctor
from qllm_ops.scheduler.doctor import Case, Check, self_test

SMALL = Case("torch", "cpu", torch.float32, 60, 32, 48, exit_tokens=0)
TIMED = Case("torch", "cpu", torch.float32, 60, 128, 256, exit_tokens=16384)
CLOSE, QUANTA, FLIPS, EXIT = range(4)


def examine(monkeypatch, *tests: Check) -> tuple[bool, str]:
    """The doctor's verdict and output, with ``tests`` in place of its self-tests."""
    monkeypatch.setattr(doctor, "_self_tests", lambda: iter(tests))
    return printed()


def printed() -> tuple[bool, str]:
    console = Console(width=300)
    with console.capture() as captured:
        good = doctor.examine(console)
    return good, captured.get()


# -- a healthy machine -----------------------------------------------------------------------------------


def test_everything_passes_here():
    good, text = printed()
    assert good, text
    assert "FAIL" not in text
    assert "everything is fine" in text
    for name in ("python", "torch", "triton", "transformers", "numpy", "safetensors"):
        assert re.search(rf"pass  {name}: \d", text)
    backend = "triton" if torch.cuda.is_available() else "torch"
    assert f"auto takes '{backend}', because there is" in text
    backends = (
        ["triton on cuda"] if torch.cuda.is_available() else ["torch on cpu", "triton in its interpreter"]
    )
    for backend in backends:
        for test in (
            "close to the reference: RMS",
            "same bits after quanta",
            "same bits with a second thread",
        ):
            assert f"pass  {backend}, float32, {test}" in text
    assert "leaves when paused: a step of" in text


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_healthy_operator_passes(backend):
    case = Case(backend, "cpu", torch.float32, 60, 32, 48)
    assert [check.passed for check in self_test(case)] == [True, True, True]


# -- a sick operator -------------------------------------------------------------------------------------


class Left(MoeRun):
    """Was it left early? Then its output is off by the smallest amount."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left = False

    def step(self, max_tiles=None):
        done = super().step(max_tiles)
        self.left = self.left or not done
        return done

    @property
    def output(self):
        right = super().output
        if not self.left:
            return right
        wrong = right.clone()
        wrong[0, 0] = torch.nextafter(wrong[0, 0], torch.tensor(torch.inf))
        return wrong


class Deaf(MoeRun):
    """Never looks at its flag."""

    def __init__(self, *args, flag=None, **kwargs):
        super().__init__(*args, **kwargs)


class Greedy(MoeRun):
    """Takes tiles and does not do them."""

    @property
    def tiles_taken(self):
        return super().tiles_taken + 1


class Broken(MoeRun):
    def step(self, max_tiles=None):
        raise RuntimeError("no such kernel")


def verdicts(monkeypatch, sick: type, case: Case = SMALL) -> list[Check]:
    monkeypatch.setattr(doctor, "MoeRun", sick)
    return list(self_test(case))


def test_a_bit_that_differs_after_leaving_is_found(monkeypatch):
    checks = verdicts(monkeypatch, Left, TIMED)
    assert checks[CLOSE].passed
    assert not checks[QUANTA].passed
    assert "different output" in checks[QUANTA].detail
    assert not checks[FLIPS].passed


def test_running_while_paused_is_found(monkeypatch):
    checks = verdicts(monkeypatch, Deaf, TIMED)
    assert not checks[QUANTA].passed
    assert "ran while paused" in checks[QUANTA].detail
    assert not checks[EXIT].passed
    assert "left early in" in checks[EXIT].detail


def test_a_lost_tile_is_found(monkeypatch):
    assert not verdicts(monkeypatch, Greedy)[QUANTA].passed


def test_a_wrong_result_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "moe", lambda *args, **kwargs: moe(*args, **kwargs) * 1.001)
    check = list(self_test(SMALL))[CLOSE]
    assert not check.passed
    assert "RMS error 1.0e-03" in check.detail


def test_not_a_number_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "moe", lambda *args, **kwargs: moe(*args, **kwargs) * torch.nan)
    assert not list(self_test(SMALL))[CLOSE].passed


def test_an_operator_that_raises_fails_the_test_and_not_the_doctor(monkeypatch):
    checks = verdicts(monkeypatch, Broken)
    assert checks[CLOSE].passed
    assert [check.passed for check in checks[QUANTA:]] == [False, False]
    assert checks[QUANTA].detail == "RuntimeError: no such kernel"


# -- the verdict -----------------------------------------------------------------------------------------


def test_one_failure_fails_the_whole(monkeypatch):
    assert examine(monkeypatch, Check("one", True), Check("two", None, "skipped"))[0]
    good, text = examine(monkeypatch, Check("one", True), Check("two", False, "broken"), Check("three", True))
    assert not good
    assert "FAIL  two: broken" in text
    assert "something is wrong" in text


@pytest.mark.parametrize(
    ("version", "passed"), [(None, False), ("2.8.1", False), ("2.9.0", True), ("2.13.0+cpu", True)]
)
def test_versions_are_held_against_what_is_supported(monkeypatch, version, passed):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: version if name == "torch" else installed(name))
    good, text = examine(monkeypatch)
    assert good is passed
    assert (f"pass  torch: {version}" in text) is passed
    if not passed:
        assert f"FAIL  torch: {version or 'not installed'}, wanted >=2.9" in text


@pytest.mark.parametrize(
    ("threads", "spins", "gnu", "said"),
    [
        (
            2,
            True,
            True,
            "OpenMP: workers that wait spin, and a lane that stands still gives them back. Set OMP_WAIT_",
        ),
        (2, True, False, "cannot give them back (no GNU OpenMP). Set OMP_WAIT_POLICY=PASSIVE"),
        (2, False, True, "OpenMP: workers that wait sleep"),
        (1, True, True, "OpenMP: one thread per operation"),
    ],
)
def test_whether_waiting_threads_spin_is_said(monkeypatch, threads, spins, gnu, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor.openmp, "spinning", lambda: spins)
    monkeypatch.setattr(doctor.openmp, "can_release", lambda: gnu)
    good, text = examine(monkeypatch)
    assert good
    assert said in text


def test_an_old_python_is_found():
    assert not doctor._supported("python", "3.9.2", SpecifierSet(">=3.10")).passed


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"triton": None}, "triton is not installed"),
        ({"triton": "3.6.0", "numpy": "2.4.6"}, "does not run with numpy 2.4.6"),
    ],
)
def test_an_interpreter_that_cannot_run_is_not_a_failure(monkeypatch, versions, said):
    monkeypatch.setattr(doctor, "_installed", versions.get)
    (check,) = doctor._interpreted()
    assert check.passed is None
    assert said in check.detail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-c", "import sys; sys.exit('ImportError: no kernels')"], "ImportError: no kernels"),
        (["-c", "raise SystemExit(3)"], "exit code 3"),
        (["-c", "import time; time.sleep(60)"], "not done after 1 s"),
    ],
)
def test_an_interpreter_that_dies_is_a_failure(monkeypatch, arguments, said):
    run = doctor.subprocess.run
    monkeypatch.setattr(doctor, "INTERPRETER_TIMEOUT_S", 1 if "sleep" in arguments[1] else 60)
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda command, **options: run([command[0], *arguments], **options)
    )
    (check,) = doctor._interpreted()
    assert check.passed is False
    assert said in check.detail
