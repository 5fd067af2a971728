"""Singular values of long products of matrices, whose ratios no floating number may hold."""

import numpy as np

SWEEPS = 40


class GradedProduct:
    """M_t ... M_1 up to an orthogonal matrix on the right: columns e^{l_i} u_i, kept apart in lengths and directions.

    After each factor the columns are made orthogonal by one-sided Jacobi rotations, so that e^{l_i} are the singular
    values. Each rotation takes the ratio of two lengths only, which may underflow without harm: small singular values
    keep their relative accuracy beside large ones.

    Source: Demmel, Veselic, "Jacobi's method is more accurate than QR" (1992).
    """

    def __init__(self, trials: int, size: int) -> None:
        self.directions = np.broadcast_to(np.eye(size), (trials, size, size)).copy()  # rows are columns u_i
        self.logs = np.zeros((trials, size))
        self.rounds = _tournament(size)

    def multiply(self, factor: np.ndarray) -> np.ndarray:
        """Take in one more factor [trial, n, n] from the left; the log singular values [trial, n], descending."""
        self.directions = self.directions @ factor.swapaxes(1, 2)
        self._normalise(slice(None))
        for _ in range(SWEEPS):
            if max((self._rotate(*pairs) for pairs in self.rounds), default=0.0) <= self._round_off:
                break
        return -np.sort(-self.logs, axis=1)

    @property
    def _round_off(self) -> float:
        return 4 * self.logs.shape[1] ** 0.5 * np.finfo(float).eps

    def _normalise(self, columns: np.ndarray | slice) -> None:
        lengths = np.linalg.norm(self.directions[:, columns], axis=2)
        with np.errstate(divide="ignore"):
            self.logs[:, columns] += np.log(lengths)
        self.directions[:, columns] /= np.where(lengths > 0, lengths, 1)[..., None]

    def _rotate(self, first: np.ndarray, second: np.ndarray) -> float:
        """Make pairs of columns orthogonal, and say how far from that the worst was."""
        (u, v), (log_u, log_v) = ([a[:, first], a[:, second]] for a in (self.directions, self.logs))
        cosine = (u * v).sum(2)
        swap = log_v > log_u
        ratio = _ratio(np.minimum(log_u, log_v), np.maximum(log_u, log_v))
        gap = 1 - ratio**2
        root = gap + np.hypot(gap, 2 * ratio * cosine)
        tangent = 2 * cosine / np.where(root > 0, root, 1)  # of the angle, over the ratio
        into_longer, into_shorter = (ratio**2 * tangent)[..., None], tangent[..., None]
        swap = swap[..., None]
        self.directions[:, first] = u + np.where(swap, -into_shorter, into_longer) * v
        self.directions[:, second] = v + np.where(swap, into_longer, -into_shorter) * u
        cosine_of_angle = np.log1p((ratio * tangent) ** 2) / 2
        self.logs[:, first] -= cosine_of_angle
        self.logs[:, second] -= cosine_of_angle
        for columns in (first, second):
            self._normalise(columns)
        return float(np.abs(cosine).max(initial=0))


def _ratio(shorter: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Of lengths by their logarithms; 0 where both are zero."""
    return np.exp(shorter - np.where(np.isneginf(longer), 0, longer))


def _tournament(size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rounds in which every column meets another, so that each pair meets once."""
    players = list(range(size + size % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [(a, b) for a, b in zip(players[:half], players[: half - 1 : -1], strict=True) if max(a, b) < size]
        rounds.append((np.array([a for a, _ in pairs], int), np.array([b for _, b in pairs], int)))
        players = [players[0], players[-1], *players[1:-1]]
    return [pairs for pairs in rounds if pairs[0].size]
