"""The chart of the self-referential bias, from the variables of `SelfReference.variables`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.report._charts import Chart, Choice, figure, line, views

if TYPE_CHECKING:
    import xarray as xr

CONTROLS = 2  # the bases from this number on


def self_reference_charts(dataset: xr.Dataset) -> list[Chart]:
    """The shares of each change of the states in leading directions; no chart where the dataset has none."""
    if "self_reference_share" not in dataset:
        return []
    found, changes = dataset.self_reference_share, dataset.self_reference_change.values
    where = found.attrs["axes"]
    axes = {
        "xaxis": {"title": {"text": f"Number of directions of {where} (of {found.attrs['rows']})"}},
        "yaxis": {"title": {"text": "Share of the change"}, "range": [0, 1.05]},
    }

    def view(change: int) -> Any:
        lines = [_line(found.isel(self_reference_change=change), basis) for basis in range(found.shape[1])]
        return figure([one for one in lines if one is not None], **axes)

    return [
        Chart(
            "self_reference",
            "Does learning repeat what the network does?",
            "The share of an actual change of the states in the leading directions of the network's own activity "
            "(core, from a forward pass), in those of the NTK, and, dashed, in directions that know nothing of the "
            "network: constant in time, cosines, random. The bias is there where the core lies above the controls.",
            views(view, range(len(changes))),
            (Choice("Change", tuple(map(str, changes))),),
            finding=" ".join(f"{words}." for words in found.attrs["verdict"].splitlines()),
        )
    ]


def _line(share: xr.DataArray, basis: int) -> Any:
    """The curve of one basis; None where it is not known."""
    values, name = share.values[basis], str(share.self_reference_basis.values[basis])
    if np.isnan(values).all():
        return None
    style: dict[str, Any] = {} if basis < CONTROLS else {"line": {"dash": "dash", "width": 1.2}}
    hover = "%{x} directions: %{y:.3f}"
    return line(share.self_reference_directions.values, values, name, basis, hovertemplate=hover, **style)
