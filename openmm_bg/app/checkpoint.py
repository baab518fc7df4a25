"""The checkpoint of a sampler: the Context, every random state, and what the moves have learned."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm

from openmm_bg.errors import InputError
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.sampling.metropolis import MoveStatistics

if TYPE_CHECKING:
    from openmm_bg.app.sampler import BoltzmannGeneratorSampler

CHECKPOINT_FORMAT = 2
"""Raised when a checkpoint holds something else; those of other formats are refused."""

_COUNTERS = (
    "currentIteration", "numProposed", "numAccepted", "numRefused", "proposalsPerIteration", "adaptationIterations",
)  # fmt: skip


def _sources(sampler: BoltzmannGeneratorSampler) -> dict[str, Any]:
    return {"proposals": sampler._proposals} | ({} if sampler._latent is None else {"latent": sampler._latent})


def save_checkpoint(sampler: BoltzmannGeneratorSampler, path: str | os.PathLike[str]) -> None:
    """Write everything from which a sampler of the same settings goes on with the same numbers."""
    header: dict[str, Any] = {
        "format": CHECKPOINT_FORMAT,
        "generator": weights_hash(sampler._proposals.generator),
        "settings": sampler._settings,
        "random": sampler._random.bit_generator.state,
        "statistics": {kind: asdict(counts) for kind, counts in sampler.statistics.items()},
        "number": sampler._number.state_dict(),
        **{name: getattr(sampler, name) for name in _COUNTERS},
    }
    if sampler._log is not None:
        header["logLength"] = sampler._log.length
    if sampler._trajectory is not None:
        header["trajectory"] = sampler._trajectory.mark
    if sampler._states is not None:
        header["states"] = sampler._states.mark
    arrays = {
        f"{source}_{name}": array
        for source, proposals in _sources(sampler).items()
        for name, array in proposals.state_dict().items()
    }
    context = np.frombuffer(sampler.simulation.context.createCheckpoint(), dtype=np.uint8)
    save_arrays(path, header, context=context, **arrays)


def load_checkpoint(sampler: BoltzmannGeneratorSampler, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Put a sampler and its Context into the state of a checkpoint; its header, which knows the output files.

    Raises
    ------
    InputError
        If it was written by another version or with other settings, or belongs to another generator or simulation.
    """
    header, _ = load_arrays(path, ())
    if header.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} was written by another version of openmm_bg; start a new run from its last conformation."
        )
    if header["generator"] != weights_hash(sampler._proposals.generator):
        raise InputError(f"{path} belongs to another generator; resume with the one it was made with.")
    for name, value in header["settings"].items():
        if value != sampler._settings[name]:
            raise InputError(f"{path} was made with {name}={value}; resume with the same.")
    sources = _sources(sampler)
    names = {source: tuple(proposals.state_dict()) for source, proposals in sources.items()}
    _, arrays = load_arrays(path, ("context", *(f"{source}_{name}" for source in names for name in names[source])))
    try:
        sampler.simulation.context.loadCheckpoint(arrays["context"].tobytes())
    except openmm.OpenMMException as error:
        raise InputError(
            f"{path} does not fit this simulation (a checkpoint needs the same System, integrator and platform): "
            f"{error}"
        ) from None
    for name in _COUNTERS:
        setattr(sampler, name, header[name])
    sampler.statistics = {kind: MoveStatistics(**counts) for kind, counts in header["statistics"].items()}
    sampler._random.bit_generator.state = header["random"]
    sampler._number.load_state_dict(header["number"])
    for source, proposals in sources.items():
        proposals.load_state_dict({name: arrays[f"{source}_{name}"] for name in names[source]})
    return header


def weights_hash(generator: Any) -> str:
    """sha256 of the weights; unlike a generator's fingerprint it exists for flows that cannot be saved, too."""
    digest = hashlib.sha256()
    for name, tensor in generator.flow.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()
