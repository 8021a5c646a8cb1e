"""flexdistill: pretrained transformers with linear attention, in one command.

With this package imported, transformers' auto classes load Flexformer checkpoints. Registering them takes transformers,
whose import takes seconds: so it happens as soon as transformers is there, and the heavy modules load on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import compare, convert, evaluate, init, plan, train
    from .errors import FlexdistillError, LostProcessError, NonFiniteLossError, RunInterrupted
    from .hub import push
    from .recipe import Recipe

_PUBLIC = {
    "compare": ".api",
    "convert": ".api",
    "evaluate": ".api",
    "init": ".api",
    "plan": ".api",
    "train": ".api",
    "push": ".hub",
    "Recipe": ".recipe",
    "FlexdistillError": ".errors",
    "LostProcessError": ".errors",
    "NonFiniteLossError": ".errors",
    "RunInterrupted": ".errors",
}
__all__ = [
    "FlexdistillError",
    "LostProcessError",
    "NonFiniteLossError",
    "Recipe",
    "RunInterrupted",
    "compare",
    "convert",
    "evaluate",
    "init",
    "plan",
    "push",
    "train",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _register() -> None:
    importlib.import_module(".runtime.modeling_flexformer", __name__)


class _RegisterOnImport(MetaPathFinder, Loader):
    """Runs `_register` right after transformers is imported, then leaves."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
