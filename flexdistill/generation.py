"""Text from a converted model, and what it took."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import set_seed

from .conversion import max_positions
from .errors import FlexdistillError
from .evaluation import load_converted
from .runtime.cache import cache_num_bytes
from .scoring import check_causal, prompt_tokens
from .sources import load_tokenizer, resolve_model

# what a source's generation_config.json may have set otherwise, and this function does not return
_ONE_SEQUENCE = {"use_cache": True, "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None}


def generate(directory: str, prompt: str, *, seed: int | None = None, **settings: Any) -> dict[str, Any]:
    """Continues `prompt` with a converted model.

    Args:
        directory: folder or Hub id of the model.
        seed: fixes what is sampled.
        settings: what transformers' `generate` takes.

    Returns:
        `text` with the prompt, `new_tokens`, `elapsed_s`, `tokens_per_s`, and `state_bytes` of the cache at the end.

    Raises:
        FlexdistillError: for a prompt without tokens, a bidirectional model, or more tokens than it has positions for.
    """
    tokenizer = load_tokenizer(resolve_model(directory))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.tensor([prompt_tokens(tokenizer, prompt)], device=device)
    if not tokens.numel():
        raise FlexdistillError("The prompt has no tokens; give some text to continue.")
    model = load_converted(directory).to(device)
    check_causal(model)
    if seed is not None:
        set_seed(seed)
    start = time.perf_counter()
    try:
        mask = torch.ones_like(tokens)
        output = model.generate(tokens, attention_mask=mask, **_ONE_SEQUENCE | settings, return_dict_in_generate=True)
    except IndexError as error:  # learned position embeddings end; rotary ones do not
        raise FlexdistillError(
            f"Prompt and new tokens are longer than the model's {max_positions(model)} positions; "
            "shorten the prompt or set a smaller --max-new-tokens."
        ) from error
    elapsed_s = time.perf_counter() - start
    (sequence,) = output.sequences
    return {
        "text": tokenizer.decode(sequence, skip_special_tokens=True),
        "new_tokens": (new_tokens := len(sequence) - tokens.shape[1]),
        "elapsed_s": elapsed_s,
        "tokens_per_s": new_tokens / elapsed_s,
        "state_bytes": cache_num_bytes(output.past_key_values),
    }
