"""The file of a generator: safetensors with a JSON header, data and never code.

The header holds the atoms and bonds, the System as XML, the architecture, the provenance, and a sha256 of all of it and
of the tensors. A System XML that holds a PythonForce is refused before OpenMM sees it: deserialising one unpickles a
function.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openmm
import torch
from openmm import app
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.energies import Energy, ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.flows import ContinuousFlow, Flow, MolecularFlow, RealNVP, SplineFlow

if TYPE_CHECKING:
    from openmm_bg.generator import BoltzmannGenerator

FORMAT = "openmm_bg generator 1"
_ARCHITECTURES: dict[str, type[Flow]] = {c.__name__: c for c in (ContinuousFlow, MolecularFlow, RealNVP, SplineFlow)}


def system_hash(system: openmm.System) -> str:
    """sha256 of the System's XML."""
    return hashlib.sha256(openmm.XmlSerializer.serialize(system).encode()).hexdigest()


def topology_to_dict(topology: app.Topology) -> dict[str, Any]:
    """Atoms, residues and bonds as JSON."""
    return {
        "residues": [[r.name, r.id, r.chain.index] for r in topology.residues()],
        "atoms": [[a.name, a.element.symbol if a.element else None, a.residue.index] for a in topology.atoms()],
        "bonds": [[a.index, b.index] for a, b in topology.bonds()],
    }


def topology_from_dict(data: dict[str, Any]) -> app.Topology:
    """The inverse of :func:`topology_to_dict`."""
    topology = app.Topology()
    chains: dict[int, Any] = {}
    residues = []
    for name, identifier, chain in data["residues"]:
        if chain not in chains:
            chains[chain] = topology.addChain()
        residues.append(topology.addResidue(name, chains[chain], identifier))
    atoms = [
        topology.addAtom(name, app.Element.getBySymbol(symbol) if symbol else None, residues[residue])
        for name, symbol, residue in data["atoms"]
    ]
    for i, j in data["bonds"]:
        topology.addBond(atoms[i], atoms[j])
    return topology


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def pack(generator: BoltzmannGenerator) -> tuple[bytes, str]:
    """The bytes of a generator's file, and their fingerprint."""
    flow = generator.flow
    kind = type(flow).__name__
    if _ARCHITECTURES.get(kind) is not type(flow):
        raise InputError(
            f"A flow of class {kind} cannot be saved; use one of {', '.join(_ARCHITECTURES)}, or keep its weights "
            "yourself."
        )
    header: dict[str, Any] = {
        "format": FORMAT,
        "flow": {"class": kind, "config": flow.config()},
        "defensive": generator.defensive,
        "provenance": generator.provenance,
        "coordinates": None if generator.coordinates is None else generator.coordinates.config(),
        "topology": None if generator.topology is None else topology_to_dict(generator.topology),
        "system": None,
        "temperature": generator.temperature,
    }
    if generator.system is not None:
        header["system"] = openmm.XmlSerializer.serialize(generator.system)
        refuse_code(header["system"], "This generator")
    # through JSON once, so that the hash is that of what a reader will see
    header = json.loads(json.dumps(header))
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in flow.state_dict().items()}
    fingerprint = _digest(header, tensors)
    metadata = {"openmm_bg": json.dumps(header, sort_keys=True), "sha256": fingerprint}
    return save_tensors(tensors, metadata), fingerprint


def save(generator: BoltzmannGenerator, path: Any) -> str:
    """Write the generator's file atomically and return its fingerprint."""
    content, fingerprint = pack(generator)
    write_atomically(Path(path), content)
    return fingerprint


def refuse_code(xml: str, source: str) -> None:
    """Refuse a serialised System that would run code when read."""
    # OpenMM names the force class in an attribute; entities could hide the name from a search
    if re.search(r"PythonForce|<!DOCTYPE|<!ENTITY|&#", xml):
        raise InputError(
            f"{source} holds a System with a PythonForce (or XML that could hide one), which would run code when read; "
            "files of generators hold data only."
        )


def load(cls: type[BoltzmannGenerator], path: Any, energy: Energy | None) -> BoltzmannGenerator:
    """Read, verify and rebuild."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no generator file {path}.")
    content = path.read_bytes()
    broken = InputError(f"{path} is not a whole generator file of openmm_bg; it may be truncated or altered.")
    try:
        (size,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        header = json.loads(metadata["openmm_bg"])
        if header["format"] != FORMAT:
            raise InputError(f"{path} has the format {header['format']!r}; this version of openmm_bg reads {FORMAT!r}.")
        tensors = load_tensors(content)
        whole = _digest(header, tensors) == metadata["sha256"]
        xml, defensive, provenance = header["system"], float(header["defensive"]), dict(header["provenance"])
    except InputError:
        raise
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        raise broken from None
    if not whole:
        raise broken
    if xml is not None:
        refuse_code(str(xml), str(path))
    try:
        flow = _ARCHITECTURES[header["flow"]["class"]].from_config(header["flow"]["config"]).double()
        flow.load_state_dict(tensors)
        coordinates = header["coordinates"] and InternalCoordinates.from_config(header["coordinates"])
        topology = header["topology"] and topology_from_dict(header["topology"])
        if xml is not None and energy is None:
            energy = ForceFieldEnergy(openmm.XmlSerializer.deserialize(xml), header["temperature"])
    except (LookupError, TypeError, ValueError, RuntimeError, openmm.OpenMMException):
        raise broken from None
    generator = cls(energy, flow, coordinates, topology=topology, defensive=defensive)
    generator.provenance = provenance
    return generator
