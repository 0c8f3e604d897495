r"""Terminator: image classification by context-dependent kernels of the image's size, without residuals or attention.

Slow nets, small networks of coordinates, write kernels as large as the image. In the HyperZ.Z.W operator these meet the
activations, :math:`K = x \odot G`, and become weights that depend on the input; :math:`K \cdot h(x)` then shows every
pixel the whole image in each layer. A slow neural loss draws the kernels of all blocks together.

Paper: Zhang, 2024, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv:2401.17948.
The author's code was withdrawn; the snapshot at https://github.com/lalalune/Terminator (67e773a) is what this follows
where paper and code differ.

Implemented: the network for images with the sizes for CIFAR, its slow nets, losses and optimisers, in the code's key
layout. Its batch statistics also rule in eval mode; ``batch_stats="running"`` and :meth:`Terminator.calibrate` give
predictions that do not depend on the batch. The code rescales the slow nets' last maps in its first forward pass, and
again after loading; here that is part of the initialisation. The 1-D network was never released and is not implemented.

Example:
    >>> import torch
    >>> network = Terminator(img_size=8, factors=(4, 1), num_classes=5, global_layers=(2, 2), dropout=0.0,
    ...                      local_sizes=(3, 7, 5, 5), global_hidden=8, local_hidden=6)
    >>> network(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 5])
    >>> network.auxiliary_loss().shape                        # the slow neural loss
    torch.Size([])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.vision.terminator.block import (
    BatchStandardize,
    GroupStandardize,
    HyperChannel,
    HyperInteraction,
    RecursiveGate,
    SFNEBlock,
)
from dynakern.vision.terminator.kar import Kar2, Kar3, warmup_cosine
from dynakern.vision.terminator.slow_nets import LocalSlowNet, MAGNet, MAGNetLocal, SlowNet

__all__ = [
    "BatchStandardize",
    "GroupStandardize",
    "HyperChannel",
    "HyperInteraction",
    "Kar2",
    "Kar3",
    "LocalSlowNet",
    "MAGNet",
    "MAGNetLocal",
    "RecursiveGate",
    "SFNEBlock",
    "SlowNet",
    "Terminator",
    "slow_neural_loss",
    "terminator_cifar10",
    "terminator_cifar100",
    "warmup_cosine",
]

BatchStats = Literal["batch", "running"]


def slow_neural_loss(kernels: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\sum_{i>j} \mathrm{mean}\,(\sum_c G_i - \sum_c G_j)^2` of global kernels, 0-d.

    Args:
        kernels: Of each block, ``(1, C_i, S, S)``.

    Raises:
        ValueError: There is no kernel.
    """
    if not kernels:
        raise ValueError("`kernels` must hold at least one kernel.")
    sums = [kernel.sum(1) for kernel in kernels]
    pairs = [(a - b).square().mean() for i, a in enumerate(sums) for b in sums[:i]]
    return torch.stack(pairs).sum() if pairs else sums[0].new_zeros(())


def _earlier(block: int) -> tuple[int, ...]:
    """Return which earlier blocks' outputs a block mixes in, beside its input: none for the first two."""
    if block < 2:
        return ()
    return (block - 2,) if block < 4 else (block - 2, block - 3)


