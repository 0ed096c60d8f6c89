import hashlib

import numpy as np
import pytest
import reference
import torch

from quambase.model.hadamard import hadamard, odd_factor, odd_order
from quambase.schema.errors import CheckpointInvalid

# SHA-256 of the rows of + and - joined by newlines, of had_12_paley, had_20_will,
# had_28_will and had_40_tpal as fast-hadamard-transform's code_gen.py has them.
GOLDEN = {
    12: "a8b73b2d138b0c9079b9fc7cef05cddac9efd34de7cf328925076e04f7ad089f",
    20: "40a113036aca9c3e1d767ddccee197a6d526de6728b2ef9a7d5349df8e4afdd1",
    28: "3916d8a7682dc5170fdd214f7cc08947b261fcb822691c23f91700aec5428b70",
    40: "8cd17c4fce4c2af2e3a728959ddc33324513217b6c597cfdb6d9d80fd6fe693e",
}


@pytest.mark.parametrize("order", [12, 20, 28, 40])
def test_matrices_are_upstreams_and_orthogonal(order: int) -> None:
    matrix = odd_factor(order)
    text = "\n".join("".join("+" if v > 0 else "-" for v in row) for row in matrix)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN[order]
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("dim", "order"),
    # d_model and d_inner of every published Mamba: 130m, 370m, 790m, 1.4b, 2.8b; and small ones.
    [
        *[(768, 12), (1536, 12), (3072, 12), (1024, 1), (2048, 1), (4096, 1), (2560, 40), (5120, 40)],
        *[(12, 12), (20, 20), (28, 28), (224, 28), (1, 1), (2, 1), (256, 1)],
    ],
)
def test_transform_equals_the_kronecker_product(dim: int, order: int) -> None:
    assert odd_order(dim) == order
    matrix = np.kron(odd_factor(order), reference.sylvester(dim // order)) / np.sqrt(dim)
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(dim))
    before = x.clone()
    y = hadamard(x).numpy()
    # At most dim additions of values whose magnitudes sum to |x|_1 / sqrt(dim), each
    # rounded: the usual summation bound, with log2(dim) levels plus the odd factor's sum.
    bound = 2.0**-24 * (np.log2(dim) + order + 2) * np.abs(x.numpy()).sum(1, keepdims=True) / np.sqrt(dim)
    assert (np.abs(y - x.numpy().astype(np.float64) @ matrix.T) <= bound).all()
    assert torch.equal(x, before), "the argument was changed"


def test_factor_is_applied_once_at_the_end() -> None:
    x = torch.arange(8.0).reshape(1, 8)
    plain = hadamard(x, 1.0)
    assert torch.equal(plain, plain.round()), "integers must stay integers without a factor"
    assert torch.equal(hadamard(x, 0.3), plain * np.float32(0.3))


def test_a_dimension_without_matrix_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match="no Hadamard matrix for dimension 36"):
        hadamard(torch.zeros(1, 36))
