"""The openmmtools move: exact averages, copies, storage, and life inside the samplers of openmmtools."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
import toys
import yaml
from openmm import unit

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator


@pytest.fixture(scope="module")
def openmmtools():
    return pytest.importorskip("openmmtools")


@pytest.fixture(scope="module")
def generator():
    return BoltzmannGenerator.for_molecule(toys.chain_topology(), toys.chain_system(), positions=toys.CHAIN_POSITIONS)


@pytest.fixture(scope="module")
def cache(openmmtools):
    from openmmtools.cache import ContextCache

    return ContextCache(platform=openmm.Platform.getPlatform("Reference"))


@pytest.fixture
def make(generator, tmp_path, openmmtools):
    def build(**options):
        return bg.BoltzmannGeneratorMove(generator, **({"directory": tmp_path / "store", "seed": 3} | options))

    return build


def states(system=None, temperature=300.0, positions=toys.CHAIN_POSITIONS):
    from openmmtools.states import SamplerState, ThermodynamicState

    system = toys.chain_system() if system is None else system
    return (
        ThermodynamicState(system, temperature * unit.kelvin),
        SamplerState(positions * unit.nanometer),
    )


def positions(sampler_state):
    return np.array(sampler_state.positions.value_in_unit(unit.nanometer))


def chain_of(move, n, cache):
    """Positions after each of n applications."""
    thermodynamic_state, sampler_state = states()
    frames = []
    for _ in range(n):
        move.apply(thermodynamic_state, sampler_state, cache)
        frames.append(positions(sampler_state))
    return np.array(frames)


def test_importing_the_package_does_not_import_openmmtools():
    code = "import sys, openmm_bg; print([m for m in ('openmmtools', 'deeptime', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_move_is_exact(make, cache):
    move = make(n_proposals=15)
    x = chain_of(move, 500, cache)
    bonds = np.linalg.norm(np.diff(x, axis=1), axis=-1).mean(1)
    arms = np.diff(x, axis=1) / np.linalg.norm(np.diff(x, axis=1), axis=-1, keepdims=True)
    cosines = -(arms[:, :-1] * arms[:, 1:]).sum(-1).mean(1)
    for values, exact in zip((bonds, cosines), toys.chain_exact()[:2], strict=True):
        blocks = values.reshape(25, -1).mean(1)
        assert abs(blocks.mean() - exact) < 3.5 * blocks.std(ddof=1) / 5
    assert move.n_proposed == 7500 and 300 < move.n_accepted < 7500 and move.n_refused == 0


def test_two_stages_and_latent_steps_are_exact_for_another_system(make, cache):
    """The generator's energy has a torsion that the System lacks, so that the second stage has something to decide."""
    system = toys.chain_system()
    system.getForce(2).setTorsionParameters(0, 0, 1, 2, 3, 1, toys.TORSION_PHASE, 0.0)
    move = make(n_proposals=8, two_stage=True, latent_share=0.25, latent_step=0.5)
    thermodynamic_state, sampler_state = states(system)
    frames = []
    for _ in range(300):
        move.apply(thermodynamic_state, sampler_state, cache)
        frames.append(positions(sampler_state))
    q = move.generator.coordinates(torch.tensor(np.array(frames)))[0].numpy()
    moments = toys.chain_moments(q).reshape(20, 15, 4).mean(1)
    exact = [*toys.chain_exact()[:2], 0.0, 0.0]
    assert np.abs((moments.mean(0) - exact) / (moments.std(0, ddof=1) / math.sqrt(20))).max() < 3.5
    assert move.n_tried == 2400 and 0 < move.n_latent_accepted <= move.n_latent_proposed
    assert 300 < move.n_proposed <= 600 and 0.3 * move.n_proposed < move.n_accepted < move.n_proposed


def test_temperature_is_the_thermodynamic_states(make, cache):
    """With a hotter state the same proposals are accepted more or less often, not equally."""
    accepted = []
    for temperature in (300.0, 3000.0):
        move = make(n_proposals=200)
        move.apply(*states(temperature=temperature), cache)
        accepted.append(move.n_accepted)
    assert accepted[0] != accepted[1]


def test_accepted_moves_redraw_velocities_and_rejected_leave_the_state(make, cache):
    thermodynamic_state, sampler_state = states()
    sampler_state.velocities = np.zeros((4, 3)) * unit.nanometer / unit.picosecond
    move = make(n_proposals=1)
    while move.n_accepted == 0:
        before = positions(sampler_state)
        move.apply(thermodynamic_state, sampler_state, cache)
        if move.n_accepted == 0:
            np.testing.assert_array_equal(positions(sampler_state), before)
            assert not np.any(sampler_state.velocities._value)
    assert np.all(sampler_state.velocities._value != 0)
    assert math.isfinite(sampler_state.potential_energy._value)
    context, _ = cache.get_context(thermodynamic_state)
    sampler_state.apply_to_context(context)
    assert sampler_state.potential_energy == context.getState(energy=True).getPotentialEnergy()


