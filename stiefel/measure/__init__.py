"""Measuring: what a model's weights do, what a step costs, and both in a user's own training loop."""

from stiefel.measure.cost.flops import StepCount, count
from stiefel.measure.cost.step import step_cost
from stiefel.measure.model.angles import principal_angles
from stiefel.measure.model.conditioning import Conditioning, conditioning
from stiefel.measure.model.dependence import Dependence, dependence
from stiefel.measure.model.effective_rate import effective_rates
from stiefel.measure.model.gauss_newton import gauss_newton_block
from stiefel.measure.model.operators import OperatorSpectrum, operator_spectrum
from stiefel.measure.model.orthogonality import OrthogonalityReport, WeightRow, report
from stiefel.measure.model.signal import LayerSignal, preservation, redundancy
from stiefel.measure.model.spectrum import Spectrum
from stiefel.measure.model.variance import activation_variance
from stiefel.measure.monitor.monitor import Monitor

__all__ = [
    "Conditioning",
    "Dependence",
    "LayerSignal",
    "Monitor",
    "OperatorSpectrum",
    "OrthogonalityReport",
    "Spectrum",
    "StepCount",
    "WeightRow",
    "activation_variance",
    "conditioning",
    "count",
    "dependence",
    "effective_rates",
    "gauss_newton_block",
    "operator_spectrum",
    "preservation",
    "principal_angles",
    "redundancy",
    "report",
    "step_cost",
]
