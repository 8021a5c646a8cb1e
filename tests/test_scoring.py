import copy

import pytest
import torch
from accelerate import Accelerator
from tokenizers.processors import TemplateProcessing

from flexdistill.data import SAMPLE, read_documents
from flexdistill.errors import FlexdistillError
from flexdistill.recipe import DataRecipe
from flexdistill.scoring import Continuation, prompt_tokens, score_continuations, tokenize
from tests.distillation.stages import sequences, student, teacher

CPU = Accelerator(cpu=True)


def continuations():
    """Prompts of 1 to 22 tokens, each with 1 to 5 of what follows."""
    rows = sequences(count=9).tolist()
    sizes = [(1, 1), (22, 2), (5, 5), (5, 1), (13, 3), (13, 3), (2, 4), (21, 1), (9, 2)]
    return [Continuation(row[:p], row[p : p + c]) for row, (p, c) in zip(rows, sizes, strict=True)]


@pytest.mark.parametrize(
    "make", [lambda: teacher("gpt2"), lambda: student("llama"), lambda: student("llama", window=4)]
)
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
@torch.no_grad()
def test_scores_are_those_of_each_text_alone(make, batch_tokens):
    model = make()
    for one, score in zip(continuations(), score_continuations(model, continuations(), CPU, batch_tokens), strict=True):
        logits = model(input_ids=torch.tensor([one.prompt + one.continuation])).logits[0, len(one.prompt) - 1 : -1]
        rows = torch.arange(len(one.continuation))
        expected = float(logits.log_softmax(-1)[rows, one.continuation].sum())
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert not score.greedy or logits.argmax(-1).tolist() == one.continuation


@pytest.mark.parametrize("make", [lambda: teacher("gpt2"), lambda: student("llama", window=4)])
def test_greedy_is_what_generate_gives(make):
    model = make()
    prompt = sequences(count=3, length=12)
    output = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = [Continuation(row[:12], row[12:]) for row in output.tolist()]
    other = [Continuation(one.prompt, [*one.continuation[:-1], (one.continuation[-1] + 1) % 256]) for one in given]
    assert [score.greedy for score in score_continuations(model, given + other, CPU)] == [True] * 3 + [False] * 3


def test_encoders_are_refused():
    with pytest.raises(FlexdistillError, match="attends in both directions"):
        score_continuations(student("bert"), continuations(), CPU)


def test_tokens_divide_where_the_texts_part(tiny_tokenizer):
    text = next(read_documents(DataRecipe(source=str(SAMPLE))))[:400]
    for cut in range(20, 300, 7):
        tokens = tokenize(tiny_tokenizer, text[:cut], text[cut : cut + 9])
        assert tiny_tokenizer.decode(tokens.prompt + tokens.continuation) == tiny_tokenizer.decode(
            tiny_tokenizer(text[: cut + 9])["input_ids"]
        )
        assert tokens.prompt == tiny_tokenizer(text[:cut])["input_ids"][: len(tokens.prompt)]
        assert tokens.continuation
    for prompt, continuation in (("Some text", ""), ("", "Some text")):
        with pytest.raises(FlexdistillError, match="adds no token"):
            tokenize(tiny_tokenizer, prompt, continuation)


def test_what_a_tokenizer_ends_texts_with_is_no_part_of_a_prompt(tiny_tokenizer):
    bare = tiny_tokenizer("Miss Brooke")["input_ids"]
    framing, eos = copy.deepcopy(tiny_tokenizer), tiny_tokenizer.eos_token_id
    special = [(tiny_tokenizer.eos_token, eos)]
    framing.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A <eos>", special_tokens=special)
    assert framing("Miss Brooke")["input_ids"] == [eos, *bare, eos]
    assert prompt_tokens(framing, "Miss Brooke") == [eos, *bare]
    assert prompt_tokens(tiny_tokenizer, "Miss Brooke") == bare
    plain, framed = (tokenize(tokenizer, "Miss", " Brooke had") for tokenizer in (tiny_tokenizer, framing))
    assert framed == Continuation([eos, *plain.prompt], plain.continuation)
