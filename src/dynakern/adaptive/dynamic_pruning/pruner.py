"""Wrap any convolutional network for dynamic pruning: find its Conv-BN-activation chains by watching a forward pass."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynakern.adaptive.dynamic_pruning.layers import MaskedConv
from dynakern.adaptive.dynamic_pruning.network import DynamicNetwork

__all__ = ["DynamicPruner"]

# Functions with value 0 at 0, so that a mask before them is a mask after them.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu_: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU,
    Tensor.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish,
    F.leaky_relu: nn.LeakyReLU,
}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_POOLINGS = {  # keep a channel of zeros a channel of zeros
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
}


@dataclass(eq=False)
class _Call:
    """One function call: what it was, whose results it took, and whose input its result became."""

    function: Any
    sources: list[_Call]
    module: nn.Module | None = None
    users: list[_Call] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Write down which results flow into which functions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.kept: list[Tensor] = []  # alive, so that no two share an id
        self.made: dict[int, _Call] = {}
        self.owners = {id(m.weight): m for m in network.modules() if isinstance(m, nn.Conv2d)}
        self.norms = {id(m.running_mean): m for m in network.modules() if isinstance(m, nn.BatchNorm2d)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        for listed in args:
            if isinstance(listed, list | tuple):
                tensors += [a for a in listed if isinstance(a, Tensor)]
        sources = [self.made[id(a)] for a in tensors if id(a) in self.made]
        module: nn.Module | None = None
        if func is torch.conv2d:
            module = self.owners.get(id(tensors[1]))
        elif func is F.batch_norm:
            module = next((self.norms[id(a)] for a in tensors if id(a) in self.norms), None)
        call = _Call(func, sources, module)
        for source in sources:
            source.users.append(call)
        self.calls.append(call)
        self.kept.append(out)
        self.made[id(out)] = call
        return out


@dataclass
class _Chain:
    """A convolution and its batch norm, by name, its activation, and its calls."""

    conv: str
    norm: str
    activation: type[nn.Module] | None
    call: _Call
    end: _Call


class DynamicPruner(DynamicNetwork):
    """Give a trained network mask predictors, so that each image skips the filters it does not need.

    The network is copied. Every convolution that a batch norm follows becomes a :class:`MaskedConv`: VGGs, ResNets
    and MobileNets work, of this library or of others. A mask before a sum leaves the other branch dense; projections
    in shortcuts are not masked. A network made of masked layers without predictors (``masked=False``) gets these.

    Args:
        model: A network that maps images to logits.
        mass: See :class:`MaskedConv`.
        mode: See :class:`MaskedConv`.
        skip: Names of convolutions to leave dense, with shell-style wildcards.
        in_chans: Channels of the images; by default the first convolution's.
        img_size: Side of the image that is sent through ``model`` once, to see how its layers connect.
        **masking: Further options of :class:`MaskedConv`: target, embedding, softmax, pool, safe.

    Raises:
        ValueError: A convolution is not followed by a batch norm alone, runs twice, or none is found; or an option is
            out of range.

    Example:
        >>> from dynakern.layers.resnet import resnet20
        >>> pruned = DynamicPruner(resnet20(), mass=0.9)
        >>> pruned(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> len(pruned.masked_layers())
        19
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mass: float | None = 0.9,
        mode: str = "decoupled",
        skip: Sequence[str] = (),
        in_chans: int | None = None,
        img_size: int = 32,
        **masking: Any,
    ) -> None:
        super().__init__()
        network, options = copy.deepcopy(model), {"mass": mass, "mode": mode, **masking}
        convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        if not convs:
            raise ValueError(f"{type(model).__name__} holds no Conv2d that could be pruned.")
        self.in_chans = in_chans or convs[0].in_channels
        prepared = {n: m for n, m in network.named_modules() if isinstance(m, MaskedConv)}
        if prepared:
            self._order = [f"model.{name}" for name in prepared]
            for name, layer in prepared.items():
                made = MaskedConv(layer.conv, layer.bn, layer.activation, activates=layer.activates, **options)
                made.feeder = None if layer.feeder is None else f"model.{layer.feeder}"
                _replace(network, name, made)
        else:
            size = (2, self.in_chans, img_size, img_size)
            chains = _find_chains(network, torch.zeros(size, device=convs[0].weight.device), skip)
            self._order = [f"model.{chain.conv}" for chain in chains]
            _mask_chains(network, chains, options)
        self.model = network
        for layer in self.masked_layers().values():
            layer.train(model.training)
        self.train(model.training)

    def masked_layers(self) -> dict[str, MaskedConv]:
        """Return the layers by name, in the order in which they run."""
        found = {name: self.get_submodule(name) for name in self._order}
        return {name: m for name, m in found.items() if isinstance(m, MaskedConv)}

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network returns, logits ``(B, num_classes)``, of images ``(B, in_chans, H, W)``."""
        return self.model(x)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _find_chains(network: nn.Module, image: Tensor, skip: Sequence[str]) -> list[_Chain]:
    """Run the network once and return its chains in order."""
    names = {id(m): name for name, m in network.named_modules()}
    training = {m: m.training for m in network.modules()}
    watch = _Watch(network)
    try:
        network.eval()
        with torch.no_grad(), watch:
            start = image.clone()
            network(start)
    finally:
        for module, mode in training.items():
            module.training = mode
    chains: list[_Chain] = []
    seen: set[int] = set()
    for call in watch.calls:
        if not isinstance(call.module, nn.Conv2d):
            continue
        name = names[id(call.module)]
        if id(call.module) in seen:
            raise ValueError(f"The convolution {name!r} runs more than once; layers that are shared cannot be masked.")
        seen.add(id(call.module))
        if any(fnmatch.fnmatch(name, pattern) for pattern in skip):
            continue
        after = call.users[0] if len(call.users) == 1 else None
        if after is None or not isinstance(after.module, nn.BatchNorm2d):
            raise ValueError(
                f"The convolution {name!r} must be followed by a BatchNorm2d alone; name it in `skip` to keep it dense."
            )
        then = after.users[0] if len(after.users) == 1 else None
        projection = then is not None and then.function in _ADDITIONS
        projection = projection and any(len(s.users) > 1 for s in call.sources)
        if projection:
            continue
        activation = _ACTIVATIONS.get(then.function) if then is not None else None
        chains.append(_Chain(name, names[id(after.module)], activation, call, after))
    if not chains:
        raise ValueError("The network has no convolution to mask.")
    return chains


def _mask_chains(network: nn.Module, chains: Sequence[_Chain], options: dict[str, Any]) -> None:
    """Replace the convolutions by masked ones, which take over the batch norms."""
    by_end = {id(chain.end): chain.conv for chain in chains}
    for chain in chains:
        conv, norm = network.get_submodule(chain.conv), network.get_submodule(chain.norm)
        assert isinstance(conv, nn.Conv2d)
        act = None if chain.activation is None else chain.activation()
        layer = MaskedConv(conv, norm, act, activates=False, **options)
        feeder = _feeder(chain.call, by_end)
        layer.feeder = None if feeder is None else f"model.{feeder}"
        _replace(network, chain.norm, nn.Identity())
        _replace(network, chain.conv, layer)


def _feeder(call: _Call, by_end: dict[int, str]) -> str | None:
    """Return the chain whose masked channels are still zeros in the input of ``call``, or None."""
    while len(call.sources) == 1:
        call = call.sources[0]
        if id(call) in by_end:
            return by_end[id(call)]
        if call.function not in _ACTIVATIONS and call.function not in _POOLINGS:
            return None
    return None
