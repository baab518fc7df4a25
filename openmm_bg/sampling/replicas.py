"""Who moves the replicas of an exchange: OpenMM Contexts on threads, or one batch in torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import openmm
import torch

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.sampling.batched import BatchedLangevin
from openmm_bg.sampling.dynamics import LangevinPropagator


class Replicas(Protocol):
    """Walkers of given temperatures; the i-th keeps its temperature, exchanges move what stands there."""

    #: bitwise the same in every run of a seed with the same of these
    identity: dict[str, Any]

    @property
    def force_evaluations(self) -> int: ...

    def start(self, minimize: bool) -> None:
        """Relax the first, place all others there, draw velocities."""

    def advance(self, steps: int) -> np.ndarray:
        """Potential energies ``(replicas,)`` in kJ/mol after `steps` steps."""

    def positions(self, index: np.ndarray) -> np.ndarray:
        """Of the replicas of an index, ``(..., atoms, 3)`` in nm."""

    def permute(self, order: np.ndarray) -> None:
        """Replica i goes on from where ``order[i]`` stands, velocities scaled to its own temperature."""

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `restore` needs: JSON and arrays (always ``positions`` and ``velocities``)."""

    def restore(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None: ...


class ContextReplicas:
    """One Context and one stream of random numbers per replica, on threads."""

    def __init__(
        self,
        system: openmm.System,
        start: np.ndarray,
        temperatures: np.ndarray,
        streams: Sequence[np.random.Generator],
        *,
        timestep: Any,
        friction: Any,
        platform: str,
        workers: int,
    ) -> None:
        self.identity = {"platform": platform}
        self._replicas = [
            LangevinPropagator(
                system, start, temperature=t, timestep=timestep, friction=friction, generator=stream, platform=platform
            )
            for t, stream in zip(temperatures, streams, strict=True)
        ]
        self._pool = ThreadPoolExecutor(workers)

    @property
    def force_evaluations(self) -> int:
        return sum(replica.force_evaluations for replica in self._replicas)

    def start(self, minimize: bool) -> None:
        if minimize:
            self._replicas[0].minimize()
        for replica in self._replicas:
            replica.positions = self._replicas[0].positions.copy()
            replica.draw_velocities()

    def advance(self, steps: int) -> np.ndarray:
        def propagate(replica: LangevinPropagator) -> float:
            replica.advance(steps)
            return replica.potential_energy()

        return np.array(list(self._pool.map(propagate, self._replicas)))

    def positions(self, index: np.ndarray) -> np.ndarray:
        return np.array([self._replicas[i].positions for i in index])

    def permute(self, order: np.ndarray) -> None:
        old = [(replica.positions, replica.velocities, replica.temperature) for replica in self._replicas]
        for replica, source in zip(self._replicas, order, strict=True):
            replica.positions, velocities, temperature = old[source]
            replica.velocities = velocities * np.sqrt(replica.temperature / temperature)

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header = {
            "force_evaluations": [replica.force_evaluations for replica in self._replicas],
            "generators": [replica.generator.bit_generator.state for replica in self._replicas],
        }
        return header, {
            "positions": np.array([replica.positions for replica in self._replicas]),
            "velocities": np.array([replica.velocities for replica in self._replicas]),
        }

    def restore(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for k, replica in enumerate(self._replicas):
            replica.positions, replica.velocities = arrays["positions"][k], arrays["velocities"][k]
            replica.force_evaluations = header["force_evaluations"][k]
            replica.generator.bit_generator.state = header["generators"][k]


class BatchedReplicas:
    """All replicas in one batch of :class:`BatchedLangevin`, in float32."""

    def __init__(
        self,
        system: openmm.System,
        start: np.ndarray,
        temperatures: np.ndarray,
        stream: np.random.Generator,
        *,
        timestep: Any,
        friction: Any,
        device: torch.device,
    ) -> None:
        self.identity = {"platform": "torch" if device.type == "cpu" else f"torch, {device.type}"}
        self._system, self._relaxed = system, start
        random = torch.Generator(device).manual_seed(int(stream.integers(2**31)))
        self._walkers = BatchedLangevin(
            ForceFieldEnergy(system, 300.0).to(device), np.repeat(start[None], len(temperatures), 0),
            temperature=temperatures, timestep=timestep, friction=friction, generator=random,
        )  # fmt: skip

    @property
    def force_evaluations(self) -> int:
        return self._walkers.force_evaluations

    def start(self, minimize: bool) -> None:
        walkers = self._walkers
        if minimize:
            relaxer = LangevinPropagator(
                self._system, self._relaxed, temperature=300, timestep=walkers.timestep, friction=walkers.friction,
                generator=np.random.default_rng(0),
            )  # fmt: skip
            relaxer.minimize()
            walkers.positions = torch.as_tensor(relaxer.positions).to(walkers.positions).expand_as(walkers.positions)
        walkers.draw_velocities()

    def advance(self, steps: int) -> np.ndarray:
        self._walkers.advance(steps)
        return self._walkers.potential_energy().numpy(force=True)

    def positions(self, index: np.ndarray) -> np.ndarray:
        return self._walkers.positions[self._index(index)].double().numpy(force=True)

    def permute(self, order: np.ndarray) -> None:
        self._walkers.permute(self._index(order))

    def _index(self, index: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(index, device=self._walkers.positions.device)

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"force_evaluations": self.force_evaluations}, {
            "positions": self._walkers.positions.numpy(force=True),
            "velocities": self._walkers.velocities.numpy(force=True),
            "random": self._walkers.generator.get_state().numpy(),
        }

    def restore(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for name in ("positions", "velocities"):
            setattr(self._walkers, name, torch.as_tensor(arrays[name]).to(self._walkers.positions))
        self._walkers.generator.set_state(torch.as_tensor(arrays["random"]))
        self._walkers.force_evaluations = header["force_evaluations"]
