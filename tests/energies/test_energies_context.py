"""The pool of Contexts: rows in order, failures that raise and do not hang, nothing left running."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from openmm_bg.energies import ContextEnergy, context
from openmm_bg.energies.gradients import known_gradient
from openmm_bg.errors import InputError

PROC = Path("/proc/self/fd")
needs_proc = pytest.mark.skipif(not PROC.exists(), reason="reads /proc")


def chain(atoms: int = 6) -> openmm.System:
    """Bonds, Lennard-Jones and a wall with a global parameter."""
    system = openmm.System()
    bonds, nonbonded, wall = openmm.HarmonicBondForce(), openmm.NonbondedForce(), openmm.CustomExternalForce("k*x^4")
    wall.addGlobalParameter("k", 3.0)
    for i in range(atoms):
        system.addParticle(12.0)
        nonbonded.addParticle(0.2 * (-1) ** i, 0.2, 0.5)
        wall.addParticle(i)
        if i:
            bonds.addBond(i - 1, i, 0.15, 1000.0)
    for force in (bonds, nonbonded, wall):
        system.addForce(force)
    return system


def slow(terms: int = 20000) -> openmm.System:
    """About 10 ms per evaluation on Reference."""
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    force = openmm.CustomBondForce("exp(-r)*sin(r)*cos(2*r)*k")
    force.addGlobalParameter("k", 1.0)
    for _ in range(terms):
        force.addBond(0, 1, [])
    system.addForce(force)
    return system


def points(rows: int, atoms: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(0, 0.3, size=(rows, atoms, 3)))


def running(pid: int) -> bool:
    """Whether a process exists, be it as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start with the first batch of two rows, and every such batch goes to them."""
    monkeypatch.setattr(context, "_START_SECONDS", 0.0)
    monkeypatch.setattr(context, "_SEND_SECONDS", 0.0)


@pytest.fixture
def pooled(at_once: None) -> Iterator[ContextEnergy]:
    with ContextEnergy(chain(), 300, workers=2) as energy:
        yield energy


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_workers_agree_bitwise_with_one_process(at_once: None, platform: str) -> None:
    one = ContextEnergy(chain(), 300, platform=platform)
    with ContextEnergy(chain(), 300, platform=platform, workers=2) as two:
        for rows in (2, 3, 7, 8, 9, 101):
            x = points(rows, seed=rows)
            u, gradient = one.value_and_gradient(x)
            v, other = two.value_and_gradient(x)
            assert torch.equal(u, v) and torch.equal(gradient, other)
            assert len(set(u.tolist())) == rows  # a wrong order would be seen
            assert torch.equal(one(x), two(x))
        assert len(two.worker_pids) == 2 and two._local is None
        assert two(x[:0]).shape == (0,) and two.value_and_gradient(x[:0])[1].shape == (0, 6, 3)
        x = x.float()
        assert torch.equal(one(x), two(x)) and two(x).dtype == torch.float32


def test_gradient_from_workers(pooled: ContextEnergy) -> None:
    x = points(5).requires_grad_()
    u = pooled(x)
    weights = torch.arange(5.0, dtype=torch.float64)
    (slope,) = torch.autograd.grad(u @ weights, x, create_graph=True)
    torch.testing.assert_close(slope.detach(), weights[:, None, None] * pooled.value_and_gradient(x)[1])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(slope.sum(), x)


def test_small_chunks(pooled: ContextEnergy, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmm_bg.energies import workers

    x = points(50)
    expected = pooled.value_and_gradient(x)
    monkeypatch.setattr(workers, "_CHUNK_PARTICLES", 1)  # one conformation a chunk
    for a, b in zip(pooled.value_and_gradient(x), expected, strict=True):
        assert torch.equal(a, b)


def test_workers_start_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    with ContextEnergy(chain(), 300, workers=2) as energy:
        for _ in range(3):
            energy(points(1))
            energy(points(10))
        assert energy.worker_pids == ()
    x = points(60, 2)
    expected = ContextEnergy(slow(), 300)(x)
    monkeypatch.setattr(context, "_START_SECONDS", 0.05)
    with ContextEnergy(slow(), 300, workers=2) as energy:
        assert torch.equal(energy(x), expected)  # the first rows from here, the others from the workers
        pids = energy.worker_pids
        assert len(pids) == 2 and energy._local is not None
        assert torch.equal(energy(x), expected) and energy.worker_pids == pids


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_bad_rows_never_take_anothers_energy(at_once: None, platform: str, workers: int) -> None:
    """NaN first, in the middle, alone, coincident atoms; with and without gradients."""
    good = points(9)
    with ContextEnergy(chain(), 300, platform=platform, workers=workers) as energy:
        first = good.clone()
        first[0] = torch.nan
        u, gradient = energy.value_and_gradient(first)  # the first work any Context gets
        assert u[0] == torch.inf and (gradient[0] == 0).all() and torch.isfinite(u[1:]).all()
        expected, slope = energy.value_and_gradient(good)
        for row, value in ((5, torch.nan), (8, torch.inf), (3, -torch.inf)):
            x = good.clone()
            x[row, 2, 1] = value
            u, gradient = energy.value_and_gradient(x)
            others = [i for i in range(9) if i != row]
            for v in (u, energy(x), energy(x.clone().requires_grad_()).detach()):
                assert v[row] == torch.inf and torch.equal(v[others], expected[others])
            assert (gradient[row] == 0).all() and torch.equal(gradient[others], slope[others])
        x = good.clone()
        x[4, 5] = x[4, 0]  # not bonded: 1/r
        u, gradient = energy.value_and_gradient(x)
        assert u[4] == energy(x)[4] == torch.inf and (gradient[4] == 0).all()
        assert (energy(torch.full_like(good, torch.nan)) == torch.inf).all()
        assert torch.equal(energy(good), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_nan_found_by_the_platform(at_once: None, workers: int) -> None:
    """Finite coordinates, NaN energy: the log of a negative number."""
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("log(x)")
    force.addParticle(0)
    system.addForce(force)
    x = torch.tensor([[[-1.0, 0, 0]], [[1.0, 0, 0]], [[-2.0, 0, 0]], [[2.0, 0, 0]]], dtype=torch.float64)
    with ContextEnergy(system, 300, workers=workers) as energy:
        for _ in range(2):
            potential = energy.potential(x)
            assert potential[0] == potential[2] == torch.inf
            torch.testing.assert_close(potential[1::2], x[1::2, 0, 0].log())


def test_energies_alone_do_without_forces() -> None:
    """At the edge of a square root there is an energy and no force: see the class's documentation."""
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    edge = openmm.CustomExternalForce("50*sqrt(x)")  # the force is infinite at 0
    edge.addParticle(0)
    system.addForce(edge)
    energy = ContextEnergy(system, 300)
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert energy(x) == 0.0
    u, gradient = energy.value_and_gradient(x)
    assert u == torch.inf and (gradient == 0).all()
    assert energy(x.requires_grad_()) == torch.inf


