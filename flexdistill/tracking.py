"""Experiment trackers beside the logs, by the names that Accelerate knows them by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from .errors import FlexdistillError
from .recipe import Recipe
from .recipe_sections import TrackingRecipe, flat

Track = Callable[[dict, int], None]


def check_trackers(recipe: TrackingRecipe) -> None:
    """Raises FlexdistillError for a tracker that Accelerate does not know, or whose package is not installed."""
    known, available = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    for name in recipe.trackers:
        if name not in known:
            raise FlexdistillError(f"Tracker {name!r} is unknown; choose among: {', '.join(known)}.")
        package = name.replace("_", "-")
        if name in LoggerType.list() and name not in available:
            raise FlexdistillError(
                f"Tracker {name!r} needs the package {package}; run `pip install {package}`, or leave it out."
            )


@contextlib.contextmanager
def tracking(recipe: Recipe, accelerator: Accelerator) -> Iterator[Track]:
    """Starts the recipe's trackers; yields `track(figures, step)`, to be called with numbers by name."""
    settings = recipe.tracking
    if not settings.trackers:
        yield lambda figures, step: None
        return
    accelerator.project_configuration.logging_dir = settings.folder
    accelerator.log_with = filter_trackers(settings.trackers, settings.folder)
    config = {key: x if isinstance(x, int | float | str) else str(x) for key, x in flat(recipe.model_dump()).items()}
    accelerator.init_trackers(settings.project, config=config)
    try:
        yield lambda figures, step: accelerator.log(figures, step=step)
    finally:
        # Accelerate's own `end_training` would end the process group too
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
