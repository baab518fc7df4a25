"""Learn interpolations between Boltzmann densities: the targets of Mate & Fleuret, with what has been learned since.

    python examples/mate_fleuret.py --short --output interpolations           a minute
    python examples/mate_fleuret.py --output interpolations                   all targets, three seeds: some hours
    python examples/mate_fleuret.py --only lattice --seed 1 --output interpolations

A velocity field is trained to carry samples along a path of energies, from energies and forces alone. The straight line
between the energies of base and target has to move mass between modes that are far apart already; a learned bend of it
need not. The table has the effective share of samples of the flow itself (its own draws, then exact draws), of annealed
Langevin walkers on top of it, log Z and the weights of the modes against exact ones, and distances beside their floors.
The many wells are learned from annealed walkers as well, by spline couplings and the variance of log q + u.
Rows that are there already are not run again.
"""

from _samplers.clusters import CLUSTERS
from _samplers.experiments import MATE_FLEURET
from _samplers.molecule import MOLECULE
from _samplers.run import parser_of, run
from _samplers.walkers import WALKERS

GROUPS = MATE_FLEURET | CLUSTERS | MOLECULE
GROUPS |= {name: [*GROUPS.get(name, []), *experiments] for name, experiments in WALKERS.items()}

run(GROUPS, parser_of(__doc__, GROUPS).parse_args(), "mate_fleuret")
