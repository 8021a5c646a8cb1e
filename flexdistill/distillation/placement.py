"""Where tokens stand while a model is trained: documents of one sequence apart, and sequences not all at the start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..attention_modes import run_base_model, softmax_mode
from ..devices import exact_float32
from ..errors import FlexdistillError
from ..recipe_sections import DataRecipe

# a relative difference of hidden states that is rounding: float32 knows an angle of 16,384 to a thousandth
_SAME = 1e-2


def document_positions(sequences: torch.Tensor, separator: int) -> torch.Tensor:
    """Positions (B, T) of token sequences (B, T), from 0 in each document; a separator is its document's last token."""
    places = torch.arange(sequences.shape[1], device=sequences.device).expand_as(sequences)
    starts = torch.zeros_like(places)
    starts[:, 1:] = (places[:, 1:]).masked_fill(sequences[:, :-1] != separator, 0)
    return places - starts.cummax(1).values


def scattered_starts(sequences: torch.Tensor, position_range: int) -> torch.Tensor:
    """First positions (B, 1) of token sequences (B, T), spread evenly so that each ends within the range.

    A sequence's own tokens decide, so that it starts at the same place in every model, process and resumed run.
    """
    length = sequences.shape[1]
    # Knuth's multiplicative hash of each place, and of the sum
    weights = torch.arange(1, length + 1, device=sequences.device) * 2654435761 % 2**32
    mixed = (sequences * weights).sum(1, keepdim=True) * 2654435761 % 2**32 // 2**8
    return mixed % (position_range - length + 1)


def make_placement(recipe: DataRecipe, model: PreTrainedModel, separator: int | None) -> Placement | None:
    """The placement that a recipe asks for, on a converted model; None if it asks for none.

    Raises:
        FlexdistillError: as `Placement`, or if the tokenizer has no separator to keep documents apart by.
    """
    if not recipe.document_masks and recipe.position_range is None:
        return None
    if recipe.document_masks and separator is None:
        raise FlexdistillError(
            "The tokenizer has no token that ends a document, so data.document_masks has nothing to go by; set it "
            "to false."
        )
    return Placement(model, separator if recipe.document_masks else None, recipe.position_range)


class Placement:
    """Gives the sequences of a model position ids of their own while `active`. Copies made meanwhile follow suit.

    Args:
        model: a converted model; its base model gets a forward pre-hook until `remove`.
        separator: the token that ends a document; documents do not see each other, and each begins anew.
        position_range: positions that sequences are spread over; None: all begin at 0.

    Raises:
        FlexdistillError: if the model, under its own softmax attention, does not keep documents apart, or gives other
            outputs at other positions.
    """

    def __init__(self, model: PreTrainedModel, separator: int | None = None, position_range: int | None = None):
        self._separator, self._range, self._is_active = separator, None, False
        self._handle = model.base_model.register_forward_pre_hook(self._number, with_kwargs=True)
        try:
            if separator is not None and not self._keeps_apart(model):
                raise FlexdistillError(
                    f"{type(model).__name__} lets documents of one sequence see each other, whatever their position "
                    "ids; set data.document_masks to false."
                )
            if position_range is not None and not self._is_relative(model, position_range):
                raise FlexdistillError(
                    f"{type(model).__name__} gives other outputs at other positions, so data.position_range would "
                    "change what is learned; leave it out."
                )
        except FlexdistillError:
            self.remove()
            raise
        self._range = position_range

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
        if self._separator is not None:
            positions = document_positions(tokens, self._separator)
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self._range is not None:
            positions = positions + scattered_starts(tokens, self._range)
        return args, {**kwargs, "position_ids": positions}

    @torch.no_grad()
    def _keeps_apart(self, model: PreTrainedModel) -> bool:
        tokens = _tokens(model)
        tokens[tokens == self._separator] = (self._separator + 1) % model.get_input_embeddings().num_embeddings
        tokens[:, 11] = self._separator
        with softmax_mode(model), exact_float32(), self.active():
            try:
                together = run_base_model(model, tokens)[0][:, 12:]
            except TypeError:  # it takes no position ids
                return False
            apart = run_base_model(model, tokens[:, 12:])[0]
        return _are_same(together, apart)

    @torch.no_grad()
    def _is_relative(self, model: PreTrainedModel, position_range: int) -> bool:
        tokens = _tokens(model)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        with softmax_mode(model), exact_float32():
            at_start = run_base_model(model, tokens)[0]
            try:
                last = positions + position_range - tokens.shape[1]
                at_end = run_base_model(model, tokens, position_ids=last)[0]
            except (TypeError, IndexError):  # it takes no position ids, or has a table of them that is shorter
                return False
        return _are_same(at_end, at_start)

    def __deepcopy__(self, memo) -> Placement:
        return self  # the hook of a copied model is this one


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.arange(24, device=model.device)[None] % model.get_input_embeddings().num_embeddings


def _are_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() <= _SAME * expected.norm())
