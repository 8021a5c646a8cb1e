"""Documents that stand end to end in one sequence, kept apart: attention and positions begin anew with each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..attention_modes import run_base_model, softmax_mode
from ..devices import exact_float32
from ..errors import FlexdistillError

# a relative difference of hidden states that is rounding
_SAME = 1e-2


def document_positions(sequences: torch.Tensor, separator: int) -> torch.Tensor:
    """Positions (B, T) of token sequences (B, T), from 0 in each document; a separator is its document's last token."""
    places = torch.arange(sequences.shape[1], device=sequences.device).expand_as(sequences)
    starts = torch.zeros_like(places)
    starts[:, 1:] = (places[:, 1:]).masked_fill(sequences[:, :-1] != separator, 0)
    return places - starts.cummax(1).values


class DocumentMasks:
    """Keeps the documents of a model's sequences apart while `active`, by position ids that begin anew with each.

    Copies of the model made meanwhile follow suit.

    Args:
        model: a converted model; its base model gets a forward pre-hook until `remove`.
        separator: the token that ends a document.

    Raises:
        FlexdistillError: if the model does not keep them apart, by its own softmax attention.
    """

    def __init__(self, model: PreTrainedModel, separator: int | None):
        self._separator, self._is_active = separator, False
        if separator is None:
            raise FlexdistillError(
                "The tokenizer has no token that ends a document, so data.document_masks has nothing to go by; set it "
                "to false."
            )
        self._handle = model.base_model.register_forward_pre_hook(self._number, with_kwargs=True)
        if not self._keeps_apart(model):
            self.remove()
            raise FlexdistillError(
                f"{type(model).__name__} lets documents of one sequence see each other, whatever their position ids; "
                "set data.document_masks to false."
            )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    def remove(self) -> None:
        self._handle.remove()

    def _number(self, base_model, args, kwargs):
        tokens = kwargs.get("input_ids")
        if not self._is_active or tokens is None:
            return None
        return args, {**kwargs, "position_ids": document_positions(tokens, self._separator)}

    @torch.no_grad()
    def _keeps_apart(self, model: PreTrainedModel) -> bool:
        tokens = torch.arange(24, device=model.device)[None] % model.get_input_embeddings().num_embeddings
        tokens[tokens == self._separator] = (self._separator + 1) % model.get_input_embeddings().num_embeddings
        tokens[:, 11] = self._separator
        with softmax_mode(model), exact_float32(), self.active():
            try:
                together = run_base_model(model, tokens)[0][:, 12:]
            except TypeError:  # it takes no position ids
                return False
            apart = run_base_model(model, tokens[:, 12:])[0]
        return bool((together - apart).norm() <= _SAME * apart.norm())

    def __deepcopy__(self, memo) -> DocumentMasks:
        return self  # the hook of a copied model is this one
