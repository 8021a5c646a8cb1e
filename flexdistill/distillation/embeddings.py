"""Output embeddings that share the input embeddings' weights: trained apart, and tied again if that is wanted."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def untie(model: PreTrainedModel) -> dict[str, str]:
    """Gives each tied weight its own copy, in the configuration too; returns what was tied, name -> name."""
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if target != source}
    for target in tied:
        holder, _, leaf = target.rpartition(".")
        weight = model.get_parameter(target)
        setattr(model.get_submodule(holder), leaf, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    _set_tied(model, False)
    return tied


@torch.no_grad()
def retie(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Ties what `untie` returned: embeddings become the mean of the two.

    All else that was tied, such as an encoder's output bias, has one use, whose copy alone was trained.
    """
    embeddings = model.get_input_embeddings().weight
    for target, source in tied.items():
        weight = model.get_parameter(source)
        weight.lerp_(model.get_parameter(target), 0.5 if weight is embeddings else 1.0)
    _set_tied(model, True)
    model.tie_weights()


def _set_tied(model: PreTrainedModel, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
