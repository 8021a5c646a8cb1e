"""Logits piece by piece: a model's head applied to a few positions at a time, whatever the head is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..attention_modes import run_base_model
from ..errors import FlexdistillError
from .sharding import gradients_stay_whole


class SplitModel:
    """A model run in two halves: the base model to hidden states, then its head on any part of them.

    So the float32 logits of a whole batch are never held, and no head needs code of its own: scaled, capped or
    multi-layer heads run as the model's class wrote them.

    Args:
        model: a model with a head over its base model.

    Raises:
        FlexdistillError: if the model has no head that gives logits over the vocabulary, or is an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel):
        if model.config.is_encoder_decoder:
            raise FlexdistillError(
                f"{type(model).__name__} is an encoder-decoder, whose two texts this training has no data for; convert "
                "a decoder or an encoder, or convert it in Python and train it with a loop of your own."
            )
        if model.base_model is model or model.get_output_embeddings() is None:
            raise FlexdistillError(
                f"{type(model).__name__} gives no logits over a vocabulary, so there is nothing to distil or evaluate; "
                "start from a checkpoint with a language-modelling head."
            )
        self.model = model
        self._output_class: type[ModelOutput] | None = None

    def hidden(self, sequences: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Token sequences (B, T) -> last hidden states (B, T, E); with a cache, of what follows on what it has seen."""
        output = run_base_model(self.model, sequences, cache)
        self._output_class = type(output)
        return output[0]

    def states(self, sequences: torch.Tensor, all_layers: bool = True) -> tuple[torch.Tensor, ...]:
        """Token sequences (B, T) -> hidden states (B, T, E) after each layer, or the last alone, as `hidden` does."""
        if not all_layers:
            return (self.hidden(sequences),)
        output = run_base_model(self.model, sequences, output_hidden_states=True)
        self._output_class = type(output)
        return *output.hidden_states[1:-1], output[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, E) -> logits (N, V), in the dtype of the head."""
        first = next(field.name for field in dataclasses.fields(self._output_class))
        output = self._output_class(**{first: hidden[None]})
        base = self.model.base_model
        base.forward = lambda *args, **kwargs: output
        try:
            tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=tokens).logits[0]
        finally:
            del base.forward


def backward_in_pieces(
    hidden: torch.Tensor,
    piece: int,
    loss: Callable[[torch.Tensor, slice], torch.Tensor],
    further_loss: torch.Tensor | None = None,
    *,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    model: nn.Module | None = None,
) -> torch.Tensor:
    """Differentiates a loss that is a sum over positions, holding one piece of the head's work at a time.

    Args:
        hidden: (N, E), part of a graph.
        piece: positions per piece.
        loss: maps (hidden[slice], slice) to a scalar.
        further_loss: a scalar of the same graph that is added; None for none.
        scale: what is differentiated in the place of a scalar.
        model: what has made `hidden`; needed only where it may be sharded.

    Returns:
        the loss, detached; gradients have been added to all leaves behind `hidden` and in the head.
    """
    leaf = hidden.detach().requires_grad_()
    total = hidden.new_zeros((), dtype=torch.float32)
    with gradients_stay_whole(model):
        for start in range(0, len(leaf), piece):
            part = slice(start, start + piece)
            value = loss(leaf[part], part)
            scale(value).backward()
            total += value.detach()
    if further_loss is None:
        hidden.backward(leaf.grad)
        return total
    torch.autograd.backward([hidden, scale(further_loss)], [leaf.grad, None])
    return total + further_loss.detach()
