"""flexdistill: pretrained transformers with linear attention, in one command.

Importing the package registers Flexformer checkpoints with transformers' auto classes as soon as transformers is there
to be asked; the heavy modules load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import convert, evaluate, plan
    from .errors import FlexdistillError, NonFiniteLossError
    from .recipe import Recipe
