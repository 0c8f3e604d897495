r"""S4D: state-space layers with a diagonal state matrix, their initialisations, and both of their views.

The problem is to filter long signals (audio, waveforms, pixel sequences) by kernels that are learned, long and cheap.
Each feature runs its own linear system :math:`x'(t) = A x(t) + B u(t)`, :math:`y(t) = C x(t) + D u(t)` with diagonal A.
Trained, it is a convolution with the kernel :math:`K_l = 2\,\mathrm{Re} \sum_n C_n \bar B_n \bar A_n^l`; deployed, a
recurrence of O(1) memory. What makes it work is the initialisation of A, which approximates HiPPO's.

Implemented: all initialisations (lin, inv, inv2, quad, legs, real, rand), HiPPO-LegS and -LegT, the discretisations
ZOH, bilinear and DSS, both views and state forwarding, change of sampling rate, band limiting, two-sided kernels,
shared (A, B), own learning rates for A, B and dt, the block and the backbone. Not implemented: the kernel of S4 with
its low-rank term.

Paper: Gu, Gupta, Goel and Ré, 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
arXiv:2206.11893.

Example:
    >>> import torch
    >>> layer = S4D(d_model=8, d_state=16)
    >>> x = torch.randn(2, 100, 8)
    >>> layer(x).shape
    torch.Size([2, 100, 8])
    >>> y, state = layer(x[:, :60], state=layer.initial_state(2))  # a long signal in pieces
    >>> y, state = layer(x[:, 60:], state=state)
"""

from dynakern.sequence.s4d.hippo import hippo, hippo_diagonal, ssm_init
from dynakern.sequence.s4d.kernel import S4DKernel, vandermonde, vandermonde_naive
from dynakern.sequence.s4d.layer import (
    S4D,
    S4DModel,
    S4DRecurrence,
    classify_series,
    convert_state_dict,
    forecast,
    s4d_bidmc,
    s4d_classifier,
    s4d_lra_image,
    s4d_lra_listops,
    s4d_lra_pathfinder,
    s4d_lra_pathx,
    s4d_lra_text,
    s4d_sc35,
    s4d_scifar,
)

__all__ = [
    "S4D",
    "S4DKernel",
    "S4DModel",
    "S4DRecurrence",
    "classify_series",
    "convert_state_dict",
    "forecast",
    "hippo",
    "hippo_diagonal",
    "s4d_bidmc",
    "s4d_classifier",
    "s4d_lra_image",
    "s4d_lra_listops",
    "s4d_lra_pathfinder",
    "s4d_lra_pathx",
    "s4d_lra_text",
    "s4d_sc35",
    "s4d_scifar",
    "ssm_init",
    "vandermonde",
    "vandermonde_naive",
]
