"""Measuring: what a model's weights do, what a step costs, and both in a user's own training loop."""

from stiefel.measure.cost.flops import StepCount, count
from stiefel.measure.cost.step import step_cost
from stiefel.measure.model.angles import principal_angles
from stiefel.measure.model.dependence import Dependence, dependence
from stiefel.measure.model.effective_rate import effective_rates
from stiefel.measure.model.orthogonality import OrthogonalityReport, WeightRow, report
from stiefel.measure.model.signal import LayerSignal, preservation, redundancy
from stiefel.measure.model.variance import activation_variance
from stiefel.measure.monitor.monitor import Monitor

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
    "principal_angles",
    "redundancy",
    "report",
    "step_cost",
]
