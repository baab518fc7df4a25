"""Reference data for alanine dipeptide: two independent replica exchanges, kept so that they are made once."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from openmm import app

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals
from openmm_bg.sampling.archive import load_arrays, save_arrays


@dataclass(frozen=True)
class Recipe:
    """How the data are made; a cache made by another recipe is not used.

    Low friction, hydrogens of 3 Da on constrained bonds and steps of 4 fs; the hot replicas cross the barriers. Plain
    dynamics of 10 ns misses the left-handed basin altogether.

    Attributes
    ----------
    frames, equilibration : int
        Iterations of each run kept, and thrown away before them.
    temperatures : tuple of float
        K. Only the frames of the lowest are kept.
    steps : int
        Steps of 4 fs between two frames, which is also between two exchanges.
    friction : float
        1/ps.
    seeds : tuple of int
        One run each: the first trains, the second tests.
    """

    frames: int
    equilibration: int
    temperatures: tuple[float, ...] = (300.0, 400.0, 535.0)
    steps: int = 125
    friction: float = 1.0
    seeds: tuple[int, int] = (101, 102)


def load_molecule() -> bg.systems.Molecule:
    return bg.systems.load("alanine_dipeptide", temperature=300, constraints=app.HBonds, hydrogen_mass=3.0)


def reference(folder: Path, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi and psi of both runs and a thousand conformations of the second one.

    Parameters
    ----------
    folder : Path
        Where ``alanine_dipeptide.npz`` is kept or made.
    recipe : Recipe

    Returns
    -------
    train, test : ndarray, (frames, 2)
        Radians, in the order they were made.
    positions : ndarray, (conformations, atoms, 3)
        nm, evenly spaced over the second run.
    """
    path = folder / "alanine_dipeptide.npz"
    wanted = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(recipe).items()}
    if path.exists():
        header, arrays = load_arrays(path, ("train", "test", "positions"))
        if header == wanted:
            return arrays["train"], arrays["test"], arrays["positions"]
        print(f"{path} was made by another recipe; it is made anew.")
    molecule = load_molecule()
    angles = []
    for seed in recipe.seeds:
        run = bg.replica_exchange(
            molecule.system,
            molecule.positions,
            temperatures=recipe.temperatures,
            n_iterations=recipe.frames,
            equilibration_iterations=recipe.equilibration,
            steps_per_iteration=recipe.steps,
            timestep=0.004,
            friction=recipe.friction,
            seed=seed,
            workers=1,
        )
        angles.append(backbone_dihedrals(run.frames[0], molecule.topology).pair())
        every = -(-recipe.frames // 1000)
        positions = run.frames[0][::every]
        print(
            f"replica exchange, seed {seed}: {len(angles[-1])} frames, exchanges accepted "
            f"{', '.join(f'{100 * share:.0f} %' for share in run.acceptance)}, {run.round_trips.sum()} round trips"
        )
    save_arrays(path, wanted, train=angles[0], test=angles[1], positions=positions)
    return angles[0], angles[1], positions
