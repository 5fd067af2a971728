"""The mean loss of gradient descent on mini-batches under a frozen kernel, over all draws of the batches.

A step on B of N trials, drawn anew without repetition, is f <- f - lr (N / B) H M f in the notation of `decay`, with M
the projection on the drawn trials. In Ritz coordinates a, f = V^T a, H = diag(l), V_b the part of V on trial b,

    E a a^T <- C - lr (l C + C l) + lr^2 l [N (B - 1) / (B (N - 1)) C + N (N - B) / (B (N - 1)) sum_b G_b C G_b] l

with G_b = V_b V_b^T, since the chance of a trial is B / N and that of two is B (B - 1) / (N (N - 1)).
"""

import numpy as np

MOST = 96  # Ritz vectors with mini-batches; slower ones are taken to decay as on all trials


def mean_losses(
    vectors: np.ndarray, rates: np.ndarray, start: np.ndarray, lr: float, batch: int, steps: int
) -> np.ndarray:
    """The loss on all trials after 0, 1, ... steps, from V [k, trial, entry], l [k] and a [k], on batches of B."""
    lead = np.argsort(-rates)[:MOST]
    rest = np.setdiff1d(np.arange(len(rates)), lead)
    V, fast, N = vectors[lead], rates[lead], vectors.shape[1]
    G = np.einsum("ibn,jbn->bij", V, V)
    pair, own = N * (batch - 1) / batch / max(N - 1, 1), N * (N - batch) / batch / max(N - 1, 1)
    C, losses = np.outer(start[lead], start[lead]), []
    for _ in range(steps + 1):
        losses.append(np.trace(C))
        noise = pair * C + own * (G @ C @ G).sum(0)
        C = C - lr * (fast[:, None] * C + C * fast) + lr**2 * np.outer(fast, fast) * noise
    slow = np.abs(1 - lr * rates[rest]) ** (2 * np.arange(steps + 1)[:, None]) @ start[rest] ** 2
    return np.array(losses) + slow