@pytest.mark.parametrize("workers", [1, 2])
def test_global_parameters(at_once: None, workers: int) -> None:
    system, x = chain(), points(7)
    changed = copy.deepcopy(system)
    changed.getForce(2).setGlobalParameterDefaultValue(0, 11.0)
    plain, other = ContextEnergy(system, 300)(x), ContextEnergy(changed, 300)(x)
    assert not torch.equal(plain, other)
    with ContextEnergy(system, 300, workers=workers) as energy:
        assert energy.global_parameters == {"k": 3.0}
        assert torch.equal(energy(x), plain)
        energy.set_global_parameters({"k": 11.0})
        assert torch.equal(energy(x), other) and torch.equal(energy(x[:1]), other[:1])
        for again in (copy.deepcopy(energy), pickle.loads(pickle.dumps(energy))):
            with again:
                assert torch.equal(again(x), other)
        energy.close()
        assert torch.equal(energy(x), other)
        with pytest.raises(InputError, match=r"'missing'.*k"):
            energy.set_global_parameters({"k": 1.0, "missing": 2.0})
        for value in ("a", None, float("nan")):
            with pytest.raises(InputError, match="'k'"):
                energy.set_global_parameters({"k": value})
        assert torch.equal(energy(x), other)  # a refused call changes nothing
        energy.set_global_parameters({"k": 3.0})
        assert torch.equal(energy(x), plain)
    with pytest.raises(InputError, match="none"):
        ContextEnergy(system, 300, forces=[0]).set_global_parameters({"k": 1.0})


def test_close_and_reuse(pooled: ContextEnergy) -> None:
    x = points(8)
    expected = pooled(x)
    pids = pooled.worker_pids
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    pooled.close()
    pooled.close()
    assert pooled.worker_pids == () and not any(running(pid) for pid in pids)
    assert torch.equal(pooled(x), expected)
    assert not set(pooled.worker_pids) & set(pids)


