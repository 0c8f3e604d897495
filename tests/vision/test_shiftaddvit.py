"""ShiftAddViT: shifts to the last bit, routing token by token, attention pair by pair, hashes, counts, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynakern import create_model, load_official
from dynakern.measure import count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision import PVT, LinearAngularAttention, PVTv2, ShiftLinear, convert_to_shiftadd
from dynakern.vision.shiftaddvit import (
    UNIT_COSTS,
    Experts,
    KernelHash,
    NaiveGate,
    NoisyGate,
    SoftmaxAttention,
    binary_codes,
    classify_images,
    energy_report,
    masked_sums,
    shift_add_experts,
    to_fixed_point,
)
from dynakern.vision.shiftaddvit.attention import _maximise

SMALL = {"embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "depths": (1, 1), "num_classes": 4}
CODES = {"bits": 4, "num_anchors": 3, "topk": 2}


def shift_layer(mode="ps", I=9, O=7, **options):
    torch.manual_seed(0)
    layer = ShiftLinear(I, O, mode=mode, dtype=torch.float64, **options)
    with torch.no_grad():
        if mode == "ps":
            layer.shift.uniform_(-20, 3)
            layer.sign.uniform_(-1.5, 1.5)
        else:
            layer.weight.mul_(10 ** (4 * torch.rand_like(layer.weight) - 2))
            layer.weight[0, :2] = torch.tensor([0.0, 1e-30])
    return layer


def test_fixed_point_floors_and_saturates():
    v = torch.tensor([0.3, -0.3, 9.0, -9.0, 0.25], dtype=torch.float64)
    assert to_fixed_point(v, 4, 2).tolist() == [0.25, -0.5, 7.0, -8.0, 0.25]
    assert to_fixed_point(v, 1).tolist() == [0.0, -2.0, 0.0, -2.0, 0.0]
    assert float(to_fixed_point(torch.tensor(1.75, dtype=torch.float16))) == 1.75
    w = v.clone().requires_grad_()
    to_fixed_point(w, 4, 2).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(v))


@pytest.mark.parametrize("mode", ["ps", "q"])
@pytest.mark.parametrize("bits", [2, 5, 7])
def test_weights_are_powers_of_two_in_range(mode, bits):
    layer = shift_layer(mode, weight_bits=bits)
    lowest = 2 ** (bits - 1) - (2 if mode == "ps" else 1)
    for training in (True, False):
        with torch.no_grad():
            W = layer.train(training).decoded_weight()
        p = -torch.log2(W[W != 0].abs())
        assert torch.equal(p, p.round())
        assert 0 <= float(p.min()) <= float(p.max()) <= lowest
    if mode == "q":
        assert float(W[0, 0].detach()) == 0.0
        assert float(W[0, 1].detach()) == 2.0**-lowest


def test_ps_equals_its_definition_and_gradients():
    layer, x = shift_layer(), randn(4, 9)
    start = layer.shift.detach().clone()
    g = randn(4, 7, seed=5, requires_grad=False)
    y = layer(x)
    (y * g).sum().backward()
    shift, sign = start.clamp(-14, 0), layer.sign.detach()
    assert torch.equal(layer.shift.detach(), shift)  # clamped in place
    s = torch.sign(torch.round(sign))
    power = 2.0 ** torch.round(shift)
    fixed = torch.floor(x.detach() * 65536) / 65536
    assert_same(y, fixed @ (power * s).T + torch.floor(layer.bias.detach() * 65536) / 65536)
    assert_same(layer.sign.grad, g.T @ fixed)
    assert_same(layer.shift.grad, (g.T @ fixed) * s * power * math.log(2))
    assert_same(x.grad, g @ (power * s))
    assert_same(layer.bias.grad, g.sum(0))
    assert int((s == 0).sum()) > 0


def test_q_rounds_logarithms_and_passes_gradients():
    layer, x, g = shift_layer("q"), randn(4, 9), randn(4, 7, seed=5, requires_grad=False)
    start = layer.weight.detach().clone()
    (layer(x) * g).sum().backward()
    clamped = torch.sign(start) * start.abs().clamp(2.0**-15, 1)
    assert torch.equal(layer.weight.detach(), clamped)
    W = layer.decoded_weight().detach()
    ratio = (torch.log2(W.abs()) - torch.log2(clamped.abs())).nan_to_num()
    assert float(ratio.abs().max()) <= 0.5 + 1e-12
    assert_same(layer.weight.grad, g.T @ (torch.floor(x.detach() * 65536) / 65536))
    assert_same(x.grad, g @ W)


def test_eval_leaves_parameters_alone_and_follows_them():
    for mode, name in (("ps", "shift"), ("q", "weight")):
        layer, x = shift_layer(mode).eval(), randn(3, 9, requires_grad=False)
        before = getattr(layer, name).detach().clone()
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(getattr(layer, name), before)
            assert torch.equal(layer(x), y)  # decoded once
            getattr(layer, name).neg_()
            assert not torch.allclose(layer(x), y)
        assert_same(layer(x), layer.eval()(x.clone()))


def test_stochastic_rounding_is_unbiased_and_for_training():
    torch.manual_seed(0)
    layer = ShiftLinear(1, 20000, bias=False, rounding="stochastic")
    with torch.no_grad():
        layer.shift.fill_(-1.25)
        layer.sign.fill_(1.0)
        W = layer.decoded_weight()
        assert set(W.unique().tolist()) == {0.25, 0.5}
        assert abs(float((W == 0.5).float().mean()) - 0.75) < 0.02
        assert layer.eval().decoded_weight().unique().tolist() == [0.5]


@pytest.mark.parametrize("mode", ["ps", "q"])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer(mode, bias):
    layer, x = shift_layer(mode, bias=bias).eval(), 3 * randn(2, 5, 9, requires_grad=False)
    packed = layer.pack()
    with torch.no_grad():
        assert torch.equal(packed.decoded_weight(torch.float64), layer.decoded_weight())
        assert torch.equal(packed(x), layer(x))
        assert packed.codes.element_size() * packed.codes.numel() == 63
        exact = packed.forward_shift(x)
        slack = layer(x) - exact  # shifting rounds each term down where the sign is +, up where it is -
        assert float(slack.abs().max()) <= 9 * 2.0**-16
    integers = torch.floor(x * 65536).long()
    for b in range(2):
        for t in range(5):
            for o in range(7):
                total = 0 if layer.bias is None else math.floor(float(layer.bias[o].detach()) * 65536)
                for i in range(9):
                    code = int(packed.codes[o, i])  # 127 - p, minus 128 for a negative weight, 0 for 0
                    if code:
                        p = 127 - code if code > 0 else -1 - code
                        total += (1 if code > 0 else -1) * (int(integers[b, t, i]) >> p)
                assert float(exact[b, t, o]) == total / 65536
    assert set(packed.state_dict()) == ({"codes", "bias"} if bias else {"codes"})


def test_rounding_of_a_linear_map():
    torch.manual_seed(0)
    linear = nn.Linear(8, 5).double()
    with torch.no_grad():
        linear.weight[0, 0] = 0
        linear.weight[1, 1] = 3.0
    for mode in ("ps", "q"):
        layer = ShiftLinear.from_linear(linear, mode=mode).eval()
        W = layer.decoded_weight().detach()
        assert float(W[0, 0]) == 0.0
        assert float(W[1, 1]) == 1.0
        rest = linear.weight.detach().clone().clamp(-1, 1)
        assert float((W - rest).abs().div(rest.abs().clamp_min(1e-9)).max()) < 0.42  # 2^0.5 - 1
        assert torch.equal(layer.bias, linear.bias)


def mixture(gate="noisy", **options):
    torch.manual_seed(0)
    return shift_add_experts(6, 5, gate=gate, **options).double()


@pytest.mark.parametrize("gate", ["noisy", "naive"])
@pytest.mark.parametrize("combine", ["product", "logexp"])
def test_tokens_take_one_expert_each(gate, combine):
    m, x = mixture(gate, combine=combine).eval(), randn(2, 7, 6, requires_grad=False)
    expected = torch.zeros(2, 7, 5, dtype=torch.float64)
    chosen = []
    for b in range(2):
        for t in range(7):
            token = x[b, t : t + 1]
            logits = token @ m.gate.w_gate if gate == "noisy" else m.gate.gate(token)
            i = int(logits.argmax())
            p = float(logits.softmax(1)[0, i].detach()) if gate == "noisy" else 1.0
            y = m.experts[i](token)[0].detach()
            expected[b, t] = p * y if combine == "product" else torch.log(p * y.exp() + 2.220446049250313e-16)
            chosen.append(i)
    assert set(chosen) == {0, 1}
    assert_same(m(x), expected)


def test_an_expert_may_get_no_token():
    m = mixture("naive").eval()
    with torch.no_grad():
        m.gate.gate.bias.copy_(torch.tensor([100.0, -100.0]))
    x = randn(3, 6)
    assert_same(m(x), m.experts[0](x))
    m(x).sum().backward()
    assert float(m.experts[1].sign.grad.abs().sum()) == 0
    assert m(x[:0]).shape == (0, 5)


def test_balance_loss():
    gate, x = NoisyGate(6).double(), randn(50, 6, requires_grad=False)

    def variation(a, b):
        mean = (a + b) / 2
        return ((a - mean) ** 2 + (b - mean) ** 2) / (mean**2 + 1e-10)

    p = (x @ gate.w_gate).softmax(1).detach()
    counts = F.one_hot(p.argmax(1), 2).sum(0).double()
    sums = p.sum(0)
    routing = gate.eval()(x)
    assert_same(routing.loss, variation(6 * sums[0], 4 * sums[1]) + variation(6 * counts[0], 4 * counts[1]))
    official = NoisyGate(6, weigh_counts=False).double().eval()
    official.load_state_dict(gate.state_dict())
    assert_same(official(x).loss, variation(6 * sums[0], 4 * sums[1]) + variation(counts[0], counts[1]))
    # in training, the expected load under the noise: each gate's chance to win averages to how often it wins
    logits = (x @ gate.w_gate).detach()
    torch.manual_seed(0)
    wins = torch.stack([(logits + 0.5 * torch.randn_like(logits)).argmax(1) for _ in range(4000)])
    noisy = logits + 0.5 * torch.randn(4000, *logits.shape)
    chance = torch.special.ndtr((logits - noisy.flip(2)) / 0.5)[..., 1].mean()
    assert abs(float(wins.double().mean() - chance)) < 0.01
    loss = gate.train()(x).loss
    loss.backward()
    assert float(gate.w_gate.grad.abs().sum()) > 0
    assert NaiveGate(6)(x.float()).loss is None


def test_a_trained_mixture_can_be_copied():
    m, x = mixture(), randn(9, 6)
    (m(x).square().mean() + 0.01 * m.last_loss).backward()
    twin = copy.deepcopy(m)
    assert twin.last_loss is None
    assert m.last_loss is not None
    assert float(m.gate.w_gate.grad.abs().sum()) > 0


def test_binary_codes():
    x = randn(2, 3, 4, 5)
    codes = binary_codes(x)
    for b in range(2):
        assert torch.equal(codes[b], (x[b] > x[b].mean()).double())
    assert torch.equal(binary_codes(x, "batch"), (x > x.mean()).double())
    codes.sum().backward()
    assert torch.equal(x.grad, ((x >= 0) & (x <= 1)).double())


def test_masked_sums_are_additions_of_rows():
    q = (randn(2, 3, 6, 4, requires_grad=False) > 0).double()
    v = randn(2, 3, 6, 5, seed=1, requires_grad=False)
    sums = masked_sums(q, v)
    for bit in range(4):
        rows = [v[:, :, t] * q[:, :, t, bit, None] for t in range(6)]
        assert_same(sums[:, :, bit], sum(rows))


@pytest.mark.parametrize("kind", ["binary", "hash"])
def test_attention_pair_by_pair(kind):
    torch.manual_seed(0)
    m = LinearAngularAttention(8, 2, codes=kind, bits=5, num_anchors=3, topk=2, dtype=torch.float64)
    x = randn(2, 11, 8, requires_grad=False)
    m.train()(x)
    m.eval()
    q, k, v = m.encode(x)
    assert set(q.unique().tolist()) == {0.0, 1.0}
    assert kind == "binary" or q is k
    kernel = 0.5 * torch.eye(11, dtype=torch.float64) + q @ k.transpose(-2, -1) / math.pi  # the whole N x N matrix
    r = kernel @ v
    r = r / r.norm(dim=-1, keepdim=True)
    padded = F.pad(v, (0, 0, 4, 4))
    r = r + sum(m.dconv.weight[:, 0, i, 0, None, None] * padded[:, :, i : i + 11] for i in range(9))
    assert_same(m(x), m.proj(torch.cat([r[:, 0], r[:, 1]], -1)))
    assert torch.isfinite(m(torch.zeros(1, 11, 8, dtype=torch.float64))).all()


def hashing(**options):
    torch.manual_seed(0)
    options = {"bits": 6, "num_anchors": 5, "topk": 4, "dtype": torch.float64, **options}
    return KernelHash(2, 3, **options), F.normalize(randn(3, 2, 20, 3, requires_grad=False), dim=-1)


def test_hash_equals_its_definition():
    ksh, x = hashing()
    ksh.fit(x)
    distance = (x.unsqueeze(3) - ksh.anchor.unsqueeze(2)).square().sum(-1)
    sigma = distance.mean((2, 3), keepdim=True)
    z = torch.einsum("bhnm,hkm->bhnk", torch.exp(-distance / (2 * sigma)) - ksh.mvec, ksh.A)
    assert torch.equal(ksh(x), (z > 0).double())
    w = x.clone().requires_grad_()
    ksh(w).sum().backward()
    assert float(w.grad.abs().sum()) > 0
    assert all((ksh.anchor[0, :, i, None] == x[0]).all(-1).any() for i in range(5))


def test_one_bit_is_learnt_as_torch_would():
    torch.manual_seed(0)
    K, S = randn(2, 3, 7, 4, requires_grad=False), randn(2, 3, 7, 7, seed=1, requires_grad=False)
    S = S + S.transpose(-2, -1)
    a = nn.Parameter(randn(3, 4, seed=2, requires_grad=False))
    start = a.detach().clone()
    optimizer = torch.optim.SGD([a], lr=5e-4, momentum=0.9, nesterov=True)
    for _ in range(100):
        y = 2 / (1 + torch.exp(-torch.einsum("bhnm,hm->bhn", K, a))) - 1
        loss = -torch.einsum("bhn,bhnl,bhl->bh", y, S, y).mean() / (7 * 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(_maximise(K, S, start, 16), a)
    assert not torch.allclose(start, a)


def test_fitting_makes_codes_of_similar_tokens_alike():
    ksh, x = hashing(bits=16, num_anchors=10)
    x = F.normalize(x + 2 * randn(1, 2, 2, 3, seed=3, requires_grad=False)[:, :, torch.arange(20) % 2], dim=-1)
    before = ksh.A.clone()
    ksh.fit(x)

    def agreement(codes):
        same = (codes.unsqueeze(2) == codes.unsqueeze(3)).double().mean(-1)
        likeness = x @ x.transpose(-2, -1)
        return float(same[likeness > 0.9].mean() - same[likeness < 0].mean())

    fitted = agreement(ksh(x))
    ksh.A.copy_(before)
    assert fitted > agreement(ksh(x))
    assert fitted > 0.3


def test_hash_knows_whether_it_is_fitted():
    ksh, x = hashing()
    with pytest.raises(RuntimeError, match="not fitted: call fit_hashing"):
        ksh.eval()(x)
    ksh.train()(x)
    assert ksh.fitted
    other, _ = hashing()
    other.load_state_dict(ksh.state_dict())
    assert torch.equal(other.eval()(x), ksh.eval()(x))
    empty, _ = hashing()
    empty.load_state_dict(hashing()[0].state_dict())
    assert not empty.fitted
    with pytest.raises(ValueError, match="20 tokens, 21 anchors"):
        hashing(num_anchors=21)[0].fit(x)
    with pytest.raises(ValueError, match="at most half the number of tokens, got 11 of 20"):
        hashing(topk=11)[0].fit(x)


COUNTS = [  # M parameters: baseline, hashed, with experts; G products at 224: baseline, hashed
    ("b0", 3.667, 3.136, 6.771, 0.566, 0.544),
    ("b1", 14.009, 11.892, 26.387, 2.108, 2.047),
    ("b2", 25.363, 20.368, 49.520, 4.027, 3.889),
    ("b3", 45.239, 34.085, 90.362, 6.897, 6.601),
    ("b4", 62.556, 45.667, 124.798, None, None),
    ("b5", 81.956, 58.953, 164.435, None, None),
]


@pytest.mark.parametrize(("name", "baseline", "hashed", "experts", "macs", "hashed_macs"), COUNTS)
def test_counts_are_those_of_the_official_networks(name, baseline, hashed, experts, macs, hashed_macs):
    model = create_model(f"pvt_v2_{name}", device="meta")
    base = create_model(f"pvt_v2_{name}", device="meta", attention="reduced")
    mixed = create_model(f"pvt_v2_{name}", device="meta", moe_attn=True, moe_mlp=True, gate="naive")
    assert round(count_parameters(base) / 1e6, 3) == baseline
    assert round(count_parameters(model) / 1e6, 3) == hashed
    assert round(count_parameters(mixed) / 1e6, 3) == experts
    if macs is None:
        return
    distances = 0  # a matrix product here, elementwise in the official code
    for m in model.modules():
        if isinstance(m, KernelHash):
            m.fitted = True
            m.register_forward_hook(
                lambda m, x, y: sizes.append(x[0].shape[1] * x[0].shape[2] * m.anchor[0, 0].numel())
            )
    sizes = []
    for network, expected in ((base, macs), (model, hashed_macs)):
        with FlopCounterMode(display=False) as counter:
            network.eval()(torch.empty(1, 3, 224, 224, device="meta"))
        distances = sum(sizes) if network is model else 0
        assert round((counter.get_total_flops() / 2 - distances) / 1e9, 3) == pytest.approx(expected, abs=0.0011)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 13.2), ("small", 24.5), ("medium", 44.2), ("large", 61.4)])
def test_first_pvt_has_the_published_size(name, millions):
    model = create_model(f"pvt_{name}", device="meta", attention="reduced")
    assert round(count_parameters(model) / 1e6, 1) == millions
    assert count_parameters(create_model(f"pvt_{name}", device="meta")) < count_parameters(model)


def small(cls=PVTv2, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, "attention": "binary", **options})


def test_maps_of_both_pyramids():
    x = randn(2, 3, 32, 24, dtype=torch.float32, requires_grad=False)
    maps = small().eval().forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 6), (2, 16, 4, 3)]
    model = small(PVT, img_size=32).eval()
    assert [tuple(m.shape) for m in model.forward_intermediates(x)] == [(2, 8, 8, 6), (2, 16, 4, 3)]
    assert model(x).shape == (2, 4)
    assert small(PVT, img_size=32, num_classes=0)(x).shape == (2, 16)
    assert small(num_classes=0)(x).shape == (2, 16)
    same = model._positions(1, 4, 4)
    assert same is model.pos_embed2
    assert_same(model._positions(1, 8, 8)[:, 0], same[:, 0])
    assert model._positions(1, 8, 8).shape == (1, 65, 16)


def test_reduced_and_softmax_attention_agree_without_reduction():
    torch.manual_seed(0)
    base = small(attention="reduced", sr_ratios=(1, 1)).eval().double()
    x = randn(1, 3, 16, 16, requires_grad=False)
    soft = SoftmaxAttention(8, 1, split=True, dtype=torch.float64)
    reduced = base.block1[0].attn
    soft.load_state_dict(reduced.state_dict())
    tokens = randn(2, 12, 8, requires_grad=False)
    assert_same(soft(tokens), reduced(tokens, 3, 4))
    q, k, v = (torch.cat([reduced.q(tokens), reduced.kv(tokens)], -1)).chunk(3, -1)
    assert_same(soft(tokens), reduced.proj((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v))
    assert base(x).shape == (1, 4)


def test_hashes_of_a_network_are_fitted_in_order():
    model = small(attention="hash", depths=(2, 1), **CODES)
    images = randn(3, 3, 32, 32, dtype=torch.float32, requires_grad=False)
    model.train()
    model.fit_hashing(images)
    assert model.training
    assert all(m.fitted for m in model.modules() if isinstance(m, KernelHash))
    with torch.no_grad():
        y = model.eval()(images)
        other = small(attention="hash", depths=(2, 1), **CODES).eval()
        state = {**model.state_dict(), "block1.0.attn.qk_quant.projection_matrix": torch.zeros(3, 3)}
        assert torch.equal(load_official(other, state)(images), y)
    with pytest.raises(ValueError, match="4 tokens, 25 anchors"):
        small(attention="hash").fit_hashing(images[:, :, :8, :8])


def test_balance_loss_of_a_network():
    model, x = small(moe_attn=True, moe_mlp=True), randn(2, 3, 16, 16, dtype=torch.float32, requires_grad=False)
    assert float(model.balance_loss()) == 0
    model.train()(x)
    loss = model.balance_loss()
    assert_same(loss, sum(m.last_loss for m in model.modules() if isinstance(m, Experts)))
    loss.backward()
    assert model.block1[0].mlp.fc1.gate.w_gate.grad is not None
    assert sum(isinstance(m, Experts) for m in model.modules()) == 2 * 2 + 2


def test_fusing_packs_the_shift_layers():
    model, x = small(moe_mlp=True).eval(), randn(2, 3, 16, 16, dtype=torch.float32, requires_grad=False)
    fused = model.fuse()
    with torch.no_grad():
        assert_same(fused(x), model(x))
    assert not any(isinstance(m, ShiftLinear) for m in fused.modules())
    assert fused.block1[0].mlp.fc1.experts[1].codes.dtype == torch.int8
    with pytest.raises(RuntimeError, match=r"call \.eval"):
        model.train().fuse()


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attn = SoftmaxAttention(8, 2)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.fc(x + self.attn(x)).mean(1))


def tiny():
    torch.manual_seed(0)
    return Tiny().double().eval()


@pytest.mark.parametrize("linears", ["moe", "ps", "q", None])
def test_conversion(linears):
    model, x = tiny(), randn(2, 6, 4, requires_grad=False)
    new = convert_to_shiftadd(model, linears=linears, exclude=("head", "embed"))
    assert isinstance(model.attn, SoftmaxAttention)
    assert isinstance(new.attn, LinearAngularAttention)
    assert type(new.head) is type(new.embed) is nn.Linear
    kinds = {"moe": Experts, None: nn.Linear}
    for module in (new.attn.qkv, new.attn.proj, new.fc):
        assert type(module) is kinds.get(linears, ShiftLinear)
    if linears == "moe":
        assert torch.equal(new.fc.experts[0].weight, model.fc.weight)
        assert float((new.fc.experts[1].decoded_weight() - model.fc.weight).detach().abs().max()) < 0.2
    if linears is None:
        assert torch.equal(new.attn.qkv.weight, model.attn.qkv.weight)
        assert not bool(new.attn.dconv.weight.any())
    assert new(x).shape == (2, 3)


def test_conversion_to_hashes_and_of_a_single_map():
    new = convert_to_shiftadd(tiny(), attention="hash", linears=None, bits=4, num_anchors=3, topk=2)
    old = tiny().attn
    assert torch.equal(new.attn.to_qk.weight, old.qkv.weight[:8])
    assert torch.equal(new.attn.to_v.bias, old.qkv.bias[16:])
    assert isinstance(convert_to_shiftadd(nn.Linear(4, 4), linears="ps"), ShiftLinear)
    assert isinstance(convert_to_shiftadd(tiny(), attention=None, linears=None).attn, SoftmaxAttention)
    moe = convert_to_shiftadd(convert_to_shiftadd(tiny()), linears="q")  # experts stay as they are
    assert type(moe.fc.experts[0]) is nn.Linear


def test_energy_report_counts_by_hand():
    report = energy_report(tiny(), (6, 4))
    pairs = 2 * 6 * 6 * 8
    maps = 6 * (4 * 8 + 8 * 24 + 8 * 8 + 8 * 8) + 8 * 3
    assert report.count("multiply") == report.count("add") == maps + pairs
    assert report.count("multiply", "attn") == 6 * (8 * 24 + 8 * 8) + pairs
    assert report.count("shift") == 0
    assert report.weight_bits == 32 * (4 * 8 + 8 * 24 + 8 * 8 + 8 * 8 + 8 * 3)
    assert report.operations_mj == pytest.approx((maps + pairs) * (3.7 + 0.9) * 1e-9)
    new = energy_report(convert_to_shiftadd(tiny(), linears="q", exclude=("head", "embed")), (6, 4), precision="int8")
    convolution = 6 * 8 * 9
    assert new.count("multiply") == 6 * 4 * 8 + 8 * 3 + convolution
    assert new.count("shift") == 6 * (8 * 24 + 8 * 8 + 8 * 8)
    assert new.count("add", "attn") == 6 * (8 * 24 + 8 * 8) + 2 * 6 * 4 * 8 + convolution
    cost = UNIT_COSTS["int8"]
    total = sum(new.count(kind) * cost[kind] for kind in ("multiply", "add", "shift"))
    assert new.operations_mj == pytest.approx(total * 1e-9)
    assert "M shift" in str(new)
    routed = energy_report(convert_to_shiftadd(tiny(), exclude=("head", "embed")), (6, 4))
    assert routed.count("multiply", "fc.experts.0") + routed.count("shift", "fc.experts.1") == 6 * 8 * 8


@pytest.mark.parametrize("size", [8, 32, 64])
def test_factory_suits_small_images(size):
    model = classify_images(in_chans=1, img_size=size, num_classes=5)
    assert 1e5 < count_parameters(model) < 1e6
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_refusals():
    with pytest.raises(ValueError, match="`weight_bits` must be from 2 to 7"):
        ShiftLinear(4, 4, weight_bits=1)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        ShiftLinear(4, 4, mode="sp2")
    with pytest.raises(ValueError, match="must have 4 features on its last axis"):
        ShiftLinear(4, 4)(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        ShiftLinear(4, 4)(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="`num_heads` must divide the width 8, got 3"):
        LinearAngularAttention(8, 3)
    with pytest.raises(ValueError, match="`x` must have size 8 on axis 2"):
        LinearAngularAttention(8, 2, codes="binary")(torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match="`attention` must be one of"):
        small(attention="sra")
    with pytest.raises(ValueError, match="one entry a stage"):
        small(depths=(1, 1, 1))
    with pytest.raises(ValueError, match="`combine` must be one of"):
        shift_add_experts(4, 4, combine="sum")
    with pytest.raises(ValueError, match="`gate` must be one of"):
        shift_add_experts(4, 4, gate="noise")
    with pytest.raises(ValueError, match="`linears` must be one of"):
        convert_to_shiftadd(tiny(), linears="shift")
    with pytest.raises(ValueError, match="`precision` must be one of"):
        energy_report(tiny(), (6, 4), precision="fp16")
    with pytest.raises(ValueError, match="`x` must have size 3 on axis 1"):
        small()(torch.zeros(1, 1, 16, 16))
