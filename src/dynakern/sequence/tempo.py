r"""TEMPO: forecast any series by a GPT-2 that sees its trend, its season and its rest, each after a prompt.

A window is normalised and split by three small learned maps into trend, season and rest, which a loss ties to an STL
decomposition. Each part is cut into patches and embedded; prompts name the parts; one pass through a causal transformer
(GPT-2, adapted by LoRA where pre-trained weights are loaded) mixes everything; linear heads forecast each part and the
forecasts add up.

Paper: Cao, Jia, Arik, Pfister, Zheng, Ye and Liu, 2024, "TEMPO: Prompt-based Generative Pre-trained Transformer for
Time Series Forecasting", arXiv:2310.04948. Official code: https://github.com/DC-research/TEMPO.

Implemented: semi-soft text prompts (token numbers built in), prompt pool, no prompt; decomposition loss; Student-t head
and quantiles; roll-out beyond the horizon; equivariant ``predict``; GPT-2 weights from a path; a classifier of series,
which is ours. No pre-trained weights come with this library: without them the network trains from scratch, at a size of
your choice, and none of the paper's zero-shot figures can be expected. The Fourier module and the further maps that the
official state dict holds but never uses are left out.

Example:
    >>> import torch
    >>> model = TEMPO(seq_len=96, pred_len=24, d_model=16, num_layers=1, num_heads=2, lora_rank=None)
    >>> x = torch.sin(torch.arange(96.0) / 4)[None, :, None]
    >>> model(x).shape
    torch.Size([1, 24, 1])
    >>> parts = model.decompose(x)
    >>> torch.allclose(parts.trend + parts.season + parts.residual, model.normalise(x)[0], atol=1e-5)
    True
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.layers.transformer import GPT2, gpt2_state_dict

__all__ = [
    "PROMPT_TOKENS",
    "TEMPO",
    "PromptPool",
    "SeriesParts",
    "StudentT",
    "convert_state_dict",
    "tempo",
    "tempo_small",
]

PARTS = ("trend", "season", "noise")
# "Predict the future time step given the {trend|season|residual}" in GPT-2's tokens (from memory of the vocabulary).
_STEM = (39156, 713, 262, 2003, 640, 2239, 1813, 262)
PROMPT_TOKENS: dict[str, tuple[int, ...]] = {
    "trend": (*_STEM, 5182),
    "season": (*_STEM, 1622),
    "noise": (*_STEM, 29598),
}


class SeriesParts(NamedTuple):
    """Trend, season and rest of a window, each ``(B, L, 1)``; they sum to the normalised window."""

    trend: Tensor
    season: Tensor
    residual: Tensor


class StudentT(NamedTuple):
    """Location, scale and degrees of freedom of a forecast, each ``(B, H, 1)``."""

    mu: Tensor
    sigma: Tensor
    nu: Tensor


class PromptPool(nn.Module):
    r"""Prompts picked by content: the values of the ``top_k`` keys most similar to a summary of the patches.

    Args:
        d_model: Width d.
        num_patches: Number of patches P.
        size: Number of prompts in the pool.
        length: Vectors of a prompt.
        top_k: Prompts picked.
        query: ``"channel"``: a learned weighting of the patches, the same for all channels. ``"official"``: the
            authors' code reads the ``(P, d)`` block as d rows of P numbers, which mixes patches and channels; their
            checkpoints need it.

    Raises:
        ValueError: ``top_k`` exceeds ``size``.
    """

    def __init__(
        self,
        d_model: int,
        num_patches: int,
        *,
        size: int = 30,
        length: int = 3,
        top_k: int = 3,
        query: Literal["channel", "official"] = "channel",
    ) -> None:
        super().__init__()
        check_choice("query", query, ("channel", "official"))
        if not 1 <= top_k <= size:
            raise ValueError(f"`top_k` must be between 1 and the pool's size {size}, got {top_k}.")
        self.top_k, self.query = top_k, query
        self.keys = nn.Parameter(torch.randn(size, d_model))
        self.values = nn.Parameter(torch.randn(size, length, d_model))
        self.summary = nn.Linear(num_patches, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pick prompts.

        Args:
            z: Embedded patches, ``(B, P, d)``.

        Returns:
            Prompts ``(B, top_k * length, d)``; numbers of the picked keys ``(B, top_k)``, most similar first; and the
            sum of their cosines divided by B.
        """
        block = z.transpose(1, 2) if self.query == "channel" else z.reshape(len(z), z.shape[2], z.shape[1])
        query = F.normalize(self.summary(block).squeeze(-1), dim=-1)  # (B, d)
        cosine = query @ F.normalize(self.keys, dim=-1).T  # (B, size)
        best = cosine.topk(self.top_k, dim=-1)
        return self.values[best.indices].flatten(1, 2), best.indices, best.values.sum() / len(z)


