r"""FedASK's aggregation (arXiv 2507.09990) where everybody shares A.

The paper sums two sketches of the products B_k A_k and takes their SVD, because each client may hold another A. Under its own
private mode A is frozen at the clients, so that

    sum_k p_k B_k A = (sum_k p_k B_k) A

has rank r at most, one noised sum of B_k decides it, and a second one would only buy a second helping of noise. What is
left of the method is its new split of the product, B = U S^(1/2) and A = S^(1/2) V^T, through which A moves. All of it is
post-processing of a release.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dp_federated_lora.aggregation.lora.factors import pairs, product_svd
from dp_federated_lora.lora import Factor


def split_anew(adapter: Mapping[str, Tensor], _: frozenset[Factor]) -> dict[str, Tensor]:
    """Each pair B `(m, r)`, A `(r, n)` in float32 as U S^(1/2), S^(1/2) V^T with the same product; no m x n matrix is formed.

    A pair whose product has not got rank r is left as it is: a singular value of zero would end its training.
    """
    result = dict(adapter)
    for pair in pairs(adapter):
        u, s, vt = product_svd(adapter[pair.b], adapter[pair.a])
        if s[-1] > 1e-9 * s[0]:
            root = s.sqrt()
            result[pair.b] = (u * root).to(torch.float32)
            result[pair.a] = (root[:, None] * vt).to(torch.float32)
    return result
