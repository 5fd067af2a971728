"""The command `kpflow-dyn doctor`: what is installed, how it computes, and whether it computes right."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kpflow_dyn
from kpflow_dyn.cli._options import Debug
from kpflow_dyn.cli._terminal import EXTRAS, one_line, plain_errors

if TYPE_CHECKING:
    from kpflow_dyn._backend import Backend

FRAMEWORKS = ("torch", "jax")
REQUIRED = ("numpy", "scipy", "xarray", "h5netcdf", "rich", "typer")
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
IDENTITIES = ("P K P* = J J*", "<y, P x> = <P* y, x>")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Is my installation right? Versions, devices, precision; and two identities computed on each device.

    The exit status is 1 if one of them does not hold, or if there is neither torch nor JAX.
    """
    with plain_errors(debug):
        found = _examined()
        typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_in_words(found)))
    if not found["ok"]:
        raise typer.Exit(1)


def _examined() -> dict[str, Any]:
    from kpflow_dyn._backend import BACKENDS

    frameworks, checks = {}, []
    for name in FRAMEWORKS:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            frameworks[name] = _computes(BACKENDS[name])
            checks += _checked(BACKENDS[name], frameworks[name]["devices"])
        except Exception as error:  # whatever is wrong with it, the rest is examined
            checks.append(_failed(name, error))
    return {
        "ok": bool(checks) and all(check["ok"] for check in checks),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "kpflow_dyn": kpflow_dyn.__version__,
        "packages": {
            package: _version(package) for package in (*REQUIRED, *(p for all in EXTRAS.values() for p in all))
        },
        "missing": {
            extra: lacking for extra, all in EXTRAS.items() if (lacking := [p for p in all if not _version(p)])
        },
        "frameworks": frameworks,
        "machine": _machine(),
        "checks": checks,
    }


def _computes(backend: Backend) -> dict[str, Any]:
    return {"devices": list(backend.runtime.devices()), "settings": dict(backend.runtime.settings())}


def _machine() -> dict[str, Any]:
    import numpy as np

    from kpflow_dyn._arrays.memory import available

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index]
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free memory": f"{available() / 1e9:.3g} GB",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "BLAS of numpy": f"{blas['name']} {blas['version']}",
    }


def _checked(backend: Backend, devices: list[str]) -> list[dict[str, Any]]:
    """The identities on each device, in both precisions."""
    backend.runtime.allow_double()
    return [check for device in devices for dtype in TOLERANCES for check in _identities(backend, device, dtype)]


def _identities(backend: Backend, device: str, dtype: str) -> list[dict[str, Any]]:
    where = {"framework": backend.name, "device": device, "dtype": dtype}
    try:
        errors = _errors(*backend.runtime.example(device, dtype))
    except Exception as error:
        return [where | _failed(backend.name, error)]
    found = zip(IDENTITIES, errors, strict=True)
    return [where | {"identity": name, "error": e, "ok": bool(e < TOLERANCES[dtype])} for name, e in found]


def _errors(cell: Any, x: Any, start: Any) -> tuple[float, float]:
    """The relative errors of the identities."""
    import numpy as np

    from kpflow_dyn._arrays import to_numpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = kpflow_dyn.linearize(kpflow_dyn.solve(kpflow_dyn.DiscreteProblem(cell, x, start)))
        J, ntk = (to_numpy(op.dense()).astype(float) for op in (flow.J, flow.P @ flow.K @ flow.P.T))
        defect = float(kpflow_dyn.check_adjoint(flow.P))
    return float(np.linalg.norm(ntk - J @ J.T) / np.linalg.norm(J @ J.T)), defect


def _failed(framework: str, error: Exception) -> dict[str, Any]:
    said = one_line(f"{type(error).__name__}: {error}")
    return {"framework": framework, "identity": "computes at all", "error": None, "ok": False, "why": said}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _in_words(found: dict[str, Any]) -> list[str]:
    lines = [f"kpflow_dyn {found['kpflow_dyn']}, python {found['python']}, {found['platform']}", "", "Packages"]
    lines += [f"  {name:<12} {number}" for name, number in found["packages"].items() if number]
    lines += [
        f"  missing: {', '.join(lacking)} (pip install 'kpflow-dyn[{extra}]')"
        for extra, lacking in found["missing"].items()
    ]
    lines += ["", "Machine", *(f"  {name}: {value}" for name, value in found["machine"].items())]
    for name in FRAMEWORKS:
        lines += ["", name, *_of_framework(found["frameworks"].get(name))]
    lines += ["", "Checks (relative errors)", *map(_in_line, found["checks"])]
    if not found["checks"]:
        lines.append("  none, as there is neither torch nor JAX; install one: pip install 'kpflow-dyn[torch]'")
    return [
        *lines,
        "",
        "All is right." if found["ok"] else "Something is wrong; see the lines with FAIL, or what is missing.",
    ]


def _of_framework(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["  not installed, or it fails (see below); one framework is enough"]
    settings = [f"  {name}: {value}" for name, value in found["settings"].items()]
    return [f"  devices: {', '.join(found['devices'])}", *settings]


def _in_line(check: dict[str, Any]) -> str:
    where = f"{check['framework']:<6} {check.get('device', ''):<12} {check.get('dtype', ''):<8}"
    said = check.get("why") or f"{check['error']:.1e}"
    return f"  {'OK  ' if check['ok'] else 'FAIL'} {where} {check['identity']:<21} {said}"
