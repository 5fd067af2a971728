"""Kalman's matrices, whose ranks tell what can be reached and what can be told apart."""

from typing import Any

import numpy as np

from kpflow_dyn.control._systems import as_system, input_matrix, is_system, output_matrix, square


def ctrb(A: Any, B: Any = None, t: int | None = None) -> np.ndarray:
    """The controllability matrix [unit, unit * input].

        ctrb = [B, A B, ..., A^{n-1} B]

    `np.linalg.matrix_rank` of it is the dimension of what inputs can reach. Of many units its columns become all but
    parallel; `gram(system, "c").eigenvalues` then tells more.

    Args:
        A: [unit, unit]; or a system alone, as ctrb(system).
        B: [unit, input].
        t: how many powers to take, up to the number of units; all when None.

    Raises:
        TypeError: no B, or one beside a system.
        ValueError: matrices that do not fit together.
    Source: Kalman, "Mathematical description of linear dynamical systems", SIAM J. Control 1, 152 (1963).

    >>> import numpy as np
    >>> from kpflow_dyn import control
    >>> control.ctrb([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]])
    array([[0., 1.],
           [1., 0.]])
    >>> int(np.linalg.matrix_rank(control.ctrb(np.eye(2), [[0.0], [1.0]])))
    1
    """
    A, B = _pair("ctrb", "B", A, B)
    A = square(A, "A")
    blocks = [input_matrix(B, len(A))]
    if t is not None and not (isinstance(t, int | np.integer) and t >= 1):
        raise ValueError(f"t is {t!r}, expected how many powers of A to take, at least 1, or None")
    for _ in range(min(t or len(A), len(A)) - 1):
        blocks.append(A @ blocks[-1])
    return np.concatenate(blocks, 1)


def obsv(A: Any, C: Any = None, t: int | None = None) -> np.ndarray:
    """The observability matrix [unit * output, unit].

        obsv = [C; C A; ...; C A^{n-1}]

    Args:
        A: [unit, unit]; or a system alone, as obsv(system).
        C: [output, unit].
        t: as in `ctrb`.

    Raises and Source as `ctrb`.

    >>> from kpflow_dyn import control
    >>> control.obsv([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0]])
    array([[1., 0.],
           [0., 1.]])
    """
    A, C = _pair("obsv", "C", A, C)
    A = square(A, "A")
    return ctrb(A.T, output_matrix(C, len(A)).T, t).T


def _pair(function: str, other: str, A: Any, matrix: Any) -> tuple[Any, Any]:
    if is_system(A) == (matrix is not None):
        got = "a system and a matrix" if is_system(A) else "one matrix"
        raise TypeError(f"{function} got {got}, expected {function}(A, {other}) or {function}(system)")
    if matrix is not None:
        return A, matrix
    system = as_system(A)
    return system.A, getattr(system, other)
