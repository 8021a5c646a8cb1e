"""The stages of training; called, the package is `flexdistill.api.distill`, whose name it shares."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from ..api import distill

        return distill(*args, **settings)


sys.modules[__name__].__class__ = _Callable
