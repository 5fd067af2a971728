"""What a learnt controller could do beside what control theory says it should. In torch; runs in seconds.

    python examples/linear_quadratic.py

A cart-pole is held upright by a linear policy, first a poor one, then the linear-quadratic regulator of the upright
equilibrium. Along the closed loop: what the force can reach, which past forces matter for later angles, how far the
policy is from optimal (the gradient of the cost in the force), and how much of what gradient descent can change lies in
what the force can reach.
"""

from __future__ import annotations

import numpy as np
import torch

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.models import CartPole, ClosedLoop

PLANT, TIMES = CartPole(), np.linspace(0.0, 4.0, 41)  # seconds
START = 0.1 * torch.eye(4, dtype=torch.float64)[:3]  # position [m], angle [rad], velocity [m/s]
COST = control.QuadraticCost(Q=np.diag([1.0, 10.0, 0.1, 0.1]), R=[[0.1]])
POOR_GAIN = np.array([[-1.0, -40.0, -3.0, -8.0]])


def policy(gain: np.ndarray) -> torch.nn.Linear:
    """u = -K z, with a bias that could learn."""
    layer = torch.nn.Linear(4, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(-gain))
        layer.bias.zero_()
    return layer


def report(name: str, gain: np.ndarray) -> None:
    sol = kp.solve(kp.ODEProblem(ClosedLoop(PLANT, policy(gain)), START, TIMES))
    flow, reach = kp.linearize(sol), control.gram(sol, "c")
    past = control.hankel(sol, 2.0, C=[[0.0, 1.0, 0.0, 0.0]])
    costs = control.adjoint(sol, COST)
    share = control.reachable_angles(kp.modes(flow.ntk, axis="unit", k=2), reach).share
    print(f"{name}")
    print(f"  cost of each trial                        {costs.cost.values.round(3)}")
    print(f"  largest gradient in the force             {abs(costs.gradient[:, :-1]).max().item():.3g}")
    print(f"  reachability eigenvalues at the end       {reach.eigenvalues[0, -1].values.round(4)}")
    print(f"  Hankel singular value, force to angle     {past.values[0, 0].item():.4f}")
    print(f"  reachable share of two learning modes     {share[:, -1].mean('trial').values.round(3)}")
    for parameter, part in kp.contributions(flow).items():
        print(f"  of what learning can change, {parameter:13}{part.value:11.4g}")


def main() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    upright = control.linearize_lti(PLANT, zeros, torch.zeros(1, dtype=torch.float64))
    gain, _, poles = control.lqr(upright.A, upright.B, COST.Q, COST.R)
    print(f"the gain of lqr {gain.round(2)}, closed-loop poles {np.sort(poles.real).round(2)} (real parts)")
    report("a poor gain", POOR_GAIN)
    report("the gain of lqr", gain)


if __name__ == "__main__":
    main()
