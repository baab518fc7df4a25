"""The compiled placement of atoms and its adjoint against torch operations and their autograd."""

from __future__ import annotations

import copy
import ctypes
import pickle

import numpy as np
import pytest
import torch

from openmm_bg import compilation
from openmm_bg.coordinates import InternalCoordinates, ZMatrix, placement
from openmm_bg.coordinates.placement import Placement

# Rows whose references are no parent and grandparent: siblings as angle atoms, and chains of torsion references.
TANGLED = ZMatrix((1, 0, 2), np.array([[3, 0, 1, 2], [5, 3, 2, 1], [4, 1, 3, 5], [7, 5, 4, 0], [6, 4, 7, 3]]))

# What CUDA gives its kernels, for a host's compiler; the threads of a grid one after the other.
SHIM = """
#include <cmath>
#define __CUDACC_RTC__
#define __device__
#define __global__
using std::floor, std::ceil, std::exp, std::log, std::sin, std::cos, std::tan, std::asin, std::acos, std::atan;
using std::atan2, std::sinh, std::cosh, std::tanh, std::erf, std::erfc, std::pow, std::sqrt, std::fabs;
struct Index { int x; };
static Index blockIdx, blockDim{1}, threadIdx{0};
"""
GRID = """
#define PASS(array) array, array##_row, array##_step
extern "C" void place_grid(IN(q), IN(frame), int framed, OUT(x), bool* defined, const int* z, int atoms, int rows) {
  for (blockIdx.x = 0; blockIdx.x < rows + 3; ++blockIdx.x)
    place_batch(PASS(q), PASS(frame), framed, PASS(x), defined, z, atoms, rows);
}
extern "C" void pull_back_grid(IN(q), IN(frame), int framed, IN(x), OUT(g), OUT(slope), OUT(turn), const int* z,
                               int atoms, int rows) {
  for (blockIdx.x = 0; blockIdx.x < rows + 3; ++blockIdx.x)
    pull_back_batch(PASS(q), PASS(frame), framed, PASS(x), PASS(g), PASS(slope), PASS(turn), z, atoms, rows);
}
"""


def shapes(zmatrix: ZMatrix, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    n = zmatrix.num_atoms
    scale = torch.tensor([0.1] * (n - 1) + [1.5] * (n - 2) + [6.0] * (n - 3), dtype=torch.float64)
    return ((0.7 + 0.6 * torch.rand(rows, 3 * n - 6, generator=generator, dtype=torch.float64)) * scale).to(dtype)


def turns(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(rows, 3, 3, generator=generator, dtype=torch.float64))[0].to(dtype)


def both(place, full, rotation=None):
    """Positions, whether they are defined, and the gradients of a random projection."""
    leaves = [t.detach().requires_grad_() for t in (full, rotation) if t is not None]
    x, defined = place(*leaves, *[None] * (2 - len(leaves)))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    return x.detach(), defined, *torch.autograd.grad(x, leaves, weights)


def assert_same(ours, theirs, tolerance=1e-12):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        scale = 1.0 if mine.dtype == torch.bool else float(other.abs().max())
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * scale)


def test_every_molecule(molecule):
    elements, bonds = molecule
    zmatrix = ZMatrix.from_bonds(len(elements), bonds, elements)
    place, full = Placement(zmatrix), shapes(zmatrix, 9)
    for rotation in (None, turns(9)):
        assert_same(both(place, full, rotation), both(place.plain, full, rotation))
    assert place.compiled


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 300])
def test_references_that_are_no_tree(rows):
    place = Placement(TANGLED)
    full = shapes(TANGLED, rows)
    for rotation in (None, turns(rows)):
        mine, theirs = both(place, full, rotation), both(place.plain, full, rotation)
        if rows:
            assert_same(mine, theirs)
        else:
            assert [t.shape for t in mine] == [t.shape for t in theirs]


def test_the_arithmetic_of_a_gpu(monkeypatch):
    """The same text with plain numbers for registers."""
    monkeypatch.setattr(
        placement, "_text", lambda: "#define OPENMM_BG_SCALAR\n" + compilation.prelude() + placement.SOURCE
    )
    place, full, rotation = Placement(TANGLED), shapes(TANGLED, 5), turns(5)
    assert_same(both(place, full, rotation), both(place.plain, full, rotation))


def test_the_kernels_of_a_gpu():
    """The CUDA text, compiled and run by the host, thread by thread; some threads find no row left."""
    library = compilation.library(SHIM + compilation.prelude() + placement.SOURCE + GRID, "double")
    place, full, rotation = Placement(TANGLED), shapes(TANGLED, 5), turns(5).contiguous()

    def run(name, *arguments):
        flat = [number for group in arguments for number in group] + [place.table, place.num_atoms, len(full)]
        getattr(library, name)(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in flat))

    expected = both(place.plain, full, rotation)
    x, defined = torch.empty(5, 8, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.bool)
    given = [*placement._strided(full), *placement._strided(rotation), 1]
    run("place_grid", given, placement._strided(x), [defined])
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = g.flatten(1).t().contiguous().t()
    slope, turn = torch.empty_like(full), torch.empty_like(rotation)
    run("pull_back_grid", given, *map(placement._strided, (x, columns, slope, turn)))
    assert_same((x, defined, slope, turn), expected)


