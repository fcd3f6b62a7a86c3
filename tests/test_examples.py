"""The examples run, as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, cwd=EXAMPLES.parent
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "swap_experts.py": "bit for bit: True",
        "custom_model.py": "one graph, the same bits: True",
    }.items(),
)
def test_example(name, says):
    assert says in run(str(EXAMPLES / name))


def test_property_test():
    assert "1 passed" in run("-m", "pytest", "-q", str(EXAMPLES / "property_test.py"))


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "swap_experts.py", "custom_model.py", "property_test.py",
        "kernelize.py",  # in test_kernels_layer.py
    }  # fmt: skip
