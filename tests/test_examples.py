"""The examples run, as they are, and so do the snippets of the README."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from served import prompt

import qllm_ops
from qllm_ops.models import save_preset

EXAMPLES = Path(__file__).parent.parent / "examples"
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


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


# -- the README ------------------------------------------------------------------------------------------

SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
STANDS_FOR = {
    'device="cuda"': 'device="cpu"',
    "a/folder/with/an/moe/model": "{folder}",
    # warm_up's comment says "same arguments": those of the call of moe above it.
    "warm_up(...)": "warm_up(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, flag=flag)",
}


def test_the_snippets_of_the_readme_run(tmp_path):
    """One after the other, as they are read: a later one uses the flag of the first and the model of the one
    before."""
    folder = save_preset("tiny", tmp_path / "model")
    hidden_states, gate_up_proj, down_proj = (
        torch.randn(5, 32),
        torch.randn(4, 96, 32),
        torch.randn(4, 32, 48),
    )
    there = {
        "hidden_states": hidden_states,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "top_k_index": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 4], [2, 0]]),
        "top_k_weights": torch.full((5, 2), 0.5),
        "prompt_ids": prompt(10),
        "long_prompt_ids": prompt(1000),
    }
    assert len(SNIPPETS) == 5
    made = []
    for snippet in SNIPPETS:
        for written, meant in STANDS_FOR.items():
            snippet = snippet.replace(written, meant.format(folder=folder))
        exec(compile(snippet, f"README.md: {snippet[:40]}", "exec"), there)
        made.append(dict(there))
    operator, installed, loaded, served, asynchronous = made
    assert operator["run"].done
    assert torch.equal(operator["y"], operator["run"].output)
    assert operator["flag"].read() == (qllm_ops.FULL, qllm_ops.FULL)
    assert installed["model"].config._experts_implementation == "qllm"
    assert loaded["model"] is not installed["model"]
    assert len(served["tokens"]) == 200
    assert len(served["urgent"].result()) == 50
    assert len(asynchronous["tokens"]) == 200
    assert asynchronous["tokens"] is not served["tokens"]


def test_the_commands_of_the_readme_run(tmp_path):
    (command,) = re.findall(r"`qllm (replay [^`]*--model[^`]*)`", README)
    save_preset("tiny", tmp_path / "FOLDER")
    rows = ["2023-11-16 18:15:00.0,40,3", "2023-11-16 18:15:00.1,30,3"]
    for name in ("chat.csv", "code.csv"):
        (tmp_path / name).write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    more = ["--quantize", "int4", "--batch-invariant"]
    assert all(option in README for option in ("`--quantize int4`", "`--batch-invariant`"))
    done = subprocess.run(
        [sys.executable, "-m", "qllm_ops.scheduler.cli", *shlex.split(command), *more],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "results" / "report.json").exists()
