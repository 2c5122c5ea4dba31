"""Orthogonality, time, memory, energy, FLOPs, signals. Alone knows clocks and devices; imports ``attach``."""

from stiefel.measure.cost import step_cost
from stiefel.measure.flops import StepCount, count
from stiefel.measure.monitor import Monitor
from stiefel.measure.orthogonality import OrthogonalityReport, WeightRow, report
from stiefel.measure.signal import LayerSignal, preservation, redundancy

__all__ = [
    "LayerSignal",
    "Monitor",
    "OrthogonalityReport",
    "StepCount",
    "WeightRow",
    "count",
    "preservation",
    "redundancy",
    "report",
    "step_cost",
]
