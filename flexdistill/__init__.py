"""flexdistill: pretrained transformers with linear attention, in one command.

With this package imported, transformers' auto classes load Flexformer checkpoints. Registering them takes transformers,
whose import takes seconds: so it happens as soon as transformers is there, and the heavy modules load on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from importlib.abc import Loader

    from .api import compare, convert, distill, evaluate, init, plan, report, train
    from .errors import FlexdistillError, LostProcessError, NonFiniteLossError, RunInterrupted
    from .hub import push
    from .recipe import Recipe
    from .runtime.configuration_flexformer import KernelSpec
    from .runtime.feature_maps import FeatureMap, Features
    from .runtime.modeling_flexformer import FlexformerConfig
    from .runtime.registry import register_feature_map

_PUBLIC = {
    "compare": ".api",
    "convert": ".api",
    "distill": ".api",
    "evaluate": ".api",
    "init": ".api",
    "plan": ".api",
    "report": ".api",
    "train": ".api",
    "push": ".hub",
    "Recipe": ".recipe",
    "FlexdistillError": ".errors",
    "LostProcessError": ".errors",
    "NonFiniteLossError": ".errors",
    "RunInterrupted": ".errors",
    "FeatureMap": ".runtime.feature_maps",
    "Features": ".runtime.feature_maps",
    "FlexformerConfig": ".runtime.modeling_flexformer",
    "KernelSpec": ".runtime.configuration_flexformer",
    "register_feature_map": ".runtime.registry",
}
__all__ = [
    "FeatureMap",
    "Features",
    "FlexdistillError",
    "FlexformerConfig",
    "KernelSpec",
    "LostProcessError",
    "NonFiniteLossError",
    "Recipe",
    "RunInterrupted",
    "compare",
    "convert",
    "distill",
    "evaluate",
    "init",
    "plan",
    "push",
    "register_feature_map",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _register() -> None:
    importlib.import_module(".runtime.modeling_flexformer", __name__)


class _RegisterOnImport:
    """Runs `_register` right after transformers is imported, then leaves."""

    _loader: Loader

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
