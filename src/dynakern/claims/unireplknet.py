"""UniRepLKNet: wide without going deep, and branches that cost nothing once trained.

Claims behind Ding et al., 2024, arXiv:2311.15599, at a size for a laptop: (1) two blocks with 13x13 kernels see at
least five times the area that 24 blocks with 3x3 kernels do, with fewer parameters; (2) folding branches, norms and
scales changes nothing, drops parameters, and a merged block is faster. Accuracies of the published networks are not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dynakern.claims.run import Measurement, Progress
from dynakern.lens import effective_receptive_field
from dynakern.lens.look import sample_crops
from dynakern.measure import count_parameters, time_interleaved
from dynakern.vision.unireplknet import DilatedReparamBlock, UniRepLKNet, UniRepLKNetBlock

__all__ = ["CLAIMS", "block_stack", "receptive_area"]


def block_stack(kernel_size: int, blocks: int, seed: int) -> nn.Module:
    """Return a 3x3 convolution to 16 channels and a stack of blocks without layer scale, untrained."""
    torch.manual_seed(seed)
    layers = [UniRepLKNetBlock(16, kernel_size, layer_scale_init_value=None) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers).eval()


def receptive_area(network: nn.Module, threshold: float = 0.99) -> float:
    """Return the share of the image that holds so much of the contributions, over four crops of two photographs."""
    ratio = effective_receptive_field(network, sample_crops(128, 4)).ratio(threshold)
    return 1.0 if ratio is None else ratio


def wide_without_deep(progress: Progress) -> Iterator[Measurement]:
    """Receptive area of 2 blocks with 13x13 kernels against 24 blocks with 3x3 kernels, three seeds.

    Both have squeeze-and-excitation, whose mean over all pixels gives each a tiny share of the contributions. Where
    these shares add up to more than 1 %, the area of 99 % is most of the image; that of 90 % is not touched by it.
    """
    for seed in range(3):
        progress(f"seed {seed}", seed / 3)
        for threshold, factor in ((0.99, 5), (0.9, None)):
            wide, deep = (receptive_area(block_stack(*stack, seed), threshold) for stack in ((13, 2), (3, 24)))
            yield Measurement(
                name=f"area of {100 * threshold:g} %, two blocks of 13x13, seed {seed}",
                value=wide,
                unit="share",
                at_least=None if factor is None else factor * deep,
                baseline=deep,
            )
    few, many = count_parameters(block_stack(13, 2, 0)), count_parameters(block_stack(3, 24, 0))
    yield Measurement(name="their parameters", value=few, unit="parameters", at_most=many, baseline=many)


def _noisy(network: nn.Module) -> nn.Module:
    """Give norms and scales values as after training."""
    torch.manual_seed(1)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith(("running_var", "gamma")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("running_mean", "beta", "bias")):
            nn.init.normal_(tensor, std=0.2)
    return network.eval()


def free_branches(progress: Progress) -> Iterator[Measurement]:
    """Fusing a network with random statistics, and the time of a merged block at C = 64, 28 x 28, K = 13."""
    torch.manual_seed(0)
    kernels = ((3,), (7, 13), (13, 3), (11,))
    network = _noisy(UniRepLKNet((1, 2, 2, 1), (8, 16, 24, 32), kernel_sizes=kernels, num_classes=10))
    fused, x = network.fuse(), torch.randn(2, 3, 64, 64)  # pyright: ignore[reportCallIssue]
    expected = network(x).detach()  # with gradients on, the branches run one by one
    with torch.no_grad():
        error = float((fused(x) - expected).abs().max() / expected.abs().max())
    yield Measurement(name="largest difference of the logits", value=error, unit="relative", at_most=1e-5)
    before = count_parameters(network)
    after = sum(p.numel() for p in fused.parameters())
    yield Measurement(name="parameters fused", value=after, unit="parameters", at_most=before - 1, baseline=before)
    block, x = _noisy(DilatedReparamBlock(64, 13)).requires_grad_(False), torch.randn(1, 64, 28, 28)
    merged = DilatedReparamBlock(64, 13, deploy=True).eval().requires_grad_(False)

    def branches() -> Tensor:
        with torch.enable_grad():
            return block(x)

    progress("timing", 0.5)
    times = time_interleaved({"branches": branches, "merged": lambda: merged(x)}, repeats=15)
    ratio = times["branches"].median / times["merged"].median
    yield Measurement(name="branches / merged, (1, 64, 28, 28), K = 13", value=ratio, unit="x", at_least=1.3)


CLAIMS = (wide_without_deep, free_branches)