class Terminator(nn.Module):
    """A chain of :class:`SFNEBlock` without residuals, a mean over space and a linear classifier.

    From the third block on a block also sees the output of the block two before it, from the fifth that of the one
    three before it too.

    Args:
        img_size: Side S of the images, fixed.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        factors: Growth of the channels in each block; channels after a block are a multiple of 12.
        local_sizes: Sides of the four small kernels, odd, at most S.
        global_layers: Layers of each block's global slow net.
        global_hidden: Width of the global slow nets.
        local_hidden: Width of the local slow nets.
        local_layers: Layers of the local slow nets.
        channel_hidden: Width of the slow nets of the channel interaction.
        interact_hidden: Widths of the two slow nets of the space and channel interaction: channels, space.
        dropout: Rate at which whole channels are dropped, after each block but the first.
        batch_stats: ``"batch"``: every prediction depends on its whole batch, as in the authors' code.
            ``"running"``: running statistics are kept and used outside training.
        trainable_renorm: See :class:`MAGNetLocal`.
        omega_0: See :class:`MAGNet`.

    Raises:
        ValueError: Numbers do not fit together; the message says which.

    Source: arXiv:2401.17948; keys of the authors' code.
    """

    head_keys = ("out_layer.",)

    def __init__(
        self,
        *,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        local_sizes: Sequence[int] = (3, 9, 5, 7),
        global_layers: Sequence[int] = (3, 2, 2, 2, 2),
        global_hidden: int = 64,
        local_hidden: int = 32,
        local_layers: int = 2,
        channel_hidden: int = 32,
        interact_hidden: tuple[int, int] = (16, 64),
        dropout: float = 0.05,
        batch_stats: BatchStats = "batch",
        trainable_renorm: bool = False,
        omega_0: float = 2000.0,
    ) -> None:
        super().__init__()
        check_choice("batch_stats", batch_stats, ("batch", "running"))
        for name, value in (("img_size", img_size), ("in_chans", in_chans)):
            check_positive(name, value, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        if len(factors) != len(global_layers) or not factors:
            raise ValueError(
                f"`factors` and `global_layers` need one entry a block, got {factors!r}, {global_layers!r}."
            )
        if len(local_sizes) != 4:
            raise ValueError(f"`local_sizes` must have four entries, got {tuple(local_sizes)!r}.")
        self.img_size, self.in_chans, self.num_classes = img_size, in_chans, num_classes
        self.batch_stats: BatchStats = batch_stats
        options: dict[str, Any] = {
            "local_sizes": tuple(local_sizes),
            "global_hidden": global_hidden,
            "local_hidden": local_hidden,
            "local_layers": local_layers,
            "channel_hidden": channel_hidden,
            "interact_hidden": tuple(interact_hidden),
            "trainable_renorm": trainable_renorm,
            "omega_0": omega_0,
            "running": batch_stats == "running",
        }
        blocks, channels, widths = [], in_chans, []
        for i, (factor, layers) in enumerate(zip(factors, global_layers, strict=True)):
            before = tuple(widths[j] for j in _earlier(i))
            rate = dropout if i > 0 else 0.0
            made = SFNEBlock(
                channels, factor * channels, img_size, before, dropout=rate, global_layers=layers, **options
            )
            blocks.append(made)
            channels = factor * channels
            widths.append(channels)
        self.blocks = nn.ModuleList(blocks)
        self.out_layer = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        if isinstance(self.out_layer, nn.Linear):
            nn.init.kaiming_normal_(self.out_layer.weight)
            nn.init.zeros_(self.out_layer.bias)
        self._kernels: list[Tensor] | None = None  # of the last pass in training

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kernels of the last pass out of copies: they belong to that pass's graph."""
        return {**self.__dict__, "_kernels": None}

    def _run(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the blocks' maps and global kernels."""
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} {self.img_size} {self.img_size}")
        if len(x) < 2 and (self.training or self.batch_stats == "batch"):
            raise ValueError(
                "Statistics of a batch need two images or more; for single ones build the network with "
                "batch_stats='running' or call calibrate(loader), and use eval mode."
            )
        maps: list[Tensor] = []
        kernels: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, kernel = block(x, *(maps[j] for j in _earlier(i)))
            maps.append(x)
            kernels.append(kernel)
        if self.training:
            self._kernels = kernels
        return maps, kernels

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each block, ``(B, C_i, S, S)``, of images ``(B, in_chans, S, S)``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: ``x`` has another shape, or is a single image where batch statistics are needed.
        """
        return self._run(x)[0]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map, or its means if there is no classifier."""
        return self.out_layer(x.mean((2, 3)))

    def forward(self, x: Tensor, *, return_slow_loss: bool = False) -> Any:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, S, S)``, and the slow neural loss if asked."""
        maps, kernels = self._run(x)
        logits = self.forward_head(maps[-1])
        return (logits, slow_neural_loss(kernels)) if return_slow_loss else logits

    def auxiliary_loss(self) -> Tensor:
        """Return the slow neural loss of the last forward pass in training mode, 0-d.

        Raises:
            RuntimeError: There was none.
        """
        if self._kernels is None:
            raise RuntimeError("There is no slow neural loss before a forward pass in training mode.")
        return slow_neural_loss(self._kernels)

    def l2_term(self, weight: float = 5e-5) -> Tensor:
        """Return the authors' weight penalty, 0-d.

        ``weight`` times the sum of the 2-norms of parameters of the branches outside slow nets and gates, plus 1e-6
        times those of the 2-D maps in slow nets and gates, as the names in the authors' code decide.

        Args:
            weight: The authors take 5e-5 on CIFAR-10 and 4e-5 on CIFAR-100.
        """
        fast = [p.norm() for name, p in self.named_parameters() if "fast" in name and "Kernel" not in name]
        maps = [m for name, m in self.named_modules() if "Kernel" in name and isinstance(m, nn.Conv2d)]
        slow = torch.stack([m.weight.norm() for m in maps]).sum()
        return weight * (torch.stack(fast).sum() + 1e-6 * slow)

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Any]) -> Terminator:
        """Take running statistics from data, and use them outside training from now on.

        Args:
            loader: Batches of two or more images, or tuples that begin with images.

        Returns:
            The network, with ``batch_stats`` now ``"running"``.

        Raises:
            ValueError: ``loader`` is empty.
        """
        kept = [m for m in self.modules() if isinstance(m, BatchStandardize | LocalSlowNet)]
        modes, before = {m: m.training for m in self.modules()}, self.batch_stats
        like = next(self.parameters())
        self.eval()
        self.batch_stats, count = "batch", 0
        try:
            for batch in loader:
                for module in kept:
                    if count == 0:
                        _start(module, like)
                    module.calibrating, module.momentum = True, 1 / (count + 1)
                self(batch if isinstance(batch, Tensor) else batch[0])
                count += 1
        finally:
            for module in kept:
                module.calibrating, module.momentum = False, 0.1
            for module, training in modes.items():
                module.training = training
            self.batch_stats = "running" if count else before
        if count == 0:
            raise ValueError("`loader` gave no images.")
        return self


def _start(module: BatchStandardize | LocalSlowNet, like: Tensor) -> None:
    if isinstance(module, BatchStandardize):
        module.start_running(like)
    else:
        module.start_running()


def convert_state_dict(sd: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights for ``model``: without counters, and with its own running statistics, if it has any.

    The weights are those after the authors' first forward pass, as their checkpoints hold them.
    """
    found = {key.removeprefix("network."): value for key, value in sd.items()}
    found = {key: value for key, value in found.items() if not key.endswith("train_length")}
    own = {key: value for key, value in model.state_dict().items() if ".running_" in f".{key}"}
    return {**own, **found}


