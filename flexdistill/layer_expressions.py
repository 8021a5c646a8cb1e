"""Which of a model's convertible modules an expression such as `0-5,9`, `every:4` or `decoder.*` means."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from .errors import FlexdistillError


def select_layers(expression: str, names: Sequence[str]) -> list[int]:
    """Indices among `names`, the convertible modules, that an expression means.

    Its parts, between commas, are `all`, indices such as `3` and `0-5`, `every:4` (0, 4, 8, ...), or patterns of names
    such as `decoder.*`.

    Raises:
        FlexdistillError: if the expression is of another form, or a part means no or missing layers.
    """
    count, chosen = len(names), set()
    for part in expression.split(","):
        try:
            found = _select(part, names)
        except ValueError as error:
            raise FlexdistillError(
                f"Layers {expression!r} cannot be read; write all, indices such as 0-5,9 or every:4, or patterns of "
                f"names such as {names[0]}."
            ) from error
        if not found or max(found) >= count:
            raise FlexdistillError(
                f"Layers {expression!r} are not all there; the model has layers 0 to {count - 1}, of which the first "
                f"is {names[0]}."
            )
        chosen.update(found)
    return sorted(chosen)


def _select(part: str, names: Sequence[str]) -> list[int]:
    if part == "all":
        return list(range(len(names)))
    if part.startswith("every:"):
        return list(range(0, len(names), _natural(part.removeprefix("every:"), least=1)))
    if "*" in part or ("." in part and not part.replace(".", "").isdigit()):
        return [index for index, name in enumerate(names) if fnmatchcase(name, part)]
    first, dash, last = part.partition("-")
    start = _natural(first)
    end = _natural(last if dash else first, least=start)
    # past the last layer, which is told, and no further
    return list(range(start, min(end, start + len(names)) + 1))


def _natural(text: str, least: int = 0) -> int:
    number = int(text)
    if number < least:
        raise ValueError(text)
    return number
