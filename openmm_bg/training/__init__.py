"""How a generator learns: one trainer, objectives, the default recipe, and the walkers it moves itself."""

from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.training.adaptive import AdaptiveTraining
from openmm_bg.training.adaptive_state import AdaptiveResult, AdaptiveSettings
from openmm_bg.training.annealed import TemperatureAnnealing
from openmm_bg.training.budget import Budget
from openmm_bg.training.convergence import Basin, Convergence, Figures
from openmm_bg.training.fit import fit, relabel_rotors, to_flow_coordinates
from openmm_bg.training.forward import ForwardPath
from openmm_bg.training.gradient_flow import GradientFlowResidual, NoisedEnergy
from openmm_bg.training.mass_transport import ConstrainedMassTransport, Transport, transport
from openmm_bg.training.objectives import LogVariance, MaximumLikelihood, Objective
from openmm_bg.training.paths import ContinuityResidual
from openmm_bg.training.reverse import ReversePath
from openmm_bg.training.settings import Settings, Stage, TrainingResult
from openmm_bg.training.trainer import Trainer

# the method lives up here because a generator must not know how it is trained
BoltzmannGenerator.fit = fit

__all__ = [
    "AdaptiveResult",
    "AdaptiveSettings",
    "AdaptiveTraining",
    "Basin",
    "Budget",
    "ConstrainedMassTransport",
    "ContinuityResidual",
    "Convergence",
    "Figures",
    "ForwardPath",
    "GradientFlowResidual",
    "LogVariance",
    "NoisedEnergy",
    "Objective",
    "MaximumLikelihood",
    "ReversePath",
    "Settings",
    "Stage",
    "TemperatureAnnealing",
    "Trainer",
    "TrainingResult",
    "Transport",
    "fit",
    "relabel_rotors",
    "to_flow_coordinates",
    "transport",
]
