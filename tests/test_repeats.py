import itertools

import pytest
import torch

from flexdistill.mixture import TokenRows
from flexdistill.repeats import SHORTEST, repeat_spans


def repeated(rows, length, share=1.0):
    tokens = torch.arange(length).repeat(len(rows), 1)
    repeat_spans(tokens, torch.tensor(rows), share)
    return tokens


@pytest.mark.parametrize("length", [2, 5, 64, 1024])
def test_spans_come_again_later(length):
    for tokens in repeated(range(50), length):
        (copied,) = torch.nonzero(tokens != torch.arange(length), as_tuple=True)
        assert (tokens[copied] < copied).all()  # from before, as every token is its own first position
        assert len(copied) <= length // 2 + 1
        if length >= 4 * SHORTEST:
            assert len(copied) >= SHORTEST


@pytest.mark.parametrize("length", [8, 64, 1024, 5000])
def test_what_recall_can_tell(length):
    tokens = torch.arange(length).repeat(50, 1)
    recalled = repeat_spans(tokens, torch.arange(50), 1.0)
    for row, known in zip(tokens.tolist(), recalled.tolist(), strict=True):
        assert not known[-1] and any(known)
        first = {}
        for position, pair in enumerate(itertools.pairwise(row)):
            # the same token stood before, and the same one followed it
            assert not known[position] or pair in first
            first.setdefault(pair, position)
    assert not repeat_spans(tokens, torch.arange(50), 0.0).any()


def test_long_sequences_repeat_as_much():
    shares = []
    for length in (1024, 8192):
        tokens = torch.arange(length).repeat(100, 1)
        repeat_spans(tokens, torch.arange(100), 1.0)
        shares.append((tokens != torch.arange(length)).float().mean())
    assert min(shares) > 0.2 and max(shares) < 0.3


def test_rows_alone_decide():
    together = repeated([3, 8, 1], 100, share=0.5)
    for row, tokens in zip([3, 8, 1], together, strict=True):
        assert torch.equal(repeated([row], 100, share=0.5)[0], tokens)
    changed = (repeated(range(1000), 8, share=0.2) != torch.arange(8)).any(1)
    assert 0.15 < changed.float().mean() < 0.25


def test_only_rows_that_are_read_repeat():
    text = torch.arange(640).view(10, 64)
    mixed = TokenRows((text,), repeats=0.5)
    order = torch.tensor([7, 2, 2])
    expected = text[order].clone()
    repeat_spans(expected, order, 0.5)
    assert torch.equal(mixed[order], expected) and not torch.equal(mixed[:], text)
    assert torch.equal(text, torch.arange(640).view(10, 64))
