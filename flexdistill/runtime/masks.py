"""The mask that Flexformer attention asks transformers for: padding, and a full mask only if a layer needs it."""

import inspect

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

# what makes a full mask, out of all that transformers passes to a mask function
_MASK_ARGUMENTS = ("local_size", "allow_is_causal_skip", "allow_is_bidirectional_skip", "use_vmap", "device", "dtype")


class LazyMask:
    """Keeps the padding of shape (B, key length) and builds a full mask when a softmax layer asks.

    Stands in for a tensor where modelling code moves or reshapes its mask before attention.
    """

    ndim = 2

    def __init__(self, **arguments):
        self._arguments = arguments
        self._built: dict = {}

    @property
    def padding(self) -> torch.Tensor | None:
        """bool (B, key length), False at padding; None if there is none."""
        return self._arguments["attention_mask"]

    def padding_of(self, length: int) -> torch.Tensor | None:
        """`padding` of the call's own `length` tokens. What follows them is of a mask made for later calls, too."""
        padding, start = self.padding, self._arguments["q_offset"]
        if padding is None or padding.shape[1] <= length:
            return padding
        if torch.is_tensor(start):  # of a static cache; to read it would halt the device
            return padding[:, start + torch.arange(length, device=padding.device)]
        return padding[:, start : start + length] if padding.shape[1] >= start + length else padding[:, -length:]

    @property
    def is_plain(self) -> bool:
        """Whether the mask is just causal or bidirectional, with padding; packed sequences and prefixes are not."""
        return self._arguments["mask_function"] in (causal_mask_function, bidirectional_mask_function)

    def boundaries(self) -> list[list[int]] | None:
        """Where sequences begin that are packed end to end under causal masks: a rising list from 0 to T for each row.

        None if the mask is another one.
        """
        if "boundaries" not in self._built:
            numbers = _sequence_numbers(self._arguments["mask_function"])
            changes = [] if numbers is None else [row.nonzero().flatten() + 1 for row in numbers.diff(dim=-1)]
            self._built["boundaries"] = [[0, *change.tolist(), numbers.shape[-1]] for change in changes] or None
        return self._built["boundaries"]

    @property
    def is_causal(self) -> bool:
        """Whether a plain mask hides later positions."""
        return self._arguments["mask_function"] is causal_mask_function

    @property
    def shape(self) -> tuple[int, int]:
        return self._arguments["batch_size"], self._arguments["kv_offset"] + self._arguments["kv_length"]

    def to(self, device=None, *args, **kwargs) -> "LazyMask":
        if device is None or isinstance(device, torch.dtype):
            return self
        padding = None if self.padding is None else self.padding.to(device)
        return LazyMask(**{**self._arguments, "device": device, "attention_mask": padding})

    def contiguous(self) -> "LazyMask":
        return self

    def view(self, *shape) -> "LazyMask":
        return self

    def build(self, implementation: str) -> torch.Tensor | None:
        """The full mask that "sdpa" or "eager" attention takes."""
        if implementation not in self._built:
            self._built[implementation] = {"sdpa": sdpa_mask, "eager": eager_mask}[implementation](**self._arguments)
        return self._built[implementation]


def _sequence_numbers(mask_function) -> torch.Tensor | None:
    """int (B, T), rising by 1 with each packed sequence, if a mask function is causal in each; None if it is not."""
    if _maker(mask_function) != "and_masks":
        return None
    functions = {_maker(function): function for function in _inside(mask_function)["mask_functions"]}
    packed = functions.pop("packed_sequence_mask_function", None)
    if remapped := functions.pop("remap_positions_for_packed_sequence", None):
        functions["remapped"] = _inside(remapped)["mask_function"]
    return (
        _inside(packed)["packed_sequence_mask"] if packed and [*functions.values()] == [causal_mask_function] else None
    )


def _maker(mask_function) -> str:
    """The function of transformers that made a mask function."""
    return mask_function.__qualname__.partition(".")[0]


def _inside(mask_function) -> dict:
    """What a mask function was made of, by name."""
    return inspect.getclosurevars(mask_function).nonlocals


def flexformer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> LazyMask:
    """The mask function registered with transformers' AttentionMaskInterface."""
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.padding
    return LazyMask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{name: kwargs[name] for name in _MASK_ARGUMENTS if name in kwargs},
    )
