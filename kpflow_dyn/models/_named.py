"""Recurrent models with their readouts, in either framework, and laws of weights, by their names."""

import math
from dataclasses import fields
from typing import Any, NamedTuple

from kpflow_dyn._arrays.memory import require_machine
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn.models._closed_loop import models_of
from kpflow_dyn.models._equations import check_leak, check_rank
from kpflow_dyn.models._initializing import initialize
from kpflow_dyn.models._laws import Dale, Gaussian, Law, Orthogonal, Planted, SpectralRadius, TorchDefault
from kpflow_dyn.tasks._by_path import made_by
from kpflow_dyn.tasks._data import check_count, check_number, check_options, nearest

_LEAKY = ("alpha", "learn_alpha", "nonlinearity")
OPTIONS = {
    "rnn": ("bias", "nonlinearity"),
    "gru": ("bias",),
    "lstm": ("bias",),
    "ctrnn": (*_LEAKY, "gain"),
    "lowrank": ("rank", *_LEAKY),
}
"""The options of each model."""

_LAWS = (Gaussian, Orthogonal, SpectralRadius, TorchDefault, Dale, Planted)
LAWS: dict[str, type[Law]] = {law.__name__.lower(): law for law in _LAWS}


class Model(NamedTuple):
    """A recurrent model and what reads it.

    Attributes:
        cell: called as cell(x_t, z) -> z.
        readout: the linear layer on its units.

    Example as `make_model`.
    """

    cell: Any
    readout: Any


def make_model(
    name: str,
    inputs: int,
    units: int,
    outputs: int = 1,
    *,
    framework: str = "torch",
    init: Any = None,
    seed: int = 0,
    dtype: str = "float32",
    **options: Any,
) -> Model:
    """A recurrent cell and its readout by name, as `kp.train.fit(cell, task, readout)` takes them.

        rnn, gru, lstm    the frameworks' own cells (JAX: `RNNCell` of `kpflow_dyn.models.jax`, and equinox)
        ctrnn, lowrank    `CTRNNCell`, `LowRankRNNCell`

    Args:
        name: one of these.
        inputs, units, outputs: widths of x_t, z and of what is read.
        framework: "torch" or "jax".
        init: the law of the recurrent weights, a `Law` or what has its `matrix(n, seed)`, drawn with the same seed by
            `initialize`; the cell's own when None.
        seed: for all weights. Both frameworks have the same recurrent weights where there is an `init`; for all of them
            to be the same, convert with `to_jax` or `to_torch`.
        dtype: "float32" or "float64".
        options: of the cell: bias, nonlinearity (rnn); bias (gru, lstm); alpha, learn_alpha, nonlinearity and gain
            (ctrnn) or rank (lowrank).

    Raises:
        ValueError: an unknown name (with the nearest), framework, dtype or option, a size that is too small.
        TypeError: a size that is no whole number, or float64 while JAX rounds to float32.

    >>> cell, readout = make_model("gru", inputs=3, units=16, outputs=2)
    >>> cell, readout
    (GRUCell(3, 16), Linear(in_features=16, out_features=2, bias=True))
    """
    check_model(name, inputs, units, outputs, framework=framework, seed=seed, dtype=dtype, **options)
    model = Model(*models_of(framework).make(name, (inputs, units, outputs), seed, dtype, options))
    return model if init is None else Model(initialize(model.cell, init, seed), model.readout)


def check_model(
    name: str,
    inputs: int = 1,
    units: int = 1,
    outputs: int = 1,
    *,
    framework: str = "torch",
    seed: int = 0,
    dtype: str = "float32",
    **options: Any,
) -> None:
    """Raise where `make_model` cannot make such a model, before anything is allocated."""
    if not isinstance(name, str) or name not in OPTIONS:
        raise ValueError(f"unknown model {name!r}.{nearest(str(name), list(OPTIONS))} Known: {', '.join(OPTIONS)}.")
    check_options(name, options, OPTIONS[name])
    for size, value in {"inputs": inputs, "units": units, "outputs": outputs}.items():
        check_count(size, value, 1)
    check_count("seed", seed, 0)
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    if framework not in BACKENDS:
        raise ValueError(f"framework must be torch or jax, got {framework!r}")
    for option, value in options.items():
        _check_option(option, value, units)
    check_leak(options.get("alpha", 0.1), options.get("learn_alpha", False))
    columns = options.get("rank", 1) if name == "lowrank" else units
    advice = "take fewer units"
    require_machine(units * (inputs + columns) * (4 if dtype == "float32" else 8), f"weights of {units} units", advice)


def _check_option(option: str, value: Any, units: int) -> None:
    if option in ("bias", "learn_alpha") and not isinstance(value, bool):
        raise TypeError(f"{option} must be true or false, got {value!r}")
    if option in ("alpha", "gain"):
        check_number(option, value)
        if not math.isfinite(value):
            raise ValueError(f"{option} must be finite, got {value}")
    if option == "rank":
        check_count("rank", value, 1)
        check_rank(value, units)
    if option == "nonlinearity" and value not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be tanh or relu, got {value!r}")


def make_init(name: str, **options: Any) -> Any:
    """The law of a name, for the command line and for files.

    Args:
        name: gaussian, orthogonal, spectralradius, torchdefault, dale or planted, in any case, with dashes, underscores
            or without; or "module:Name" or "file.py:Name" for a law of your own, or its class.
        options: those of its class.

    Raises:
        ValueError: an unknown name or option (with the nearest known ones), or an option's value that does not fit.
        TypeError: an option of another type.

    >>> make_init("spectral-radius", rho=0.9)
    SpectralRadius(rho=0.9)
    """
    if not isinstance(name, str):
        raise TypeError(f"the law is {name!r}, expected its name")
    if ":" in name:
        return made_by(name, "the law", "matrix", options)
    law = LAWS.get(name.lower().replace("-", "").replace("_", ""))
    if law is None:
        raise ValueError(f"unknown law {name!r}.{nearest(name, list(LAWS))} Known: {', '.join(LAWS)}, module:Name.")
    check_options(name, options, [option.name for option in fields(law)])
    return law(**options)
