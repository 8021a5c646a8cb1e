"""Rotary embedding taken out of queries and keys as a torch operator."""

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .fused_backward import NAMESPACE
from .launch import row_major, token_strides
from .triton_rotary import turn_kernel

_TOKENS = 16


@torch.library.custom_op(f"{NAMESPACE}::turn", mutates_args=())
def turn_op(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, adjacent: bool, angle_step: int, kept: int, back: bool
) -> torch.Tensor:
    """x (B, H, T, d) with all pairs but the first `kept` turned by the angles of cos and sin (1 or B, T, R)."""
    x, cos, sin = row_major(x), row_major(cos), row_major(sin)
    output = torch.empty_like(x)
    batch, heads, length, size = x.shape
    rotary = cos.shape[-1]
    strides = [0 if part.shape[0] == 1 else part.stride(0) for part in (cos, sin)]
    tokens = min(_TOKENS, triton.next_power_of_2(length))
    turn_kernel[(triton.cdiv(length, tokens), batch * heads)](
        x, cos, sin, output, *token_strides(x), strides[0], cos.stride(1), strides[1], sin.stride(1),
        *token_strides(output), heads, length, size, rotary, kept, ADJACENT=adjacent, ANGLE_STEP=angle_step, BACK=back,
        TOKENS=tokens, BLOCK_PAIRS=triton.next_power_of_2(rotary // 2),
        BLOCK_REST=triton.next_power_of_2(size - rotary) if size > rotary else 0, num_warps=1 if tokens == 1 else 4,
    )  # fmt: skip
    return output


@turn_op.register_fake
def _(x, cos, sin, adjacent, angle_step, kept, back):
    return torch.empty_like(row_major(x))


def _setup_context(ctx, inputs, output) -> None:
    _, cos, sin, *settings, back = inputs
    ctx.save_for_backward(cos, sin)
    ctx.settings = (*settings, not back)


def _backward(ctx, d_output):
    return turn_op(d_output, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


turn_op.register_autograd(_backward, setup_context=_setup_context)
