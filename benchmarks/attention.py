"""Causal attention on one GPU: Flexformer, FlashAttention and the linear attention kernels of the field, in one run.

python benchmarks/attention.py --output results.json
python benchmarks/attention.py --from results.json --plot attention.svg

Everything is bf16. Parts: `forward` and `backward` (forward and backward together, gradients of q, k, v and all kernel
parameters) over the length at d = 64, 32 heads; `shapes`, both at other sizes; `decode`, one token; `transfer`, the
loss of attention transfer for one layer. Each record says how it was timed, or why it was not.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Results, cold_cycle, machine_limits, quicken_autotuning, state_bytes
from methods import (
    CUDNN,
    FLASH,
    METHODS,
    NORMALISER_COLUMNS,
    OURS,
    Method,
    Shape,
    divide,
    features_and_values,
    flexformer,
    flexformer_map,
    map_tensors,
    over_tokens,
)
from report import plot, print_report
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexdistill.attention_modes import AttentionCall
from flexdistill.distillation.attention_transfer import softmax_weights
from flexdistill.distillation.tiled_transfer import transfer_loss
from flexdistill.losses import attention_cross_entropy, attention_entropy, relative_output_error
from flexdistill.runtime.attention import attention_weights

# a quadratic method is skipped where it would take longer; the rate is about FlashAttention's on an H200
LONGEST_CALL_S = 0.5
QUADRATIC_FLOPS_PER_S = 4e14


@dataclass(frozen=True)
class Sizes:
    """What a run measures; shapes are (B, H, T, d)."""

    heads: int
    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    decode_batches: tuple[int, ...]
    cache_lengths: tuple[int, ...]
    transfer_heads: tuple[int, ...]
    transfer_lengths: tuple[int, ...]


FULL = Sizes(
    heads=32,
    lengths=tuple(2**power for power in range(9, 18)),
    shapes=(
        (1, 16, 8192, 128),
        (1, 16, 32768, 128),
        (1, 8, 32768, 64),
        (8, 8, 4096, 64),
        (64, 8, 1024, 64),
        (16, 32, 2048, 64),
    ),
    decode_batches=(1, 8, 64),
    cache_lengths=(8192, 32768),
    transfer_heads=(32, 9),
    transfer_lengths=(1024, 2048, 4096, 8192),
)
QUICK = Sizes(32, (512, 1024, 2048), ((8, 8, 1024, 64),), (1, 64), (1024,), (9,), (1024, 2048))
TINY = Sizes(2, (64, 128), ((2, 2, 64, 16),), (1, 2), (64,), (2,), (64, 128))


def sweep(results: Results, sizes: Sizes, backward: bool) -> None:
    """Every method over the length. Autotuners choose at the first length they see, so 8k comes first."""
    part = "backward" if backward else "forward"
    for length in sorted(sizes.lengths, key=lambda length: abs(math.log2(length / 8192))):
        shape = Shape(1, sizes.heads, length, 64, results.device)
        for method in METHODS:
            attend_once(results, part, method, shape, backward)


def other_shapes(results: Results, sizes: Sizes) -> None:
    names = (OURS, FLASH, CUDNN, "fla chunk_simple_gla")
    for values in sizes.shapes:
        for backward in (False, True):
            for method in METHODS:
                if method.name in names:
                    part = "shapes, backward" if backward else "shapes, forward"
                    attend_once(results, part, method, Shape(*values, results.device), backward)


def attend_once(results: Results, part: str, method: Method, shape: Shape, backward: bool) -> None:
    """One record of a method at a shape, or the reason why it is skipped."""
    labels = {"part": part, "method": method.name, **shape.labels}
    reason = reason_to_skip(method, shape, backward)
    if reason:
        results.add({**labels, "skipped": reason})
    else:
        results.measure(lambda: timed_call(method, shape, backward), **labels)


def reason_to_skip(method: Method, shape: Shape, backward: bool) -> str | None:
    if method.needs_gpu and shape.device != "cuda":
        return "it needs a GPU"
    if backward and method.forward_only:
        return "only a forward pass has a use for it"
    if method.lengths is not None and shape.length not in method.lengths:
        return f"measured at T = {', '.join(map(str, method.lengths))} only"
    flops = 2 * shape.batch * shape.heads * shape.length**2 * shape.head_dim * (3.5 if backward else 1)
    seconds = flops / QUADRATIC_FLOPS_PER_S
    if method.quadratic and seconds > LONGEST_CALL_S:
        return f"one call would take about {seconds:.1f} s"
    return None


def timed_call(method: Method, shape: Shape, backward: bool) -> Callable[[], object]:
    attention, leaves = method.build(shape)
    if not backward:
        return torch.no_grad()(attention)
    direction = torch.randn_like(attention())
    return lambda: torch.autograd.grad(attention(), leaves, direction, allow_unused=True)


def decode(results: Results, sizes: Sizes) -> None:
    """One token after a context: a state whose size does not depend on it, or a KV cache."""
    for batch in sizes.decode_batches:
        shape = Shape(batch, sizes.heads, 1, 64, results.device)
        labels = {"part": "decode", "batch": batch, "heads": sizes.heads, "head_dim": 64}
        results.measure(functools.partial(decode_flexformer, shape), method=OURS, **labels)
        results.measure(functools.partial(decode_fla, shape), method="fla fused_recurrent_simple_gla", **labels)
        for length in sizes.cache_lengths:
            for name, backend in ((FLASH, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION)):
                build = functools.partial(decode_sdpa, shape, length, backend)
                results.measure(build, method=name, cache_length=length, **labels)


def decode_flexformer(shape: Shape) -> Callable[[], object]:
    feature_map, token = flexformer_map(shape), shape.inputs()
    prompt = shape.inputs(length=64)

    @torch.no_grad()
    def prefill():
        return flexformer(feature_map, *prompt, keep_memory=True)[1]

    memory = cold_cycle(prefill, state_bytes(shape.batch, shape.heads, shape.head_dim), shape.device)
    return torch.no_grad()(lambda: flexformer(feature_map, *token, keep_memory=True, memory=memory()))


def decode_fla(shape: Shape) -> Callable[[], object]:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    token, parameters = shape.inputs(heads_first=False), map_tensors(flexformer_map(shape))
    state_shape = (shape.batch, shape.heads, 2 * shape.head_dim, shape.head_dim + NORMALISER_COLUMNS)
    num_bytes = state_bytes(shape.batch, shape.heads, shape.head_dim)
    state = cold_cycle(lambda: torch.randn(state_shape, device=shape.device), num_bytes, shape.device)

    @torch.no_grad()
    def step():
        inputs = over_tokens(features_and_values, token, *parameters, True)
        sums, _ = fused_recurrent_simple_gla(*inputs, scale=1.0, initial_state=state(), output_final_state=True)
        return over_tokens(divide, [sums])

    return step


def decode_sdpa(shape: Shape, length: int, backend: SDPBackend) -> Callable[[], object]:
    query = shape.inputs()[0]
    num_bytes = 2 * 2 * shape.batch * shape.heads * length * shape.head_dim
    cache = cold_cycle(lambda: shape.inputs(length=length)[1:], num_bytes, shape.device)

    @torch.no_grad()
    def step():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, *cache())

    return step


def transfer_torch(feature_map, query, key, value, scaling) -> torch.Tensor:
    """The loss of one layer as flexdistill.distillation.attention_transfer computes it, through T x T maps."""
    with torch.no_grad():
        call = AttentionCall(nn.Module(), query, key, value, None, {"scaling": scaling, "is_causal": True})
        teacher = softmax_weights(call)
        value = value.float()
        output = teacher @ value
        attention_entropy(teacher)
    student = attention_weights(feature_map, query, key, scaling=scaling)
    return attention_cross_entropy(teacher, student)[0] + relative_output_error(output, student @ value)[0]


TRANSFERS = {"torch": transfer_torch, "fused": transfer_loss}


def transfer(results: Results, sizes: Sizes) -> None:
    """Attention transfer of one layer, forward and backward for the kernel's parameters: time and peak memory."""
    for heads, length, name in itertools.product(sizes.transfer_heads, sizes.transfer_lengths, TRANSFERS):
        shape = Shape(1, heads, length, 64, results.device)
        labels = {"part": "transfer", "method": name, **shape.labels}
        if results.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # without a graph: its memory pool would hold the maps a second time
        record = results.measure(functools.partial(transfer_call, TRANSFERS[name], shape), graph=False, **labels)
        if results.device == "cuda" and "median_ms" in record:
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()


