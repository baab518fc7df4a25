"""Velocity fields of continuous flows, with exact divergences that cost no more than the field itself.

The networks here have two hidden layers, and that is a choice: for ``v(x) = W3 s2(W2 s1(W1 x))`` with elementwise s1
and s2 the trace of the Jacobian is a bilinear form of the two vectors of slopes,

    div v = s2'^T (W2 * (W1 W3)^T) s1',

with an elementwise product of two matrices that do not depend on x. So the exact divergence costs one more product with
a matrix of the size of W2, in any number of dimensions, where automatic differentiation needs one pass per dimension.
Time enters through biases and gains, which are elementwise and change nothing in this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError

Activation = Literal["silu", "sin"]


class VelocityField(nn.Module):
    """A time-dependent vector field on R^d, on a torus, or on a product of both.

    A subclass sets ``dimension`` and writes :meth:`forward`; it should override :meth:`with_divergence` where it knows
    a closed form.

    Attributes
    ----------
    dimension : int
    """

    def __init__(self, dimension: int):
        super().__init__()
        self.dimension = dimension

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocities ``(batch, dimension)`` at times ``()`` or ``(batch,)`` and points ``(batch, dimension)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(t, x).")

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities and their exact divergences ``(batch,)``: here by one backward pass per dimension."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = self(t, x)
            divergence = x.new_zeros(len(x))
            for i in range(self.dimension):
                (row,) = torch.autograd.grad(v[:, i].sum(), x, create_graph=keep, retain_graph=True)
                divergence = divergence + row[:, i]
        return (v, divergence) if keep else (v.detach(), divergence.detach())

    def hutchinson(self, t: Tensor, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities and the estimate ``probe . J probe`` of the divergence, one backward pass (Hutchinson, 1990).

        Unbiased for probes ``(batch, dimension)`` of independent entries with mean 0 and variance 1.
        """
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = self(t, x)
            (product,) = torch.autograd.grad((v * probe).sum(), x, create_graph=keep)
        estimate = (product * probe).sum(-1)
        return (v, estimate) if keep else (v.detach(), estimate.detach())


class TimeWindows(nn.Module):
    """Smooth functions of time: overlapping Gaussian windows on [0, 1] that sum to one, times learnable rows.

    Parameters
    ----------
    windows : int
        At least 2; neighbours are ``1 / (windows - 1)`` apart, which is also their width.
    sizes : sequence of int
        One output of that many numbers for each; all zero at initialisation.
    """

    def __init__(self, windows: int, sizes: Sequence[int]):
        super().__init__()
        self.sizes = list(sizes)
        self.register_buffer("centre", torch.linspace(0, 1, windows), persistent=False)
        self.rows = nn.Parameter(torch.zeros(windows, sum(sizes)))

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """Times ``()`` or ``(batch,)`` to outputs ``(1 or batch, size)``."""
        distance = (t.reshape(-1, 1) - self.centre) * (len(self.centre) - 1)
        return (torch.softmax(-0.5 * distance.square(), -1) @ self.rows).split(self.sizes, -1)


