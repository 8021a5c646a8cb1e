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

# which coordinates make pair i, those half of R apart or neighbours, and whether cos and sin repeat their angles as the
# coordinates do or in halves all the same
LAYOUTS = ("halves", "interleaved", "interleaved_of_halves")
# how transformers' models name it
ARGUMENT = "position_embeddings"


def check_rotary(spec: KernelSpec) -> None:
    """Raises ValueError if a spec's rotary embedding cannot be one."""
    if spec.rotary not in LAYOUTS:
        raise ValueError(f"Rotary embedding {spec.rotary!r} is unknown; choose one of: {', '.join(LAYOUTS)}")
    if spec.rotary_dim % 2 or not 0 <= 2 * spec.rotary_pairs <= spec.rotary_dim <= spec.head_dim:
        raise ValueError(
            f"Rotary embedding of {spec.rotary_dim} coordinates with {spec.rotary_pairs} pairs kept does not fit heads "
            f"of size {spec.head_dim}; use the config.json that the model was exported with"
        )


def rotation_among(args: tuple, kwargs: dict) -> Rotation | None:
    """The rotation among the arguments of an attention module; None if there is none of the usual form."""
    for pair in (kwargs.get(ARGUMENT), *args):
        if isinstance(pair, (tuple, list)) and len(pair) == 2:
            cos, sin = pair
            if all(torch.is_tensor(x) and x.ndim == 3 for x in (cos, sin)) and cos.shape == sin.shape:
                return cos, sin
    return None


def part_of(rotation: Rotation | None, row: int, tokens: slice = slice(None)) -> Rotation | None:
    """The rotation of one sequence of a batch, or of some of its tokens."""
    if rotation is None:
        return None
    cos, sin = (x[row : row + 1] if len(x) > 1 else x for x in rotation)
    return cos[:, tokens], sin[:, tokens]


def kernel_side(x: torch.Tensor, rotation: Rotation | None, spec: KernelSpec) -> torch.Tensor:
    """Queries or keys (B, H, T, d) as the kernel sees them.

    Raises:
        ValueError: if the kernel sees them without rotary embedding, and it is not given or of another size.
    """
    if spec.rotary is None:
        return x
    if rotation is None:
        raise ValueError(
            f"The kernel takes rotary embedding out of queries and keys, and was not given any ({ARGUMENT}); use the "
            "version of transformers that the model was converted with."
        )
    batch, length, size = rotation[0].shape
    if size != spec.rotary_dim or length != x.shape[2] or batch not in (1, x.shape[0]):
        raise ValueError(
            f"The kernel takes rotary embedding of {spec.rotary_dim} coordinates out of queries and keys "
            f"{tuple(x.shape)}, and was given one of shape {(batch, length, size)}; use the version of transformers "
            "that the model was converted with."
        )
    # Inductor fuses the plain form with what surrounds it
    fused = None if torch.compiler.is_compiling() else fused_operators(x.device)
    if fused is not None and fused.turns(x):
        return fused.turned_back(x, rotation, spec.rotary, spec.rotary_pairs)
    return turned_back(x, rotation, spec.rotary, spec.rotary_pairs)


def both_sides(x: torch.Tensor, rotation: Rotation | None, spec: KernelSpec) -> torch.Tensor:
    """Queries or keys as the kernel sees them; where a window sees others, both (`near.near_side`, `near.far_side`)."""
    seen = kernel_side(x, rotation, spec)
    return torch.cat([x, seen], dim=-1) if spec.window and spec.rotary else seen


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
    return part[..., ::2] if layout == "interleaved" else part[..., : part.shape[-1] // 2]
