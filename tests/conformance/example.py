"""What the conformance suite needs to know about a network: how to build a small one and what to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Example:
    """One small network and its input.

    Attributes:
        name: Label of the test.
        build: Makes the module, at its smallest useful size.
        inputs: Makes the forward arguments for a dtype; axis 0 of every tensor is the batch, of size >= 2.
        batch_independent: Whether a row of the batch must not depend on its companions (in eval mode).
        export: Whether the module must pass ``torch.export`` and ``torch.compile``.
        image: Whether the input is an image map ``(B, C, H, W)``; such a network must also take channels-last
            memory and bfloat16, and give maps by ``forward_features`` if it has that.
        unused: Parameters that rightly get no gradient in such a forward, by prefix, each with a reason in a comment.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    batch_independent: bool = True
    export: bool = True
    image: bool = False
    unused: tuple[str, ...] = ()
