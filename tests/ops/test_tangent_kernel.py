"""The empirical tangent kernel against closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern.ops import tangent_kernel
from dynakern.sequence import S4D
from dynakern.testing import assert_same, randn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def inputs(n, width=3):
    return randn(n, width, requires_grad=False)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_two_layers_in_closed_form(method):
    torch.manual_seed(0)
    net, x, y = Net().double(), inputs(5), inputs(4) + 1
    h, k = torch.tanh(net.first(x)), torch.tanh(net.first(y))
    last = (h @ k.T + 1)[..., None, None] * torch.eye(2, dtype=torch.float64)
    slopes = torch.einsum("ia,ja,na,ma->nmij", net.second.weight, net.second.weight, 1 - h**2, 1 - k**2)
    expected = last + slopes * (x @ y.T + 1)[..., None, None]
    full = tangent_kernel(net, x, y, outputs="full", method=method, chunk_size=2)
    assert_same(full, expected)
    mean = tangent_kernel(net, x, y, method=method, chunk_size=3)
    assert_same(mean, expected.diagonal(dim1=2, dim2=3).mean(-1))


def test_kernel_of_a_set_with_itself_is_symmetric_and_semidefinite():
    torch.manual_seed(0)
    kernel = tangent_kernel(Net().double(), inputs(6), chunk_size=4)
    assert_same(kernel, kernel.T)
    assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-10


def test_frozen_parameters_do_not_count():
    torch.manual_seed(0)
    net, x = Net().double(), inputs(3)
    net.first.requires_grad_(False)
    h = torch.tanh(net.first(x))
    assert_same(tangent_kernel(net, x), h @ h.T + 1)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        tangent_kernel(net, x)


def test_networks_with_fast_operators_give_one_kernel_by_both_methods():
    torch.manual_seed(0)
    net = S4D(2, d_state=4).double().eval()
    x = randn(3, 8, 2, requires_grad=False)

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)
            return (y if isinstance(y, torch.Tensor) else y[0]).mean(1)

    assert_same(tangent_kernel(Output(), x, method="vmap"), tangent_kernel(Output(), x, method="loop"), rtol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="at least one sample"):
        tangent_kernel(Net(), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        tangent_kernel(Net(), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        tangent_kernel(Net(), torch.zeros(2, 3), outputs="meen")
    with pytest.raises(ValueError, match="`chunk_size` must be a positive"):
        tangent_kernel(Net(), torch.zeros(2, 3), chunk_size=0)
