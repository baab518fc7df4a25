"""The compiled kernel against the plain torch form of the same model, and how it is built and kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from openmm_bg import compilation
from openmm_bg.compilation import NoCompiler
from openmm_bg.energies import kernel_source
from openmm_bg.energies.eager_sums import SumsEnergy
from openmm_bg.energies.eager_terms import TermsEnergy
from openmm_bg.energies.kernel import Kernel
from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import Coordinate, Model, PairwiseSums, Terms

ATOMS = 6
COORDINATES = {
    "r": Coordinate("distance", (0, 1)),
    "theta": Coordinate("angle", (0, 1, 2)),
    "phi": Coordinate("dihedral", (0, 1, 2, 3)),
    "height": Coordinate("z", (3,)),
}


def quadruples(generator: np.random.Generator, rows: int) -> np.ndarray:
    return np.array([generator.permutation(ATOMS)[:4] for _ in range(rows)])


def terms(text: str, seed: int = 0) -> Terms:
    generator = np.random.default_rng(seed)
    rows = 7
    return Terms(
        "anything at all; even */ this",
        quadruples(generator, rows),
        COORDINATES,
        {"k": generator.normal(size=rows), "n": generator.integers(1, 4, rows).astype(float)},
        parse(text),
    )


def sums() -> PairwiseSums:
    generator = np.random.default_rng(5)
    pairs = np.stack(np.triu_indices(ATOMS, 1), 1)
    return PairwiseSums(
        "collected",
        {"q": generator.normal(size=ATOMS), "s": generator.uniform(0.5, 1, ATOMS)},
        pairs[:-2],
        ("I", parse("s1*exp(-r*s2)/(r+s2)")),
        [("B", parse("1/(1+I^2*s)+0.1*x*z")), ("C", parse("B*I+y+lambda"))],
        [parse("q^2/B+C*z"), parse("I*lambda")],
        [(parse("q1*q2/sqrt(r^2+B1*B2*exp(-r^2/(B1*B2)))"), pairs), (parse("(C1+C2)*r"), pairs[3:])],
    )


EXPRESSIONS = [
    "k*(r-n)^2",
    "k*(1+cos(n*phi-k))+theta^3",
    "select(step(r-1), k/r^6, r^2)*exp(-height^2)",
    "k*abs(sin(phi))+min(r,theta)*max(height,k)+floor(3*r)+ceil(r)+delta(n-1)*r",
    "sqrt(1+r^2)+log(1+r)+tan(theta/3)+asin(r/9)+acos(height/9)+atan(phi)+atan2(r,theta)",
    "sinh(k)*sinh(r)+cosh(height)+tanh(phi)+erf(r)+erfc(theta)+r^1.7+recip(1+r)+square(r)+cube(height)",
    "1/sin(1+theta/4)+sec(theta/4)+csc(1+theta/4)+cot(1+theta/4)+lambda*step(phi)*r",
    "7.5",
]
GLOBALS = {"lambda": 0.7}


def points(rows: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=(rows, ATOMS, 3))).to(dtype)


def plain(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [TermsEnergy(t, GLOBALS) for t in model.terms] + [SumsEnergy(s, GLOBALS) for s in model.sums]
    x = x.detach().requires_grad_()
    u = sum(part(x.permute(1, 2, 0).contiguous()) for part in parts)
    (gradient,) = torch.autograd.grad(u.sum(), x, materialize_grads=True)
    return u.detach(), gradient


def whole() -> Model:
    return Model(ATOMS, [terms(text, k) for k, text in enumerate(EXPRESSIONS)], [sums()], dict(GLOBALS))


@pytest.fixture(scope="module")
def compiled() -> Kernel:
    return Kernel(whole(), GLOBALS)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 100])
def test_kernel_is_the_plain_form(compiled: Kernel, rows: int) -> None:
    x = points(rows)
    u, g = compiled(x, True)
    expected, gradient = plain(compiled.model, x)
    torch.testing.assert_close(u, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(g, gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))
    alone, nothing = compiled(x, False)
    assert nothing is None
    torch.testing.assert_close(alone, u, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_each_expression(text: str) -> None:
    """The scalar form of the source, the one a GPU compiles, agrees as well."""
    model = Model(ATOMS, [terms(text)], [], dict(GLOBALS))
    x = points(9)
    expected, gradient = plain(model, x)
    u, g = scalar(model, x)
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, gradient, rtol=1e-10, atol=1e-10)


def test_scalar_form_of_sums() -> None:
    model = Model(ATOMS, [], [sums()], dict(GLOBALS))
    x = points(5)
    for ours, theirs in zip(scalar(model, x), plain(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def scalar(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel compiled with OPENMM_BG_SCALAR, as on a GPU one conformation at a time."""
    built = Kernel(model, GLOBALS)
    built.source.text = "#define OPENMM_BG_SCALAR\n" + built.source.text
    u, g = built(x, True)
    assert g is not None
    return u, g


