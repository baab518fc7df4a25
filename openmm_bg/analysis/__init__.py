"""What a person looks at: distances with floors, free energies, figures, report. Takes arrays, or reads them."""

from openmm_bg.analysis.clusters import cluster_distances, cluster_w2, pair_distances, single_pass_w2
from openmm_bg.analysis.compare import compare
from openmm_bg.analysis.comparison import Comparison
from openmm_bg.analysis.diagnosis import Dependence, Diagnosis, Region, diagnose
from openmm_bg.analysis.dihedrals import Backbone, backbone_dihedrals
from openmm_bg.analysis.distances import Distance, energy_w2, measure, torus_w2, total_variation
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.free_energy import (
    BASINS,
    Basin,
    Population,
    Profile,
    free_energy_difference,
    free_energy_profile,
    left_handed,
    populations,
)
from openmm_bg.analysis.molecule_view import MoleculeView
from openmm_bg.analysis.multistate import Multistate, multistate
from openmm_bg.analysis.pairs import EffectiveSize, FreeEnergyPair, PopulationPair
from openmm_bg.analysis.plots import energy_histograms, log_weight_histogram, phi_profile, ramachandran_maps
from openmm_bg.analysis.plots_runs import Chain, acceptance_trace, indicator_autocorrelation, training_curves
from openmm_bg.analysis.probes import Contrast
from openmm_bg.analysis.rates import SamplingRate, autocorrelation_time, sampling_rate
from openmm_bg.analysis.report import Card, Figure, Status, Summary, Table, report
from openmm_bg.analysis.representatives import Conformation, representatives
from openmm_bg.analysis.statistics import (
    autocorrelation,
    block_bootstrap,
    block_count,
    block_error,
    block_means,
    effective_sample_size,
    standard_error,
    statistical_inefficiency,
)
from openmm_bg.analysis.structure import Structure
from openmm_bg.analysis.style import to_svg
from openmm_bg.analysis.tica import jensen_shannon, tica_projection
from openmm_bg.analysis.trajectories import read_topology, read_trajectory, read_weights
from openmm_bg.analysis.weights import pareto_shape, pareto_smooth

__all__ = [
    "BASINS",
    "Backbone",
    "Basin",
    "Card",
    "Chain",
    "Comparison",
    "Conformation",
    "Contrast",
    "Dependence",
    "Diagnosis",
    "Distance",
    "EffectiveSize",
    "Figure",
    "FreeEnergyPair",
    "MoleculeView",
    "Multistate",
    "Population",
    "PopulationPair",
    "Profile",
    "Region",
    "SamplingRate",
    "Status",
    "Structure",
    "Summary",
    "Table",
    "acceptance_trace",
    "autocorrelation",
    "autocorrelation_time",
    "backbone_dihedrals",
    "block_bootstrap",
    "block_count",
    "block_error",
    "block_means",
    "cluster_distances",
    "cluster_w2",
    "compare",
    "diagnose",
    "effective_sample_size",
    "energy_histograms",
    "energy_w2",
    "format_value",
    "free_energy_difference",
    "free_energy_profile",
    "indicator_autocorrelation",
    "jensen_shannon",
    "left_handed",
    "log_weight_histogram",
    "measure",
    "multistate",
    "pair_distances",
    "pareto_shape",
    "pareto_smooth",
    "phi_profile",
    "populations",
    "ramachandran_maps",
    "read_topology",
    "read_trajectory",
    "read_weights",
    "report",
    "representatives",
    "sampling_rate",
    "single_pass_w2",
    "standard_error",
    "statistical_inefficiency",
    "tica_projection",
    "to_svg",
    "torus_w2",
    "total_variation",
    "training_curves",
]
