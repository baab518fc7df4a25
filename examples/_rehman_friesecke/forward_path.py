"""Maximum likelihood by path gradients, for targets whose energy is known."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_bg.training.objectives import Step


@dataclass
class ForwardPath:
    """Forward Kullback-Leibler divergence on data, by a gradient whose variance vanishes where q = p.

    KL(p || q) is the divergence of the data's latents ``z = f^-1(x)``, of density ``p(f(z)) |det f'(z)|``, from the
    base. Of its gradient the path through z is kept alone; the rest has the mean zero (Vaitl, Winkler, Richter and
    Kessel, 2024). Unlike path gradients on the flow's own samples it sees the tails that the flow has lost, and unlike
    the likelihood it stops moving at the target, so that a finite data set leaves no noise in the parameters.

    For flows over a standard normal.
    """

    needs_data: bool = field(default=True, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        x = step.data(step.batch_size)
        z, _ = step.flow.transform.inverse(x)
        leaf = z.detach().requires_grad_()
        y, log_det = step.flow.transform(leaf)
        _, gradient = step.target.value_and_gradient(y.detach())
        (score,) = torch.autograd.grad((y, log_det), leaf, (-gradient, torch.ones_like(log_det)))
        # minus the score of the base, which is -z
        score = score + leaf.detach()
        return (score * z).sum(-1).mean(), {"score": float(score.square().mean())}