def test_layouts_and_expanded_tensors():
    place = Placement(TANGLED)
    full, rotation = shapes(TANGLED, 20), turns(1)
    columns = full.t().contiguous().t()
    every_second = torch.stack([full, torch.full_like(full, torch.nan)], 1).flatten(0, 1)[::2]
    expected = both(place, full, rotation)
    for other in (columns, every_second):
        assert_same(both(place, other, rotation.mT.contiguous().mT), expected, 0)
    leaf = full.clone().requires_grad_()
    (mine,) = torch.autograd.grad(place(leaf)[0].sum(), leaf)  # an expanded gradient
    (other,) = torch.autograd.grad(place.plain(leaf, None)[0].sum(), leaf)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_single_precision_and_threads():
    place = Placement(TANGLED)
    full = shapes(TANGLED, 1000)
    mine = both(place, full.float())
    assert mine[0].dtype == mine[2].dtype == torch.float32
    for ours, exact in zip(mine, both(place, full), strict=True):
        assert ((ours - exact.to(ours)).abs() <= 1e-4 * exact.abs().max()).all() if ours.is_floating_point() else True
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(both(place, full))
    finally:
        torch.set_num_threads(before)
    assert_same(*results, 0)
    half, _ = place(full.to(torch.bfloat16))  # no kernel for it
    assert half.dtype == torch.bfloat16 and place.compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collinear_references_are_flagged_and_finite(dtype):
    zmatrix = ZMatrix((0, 1, 2), np.array([[3, 1, 0, 2], [4, 3, 1, 2]]))
    line = torch.tensor([[0.1, 0.1, 0.1, 0.1, torch.pi / 2, torch.pi / 2, 1.5, torch.pi, 1.0]], dtype=torch.float64)
    full = torch.cat([shapes(zmatrix, 30), line]).to(dtype)
    place = Placement(zmatrix)
    x, defined, gradient = both(place, full)
    assert defined[:-1].all() and not defined[-1]
    assert x.isfinite().all() and gradient.isfinite().all()
    assert torch.equal(defined, place.plain(full, None)[1])


def test_second_derivatives():
    zmatrix = ZMatrix.from_bonds(4, [(0, 1), (1, 2), (2, 3)], "CCCC")
    place, full, rotation = Placement(zmatrix), shapes(zmatrix, 2).requires_grad_(), turns(2)

    def positions(full, rotation):
        return place(full, rotation)[0]

    assert torch.autograd.gradcheck(positions, (full, rotation.requires_grad_()))
    assert torch.autograd.gradgradcheck(positions, (full, rotation))
    # a frame that depends on the coordinates, too: no path is taken twice
    assert torch.autograd.gradgradcheck(lambda q: positions(q, rotation.detach() * q[:, :1, None]), full)


def test_copies():
    coordinates = InternalCoordinates(TANGLED)
    q = shapes(TANGLED, 3)
    x, _ = coordinates.inverse(q)
    for other in (copy.deepcopy(coordinates), pickle.loads(pickle.dumps(coordinates))):
        assert torch.equal(other.inverse(q)[0].nan_to_num(), x.nan_to_num())


def test_compile_is_an_option(monkeypatch):
    monkeypatch.setattr(placement, "_run", lambda *_: pytest.fail("compiled"))
    place = Placement(TANGLED, compile=False)
    assert place(shapes(TANGLED, 3))[1].all()
    InternalCoordinates(TANGLED, compile=False).inverse(shapes(TANGLED, 3))


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENMM_BG_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    compilation.library.cache_clear()
    compilation._command.cache_clear()
    try:
        place, full = Placement(TANGLED), shapes(TANGLED, 3)
        with pytest.warns(UserWarning, match=r"not compiled.*no C\+\+ compiler") as record:
            result = both(place, full)
            place(full)
        assert len(record) == 1
        assert_same(result, both(place.plain, full), 0)
    finally:
        compilation.library.cache_clear()
        compilation._command.cache_clear()


# the same text runs on the host in the tests above; launches and capture need the device itself
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_and_in_a_graph():
    place = Placement(TANGLED)
    full, rotation = shapes(TANGLED, 100), turns(100)
    expected = both(place, full, rotation)
    place = place.cuda()
    full, rotation = full.cuda(), rotation.cuda()
    assert_same([t.cpu() for t in both(place, full, rotation)], expected)
    still = full.clone().requires_grad_()
    x, _ = place(still)
    torch.autograd.grad(x.square().sum(), still)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, _ = place(still)
        (slope,) = torch.autograd.grad(x.square().sum(), still)
    with torch.no_grad():
        still.copy_(full.flip(0))
    graph.replay()
    leaf = full.flip(0).cpu().requires_grad_()
    (other,) = torch.autograd.grad(Placement(TANGLED)(leaf)[0].square().sum(), leaf)
    torch.testing.assert_close(slope.cpu(), other, rtol=1e-11, atol=1e-12)
