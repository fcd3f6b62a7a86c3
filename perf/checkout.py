"""Makes this checkout's packages importable for the scripts beside it, whether or not they are installed.

    import checkout  # before anything of qllm_ops

The checkout goes before an installed distribution: what is measured is what lies here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {
    "qllm_ops": ROOT / "qllm_ops",
    "qllm_ops.models": ROOT / "models",
    "qllm_ops.scheduler": ROOT / "scheduler",
}


class Finder:
    """Finds the three packages; their modules are then found in their folders as usual."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def register() -> None:
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


def commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside of a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@contextmanager
def without_rich() -> Iterator[None]:
    """Let a module that draws with rich be imported where rich is missing, for its other functions.

    The stand-ins are gone after the body: other libraries ask whether rich is there.
    """
    if importlib.util.find_spec("rich") is not None:
        yield
        return
    names = ("rich", "rich.box", "rich.console", "rich.table")
    modules = {name: types.ModuleType(name) for name in names}
    modules["rich"].box = modules["rich.box"]
    modules["rich.console"].Console = modules["rich.table"].Table = object
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


register()
