"""Who moves the replicas of an exchange: OpenMM Contexts on threads, or one batch in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import openmm
import torch

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling.batched import BatchedLangevin, batchable
from openmm_bg.sampling.dynamics import LangevinPropagator, fastest_platform

# Steps of heating between two reports, so that a bar moves and Ctrl-C is heard.
_PIECE = 500


class Replicas(Protocol):
    """Walkers of given temperatures; the i-th keeps its temperature, exchanges move what stands there."""

    #: bitwise the same in every run of a seed with the same of these
    identity: dict[str, Any]

    @property
    def force_evaluations(self) -> int: ...

    def start(self, minimize: bool) -> None:
        """Relax the first, place all others there, draw velocities."""

    def heat(self, steps: int, report: Callable[[int], Any]) -> None:
        """Move all at the highest temperature from fresh velocities, then slow each down to its own.

        `report` hears of every few steps taken.
        """

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

    def heat(self, steps: int, report: Callable[[int], Any]) -> None:
        own = np.array([replica.temperature for replica in self._replicas])
        try:
            for replica in self._replicas:
                replica.temperature = own.max()
                replica.draw_velocities()
            for piece in _pieces(steps):
                list(self._pool.map(lambda replica, n=piece: replica.advance(n), self._replicas))
                report(piece)
        finally:  # an interrupted heating leaves no thermostat at the wrong temperature
            for replica, temperature in zip(self._replicas, own, strict=True):
                replica.velocities = replica.velocities * np.sqrt(temperature / replica.temperature)
                replica.temperature = temperature

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
        heating_seed: int,
    ) -> None:
        self.identity = {"platform": "torch" if device.type == "cpu" else f"torch, {device.type}"}
        self._system, self._relaxed = system, start
        # numbers of its own: the exchange after it draws the same with heating as without
        self._heating = torch.Generator(device).manual_seed(heating_seed % 2**63)
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

    def heat(self, steps: int, report: Callable[[int], Any]) -> None:
        own = self._walkers
        top = float(own.temperatures.max())
        hot = BatchedLangevin(
            own.energy, own.positions, temperature=top, timestep=own.timestep, friction=own.friction,
            generator=self._heating,
        )  # fmt: skip
        hot.draw_velocities()
        for piece in _pieces(steps):
            hot.advance(piece)
            report(piece)
        slower = torch.sqrt(own.temperatures / top)[:, None, None]
        own.positions, own.velocities = hot.positions, (slower * hot.velocities.double()).to(hot.velocities)
        own.force_evaluations += hot.force_evaluations

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


def replicas_for(
    system: openmm.System,
    start: np.ndarray,
    temperatures: np.ndarray,
    seed: int,
    *,
    timestep: Any,
    friction: Any,
    platform: str | None,
    workers: int,
    batch: bool,
    device: torch.device,
) -> tuple[Replicas, np.random.Generator]:
    """The replicas, and the random numbers that decide the exchanges."""
    seeds = np.random.SeedSequence(seed).spawn(len(temperatures) + 1)
    *streams, deciding = (np.random.default_rng(child) for child in seeds)
    if batch and platform is None and batchable(system) is None:
        batched = BatchedReplicas(
            system, start, temperatures, streams[0], timestep=timestep, friction=friction, device=device,
            heating_seed=seed,
        )  # fmt: skip
        return batched, deciding
    if device.type != "cpu":
        raise InputError(
            "Only several ladders, as one batch, run on a GPU; give more ladders, or leave out the device."
        )
    contexts = ContextReplicas(
        system, start, temperatures, streams, timestep=timestep, friction=friction,
        platform=platform or fastest_platform(system), workers=workers,
    )  # fmt: skip
    return contexts, deciding


def _pieces(steps: int) -> Iterator[int]:
    for done in range(0, steps, _PIECE):
        yield min(_PIECE, steps - done)
