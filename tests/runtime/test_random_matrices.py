"""Each matrix of frequencies against its definition: covariance I, and what sets it apart from independent draws."""

import math

import pytest
import torch

from flexdistill.runtime.random_matrices import (
    FIXED,
    fastfood_factors,
    fastfood_matrix,
    fastfood_shape,
    gauss_hermite,
    hadamard,
    padded_size,
    seeded_generator,
)

every_matrix = pytest.mark.parametrize("name", [*FIXED, "fastfood"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(name, size, count, seed=0):
    if name != "fastfood":
        return FIXED[name](size, count, seeded(seed))
    factors = fastfood_factors(size, count, seeded(seed))
    return fastfood_matrix(*(factor[None] for factor in factors.values()), size, count)[0]


@every_matrix
@pytest.mark.parametrize("size", [6, 8])
def test_columns_have_covariance_one(name, size):
    matrix = draw(name, size, 8192)
    assert matrix.shape == (size, 8192) and matrix.dtype == torch.float64
    covariance = matrix @ matrix.T / 8192
    # an entry of n products has a standard deviation of at most sqrt(2 / n) = 0.016; whole blocks share vectors
    assert (covariance - torch.eye(size)).abs().max() < (1e-9 if name == "mm" else 0.15)
    assert matrix.mean(1).abs().max() < (1e-9 if name == "mm" else 0.05)


@every_matrix
def test_one_seed_gives_one_matrix(name):
    assert torch.equal(draw(name, 8, 20), draw(name, 8, 20))
    assert not torch.equal(draw(name, 8, 20), draw(name, 8, 20, seed=1))
    assert draw(name, 8, 20).shape == (8, 20)


def test_orthogonal_blocks():
    matrix = FIXED["orf"](16, 40, seeded())
    for block in (matrix[:, :16], matrix[:, 16:32], matrix[:, 32:]):
        gram = block.T @ block
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)
    norms = FIXED["orf"](16, 4000, seeded()).square().sum(0)
    # chi squared with 16 degrees of freedom
    assert norms.mean() == pytest.approx(16, rel=0.02) and norms.var() == pytest.approx(32, rel=0.1)


def test_orthogonal_directions_are_uniform():
    """Q of a QR decomposition is not, unless its signs are mended: its diagonal would be negative on average."""
    blocks = FIXED["orf"](4, 4000, seeded()).unflatten(1, (1000, 4))
    assert blocks.diagonal(dim1=0, dim2=2).mean(0).abs().max() < 0.15


def test_structured_orthogonal_blocks():
    matrix = FIXED["sorf"](16, 32, seeded())
    for block in (matrix[:, :16], matrix[:, 16:]):
        torch.testing.assert_close(block.T @ block, 16 * torch.eye(16, dtype=torch.float64))
    assert not torch.equal(matrix[:, :16], matrix[:, 16:])


def test_hybrid_is_structured_with_a_circle():
    """Without the real part of the circle, S-Hybrid is orthogonal; with it, columns keep their expected norm."""
    matrix = FIXED["rom"](16, 4096, seeded())
    assert matrix.square().sum(0).mean() == pytest.approx(16, rel=0.03)
    gram = matrix[:, :16].T @ matrix[:, :16]
    assert (gram - 16 * torch.eye(16)).abs().max() > 0.1


def test_circulant_columns_are_signed_rotations():
    matrix = FIXED["scrf"](7, 14, seeded())
    for block in (matrix[:, :7], matrix[:, 7:]):
        signs = set()
        for shift in range(7):
            rotated = block[:, 0].roll(shift)
            sign = torch.sign(block[0, shift] / rotated[0])
            torch.testing.assert_close(block[:, shift], sign * rotated)
            signs.add(float(sign))
        assert signs == {1.0, -1.0}


def test_quadrature_is_exact_for_low_orders():
    nodes, weights = gauss_hermite(5)
    for order in range(10):
        expected = 0 if order % 2 else math.prod(range(order - 1, 0, -2))
        assert float((weights * nodes**order).sum()) == pytest.approx(expected, abs=1e-9)
    assert float((weights * nodes**10).sum()) != pytest.approx(945, rel=1e-3)
    assert (weights > 0).all()


def test_quadrature_draws_nodes_by_weight():
    nodes, weights = gauss_hermite(5)
    matrix = FIXED["sgq"](8, 8192, seeded())
    distance, nearest = (matrix[..., None] - nodes).abs().min(-1)
    assert distance.max() == 0
    shares = torch.bincount(nearest.flatten(), minlength=5) / matrix.numel()
    torch.testing.assert_close(shares.double(), weights, rtol=0, atol=0.01)


def test_quasi_monte_carlo_fills_evenly():
    """Each of 256 equally likely cells of every dimension holds exactly one of 256 points; independent draws do not."""
    cells = (torch.special.ndtr(FIXED["qmc"](8, 256, seeded())) * 256).floor()
    assert all(len(row.unique()) == 256 for row in cells)
    cells = (torch.special.ndtr(FIXED["gaussian"](8, 256, seeded())) * 256).floor()
    assert all(len(row.unique()) < 200 for row in cells)


@pytest.mark.parametrize(("size", "count"), [(8, 8), (8, 20), (5, 3), (1, 4)])
def test_fastfood_is_its_product(size, count):
    factors = fastfood_factors(size, count, seeded())
    blocks, padded = fastfood_shape(size, count)
    assert padded == padded_size(size) and all(factor.shape == (blocks, padded) for factor in factors.values())
    dense = []
    for b, g, s, permutation in zip(*factors.values(), strict=True):
        transform, shuffle = hadamard(padded), torch.eye(padded, dtype=torch.float64)[permutation]
        dense.append(s.diag() @ transform @ g.diag() @ shuffle @ transform @ b.diag() / math.sqrt(padded))
    expected = torch.cat(dense)[:count, :size].T
    torch.testing.assert_close(draw("fastfood", size, count), expected)


def test_fastfood_rows_have_gaussian_norms():
    norms = draw("fastfood", 16, 4096).square().sum(0)
    assert norms.mean() == pytest.approx(16, rel=0.02) and norms.var() == pytest.approx(32, rel=0.1)


def test_hadamard():
    for size in (1, 2, 16):
        matrix = hadamard(size)
        assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
    assert [padded_size(size) for size in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_torchs_seed_decides():
    torch.manual_seed(3)
    first, second = seeded_generator().initial_seed(), seeded_generator().initial_seed()
    torch.manual_seed(3)
    assert seeded_generator().initial_seed() == first != second
