"""Micro-batches as CUDA graphs: the device repeats the thousands of kernels that Python has sent once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import masking_utils

from ..devices import is_out_of_memory
from ..errors import FlexdistillError, first_sentence
from .stage import Stage, StepLosses, backward_counting_guards

# passes of a shape before it is recorded: the first compiles and loads kernels, the second finds them there
_WARM_UP = 2


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    sequences: torch.Tensor  # what a replay reads
    figures: torch.Tensor  # what it writes: the total, the count and the parts of the losses
    names: list[str]  # of the parts


class RecordedBackward:
    """Does what `backward_counting_guards` does, from the third micro-batch of a shape on by replaying its recording.

    A recording reads weights and adds to gradients where they were when it was made: they have to stay there.
    """

    def __init__(self, stage: Stage):
        self._stage = stage
        self._passes: Counter[torch.Size] = Counter()
        self._recordings: dict[torch.Size, _Recording] = {}

    def __call__(self, sequences: torch.Tensor) -> StepLosses:
        """Adds the gradients of token sequences (B, T), and returns their loss sums.

        Raises:
            FlexdistillError: if the stage waits for the device, which nothing that is recorded can.
        """
        shape = sequences.shape
        self._passes[shape] += 1
        with plain_masks():
            if self._passes[shape] <= _WARM_UP:
                return backward_counting_guards(self._stage, sequences)
            if shape not in self._recordings:
                self._recordings[shape] = self._record(sequences)
        recording = self._recordings[shape]
        recording.sequences.copy_(sequences)
        recording.graph.replay()
        total, count, *parts = recording.figures.clone().unbind()  # the next replay writes there again
        return StepLosses(total, count, dict(zip(recording.names, parts, strict=True)))

    def forget(self) -> None:
        """Frees the recordings' memory."""
        self._passes.clear()
        self._recordings.clear()

    def _record(self, sequences: torch.Tensor) -> _Recording:
        sequences, graph = sequences.clone(), torch.cuda.CUDAGraph()
        # recordings never run at the same time, so they share their memory
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        stream = torch.cuda.current_stream()
        try:
            # other threads go on: NCCL's asks the device how far it is
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                losses = backward_counting_guards(self._stage, sequences)
                figures = torch.stack([x.double() for x in (losses.total, losses.count, *losses.parts.values())])
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # where a recording fails, torch stays on the one that it recorded
            causes = _causes(error)
            for cause in causes:
                if is_out_of_memory(cause):
                    raise cause from None
            raise FlexdistillError(
                f"{self._stage.name} cannot be recorded as a CUDA graph ({first_sentence(causes[-1])}); leave "
                "--cuda-graphs out."
            ) from error
        return _Recording(graph, sequences, figures, list(losses.parts))


def _causes(error: BaseException | None) -> list[RuntimeError]:
    """An error and those before it: the last of a recording may only say that it has failed."""
    causes = []
    while error is not None:
        if isinstance(error, RuntimeError):
            causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _nothing_packed(position_ids: torch.Tensor) -> None:
    return None


def _not_traced(tensor: torch.Tensor | None = None) -> bool:
    return False


@contextlib.contextmanager
def plain_masks() -> Iterator[None]:
    """Inside the context transformers takes sequences for one document each, without padding.

    Else it waits for the device to find out; and while a graph is recorded, when it cannot, it makes whole masks.
    """
    replaced = {"find_packed_sequence_indices": _nothing_packed, "is_tracing": _not_traced}
    before = {name: getattr(masking_utils, name) for name in replaced}
    vars(masking_utils).update(replaced)
    try:
        yield
    finally:
        vars(masking_utils).update(before)
