"""Maximum likelihood by path gradients, for data whose forces are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_bg.flows import MolecularFlow
from openmm_bg.training.masked import masked_mean, masked_median
from openmm_bg.training.objectives import Step


@dataclass
class ForwardPath:
    """Forward Kullback-Leibler divergence on data, by a gradient whose variance vanishes where q = p.

    KL(p || q) is the divergence of the data's latents ``z = f^-1(x)``, of density ``p(f(z)) |det f'(z)|``, from the
    base. Of its gradient the path through z is kept alone; the rest has the mean zero. Unlike path gradients on the
    flow's own samples it sees the tails that the flow has lost, and unlike the likelihood it stops moving at the
    target, so that a finite data set leaves no noise in the parameters. Energies and forces of the data are found once.

    No score is cut, however large: the mean over the data is the gradient of the likelihood, wherever the flow is.
    So the data must be draws of the target. On thermal frames of alanine dipeptide the largest score was at most six
    times the median of its batch; frames that are no draws (five of 5,000, each atom moved by 0.01 nm) reached a
    thousand times. Such a frame rules the steps it is in, as far as the trainer's bound on the gradient's norm lets it.

    Of a :class:`MolecularFlow` it trains the stiff coordinates given the torsions: path gradients cannot see the
    weights of basins, so put :class:`MaximumLikelihood` or :class:`LogVariance` beside it for those. Other flows must
    have a normal base.

    References
    ----------
    Vaitl, Winkler, Richter & Kessel, Fast and unified path gradient estimators, ICLR 2024 (arXiv:2403.15881).

    Examples
    --------
    >>> import openmm_bg as bg
    >>> well = bg.systems.load("double_well")
    >>> generator = bg.BoltzmannGenerator(well, bg.flows.RealNVP(2, layers=2, hidden=(8,)))
    >>> data = well.sample(100, generator=torch.Generator().manual_seed(1))
    >>> generator.fit(data, likelihood_steps=0, steps=3, objective=ForwardPath(), progress=False).evaluations
    100
    """

    needs_data: bool = field(default=True, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        flow = step.flow
        q, u, gradient = step.labelled(step.batch_size, True)
        usable = torch.isfinite(u)
        if isinstance(flow, MolecularFlow):
            t, y = flow.chart.split(q)
            leaf = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(flow.chart.join(t, leaf), leaf, gradient)
            transform, context, base = flow.stiff, flow.context(t), flow.base
        else:
            y, slope, transform, context, base = q, gradient, flow.transform, None, flow.base
        z, _ = transform.inverse(y, context)
        latent = z.detach().requires_grad_()
        back, log_det = transform(latent, context)
        (score,) = torch.autograd.grad((back, log_det), latent, (-slope, torch.ones_like(log_det)))
        score = score - base.score(latent.detach())
        # zero times NaN is NaN, in the gradient too
        score = torch.where(usable[:, None], score, 0.0)
        norm = score.norm(dim=-1)
        numbers = {
            "score": masked_mean(score.square().mean(-1), usable),
            "largest_score": norm.max() / masked_median(norm, usable),
            "lost": 1 - usable.sum() / len(usable),
        }
        return masked_mean((score * z).sum(-1), usable), numbers
