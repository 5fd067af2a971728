"""The classical empirical neural tangent kernel of a network's outputs."""

from typing import Any

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import StaticProblem
from kpflow_dyn._solve import solve


def empirical_ntk(net: Any, x: Array, params: Choice = None) -> Array:
    """Theta[a, b, i, j] = sum_theta d net_i(x_a)/d theta d net_j(x_b)/d theta, [trial, trial, out, out].

    No axis is averaged or traced. An output with several axes is flattened. For kernels too large to hold, take the
    ntk of `StaticProblem(net, x, state="")`, which is this one as an operator.

    Args:
        net: a network as `StaticProblem` takes it.
        x: inputs [trial, ...].
        params: which parameters learn, as in `linearize`.

    Raises:
        TypeError, ValueError: as `solve` and `linearize`; and a kernel that does not fit into memory.
    Source: Jacot, Gabriel, Hongler, "Neural tangent kernel", arXiv:1806.07572.

    >>> import torch, kpflow_dyn as kp
    >>> net, x = torch.nn.Linear(3, 2, bias=False), torch.eye(3)
    >>> kp.empirical_ntk(net, x)[:, :, 0, 0]
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    flow = linearize(solve(StaticProblem(net, x, state="")), params=params)
    trials, size = x.shape[0], flow.ntk.domain.size // x.shape[0]
    kernel = flow.ntk.dense().reshape((trials, size, trials, size))
    return array_namespace(kernel).permute_dims(kernel, (0, 2, 1, 3))