def test_workers_end_with_the_energy(at_once: None) -> None:
    energy = ContextEnergy(chain(), 300, workers=2)
    energy(points(4))
    pids = energy.worker_pids
    assert all(running(pid) for pid in pids)
    del energy
    assert not any(running(pid) for pid in pids)


@needs_proc
def test_no_descriptor_is_leaked(pooled: ContextEnergy) -> None:
    before = len(list(PROC.iterdir()))
    for _ in range(3):
        pooled(points(4))
        assert len(list(PROC.iterdir())) > before
        pooled.close()
    pooled(points(4))
    os.kill(pooled.worker_pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError):
        pooled(points(40))
    assert len(list(PROC.iterdir())) == before


@needs_proc
def test_workers_are_lean(pooled: ContextEnergy) -> None:
    pooled(points(4))
    maps = Path(f"/proc/{pooled.worker_pids[0]}/maps").read_text()
    assert "libOpenMM" in maps and "libtorch" not in maps


def test_worker_killed_between_batches(pooled: ContextEnergy) -> None:
    x = points(20)
    expected = pooled(x)
    victim, other = pooled.worker_pids
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"{victim} ended \(signal 9\)"):
        pooled(x)
    assert time.monotonic() - start < 5 and pooled.worker_pids == ()
    assert not running(victim) and not running(other)
    assert torch.equal(pooled(x), expected)


def test_worker_killed_under_way(at_once: None) -> None:
    with ContextEnergy(slow(), 300, workers=2) as energy:
        x = points(4, 2)
        expected = energy(x)
        victim, other = energy.worker_pids
        timer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        timer.start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=str(victim)):
            energy.value_and_gradient(points(100_000, 2))  # many minutes of work
        assert time.monotonic() - start < 10
        assert not running(victim) and not running(other)
        assert torch.equal(energy(x), expected)


def test_worker_that_cannot_make_a_context(at_once: None) -> None:
    system = chain()
    wrong = openmm.CustomExternalForce("x^2*missing")
    wrong.addParticle(0)
    system.addForce(wrong)
    energy = ContextEnergy(system, 300, workers=2)
    for _ in range(2):
        with pytest.raises(openmm.OpenMMException, match=r"missing.*worker process"):
            energy(points(4))
        assert energy.worker_pids == ()


def test_worker_that_dies_at_start(pooled: ContextEnergy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "openmm.py").write_text("raise ImportError('no such luck')")
    monkeypatch.syspath_prepend(tmp_path)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1.*no such luck"):
        pooled(points(4))
    assert time.monotonic() - start < 10
    monkeypatch.undo()
    assert torch.isfinite(pooled(points(4))).all()