def test_single_precision_and_threads(compiled: Kernel) -> None:
    x = points(300)
    u, g = compiled(x, True)
    one = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again, g_again = compiled(x, True)
    finally:
        torch.set_num_threads(one)
    assert torch.equal(u, again) and torch.equal(g, g_again)
    u32, g32 = compiled(x.float(), True)
    assert u32.dtype == g32.dtype == torch.float32
    assert float(((u32 - u).abs() / (1 + u.abs())).median()) < 1e-5
    u16, _ = compiled(x.to(torch.bfloat16), False)
    assert u16.dtype == torch.float32


def test_bad_rows_stay_alone(compiled: Kernel) -> None:
    x = points(20)
    u, g = compiled(x, True)
    bad = x.clone()
    bad[3, 2, 1] = torch.nan
    bad[7, :] = 0.0
    bad[11, 0, 0] = torch.inf
    v, h = compiled(bad, True)
    fine = [k for k in range(20) if k not in (3, 7, 11)]
    assert torch.equal(u[fine], v[fine]) and torch.equal(g[fine], h[fine])
    assert not torch.isfinite(v[[3, 7, 11]]).any()


def test_global_parameters_need_no_new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Kernel(whole(), GLOBALS)
    x = points(4)
    before, _ = built(x, False)
    monkeypatch.setattr(compilation, "_compile", lambda *_: pytest.fail("compiled again"))
    built.set_global_parameters({"lambda": -2.0})
    after, _ = built(x, False)
    other = Kernel(whole(), {"lambda": -2.0})
    assert torch.equal(after, other(x, False)[0])
    assert not torch.equal(before, after)
    assert built.source.text == other.source.text


def test_source_does_not_depend_on_the_numbers() -> None:
    first, second = terms("k*r^2", 0), terms("k*r^2", 1)
    assert kernel_source.write(Model(ATOMS, [first])).text == kernel_source.write(Model(9, [second])).text


def test_compiled_once_per_machine(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMM_BG_CACHE", str(tmp_path))
    compilation.library.cache_clear()
    try:
        Kernel(Model(ATOMS, [terms("k*r^4")]), {})(points(1), True)
        (first,) = os.listdir(str(tmp_path))
        compilation.library.cache_clear()
        monkeypatch.setattr(compilation, "_compile", lambda *_: pytest.fail("compiled again"))
        Kernel(Model(ATOMS, [terms("k*r^4", 3)]), {})(points(1), True)
        assert os.listdir(str(tmp_path)) == [first]
    finally:
        compilation.library.cache_clear()


def test_a_broken_file_in_the_cache_is_made_again(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMM_BG_CACHE", str(tmp_path))
    compilation.library.cache_clear()
    model, x = Model(ATOMS, [terms("k*r^3")]), points(2)
    try:
        expected, _ = Kernel(model, {})(x, True)
        (name,) = os.listdir(str(tmp_path))
        compilation.library.cache_clear()
        path = os.path.join(str(tmp_path), name)
        os.remove(path)
        with open(path, "wb") as stream:
            stream.write(b"not a library")
        assert torch.equal(Kernel(model, {})(x, True)[0], expected)
    finally:
        compilation.library.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler(compiler: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMM_BG_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    compilation.library.cache_clear()
    compilation._command.cache_clear()
    try:
        with pytest.raises(NoCompiler):
            Kernel(Model(ATOMS, [terms("k*r^4")]), {})(points(1), True)
    finally:
        compilation.library.cache_clear()
        compilation._command.cache_clear()


def test_processes_may_compile_at_once(tmp_path: object) -> None:
    code = (
        "import numpy as np, torch\n"
        "from openmm_bg.energies.kernel import Kernel\n"
        "from openmm_bg.energies.lepton import parse\n"
        "from openmm_bg.energies.model import *\n"
        "t = Terms('t', np.array([[0, 1]]), {'r': Coordinate('distance', (0, 1))}, {}, parse('r^2'))\n"
        "u, _ = Kernel(Model(2, [t]), {})(torch.tensor([[[0., 0, 0], [3, 0, 0]]]), False)\n"
        "assert float(u) == 9.0, u\n"
    )
    environment = os.environ | {"OPENMM_BG_CACHE": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(os.listdir(str(tmp_path))) == 1


def test_threads_share_a_kernel(compiled: Kernel) -> None:
    """The interpreter's lock is released while a kernel runs: working memory must not be shared."""
    x = points(200)
    expected, _ = compiled(x, False)
    results: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(compiled(x, False)[0])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


def test_empty_batch(compiled: Kernel) -> None:
    u, g = compiled(points(0), True)
    assert u.shape == (0,) and g is not None and g.shape == (0, ATOMS, 3)


def test_library_takes_pointers() -> None:
    """ctypes passes ints as 32 bits unless told otherwise; sizes beyond that must arrive."""
    assert ctypes.sizeof(ctypes.c_long) == 8