class Trunk(nn.Module):
    """Two hidden layers whose biases and gains follow time; a matrix of outputs.

    Parameters
    ----------
    dimension, outputs : int
    hidden : int
        Units of either layer; per lattice site where ``circulant``.
    windows : int
        Of :class:`TimeWindows`.
    circular : sequence of bool, optional
        True for angles: they enter as cosines and sines of 1 to ``order`` times themselves.
    circulant : bool
        The dimensions are sites of a periodic chain, and all weights are shared between sites.
    first : {"silu", "sin"}
        Activation of the first layer. Sines with weights of a tenth of ``bandwidth`` up to all of it resolve structure
        down to 1 / bandwidth (random Fourier features that learn).
    """

    def __init__(
        self,
        dimension: int,
        outputs: int,
        hidden: int,
        *,
        windows: int = 12,
        circular: Sequence[bool] | None = None,
        order: int = 3,
        circulant: bool = False,
        first: Activation = "silu",
        bandwidth: float = 1.0,
        generator: torch.Generator,
    ):
        super().__init__()
        for name, value, least in (("dimension", dimension, 1), ("hidden", hidden, 1), ("windows", windows, 2)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if first not in get_args(Activation):
            raise InputError(f"There is no activation {first!r}; choose one of {', '.join(get_args(Activation))}.")
        mask = (
            torch.zeros(dimension, dtype=torch.bool) if circular is None else torch.tensor([bool(c) for c in circular])
        )
        if len(mask) != dimension:
            raise InputError(f"circular must have {dimension} entries, one per dimension, not {len(mask)}.")
        if circulant and (bool(mask.any()) or outputs not in (1, dimension)):
            raise InputError("A circulant network takes no angles.")
        self.dimension, self.outputs, self.order, self.circulant, self.first = (
            dimension,
            outputs,
            order,
            circulant,
            first,
        )
        self.register_buffer("real_index", (~mask).nonzero()[:, 0], persistent=False)
        self.register_buffer("angle_index", mask.nonzero()[:, 0], persistent=False)
        inputs = len(self.real_index) + 2 * order * len(self.angle_index)
        channels = hidden
        self.sites = dimension if circulant else 1
        fan_in, width = (dimension if circulant else inputs), channels * (dimension if circulant else 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # a bandwidth is in units of one coordinate: sines then see frequencies of that size along every direction
        if first == "sin":
            # a decade of scales, because a path starts smooth and ends sharp
            size = bandwidth * 10 ** -torch.rand(channels, *(1,) * (2 if circulant else 1), generator=generator)
        else:
            size = torch.tensor(bandwidth / math.sqrt(max(1, fan_in)))
        columns = 1 if circulant else inputs
        lags = (dimension,) if circulant else ()
        self.weight1 = nn.Parameter(size * normal(channels, columns, *lags))
        self.weight2 = nn.Parameter(normal(channels, channels, *lags) / math.sqrt(width))
        rows = outputs // self.sites if outputs == dimension else 1
        self.weight3 = nn.Parameter(torch.zeros(rows, channels, *(lags if outputs == dimension else ())))
        phase = 2 * math.pi if first == "sin" else 1.0
        self.bias1 = nn.Parameter(phase * (torch.rand(channels, generator=generator) - 0.5))
        self.bias2 = nn.Parameter(torch.zeros(channels))
        self.time = TimeWindows(windows, [channels] * 4)
        if circulant:
            site = torch.arange(dimension)
            self.register_buffer("lag", (site[:, None] - site) % dimension, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dense weights ``(h, inputs)``, ``(h, h)``, ``(outputs, h)``; with sites shared, h runs over sites first."""
        if not self.circulant:
            return self.weight1, self.weight2, self.weight3
        w1, w2 = (self._spread(w) for w in (self.weight1, self.weight2))
        if self.outputs == self.dimension:
            return w1, w2, self._spread(self.weight3)
        return w1, w2, self.weight3.repeat(1, self.sites)

    def _spread(self, kernel: Tensor) -> Tensor:
        rows, columns, _ = kernel.shape
        block = kernel[:, :, self.lag]  # rows, columns, site, site
        return block.permute(2, 0, 3, 1).reshape(self.sites * rows, self.sites * columns)

    def features(self, x: Tensor) -> Tensor:
        if not len(self.angle_index):
            return x
        multiples = x[:, self.angle_index, None] * torch.arange(1, self.order + 1, dtype=x.dtype, device=x.device)
        return torch.cat([x[:, self.real_index], multiples.cos().flatten(1), multiples.sin().flatten(1)], -1)

    def hidden(self, t: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First-layer values and slopes, second-layer values and slopes, all ``(batch, h)``."""
        rows = [row.repeat(1, self.sites) if self.circulant else row for row in self.time(t)]
        bias1, gain1, bias2, gain2 = rows
        if self.circulant:
            fixed1, fixed2 = self.bias1.repeat(self.sites), self.bias2.repeat(self.sites)
        else:
            fixed1, fixed2 = self.bias1, self.bias2
        z1, slope1 = activate(self.features(x) @ w1.T + (fixed1 + bias1), self.first)
        gain1, gain2 = 1 + gain1, 1 + gain2
        z1, slope1 = z1 * gain1, slope1 * gain1
        z2, slope2 = activate(z1 @ w2.T + (fixed2 + bias2), "silu")
        return z1, slope1, z2 * gain2, slope2 * gain2

    def trace(self, x: Tensor, slope1: Tensor, slope2: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """The sum over dimensions of the derivative of each output by its own input, ``(batch,)``."""
        real = len(self.real_index)
        through = w1[:, :real] @ w3[self.real_index]
        divergence = ((slope1 @ (w2 * through.T).T) * slope2).sum(-1)
        # the features of an angle depend on x, so each angle takes its own forward derivative
        for number, index in enumerate(self.angle_index.tolist()):
            order = torch.arange(1, self.order + 1, dtype=x.dtype, device=x.device)
            multiples = x[:, index, None] * order
            count = self.order * len(self.angle_index)
            cosine = real + number * self.order + torch.arange(self.order, device=x.device)
            turned = (-multiples.sin() * order) @ w1[:, cosine].T + (multiples.cos() * order) @ w1[:, cosine + count].T
            divergence = divergence + ((turned * slope1) @ w2.T * slope2) @ w3[index]
        return divergence


def activate(a: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """Values and slopes of an activation."""
    if kind == "sin":
        return a.sin(), a.cos()
    s = torch.sigmoid(a)
    z = a * s
    return z, s + z * (1 - s)


class PerceptronVelocity(VelocityField):
    """A two-layer network plus a linear field, with an exact divergence in closed form; zero at initialisation.

    ``v(t, x) = W3 s(W2 s(W1 x + b1(t)) g1(t) + b2(t)) g2(t) + a(t) x + c(t)``, with a and c per dimension.

    Parameters
    ----------
    dimension : int
    hidden : int
        Units of either layer (per site where ``circulant``).
    windows : int
        Time resolution: biases and gains are sums of so many windows on [0, 1].
    odd : bool
        ``v(t, -x) = -v(t, x)``, for targets with u(-x) = u(x): no sample can favour one side.
    circulant : bool
        Commute with shifts of the dimensions, for periodic lattices.
    circular : sequence of bool, optional
        True for angles; the field is then periodic in them.
    order, first, bandwidth
        See :class:`Trunk`.
    seed : int
        Of the initial weights.

    Examples
    --------
    >>> field = PerceptronVelocity(8, hidden=64, odd=True)
    >>> v, divergence = field.with_divergence(torch.tensor(0.3), torch.randn(5, 8))
    >>> v.shape, divergence.shape
    (torch.Size([5, 8]), torch.Size([5]))
    """

    def __init__(
        self,
        dimension: int,
        hidden: int = 128,
        *,
        windows: int = 12,
        odd: bool = False,
        circulant: bool = False,
        circular: Sequence[bool] | None = None,
        order: int = 3,
        first: Activation = "silu",
        bandwidth: float = 1.0,
        seed: int = 0,
    ):
        super().__init__(dimension)
        self._config = {
            "dimension": dimension, "hidden": hidden, "windows": windows, "odd": odd, "circulant": circulant,
            "circular": None if circular is None else [bool(c) for c in circular], "order": order, "first": first,
            "bandwidth": bandwidth, "seed": seed,
        }  # fmt: skip
        self.odd = odd
        self.trunk = Trunk(
            dimension, dimension, hidden, windows=windows, circular=circular, order=order, circulant=circulant,
            first=first, bandwidth=bandwidth, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        linear = torch.ones(dimension) if circular is None else 1.0 - torch.tensor([float(c) for c in circular])
        self.register_buffer("linear", linear, persistent=False)
        sizes = [1 if circulant else dimension] + ([] if odd else [1 if circulant else dimension])
        self.outer = TimeWindows(windows, sizes)

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._evaluate(t, x, divergence=False)[0]

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluate(t, x, divergence=True)

    def _evaluate(self, t: Tensor, x: Tensor, divergence: bool) -> tuple[Tensor, Tensor]:
        matrices = self.trunk.matrices()
        w1, w2, w3 = matrices
        both = torch.cat([x, -x]) if self.odd else x
        times = torch.cat([t, t]) if self.odd and t.ndim and len(t) > 1 else t
        _, slope1, z2, slope2 = self.trunk.hidden(times, both, w1, w2)
        v = z2 @ w3.T
        div = self.trunk.trace(both, slope1, slope2, *matrices) if divergence else x.new_zeros(0)
        if self.odd:
            plus, minus = v.chunk(2)
            v = 0.5 * (plus - minus)
            div = 0.5 * sum(div.chunk(2)) if divergence else div
        outer = self.outer(t)
        gain = outer[0].expand(-1, self.dimension) * self.linear
        v = v + gain * x
        if not self.odd:
            v = v + outer[1]
        return v, div + gain.sum(-1) if divergence else div


class PerceptronEnergy(nn.Module):
    """A scalar network of time and place, ``f(t, x)``, zero at initialisation: what a learned path adds.

    Parameters
    ----------
    dimension, hidden, windows, circulant, circular, order, first, bandwidth, seed
        As in :class:`PerceptronVelocity`.
    even : bool
        ``f(t, -x) = f(t, x)``.
    """

    def __init__(
        self,
        dimension: int,
        hidden: int = 128,
        *,
        windows: int = 12,
        even: bool = False,
        circulant: bool = False,
        circular: Sequence[bool] | None = None,
        order: int = 3,
        first: Activation = "silu",
        bandwidth: float = 1.0,
        seed: int = 1,
    ):
        super().__init__()
        self._config = {
            "dimension": dimension, "hidden": hidden, "windows": windows, "even": even, "circulant": circulant,
            "circular": None if circular is None else [bool(c) for c in circular], "order": order, "first": first,
            "bandwidth": bandwidth, "seed": seed,
        }  # fmt: skip
        self.dimension, self.even = dimension, even
        self.trunk = Trunk(
            dimension, 1, hidden, windows=windows, circular=circular, order=order, circulant=circulant,
            first=first, bandwidth=bandwidth, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        self.outer = TimeWindows(windows, [1])

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Values ``(batch,)`` at times ``()`` or ``(batch,)`` and points ``(batch, dimension)``."""
        w1, w2, w3 = self.trunk.matrices()
        both = torch.cat([x, -x]) if self.even else x
        times = torch.cat([t, t]) if self.even and t.ndim and len(t) > 1 else t
        values = (self.trunk.hidden(times, both, w1, w2)[2] @ w3.T)[:, 0]
        if self.even:
            values = 0.5 * sum(values.chunk(2))
        return values + self.outer(t)[0][:, 0]

    def derivatives(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``(batch,)``, gradients ``(batch, dimension)`` and Laplacians ``(batch,)`` in closed form.

        Only for networks without angles. The Laplacian costs one product with the inner matrix per dimension.
        """
        if len(self.trunk.angle_index):
            raise InputError("The closed-form Laplacian is for networks without angles.")
        w1, w2, w3 = self.trunk.matrices()
        n = len(x)
        both = torch.cat([x, -x]) if self.even else x
        times = torch.cat([t, t]) if self.even and t.ndim and len(t) > 1 else t
        rows = [row.repeat(1, self.trunk.sites) if self.trunk.circulant else row for row in self.trunk.time(times)]
        bias1, gain1, bias2, gain2 = rows[0], 1 + rows[1], rows[2], 1 + rows[3]
        sites = self.trunk.sites
        fixed1, fixed2 = self.trunk.bias1.repeat(sites), self.trunk.bias2.repeat(sites)
        z1, slope1, curve1 = _activate_twice(both @ w1.T + (fixed1 + bias1), self.trunk.first)
        z2, slope2, curve2 = _activate_twice((z1 * gain1) @ w2.T + (fixed2 + bias2), "silu")
        slope1, curve1 = slope1 * gain1, curve1 * gain1
        last = gain2 * w3
        value = (z2 * last).sum(-1)
        weighted = slope2 * last
        back = weighted @ w2
        gradient = (back * slope1) @ w1
        laplacian = (back * curve1) @ w1.square().sum(-1)
        # (batch * dimension, h): the derivative of the second layer by every coordinate
        inner = (slope1[:, None, :] * w1.T).flatten(0, 1) @ w2.T
        squares = inner.square().view(len(both), self.dimension, -1).sum(1)
        laplacian = laplacian + (squares * curve2 * last).sum(-1)
        if self.even:
            value, laplacian = 0.5 * (value[:n] + value[n:]), 0.5 * (laplacian[:n] + laplacian[n:])
            gradient = 0.5 * (gradient[:n] - gradient[n:])
        return value + self.outer(t)[0][:, 0], gradient, laplacian


def _activate_twice(a: Tensor, kind: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Values, slopes and second derivatives of an activation."""
    if kind == "sin":
        s, c = a.sin(), a.cos()
        return s, c, -s
    s = torch.sigmoid(a)
    z = a * s
    rest = 1 - s
    return z, s + z * rest, s * rest * (2 + a - 2 * z)
