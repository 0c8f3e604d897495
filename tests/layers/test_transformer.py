"""GPT-2 against the implementation that its checkpoints come from, and LoRA against its formula."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dynakern.layers.transformer import GPT2, Conv1D, LoRAConv1D, gpt2_state_dict
from dynakern.testing import assert_same


@pytest.fixture(scope="module")
def peer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=11, n_positions=20)
    return transformers.GPT2Model(config).eval()


@pytest.mark.parametrize("how", ["file", "folder", "dict"])
def test_a_published_checkpoint_gives_the_same_states(peer, tmp_path, how):
    model = GPT2(width=16, num_layers=2, num_heads=4, vocab_size=11, max_positions=20).eval()
    state = {f"transformer.{k}": v.contiguous() for k, v in peer.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    source = {"file": tmp_path / "model.safetensors", "folder": tmp_path, "dict": state}[how]
    model.load_state_dict(gpt2_state_dict(source, model))
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        h = x + peer.wpe.weight[:9]
        for block in peer.h[:2]:
            out = block(h)
            h = out[0] if isinstance(out, tuple) else out
        assert_same(model(x), peer.ln_f(h))


def test_lora_formula_and_what_trains(peer):
    torch.manual_seed(0)
    layer = LoRAConv1D(Conv1D(4, 6), rank=2, alpha=8.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 4)
    want = x @ layer.base_layer.weight + layer.base_layer.bias + 4 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    assert_same(layer.train()(x), want)
    assert_same(layer.eval()(x), want)
    model = GPT2(width=16, num_layers=1, num_heads=4, vocab_size=11, max_positions=20, lora_rank=2)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    stem = "h.0.attn.c_attn."
    assert trains == {f"{stem}base_layer.bias", f"{stem}lora_A.weight", f"{stem}lora_B.weight"}
    tuned = GPT2(width=16, num_layers=1, num_heads=4, vocab_size=11, max_positions=20, lora_rank=2, tune_norm=True)
    extra = {n for n, p in tuned.named_parameters() if p.requires_grad} - trains
    assert extra == {"wpe.weight", *(f"{n}.{k}" for n in ("h.0.ln_1", "h.0.ln_2", "ln_f") for k in ("weight", "bias"))}
    state = {f"transformer.{k}": v for k, v in peer.state_dict().items()}
    adapted = gpt2_state_dict(state, model)
    assert torch.equal(adapted[f"{stem}base_layer.weight"], peer.h[0].attn.c_attn.weight)
    model.load_state_dict(adapted)


def test_causal():
    torch.manual_seed(0)
    model = GPT2(width=8, num_layers=2, num_heads=2, vocab_size=3, max_positions=10).eval()
    x = torch.randn(1, 6, 8)
    other = x.clone()
    other[:, 4:] += 1
    with torch.no_grad():
        assert torch.equal(model(x)[:, :4], model(other)[:, :4])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="multiple of num_heads = 3"):
        GPT2(width=8, num_heads=3)
    model = GPT2(width=8, num_layers=1, num_heads=2, vocab_size=3, max_positions=5)
    with pytest.raises(ValueError, match="not be longer than 5 positions, got 6"):
        model(torch.zeros(1, 6, 8))
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors"):
        gpt2_state_dict(tmp_path, model)
