"""Where the datasets of pages come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kpflow_dyn._folder import replaced
from kpflow_dyn.report._pages import page_of

if TYPE_CHECKING:
    import xarray as xr

NAMES = ("results.nc", "track.nc")


def read_results(path: str | Path) -> xr.Dataset:
    """The dataset in a folder or a NetCDF file.

    Args:
        path: what `kpflow-dyn analyze`, `track` or `sweep` wrote.

    Raises:
        FileNotFoundError: there is none.
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
    known = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
    if not known or not known[0].is_file():
        raise FileNotFoundError(f"{path} is no folder with {' or '.join(NAMES)}, and no NetCDF file")
    try:
        with xr.open_dataset(known[0], engine="h5netcdf") as dataset:
            return dataset.load()
    except OSError as error:
        raise ValueError(f"{known[0]} cannot be read as a NetCDF file ({error})") from error


def write_report(source: xr.Dataset | str | Path, path: str | Path) -> None:
    """Write the page of a dataset, or of what lies in a folder or NetCDF file; all of it or nothing.

    Args:
        source: as `page_of` or `read_results` take it.
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
    text = page_of(dataset).to_html()
    with replaced(Path(path)) as unfinished:
        unfinished.write_text(text, "utf-8")
