"""The GPT-2 transformer with optional LoRA, under Hugging Face's parameter names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynakern.checks import check_positive

__all__ = ["GPT2", "Conv1D", "LoRAConv1D", "gpt2_state_dict"]


class Conv1D(nn.Module):
    """Linear map with the weight stored as ``(in, out)``, as GPT-2 checkpoints have it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return torch.nn.functional.linear(x, self.weight.T, self.bias)


class LoRAConv1D(nn.Module):
    r"""A frozen map plus a trainable low-rank one: :math:`y = x W + b + \tfrac{\alpha}{r} \, B (A\, x)`.

    Only A ``(r, in)``, B ``(out, r)``, zero at first, and the bias train.

    Args:
        base: The map to adapt.
        rank: r.
        alpha: Scale.
        dropout: Dropout of the input of A.

    Source: Hu et al., 2021, "LoRA", arXiv:2106.09685.
    """

    def __init__(self, base: Conv1D, *, rank: int = 16, alpha: float = 16.0, dropout: float = 0.1) -> None:
        super().__init__()
        check_positive("rank", rank, integer=True)
        base.weight.requires_grad_(False)
        self.base_layer = base
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.weight.shape[0], rank, bias=False, **factory)
        self.lora_B = nn.Linear(rank, base.weight.shape[1], bias=False, **factory)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        if not self.training:  # one product with the merged weight
            merged = self.base_layer.weight.T + self.scale * self.lora_B.weight @ self.lora_A.weight
            return torch.nn.functional.linear(x, merged, self.base_layer.bias)
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float, **factory) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.c_attn: nn.Module = Conv1D(width, 3 * width, **factory)
        self.c_proj = Conv1D(width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1)
        )  # (B, A, L, K)
        p = self.dropout if self.training else 0.0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, **factory) -> None:
        super().__init__()
        self.c_fc = Conv1D(width, 4 * width, **factory)
        self.c_proj = Conv1D(4 * width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float, **factory) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, **factory)
        self.attn = _Attention(width, num_heads, dropout, **factory)
        self.ln_2 = nn.LayerNorm(width, **factory)
        self.mlp = _MLP(width, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """GPT-2's stack over embeddings: learned positions, pre-norm blocks with causal attention, a final norm.

    The token table ``wte`` is for callers that embed tokens; :meth:`forward` takes embeddings.

    Args:
        width: Width d, a multiple of ``num_heads``.
        num_layers: Number of blocks.
        num_heads: Number of heads.
        vocab_size: Rows of the token table.
        max_positions: Longest sequence.
        dropout: Rate of dropout.
        lora_rank: Rank of low-rank adapters of the attention's input maps; then all else of the stack is frozen but the
            bias of these maps. None trains everything.
        lora_alpha: Scale of the adapters.
        lora_dropout: Dropout of the adapters' input.
        tune_norm: With adapters, train the norms and the positions too.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``width`` is no multiple of ``num_heads``.

    Source: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"; the names are those of the
    checkpoints that Hugging Face publishes.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        vocab_size: int = 50257,
        max_positions: int = 1024,
        dropout: float = 0.1,
        lora_rank: int | None = None,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.1,
        tune_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of num_heads = {num_heads}, got {width}.")
        factory = {"device": device, "dtype": dtype}
        self.max_positions = max_positions
        self.wte = nn.Embedding(vocab_size, width, **factory)
        self.wpe = nn.Embedding(max_positions, width, **factory)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        self.h = nn.ModuleList(_Block(width, num_heads, dropout, **factory) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(width, **factory)
        self.dropout = nn.Dropout(dropout)
        if lora_rank is not None:
            self._adapt(lora_rank, lora_alpha, lora_dropout, tune_norm)

    def _adapt(self, rank: int, alpha: float, dropout: float, tune_norm: bool) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("c_attn.bias") or (tune_norm and ("ln_" in name or "wpe" in name)))
        for block in self.h:
            assert isinstance(block, _Block)
            assert isinstance(block.attn.c_attn, Conv1D)
            block.attn.c_attn = LoRAConv1D(block.attn.c_attn, rank=rank, alpha=alpha, dropout=dropout)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the hidden states after the final norm, ``(B, L, d)``, of ``embeddings`` ``(B, L, d)``.

        Raises:
            ValueError: The sequence is longer than ``max_positions``.
        """
        length = embeddings.shape[1]
        if length > self.max_positions:
            raise ValueError(f"A sequence must not be longer than {self.max_positions} positions, got {length}.")
        x = self.dropout(embeddings + self.wpe.weight[:length])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


def gpt2_state_dict(source: str | os.PathLike[str] | Mapping[str, Tensor], model: GPT2) -> dict[str, Tensor]:
    """Return GPT-2's published weights under the names of ``model``.

    Args:
        source: A Hugging Face checkpoint: ``model.safetensors``, ``pytorch_model.bin`` (read without pickles), a folder
            with one of them, or a state dict.
        model: The stack that is to take them: with fewer blocks it takes the first ones; adapters keep their values.

    Raises:
        FileNotFoundError: There is no such file, or no checkpoint in the folder.
        ValueError: The file cannot be read without unpickling.
    """
    from pathlib import Path

    from dynakern.models import read_state_dict

    if not isinstance(source, Mapping) and Path(source).is_dir():
        found = [p for name in ("model.safetensors", "pytorch_model.bin") if (p := Path(source) / name).is_file()]
        if not found:
            raise FileNotFoundError(f"No model.safetensors or pytorch_model.bin in {source}.")
        source = found[0]
    own = model.state_dict()
    renamed = {}
    for key, value in read_state_dict(source).items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".attn.masked_bias")) or key == "lm_head.weight":
            continue  # causal masks and the tied output table
        if key not in own:
            key = key.replace("c_attn.", "c_attn.base_layer.")
        if key in own:
            renamed[key] = value
    kept = {key: value for key, value in own.items() if "lora_" in key}
    return {**kept, **renamed}
