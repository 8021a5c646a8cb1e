"""What the benchmarks share: timing a call, the machine's limits, and the file of results."""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "fla-core", "mamba-ssm")
# larger than any GPU's L2 cache
COLD_BYTES = 512 * 2**20


class Results:
    """Records of one run, written to `path` as they come, so that a run cut short loses nothing."""

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, device
        self.content = {
            "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "versions": {name: version(name) for name in PACKAGES},
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_base, sys.argv[1:])]),
            "records": [],
        }

    def measure(self, build: Callable[[], Callable], *, graph: bool = True, **labels) -> dict:
        """Adds the time of the call that `build` makes, or the message of what it raised."""
        record = dict(labels)
        try:
            record |= time_call(build(), self.device, graph)
        except Exception as error:  # an alternative that fails must not stop the others
            record["error"] = message(error)
        return self.add(record)

    def add(self, record: dict) -> dict:
        self.content["records"].append(record)
        self.write()
        outcome = f"{record['median_ms']:.4f} ms" if "median_ms" in record else record.get("error") or record["skipped"]
        labels = (value for key, value in record.items() if not key.endswith(("_ms", "error", "skipped")))
        print(*labels, outcome, flush=True)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return record

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def time_call(call: Callable[[], object], device: str, graph: bool = True) -> dict:
    """Median and 20 % and 80 % quantiles of a call's time in milliseconds.

    Args:
        graph: time the replay of a CUDA graph, which hides the launch overhead of Python; a call that cannot be
            captured is timed by its launches, and the record says so.
    """
    if device == "cpu":
        return {"timer": "wall clock", **_quantiles(_wall_clock_ms(call))}
    from triton.testing import do_bench, do_bench_cudagraph

    reason = None
    if graph:
        try:
            return {"timer": "CUDA graph", **_quantiles(do_bench_cudagraph(call, rep=20, return_mode="all"))}
        except Exception as error:
            reason = message(error)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    times = do_bench(call, warmup=20, rep=100, return_mode="all")
    return {"timer": "launches", **_quantiles(times), **({"not_captured": reason} if reason else {})}


def machine_limits(device: str) -> dict:
    """Measured bandwidth of a large copy, bytes read and written, and rate of a large bf16 matrix product."""
    cells, size = (2**31, 8192) if device == "cuda" else (2**20, 256)
    source, target = (torch.zeros(cells, dtype=torch.bfloat16, device=device) for _ in range(2))
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    # launched, because a graph would copy with the slower copy engine
    copy_ms = time_call(lambda: target.copy_(source), device, graph=False)["median_ms"]
    product_ms = time_call(lambda: left @ right, device)["median_ms"]
    return {
        "bandwidth_bytes_per_s": 2 * source.nbytes / copy_ms * 1e3,
        "matrix_flops_per_s": 2 * size**3 / product_ms * 1e3,
    }


def reached_limits(content: dict) -> dict:
    """The machine's limits, the bandwidth no lower than what reading a KV cache reached in the same run."""
    limits = dict(content["limits"])
    for record in content["records"]:
        if record["part"] == "decode" and "cache_length" in record and "median_ms" in record:
            num_bytes = 4 * record["batch"] * record["heads"] * record["cache_length"] * record["head_dim"]
            reached = num_bytes / record["median_ms"] * 1e3
            limits["bandwidth_bytes_per_s"] = max(limits["bandwidth_bytes_per_s"], reached)
    return limits


def forward_floor_ms(limits: dict, batch: int, heads: int, length: int, head_dim: int) -> float:
    """Least time of a causal forward with n = d frequencies: bytes of q, k, v, o, or arithmetic, whichever is longer.

    Arithmetic per token and head, with F = 2 n features and chunks of C = 64, nonstationary:
    feature maps of query and key 2 * (2 * 2 d n), state update 2 F d, query times state 2 F d, scores within the
    chunk 2 C F / 2 and their product with the values 2 C d / 2, both halved by causality.
    """
    tokens, d, n, chunk = batch * heads * length, head_dim, head_dim, 64
    features = 2 * n
    flops = 2 * (2 * 2 * d * n) + 2 * features * d + 2 * features * d + chunk * features + chunk * d
    byte_time = tokens * 4 * d * 2 / limits["bandwidth_bytes_per_s"]
    return 1e3 * max(byte_time, tokens * flops / limits["matrix_flops_per_s"])


def decode_floor_ms(limits: dict, batch: int, heads: int, head_dim: int) -> float:
    """Time to read and write the float32 state, (F, d + 1) per head."""
    return 1e3 * 2 * state_bytes(batch, heads, head_dim) / limits["bandwidth_bytes_per_s"]


def state_bytes(batch: int, heads: int, head_dim: int) -> int:
    return batch * heads * 2 * head_dim * (head_dim + 1) * 4


def cold_cycle(make: Callable[[], object], num_bytes: int, device: str) -> Callable[[], object]:
    """Hands out copies in turn, so many that none is still in the L2 cache when it comes round, as in a deep model."""
    copies = max(1, -(-COLD_BYTES // num_bytes)) if device == "cuda" else 1
    return functools.partial(next, itertools.cycle([make() for _ in range(copies)]))


def quicken_autotuning() -> None:
    """Makes Triton's autotuners compile their candidates side by side and time each for 20 ms instead of 125.

    One after the other, the candidates of fla's kernels take minutes. The choice stays the autotuner's.
    """
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    prune_configs, executor = Autotuner.prune_configs, ThreadPoolExecutor(os.cpu_count())

    def prune_and_compile(self, kwargs):
        configs = prune_configs(self, kwargs)
        arguments = {**self.nargs, **kwargs}
        arguments.pop("warmup", None)
        # what fails here fails again, and is reported, when the autotuner comes to it
        with contextlib.suppress(Exception), AsyncCompileMode(executor, ignore_errors=True):
            for config in configs:
                self.fn.warmup(**{**arguments, **config.all_kwargs()})
        return configs

    Autotuner.prune_configs = prune_and_compile
    Autotuner.do_bench = staticmethod(functools.partial(do_bench, warmup=5, rep=15))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def message(error: Exception) -> str:
    """One line that says what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _wall_clock_ms(call: Callable[[], object], repetitions: int = 3) -> list[float]:
    call()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _quantiles(times: list[float]) -> dict:
    low, high = statistics.quantiles(times, n=5, method="inclusive")[::3] if len(times) > 1 else times * 2
    return {"median_ms": statistics.median(times), "quantile_20_ms": low, "quantile_80_ms": high}


def _base(word: str) -> str:
    """An argument without the folder that it names."""
    return Path(word).name if os.sep in word else word
