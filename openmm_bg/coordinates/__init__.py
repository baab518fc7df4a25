"""Positions to bonds, angles and torsions and back, with exact volume elements."""

from openmm_bg.coordinates.constraints import MassMetric, frozen_coordinates
from openmm_bg.coordinates.geometry import angle, dihedral, distance
from openmm_bg.coordinates.handedness import half_turns_from
from openmm_bg.coordinates.internal import Frame, InternalCoordinates
from openmm_bg.coordinates.zmatrix import ZMatrix

__all__ = [
    "Frame",
    "InternalCoordinates",
    "MassMetric",
    "ZMatrix",
    "angle",
    "dihedral",
    "distance",
    "frozen_coordinates",
    "half_turns_from",
]
