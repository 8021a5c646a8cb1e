"""Rotary embedding taken out of the queries and keys that a kernel sees.

Rotary embedding (Su et al. 2021, arXiv:2104.09864) turns pair i of a head's coordinates by its position times an angle.
A product q.k undoes the turns down to their difference; a feature map sees a query or a key alone, and would have to
learn every position that there may be. A decay tells distances without them.
"""

import torch

from .backend import fused_operators
from .configuration_flexformer import KernelSpec

# (cos, sin) of a call's tokens, (1 or B, T, R), as models pass them to their attention modules
Rotation = tuple[torch.Tensor, torch.Tensor]

# which coordinates make a pair, the i-th two or those half of R apart, and how cos and sin repeat its angle
LAYOUTS = ("halves", "adjacent", "adjacent_of_halves")
# how transformers' models name it
ARGUMENT = "position_embeddings"


def rotation_among(arguments: dict) -> Rotation | None:
    """The rotation among the keyword arguments of an attention module; None if there is none of the usual form."""
    rotation = arguments.get(ARGUMENT)
    if not isinstance(rotation, (tuple, list)) or len(rotation) != 2:
        return None
    cos, sin = rotation
    return (cos, sin) if all(torch.is_tensor(x) and x.ndim == 3 for x in rotation) else None


def part_of(rotation: Rotation | None, row: int, tokens: slice = slice(None)) -> Rotation | None:
    """The rotation of one sequence of a batch, or of some of its tokens."""
    if rotation is None:
        return None
    cos, sin = (x[row : row + 1] if len(x) > 1 else x for x in rotation)
    return cos[:, tokens], sin[:, tokens]


def kernel_side(x: torch.Tensor, rotation: Rotation | None, spec: KernelSpec) -> torch.Tensor:
    """Queries or keys (B, H, T, d) as the kernel sees them.

    Raises:
        ValueError: if the kernel sees them without rotary embedding, and it is not known.
    """
    if spec.rotary is None:
        return x
    if rotation is None:
        raise ValueError(
            f"The kernel takes rotary embedding out of queries and keys, and was not given any ({ARGUMENT})."
        )
    # Inductor fuses the plain form with what surrounds it
    fused = None if torch.compiler.is_compiling() else fused_operators(x.device)
    if fused is not None and fused.turns(x):
        return fused.turned_back(x, rotation, spec.rotary, spec.rotary_pairs)
    return turned_back(x, rotation, spec.rotary, spec.rotary_pairs)


def turned_back(x: torch.Tensor, rotation: Rotation, layout: str, kept: int) -> torch.Tensor:
    """Queries or keys (B, H, T, d) without the turns of all but the first `kept` pairs, in their own dtype."""
    cos, sin = (angles(part, layout)[:, None, :, kept:].float() for part in rotation)
    scale = (cos.square() + sin.square()).rsqrt()  # some models scale queries and keys along the way; that stays
    cos, sin = cos * scale, sin * scale
    size, axis = rotation[0].shape[-1], -2 if layout == "halves" else -1  # of pairs, once they have axes of their own
    pairs = x[..., :size].unflatten(-1, (2, -1) if layout == "halves" else (-1, 2))
    first, second = pairs.unbind(axis)
    slow_first, slow_second = first[..., kept:].float(), second[..., kept:].float()
    back = (slow_first * cos + slow_second * sin, slow_second * cos - slow_first * sin)
    turned = [
        torch.cat([part[..., :kept], new.to(x.dtype)], -1) for part, new in zip((first, second), back, strict=True)
    ]
    return torch.cat([torch.stack(turned, axis).flatten(-2), x[..., size:]], -1)


def angles(part: torch.Tensor, layout: str) -> torch.Tensor:
    """cos or sin (..., R) -> those of the pairs (..., R / 2)."""
    return part[..., ::2] if layout == "adjacent" else part[..., : part.shape[-1] // 2]
