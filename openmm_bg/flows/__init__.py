"""Invertible maps with log-determinants; this room knows tensors and no molecule."""

from openmm_bg.flows.autoregressive import AutoregressiveSpline
from openmm_bg.flows.base import Base, Composition, Flow, Transform, wrap
from openmm_bg.flows.coupling import AffineCoupling, SplineCoupling
from openmm_bg.flows.general import RealNVP, SplineFlow
from openmm_bg.flows.molecular import Chart, MolecularFlow
from openmm_bg.flows.spline import circular_spline, interval_spline, rational_quadratic
from openmm_bg.flows.torsions import AffineTorsions, SplineTorsions
from openmm_bg.flows.whitening import ConditionalAffine, ConditionalWhitening

__all__ = [
    "AffineCoupling",
    "AffineTorsions",
    "AutoregressiveSpline",
    "Base",
    "Chart",
    "Composition",
    "ConditionalAffine",
    "ConditionalWhitening",
    "Flow",
    "MolecularFlow",
    "RealNVP",
    "SplineCoupling",
    "SplineFlow",
    "SplineTorsions",
    "Transform",
    "circular_spline",
    "interval_spline",
    "rational_quadratic",
    "wrap",
]