def terminator_cifar10(**overrides: Any) -> Terminator:
    """Terminator for CIFAR-10 (1.337 M parameters), ``(B, 3, 32, 32) -> (B, 10)``."""
    return Terminator(**overrides)


def terminator_cifar100(**overrides: Any) -> Terminator:
    """Terminator for CIFAR-100 (1.363 M parameters), ``(B, 3, 32, 32) -> (B, 100)``."""
    return Terminator(**{"num_classes": 100, **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> Terminator:
    """Build the competitor of ``dynakern compare classify-images``.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images, at least 5.
        num_classes: Number of classes.
        width: Multiplies the channels, which are multiples of 12 and of ``in_chans``.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``, with running statistics.
    """
    step = next(n for n in range(1, 13) if n * in_chans % 12 == 0)
    first = step * max(1, round(24 * width / (step * in_chans)))
    odd = img_size - 1 + img_size % 2
    return Terminator(
        img_size=img_size,
        in_chans=in_chans,
        num_classes=num_classes,
        factors=(first, 2, 2),
        global_layers=(2, 2, 2),
        global_hidden=32,
        local_hidden=16,
        local_sizes=tuple(min(side, odd) for side in (3, 7, 5, 5)),
        batch_stats="running",
        omega_0=10.0,  # smooth kernels: from the published noise AdamW learns slowly
    )