def test_interpreter_that_is_missing(pooled: ContextEnergy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(OSError, match="nowhere"):
            pooled(points(4))
    assert torch.isfinite(pooled(points(4))).all()


def test_several_threads_may_ask(pooled: ContextEnergy) -> None:
    batches = [points(10, seed=seed) for seed in range(4)]
    expected = [ContextEnergy(chain(), 300)(x) for x in batches]
    found: list[torch.Tensor | None] = [None] * 4

    def ask(i: int) -> None:
        found[i] = pooled(batches[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SCRIPT = """
import os, sys, time, openmm, torch
from openmm_bg.energies import ContextEnergy, context
context._START_SECONDS = 0.0
print("once", flush=True)
system = openmm.System()
for _ in range(2):
    system.addParticle(1.0)
force = openmm.CustomBondForce("exp(-r)*sin(r)")
for _ in range({terms}):
    force.addBond(0, 1, [])
system.addForce(force)
energy = ContextEnergy(system, 300, workers=2, platform="Reference")
x = torch.rand({rows}, 2, 3, dtype=torch.float64)
energy(x[:4])
print(*energy.worker_pids, flush=True)
{rest}
"""


def start_script(tmp_path: Path, rest: str, terms: int = 1, rows: int = 10) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(rest=textwrap.dedent(rest), terms=terms, rows=rows))
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while any(running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(running(pid) for pid in pids)


def test_script_without_a_main_guard(tmp_path: Path) -> None:
    script = start_script(tmp_path, "print(torch.equal(energy(x), ContextEnergy(system, 300)(x)))")
    out, err = script.communicate(timeout=60)
    once, pids, equal = out.splitlines()
    assert (once, equal, script.returncode, err) == ("once", "True", 0, "")
    assert gone([int(pid) for pid in pids.split()])


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_parent_takes_its_workers_along(tmp_path: Path, number: int) -> None:
    script = start_script(tmp_path, "print('go', flush=True); energy(x)", terms=2000, rows=200_000)
    assert script.stdout.readline() == "once\n"
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2 and script.stdout.readline() == "go\n"
    time.sleep(0.2)
    os.kill(script.pid, number)
    _, err = script.communicate(timeout=20)
    assert script.returncode != 0 and ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert gone(pids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_process_leaves_the_workers_alone(tmp_path: Path) -> None:
    rest = """
        expected = energy(x)
        child = os.fork()
        if child == 0:
            same = torch.equal(energy(x), expected)
            del energy
            os._exit(0 if same else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        before = energy.worker_pids
        print(torch.equal(energy(x), expected), energy.worker_pids == before)
    """
    out, err = start_script(tmp_path, rest).communicate(timeout=60)
    assert out.splitlines()[2:] == ["0", "True True"], err


def test_platform_by_rule_and_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    seconds = {"Reference": 1.4, "CPU": 1.0}

    def measured(system: openmm.System, platform: str, *rest: object) -> float:
        asked.append(platform)
        return seconds[platform]

    monkeypatch.setattr(context, "_seconds_each", measured)
    monkeypatch.setattr(context, "_fastest", {})
    small = ContextEnergy(chain(), 300)
    small(points(3))
    assert small.platform == "Reference" and asked == []

    big, x = chain(100), points(2, 100)
    energy = ContextEnergy(big, 300)
    assert energy.platform == "CPU"
    energy(torch.full_like(x, torch.nan))  # nothing to measure with
    assert asked == []
    energy(x)
    assert asked == ["Reference", "CPU"] and energy.platform == "Reference"  # not faster by enough
    assert energy._local.context.getPlatform().getName() == "Reference"
    seconds["Reference"] = 2.0
    again = ContextEnergy(big, 300)
    again(x)
    assert len(asked) == 2 and again.platform == "Reference"  # remembered
    bonds = ContextEnergy(big, 300, forces=[0])
    bonds(x)
    assert len(asked) == 4 and bonds.platform == "CPU"  # another content
    assert copy.deepcopy(bonds).platform == "CPU"
    named = ContextEnergy(big, 300, forces=[2], platform="CPU")
    named(x)
    assert len(asked) == 4 and named.platform == "CPU"


@pytest.mark.parametrize("model", ["obc2", "gbn2"])
def test_measured_platform_of_a_custom_gb_force(model: str) -> None:
    from openmmtools.testsystems import AlanineDipeptideVacuum

    molecule = AlanineDipeptideVacuum(constraints=None)
    system = app.ForceField("amber14-all.xml", f"implicit/{model}.xml").createSystem(molecule.topology)
    x = torch.as_tensor(np.array([molecule.positions._value]))
    energy = ContextEnergy(system, 300)
    u = energy(x)
    assert energy.platform in ("Reference", "CPU")
    torch.testing.assert_close(u, ContextEnergy(system, 300, platform="Reference")(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_wrong_number_of_workers(workers: object) -> None:
    with pytest.raises(InputError, match="workers must be a positive integer"):
        ContextEnergy(chain(), 300, workers=workers)


def analytic(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(1)
    return (flat.sin() * flat.roll(1, -1).square()).sum(-1)


def from_elsewhere(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = analytic(x)
        return u.detach(), torch.autograd.grad(u.sum(), x)[0]


def test_second_derivatives_from_the_differentiable_form() -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        return known_gradient(from_elsewhere, x, analytic)

    x = points(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,)) and torch.autograd.gradgradcheck(energy, (x,))

    def product(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (slope,) = torch.autograd.grad(energy(x), x, v, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x, create_graph=True)[0]

    v = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (x, v))  # third derivatives
    # an upstream that depends on x itself, as in a loss that weights by the energy
    for function in (lambda u: u.square(), lambda u: (0.1 * u).exp()):
        results = []
        for form in (energy, analytic):
            (slope,) = torch.autograd.grad(function(form(x)).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(slope.square().sum(), x)[0])
        torch.testing.assert_close(*results)


def test_first_derivatives_do_not_call_the_differentiable_form() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    x = points(3, 2).requires_grad_()
    u = known_gradient(from_elsewhere, x, never)
    (slope,) = torch.autograd.grad(u.sum(), x)
    torch.testing.assert_close(slope, from_elsewhere(x)[1])
    with torch.no_grad():
        assert torch.equal(known_gradient(from_elsewhere, x, never), u)
