r"""Methods that combine the participants' whole adapters, which no sum of their factors decides.

Averaging A and B by themselves misses the covariance of A_k and B_k over participants; these rules see every pair and do without
that error. So each participant has to add noise of its own (trust = "local"): what comes in here are `Released` values, one
adapter of each participant, and all is post-processing. Every p_k is 1/K; heads are averaged.

| name | next adapter | exact without noise | source |
|---|---|---|---|
| flora | frozen weights + sum p_k B_k A_k; A drawn anew, B = 0 | yes | FLoRA (arXiv 2409.05976) |
| fedex | mean factors; frozen weights + (sum p_k B_k A_k less their product) | yes | FedEx-LoRA (arXiv 2410.09432) |
| flexlora | the r leading singular vectors of sum p_k B_k A_k: B = U S, A = V^T | up to rank r | FlexLoRA (arXiv 2402.11505) |
| hetlora | mean factors, weighted by ||B_k A_k||_F | no | HetLoRA (arXiv 2401.06432), without its pruning of ranks |

Lower ranks come padded with zeros. What goes into frozen weights is kept beside them, as the layer's increment.

The weights of hetlora are those of noised factors: once the noise outweighs the updates, they measure the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dp_federated_lora.aggregation.lora.factors import Pair, pairs, product_svd
from dp_federated_lora.lora import Factor, orthonormal

Adapter = Mapping[str, Tensor]

Gather = Callable[[Adapter, Sequence[Adapter], int], Adapter]
"""The next adapter, made of the global one, those of all participants, and a public seed of this round."""


def flora(adapter: Adapter, gathered: Sequence[Adapter], seed: int) -> dict[str, Tensor]:
    """FLoRA: the product of the stacked factors is the mean of products; p_k is applied to B alone, or it would count twice."""
    result = _with_mean_heads(adapter, gathered)
    for pair in pairs(adapter):
        stacked_b, stacked_a = _stacked(pair, gathered)
        result[pair.increment] = (adapter[pair.increment] + stacked_b @ stacked_a).to(torch.float32)
        result[pair.b] = torch.zeros_like(adapter[pair.b])
    return result | orthonormal({pair.a: adapter[pair.a] for pair in pairs(adapter)}, seed)


def fedex(adapter: Adapter, gathered: Sequence[Adapter], seed: int) -> dict[str, Tensor]:
    """FedEx-LoRA: the residual is the product of the centred factors, summed: of rank (K - 1) r at most."""
    result = _with_mean_heads(adapter, gathered)
    for pair in pairs(adapter):
        b, a = _mean(pair.b, gathered), _mean(pair.a, gathered)
        centred = [{pair.b: each[pair.b] - b, pair.a: each[pair.a] - a} for each in gathered]
        stacked_b, stacked_a = _stacked(pair, centred)
        result[pair.increment] = (adapter[pair.increment] + stacked_b @ stacked_a).to(torch.float32)
        result[pair.b], result[pair.a] = b.to(torch.float32), a.to(torch.float32)
    return result


def flexlora(adapter: Adapter, gathered: Sequence[Adapter], seed: int) -> dict[str, Tensor]:
    """FlexLoRA: the best rank-r product; as its components come by size, each participant's first r_k are its best ones."""
    result = _with_mean_heads(adapter, gathered)
    for pair in pairs(adapter):
        u, s, vt = product_svd(*_stacked(pair, gathered))
        rank = len(adapter[pair.a])
        result[pair.b] = (u[:, :rank] * s[:rank]).to(torch.float32)
        result[pair.a] = vt[:rank].to(torch.float32)
    return result


def hetlora(adapter: Adapter, gathered: Sequence[Adapter], seed: int) -> dict[str, Tensor]:
    """HetLoRA: layer by layer, whoever's product is larger weighs more; equal weights where all are zero."""
    result = _with_mean_heads(adapter, gathered)
    for pair in pairs(adapter):
        norms = torch.stack([_product_norm(each[pair.b], each[pair.a]) for each in gathered])
        weights = norms / norms.sum() if norms.any() else torch.full_like(norms, 1 / len(gathered))
        for name in (pair.a, pair.b):
            tensors = torch.stack([each[name] for each in gathered]).to(torch.float64)
            result[name] = torch.tensordot(weights, tensors, dims=1).to(torch.float32)
    return result


def _with_mean_heads(adapter: Adapter, gathered: Sequence[Adapter]) -> dict[str, Tensor]:
    heads = [name for name in adapter if Factor.of(name) is Factor.HEAD]
    return dict(adapter) | {name: _mean(name, gathered).to(torch.float32) for name in heads}


def _mean(name: str, gathered: Sequence[Adapter]) -> Tensor:
    return torch.stack([each[name] for each in gathered]).to(torch.float64).mean(dim=0)


def _stacked(pair: Pair, gathered: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """[p_1 B_1, .., p_K B_K] `(m, K r)` and A_1, .., A_K below each other `(K r, n)`, in float64."""
    b = torch.cat([each[pair.b] for each in gathered], dim=1).to(torch.float64) / len(gathered)
    return b, torch.cat([each[pair.a] for each in gathered]).to(torch.float64)


def _product_norm(b: Tensor, a: Tensor) -> Tensor:
    """||B A||_F from two r x r matrices: its square is the trace of B^T B A A^T."""
    b, a = b.to(torch.float64), a.to(torch.float64)
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
