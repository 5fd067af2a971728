"""Controllers in gymnasium's environments: a policy that was trained on a plant, where someone else wrote the physics.

    environment      plant with its constants                          state it is given         control it is asked for
    CartPole-v1      CartPole(gravity=9.8), Euler steps of 0.02 s      position, angle [rad],    force [N], of which the
                                                                       their velocities          sign counts: +-10 N
    Pendulum-v1      Pendulum(mass=0.75, length=2/3, gravity=10):      angle [rad], 0 upright,   torque [N m], clipped
                     a rod of 1 kg and 1 m has the moments of that     its velocity              to +-2 N m
                     point mass; semi-implicit steps of 0.05 s

gymnasium orders the states of the cart otherwise and shows the pendulum's angle as (cos, sin); signs are the same.
"""

from kpflow_dyn.gym._environments import Environment, gym_plant
from kpflow_dyn.gym._episodes import Episodes, rollout
from kpflow_dyn.gym._policies import policy

__all__ = ["Environment", "Episodes", "gym_plant", "policy", "rollout"]
