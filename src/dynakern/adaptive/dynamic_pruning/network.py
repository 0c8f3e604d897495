"""What every dynamically pruned network can do: mask loss, operation counts, report, folding, real skipping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.adaptive.dynamic_pruning.layers import LayerRecord, MaskedConv, Source, mask_bce
from dynakern.adaptive.dynamic_pruning.skipping import SkippingNetwork, skip_filters
from dynakern.checks import check_choice, check_positive
from dynakern.layers.vision import check_fusable

__all__ = ["DynamicNetwork", "FlopsEstimate", "LayerReport", "PruningReport", "mask_weight"]

Flops = Literal["official", "exact"]


def mask_weight(epoch: int, epochs: int, cooldown: float = 0.5) -> float:
    """Return the weight of the mask loss in an epoch (from 0): 1 before ``cooldown * epochs``, then 0.

    Example:
        >>> [mask_weight(epoch, 4) for epoch in range(4)]
        [1.0, 1.0, 0.0, 0.0]
    """
    return float(epoch < cooldown * epochs)


@dataclass(frozen=True)
class FlopsEstimate:
    """Multiply-adds of the convolutions, per image.

    Attributes:
        macs: Mean over the images.
        dense_macs: Of the network that keeps all filters.
        std: Standard deviation over the images.
    """

    macs: float
    dense_macs: float
    std: float

    @property
    def reduction(self) -> float:
        """Share of the multiply-adds that is saved."""
        return 1 - self.macs / self.dense_macs


@dataclass(frozen=True)
class LayerReport:
    """One layer of a :class:`PruningReport`.

    Attributes:
        filters: Filters of the layer.
        active: Filters kept, mean over the images.
        mask_accuracy: Share of filters for which predictor and target agree.
    """

    filters: int
    active: float
    mask_accuracy: float


@dataclass(frozen=True)
class PruningReport:
    """What a pruned network does on a set of images.

    Attributes:
        accuracy: Share of right classes; None without labels.
        flops: Operation counts.
        mask_accuracy: Mean over layers.
        layers: For each layer by name.
    """

    accuracy: float | None
    flops: FlopsEstimate
    mask_accuracy: float
    layers: dict[str, LayerReport]

    def __str__(self) -> str:
        accuracy = "-" if self.accuracy is None else f"{self.accuracy:.4f}"
        lines = [
            f"accuracy {accuracy}, {self.flops.macs / 1e6:.3f} of {self.flops.dense_macs / 1e6:.3f} million "
            f"multiply-adds per image ({self.flops.reduction:.1%} saved), mask accuracy {self.mask_accuracy:.3f}"
        ]
        for name, layer in self.layers.items():
            lines.append(f"  {name}: {layer.active:.1f} of {layer.filters} filters, masks {layer.mask_accuracy:.3f}")
        return "\n".join(lines)


class DynamicNetwork(nn.Module):
    """Base of networks with :class:`MaskedConv` layers.

    A child's layers are registered in the order in which they run; otherwise the child overrides
    :meth:`masked_layers`. ``image`` in the methods' arguments is ``(B, C, H, W)``.

    Attributes:
        mask_loss_weight: Weight of the mask loss in :meth:`auxiliary_loss`; see :meth:`cool_down`.
    """

    in_chans: int
    mask_loss_weight: float = 1.0

    def masked_layers(self) -> dict[str, MaskedConv]:
        """Return the layers by name, in the order in which they run."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MaskedConv)}

    def predictor_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the mask predictors; the authors train them at their own rate, without decay."""
        return [p for layer in self.masked_layers().values() if layer.mask is not None for p in layer.mask.parameters()]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return all other parameters."""
        own = {id(p) for p in self.predictor_parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def records(self) -> dict[str, LayerRecord]:
        """Return what the layers did in the last forward pass in training mode, or inside :meth:`recording`.

        Raises:
            RuntimeError: There was none.
        """
        found = {name: m.record for name, m in self.masked_layers().items() if m.mask is not None}
        if not found or None in found.values():
            raise RuntimeError("No masks are on record: run a forward pass in training mode first.")
        return {name: record for name, record in found.items() if record is not None}

    @contextlib.contextmanager
    def recording(self, source: Source = "predictor") -> Iterator[None]:
        """Record masks outside training too, and apply the predicted masks, the targets, or none."""
        layers = self.masked_layers().values()
        before: list[tuple[bool, Source]] = [(layer.recording, layer.source) for layer in layers]
        try:
            for layer in layers:
                layer.recording, layer.source = True, source
            yield
        finally:
            for layer, (recording, old) in zip(layers, before, strict=True):
                layer.recording, layer.source, layer.record = recording, old, None

    def mask_loss(self, weight: float = 1.0) -> Tensor:
        """Return ``weight`` times the mean over layers of :func:`mask_bce` for the last recorded pass, 0-d."""
        losses = [mask_bce(r.logits, r.target) for r in self.records().values()]
        return weight * torch.stack(losses).mean()

    def auxiliary_loss(self) -> Tensor:
        """Return the mask loss at its present weight, 0-d; valid after a forward pass in training mode."""
        return self.mask_loss(self.mask_loss_weight)

    def cool_down(self, epoch: int, epochs: int, cooldown: float = 0.5) -> None:
        """Set the weight of the mask loss for an epoch; see :func:`mask_weight`."""
        self.mask_loss_weight = mask_weight(epoch, epochs, cooldown)

    def mask_accuracy(self) -> Tensor:
        """Return the share of mask bits that predictor and target share, mean over layers, 0-d."""
        return torch.stack([_agreement(r).mean() for r in self.records().values()]).mean()

    def macs(self, flops: Flops = "official") -> Tensor:
        """Return the multiply-adds of the masked convolutions in the last recorded pass, ``(B,)``, for each image.

        Args:
            flops: ``"official"`` as the authors count: every layer's input has as many channels as the layer that ran
                before kept (so a depthwise layer costs nothing once a channel is off, and residual sums are as sparse
                as their last branch), and predictors are free. ``"exact"``: a depthwise layer costs its own filters,
                a sum is dense, predictors count.
        """
        check_choice("flops", flops, ("official", "exact"))
        layers, records = self.masked_layers(), self.records()
        active = {name: r.mask.flatten(1).sum(1) for name, r in records.items()}
        total: Tensor | float = 0.0
        before = torch.full_like(next(iter(active.values())), self.in_chans)
        for name, record in records.items():
            conv, kept = layers[name].conv, active[name]
            taps = conv.kernel_size[0] * conv.kernel_size[1]
            if flops == "official":
                inputs = torch.div(before, conv.groups, rounding_mode="floor")
            elif conv.groups == 1 and layers[name].feeder in active:
                inputs = active[layers[name].feeder or ""]
            else:
                inputs = torch.full_like(kept, conv.in_channels // conv.groups)
            total, before = total + kept * record.pixels * inputs * taps, kept
            if flops == "exact":
                predictor = layers[name].mask
                assert predictor is not None
                total = total + predictor.linear.weight.numel()
        assert isinstance(total, Tensor)
        return total

    def dense_macs(self, image: Tensor, flops: Flops = "official") -> float:
        """Return the multiply-adds per image of the dense network's convolutions; ``"exact"`` has unmasked ones too."""
        masked = {id(m.conv) for m in self.masked_layers().values()}
        with self.recording("none"):
            pixels = self._convolutions(image)
        counted = [conv for conv in pixels if flops == "exact" or id(conv) in masked]
        return float(sum(conv.weight.numel() * pixels[conv] for conv in counted))

    def _convolutions(self, image: Tensor) -> dict[nn.Conv2d, int]:
        """Return the output pixels of each convolution that runs."""
        found: dict[nn.Conv2d, int] = {}

        def note(module: nn.Conv2d, inputs: Any, output: Tensor) -> None:
            found[module] = output.shape[2] * output.shape[3]

        handles = [m.register_forward_hook(note) for m in self.modules() if isinstance(m, nn.Conv2d)]
        try:
            with torch.no_grad(), _evaluating(self):
                self(image[:1])
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _unmasked_macs(self, image: Tensor) -> float:
        """Return the multiply-adds per image of convolutions without a mask, which are always computed."""
        owned = {id(m) for layer in self.masked_layers().values() if layer.mask is not None for m in layer.modules()}
        return sum(m.weight.numel() * p for m, p in self._convolutions(image).items() if id(m) not in owned)

    def estimate_flops(self, loader: Iterable[Any], *, flops: Flops = "official") -> FlopsEstimate:
        """Estimate the cost before training: run with the targets as masks, masking layer after layer.

        Args:
            loader: Batches of images, or tuples that begin with images; a few are enough.
            flops: See :meth:`macs`.

        Raises:
            ValueError: ``loader`` is empty.
        """
        return self._measure(loader, flops, "target").flops

    def report(self, loader: Iterable[Any], *, flops: Flops = "official") -> PruningReport:
        """Measure accuracy, cost and mask accuracy in eval mode.

        Args:
            loader: Batches of images, or tuples of images and labels.
            flops: See :meth:`macs`.

        Raises:
            ValueError: ``loader`` is empty.
        """
        return self._measure(loader, flops, "predictor")

    @torch.no_grad()
    def _measure(self, loader: Iterable[Any], flops: Flops, source: Source) -> PruningReport:
        check_choice("flops", flops, ("official", "exact"))
        macs, right, labelled, dense, fixed = [], 0, 0, 0.0, 0.0
        agree: dict[str, list[Tensor]] = {}
        kept: dict[str, list[Tensor]] = {}
        with _evaluating(self):
            for batch in loader:
                images, labels = (batch, None) if isinstance(batch, Tensor) else (batch[0], _second(batch))
                if not macs:
                    dense = self.dense_macs(images, flops)
                    fixed = self._unmasked_macs(images) if flops == "exact" else 0.0
                with self.recording(source):
                    logits = self(images)
                    macs.append(self.macs(flops).double() + fixed)
                    for name, record in self.records().items():
                        agree.setdefault(name, []).append(_agreement(record))
                        kept.setdefault(name, []).append(record.mask.flatten(1).sum(1))
                if labels is not None:
                    right += int((logits.argmax(1) == labels).sum())
                    labelled += len(labels)
        if not macs:
            raise ValueError("`loader` gave no images.")
        every = torch.cat(macs)
        estimate = FlopsEstimate(float(every.mean()), dense, float(every.std(correction=0)))
        layers = {}
        for name, layer in self.masked_layers().items():
            if name in kept:
                active, right_bits = float(torch.cat(kept[name]).mean()), float(torch.cat(agree[name]).mean())
                layers[name] = LayerReport(layer.conv.out_channels, active, right_bits)
        bits = sum(x.mask_accuracy for x in layers.values()) / len(layers)
        return PruningReport(right / labelled if labelled else None, estimate, bits, layers)

    def warm_start(self, loader: Iterable[Any], *, lr: float = 0.1) -> None:
        """Train the predictors alone to keep every filter, one step of SGD a batch.

        Args:
            loader: Batches of images, or tuples that begin with images.
            lr: Learning rate; momentum is 0.9.

        Raises:
            ValueError: ``lr`` is not positive.
        """
        check_positive("lr", lr)
        predictors = self.predictor_parameters()
        optimizer = torch.optim.SGD(predictors, lr=lr, momentum=0.9)
        with _evaluating(self):
            for batch in loader:
                with self.recording():
                    self(batch if isinstance(batch, Tensor) else batch[0])
                    logits = [r.logits for r in self.records().values()]
                    loss = torch.stack([F.softplus(-z).mean(0).sum() for z in logits]).mean()
                gradients = torch.autograd.grad(loss, predictors)
                for p, gradient in zip(predictors, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def fuse(self) -> DynamicNetwork:
        """Return an equivalent copy whose batch norms are folded into the convolutions; it still computes densely.

        Raises:
            RuntimeError: The network is in training mode.
        """
        fused = check_fusable(self)
        assert isinstance(fused, DynamicNetwork)
        for layer in fused.masked_layers().values():
            layer.fold()
        return fused

    def compile(self, *args: Any, **kwargs: Any) -> SkippingNetwork:  # type: ignore[override]
        """Return a copy for inference that computes only the filters that each image keeps.

        It takes the place of ``nn.Module.compile``; ``torch.compile(network)`` compiles the masked dense form.

        Raises:
            RuntimeError: The network is in training mode.
            TypeError: Arguments are given.
        """
        if args or kwargs:
            raise TypeError(
                "compile() of a pruned network takes no arguments; use torch.compile for graph compilation."
            )
        return skip_filters(self.fuse(), self.masked_layers())


def _second(batch: Any) -> Tensor | None:
    return batch[1] if len(batch) > 1 else None


def _agreement(record: LayerRecord) -> Tensor:
    """Return the share of agreeing bits of predictor and target, ``(B,)``."""
    predicted = (record.logits.sigmoid() > 0.5).to(record.target.dtype)
    return (predicted == record.target).flatten(1).to(torch.get_default_dtype()).mean(1)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode for a while, and each back into its own."""
    before = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training
