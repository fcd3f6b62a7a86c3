"""What the configs of a model name (its experts, its attention), changed for a while and put back.

transformers keeps such a choice on the config and reads it in every forward pass, and models may share a
config. So what one model chose is put back when no other model needs it any more.
"""

from __future__ import annotations

import threading
import weakref

from torch import nn


class Choice:
    """One such attribute of configs, ``_experts_implementation`` say, for every model of this process."""

    def __init__(self, name: str):
        self.name = name
        self._before: weakref.WeakKeyDictionary[nn.Module, list[tuple[object, str | None]]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def __contains__(self, model: nn.Module) -> bool:
        """Whether the model's choice has been changed."""
        return model in self._before

    def read(self, model: nn.Module) -> list[tuple[object, str | None]]:
        """Every config in the model, and what it names now."""
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        return [
            (config, getattr(config, self.name)) for config in configs.values() if hasattr(config, self.name)
        ]

    def remember(self, model: nn.Module) -> bool:
        """Call before the model's configs are changed. False if they have been already."""
        with self._lock:
            if model in self._before:
                return False
            self._before[model] = [(config, self._first(config, name)) for config, name in self.read(model)]
            return True

    def put_back(self, model: nn.Module) -> None:
        """Undo the model's change, except on configs that another model has changed too."""
        with self._lock:
            mine = self._before.pop(model, [])
            in_use = {id(config) for others in self._before.values() for config, _ in others}
            self.write([(config, name) for config, name in mine if id(config) not in in_use])

    def write(self, names: list[tuple[object, str | None]]) -> None:
        for config, name in names:
            # The public setter would also overwrite the sub-configs, which have an entry of their own.
            setattr(config, f"{self.name}_internal", name)

    def _first(self, config: object, name: str | None) -> str | None:
        """What the config named before the first model changed it."""
        for others in self._before.values():
            for other, before in others:
                if other is config:
                    return before
        return name
