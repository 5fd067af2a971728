"""Quadrature weights: the measure of the time axis."""

import numpy as np


def trapezoid(t: np.ndarray) -> np.ndarray:
    """Weights w [time] with sum_n w_n g(t_n) ~ integral of g over [t_0, t_N], of second order."""
    half = np.diff(np.asarray(t, np.float64)) / 2
    return np.append(half, 0.0) + np.append(0.0, half)


def gauss_points(edges: np.ndarray, points: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights inside each interval between edges [step + 1], both [step * points].

    Exact for polynomials up to degree 2 points - 1 on each interval.
    """
    edges = np.asarray(edges, np.float64)
    x, w = np.polynomial.legendre.leggauss(points)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return (middle[:, None] + half[:, None] * x).ravel(), (half[:, None] * w).ravel()
