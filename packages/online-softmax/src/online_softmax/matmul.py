"""Why tiles: the accesses of a matrix product with and without them.

Every element of A B (n x n) needs n elements of A and n of B. Computed one by one they are
loaded again for each: 2 n³ accesses. A block of b x b of them, computed together, shares what
it loads: 2 n³ / b. For n = 32 and b = 16 that is 65,536 against 4,096.
"""

from __future__ import annotations

import torch

from .memory import HbmTensor
from .operands import blocks


def tiled_matmul(a: HbmTensor, b: HbmTensor, block: int) -> torch.Tensor:
    """A B for A (m, k) and B (k, n), in blocks; block=1 is the product of one row and column."""
    rows, inner = a.data.shape
    columns = b.data.shape[1]
    product = torch.zeros(rows, columns, dtype=a.compute)
    for i in blocks(rows, block):
        for j in blocks(columns, block):
            for k in blocks(inner, block):
                product[i, j] += a.load(i, k) @ b.load(k, j)
    return product
