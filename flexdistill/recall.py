"""Recall of what stood far back: questions about facts in a long context, made from a text with a seed.

Associative recall: the context is a list of facts, as many as fit, and one of them is asked for (arXiv:2312.04927).
Needle in text: one fact stands between the sentences of the text.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import FlexdistillError
from .scoring import Continuation, score_continuations, tokenize

ASSOCIATIVE_RECALL, NEEDLE_IN_TEXT = "associative recall", "needle in text"
_FACT = "The secret word of {} is"
_NAME = re.compile(r"\b[A-Z][a-z]{2,9}\b")
_WORD = re.compile(r"\b[a-z]{4,9}\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Question:
    """A context, the beginning of a fact from it, and the fact's end."""

    task: str
    length: int  # tokens that the context was made to fit in
    facts: int  # in the context
    depth: float  # where the fact stands, from 0 at the beginning to 1 at the end
    tokens: Continuation


def make_questions(
    tokenizer: PreTrainedTokenizerBase, text: str, lengths: Sequence[int], count: int, seed: int = 0
) -> list[Question]:
    """Questions of both tasks, `count` at each length, their depths spread evenly; the same for the same seed.

    Args:
        text: gives the names, the secret words and the sentences around the needle; a book is enough for 8k tokens.
        lengths: tokens of a whole prompt, at most.

    Raises:
        FlexdistillError: if the text has too few names, words or sentences for a length, or the length is too short.
    """
    generator = random.Random(seed)
    source = _Source(tokenizer, text)
    questions = []
    for task, make in ((ASSOCIATIVE_RECALL, _facts_only), (NEEDLE_IN_TEXT, _fact_in_text)):
        for length in lengths:
            for index in range(count):
                depth = (index + 0.5) / count
                context, asked, facts = make(source, length, depth, generator)
                beginning, _, answer = asked.rpartition(" ")
                tokens = tokenize(tokenizer, f"{context}\n{beginning}", f" {answer}")
                questions.append(Question(task, length, facts, depth, tokens))
    return questions


def recall(model: PreTrainedModel, questions: Sequence[Question], accelerator: Accelerator, **settings) -> list[dict]:
    """How often greedy decoding gives the answer.

    Args:
        settings: of `score_continuations`.

    Returns:
        a dict per task and length, in the order of the questions: `task`, `length`, `facts` on average, `questions`,
        `accuracy`, its `standard_error`, and the answer's mean `log_likelihood` in nats.
    """
    scores = score_continuations(model, [question.tokens for question in questions], accelerator, **settings)
    groups: dict[tuple[str, int], list] = {}
    for question, score in zip(questions, scores, strict=True):
        groups.setdefault((question.task, question.length), []).append((question, score))
    rows = []
    for (task, length), group in groups.items():
        count = len(group)
        accuracy = sum(score.greedy for _, score in group) / count
        rows.append(
            {
                "task": task,
                "length": length,
                "facts": sum(question.facts for question, _ in group) / count,
                "questions": count,
                "accuracy": accuracy,
                "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
                "log_likelihood": sum(score.log_likelihood for _, score in group) / count,
            }
        )
    return rows


class _Source:
    """Names, words and sentences of a text, with what they take in tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.tokenizer = tokenizer
        self.words = _most_common(_WORD.findall(text))
        # what also stands in lower case is no name but the beginning of a sentence
        lower = set(re.findall(r"\b[a-z]+\b", text))
        self.names = _most_common(name for name in _NAME.findall(text) if name.lower() not in lower)
        self.sentences = [" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text)]
        self.sentence_tokens = self.count(self.sentences)

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text where it follows on another."""
        if not texts:
            return []
        encoded = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False, verbose=False)
        return [len(tokens) for tokens in encoded["input_ids"]]

    def facts(self, count: int, generator: random.Random) -> list[str]:
        """Facts with names and words of their own; as many as there are names and words for, at most."""
        count = min(count, len(self.names), len(self.words))
        names, words = generator.sample(self.names, count), generator.sample(self.words, count)
        return [f"{_FACT.format(name)} {word}" for name, word in zip(names, words, strict=True)]


def _most_common(words: Iterable[str], limit: int = 2000) -> list[str]:
    """Without rare words, which few models know."""
    return [word for word, _ in Counter(words).most_common(limit)]


def _facts_only(source: _Source, length: int, depth: float, generator: random.Random) -> tuple[str, str, int]:
    """Context, asked fact, and number of facts."""
    # a fact has seven words and so seven tokens or more
    facts = source.facts(length // 7 + 1, generator)
    sizes = source.count([f"{fact}.\n" for fact in facts])
    room, fitting = length - max(sizes, default=0), 0
    while fitting < len(facts) and sizes[fitting] <= room:
        room -= sizes[fitting]
        fitting += 1
    if fitting < 2 or fitting == len(facts):
        raise FlexdistillError(
            f"{length} tokens of facts cannot be made from this text, which has {len(source.names)} names and "
            f"{len(source.words)} words; give a longer text, or other lengths."
        )
    context = "".join(f"{fact}.\n" for fact in facts[:fitting]).rstrip("\n")
    return context, facts[int(depth * fitting)], fitting


def _fact_in_text(source: _Source, length: int, depth: float, generator: random.Random) -> tuple[str, str, int]:
    """As `_facts_only`, with one fact and text around it."""
    if not source.names or not source.words:
        raise FlexdistillError(
            "Facts cannot be made from this text, which has no names or no words; give a longer text."
        )
    (fact,) = source.facts(1, generator)
    first = last = generator.randrange(len(source.sentences))
    (size,) = source.count([f"{fact}.\n"])
    room = length - 2 * size
    while last < len(source.sentences) and source.sentence_tokens[last] <= room:
        room -= source.sentence_tokens[last]
        last += 1
    while first > 0 and source.sentence_tokens[first - 1] <= room:
        first -= 1
        room -= source.sentence_tokens[first]
    if last - first < 2 or (first == 0 and last == len(source.sentences)):
        raise FlexdistillError(
            f"{length} tokens around a fact cannot be made from this text; give a longer text, or other lengths."
        )
    ends = list(accumulate(source.sentence_tokens[first:last]))
    sentences = source.sentences[first:last]
    sentences.insert(bisect(ends, depth * ends[-1]), f"{fact}.")
    return " ".join(sentences), fact, 1
