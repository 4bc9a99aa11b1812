r"""Subspace iteration on the product, one noised half-step a round: our reading of FedPower (arXiv 2605.08443).

Only the paper's abstract was at hand: it clips each client's reconstructed update D_k = B_k A_k - B A in the Frobenius norm,
sums, and runs a subspace iteration with noise before orthonormalisation. Here both factors are trained, and with A A^T = I or
B^T B = I in turn each client sends

    D_k A^T `(m, r)`    or    B^T D_k `(r, n)`,    D_k scaled to norm C over all layers and the head's change together.

B + mean_k D_k A^T is M A^T, and A + mean_k B^T D_k is B^T M, for M = mean_k B_k A_k: the two half-steps of orthogonal
iteration for the best rank-r approximation of M (Golub and Van Loan 2013, section 8.6), started where the last round ended. So
the adapter is all the state there is, each half-step is one Gaussian release, and products are averaged, not factors. As
projecting shrinks, what is sent is no longer than C; the kernel clips it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dp_federated_lora.aggregation.lora.factors import pairs
from dp_federated_lora.lora import Factor


def reconstructed_norm(adapter: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Tensor:
    """Frobenius norm of the change of all products B A, and of the other tensors' change, as one float64 scalar.

    D = dB (A + dA) + B dA = L R with 2 r columns, so ||D||^2 = sum (L^T L) * (R R^T): no m x n matrix is formed.

    Args:
        adapter: before local training.
        change: of every trained tensor.
    """
    squares, factors = torch.zeros((), dtype=torch.float64), set[str]()
    for a, b, _ in pairs(change):
        factors |= {b, a}
        left = torch.cat([change[b], adapter[b]], dim=1).to(torch.float64)
        right = torch.cat([adapter[a] + change[a], change[a]]).to(torch.float64)
        squares += ((left.T @ left) * (right @ right.T)).sum()
    for name, tensor in change.items():
        if name not in factors:
            squares += tensor.to(torch.float64).square().sum()
    return squares.clamp(min=0.0).sqrt()


def projected(
    adapter: Mapping[str, Tensor], change: Mapping[str, Tensor], sent: frozenset[Factor], clip_norm: float
) -> dict[str, Tensor]:
    """What a client sends, float64, for each tensor of a kind in `sent`; a norm that is not finite makes all of it so.

    Args:
        adapter: before local training; the factor that is not sent is orthonormal.
        change: of every trained tensor.
        sent: kinds of tensors that are sent: one factor at most, and the head.
        clip_norm: C, to which the reconstructed update is scaled where it is longer.
    """
    result = {name: tensor.to(torch.float64) for name, tensor in change.items() if Factor.of(name) in sent}
    for a, b, _ in pairs(change):
        old_b, old_a, new_b, new_a = (t.to(torch.float64) for t in (adapter[b], adapter[a], change[b], change[a]))
        if b in result:
            result[b] = new_b @ ((old_a + new_a) @ old_a.T) + old_b @ (new_a @ old_a.T)
        else:
            result[a] = (old_b.T @ new_b) @ (old_a + new_a) + (old_b.T @ old_b) @ new_a
    scale = (clip_norm / reconstructed_norm(adapter, change)).clamp(max=1.0)
    return {name: scale * tensor for name, tensor in result.items()}


def orthonormalised(adapter: Mapping[str, Tensor], sent: frozenset[Factor]) -> dict[str, Tensor]:
    """The adapter, float32, with the same products and the factor that was sent orthonormal: it is the basis of the next turn."""
    result = dict(adapter)
    for a, b, _ in pairs(adapter):
        old_b, old_a = adapter[b].to(torch.float64), adapter[a].to(torch.float64)
        if Factor.B in sent:
            basis, rest = torch.linalg.qr(old_b)
            old_b, old_a = basis, rest @ old_a
        else:
            basis, rest = torch.linalg.qr(old_a.T)
            old_b, old_a = old_b @ rest.T, basis.T
        result[b], result[a] = old_b.to(torch.float32), old_a.to(torch.float32)
    return result
