import re

import pytest
import torch
from accelerate import Accelerator

from flexdistill import recall as recall_module
from flexdistill.data import SAMPLE, read_documents
from flexdistill.errors import FlexdistillError
from flexdistill.recall import ASSOCIATIVE_RECALL, NEEDLE_IN_TEXT, make_questions, recall
from flexdistill.recipe import DataRecipe
from flexdistill.scoring import Score
from tests.distillation.stages import student


@pytest.fixture(scope="module")
def text():
    return next(read_documents(DataRecipe(source=str(SAMPLE))))


@pytest.fixture(scope="module")
def questions(text, tiny_tokenizer):
    return make_questions(tiny_tokenizer, text, [300, 1000], 4, seed=1)


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens).replace("\n", " ")


def test_the_answer_stands_in_the_context_once(questions, tiny_tokenizer):
    assert [(q.task, q.length) for q in questions[::4]] == [
        (task, length) for task in (ASSOCIATIVE_RECALL, NEEDLE_IN_TEXT) for length in (300, 1000)
    ]
    for question in questions:
        prompt = decode(tiny_tokenizer, question.tokens.prompt)
        beginning = prompt[prompt.rindex("The secret word of") :]
        fact = beginning + decode(tiny_tokenizer, question.tokens.continuation)
        assert fact.startswith("The secret word of ") and len(fact.split()) == 7
        assert prompt.count(f"{fact}.") == 1 and prompt.endswith(f" {beginning}")
        assert prompt.count("The secret word of") == question.facts + 1
        size = len(question.tokens.prompt) + len(question.tokens.continuation)
        assert 0.7 * question.length < size <= question.length
        place = prompt.index(fact) / (len(prompt) - len(beginning))
        # it stands between sentences, of which a short context has few
        assert question.length == 300 or place == pytest.approx(question.depth, abs=0.15)


def test_facts_fill_the_context_or_stand_alone(questions):
    facts = {(q.task, q.length): q.facts for q in questions}
    assert 2 <= facts[ASSOCIATIVE_RECALL, 300] < facts[ASSOCIATIVE_RECALL, 1000]
    assert facts[NEEDLE_IN_TEXT, 300] == facts[NEEDLE_IN_TEXT, 1000] == 1


def test_names_and_words_are_not_repeated(questions, tiny_tokenizer):
    for question in questions[:8]:
        facts = re.findall(r"word of (\w+) is (\w+)\.", decode(tiny_tokenizer, question.tokens.prompt))
        for column in zip(*facts, strict=True):
            assert len(set(column)) == len(column) == question.facts


def test_the_seed_decides(questions, text, tiny_tokenizer):
    assert make_questions(tiny_tokenizer, text, [300, 1000], 4, seed=1) == questions
    assert make_questions(tiny_tokenizer, text, [300, 1000], 4, seed=2) != questions


@pytest.mark.parametrize(("text", "length"), [("Dorothea loved a village. " * 3, 300), ("words only here. " * 90, 300)])
def test_too_little_text_is_an_error(tiny_tokenizer, text, length):
    with pytest.raises(FlexdistillError, match="cannot be made from this text.*give a longer text"):
        make_questions(tiny_tokenizer, text, [length], 2)


def test_too_short_a_length_is_an_error(tiny_tokenizer, text):
    with pytest.raises(FlexdistillError, match="20 tokens of facts cannot be made"):
        make_questions(tiny_tokenizer, text, [20], 2)


def test_accuracy_is_the_share_of_greedy_answers(questions, monkeypatch):
    def scores(model, continuations, accelerator):
        return [Score(-float(index), index in (0, 1, 2, 5)) for index in range(len(continuations))]

    monkeypatch.setattr(recall_module, "score_continuations", scores)
    rows = recall(None, questions, None)
    assert [row["accuracy"] for row in rows] == [0.75, 0.25, 0.0, 0.0]
    assert [row["log_likelihood"] for row in rows] == [-1.5, -5.5, -9.5, -13.5]
    assert rows[0]["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert [(row["task"], row["length"], row["questions"]) for row in rows] == [
        (question.task, question.length, 4) for question in questions[::4]
    ]


def test_a_model_is_asked(questions):
    torch.manual_seed(0)
    rows = recall(student("llama"), questions[:4], Accelerator(cpu=True), batch_tokens=700)
    assert len(rows) == 1 and rows[0]["log_likelihood"] < 0 and 0 <= rows[0]["accuracy"] <= 1