def transfer_call(loss: Callable, shape: Shape) -> Callable[[], object]:
    feature_map = flexformer_map(shape)
    inputs, parameters = [x.detach() for x in shape.inputs()], list(feature_map.parameters())
    return lambda: torch.autograd.grad(loss(feature_map, *inputs, scaling=shape.head_dim**-0.5), parameters)


PARTS: dict[str, Callable[[Results, Sizes], None]] = {
    "forward": lambda results, sizes: sweep(results, sizes, backward=False),
    "backward": lambda results, sizes: sweep(results, sizes, backward=True),
    "decode": decode,
    "shapes": other_shapes,
    "transfer": transfer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file of results to write")
    parser.add_argument("--from", type=Path, dest="source", help="file of results to report instead of measuring")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="short sequences only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.source is None):
        parser.error("give either --output to measure or --from to report")
    content = json.loads(arguments.source.read_text()) if arguments.source else measure(arguments)
    print_report(content)
    if arguments.plot:
        plot(content, arguments.plot)


def measure(arguments: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    results = Results(arguments.output, arguments.device)
    results.content["limits"] = machine_limits(arguments.device)
    if arguments.device == "cuda":
        quicken_autotuning()
    sizes = (TINY if arguments.device == "cpu" else QUICK) if arguments.quick else FULL
    for part in arguments.only:
        PARTS[part](results, sizes)
    results.write()
    return results.content


if __name__ == "__main__":
    main()
