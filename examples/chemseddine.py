"""Linear, learned and gradient-flow paths to forty Gaussians: the comparison of Chemseddine et al.

    python examples/chemseddine.py --short --output paths                     a minute
    python examples/chemseddine.py --output paths                             three seeds: three hours on one core
    python examples/chemseddine.py --only gmm40 --seed 1 --output paths

The gradient flow follows the target as noise turns it into the prior: its velocity has a fixed form and only an energy
is learned. The linear and the learned path run between the energies of prior and target. See mate_fleuret.py for the
columns of the table. Rows that are there already are not run again.
"""

from _samplers.experiments import CHEMSEDDINE
from _samplers.run import parser_of, run

run(CHEMSEDDINE, parser_of(__doc__, CHEMSEDDINE).parse_args(), "chemseddine")
