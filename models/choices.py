"""What the configs of a model name (its experts, its attention), changed for a while and put back.

transformers keeps such a choice on the config and reads it in every forward pass, and models may share a
config. So what one model chose is put back when no other model needs it any more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

from torch import nn


class Choice:
    """One such attribute of configs, ``_experts_implementation`` say, for every model of this process.

    What a model named before is kept on the model, beside its configs, so that a copy of it, or a pickle, can
    be put back by itself.
    """

    def __init__(self, name: str):
        self.name = name
        self._kept = f"_qllm_before{name}"
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __contains__(self, model: nn.Module) -> bool:
        """Whether the model's choice has been changed."""
        return self._kept in vars(model)

    def others(self, model: nn.Module) -> list[nn.Module]:
        """The models beside this one whose choice has been changed."""
        with self._lock:
            return [other for other in self._models if other is not model]

    def read(self, model: nn.Module) -> list[tuple[object, str | None]]:
        """Every config in the model, and what it names now."""
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        return [
            (config, getattr(config, self.name)) for config in configs.values() if hasattr(config, self.name)
        ]

    def remember(self, model: nn.Module) -> bool:
        """Call before the model's configs are changed. False if they have been already."""
        with self._lock:
            self._models.add(model)
            if model in self:
                return False
            before = [(config, self._first(config, name)) for config, name in self.read(model)]
            setattr(model, self._kept, before)
            return True

    def put_back(self, model: nn.Module) -> None:
        """Undo the model's change, except on configs that another model has changed too."""
        with self._lock:
            mine = vars(model).pop(self._kept, [])
            self._models.discard(model)
            in_use = {id(config) for config, _ in self._of_all()}
            self.write([(config, name) for config, name in mine if id(config) not in in_use])

    def write(self, names: list[tuple[object, str | None]]) -> None:
        for config, name in names:
            # The public setter would also overwrite the sub-configs, which have an entry of their own.
            setattr(config, f"{self.name}_internal", name)

    def _first(self, config: object, name: str | None) -> str | None:
        """What the config named before the first model changed it."""
        return next((before for other, before in self._of_all() if other is config), name)

    def _of_all(self) -> Iterator[tuple[object, str | None]]:
        for model in self._models:
            yield from vars(model).get(self._kept, ())
