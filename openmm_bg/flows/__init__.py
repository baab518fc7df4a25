"""Invertible maps with log-determinants; this room knows tensors and no molecule."""

from openmm_bg.flows.autoregressive import AutoregressiveSpline
from openmm_bg.flows.base import Base, Composition, Flow, Transform, wrap
from openmm_bg.flows.box import BoxBase
from openmm_bg.flows.chart import Chart
from openmm_bg.flows.continuous import ContinuousFlow, ContinuousTransform
from openmm_bg.flows.coupling import AffineCoupling, SplineCoupling
from openmm_bg.flows.equivariant import CentredBase, PairEnergy, PairVelocity
from openmm_bg.flows.general import RealNVP, SplineFlow
from openmm_bg.flows.gradient_flow import GradientFlowVelocity
from openmm_bg.flows.mixing import Mixing
from openmm_bg.flows.molecular import MolecularFlow
from openmm_bg.flows.moser import MoserFlow, MoserTransform
from openmm_bg.flows.spline import circular_spline, interval_spline, rational_quadratic
from openmm_bg.flows.torsions import AffineTorsions, SplineTorsions
from openmm_bg.flows.velocity import PerceptronEnergy, PerceptronVelocity, VelocityField
from openmm_bg.flows.whitening import ConditionalAffine, ConditionalWhitening

__all__ = [
    "AffineCoupling",
    "AffineTorsions",
    "AutoregressiveSpline",
    "Base",
    "BoxBase",
    "CentredBase",
    "Chart",
    "Composition",
    "ConditionalAffine",
    "ConditionalWhitening",
    "ContinuousFlow",
    "ContinuousTransform",
    "Flow",
    "GradientFlowVelocity",
    "Mixing",
    "MolecularFlow",
    "MoserFlow",
    "MoserTransform",
    "PairEnergy",
    "PairVelocity",
    "PerceptronEnergy",
    "PerceptronVelocity",
    "RealNVP",
    "SplineCoupling",
    "SplineFlow",
    "SplineTorsions",
    "Transform",
    "VelocityField",
    "circular_spline",
    "interval_spline",
    "rational_quadratic",
    "wrap",
]