class TEMPO(nn.Module):
    r"""TEMPO over single series: ``(B, seq_len, 1) -> (B, pred_len, 1)``. Several series go in as rows of the batch.

    Args:
        seq_len: Steps seen, L.
        pred_len: Steps forecast, H.
        patch_size: Steps of a patch, p.
        stride: Steps between patches, s.
        d_model: Width d, a multiple of ``num_heads``.
        num_layers: Blocks of the transformer.
        num_heads: Heads of attention.
        prompt: ``"semi-soft"``: embedded text, then a linear map a part; ``"pool"``: :class:`PromptPool`; ``"none"``.
        pool_size: Prompts in the pool.
        top_k: Prompts picked from the pool.
        pool_query: See :class:`PromptPool`.
        use_token: Let the heads see the hidden states of the prompts too.
        double_pass: Without prompts: run each part alone through the transformer first, then all together, as the
            authors' code does.
        head: ``"point"`` or ``"student-t"``.
        lora_rank: Rank of the adapters; None trains the whole transformer, which is right without loaded weights.
        tune_norm: With adapters, train the norms and the positions too, as the paper says and its code does not.
        dropout: Dropout of the transformer.
        moving_average: Width of the average that the trend starts from, odd.
        max_positions: Longest sequence of the transformer.
        prompt_tokens: Token numbers of the three prompts; rows of the token table are kept only for these.

    Raises:
        ValueError: A size does not fit: a window below two patches, a width that is no multiple of the heads, more
            positions than the transformer has.
    """

    def __init__(
        self,
        *,
        seq_len: int = 336,
        pred_len: int = 96,
        patch_size: int = 16,
        stride: int = 8,
        d_model: int = 768,
        num_layers: int = 6,
        num_heads: int = 12,
        prompt: Literal["semi-soft", "pool", "none"] = "semi-soft",
        pool_size: int = 30,
        top_k: int = 3,
        pool_query: Literal["channel", "official"] = "channel",
        use_token: bool = False,
        double_pass: bool = False,
        head: Literal["point", "student-t"] = "point",
        lora_rank: int | None = 16,
        tune_norm: bool = False,
        dropout: float = 0.1,
        moving_average: int = 25,
        max_positions: int = 1024,
        prompt_tokens: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("prompt", prompt, ("semi-soft", "pool", "none"))
        check_choice("head", head, ("point", "student-t"))
        for name, value in (("pred_len", pred_len), ("patch_size", patch_size), ("stride", stride)):
            check_positive(name, value, integer=True)
        if seq_len < patch_size + stride:
            raise ValueError(f"`seq_len` must hold two patches, at least {patch_size + stride} steps, got {seq_len}.")
        if moving_average % 2 == 0:
            raise ValueError(f"`moving_average` must be odd, got {moving_average}.")
        if double_pass and prompt != "none":
            raise ValueError("`double_pass` is for prompt='none'.")
        self.seq_len, self.pred_len, self.patch_size, self.stride = seq_len, pred_len, patch_size, stride
        self.prompt, self.use_token, self.double_pass = prompt, use_token, double_pass
        self.moving_average = moving_average
        self.num_patches = (seq_len - patch_size) // stride + 2
        tokens = {part: tuple((prompt_tokens or PROMPT_TOKENS)[part]) for part in PARTS}
        self.vocabulary = sorted({token for row in tokens.values() for token in row})
        prompt_length = {"semi-soft": len(tokens["trend"]), "pool": 3 * top_k, "none": 0}[prompt]
        positions = 3 * (prompt_length + self.num_patches)
        if positions > max_positions:
            raise ValueError(f"Prompts and patches need {positions} positions, the transformer has {max_positions}.")
        self.affine = nn.Parameter(torch.tensor([1.0, 0.0]))  # w and b of the normalisation
        self.map_trend = nn.Linear(seq_len, seq_len)
        self.map_season = nn.Sequential(nn.Linear(seq_len, 4 * seq_len), nn.ReLU(), nn.Linear(4 * seq_len, seq_len))
        self.in_layer = nn.ModuleDict({part: nn.Linear(patch_size, d_model) for part in PARTS})
        self.gpt2 = GPT2(
            width=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            vocab_size=len(self.vocabulary),
            max_positions=max_positions,
            dropout=dropout,
            lora_rank=lora_rank,
            tune_norm=tune_norm,
        )
        if prompt == "semi-soft":
            self.prompt_layer = nn.ModuleDict({part: nn.Linear(d_model, d_model) for part in PARTS})
            for part, row in tokens.items():
                self.register_buffer(f"tokens_{part}", torch.tensor([self.vocabulary.index(t) for t in row]), False)
        elif prompt == "pool":
            self.pool = PromptPool(d_model, self.num_patches, size=pool_size, top_k=top_k, query=pool_query)
        width = (self.num_patches + (prompt_length if use_token else 0)) * d_model
        self.out_layer = nn.ModuleDict({part: nn.Linear(width, pred_len) for part in PARTS})
        self.distribution = None
        if head == "student-t":
            self.distribution = nn.ModuleDict({name: nn.Linear(pred_len, pred_len) for name in ("mu", "sigma", "nu")})

    # The window and its parts.

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(x - mean) / sd * w + b`` and mean and sd ``(B, 1, 1)``, which carry no gradient."""
        mean = x.mean(1, keepdim=True).detach()
        sd = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5).detach()
        return (x - mean) / sd * self.affine[0] + self.affine[1], mean, sd

    def denormalise(self, y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        return (y - self.affine[1]) / (self.affine[0] + 1e-10) * sd + mean

    def smooth(self, x: Tensor) -> Tensor:
        """Return the moving average of ``(B, L, 1)``, its ends padded with the first and the last value."""
        half = self.moving_average // 2
        padded = F.pad(x.transpose(1, 2), (half, half), mode="replicate")
        return F.avg_pool1d(padded, self.moving_average, stride=1).transpose(1, 2)

    def _split(self, x: Tensor) -> SeriesParts:
        trend = self.map_trend(self.smooth(x).squeeze(-1)).unsqueeze(-1)
        season = self.map_season((x - trend).squeeze(-1)).unsqueeze(-1)
        return SeriesParts(trend, season, x - trend - season)

    def decompose(self, x: Tensor) -> SeriesParts:
        """Return the learned trend, season and rest of windows ``(B, seq_len, 1)``, in normalised units."""
        check_shape("x", x, f"B {self.seq_len} 1")
        return self._split(self.normalise(x)[0])

    def patches(self, x: Tensor) -> Tensor:
        """Cut ``(B, L, 1)`` into patches ``(B, P, p)``; the last value is repeated a stride beyond the end."""
        padded = F.pad(x.transpose(1, 2), (0, self.stride), mode="replicate").squeeze(1)
        return padded.unfold(-1, self.patch_size, self.stride)

    # The network.

    def _prompt(self, part: str, z: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the prompt of a part, ``(B, T, d)``, and the similarity of picked keys."""
        if self.prompt == "semi-soft":
            words = self.gpt2.wte(getattr(self, f"tokens_{part}"))
            return self.prompt_layer[part](words).expand(len(z), -1, -1), z.new_zeros(())
        if self.prompt == "pool":
            prompt, _, similarity = self.pool(z)
            return prompt, similarity
        return None, z.new_zeros(())

    def _hidden(self, parts: SeriesParts) -> tuple[list[Tensor], Tensor]:
        """Return the hidden states of each part, prompt and patches, and the similarity of picked keys."""
        pieces, similarity = [], parts.trend.new_zeros(())
        for name, part in zip(PARTS, parts, strict=True):
            z = self.in_layer[name](self.patches(part))
            prompt, s = self._prompt(name, z)
            similarity = similarity + s
            pieces.append(z if prompt is None else torch.cat([prompt, z], 1))
        if self.double_pass:
            pieces = [self.gpt2(piece) for piece in pieces]
        sizes = [piece.shape[1] for piece in pieces]
        return list(self.gpt2(torch.cat(pieces, 1)).split(sizes, 1)), similarity

    def _run(self, x: Tensor) -> tuple[Tensor, SeriesParts, Tensor]:
        check_shape("x", x, f"B {self.seq_len} 1")
        check_floating("x", x)
        normal, mean, sd = self.normalise(x)
        parts = self._split(normal)
        hidden, similarity = self._hidden(parts)
        forecast = x.new_zeros(len(x), self.pred_len)
        for name, h in zip(PARTS, hidden, strict=True):
            h = h if self.use_token else h[:, -self.num_patches :]
            forecast = forecast + self.out_layer[name](h.flatten(1))
        return self.denormalise(forecast.unsqueeze(-1), mean, sd), parts, similarity

    def forward(self, x: Tensor) -> Tensor:
        """Forecast: the location for a Student-t head.

        Args:
            x: Windows of single series, ``(B, seq_len, 1)``.

        Returns:
            ``(B, pred_len, 1)``, in the units of ``x``.

        Raises:
            ValueError: ``x`` has another shape.
        """
        y = self._run(x)[0]
        return y if self.distribution is None else self._student_t(y).mu

    def _student_t(self, y: Tensor) -> StudentT:
        assert self.distribution is not None
        mu, sigma, nu = (self.distribution[name](y.squeeze(-1)).unsqueeze(-1) for name in ("mu", "sigma", "nu"))
        return StudentT(mu, F.softplus(sigma) + 1e-6, F.softplus(nu) + 2)

    def forecast_distribution(self, x: Tensor) -> StudentT:
        """Return the predictive distribution of each step; for ``head="student-t"``.

        Raises:
            ValueError: The head is a point forecast.
        """
        if self.distribution is None:
            raise ValueError("A distribution needs head='student-t', this network has head='point'.")
        return self._student_t(self._run(x)[0])

    def decomposition_loss(self, parts: SeriesParts, targets: SeriesParts) -> Tensor:
        """Return the summed mean squared error between learned parts and z-scored target parts of the same windows.

        Args:
            parts: From :meth:`decompose`.
            targets: Trend, season and rest of the windows, ``(B, seq_len, 1)`` each, e.g. cut from
                :func:`dynakern.ops.stl` of the training rows.
        """
        loss = parts.trend.new_zeros(())
        for part, target in zip(parts, targets, strict=True):
            sd = torch.sqrt(target.var(1, keepdim=True, unbiased=False) + 1e-5)
            loss = loss + F.mse_loss(part, (target - target.mean(1, keepdim=True)) / sd)
        return loss

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        targets: SeriesParts | None = None,
        *,
        dec_weight: float = 0.01,
        key_weight: float = 0.1,
    ) -> Tensor:
        r"""Return the training loss :math:`L_{forecast} + \lambda L_{dec} - \kappa\, similarity`.

        The forecast loss is the mean squared error, or the negative log-likelihood of a Student-t head. The authors'
        script leaves the other two terms out; the second helps (see the claim), the third lets a pool's keys learn.

        Args:
            x: Windows, ``(B, seq_len, 1)``.
            y: What follows, ``(B, pred_len, 1)``.
            targets: Parts of the windows, see :meth:`decomposition_loss`; without them that term is 0.
            dec_weight: :math:`\lambda`.
            key_weight: :math:`\kappa`, for a pool of prompts.
        """
        forecast, parts, similarity = self._run(x)
        if self.distribution is None:
            loss = F.mse_loss(forecast, y)
        else:
            mu, sigma, nu = self._student_t(forecast)
            loss = -torch.distributions.StudentT(nu, mu, sigma, validate_args=False).log_prob(y).mean()
        if targets is not None:
            loss = loss + dec_weight * self.decomposition_loss(parts, targets)
        return loss - key_weight * similarity if self.prompt == "pool" else loss

    @torch.no_grad()
    def predict(
        self, context: Tensor, horizon: int | None = None, *, quantiles: Sequence[float] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Forecast in eval mode, as far as asked: forecasts are fed back as context beyond ``pred_len``.

        Equivariant: :math:`predict(a x + b) = a\, predict(x) + b` for a > 0 with a point head.

        Args:
            context: ``(L,)``, ``(L, C)`` or ``(B, L, 1)`` with any L of at least two patches; the last ``seq_len``
                steps count, shorter ones are padded on the left with their first value, with a warning.
            horizon: Steps to forecast; ``pred_len`` by default.
            quantiles: For a Student-t head: levels in (0, 1) to return as well, up to ``pred_len`` steps ahead.

        Returns:
            The forecast, shaped like ``context`` with ``horizon`` steps; with quantiles also these, with a last axis.

        Raises:
            ValueError: The context is not finite or too short, or quantiles are asked of a point head or too far ahead.
        """
        horizon = self.pred_len if horizon is None else horizon
        check_positive("horizon", horizon, integer=True)
        x = {1: lambda c: c[None, :, None], 2: lambda c: c.T.unsqueeze(-1), 3: lambda c: c}[context.ndim](context)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("`context` must be finite.")
        if quantiles is not None and (self.distribution is None or horizon > self.pred_len):
            raise ValueError(f"`quantiles` need head='student-t' and a horizon of at most {self.pred_len}.")
        x = self._fit_length(x)
        training = self.training
        self.eval()  # also against dropout in the transformer while validating
        try:
            pieces, window = [], x
            for _ in range(-(-horizon // self.pred_len)):
                pieces.append(self(window))
                window = torch.cat([window, pieces[-1]], 1)[:, -self.seq_len :]
            y = torch.cat(pieces, 1)[:, :horizon]
            levels = None if quantiles is None else self._quantiles(x, quantiles)[:, :horizon]
        finally:
            self.train(training)
        shape = {1: lambda t: t[0, :, 0], 2: lambda t: t[..., 0].T, 3: lambda t: t}[context.ndim]
        if levels is None:
            return shape(y)
        return shape(y), torch.stack([shape(level.unsqueeze(-1)) for level in levels.unbind(-1)], -1)

    def _fit_length(self, x: Tensor) -> Tensor:
        least = self.patch_size + self.stride
        if x.shape[1] < least:
            raise ValueError(f"`context` must hold two patches, at least {least} steps, got {x.shape[1]}.")
        missing = self.seq_len - x.shape[1]
        if missing > 0:
            warnings.warn(
                f"`context` is {missing} steps short; its first value is repeated.", UserWarning, stacklevel=3
            )
            x = torch.cat([x[:, :1].expand(-1, missing, -1), x], 1)
        return x[:, -self.seq_len :]

    def _quantiles(self, x: Tensor, levels: Sequence[float]) -> Tensor:
        from scipy.stats import t

        mu, sigma, nu = self._student_t(self._run(x)[0])
        grid = torch.tensor(list(levels), dtype=torch.float64)
        standard = t.ppf(grid.numpy(), nu.double().cpu().numpy())  # (B, H, Q)
        return mu + sigma * torch.from_numpy(standard).to(mu)

    def load_gpt2(self, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> TEMPO:
        """Load GPT-2's published weights (a path or a state dict) into the transformer; returns ``self``.

        The token table's rows of the prompts are taken, the rest of it is not needed.

        Raises:
            ValueError: Widths differ from this network's.
        """
        state = gpt2_state_dict(source, self.gpt2)
        state["wte.weight"] = state["wte.weight"][self.vocabulary]
        state["wpe.weight"] = state["wpe.weight"][: self.gpt2.max_positions]
        try:
            self.gpt2.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"The GPT-2 weights do not fit this network: {error}") from error
        return self


# Parameters that the official state dict holds and never uses.
_UNUSED = (
    "map_resid.",
    "mul_season.",
    "rev_in_season.",
    "rev_in_noise.",
    "prompt_layer_",
    "summary_map.",
    "gpt2_season.",
)


def convert_state_dict(state: Mapping[str, Tensor], model: TEMPO) -> dict[str, Tensor]:
    """Return the authors' weights under our names: old and new PEFT naming, the pool's dicts stacked.

    Of the token table only the rows of the prompts are kept.
    """
    new: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.replace("gpt2_trend.base_model.model.", "gpt2.").replace("gpt2_trend.", "gpt2.")
        name = name.replace("lora_A.default.", "lora_A.").replace("lora_B.default.", "lora_B.")
        for group in ("in_layer", "out_layer", "prompt_layer"):
            for part in PARTS:
                name = name.replace(f"{group}_{part}.", f"{group}.{part}.")
        for head in ("mu.", "sigma.", "nu."):
            name = f"distribution.{head}{name.removeprefix(head)}" if name.startswith(head) else name
        new[name] = value
    own = model.state_dict()
    if any(".c_attn.lora_A." in key for key in own):  # old PEFT kept the base map under its own name
        for kind in ("weight", "bias"):
            for key in [k for k in new if k.endswith(f"c_attn.{kind}")]:
                new[key.replace("c_attn.", "c_attn.base_layer.")] = new.pop(key)
    if "rev_in_trend.affine_weight" in new:
        pair = new.pop("rev_in_trend.affine_weight"), new.pop("rev_in_trend.affine_bias")
        new["affine"] = torch.cat([value.reshape(1) for value in pair])
    if model.prompt == "pool" and "prompt_key_dict.prompt_key_0" in new:
        size = len(own["pool.keys"])
        for kind, target in (("key", "pool.keys"), ("value", "pool.values")):
            new[target] = torch.stack([new[f"prompt_{kind}_dict.prompt_{kind}_{i}"] for i in range(size)])
        new |= {f"pool.summary.{kind}": new[f"summary_map.{kind}"] for kind in ("weight", "bias")}
    if "gpt2.wte.weight" in new and len(new["gpt2.wte.weight"]) != len(model.vocabulary):
        new["gpt2.wte.weight"] = new["gpt2.wte.weight"][model.vocabulary]
    dropped = (*_UNUSED, "prompt_layer.", "prompt_key_dict.", "prompt_value_dict.")
    return {key: value for key, value in new.items() if key in own or not key.startswith(dropped)}


def tempo(**overrides: Any) -> TEMPO:
    """TEMPO at the released size: 336 to 96 steps, GPT-2 small's first 6 blocks, LoRA of rank 16."""
    return TEMPO(**overrides)


def tempo_small(**overrides: Any) -> TEMPO:
    """TEMPO for a CPU: width 32, 1 block, 4 heads, all weights trained from scratch."""
    settings = {"d_model": 32, "num_layers": 1, "num_heads": 4, "lora_rank": None, "dropout": 0.0}
    return TEMPO(**{**settings, **overrides})


class _ChannelIndependent(nn.Module):
    """Apply a network of single series to every channel: ``(B, L, C) -> (B, H, C)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        y = self.network(x.transpose(1, 2).reshape(-1, x.shape[1], 1))
        return y.reshape(x.shape[0], x.shape[2], -1).transpose(1, 2)


def forecaster(*, channels: int, context: int, horizon: int, time_features: int) -> nn.Module:
    """Build the competitor of ``dynakern compare forecast``: the small preset, every channel for itself.

    The module maps ``x (B, context, C)`` to ``(B, horizon, C)``; marks are not used, nor is the decomposition loss,
    since that needs an STL of the training rows.
    """
    patch = min(16, max(2, context // 3))
    return _ChannelIndependent(
        tempo_small(seq_len=context, pred_len=horizon, patch_size=patch, stride=max(1, patch // 2))
    )


_LONGEST = 512  # steps that a classifier keeps: the map of the season has 8 L^2 weights


class _Classifier(nn.Module):
    """Read every channel by TEMPO, whose heads write features instead of forecasts, and classify all of them.

    The mean and the scale of a channel, which normalising removes, are features too. A series that ends early
    goes on with its last value, and patches beyond its end do not count. More than 512 steps are averaged over blocks.
    """

    def __init__(self, channels: int, length: int, classes: int, features: int = 16) -> None:
        super().__init__()
        self.length, self.block = length, -(-length // _LONGEST)
        steps = max(3, -(-length // self.block))
        patch = min(16, max(2, steps // 3))
        self.network = tempo_small(seq_len=steps, pred_len=features, patch_size=patch, stride=max(1, patch // 2))
        self.head = nn.Linear(channels * (features + 2), classes)

    def _rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return block means of all channels, ``(B, C, steps)``, and which are within the series, ``(B, 1, steps)``."""
        steps = self.network.seq_len * self.block
        x = F.pad(x.transpose(1, 2), (0, steps - x.shape[1]))
        within = (torch.arange(steps, device=x.device) < lengths[:, None]).to(x.dtype).unsqueeze(1)
        x, weight = (v.unflatten(-1, (-1, self.block)).sum(-1) for v in (x * within, within))
        return x / weight.clamp_min(1), weight > 0

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if x.shape[1] > self.length:
            raise ValueError(f"`x` must have at most {self.length} steps, got shape {tuple(x.shape)}.")
        lengths = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
        rows, valid = self._rows(x, lengths)
        count = valid.sum(-1, keepdim=True)
        mean = (rows * valid).sum(-1, keepdim=True) / count
        sd = torch.sqrt(((rows - mean).square() * valid).sum(-1, keepdim=True) / count + 1e-5)
        normal = (rows - mean) / sd
        last = normal.gather(-1, (count - 1).expand(-1, x.shape[2], -1))
        network = self.network
        normal = torch.where(valid, normal, last) * network.affine[0] + network.affine[1]
        hidden, _ = network._hidden(network._split(normal.flatten(0, 1).unsqueeze(-1)))  # (B C, T + P, d) a part
        starts = torch.arange(network.num_patches, device=x.device) * network.stride
        used = (starts < count[:, 0]).repeat_interleave(x.shape[2], 0).unsqueeze(-1)  # (B C, P, 1)
        found = [
            network.out_layer[p]((h[:, -network.num_patches :] * used).flatten(1))
            for p, h in zip(PARTS, hidden, strict=True)
        ]
        features = torch.stack(found).sum(0).unflatten(0, (len(x), -1))
        return self.head(torch.cat([features, mean, sd.log()], -1).flatten(1))


def series_classifier(*, channels: int, length: int, classes: int) -> nn.Module:
    """Build the competitor of ``dynakern compare classify-series`` from the small preset.

    The module maps ``x (B, L, C)`` and ``lengths (B,) | None`` to logits ``(B, classes)``.
    """
    return _Classifier(channels, length, classes)
