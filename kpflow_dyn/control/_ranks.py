"""Kalman's matrices, whose ranks tell what can be reached and what can be told apart."""

from typing import Any

import numpy as np

from kpflow_dyn.control._systems import as_matrix, square


def ctrb(A: Any, B: Any) -> np.ndarray:
    """The controllability matrix [unit, unit * input].

        ctrb = [B, A B, ..., A^{n-1} B]

    `np.linalg.matrix_rank` of it is the dimension of what inputs can reach. Of many units its columns become all but
    parallel; `gram(system, "c").eigenvalues` then tells more.

    Args:
        A: [unit, unit].
        B: [unit, input].

    Raises:
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
    A = square(A, "A")
    blocks = [as_matrix(B, "B", (len(A), None))]
    for _ in range(len(A) - 1):
        blocks.append(A @ blocks[-1])
    return np.concatenate(blocks, 1)


def obsv(A: Any, C: Any) -> np.ndarray:
    """The observability matrix [unit * output, unit].

        obsv = [C; C A; ...; C A^{n-1}]

    Args:
        A: [unit, unit].
        C: [output, unit].

    Raises and Source as `ctrb`.

    >>> from kpflow_dyn import control
    >>> control.obsv([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0]])
    array([[1., 0.],
           [0., 1.]])
    """
    C = as_matrix(C, "C", (None, None))
    return ctrb(np.transpose(A), C.T).T
