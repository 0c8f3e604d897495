"""TEMPO's parts beside their peers: STL beside statsmodels, the transformer beside Hugging Face's GPT-2."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.data import sample
from dynakern.data.series import read_series_csv
from dynakern.layers.transformer import GPT2, gpt2_state_dict
from dynakern.ops import stl
from dynakern.testing import assert_same


def _stl_case(robust: bool):
    from statsmodels.tsa.seasonal import STL

    y = torch.from_numpy(read_series_csv(sample("ETTh1.csv")).values[:8640, 0].copy())

    def peer():
        return STL(y.numpy(), period=24, robust=robust).fit()

    def check():
        ours, theirs = stl(y, 24, robust=robust), peer()
        assert_same(ours.trend, torch.from_numpy(theirs.trend), rtol=1e-6)

    return Case(
        name=f"STL of 8,640 hours{', robust' if robust else ''}",
        ours=lambda: stl(y, 24, robust=robust),
        peers={"statsmodels STL": peer},
        check=check,
        repeats=5,
    )


def _transformer_case():
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_embd=768, n_layer=6, n_head=12, vocab_size=10, n_positions=1024)
    peer = GPT2Model(config).eval()
    ours = GPT2(width=768, num_layers=6, num_heads=12, vocab_size=10).eval()
    ours.load_state_dict(gpt2_state_dict(peer.state_dict(), ours))
    x = torch.randn(8, 153, 768)  # prompts and patches of 336 steps

    def run_ours():
        with torch.inference_mode():
            return ours(x)

    def run_peer():
        with torch.inference_mode():
            return peer(inputs_embeds=x, use_cache=False).last_hidden_state

    return Case(
        name="six blocks of GPT-2 small, B = 8, 153 positions",
        ours=run_ours,
        peers={"transformers GPT2Model": run_peer},
        check=lambda: assert_same(run_ours(), run_peer(), rtol=1e-4),
        repeats=5,
    )


def cases():
    yield _stl_case(False)
    yield _stl_case(True)
    yield _transformer_case()


if __name__ == "__main__":
    main("tempo", "TEMPO: decomposition and transformer", cases)
