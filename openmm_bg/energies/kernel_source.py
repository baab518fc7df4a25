"""The C++ of a model: one function that computes energy and gradient of a conformation in a single pass.

The source depends on the formulas alone. Atoms, parameters and their number are data, so that all Systems of the same
kind share one compiled kernel. The same text compiles for vector registers, for plain numbers, and with nvcc for a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from openmm_bg.compilation import prelude
from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node
from openmm_bg.energies.kernel_text import AXES, Expressions, geometry, indent
from openmm_bg.energies.model import Coordinate, Model, PairwiseSums, Terms


@dataclass
class Columns:
    """A table the kernel reads: which parameter expressions make up its rows.

    Attributes
    ----------
    source : Terms or PairwiseSums
    role : str
        ``"rows"`` of Terms; for sums ``"first"`` (both orders of each pair), ``"atoms"``, or ``"paired"``.
    part : int
        Which of several ``"paired"`` energies.
    nodes : list of Node
        The expressions, one per column.
    """

    source: Terms | PairwiseSums
    role: str
    part: int = 0
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Source:
    """A kernel's text and the data it is called with, in the order of its argument lists.

    Attributes
    ----------
    text : str
    columns : list of Columns
    functions : list
        Tabulated functions that stay in the inner formulas.
    scratch : int
        Numbers of working memory for each conformation, per atom.
    """

    text: str
    columns: list[Columns]
    functions: list[object]
    scratch: int


def write(model: Model) -> Source:
    """The kernel of a model."""
    writer = _Writer()
    body = [line for terms in model.terms for line in writer.terms(terms)]
    body += [line for sums in model.sums for line in writer.sums(sums)]
    offset = f"constexpr int FUNCTIONS = {len(writer.columns)};  // tables of functions follow those of parameters"
    text = "\n".join((prelude(), offset, _HEAD, *("  " + line for line in body), _TAIL))
    return Source(text, writer.columns, writer.functions, 6 + writer.scratch)


# A conformation's numbers lie in M, entry k at AT(k): positions, gradient, then what the sums need.
_HEAD = """
#ifdef OPENMM_BG_SCALAR
#define AT(k) M[size_t(k) * lanes]
#else
#define AT(k) M[k]
#endif

