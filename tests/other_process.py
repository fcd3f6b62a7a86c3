"""Programs of the tests that run in a process of their own, without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path


def records_of(script: str, requests: list[dict], directory: Path) -> list[dict]:
    """What a program such as tests/compile_kernels.py says of the requests; files in directory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(directory / "cache")}
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(directory)], input=json.dumps(requests),
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)
