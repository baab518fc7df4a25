"""Independent ladders of replica exchange in one batch, on any device, that keep the handedness of every centre."""

from __future__ import annotations

import copy

import numpy as np
import openmm
import torch

import openmm_bg as bg
from openmm_bg.sampling import BatchedLangevin
from openmm_bg.units import GAS_CONSTANT

# Masses do not enter the distribution of positions: heavy hydrogens allow twice the time step. Much friction spreads
# soon the heat that an exchange brought in. Each about halves the cost of an effective sample.
TIMESTEP, FRICTION, HYDROGEN_MASS = 0.002, 5.0, 4.0  # ps, 1/ps, Da


def with_heavy_hydrogens(system: openmm.System) -> openmm.System:
    """The same energy; what is lighter than HYDROGEN_MASS gets that mass, and nothing loses any."""
    system = copy.deepcopy(system)
    for i in range(system.getNumParticles()):
        system.setParticleMass(i, max(HYDROGEN_MASS, system.getParticleMass(i)._value))
    return system


class Ladders:
    """Independent replica exchanges with the same temperatures, all walkers in one batch on one device."""

    def __init__(self, molecule: bg.systems.Molecule, temperatures: np.ndarray, ladders: int, seed: int, device: str):
        self.shape = (ladders, len(temperatures))
        self.walkers = BatchedLangevin(
            bg.ForceFieldEnergy(with_heavy_hydrogens(molecule.system), molecule.temperature).to(device),
            np.repeat(molecule.positions[None], ladders * len(temperatures), 0),
            temperature=temperatures[-1], timestep=TIMESTEP, friction=FRICTION,
            generator=torch.Generator(device).manual_seed(seed),
        )  # fmt: skip
        self.temperatures = temperatures
        self.beta = torch.tensor(1 / (GAS_CONSTANT * temperatures), device=device)
        around: list[list[int]] = [[] for _ in range(molecule.num_atoms)]
        for a, b in molecule.topology.bonds():
            around[a.index].append(b.index)
            around[b.index].append(a.index)
        self.corners = torch.tensor([atoms for atoms in around if len(atoms) == 4], dtype=torch.long, device=device)
        self.corners = self.corners.view(-1, 4)
        self.handedness = self._handedness(self.walkers.positions[:1])
        self.turned, self.parity = 0, 0
        self.tried, self.accepted = (torch.zeros(len(temperatures) - 1, dtype=torch.int64) for _ in range(2))
        self.walkers.draw_velocities()

    def cool(self) -> None:
        """From one temperature for all to the ladder."""
        self.walkers.set_temperature(np.tile(self.temperatures, self.shape[0]))
        self.walkers.draw_velocities()

    def advance(self, steps: int) -> None:
        """Dynamics within the conformations that have the handedness of the start."""
        old = self.walkers.positions, self.walkers.velocities
        self.walkers.advance(steps)
        turned = (self._handedness(self.walkers.positions) != self.handedness).any(1)[:, None, None]
        if bool(turned.any()):
            # Metropolis' rejection in phase space: back to the old place, the other way round
            self.walkers.positions = torch.where(turned, old[0], self.walkers.positions)
            self.walkers.velocities = torch.where(turned, -old[1], self.walkers.velocities)
            self.turned += int(turned.sum())

    def exchange(self) -> torch.Tensor:
        """Even or odd neighbours of all ladders in turn; (ladders, temperatures) energies in kJ/mol afterwards."""
        ladders, n = self.shape
        energy = self.walkers.potential_energy().view(self.shape)
        low = torch.arange(self.parity, n - 1, 2, device=energy.device)
        log_ratio = (self.beta[low] - self.beta[low + 1]) * (energy[:, low] - energy[:, low + 1])
        uniform = torch.rand(log_ratio.shape, generator=self.walkers.generator, device=energy.device)
        swapped = (torch.log1p(-uniform) < log_ratio).long()
        order = torch.arange(ladders * n, device=energy.device).view(self.shape).clone()
        order[:, low] += swapped
        order[:, low + 1] -= swapped
        self.walkers.permute(order.flatten())
        self.tried[low.cpu()] += ladders
        self.accepted[low.cpu()] += swapped.sum(0).cpu()
        self.parity = 1 - self.parity
        return energy.flatten()[order]

    def save(self) -> tuple[dict, dict[str, np.ndarray]]:
        w = self.walkers
        tensors = {"walkers": w.positions, "velocities": w.velocities, "random": w.generator.get_state()}
        tensors |= {"tried": self.tried, "accepted": self.accepted}
        header = {"evaluations": w.force_evaluations, "turned": self.turned, "parity": self.parity}
        return header, {name: tensor.numpy(force=True) for name, tensor in tensors.items()}

    def restore(self, header: dict, arrays: dict[str, np.ndarray]) -> None:
        w = self.walkers
        w.positions = torch.as_tensor(arrays["walkers"]).to(w.positions)
        w.velocities = torch.as_tensor(arrays["velocities"]).to(w.positions)
        w.generator.set_state(torch.as_tensor(arrays["random"]))
        self.tried, self.accepted = torch.as_tensor(arrays["tried"]), torch.as_tensor(arrays["accepted"])
        w.force_evaluations, self.turned, self.parity = header["evaluations"], header["turned"], header["parity"]

    def _handedness(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = (x[:, self.corners[:, k]] for k in range(4))
        return ((b - a) * torch.linalg.cross(c - a, d - a)).sum(-1) > 0
