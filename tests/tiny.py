"""Models and a tokenizer small enough for every test, built from configurations and never downloaded."""

import functools
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


def tiny_llama() -> LlamaForCausalLM:
    """Grouped-query attention: 4 query heads share 2 KV heads of size 16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
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
