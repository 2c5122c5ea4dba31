"""Measurements: orthogonality, time, memory, energy. Alone knows clocks and devices; imports ``attach``."""

from stiefel.measure.orthogonality import OrthogonalityReport, WeightRow, report

__all__ = ["OrthogonalityReport", "WeightRow", "report"]