template <bool GRADIENT>
DEVICE V conformation(V* __restrict__ M, const long lanes, const long atoms, const int* const* __restrict__ index,
                      const T* const* __restrict__ table, const long* __restrict__ count) {
  const V zero(T(0)), one(T(1));
  V u = zero;
  const long G = 3 * atoms;
  if (GRADIENT) for (long k = 0; k < 3 * atoms; ++k) AT(G + k) = zero;
  #define X(i, axis) AT(3 * size_t(i) + axis)
  #define D(i, axis) AT(G + 3 * size_t(i) + axis)"""

_TAIL = """  return u;
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// x, g (3 atoms, lanes); u (lanes); M (scratch, lanes)
template <bool GRADIENT>
__device__ void thread(const T* x, T* u, T* g, T* M, long lanes, long atoms, const int* const* index,
                       const T* const* table, const long* count) {
  const long lane = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (lane >= lanes) return;
  M += lane;
  for (long k = 0; k < 3 * atoms; ++k) AT(k) = x[k * lanes + lane];
  u[lane] = conformation<GRADIENT>(M, lanes, atoms, index, table, count);
  if (GRADIENT) for (long k = 0; k < 3 * atoms; ++k) g[k * lanes + lane] = AT(3 * atoms + k);
}
extern "C" __global__ void energy(const T* x, T* u, T* g, T* M, int lanes, int atoms, const int* const* index,
                                  const T* const* table, const long* count) {
  thread<false>(x, u, g, M, lanes, atoms, index, table, count);
}
extern "C" __global__ void gradient(const T* x, T* u, T* g, T* M, int lanes, int atoms, const int* const* index,
                                    const T* const* table, const long* count) {
  thread<true>(x, u, g, M, lanes, atoms, index, table, count);
}
#else
// x, g (rows, atoms, 3); u (rows); g may be null; both come out times `scale`
extern "C" int evaluate(const T* x, T* u, T* g, long rows, long atoms, long scratch, const int* const* index,
                        const T* const* table, const long* count, double scale, int threads) {
  const V factor{T(scale)};
  const long width = 3 * atoms, tiles = (rows + WIDTH - 1) / WIDTH;
  int failed = 0;
  #pragma omp parallel num_threads(threads) if (threads > 1)
  {
    V* M = static_cast<V*>(std::aligned_alloc(64, (scratch * sizeof(V) + 63) / 64 * 64));
    if (M == nullptr) {
      #pragma omp atomic write
      failed = 1;
    }
    T lanes[WIDTH];
    #pragma omp for schedule(dynamic)
    for (long tile = 0; tile < tiles; ++tile) {
      if (M == nullptr) continue;
      const long first = tile * WIDTH, filled = std::min<long>(WIDTH, rows - first);
      for (long k = 0; k < width; ++k) {
        for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = x[(first + (lane < filled ? lane : 0)) * width + k];
        M[k] = collect(lanes);
      }
      const V e = g != nullptr ? conformation<true>(M, 1, atoms, index, table, count)
                               : conformation<false>(M, 1, atoms, index, table, count);
      spread(e * factor, lanes);
      for (long lane = 0; lane < filled; ++lane) u[first + lane] = lanes[lane];
      if (g == nullptr) continue;
      for (long k = 0; k < width; ++k) {
        spread(M[width + k] * factor, lanes);
        for (long lane = 0; lane < filled; ++lane) g[(first + lane) * width + k] = lanes[lane];
      }
    }
    std::free(M);
  }
  return failed;
}
#endif
"""

_DISTANCE = {"r": "r", "1/r": "ri"}


class _Writer:
    def __init__(self) -> None:
        self.columns: list[Columns] = []
        self.functions: list[object] = []
        self.scratch = 0  # entries per atom beyond positions and gradient
        self.fresh = itertools.count()

    # ---- terms ------------------------------------------------------------------------------------------------

    def terms(self, terms: Terms) -> list[str]:
        slopes = {name: expression.derivative(terms.energy, name) for name in terms.coordinates}
        nodes, hoisted = expression.hoist([terms.energy, *slopes.values()], terms.coordinates)
        number = self.table(Columns(terms, "rows", nodes=list(hoisted.values())))
        width = terms.particles.shape[1]
        lines = [
            f"// {_comment(terms.label)}",
            f"for (long t = 0; t < count[{number}]; ++t) {{",
            f"  const int* a = index[{number}] + t * {width};",
            *self.load(number, "t", len(hoisted), "c"),
        ]
        names = {f"#{k}": f"c{k}" for k in range(len(hoisted))}
        backward: list[str] = []
        for k, (name, coordinate) in enumerate(terms.coordinates.items()):
            forward, back = geometry(coordinate, f"q{k}")
            lines += indent(forward)
            names |= {name: f"q{k}"} | ({f"1/{name}": f"q{k}i"} if coordinate.kind == "distance" else {})
            backward += [line.replace("$", f"q{k}_slope") for line in back]
        energy, *rest = nodes
        emitter = self.expressions(names)
        lines += indent([*emitter.lines([energy]), f"u = u + {emitter.name(energy)};"])
        lines.append("  if (GRADIENT) {")
        lines += indent(emitter.lines(rest), 2)
        lines += [f"    const V q{k}_slope = {emitter.name(slope)};" for k, slope in enumerate(rest)]
        return [*lines, *indent(backward, 2), "  }", "}"]

    # ---- sums over pairs --------------------------------------------------------------------------------------

    def sums(self, s: PairwiseSums) -> list[str]:
        values = [s.first[0], *(name for name, _ in s.further)]
        value_at = {name: f"6 * atoms + {self.scratch + k} * atoms" for k, name in enumerate(values)}
        adjoint_at = {name: f"6 * atoms + {self.scratch + len(values) + k} * atoms" for k, name in enumerate(values)}
        self.scratch += 2 * len(values)
        lines = [f"// {_comment(s.label)}: what each particle collects from the others"]
        for name in values:
            clear = f"AT({adjoint_at[name]} + i) = zero;"
            lines.append(f"for (long i = 0; i < atoms; ++i) {{ AT({value_at[name]} + i) = zero; {clear} }}")

        first, first_slope = s.first[1], expression.derivative(s.first[1], "r")
        lines += self.first_value(s, first, None, value_at, adjoint_at)
        lines += self.per_atom(s, values, value_at, adjoint_at)
        for part, (energy, _) in enumerate(s.paired):
            lines += self.paired(s, part, energy, values, value_at, adjoint_at)
        lines.append("if (GRADIENT) {")
        lines += indent(self.chain(s, values, value_at, adjoint_at))
        lines += indent(self.first_value(s, first, first_slope, value_at, adjoint_at))
        return [*lines, "}"]

    def first_value(
        self, s: PairwiseSums, value: Node, slope: Node | None, value_at: dict[str, str], adjoint_at: dict[str, str]
    ) -> list[str]:
        """The sum over neighbours, or its way back to the positions; each pair is seen once, in both orders."""
        (value_left, slope_left), hoisted = expression.hoist([value, expression.derivative(value, "r")], ["r"])
        if slope is None:
            self.first_table = self.table(Columns(s, "first", nodes=list(hoisted.values())))
        number, size = self.first_table, len(hoisted)
        name = s.first[0]
        forward, back = geometry(Coordinate("distance", (0, 1)), "r")
        lines = [
            f"for (long t = 0; t < count[{number}]; ++t) {{",
            f"  const int* a = index[{number}] + t * 2;",
            *indent(forward),
            *self.load(number, "2 * t", size, "c"),
            *self.load(number, "2 * t + 1", size, "d"),
        ]
        emitted = []
        for letter in "cd":
            emitter = self.expressions(_DISTANCE | {f"#{k}": f"{letter}{k}" for k in range(size)})
            lines += indent(emitter.lines([value_left if slope is None else slope_left]))
            emitted.append(emitter.name(value_left if slope is None else slope_left))
        if slope is None:
            at = value_at[name]
            lines += [f"  AT({at} + a[{k}]) = AT({at} + a[{k}]) + {e};" for k, e in enumerate(emitted)]
        else:
            at = adjoint_at[name]
            lines.append(f"  const V slope = AT({at} + a[0]) * {emitted[0]} + AT({at} + a[1]) * {emitted[1]};")
            lines += indent([line.replace("$", "slope") for line in back])
        return [*lines, "}"]

    def own(self, s: PairwiseSums, values: list[str]) -> list[str]:
        """The variables of a particle: its values and its position."""
        return [*values, *(axis for axis in AXES if axis not in s.parameters and axis not in values)]

    def per_atom(
        self, s: PairwiseSums, values: list[str], value_at: dict[str, str], adjoint_at: dict[str, str]
    ) -> list[str]:
        """Further values and single-particle energies, and what the latter say of the values."""
        inner = self.own(s, values)
        energy = sum(s.single, expression.number(0.0))
        slopes = {name: expression.derivative(energy, name) for name in inner}
        further = {
            (k, name): expression.derivative(node, name) for k, (_, node) in enumerate(s.further) for name in inner
        }
        nodes = [*(node for _, node in s.further), energy, *slopes.values(), *further.values()]
        left, hoisted = expression.hoist(nodes, inner)
        count = len(s.further)
        self.atom_nodes = (left[:count], dict(zip(further, left[count + 1 + len(inner) :], strict=True)), len(hoisted))
        self.atom_table = self.table(Columns(s, "atoms", nodes=list(hoisted.values())))
        lines, emitter = self.begin_atom(s, values, value_at, len(hoisted))
        for name, node in zip(values[1:], left[:count], strict=True):
            lines += indent(emitter.lines([node]))
            lines.append(f"  const V v{values.index(name)} = {emitter.name(node)};")
            lines.append(f"  AT({value_at[name]} + i) = v{values.index(name)};")
        lines += indent([*emitter.lines([left[count]]), f"u = u + {emitter.name(left[count])};"])
        lines.append("  if (GRADIENT) {")
        own = left[count + 1 : count + 1 + len(inner)]
        lines += indent(emitter.lines(own), 2)
        for name, node in zip(inner, own, strict=True):
            if not expression.is_number(node, 0):
                place = f"AT({adjoint_at[name]} + i)" if name in values else f"D(i, {AXES.index(name)})"
                lines.append(f"    {place} = {place} + {emitter.name(node)};")
        return [*lines, "  }", "}"]

    def begin_atom(
        self, s: PairwiseSums, values: list[str], value_at: dict[str, str], size: int, all_values: bool = False
    ) -> tuple[list[str], Expressions]:
        lines = ["for (long i = 0; i < atoms; ++i) {", *self.load(self.atom_table, "i", size, "c")]
        names = {f"#{k}": f"c{k}" for k in range(size)}
        names |= {name: f"v{k}" for k, name in enumerate(values)}
        for k, name in enumerate(values if all_values else values[:1]):
            lines.append(f"  const V v{k} = AT({value_at[name]} + i);")
        for axis in self.own(s, values)[len(values) :]:
            lines.append(f"  const V p{axis} = X(i, {AXES.index(axis)}); (void)p{axis};")
            names[axis] = f"p{axis}"
        return lines, self.expressions(names)

    def paired(
        self,
        s: PairwiseSums,
        part: int,
        energy: Node,
        values: list[str],
        value_at: dict[str, str],
        adjoint_at: dict[str, str],
    ) -> list[str]:
        inner = ["r", *(f"{name}{k}" for name in values for k in (1, 2))]
        slopes = [expression.derivative(energy, name) for name in inner]
        (energy, *slopes), hoisted = expression.hoist([energy, *slopes], inner)
        number = self.table(Columns(s, "paired", part, list(hoisted.values())))
        forward, back = geometry(Coordinate("distance", (0, 1)), "r")
        lines = [
            f"for (long t = 0; t < count[{number}]; ++t) {{",
            f"  const int* a = index[{number}] + t * 2;",
            *indent(forward),
            *self.load(number, "t", len(hoisted), "c"),
        ]
        names = _DISTANCE | {f"#{k}": f"c{k}" for k in range(len(hoisted))}
        used = expression.variables(energy, *slopes)
        for k, name in enumerate(values):
            for side in (1, 2):
                names[f"{name}{side}"] = f"v{k}_{side}"
                if f"{name}{side}" in used:
                    lines.append(f"  const V v{k}_{side} = AT({value_at[name]} + a[{side - 1}]);")
        emitter = self.expressions(names)
        lines += indent([*emitter.lines([energy]), f"u = u + {emitter.name(energy)};"])
        lines.append("  if (GRADIENT) {")
        lines += indent(emitter.lines(slopes), 2)
        for name, slope in list(zip(inner, slopes, strict=True))[1:]:
            if not expression.is_number(slope, 0):
                place = f"AT({adjoint_at[name[:-1]]} + a[{int(name[-1]) - 1}])"
                lines.append(f"    {place} = {place} + {emitter.name(slope)};")
        lines.append(f"    const V slope = {emitter.name(slopes[0])};")
        return [*lines, *indent([line.replace("$", "slope") for line in back], 2), "  }", "}"]

    def chain(
        self, s: PairwiseSums, values: list[str], value_at: dict[str, str], adjoint_at: dict[str, str]
    ) -> list[str]:
        """From the later values back to the first, particle by particle."""
        if not s.further:
            return []
        _, further, size = self.atom_nodes
        lines, emitter = self.begin_atom(s, values, value_at, size, all_values=True)
        lines += [f"  V w{k} = AT({adjoint_at[name]} + i);" for k, name in enumerate(values)]
        for k in reversed(range(len(s.further))):
            for name in self.own(s, values):
                slope = further[k, name]
                if expression.is_number(slope, 0):
                    continue
                lines += indent(emitter.lines([slope]))
                place = f"w{values.index(name)}" if name in values else f"D(i, {AXES.index(name)})"
                lines.append(f"  {place} = {place} + w{k + 1} * {emitter.name(slope)};")
        return [*lines, f"  AT({adjoint_at[values[0]]} + i) = w0;", "}"]

    # ---- tables -----------------------------------------------------------------------------------------------

    def table(self, columns: Columns) -> int:
        self.columns.append(columns)
        return len(self.columns) - 1

    def load(self, number: int, row: str, size: int, letter: str) -> list[str]:
        pointer = f"{letter}_row"
        lines = [f"  const T* {pointer} = table[{number}] + ({row}) * {size}; (void){pointer};"]
        return lines + [f"  const V {letter}{k}({pointer}[{k}]);" for k in range(size)]

    def expressions(self, names: dict[str, str]) -> Expressions:
        return Expressions(names, self.fresh, self.function)

    def function(self, function: object) -> int:
        for k, known in enumerate(self.functions):
            if known is function:
                return k
        self.functions.append(function)
        return len(self.functions) - 1


def _comment(label: str) -> str:
    return "".join(c if c.isalnum() or c in " _-" else " " for c in label)
