"""Tasks: labelled trials of inputs and targets, as numpy arrays [trial, time, channel] in float64.

A task is a frozen dataclass whose fields are its options; `sample(trials, seed)` draws trials from it, the same ones
for the same seed. `make_task` finds a task by its name, as the command line does.
"""

from kpflow_dyn.tasks._array_file import ArrayFile
from kpflow_dyn.tasks._circle import DelayAnti, DelayPro, FourTasks, MemoryAnti, MemoryPro
from kpflow_dyn.tasks._data import Task, TaskData
from kpflow_dyn.tasks._decisions import ContextIntegration, EvidenceIntegration, Romo
from kpflow_dyn.tasks._gym import Neurogym
from kpflow_dyn.tasks._memory import FlipFlop, Lag
from kpflow_dyn.tasks._named import make_task
from kpflow_dyn.tasks._reaching import Reaching
from kpflow_dyn.tasks._signals import LowRankForecast, Sine

__all__ = ["ArrayFile", "ContextIntegration", "DelayAnti", "DelayPro", "EvidenceIntegration", "FlipFlop", "FourTasks"]
__all__ += ["Lag", "LowRankForecast", "MemoryAnti", "MemoryPro", "Neurogym", "Reaching", "Romo", "Sine", "Task"]
__all__ += ["TaskData", "make_task"]
