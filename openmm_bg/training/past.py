"""Torsions of recent steps and what was found there: a density of few dimensions learns from more than one batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from openmm_bg.training.masked import masked_median


class Past(NamedTuple):
    """Samples of earlier steps.

    Attributes
    ----------
    torsions : Tensor, (n, torsions)
    rest : Tensor, (n,)
        The log-weight but for the torsions' density, ``-u - log q(y | t)``; NaN where there is none. Whatever
        ``q(y | t)`` was then, the mean of its exponential is the target's density of the torsions.
    log_q : Tensor, (n,)
        The torsions' log-density when they were drawn.
    explored : Tensor of bool, (n,)
        Whether a torsion was turned anywhere.
    """

    torsions: Tensor
    rest: Tensor
    log_q: Tensor
    explored: Tensor


def recall(
    tensors: dict[str, Tensor],
    like: Tensor,
    size: int,
    n: int,
    generator: torch.Generator,
    temper: float | Tensor = 0.0,
) -> Past:
    """Some of the samples that ``tensors`` hold, rare ones more often.

    Parameters
    ----------
    tensors : dict of Tensor
        An objective's; a ring of ``size`` samples without any value is made where it is wanted and there is none.
    like : Tensor, (batch, torsions)
    size, n : int
        Samples held, and samples wanted, without replacement.
    generator : torch.Generator
    temper : float or Tensor
        They are drawn in proportion to ``q^-temper`` of their density then.
    """
    if not n:
        return Past(like[:0], like.new_zeros(0), like.new_zeros(0), like.new_zeros(0, dtype=torch.bool))
    if "past_rest" not in tensors or len(tensors["past_rest"]) != size:
        nothing = like.new_full((size,), math.nan)
        tensors |= {"past_torsions": like.new_zeros(size, like.shape[1]), "past_rest": nothing, "past_log_q": nothing}
        tensors["past_explored"] = torch.zeros_like(nothing, dtype=torch.bool)
        tensors["past_next"] = torch.zeros(1, dtype=torch.long, device=like.device)
    log_q = tensors["past_log_q"]
    known = torch.isfinite(log_q) & torch.isfinite(tensors["past_rest"])
    rows = tempered_rows(log_q, known, temper, n, generator)
    return Past(*(tensors[f"past_{name}"][rows] for name in Past._fields))


def tempered_rows(log_q: Tensor, known: Tensor, temper: float | Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` of the rows that are known, drawn without replacement in proportion to ``q^-temper``, e^3 times at most."""
    few = slice(None, None, max(1, len(log_q) // 4096))  # a median of all would take longer than the rest
    typical = masked_median(log_q[few], known[few])
    # NaN: what is not known, which is left out below, or no median yet, and then all that is known counts the same
    excess = (-temper * (log_q - typical)).clamp(-8, 3).nan_to_num()
    # the largest of Gumbel-disturbed logarithms are such a draw
    gumbel = torch.empty_like(log_q).exponential_(generator=generator).log_().neg_()
    return torch.where(known, excess + gumbel, -math.inf).topk(n, sorted=False).indices


def remember(tensors: dict[str, Tensor], new: Past) -> None:
    """Put samples in the places of the oldest ones; new tensors, so that a step cut short can be undone."""
    size = len(tensors["past_rest"])
    rows = (tensors["past_next"] + torch.arange(len(new.rest), device=new.rest.device)) % size
    for name, values in zip(Past._fields, new, strict=True):
        tensors[f"past_{name}"] = tensors[f"past_{name}"].index_copy(0, rows, values)
    tensors["past_next"] = (tensors["past_next"] + len(new.rest)) % size
