"""One suite over every network: what any ``nn.Module`` of the field is expected to do."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynakern.testing import assert_same

FOLDER = Path(__file__).parent / "conformance"


def _examples():
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in ("__init__", "example"):
            spec = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            for example in module.EXAMPLES:
                yield pytest.param(example, id=f"{path.stem}-{example.name}")


@pytest.fixture(params=list(_examples()))
def example(request):
    torch.manual_seed(0)
    return request.param


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_backward_reaches_every_parameter(example):
    model = example.build().train()
    first(model(*example.inputs(torch.float32))).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(example.unused or ("\0",))]
    assert not missing
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_eval_is_deterministic_and_survives_copy_and_state_dict(example):
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    with torch.no_grad():
        expected = first(model(*inputs))
        assert torch.equal(first(model(*inputs)), expected)
        assert torch.equal(first(copy.deepcopy(model)(*inputs)), expected)
        other = example.build().eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(first(other(*inputs)), expected)
    assert len(repr(model)) > 0


def test_rows_of_a_batch_are_independent(example):
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    with torch.no_grad():
        whole = first(model(*inputs))
        alone = first(model(*(x[:1] for x in inputs)))
        same = torch.allclose(whole[:1], alone, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert same == example.batch_independent or (same and not example.batch_independent)


def test_double(example):
    model = example.build().eval()
    with torch.no_grad():
        single = first(model(*example.inputs(torch.float32)))
        double = first(model.double()(*example.inputs(torch.float64)))
    assert double.dtype == torch.float64
    assert_same(single.double(), double, rtol=2e-4)


def test_compile(example):
    if not example.export:
        pytest.skip("the network says that it cannot be compiled whole")
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(first(compiled(*inputs)), first(model(*inputs)), rtol=1e-4)


def test_export(example):
    if not example.export:
        pytest.skip("the network says that it cannot be exported")
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    with torch.no_grad():
        exported = torch.export.export(model, inputs).module()
        assert_same(first(exported(*inputs)), first(model(*inputs)), rtol=1e-4)


def _noisy_norms(model):
    """Give batch norms statistics of their own, as training would."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def test_fused_network_is_the_same_function(example):
    model = example.build()
    if not hasattr(model, "fuse"):
        pytest.skip("the network has nothing to fuse")
    model, inputs = _noisy_norms(model.double()), example.inputs(torch.float64)
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        model.train().fuse()
    with torch.no_grad():
        expected = first(model.eval()(*inputs))
        fused = model.fuse()
        assert_same(first(fused(*inputs)), expected, rtol=1e-8)
        assert torch.equal(first(model(*inputs)), expected)  # the network itself is left as it was


def test_channels_last_and_bfloat16(example):
    if not example.image:
        pytest.skip("no image network")
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    with torch.no_grad():
        expected = first(model(*inputs))
        laid_out = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
        assert_same(first(model.to(memory_format=torch.channels_last)(*laid_out)), expected, rtol=1e-4)
        half = first(model.bfloat16()(*(x.bfloat16() for x in inputs)))
    assert half.dtype == torch.bfloat16
    assert_same(half.float(), expected, rtol=0.1)


def test_maps_of_the_stages(example):
    model, inputs = example.build().eval(), example.inputs(torch.float32)
    if not (example.image and hasattr(model, "forward_features")):
        pytest.skip("no image network with maps")
    with torch.no_grad():
        last, maps = model.forward_features(*inputs), model.forward_intermediates(*inputs)
        assert all(m.ndim == 4 and len(m) == len(inputs[0]) for m in [last, *maps])
        assert len(maps) >= 2
        assert last.shape == maps[-1].shape
        assert_same(model.forward_head(last), first(model(*inputs)), rtol=1e-5)
