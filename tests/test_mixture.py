import pytest
import torch

from flexdistill.mixture import TokenRows, interleave, turns_of
from flexdistill.packing import train_order


def rows(*sizes, weights=None):
    """Rows of two tokens: the text's number and the row's."""
    texts = tuple(
        torch.stack([torch.full((size,), index), torch.arange(size)], dim=1) for index, size in enumerate(sizes)
    )
    return TokenRows(texts, weights or (1.0,) * len(sizes))


def test_rows_of_several_texts():
    mixed = rows(3, 2)
    assert len(mixed) == 5 and mixed.shape == (5, 2)
    assert mixed[:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert mixed[2:4].tolist() == [[0, 2], [1, 0]]
    assert mixed[torch.tensor([4, 0, 4])].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert TokenRows((torch.ones(2, 3, dtype=torch.uint16),))[:].dtype == torch.int64


def test_one_text_is_in_the_order_of_its_own():
    assert torch.equal(rows(10).order(28, seed=3), train_order(10, 7, 4, seed=3).flatten())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1e-3)])
def test_shares_are_kept_at_every_point(weights):
    turns = interleave(weights, 1000)
    for count in (1, 7, 100, 999, 1000):
        assert torch.equal(interleave(weights, count), turns[:count])
        counts = turns_of(weights, count)
        assert sum(counts) == count
        for taken, weight in zip(counts, weights, strict=True):
            assert abs(taken - count * weight / sum(weights)) < len(weights)


def test_no_row_of_a_text_repeats_before_all_were_used():
    mixed = rows(30, 5, weights=(3.0, 1.0))
    order = mixed[mixed.order(200, seed=1)]
    assert torch.equal(mixed.order(77, seed=1), mixed.order(200, seed=1)[:77])
    assert not torch.equal(mixed.order(200, seed=2), mixed.order(200, seed=1))
    for index, size in ((0, 30), (1, 5)):
        mine = order[order[:, 0] == index, 1]
        assert len(mine) == (150, 50)[index]
        epochs = [part.tolist() for part in mine.split(size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_in_turn():
    assert rows(3, 1, weights=(3.0, 1.0)).in_turn().tolist() == [[0, 0], [0, 1], [1, 0], [0, 2]]
    assert rows(0, 0).in_turn().shape == (0, 2)
