"""Where the datasets of pages come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpflow_dyn._folder import replaced
from kpflow_dyn.report._pages import page_of
from kpflow_dyn.sweep._collect import dataset_in

if TYPE_CHECKING:
    import xarray as xr

NAMES = ("results.nc", "track.nc", "comparison.nc", "track/track.nc")
CHECKPOINTS = {".pt", ".pth", ".ckpt", ".safetensors", ".npz", ".zip", ".keras", ".h5", ".eqx", ".msgpack"}


def read_results(path: str | Path) -> xr.Dataset:
    """The dataset in a folder or a NetCDF file.

    Args:
        path: what `kpflow-dyn analyze`, `track`, `compare` or `sweep` wrote, or the folder of a `kp.Sweep`, whose
            points may be some of all so far.

    Raises:
        FileNotFoundError: there is none; it says what to do with what is there.
        ValueError: a file that cannot be read.

    >>> import tempfile
    >>> import xarray as xr
    >>> folder = tempfile.mkdtemp()
    >>> xr.Dataset({"loss": 2.0}).to_netcdf(f"{folder}/results.nc", engine="h5netcdf")
    >>> float(read_results(folder).loss)
    2.0
    """
    import xarray as xr

    path = Path(path)
    if any((path / "points").glob("*.npz")):
        return dataset_in(path)
    known = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
    if not known or not known[0].is_file() or known[0].suffix in {*CHECKPOINTS, ".toml"}:
        raise FileNotFoundError(f"{path} {_instead(path)}")
    try:
        with xr.open_dataset(known[0], engine="h5netcdf") as dataset:
            return dataset.load()
    except OSError as error:
        raise ValueError(f"{known[0]} cannot be read as a NetCDF file ({error})") from error


def _instead(path: Path) -> str:
    """Why there are no results, and what to do."""
    if not path.exists():
        return "does not exist; give the folder of an analysis, track, comparison or sweep, or a NetCDF file"
    if path.suffix in CHECKPOINTS and path.is_file():
        return f"is a checkpoint, not a result; first: kpflow-dyn analyze {path} --task TASK"
    if path.suffix == ".toml":
        return f"says what to sweep, and is no result; first: kpflow-dyn sweep {path}, then report its folder"
    if any(path.glob("step_*.safetensors")):
        return f"holds the checkpoints of a training, not results; first: kpflow-dyn track {path} --task TASK"
    if any(path.glob("numbers_*.nc")):
        return "holds a track that has not come to its end; run the same kpflow-dyn track again, which goes on"
    if (path / "sweep.json").is_file():
        return "holds a sweep of which no point is done yet; run it again, which goes on"
    if found := [file.name for file in sorted(path.iterdir()) if file.suffix in CHECKPOINTS]:
        return f"holds no results, but {found[0]}; first: kpflow-dyn analyze {path / found[0]} --task TASK"
    return f"holds no results; expected {', '.join(NAMES[:-1])} or the points of a sweep in it"


def write_report(source: Any, path: str | Path) -> None:
    """Write the page of a dataset, or of what lies in a folder or NetCDF file; all of it or nothing.

    Args:
        source: as `page_of` or `read_results` take it, or a result whose `to_xarray()` `page_of` takes, such as that
            of `kp.compare`.
        path: the HTML file.

    Raises:
        FileNotFoundError, ValueError: as these two.

    >>> import tempfile
    >>> import torch
    >>> import kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3))))
    >>> path = Path(tempfile.mkdtemp(), "page.html")
    >>> write_report(kp.analyze(flow, k=2), path)
    >>> "Temporal modes" in path.read_text("utf-8")
    True
    """
    dataset = read_results(source) if isinstance(source, str | Path) else source
    if hasattr(dataset, "to_xarray"):
        dataset = dataset.to_xarray()
    text = page_of(dataset).to_html()
    with replaced(Path(path)) as unfinished:
        unfinished.write_text(text, "utf-8")
