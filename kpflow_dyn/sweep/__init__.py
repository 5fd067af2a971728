"""Sweeps: thousands of small independent analyses that survive crashes, resume, and end as one labelled dataset.

    Sweep(run, over, out) --run(executor)--> one file for each point --collect()--> xarray.Dataset

What runs the points is an engine behind `concurrent.futures.Executor`: this process, loky, dask.distributed or
submitit.
"""

from kpflow_dyn.sweep._design import random, sobol, zipped
from kpflow_dyn.sweep._executors import Dask, Local, Processes, Slurm, executor
from kpflow_dyn.sweep._sweep import Failure, Status, Sweep

__all__ = ["Dask", "Failure", "Local", "Processes", "Slurm", "Status", "Sweep", "executor", "random", "sobol", "zipped"]
