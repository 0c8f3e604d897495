"""Terminator: published sizes, slow nets, block and statistics by their equations, calibration, Kar, refusals."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynakern import create_model, load_official
from dynakern.measure import count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision.terminator import (
    GroupStandardize,
    HyperChannel,
    HyperInteraction,
    Kar2,
    Kar3,
    MAGNet,
    MAGNetLocal,
    RecursiveGate,
    SFNEBlock,
    SlowNet,
    Terminator,
    classify_images,
    slow_neural_loss,
    warmup_cosine,
)

SMALL = {
    "img_size": 8,
    "factors": (4, 1, 2, 1, 2),
    "local_sizes": (3, 7, 5, 5),
    "global_layers": (2, 2, 1, 1, 1),
    "global_hidden": 6,
    "local_hidden": 5,
    "channel_hidden": 4,
    "interact_hidden": (4, 6),
    "num_classes": 5,
    "omega_0": 1.0,
}
BRANCHES = {
    "local_sizes": (3, 5, 5, 7),
    "global_hidden": 6,
    "global_layers": 2,
    "local_hidden": 5,
    "local_layers": 2,
    "channel_hidden": 4,
    "interact_hidden": (4, 6),
    "trainable_renorm": False,
    "omega_0": 1.0,
}


def small(**options):
    torch.manual_seed(0)
    return Terminator(**{**SMALL, **options})


def standard(x, dims):
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, keepdim=True, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize(("name", "parameters"), [("terminator_cifar10", 1336855), ("terminator_cifar100", 1362865)])
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = create_model(name)
    assert count_parameters(model) == parameters
    assert sum(p.numel() for n, p in model.named_parameters() if "slow_net" in n) == 318976


@pytest.mark.parametrize("axes", [1, 2])
def test_slow_net_follows_its_equations(axes):
    torch.manual_seed(0)
    net = MAGNet(5, 3, 4, 2, axes=axes, omega_0=0.3).double()
    nn.init.normal_(net.bias_p)
    kernel, line = net(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert kernel.shape == (1, 3, *(5,) * axes)
    place = (1, 3)[:axes]
    c = torch.stack([line[i] for i in place])

    def at(layer, z):
        return layer.weight.flatten(1) @ z + layer.bias

    z = torch.sin(at(net.filters[0].linear, c))
    for i in range(2):
        z = torch.sin(at(net.filters[i + 1].linear, c)) * at(net.linears[i], z) + net.bias_p[(0, 0, *place)]
    assert_same(kernel[(0, slice(None), *place)], at(net.output_linear, z))


def test_initial_frequencies_and_scale():
    torch.manual_seed(0)
    net = MAGNet(32, 64, 4000, 1, omega_0=10.0)
    spread = [layer.linear.weight.abs().mean().item() for layer in net.filters]
    assert spread[0] / spread[1] == pytest.approx(2.0, rel=0.1)  # the Gamma variables have means 6 and 3
    assert spread[0] == pytest.approx(2 * torch.pi * 10 * 6 * 0.5 * 2**-0.5, rel=0.1)  # U(-1/sqrt 2, 1/sqrt 2) times
    assert net.output_linear.weight.std().item() == pytest.approx(4000**-0.5 / 32, rel=0.05)


def test_local_slow_net_follows_its_equations():
    torch.manual_seed(0)
    net, x = MAGNetLocal(3, 5, 4, 2, alpha=0.7, beta=0.2, omega_0=0.3).double(), randn(2, 3, 7, 6)
    points = torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 2).T.reshape(1, 2, 5, 5)
    q = F.gelu(net.fast_fc1(net.fast_reduce(F.adaptive_avg_pool2d(x, 5)).mean(0, keepdim=True)))
    z = torch.sin(net.filters[0].linear(points))
    for i in range(2):
        z = torch.sin(net.filters[i + 1].linear(points)) * net.linears[i](z) + net.bias_pk
        z = 0.7 * z + 0.2 * z / z.norm(dim=(2, 3), keepdim=True)
        z = z * net.fast_linears_x[i](q)
    assert_same(net(x), net.output_linear(z))


def test_gradients_pass_only_through_the_normalised_term():
    torch.manual_seed(0)
    net, x = MAGNetLocal(3, 3, 4, 1, beta=0.0, omega_0=0.3), torch.randn(2, 3, 7, 7)
    net(x).square().sum().backward()
    assert net.linears[0].weight.grad.abs().max() == 0
    assert net.fast_linears_x[0].weight.grad.abs().max() > 0
    learned = MAGNetLocal(3, 3, 4, 1, trainable_renorm=True, omega_0=0.3)
    learned(x).square().sum().backward()
    assert learned.alpha_renorm.grad.abs().max() > 0
    assert learned.beta_renorm.grad.abs().max() > 0


def test_gates_and_interactions_by_their_equations():
    torch.manual_seed(0)
    x, y = randn(2, 4, 6, 6, requires_grad=False), randn(2, 4, 6, 6, seed=1, requires_grad=False)
    gate = RecursiveGate(4, 6).double()
    nn.init.normal_(gate.bias_p)
    product = gate.fast_linear_k(x) * gate.fast_linear_q(gate.fast_linear_v(x))
    assert_same(gate(x), gate.fast_linear_y(F.gelu(standard(product, (2, 3))) + gate.bias_p))
    mixer = HyperChannel(4, 3, 2, 0.3).double()
    mean, g = x.mean((2, 3)), mixer.slow_net_gc().flatten()
    assert_same(mixer(x), x * torch.sigmoid(mean * g * mean)[:, :, None, None])
    both = HyperInteraction(4, 6, (3, 3), 2, 0.3).double()
    gc, gs = both.slow_net_gc_hi().reshape(1, 4, 1, 1), both.slow_net_gs_hi()
    yc, ys = y.mean((2, 3), keepdim=True), y.mean(1, keepdim=True)
    assert_same(both(y, x), x * torch.sigmoid(ys * gs * ys * (yc * gc * yc)))


def test_groups_are_standardised_by_turns():
    x = randn(3, 24, 4, 4, requires_grad=False) * 3 + 1
    y = GroupStandardize(24).double()(x)
    for group in range(12):
        rows = slice(2 * group, 2 * group + 2)
        assert_same(y[:, rows], standard(x[:, rows], (0, 2, 3) if group % 2 == 0 else (2, 3)))


def test_block_by_its_equations():
    torch.manual_seed(0)
    block = SFNEBlock(6, 12, 8, (3, 2), **BRANCHES).double().eval()
    x, pre, prepre = (randn(2, c, 8, 8, seed=c, requires_grad=False) for c in (6, 3, 2))
    b = block.fast_multi_branch
    kernel = b.slow_net_g()
    k = x * kernel
    fast = standard(b.Fast_Kernel_rgu_2(k) + b.Fast_Kernel_rgu(x), (2, 3))
    mix, hci = standard(b.channel_mixer_mlp(x), (2, 3)), standard(b.channel_mixer_hci(x), (2, 3))
    out = torch.einsum("bcij,bcjk->bcik", k, fast)
    out_x, out_h = torch.einsum("bcij,bcjk->bcik", k, mix), torch.einsum("bcij,bcjk->bcik", k, hci)

    def local(i, context, h):
        w = b.get_submodule(f"slow_net_l{i}").Kernel(context).transpose(0, 1)
        conv = F.conv2d(h, w, padding=w.shape[-1] // 2, groups=6)
        mixed = b.get_submodule(f"local_interact_conv_{i}").channel_mixer(conv)
        return F.gelu(standard(mixed, (0, 2, 3))) + getattr(b, f"bias{i}")

    l1, l2, l3, l4 = local(1, x, hci), local(2, hci, x), local(3, mix, x), local(4, x, mix)
    hyper = b.hyper_interact(out, x)
    parts = [out, l2, pre.repeat(1, 2, 1, 1), fast, out_x, l1, out.sigmoid() * out, l3, out_h, l4]
    parts += [prepre.repeat(1, 3, 1, 1), hyper]
    y = b.bottleneck_layer(torch.cat(parts, dim=1))
    expected = F.gelu(block.norm(y)) + block.bias
    with torch.no_grad():
        assert_same(block(x, pre, prepre)[0], expected)  # added up part by part
    assert_same(block(x, pre, prepre)[0], expected)  # one convolution
    assert_same(block(x, pre, prepre)[1], kernel)


def test_one_block_sees_the_whole_image():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 12, 12, requires_grad=True)
    y, _ = SFNEBlock(6, 12, 12, **BRANCHES)(x)
    (gradient,) = torch.autograd.grad(y[0, :, 8, 8].sum(), x)
    assert (gradient[0].abs().amax(0) > 0).all()


def test_slow_loss():
    torch.manual_seed(0)
    kernels = [torch.randn(1, c, 4, 4) for c in (3, 5, 2)]
    a, b, c = (k[0].sum(0) for k in kernels)
    expected = ((b - a) ** 2).mean() + ((c - a) ** 2).mean() + ((c - b) ** 2).mean()
    assert_same(slow_neural_loss(kernels), expected)
    assert slow_neural_loss(kernels[:1]) == 0
    network, x = small().train(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="before a forward pass in training mode"):
        network.auxiliary_loss()
    _, loss = network(x, return_slow_loss=True)
    assert torch.equal(loss, network.auxiliary_loss())
    copy.deepcopy(network)  # without the graph
    network.auxiliary_loss().backward()
    assert network.blocks[4].fast_multi_branch.slow_net_g.Kernel.output_linear.weight.grad.abs().max() > 0
    assert network.out_layer.weight.grad is None


def test_l2_term_takes_what_the_names_say():
    network = small()
    inside = ("fast_multi_branch",)
    fast = sum(p.norm() for n, p in network.named_parameters() if any(i in n for i in inside) and "Kernel" not in n)
    slow = sum(
        p.norm() for n, p in network.named_parameters() if "Kernel" in n and n.endswith("weight") and p.ndim == 4
    )
    assert_same(network.l2_term(0.5), 0.5 * (fast + 1e-6 * slow))


def test_kernels_are_kept_until_a_weight_changes():
    torch.manual_seed(0)
    net = SlowNet(5, 2, 4, 1, omega_0=1.0).eval()
    with torch.no_grad():
        first = net()
        assert net() is first
        net.Kernel.bias_p.add_(1.0)
        assert not torch.equal(net(), first)
        changed = net()
    assert net() is not changed  # gradients are recorded
    assert net().requires_grad


def test_calibrated_predictions_do_not_depend_on_the_batch():
    network, x = small().eval(), torch.randn(12, 3, 8, 8)
    with torch.no_grad():
        together = network(x)
        assert float((network(x[:2]) - together[:2]).abs().max()) > 1e-4  # as published
        assert network.calibrate([x]) is network
        assert not network.training
        assert_same(network(x[:1]), network(x)[:1], rtol=1e-4)
        # The statistics of this very batch, but for the variance's n / (n - 1).
        assert_same(network(x), together, rtol=1e-2)
    assert "blocks.0.norm.batch.running_mean" in network.state_dict()
    other = small(batch_stats="running").eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), network(x))


def test_calibration_averages_over_batches():
    network, x = small(factors=(4,), global_layers=(2,)), torch.randn(9, 3, 8, 8)
    network.train().calibrate([(x[:3],), (x[3:6],), (x[6:],)])
    assert network.training
    context = network.blocks[0].fast_multi_branch.slow_net_l1.running_context
    assert_same(context, F.adaptive_avg_pool2d(x.mean(0), 3))


def test_running_statistics_follow_training():
    network, x = small(batch_stats="running", factors=(4,), global_layers=(2,), dropout=0.0), torch.randn(6, 3, 8, 8)
    network.train()
    for _ in range(200):
        with torch.no_grad():
            network(x)
            expected = network(x)
    with torch.no_grad():
        assert_same(network.eval()(x), expected, rtol=1e-2)


def test_official_checkpoints_fit_networks_with_running_statistics():
    state = small().state_dict()
    state["blocks.0.train_length"] = torch.tensor([3])
    network = load_official(small(batch_stats="running"), {f"network.{k}": v for k, v in state.items()})
    assert torch.equal(network.out_layer.weight, state["out_layer.weight"])


def test_kar_by_hand():
    p = torch.nn.Parameter(torch.zeros(2))
    three = Kar3([p], lr=1.0, betas=(0.5, 0.9))
    path = []
    for g in (1.0, -0.2, -0.3):
        p.grad = torch.tensor([g, 0.0])
        three.step()
        path.append(p[0].item())
    # averages before each step: (0, 0), (0.5, 0.1), (0.15, 0.07)
    assert path == [-1.0, -2.0, -3.0]
    assert p[1].item() == 0
    q = torch.nn.Parameter(torch.zeros(1))
    two = Kar2([q], lr=1.0, beta=0.5)
    path = []
    for g in (1.0, -2.0, -2.0):
        q.grad = torch.tensor([g])
        two.step()
        path.append(q.item())
    assert path == [-1.0, -1.0, 1.0]  # averages before each step: 0, 0.5, -0.75


def test_kar_runs_a_closure_and_restores_its_state():
    p = torch.nn.Parameter(torch.ones(3))

    def closure():
        optimizer.zero_grad()
        loss = (p * torch.tensor([1.0, 2.0, -1.0])).sum()
        loss.backward()
        return loss

    optimizer = Kar3([p], lr=0.1)
    assert float(optimizer.step(closure).detach()) == 2.0
    twin = torch.nn.Parameter(p.detach().clone())
    other = Kar3([twin], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    for q, o in ((p, optimizer), (twin, other)):
        q.grad = torch.tensor([-0.1, 1.0, 0.0])
        o.step()
    assert torch.equal(p, twin)


def test_schedule_warms_up_and_falls():
    factors = [warmup_cosine(epoch, 100) for epoch in range(101)]
    assert factors[0] == pytest.approx(1e-8)
    assert max(factors) == factors[8] == 1
    assert all(a > b for a, b in pairwise(factors[8:]))


def test_refusals():
    with pytest.raises(ValueError, match="size 8 on axis 3"):
        small()(torch.zeros(2, 3, 8, 9))
    with pytest.raises(TypeError, match="floating-point"):
        small()(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 12, got 9"):
        small(factors=(3,), global_layers=(1,))
    with pytest.raises(ValueError, match=r"odd and at most the side of the image, 8, got 9"):
        small(local_sizes=(3, 9, 5, 5))
    with pytest.raises(ValueError, match=r"odd and at most the side of the image, 8, got 4"):
        small(local_sizes=(3, 4, 5, 5))
    with pytest.raises(ValueError, match="four entries"):
        small(local_sizes=(3, 5))
    with pytest.raises(ValueError, match="one entry a block"):
        small(factors=(4, 1))
    with pytest.raises(ValueError, match="earlier map of 24 channels cannot be repeated to 36"):
        SFNEBlock(36, 36, 8, (24,), **BRANCHES)
    with pytest.raises(ValueError, match="two images or more"):
        small().eval()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="two images or more"):
        small(batch_stats="running").train()(torch.zeros(1, 3, 8, 8))
    network = small()
    with pytest.raises(ValueError, match="gave no images"):
        network.calibrate([])
    assert network.batch_stats == "batch"
    with pytest.raises(ValueError, match="`kernel_size` must be odd, got 4"):
        MAGNetLocal(3, 4, 4, 1)
    with pytest.raises(ValueError, match="at least one kernel"):
        slow_neural_loss([])
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got 1.0"):
        Kar3([torch.nn.Parameter(torch.zeros(1))], betas=(0.5, 1.0))


@pytest.mark.parametrize(("in_chans", "img_size"), [(1, 8), (3, 16), (4, 9)])
def test_classifier_for_any_image(in_chans, img_size):
    network = classify_images(in_chans=in_chans, img_size=img_size, num_classes=3, width=0.5)
    assert network(torch.randn(2, in_chans, img_size, img_size)).shape == (2, 3)
