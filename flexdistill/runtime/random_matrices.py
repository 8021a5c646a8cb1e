"""Frequency matrices of random features: columns w_1 ... w_n that stand for draws from N(0, I_d).

A fixed matrix is drawn once and then a constant of the checkpoint; Fastfood is a product of factors that can be
learned. This is Spectraformer's grid of matrices (arXiv:2405.15310), each as its own paper defines it.
"""

import math
from collections.abc import Callable

import torch

# nodes of the one-dimensional Gauss-Hermite rule: exact for polynomials of degree 9
_QUADRATURE_NODES = 5

Draw = Callable[[int, int, torch.Generator], torch.Tensor]


def seeded_generator() -> torch.Generator:
    """A CPU generator whose seed comes from torch's own, so that one seed gives one model on every device."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))


def gaussian(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(size, count) independent standard normals (Rahimi and Recht, 2007)."""
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def orthogonal(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks of `size` orthogonal directions with the norms of Gaussian vectors (arXiv:1610.09072, section 3)."""
    blocks = []
    for _ in range(-(-count // size)):
        q, r = torch.linalg.qr(gaussian(size, size, generator))
        blocks.append(q * r.diagonal().sign())  # without the signs Q would not be uniform over rotations
    return _joined(blocks, count) * gaussian(size, count, generator).norm(dim=0)


def structured_orthogonal(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """SORF: blocks sqrt(p) H D1 H D2 H D3 of random signs D, p = `padded_size` (arXiv:1610.09072, section 4)."""
    padded = padded_size(size)
    return _sign_products(size, count, generator, lambda: _signs(padded, generator))


def random_orthogonal_hybrid(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """ROM's S-Hybrid: SORF whose last D is uniform on the complex unit circle (arXiv:1703.00864, section 2).

    Features are real, so the real part is taken, times sqrt(2) to keep the covariance I.
    """
    padded = padded_size(size)

    def unit_circle():
        angle = 2 * math.pi * torch.rand(padded, generator=generator, dtype=torch.float64)
        return math.sqrt(2) * angle.cos()

    return _sign_products(size, count, generator, unit_circle)


def signed_circulant(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """SCRF: blocks of all rotations of one Gaussian vector, each with a random sign (Feng, Hu and Liao, IJCAI 2015)."""
    shift = (torch.arange(size)[:, None] - torch.arange(size)) % size
    blocks = []
    for _ in range(-(-count // size)):
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        blocks.append(vector[shift] * _signs(size, generator))
    return _joined(blocks, count)


def gauss_hermite(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights whose sum is the expectation under N(0, 1), exact for polynomials below degree 2 `nodes`."""
    off_diagonal = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return values, vectors[0].square()


def subsampled_quadrature(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """SGQ: points of the dense Gauss-Hermite grid, drawn by their weights (arXiv:1709.02605).

    So the points stay unweighted; a sparse grid's negative weights would make positive features signed.
    """
    nodes, weights = gauss_hermite(_QUADRATURE_NODES)
    chosen = torch.multinomial(weights, size * count, replacement=True, generator=generator)
    return nodes[chosen].view(size, count)


def quasi_monte_carlo(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """QMC: scrambled Sobol points through the normal quantile function (arXiv:1412.8293, section 3)."""
    seed = int(torch.randint(2**62, (), generator=generator))
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    # Sobol points are multiples of 2^-30 from 0 on: the middle of a cell is never 0 nor 1
    return torch.special.ndtri(points + 2.0**-31).T


def moment_matching(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """MM: Gaussian draws moved and whitened to mean 0 and covariance I exactly (Shen, Yang and Wang, AAAI 2017)."""
    draws = gaussian(size, count, generator)
    draws = draws - draws.mean(1, keepdim=True)
    covariance = draws @ draws.T / count
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), draws, upper=False)


FIXED: dict[str, Draw] = {
    "gaussian": gaussian,
    "orf": orthogonal,
    "sorf": structured_orthogonal,
    "scrf": signed_circulant,
    "rom": random_orthogonal_hybrid,
    "sgq": subsampled_quadrature,
    "qmc": quasi_monte_carlo,
    "mm": moment_matching,
}
# matrix -> whether its factors are learned
FASTFOOD = {"fastfood": False, "fastfood_learnable": True}
# the first is the default: with oprf, Spectraformer's best average on Long Range Arena
MATRICES = ("fastfood_learnable", *FIXED, "fastfood")


def check_count(matrix: str, size: int, count: int) -> None:
    """Raises ValueError if a matrix cannot have so few columns."""
    if matrix == "mm" and count <= size:
        raise ValueError(
            f"Matrix 'mm' has no covariance to match with {count} vectors of size {size}; ask for more features, or "
            "choose another matrix"
        )


def hadamard(size: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> torch.Tensor:
    """Walsh-Hadamard matrix (size, size) of entries +-1; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def padded_size(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def fastfood_shape(size: int, count: int) -> tuple[int, int]:
    """(blocks, p) of each factor of `fastfood_matrix`."""
    padded = padded_size(size)
    return -(-count // padded), padded


def fastfood_factors(size: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Factors of `fastfood_matrix`, each (blocks, p): signs b, Gaussians g, norms s, and the permutation."""
    blocks, padded = fastfood_shape(size, count)
    g = torch.randn(blocks, padded, generator=generator, dtype=torch.float64)
    norms = torch.randn(blocks, padded, padded, generator=generator, dtype=torch.float64).norm(dim=-1)
    return {
        "b": torch.stack([_signs(padded, generator) for _ in range(blocks)]),
        "g": g,
        # rows of H G P H B / sqrt(p) have the norm |g|
        "s": norms / g.norm(dim=-1, keepdim=True),
        "permutation": torch.stack([torch.randperm(padded, generator=generator) for _ in range(blocks)]),
    }


def fastfood_matrix(
    b: torch.Tensor, g: torch.Tensor, s: torch.Tensor, permutation: torch.Tensor, size: int, count: int
) -> torch.Tensor:
    """Fastfood's S H G P H B / sqrt(p), transposed (Le, Sarlos and Smola, ICML 2013).

    Args:
        b, g, s: float (H, blocks, p) diagonals; permutation: int64 (H, blocks, p).

    Returns:
        (H, size, count), differentiable in b, g and s.
    """
    padded = b.shape[-1]
    transform = hadamard(padded, b.dtype, b.device)
    inner = transform[permutation] * b[..., None, :]  # P H B
    rows = s[..., None] * ((transform * g[..., None, :]) @ inner) * padded**-0.5
    return rows.flatten(1, 2)[:, :count, :size].transpose(1, 2)


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(2, (count,), generator=generator).double() - 1


def _sign_products(size: int, count: int, generator: torch.Generator, last: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Columns of blocks sqrt(p) (H D)^3 with normalised H, the leftmost D from `last` and the others random signs."""
    padded = padded_size(size)
    transform = hadamard(padded) * padded**-0.5
    blocks = []
    for _ in range(-(-count // padded)):
        product = torch.eye(padded, dtype=torch.float64)
        for diagonal in (_signs(padded, generator), _signs(padded, generator), last()):
            product = transform @ (diagonal[:, None] * product)
        blocks.append(math.sqrt(padded) * product.T[:size])
    return _joined(blocks, count)


def _joined(blocks: list[torch.Tensor], count: int) -> torch.Tensor:
    return torch.cat(blocks, dim=1)[:, :count]
