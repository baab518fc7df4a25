"""The products of a run, read back from its folder."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import app

from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling import (
    Trajectory,
    effective_sample_size,
    forward_effective_sample_size,
    independence_acceptance,
    largest_log_ratio,
    log_normalizer,
)
from openmm_bg.units import thermal_energy
from openmm_bg.workflow.data import held_out_frames
from openmm_bg.workflow.settings import RunSettings

_CHUNK = 16384


@dataclass
class Material:
    """The products of a run's steps; positions in nm, energies in kT.

    Attributes
    ----------
    record : dict
        run.json.
    topology : openmm.app.Topology
    md, chain : ndarray, (frames, atoms, 3)
        Plain MD, and MD with moves after each iteration.
    exchange : ndarray, (frames, atoms, 3), or None
        The lowest temperature of the replica exchange; None for an adaptive run.
    samples : ndarray, (n, atoms, 3)
        The generator's draws; rows of NaN where they fell outside the support.
    log_weights, held_out_log_weights : ndarray
        -u - log_prob of the draws, and of frames that training never saw.
    accepted : ndarray of bool
        What became of every attempted move.
    training, rounds : list of dict
        Records of training.jsonl: of steps, and of the rounds of an adaptive run.
    quality : dict
        ESS, acceptance, forward figure and so on.
    """

    record: dict[str, Any]
    topology: app.Topology
    md: np.ndarray
    md_energy: np.ndarray
    exchange: np.ndarray | None
    exchange_energy: np.ndarray | None
    samples: np.ndarray
    sample_energy: np.ndarray
    log_weights: np.ndarray
    held_out_log_weights: np.ndarray
    chain: np.ndarray
    chain_energy: np.ndarray
    accepted: np.ndarray
    training: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    quality: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, record: dict[str, Any], topology: app.Topology) -> Material:
        """Read the folder of a run whose ``sample`` is done."""
        generator = BoltzmannGenerator.load(folder / "generator.bg")
        with np.load(folder / "samples.npz", allow_pickle=False) as draws:
            samples, energy, log_prob = draws["positions"], draws["reduced_energy"], draws["log_prob"]
        log_weights = np.full(len(energy), -np.inf)
        usable = np.isfinite(log_prob) & np.isfinite(energy)
        log_weights[usable] = -energy[usable] - log_prob[usable]
        settings, md = RunSettings(**record["settings"]), Trajectory.load(folder / "md.npz")
        exchange = Trajectory.load(folder / "exchange_frames.npz") if settings.data == "exchange" else None
        held_out = held_out_frames(folder, settings)
        chain = read_dcd(folder / "trajectory.dcd", topology.getNumAtoms())
        if generator.energy is None:
            raise InputError(f"{folder / 'generator.bg'} holds no energy, so it is not the generator of a run.")
        with torch.no_grad():
            parts = [generator.energy(part) for part in torch.as_tensor(chain).split(_CHUNK)]
        held_out_log_weights = generator.log_weights(held_out).numpy()
        log_z, ess = log_normalizer(log_weights), effective_sample_size(log_weights)
        log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        kt = thermal_energy(record["temperature"])
        return cls(
            record=record,
            topology=topology,
            md=md.positions,
            md_energy=md.potential_energy / kt,
            exchange=None if exchange is None else exchange.positions,
            exchange_energy=None if exchange is None else exchange.potential_energy / kt,
            samples=samples,
            sample_energy=energy,
            log_weights=log_weights,
            held_out_log_weights=held_out_log_weights,
            chain=chain,
            chain_energy=torch.cat(parts).numpy(),
            accepted=np.loadtxt(folder / "moves.csv", delimiter=",", skiprows=1, usecols=2, ndmin=1) > 0,
            training=[line for line in log if "stage" in line],
            rounds=[line for line in log if "stage" not in line],
            quality={
                "ess": ess.fraction,
                "ess_clipped": ess.clipped,
                "n": ess.n,
                "acceptance": independence_acceptance(log_weights),
                "forward": forward_effective_sample_size(held_out_log_weights, log_z.value),
                "largest_log_ratio": largest_log_ratio(held_out_log_weights, log_z.value),
                "held_out_frames": len(held_out),
                "log_z": log_z.value,
                "log_z_error": log_z.error,
            },
        )


def read_dcd(path: Path, atoms: int) -> np.ndarray:
    """Positions of a DCD file of OpenMM, ``(frames, atoms, 3)`` float64 in nm. mdtraj's reader would print."""
    data, records, at = path.read_bytes(), [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<i", data, at)
        if size < 0 or at + size + 8 > len(data):
            raise InputError(f"{path} ends in the middle of a frame, or is no DCD file.")
        records.append(data[at + 4 : at + 4 + size])
        at += size + 8
    if len(records) < 3 or records[0][:4] != b"CORD" or records[2] != struct.pack("<i", atoms):
        raise InputError(f"{path} is not a DCD file of {atoms} atoms.")
    boxed = bool(struct.unpack_from("<i", records[0], 44)[0])
    rows = [row for i, row in enumerate(records[3:]) if not boxed or i % 4]  # the box precedes x, y and z
    if len(rows) % 3 or any(len(row) != 4 * atoms for row in rows):
        raise InputError(f"{path} ends in the middle of a frame, or is no DCD file.")
    xyz = np.frombuffer(b"".join(rows), "<f4").reshape(-1, 3, atoms)
    return 0.1 * xyz.transpose(0, 2, 1).astype(np.float64)
