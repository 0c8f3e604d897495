"""Attention by masked additions: queries and keys are codes of zeros and ones, and the sums run over tokens once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_shape
from dynakern.vision.shiftaddvit.linear import straight_through

__all__ = [
    "KernelHash",
    "LinearAngularAttention",
    "ReducedAttention",
    "SoftmaxAttention",
    "binary_codes",
    "masked_sums",
]

LinearMap = Callable[..., nn.Module]  # (in_features, out_features, bias, device=, dtype=) -> module


def binary_codes(x: Tensor, threshold: Literal["sample", "batch"] = "sample") -> Tensor:
    """Return 1 where ``x`` is above its mean and 0 elsewhere; the gradient passes where ``x`` is in [0, 1].

    Args:
        x: Normalised queries or keys, ``(B, A, N, K)``.
        threshold: ``"sample"``: the mean is over heads, tokens and channels of an image. ``"batch"``: over the whole
            tensor, as in the official code, where the images of a batch then depend on each other.

    Returns:
        ``(B, A, N, K)``.
    """
    check_choice("threshold", threshold, ("sample", "batch"))
    mean = x.mean() if threshold == "batch" else x.mean((1, 2, 3), keepdim=True)
    return straight_through(x.clamp(0, 1), (x > mean).to(x.dtype))


def masked_sums(codes: Tensor, values: Tensor) -> Tensor:
    """Return for each bit the sum of the values of those tokens that have it set.

    On a processor the sums are a matrix product, whose multiplications are by 0 and 1.

    Args:
        codes: Zeros and ones, ``(B, A, N, bits)``.
        values: ``(B, A, N, V)``.

    Returns:
        ``(B, A, bits, V)``.
    """
    return codes.transpose(-2, -1) @ values


class KernelHash(nn.Module):
    r"""Codes from supervised hashing with a Gaussian kernel, fitted so that similar tokens get similar codes.

    With m anchors z the features of a token are :math:`k(x) = e^{-\|x - z\|^2 / 2 \sigma} - \mu`, :math:`\sigma` being
    the mean squared distance of a head's tokens and anchors; the code is :math:`1[A k(x) > 0]`. Gradients pass a
    threshold where its input is in (0, 1).

    Args:
        num_heads: A.
        head_dim: K.
        bits: Length of a code.
        num_anchors: m.
        topk: Tokens that count as similar, and as dissimilar, to each.
        device: Of the buffers.
        dtype: Of the buffers.

    Source: Liu et al., 2012, doi:10.1109/CVPR.2012.6247912, as in EcoFormer (arXiv:2209.09004) and ShiftAddViT.
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        bits: int = 16,
        num_anchors: int = 25,
        topk: int = 10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.topk, self.fitted = topk, False
        self.register_buffer("A", torch.randn(num_heads, bits, num_anchors, **at))
        self.register_buffer("mvec", torch.zeros(1, num_heads, 1, num_anchors, **at))
        self.register_buffer("anchor", torch.zeros(1, num_heads, num_anchors, head_dim, **at))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fitted = self.anchor.device.type != "meta" and bool((self.anchor != 0).any())

    def _kernel(self, x: Tensor) -> Tensor:
        """Return the kernel with the anchors, ``(B, A, N, m)``."""
        cross = x @ self.anchor.transpose(-2, -1)
        squares = x.square().sum(-1, keepdim=True) - 2 * cross + self.anchor.square().sum(-1).unsqueeze(-2)
        return torch.exp(-squares / (2 * squares.mean((-2, -1), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes, ``(B, A, N, bits)``, of normalised tokens ``(B, A, N, K)``.

        Raises:
            RuntimeError: The hash is not fitted, in eval mode or a captured graph; in training mode it is fitted to the
                first eight images.
        """
        if not self.fitted:
            if not self.training or torch.compiler.is_compiling():
                raise RuntimeError(
                    "The hash of queries and keys is not fitted: call fit_hashing(images), train or load."
                )
            self.fit(x[:8])
        z = (self._kernel(x) - self.mvec) @ self.A.transpose(-2, -1)
        return straight_through(z.clamp(0, 1), (z > 0).to(z.dtype))

    @torch.no_grad()
    def fit(self, x: Tensor, *, generator: torch.Generator | None = None) -> None:
        r"""Fit anchors, means and projections to tokens.

        The anchors are random tokens of the first image. The target :math:`S` is ``bits`` times +1 for the most and -1
        for the least similar tokens of each; bit by bit, 100 steps of gradient descent maximise :math:`y^T S y` with
        :math:`y = \tanh(K a / 2)`; they are kept if they help the signs of y, whose product is taken off S.

        Args:
            x: Normalised tokens, ``(B, A, N, K)``.
            generator: Draws the anchors.

        Raises:
            ValueError: There are fewer tokens than anchors, or than twice ``topk``.
        """
        N, m, bits = x.shape[2], self.anchor.shape[2], self.A.shape[1]
        if m > N:
            raise ValueError(f"The hash needs at least as many tokens as anchors: {N} tokens, {m} anchors.")
        if 2 * self.topk > N:
            raise ValueError(f"`topk` must be at most half the number of tokens, got {self.topk} of {N}.")
        x = x.detach().to(self.A.dtype)
        chosen = torch.randperm(N, generator=generator, device="cpu")[:m].to(x.device)
        self.anchor.copy_(x[:1, :, chosen])
        K = self._kernel(x)
        self.mvec.copy_(K.mean((0, 2)).unsqueeze(0).unsqueeze(2))
        K = K - self.mvec
        likeness = x @ x.transpose(-2, -1)
        S = torch.zeros_like(likeness)
        S = S.scatter(3, likeness.topk(self.topk, dim=3).indices, float(bits))
        S = S.scatter(3, likeness.topk(self.topk, dim=3, largest=False).indices, -float(bits))
        S = (S + S.transpose(-2, -1)) / 2  # all that y^T S y depends on
        for bit in range(bits):
            start = self.A[:, bit]
            a, before = _maximise(K, S, start, bits), _signs(K, start)
            after = _signs(K, a)
            if _agreement(after, S) > _agreement(before, S):
                self.A[:, bit] = a
                before = after
            S = S - before.unsqueeze(-1) * before.unsqueeze(-2)
        self.fitted = True


def _signs(K: Tensor, a: Tensor) -> Tensor:
    """Return +1 or -1 for each token, ``(B, A, N)``."""
    return torch.where((K @ a.unsqueeze(-1)).squeeze(-1) > 0, 1.0, -1.0).to(K.dtype)


def _agreement(y: Tensor, S: Tensor) -> Tensor:
    return torch.einsum("bhn,bhnm,bhm->", y, S, y)


def _maximise(K: Tensor, S: Tensor, a: Tensor, bits: int, *, steps: int = 100, rate: float = 5e-4) -> Tensor:
    """Ascend the mean over images and heads of ``y^T S y / (N bits)`` by descent with Nesterov momentum 0.9."""
    B, H, N, _ = K.shape
    velocity = torch.zeros_like(a)
    for _ in range(steps):
        y = torch.tanh((K @ a.unsqueeze(-1)).squeeze(-1) / 2)
        slope = -2 * (S @ y.unsqueeze(-1)).squeeze(-1) / (N * bits * B * H)
        gradient = torch.einsum("bhnm,bhn->hm", K, slope * (1 - y.square()) / 2)
        velocity = 0.9 * velocity + gradient
        a = a - rate * (gradient + 0.9 * velocity)
    return a


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return ``(B, A, N, C / A)`` of ``(B, N, C)``."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"`num_heads` must divide the width {dim}, got {num_heads}.")


class LinearAngularAttention(nn.Module):
    r"""Attention without a softmax over pairs, by additions: O(N) in the tokens, ``(B, N, C) -> (B, N, C)``.

    With codes q and k in {0, 1}, :math:`r = v / 2 + q (k^T v) / \pi`, normalised, plus a convolution of the values
    along the tokens; the heads are concatenated and projected. A hash has one code for queries and keys.

    Args:
        dim: C.
        num_heads: Heads A, a divisor of C.
        codes: ``"hash"``: :class:`KernelHash` of one projection; ``"binary"``: :func:`binary_codes` of two.
        qkv_bias: Whether the projections to queries, keys and values add a bias.
        threshold: See :func:`binary_codes`.
        bits: Length of a hash.
        num_anchors: Of a hash.
        topk: Of a hash.
        res_kernel_size: Tokens that the convolution of the values spans, odd.
        linear: Makes the linear maps, called as ``torch.nn.Linear``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is unknown, or the heads do not divide the width.

    Source: You et al., 2023, arXiv:2306.06446; linear angular attention: arXiv:2211.10526. A zero vector is normalised
    to zero, where the official code gives NaN.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        codes: Literal["hash", "binary"] = "hash",
        qkv_bias: bool = True,
        threshold: Literal["sample", "batch"] = "sample",
        bits: int = 16,
        num_anchors: int = 25,
        topk: int = 10,
        res_kernel_size: int = 9,
        linear: LinearMap = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("codes", codes, ("hash", "binary"))
        check_choice("threshold", threshold, ("sample", "batch"))
        _check_heads(dim, num_heads)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.codes = dim, num_heads, codes
        self.threshold: Literal["sample", "batch"] = threshold
        if codes == "hash":
            self.to_qk = linear(dim, dim, qkv_bias, **at)
            self.to_v = linear(dim, dim, qkv_bias, **at)
            hashing = KernelHash(num_heads, dim // num_heads, bits=bits, num_anchors=num_anchors, topk=topk, **at)
            self.qk_quant = nn.ModuleDict({"ksh": hashing})
        else:
            self.qkv = linear(dim, 3 * dim, qkv_bias, **at)
        self.proj = linear(dim, dim, True, **at)
        size, pad = (res_kernel_size, 1), (res_kernel_size // 2, 0)
        self.dconv = nn.Conv2d(num_heads, num_heads, size, padding=pad, groups=num_heads, bias=False, **at)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes of queries and of keys, ``(B, A, N, bits)``, and values, ``(B, A, N, C / A)``."""
        if self.codes == "hash":
            s = F.normalize(_heads(self.to_qk(x), self.num_heads), dim=-1)
            code = self.qk_quant["ksh"](s)
            return code, code, _heads(self.to_v(x), self.num_heads)
        q, k, v = (_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = (binary_codes(F.normalize(part, dim=-1), self.threshold) for part in (q, k))
        return q, k, v

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Return ``(B, N, C)`` of tokens ``x``, ``(B, N, C)``; the size of their grid is not needed.

        Raises:
            ValueError: ``x`` has another shape.
        """
        check_shape("x", x, f"B N {self.dim}")
        q, k, v = self.encode(x)
        r = torch.add(0.5 * v, q @ masked_sums(k, v), alpha=1 / math.pi)
        r = F.normalize(r, dim=-1).transpose(1, 2).flatten(2)
        return self.proj(r + self._along_tokens(v.transpose(1, 2).flatten(2)))

    def _along_tokens(self, v: Tensor) -> Tensor:
        """Convolve the values ``(B, N, C)`` along the tokens.

        That is ``dconv`` over maps ``(A, N, K)``, done as a depthwise convolution of C channels, channels last, which
        processors are many times faster at.
        """
        weight = self.dconv.weight.repeat_interleave(self.dim // self.num_heads, 0)
        y = F.conv2d(v.unsqueeze(2).permute(0, 3, 1, 2), weight, padding=self.dconv.padding, groups=self.dim)  # pyright: ignore
        return y.squeeze(3).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """Ordinary attention, ``(B, N, C) -> (B, N, C)``: O(N^2) in the tokens.

    Args:
        dim: C.
        num_heads: Heads A, a divisor of C.
        qkv_bias: Whether the projections add a bias.
        split: Two maps ``q`` and ``kv`` instead of one map ``qkv``, as PVT has.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        split: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        if split:
            self.q, self.kv = nn.Linear(dim, dim, qkv_bias, **at), nn.Linear(dim, 2 * dim, qkv_bias, **at)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, **at)
        self.proj = nn.Linear(dim, dim, **at)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Return ``(B, N, C)`` of tokens ``x``, ``(B, N, C)``; the size of their grid is not needed."""
        check_shape("x", x, f"B N {self.dim}")
        parts = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), *self.kv(x).chunk(2, -1))
        q, k, v = (_heads(part, self.num_heads) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class ReducedAttention(nn.Module):
    """Attention to a map shrunk by a strided convolution, as in PVT: the networks' baseline.

    Args:
        dim: C.
        num_heads: Heads A, a divisor of C.
        reduction: The convolution's size and stride; 1 for none.
        qkv_bias: Whether the projections add a bias.
        linear: Makes the linear maps, called as ``torch.nn.Linear``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The heads do not divide the width.

    Source: Wang et al., 2021, arXiv:2102.12122.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        reduction: int = 1,
        qkv_bias: bool = True,
        linear: LinearMap = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.reduction = dim, num_heads, reduction
        self.q, self.kv = linear(dim, dim, qkv_bias, **at), linear(dim, 2 * dim, qkv_bias, **at)
        self.proj = linear(dim, dim, True, **at)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction, **at)
            self.norm = nn.LayerNorm(dim, **at)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return ``(B, N, C)`` of the tokens of a grid, ``(B, height * width, C)``."""
        check_shape("x", x, f"B {height * width} {self.dim}")
        context = x
        if self.reduction > 1:
            grid = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # channels last
            context = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        parts = (self.q(x), *self.kv(context).chunk(2, -1))
        q, k, v = (_heads(part, self.num_heads) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))
