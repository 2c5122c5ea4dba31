"""Orthogonality, time, memory, energy, FLOPs, signals. Alone knows clocks and devices; imports ``attach``."""

from stiefel.measure.cost import step_cost
from stiefel.measure.dependence import Dependence, dependence
from stiefel.measure.flops import StepCount, count
from stiefel.measure.monitor import Monitor
from stiefel.measure.orthogonality import OrthogonalityReport, WeightRow, report
from stiefel.measure.rate import effective_rates
from stiefel.measure.signal import LayerSignal, preservation, redundancy
from stiefel.measure.variance import activation_variance

__all__ = [
    "Dependence",
    "LayerSignal",
    "Monitor",
    "OrthogonalityReport",
    "StepCount",
    "WeightRow",
    "activation_variance",
    "count",
    "dependence",
    "effective_rates",
    "preservation",
    "redundancy",
    "report",
    "step_cost",
]
