"""The states of all random generators of this process, as values that JSON holds exactly."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_state(device: torch.device) -> dict:
    """States of Python's, numpy's and torch's generators, on CPU and on `device`."""
    algorithm, words, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [algorithm, words.tolist(), *rest]}
    state["torch"] = _to_hex(torch.get_rng_state())
    if device.type == "cuda":
        state["cuda"] = _to_hex(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Puts back what `random_state` gave, on a device of the same type."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, words, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
