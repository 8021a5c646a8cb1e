"""The attention that would run on a device, on a tiny input, against its quadratic reference on CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .runtime.attention import attend, attention_weights
from .runtime.backend import fused_operators
from .runtime.configuration_flexformer import KernelSpec
from .runtime.feature_maps import FeatureMap
from .runtime.registry import build_feature_map

# one chunk and a part of the next, so that a state is carried over
_LENGTH, _HEAD_DIM = 80, 16
_SCALING = _HEAD_DIM**-0.5
# relative, of the whole tensor's norm; the fused float32 kernels multiply in three passes of tf32
_TOLERANCES = {"torch": {torch.float32: 1e-5}, "triton": {torch.float32: 1e-4, torch.bfloat16: 1e-2}}
_GRADIENT_FACTOR = 10  # gradients are sums of many more products


def backend_name(device: torch.device) -> str:
    """What computes Flexformer attention on `device`: "triton" or "torch".

    Raises:
        RuntimeError: if the environment asks for a backend that does not exist or cannot run.
    """
    return "torch" if fused_operators(device) is None else "triton"


def self_test(device: torch.device) -> list[dict]:
    """Compares the parallel form, decoding and gradients with the reference, without and with a softmax window.

    Returns:
        a dict per comparison: `form`, `window`, `dtype`, `error` (norm of the difference over the reference's norm),
        `tolerance`, and whether it is `ok`; a form in which something is not finite is not.
    """
    rows = []
    for dtype, tolerance in _TOLERANCES[backend_name(device)].items():
        for window in (0, 16):
            for form, error in _errors(device, dtype, window):
                allowed = tolerance * (_GRADIENT_FACTOR if form == "gradients" else 1)
                name = str(dtype).removeprefix("torch.")
                row = {"form": form, "window": window, "dtype": name, "error": error, "tolerance": allowed}
                rows.append(row | {"ok": error <= allowed})
    return rows


def _errors(device: torch.device, dtype: torch.dtype, window: int) -> Iterator[tuple[str, float]]:
    kernel, (query, key, value, probe) = _example(dtype, window)
    visible = torch.ones(query.shape[0], _LENGTH, dtype=torch.bool)
    visible[0, :5] = False  # padding on the left
    expected = attention_weights(kernel, query, key, scaling=_SCALING, visible=visible)
    expected = expected @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    inputs = [query, key, value]
    expected_gradients = torch.autograd.grad((expected * probe).sum(), [*inputs, *kernel.parameters()])

    kernel.to(device)
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    visible, arguments = visible.to(device), {"scaling": _SCALING}
    output, _ = attend(kernel, *inputs, visible=visible, keep_memory=False, **arguments)
    yield "parallel", _distance([output], [expected])
    with torch.no_grad():
        outputs, memory = [], None
        for start, stop in ((0, _LENGTH - 8), *((t, t + 1) for t in range(_LENGTH - 8, _LENGTH))):
            span = slice(start, stop)
            parts = (x[:, :, span] for x in inputs)
            output_part, memory = attend(kernel, *parts, visible=visible[:, span], memory=memory, **arguments)
            outputs.append(output_part)
    yield "decoding", _distance([torch.cat(outputs, dim=2)], [expected])
    loss = (output.float() * probe.to(device)).sum()
    if dtype == torch.float32:  # in bf16 gradients carry the noise of their inputs
        gradients = torch.autograd.grad(loss, [*inputs, *kernel.parameters()])
        yield "gradients", _distance(gradients, expected_gradients)


def _example(dtype: torch.dtype, window: int) -> tuple[FeatureMap, list[torch.Tensor]]:
    """A kernel whose parameters are all in use, and query, key, value and an output's gradient, float32 on CPU.

    Their values are exact in `dtype`.
    """
    spec = KernelSpec(
        variant="nonstationary",
        component="hyperbolic",
        num_heads=4,
        num_key_value_heads=2,
        head_dim=_HEAD_DIM,
        num_frequencies=_HEAD_DIM,
        tied=False,
        window=window,
        decay=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernel = build_feature_map(spec)
        kernel.reset_parameters()
        with torch.no_grad():
            for parameter in kernel.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tensors = [torch.randn(2, heads, _LENGTH, _HEAD_DIM).to(dtype).float() for heads in (4, 2, 2, 4)]
    *inputs, probe = tensors
    return kernel, [*(x.requires_grad_() for x in inputs), probe]


def _distance(actual, expected) -> float:
    """The largest norm of a difference over the norm of what was expected, of several tensors; NaN if one has it."""
    with torch.no_grad():
        pairs = [(ours.float().cpu(), theirs) for ours, theirs in zip(actual, expected, strict=True)]
        return float(torch.stack([(ours - theirs).norm() / theirs.norm() for ours, theirs in pairs]).max())
