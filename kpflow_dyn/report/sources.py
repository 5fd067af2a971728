"""Where the datasets of pages come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kpflow_dyn.folder import replaced
from kpflow_dyn.report.pages import page_of

if TYPE_CHECKING:
    import xarray as xr

NAMES = ("results.nc", "track.nc")


def read_results(path: str | Path) -> xr.Dataset:
    """The dataset in a folder that `kpflow-dyn analyze` or `track` wrote, or in a NetCDF file.

    Raises:
        FileNotFoundError: there is none.
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
    """
    dataset = read_results(source) if isinstance(source, str | Path) else source
    text = page_of(dataset).to_html()
    with replaced(Path(path)) as unfinished:
        unfinished.write_text(text, "utf-8")
