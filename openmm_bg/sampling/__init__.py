"""The acceptance rule, weighted samples, and the one implementation of molecular dynamics and replica exchange."""

from openmm_bg.sampling.annealing import annealed_transport
from openmm_bg.sampling.batched import BatchedLangevin
from openmm_bg.sampling.bursts import bursts
from openmm_bg.sampling.cooling import CooledWalkers, cool
from openmm_bg.sampling.dynamics import Trajectory, fastest_platform, simulate
from openmm_bg.sampling.exchange_map import GeneratorMap
from openmm_bg.sampling.interpolation import GradientFlowPath, Interpolation, continuity_residual
from openmm_bg.sampling.latent import LatentEnergy
from openmm_bg.sampling.latent_moves import LatentProposals
from openmm_bg.sampling.learned_exchange import ExchangeStatistics, log_exchange_acceptance
from openmm_bg.sampling.metropolis import (
    Attempt,
    MoveStatistics,
    independence_acceptance,
    independence_chain,
    log_acceptance,
)
from openmm_bg.sampling.noised import NoisedMesh, noised_energy
from openmm_bg.sampling.proposals import IndependenceProposals
from openmm_bg.sampling.replica_exchange import (
    ReplicaExchange,
    ReplicaExchangeResult,
    geometric_temperatures,
    replica_exchange,
)
from openmm_bg.sampling.reweighting import (
    EffectiveSampleSize,
    Estimate,
    effective_sample_size,
    forward_effective_sample_size,
    largest_log_ratio,
    log_normalizer,
    resample,
    reweighted_mean,
)
from openmm_bg.sampling.switching import switch
from openmm_bg.sampling.two_stage import scan
from openmm_bg.sampling.walkers import Walkers
from openmm_bg.sampling.worker_pool import WorkerPool, dask_executor

__all__ = [
    "Attempt",
    "BatchedLangevin",
    "CooledWalkers",
    "EffectiveSampleSize",
    "Estimate",
    "ExchangeStatistics",
    "GeneratorMap",
    "GradientFlowPath",
    "IndependenceProposals",
    "Interpolation",
    "LatentEnergy",
    "LatentProposals",
    "MoveStatistics",
    "NoisedMesh",
    "ReplicaExchange",
    "ReplicaExchangeResult",
    "Trajectory",
    "Walkers",
    "WorkerPool",
    "annealed_transport",
    "bursts",
    "continuity_residual",
    "cool",
    "dask_executor",
    "effective_sample_size",
    "fastest_platform",
    "forward_effective_sample_size",
    "geometric_temperatures",
    "independence_acceptance",
    "independence_chain",
    "largest_log_ratio",
    "log_acceptance",
    "log_exchange_acceptance",
    "log_normalizer",
    "noised_energy",
    "replica_exchange",
    "resample",
    "reweighted_mean",
    "scan",
    "simulate",
    "switch",
]
