"""Episodes of a policy in an environment."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._backend import backend_of
from kpflow_dyn._shown import Row, Shown, labelled, number, some, type_name
from kpflow_dyn.gym._environments import Environment, environment_of
from kpflow_dyn.gym._policies import greedy
from kpflow_dyn.tasks._data import check_count

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Episodes(Shown):
    """What a policy did in an environment.

    Attributes:
        env: the environment's name.
        returns: [episode], the environment's rewards, summed.
        lengths: [episode], how many steps each had.
        terminated: [episode], True where the environment ended the episode as failed, not for its length.
        states: [episode, time, state] of the plant, from the start to the state after the last step, then NaN; time is
            in seconds.
        controls: [episode, time, control] in the plant's unit, as the environment applied them from each state on; NaN
            from the last state on.

    Example as `rollout`.
    """

    env: str
    returns: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray
    states: xr.DataArray
    controls: xr.DataArray

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("returns", f"{number(self.returns.mean())} in the mean, {_range(self.returns)}")]
        rows += [("lengths", f"{_range(self.lengths)} steps"), ("failed", str(int(self.terminated.sum())))]
        rows += [("states", f"{labelled(self.states)}: {some([str(name) for name in self.states.state.values])}")]
        return f"{len(self.returns)} episodes of {self.env}", [*rows, ("controls", labelled(self.controls))]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all attributes."""
        import xarray as xr

        columns = {name: ("episode", getattr(self, name)) for name in ("returns", "lengths", "terminated")}
        return xr.Dataset({"states": self.states, "controls": self.controls} | columns, attrs={"env": self.env})

    def plot(self, dark: bool = False) -> Figure:
        """The states over time, a panel for each and a line for each episode."""
        from kpflow_dyn.figures import _control as figures

        return figures.episodes(self, dark=dark)


def _range(values: np.ndarray) -> str:
    return f"{number(values.min())} to {number(values.max())}"


def rollout(
    policy: Any, env: str | Environment = "CartPole-v1", episodes: int = 20, seed: int = 0, max_steps: int | None = None
) -> Episodes:
    """Run a policy in an environment of gymnasium, closed over the environment's observations.

        u_n = policy(state(observation_n))    observation_{n+1}, reward_n = env.step(action(u_n))

    The pendulum's angle starts between -pi and pi and is followed through full turns, as on the plant.

    Args:
        policy: u = policy(z), a torch module on rows [trial, state], a JAX module on one state, or a function of numpy
            arrays on one state; or a `ClosedLoop`, whose policy is taken. One that `policy` made of logits takes its
            most probable action.
        env: "CartPole-v1", "Pendulum-v1", or an `Environment` of your own.
        episodes: how many; episode i starts from `env.reset(seed=seed + i)`.
        seed: of the first one.
        max_steps: of an episode; the environment's own (500 and 200) when None.

    Raises:
        ModuleNotFoundError: gymnasium is missing.
        ValueError: an unknown environment, a loop around another kind of plant, a policy that does not take the plant's
            state, gives no control of its width, or one that is not finite.
        TypeError: no policy, or a count that is no whole number.

    Source as `gym_plant`.

    >>> lean = rollout(lambda z: z[1:2] + 0.3 * z[3:4], episodes=2)
    >>> lean.states.dims, lean.states.state.values.tolist()
    (('episode', 'time', 'state'), ['position', 'angle', 'velocity', 'angular_velocity'])
    """
    known = environment_of(env)
    check_count("episodes", episodes, 1)
    check_count("max_steps", known.steps if max_steps is None else max_steps, 1)
    act = _act_of(policy, known)
    world = _made(known.name, max_steps)
    runs = [_episode(world, known, act, seed + i) for i in range(episodes)]
    world.close()
    returns, terminated, states, controls = zip(*runs, strict=True)
    longest = max(map(len, states))
    dims, time = ("episode", "time"), known.dt * np.arange(longest)
    return Episodes(
        env=known.name,
        returns=np.array(returns),
        lengths=np.array([len(run) for run in controls]),
        terminated=np.array(terminated),
        states=_labelled(states, longest, (*dims, "state"), {"time": time, "state": list(known.plant.state_names)}),
        controls=_labelled(controls, longest, (*dims, "control"), {"time": time}),
    )


def _made(env: str, max_steps: int | None) -> Any:
    if importlib.util.find_spec("gymnasium") is None:
        raise ModuleNotFoundError("rollout needs gymnasium: pip install 'kpflow-dyn[gym]'")
    import gymnasium

    return gymnasium.make(env, max_episode_steps=max_steps, disable_env_checker=True)


def _episode(world: Any, known: Environment, act: Act, seed: int) -> tuple[float, bool, np.ndarray, np.ndarray]:
    """Return, whether it failed, states and controls of one episode."""
    observation, _ = world.reset(seed=seed)
    states, controls, total = [known.state(observation.astype(float), None)], [], 0.0
    while True:
        wanted = act(states[-1])
        if not np.isfinite(wanted).all():
            raise ValueError(f"the policy gave {wanted} at the state {states[-1]}, step {len(controls)} of seed {seed}")
        controls.append(known.applied(wanted))
        observation, reward, terminated, truncated, _ = world.step(known.action(controls[-1]))
        states.append(known.state(observation.astype(float), states[-1]))
        total += float(reward)
        if terminated or truncated:
            return total, bool(terminated), np.array(states), np.array(controls)


def _labelled(rows: Any, longest: int, dims: tuple[str, ...], coordinates: dict[str, Any]) -> xr.DataArray:
    """Rows [time, ...] of several lengths as one array, with NaN behind the short ones."""
    import xarray as xr

    values = np.full((len(rows), longest, rows[0].shape[1]), np.nan)
    for target, row in zip(values, rows, strict=True):
        target[: len(row)] = row
    array = xr.DataArray(values, {"episode": np.arange(len(rows)), **coordinates}, dims)
    array.time.attrs["units"] = "s"
    return array


def _act_of(policy: Any, known: Environment) -> Act:
    """The policy on numpy states, tried once."""
    plant, env = getattr(policy, "plant", None), known.name
    if getattr(plant, "state_names", known.plant.state_names) != known.plant.state_names:
        raise ValueError(f"the loop's plant is {plant}, but {env} is a {type_name(known.plant)}: {known.plant}")
    act = _on_numpy(greedy(policy.policy if plant is not None else policy))
    size, width = known.plant.state_size, known.plant.control_size
    try:
        control = act(np.zeros(size))
    except Exception as error:  # of another kind in each framework
        raise ValueError(f"the policy does not take the {size} states of {env}, {known.plant}: {error}") from error
    if control.shape != (width,):
        raise ValueError(f"the policy gave {control.shape}, expected a control of the shape {(width,)} for {env}")
    return act


def _on_numpy(policy: Any) -> Act:
    if not callable(policy) or isinstance(policy, type):
        expected = "a torch or JAX module, a function u = policy(z), or a ClosedLoop"
        raise TypeError(f"policy is {policy!r}, expected {expected}")
    backend = backend_of(policy)
    return (lambda z: np.asarray(policy(z), float)) if backend is None else backend.models.on_numpy(policy)