def test_molecule_inside_a_larger_system(make, cache):
    system = openmm.System()
    system.addParticle(39.9)
    for mass in (12.0, 16.0, 16.0, 12.0):
        system.addParticle(mass)
    x = np.concatenate([[[1.0, 1.0, 1.0]], toys.CHAIN_POSITIONS])
    move = make(atom_subset=[1, 2, 3, 4], n_proposals=50)
    thermodynamic_state, sampler_state = states(system, positions=x)
    move.apply(thermodynamic_state, sampler_state, cache)
    assert move.n_accepted > 0
    np.testing.assert_array_equal(positions(sampler_state)[0], x[0])
    with pytest.raises(InputError, match="atoms="):
        make().apply(thermodynamic_state, sampler_state, cache)


def test_a_constrained_system_is_refused(make, cache):
    system = toys.chain_system()
    system.addConstraint(0, 1, 0.15)
    with pytest.raises(InputError, match="constrains"):
        make().apply(*states(system), cache)


# -- copies


def test_deepcopy_shares_the_network_and_draws_other_proposals(make, cache):
    move = make()
    copies = [copy.deepcopy(move) for _ in range(3)]
    assert all(c.generator is move.generator for c in copies)
    runs = [chain_of(m, 5, cache) for m in (*copies, move)]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(runs[i], runs[j])
    again = [copy.deepcopy(other) for other in [make()] for _ in range(1)]
    np.testing.assert_array_equal(chain_of(again[0], 5, cache), runs[0])


def test_nested_copies_draw_other_proposals_too(make, cache, openmmtools):
    from openmmtools.mcmc import SequenceMove

    sequence = SequenceMove([make()])
    copies = [copy.deepcopy(sequence).move_list[0] for _ in range(3)]
    assert copies[0].generator is copies[1].generator is sequence.move_list[0].generator
    runs = [chain_of(m, 5, cache) for m in (*copies, sequence.move_list[0])]
    assert all(not np.allclose(runs[i], runs[j]) for i in range(4) for j in range(i))


def test_a_move_keeps_the_generator_it_was_made_from(tmp_path, openmmtools):
    mine = BoltzmannGenerator.for_molecule(toys.chain_topology(), toys.chain_system(), positions=toys.CHAIN_POSITIONS)
    move = bg.BoltzmannGeneratorMove(mine, directory=tmp_path)
    fingerprint = mine.fingerprint
    for parameter in mine.flow.parameters():
        parameter.data += 0.1
    assert mine.fingerprint != fingerprint == move.generator.fingerprint
    assert bg.BoltzmannGeneratorMove(mine, directory=tmp_path).generator.fingerprint == mine.fingerprint


def test_statistics_set_from_another_process_do_not_repeat_its_numbers(make, cache):
    one, two = make(), make()
    np.testing.assert_array_equal(chain_of(one, 3, cache), chain_of(two, 3, cache))
    one, two = make(), make()
    chain_of(one, 3, cache)
    two.statistics = one.statistics
    assert two.statistics == one.statistics
    assert (two.n_proposed, two.n_tried, two.n_refused, two.n_latent_proposed) == (30, 30, 0, 0)
    assert not np.allclose(chain_of(two, 3, cache), chain_of(make(), 3, cache))
    one.statistics = one.statistics  # no change, no new stream
    assert one._key == ()


# -- storage


def test_state_is_plain_fresh_and_complete(make, cache, tmp_path):
    from openmmtools.utils import deserialize, serialize

    options = {"two_stage": True, "latent_share": 0.25, "latent_step": 0.3}
    move = make(seed=2**100, n_proposals=7, atom_subset=[0, 1, 2, 3], **options)
    chain_of(move, 3, cache)
    state = serialize(move)
    assert yaml.safe_load(yaml.safe_dump(state)) == state
    assert (tmp_path / "store" / f"{move.generator.fingerprint}.bg").exists()
    restored = deserialize(yaml.safe_load(yaml.safe_dump(state)))
    assert restored.statistics == move.statistics and move.n_tried == 21
    assert {name: getattr(restored, name) for name in options} == options
    assert (restored.n_proposals, restored.atom_subset) == (7, [0, 1, 2, 3])
    assert restored.generator is move.generator
    assert "_serialized__module_name" not in move.__getstate__()


