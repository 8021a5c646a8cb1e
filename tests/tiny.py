"""Models and a tokenizer small enough for every test, built from configurations and never downloaded."""

import functools
import json
import lzma
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flexdistill.data import SAMPLE

VOCABULARY = 256


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    return _build(GPT2LMHeadModel, config)


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    """Grouped-query attention: 4 query heads share 2 KV heads of size 16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _build(LlamaForCausalLM, config)


def tiny_bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=1,
    )
    return _build(BertForMaskedLM, config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of single ASCII characters and their most frequent merges; non-ASCII text is dropped."""
    return PreTrainedTokenizerFast(tokenizer_object=_trained(), eos_token="<eos>", pad_token="<pad>")


def save_tiny(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def save_gguf(file: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Writes a Llama as GGUF, with the query and key rows in the order of llama.cpp."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
        writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
        writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        for projection, count in heads.items():
            if projection in name:
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _build(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config).eval()


@functools.cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        show_progress=False,
        initial_alphabet=_ASCII_IN_BYTE_LEVEL,
    )
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as sample:
        tokenizer.train_from_iterator([sample.read(100_000)], trainer)
    return tokenizer


# ByteLevel writes space as Ġ and newline as Ċ
_ASCII_IN_BYTE_LEVEL = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