def test_restored_in_a_new_process(make, tmp_path):
    from openmmtools.utils import serialize

    move = make()
    move.statistics = {"n_accepted": 2, "n_proposed": 5, "n_refused": 1}  # as an earlier version stored them
    (tmp_path / "move.yaml").write_text(yaml.safe_dump(serialize(move)))
    code = (
        "import sys, yaml; from openmmtools.utils import deserialize;"
        "m = deserialize(yaml.safe_load(open(sys.argv[1])));"
        "print(m.generator.fingerprint, sorted(m.statistics.values())[-3:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "move.yaml"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{move.generator.fingerprint} [1, 2, 5]"


def test_a_generator_given_as_a_file_stays_there(generator, tmp_path, openmmtools):
    path = tmp_path / "mine.bg"
    generator.save(path)
    move = bg.BoltzmannGeneratorMove(path, directory=tmp_path / "store")
    assert move.__getstate__()["generator_path"] == str(path)
    assert not (tmp_path / "store").exists()


def test_missing_and_exchanged_files_are_errors(tmp_path, openmmtools):
    from openmmtools.utils import deserialize, serialize

    first = BoltzmannGenerator.for_molecule(
        toys.chain_topology(), toys.chain_system(), positions=toys.CHAIN_POSITIONS, seed=77
    )
    move = bg.BoltzmannGeneratorMove(first, directory=tmp_path)
    state = serialize(move)
    path = next(tmp_path.iterdir())
    del move
    gc.collect()
    path.unlink()
    with pytest.raises(InputError, match="put its file back"):
        deserialize(dict(state))
    BoltzmannGenerator.for_molecule(
        toys.chain_topology(), toys.chain_system(), positions=toys.CHAIN_POSITIONS, seed=78
    ).save(path)
    with pytest.raises(InputError, match="another generator"):
        deserialize(dict(state))


def test_states_of_an_earlier_version_are_read(make):
    state = make(n_proposals=7).__getstate__()
    for name in ("two_stage", "latent_share", "latent_step", "n_tried", "n_moved", "n_latent_proposed"):
        del state[name]
    old = bg.BoltzmannGeneratorMove.__new__(bg.BoltzmannGeneratorMove)
    old.__setstate__(state)
    assert (old.n_proposals, old.two_stage, old.latent_share, old.n_tried) == (7, False, 0.0, 0)


@pytest.mark.parametrize("n_proposals", [0, 1.5, True])
def test_senseless_numbers_are_refused(make, n_proposals):
    with pytest.raises(InputError, match="n_proposals"):
        make(n_proposals=n_proposals)


def test_senseless_latent_steps_are_refused(make):
    with pytest.raises(InputError, match="latent_share"):
        make(latent_share=-0.1)
    with pytest.raises(InputError, match="latent step"):
        make(latent_share=0.1, latent_step=1.0)


# -- inside openmmtools


def test_sequence_and_weighted_moves_in_an_mcmc_sampler(make, openmmtools):
    from openmmtools import cache, mcmc

    dynamics = mcmc.LangevinDynamicsMove(timestep=0.5 * unit.femtosecond, n_steps=5)
    for combined in (
        mcmc.SequenceMove([make(n_proposals=5), dynamics]),
        mcmc.WeightedMove([(make(n_proposals=5), 0.5), (dynamics, 0.5)]),
    ):
        thermodynamic_state, sampler_state = states()
        sampler = mcmc.MCMCSampler(thermodynamic_state, sampler_state, combined)
        sampler.run(6, cache.ContextCache(platform=openmm.Platform.getPlatform("Reference")))
        statistics = combined.statistics[0]
        assert statistics["n_proposed"] % 5 == 0 and statistics["n_proposed"] > 0
        assert np.isfinite(sampler.sampler_state.positions._value).all()


def test_replica_exchange_with_storage_and_resume(make, tmp_path, openmmtools):
    from openmmtools import cache, mcmc
    from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

    platform = openmm.Platform.getPlatform("Reference")
    move = mcmc.SequenceMove(
        [make(n_proposals=4), mcmc.LangevinDynamicsMove(timestep=0.5 * unit.femtosecond, n_steps=5)]
    )
    sampler = ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=4)
    caches = {name: cache.ContextCache(platform=platform) for name in ("energy_context_cache", "sampler_context_cache")}
    for name, value in caches.items():
        setattr(sampler, name, value)
    thermodynamic_states = [states(temperature=t)[0] for t in (300.0, 330.0)]
    reporter = MultiStateReporter(str(tmp_path / "rex.nc"), checkpoint_interval=2)
    sampler.create(thermodynamic_states, [states()[1]] * 2, storage=reporter)
    sampler.run()
    bg_moves = [m.move_list[0] for m in sampler._mcmc_moves]
    assert [m.n_proposed for m in bg_moves] == [16, 16]
    assert bg_moves[0]._key != bg_moves[1]._key and bg_moves[0].generator is bg_moves[1].generator
    reporter.close()
    del sampler

    reporter = MultiStateReporter(str(tmp_path / "rex.nc"), open_mode="r+", checkpoint_interval=2)
    resumed = ReplicaExchangeSampler.from_storage(reporter)
    for name, value in caches.items():
        setattr(resumed, name, value)
    stored = [m.move_list[0].n_proposed for m in resumed._mcmc_moves]
    assert stored == [16, 16]
    resumed.extend(2)
    assert [m.move_list[0].n_proposed for m in resumed._mcmc_moves] == [24, 24]
    reporter.close()
