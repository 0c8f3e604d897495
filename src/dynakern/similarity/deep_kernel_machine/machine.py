"""The sparse machine: states of Gram matrices, kernels, Gram layers, norms and outputs as torch modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_finite, check_positive, check_shape

__all__ = ["GramKernel", "GramLayer", "GramNorm", "GramState", "SparseDKM", "convert_state_dict"]

KERNELS = ("sqexp", "relu", "linear", "heaviside", "normalized_gaussian")
Norm = Literal["local", "global"]
Norms = tuple[Norm | None, Norm | None, Norm | None, Norm | None]


class GramState(NamedTuple):
    """Gram matrices of inducing points and of a batch: all that a layer hands to the next.

    Attributes:
        ii: Inducing with inducing points, ``(P, P)``.
        ti: Batch with inducing points, ``(N, P)``.
        t: Each point of the batch with itself, ``(N,)``.
    """

    ii: Tensor
    ti: Tensor
    t: Tensor


def angular(kind: str, gram: Tensor, scale: Tensor) -> Tensor:
    """Return a kernel of the cosine; ``scale`` holds the root of the product of both variances."""
    cosine = gram / scale
    if kind == "normalized_gaussian":
        return scale * (cosine - 1).exp()
    # acos has no finite slope at 1, where equal points are; their entries are set by the caller.
    angle = cosine.clamp(-1 + 1e-12, 1 - 1e-12).acos()
    if kind == "heaviside":
        return scale * (1 - angle / math.pi)
    return (scale * angle.sin() + (math.pi - angle) * gram) / math.pi


class GramKernel(nn.Module):
    r"""A kernel as a function of Gram entries, with the jitter that keeps its matrix positive definite.

    With :math:`c = G_{ij} / \sqrt{G_{ii} G_{jj}}` and :math:`\theta = \arccos c`: ``"sqexp"``
    :math:`e^{-(G_{ii} + G_{jj} - 2 G_{ij}) / 2}`; ``"relu"``
    :math:`\tfrac1\pi \sqrt{G_{ii} G_{jj}}\,(\sin\theta + (\pi - \theta) \cos\theta)`; ``"linear"`` G; ``"heaviside"``
    :math:`\sqrt{G_{ii} G_{jj}}\,(1 - \theta / \pi)`; ``"normalized_gaussian"`` :math:`\sqrt{G_{ii} G_{jj}}\,e^{c - 1}`.
    All but the first are followed by :math:`w K + b` with learned variances.

    Args:
        kind: The kernel.
        jitter: :math:`\epsilon`: the matrix of inducing points becomes :math:`K \circ (1 + \epsilon I) + \epsilon I`,
            the variances of the batch :math:`k (1 + \epsilon) + \epsilon`. Kernels of the cosine take variances
            :math:`G (1 + \epsilon) + \epsilon` inside, as the authors' code does for ReLU (that the other two follow it
            is our choice).
        weight_variance: Initial w.
        bias_variance: Initial b.
    """

    def __init__(
        self,
        kind: str = "relu",
        *,
        jitter: float = 1e-4,
        weight_variance: float = 1.0,
        bias_variance: float = 0.1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KERNELS)
        check_positive("jitter", jitter, zero=True)
        self.kind, self.jitter = kind, jitter
        if kind != "sqexp":
            self.log_weight_var = nn.Parameter(torch.full((1,), math.log(weight_variance), dtype=dtype))
            self.log_bias_var = nn.Parameter(torch.full((1,), math.log(bias_variance), dtype=dtype))

    def forward(self, state: GramState) -> GramState:
        """Return the kernel of a state, a state itself."""
        ii, ti, t = state
        eps, eye = self.jitter, torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
        d = ii.diagonal()
        if self.kind == "sqexp":
            k_ii = (-(d[:, None] + d - 2 * ii) / 2).exp()
            k_ti = (-(t[:, None] + d - 2 * ti) / 2).exp()
            k_t = torch.ones_like(t)
        else:
            w, b = self.log_weight_var.exp(), self.log_bias_var.exp()
            if self.kind == "linear":
                k_ii, k_ti = ii, ti
            else:
                inside, inside_t = d * (1 + eps) + eps, t * (1 + eps) + eps
                k_ii = angular(self.kind, ii, (inside[:, None] * inside).sqrt())
                k_ii = torch.where(eye > 0, inside, k_ii)
                k_ti = angular(self.kind, ti, (inside_t[:, None] * inside).sqrt())
            k_ii, k_ti, k_t = w * k_ii + b, w * k_ti + b, w * t + b
        return GramState(k_ii * (1 + eps * eye) + eps * eye, k_ti, k_t * (1 + eps) + eps)


class Factor(nn.Module):
    r"""A positive definite matrix as a parameter: :math:`G = C C^\top`.

    ``"cholesky"``: :math:`C = (\mathrm{tril}(V, -1) + \mathrm{diag}(e^{\mathrm{diag} V})) / \sqrt P`, which cannot
    become singular. ``"full"``: :math:`C = e^{s/2} V / \sqrt P`.
    """

    def __init__(self, size: int, form: str, dtype: torch.dtype, *, scale: bool, name: str = "V") -> None:
        super().__init__()
        check_choice("form", form, ("cholesky", "full"))
        self.form, self.size, self._name = form, size, name
        start = torch.zeros(size, size, dtype=dtype) if form == "cholesky" else torch.eye(size, dtype=dtype)
        self.register_parameter(name, nn.Parameter(start))
        if scale:
            self.latent_Gscale = nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=form == "full")

    @property
    def factor(self) -> Tensor:
        """C, ``(P, P)``."""
        v = getattr(self, self._name)
        if self.form == "cholesky":
            c = v.tril(-1) + v.diagonal().exp().diag()
        else:
            c = v * (self.latent_Gscale / 2).exp() if hasattr(self, "latent_Gscale") else v
        return c / math.sqrt(self.size)

    @property
    def matrix(self) -> Tensor:
        """G, ``(P, P)``."""
        c = self.factor
        return c @ c.T

    @torch.no_grad()
    def set(self, matrix: Tensor) -> None:
        """Make G equal ``matrix``, positive definite."""
        c = torch.linalg.cholesky(matrix) * math.sqrt(self.size)
        value = c.tril(-1) + c.diagonal().log().diag() if self.form == "cholesky" else c
        getattr(self, self._name).copy_(value)
        if hasattr(self, "latent_Gscale"):
            self.latent_Gscale.zero_()

    def divergence(self, root: Tensor, kernel: Tensor, *, taylor: bool) -> Tensor:
        r"""Return :math:`\mathrm{KL}(\mathcal N(0, G) \| \mathcal N(0, K))`, ``root`` being the Cholesky factor of K.

        Taylor: :math:`\mathrm{tr} - \log\det - P` is replaced by :math:`\tfrac12 \lVert G^{-1} K - I \rVert_F^2`.
        """
        c = self.factor
        if taylor:
            ratio = torch.linalg.solve(c @ c.T, kernel) - torch.eye(len(c), dtype=c.dtype, device=c.device)
            return ratio.square().sum() / 4
        if self.form == "cholesky":
            log_det = 2 * c.diagonal().log().sum()
        else:
            log_det = 2 * torch.linalg.slogdet(c).logabsdet
        trace = torch.linalg.solve_triangular(root, c, upper=False).square().sum()
        return (trace - log_det + 2 * root.diagonal().log().sum() - len(c)) / 2


def _conditional(root: Tensor, kernel: GramState, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``K_ti K_ii^-1 G``, the variances of the batch given it, and ``L^-1 K_it``, by two triangular solves."""
    size = kernel.ti.shape[0]
    solved = torch.linalg.solve_triangular(root, torch.cat([kernel.ti.T, factor], 1), upper=False)
    x, y = solved[:, :size], solved[:, size:]  # (P, N), (P, P)
    mixed = x.T @ y  # (N, P)
    return mixed @ factor.T, kernel.t - x.square().sum(0) + mixed.square().sum(1), x


class GramLayer(Factor):
    r"""A layer: the Gram matrix of the inducing points is the parameter, that of the batch follows from it.

    With :math:`A = K_{ti} K_{ii}^{-1}`: :math:`G_{ti} = A G_{ii}` and
    :math:`g_t = k_t - \mathrm{diag}(A K_{it}) + \mathrm{diag}(A G_{ii} A^\top)`.

    Args:
        num_inducing: P.
        dof: :math:`\nu > 0`; infinite for a kernel that does not learn.
        form: ``"cholesky"`` or ``"full"``, how G is parametrised.
        taylor: Replace the KL divergence by its Taylor expansion.
    """

    def __init__(
        self,
        num_inducing: int,
        *,
        dof: float = 1.0,
        form: Literal["cholesky", "full"] = "cholesky",
        taylor: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(num_inducing, form, dtype, scale=True)
        if not dof > 0:
            raise ValueError(f"`dof` must be positive (or infinite), got {dof!r}.")
        self.dof, self.taylor = dof, taylor

    def forward(self, kernel: GramState) -> tuple[GramState, Tensor]:
        r"""Return the state after the layer, and its term :math:`-\nu\,\mathrm{KL}` of the objective."""
        if math.isinf(self.dof):
            return kernel, kernel.t.new_zeros(())
        root = torch.linalg.cholesky(kernel.ii)
        ti, t, _ = _conditional(root, kernel, self.factor)
        return GramState(self.matrix, ti, t), -self.dof * self.divergence(root, kernel.ii, taylor=self.taylor)


class _Scale(nn.Module):
    def __init__(self, name: str, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._name = name
        self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=dtype)))

    def forward(self) -> Tensor:
        return getattr(self, self._name).exp()


class GramNorm(nn.Module):
    r"""Divide a Gram matrix by sizes of its features, and multiply by learned ones.

    :math:`n = \sqrt{\mathrm{diag}}` (``"local"``), its root mean (``"global"``) or 1 (None), for inducing points and
    batch. A global norm of the batch makes a prediction depend on the other points of its batch.

    Args:
        num_inducing: P.
        norms: Norm of inducing points, norm of the batch, learned scale of inducing points (``"local"``: one a point;
            ``"global"``: one), learned scale of the batch (``"global"``: one, or None).
    """

    def __init__(
        self,
        num_inducing: int,
        norms: Norms = ("local", "local", "local", "global"),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        for name, value in zip(("inducing", "batch", "scale of inducing"), norms, strict=False):
            if value not in ("local", "global", None):
                raise ValueError(f"`norms` must hold 'local', 'global' or None, got {value!r} for {name}.")
        if norms[3] not in ("global", None):
            raise ValueError(f"`norms` must hold 'global' or None for the scale of the batch, got {norms[3]!r}.")
        self.norms = norms
        self.i_scale = _Scale("i_logscale", num_inducing if norms[2] == "local" else 1, dtype) if norms[2] else None
        self.t_scale = _Scale("t_logscale", 1, dtype) if norms[3] else None

    def forward(self, state: GramState) -> GramState:
        """Return the normalised state."""
        sizes = [_sizes(values, norm) for values, norm in zip((state.ii.diagonal(), state.t), self.norms, strict=False)]
        i, t = (1 / size for size in sizes)
        if self.i_scale is not None:
            i = i * self.i_scale()
        if self.t_scale is not None:
            t = t * self.t_scale()
        return GramState(state.ii * i[:, None] * i, state.ti * t[:, None] * i, state.t * t.square())


def _sizes(values: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return torch.ones_like(values)
    return values.sqrt() if norm == "local" else values.mean().sqrt().expand_as(values)


class _Features(nn.Module):
    """Inducing points and the Gram matrices of inputs."""

    def __init__(self, num_inducing: int, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.Xi = nn.Parameter(torch.zeros(num_inducing, features, dtype=dtype))

    def forward(self, x: Tensor) -> GramState:
        width = x.shape[1]
        return GramState(self.Xi @ self.Xi.T / width, x @ self.Xi.T / width, x.square().sum(1) / width)


class _Output(Factor):
    """Gaussian outputs: ``q(f) = N(A mu, ...)`` with one covariance S for all C outputs."""

    def __init__(self, size: int, outputs: int, form: str, dtype: torch.dtype, *, taylor: bool, tempered: bool) -> None:
        super().__init__(size, form, dtype, scale=False, name="V" if form == "cholesky" else "L")
        self.mu = nn.Parameter(torch.zeros(size, outputs, dtype=dtype))
        self.taylor, self.tempered = taylor, tempered

    def forward(self, kernel: GramState) -> tuple[Tensor, Tensor, Tensor]:
        root = torch.linalg.cholesky(kernel.ii)
        _, variance, x = _conditional(root, kernel, self.factor)
        whitened = torch.linalg.solve_triangular(root, self.mu, upper=False)  # (P, C)
        outputs = self.mu.shape[1]
        divergence = outputs * self.divergence(root, kernel.ii, taylor=self.taylor) + whitened.square().sum() / 2
        return x.T @ whitened, variance, -divergence / (outputs if self.tempered else 1)


class SparseDKM(nn.Module):
    r"""A deep kernel machine with inducing points.

    Inputs, a kernel, then ``layers`` times a Gram layer, a norm and a kernel, and Gaussian outputs.

    Args:
        in_features: Width of the inputs.
        out_features: Number C of outputs.
        num_inducing: P.
        layers: Number of Gram layers.
        kernel: See :class:`GramKernel`.
        dof: :math:`\nu` of every layer; infinite for a kernel that does not learn (NNGP).
        form: Parametrisation of the Gram matrices and of the outputs' covariance: ``"cholesky"`` or ``"full"``.
        taylor: Replace the KL divergences by their Taylor expansions, as the authors' later code does by default.
        norms: See :class:`GramNorm`; None for no norm.
        tempered: Divide the divergence of the outputs by C.
        jitter: See :class:`GramKernel`.
        generator: Draws the initial covariance of the outputs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_inducing: int,
        layers: int = 2,
        kernel: str = "relu",
        dof: float = 1.0,
        form: Literal["cholesky", "full"] = "cholesky",
        taylor: bool = False,
        norms: Norms | None = ("local", "local", "local", "global"),
        tempered: bool = False,
        jitter: float = 1e-4,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("num_inducing", num_inducing),
        ):
            check_positive(name, value, integer=True)
        check_positive("layers", layers, integer=True, zero=True)
        self.f2g = _Features(num_inducing, in_features, dtype)
        self.kernels = nn.ModuleList(GramKernel(kernel, jitter=jitter, dtype=dtype) for _ in range(layers + 1))
        options = {"dof": dof, "form": form, "taylor": taylor, "dtype": dtype}
        self.grams = nn.ModuleList(GramLayer(num_inducing, **options) for _ in range(layers))  # pyright: ignore
        self.norms = nn.ModuleList(GramNorm(num_inducing, norms, dtype) for _ in range(layers)) if norms else None
        self.output = _Output(num_inducing, out_features, form, dtype, taylor=taylor, tempered=tempered)
        r = torch.randn(num_inducing, num_inducing, generator=generator, dtype=dtype)
        self.output.set(r @ r.T / num_inducing + 1e-4 * torch.eye(num_inducing, dtype=dtype))

    def stages(self, x: Tensor) -> Iterator[tuple[str, GramState, Tensor | None]]:
        """Yield the name of each stage before the outputs, its state, and its term of the objective if it has one."""
        state = self.f2g(x)
        yield "f2g", state, None
        state = self.kernels[0](state)
        yield "kernel0", state, None
        for index, gram in enumerate(self.grams):
            state, term = gram(state)
            yield f"gram{index}", state, term
            if self.norms is not None:
                state = self.norms[index](state)
                yield f"norm{index}", state, None
            state = self.kernels[index + 1](state)
            yield f"kernel{index + 1}", state, None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return mean, variance and the divergences of the objective.

        Args:
            x: Batch, ``(N, in_features)``.

        Returns:
            Mean ``(N, C)`` and variance ``(N,)`` (one for all outputs) of the outputs, and the sum of all terms
            :math:`-\nu\,\mathrm{KL}`, a number: the objective a point is the expected log-likelihood plus this over the
            number of training points.
        """
        check_shape("x", x, f"N {self.f2g.Xi.shape[1]}")
        stages = list(self.stages(x))
        terms, state = [term for _, _, term in stages if term is not None], stages[-1][1]
        mean, variance, term = self.output(state)
        return mean, variance, torch.stack([*terms, term]).sum()

    @torch.no_grad()
    def initialize(self, inducing: Tensor, outputs: Tensor | None = None) -> Self:
        """Put the inducing points there and every Gram matrix at its kernel, ``G = K``: the NNGP.

        Args:
            inducing: ``(P, in_features)``, finite.
            outputs: Initial means of the outputs, ``(P, C)``; zero by default.

        Returns:
            This module.
        """
        check_shape("inducing", inducing, f"{len(self.f2g.Xi)} {self.f2g.Xi.shape[1]}")
        check_finite("inducing", inducing)
        self.f2g.Xi.copy_(inducing)
        if outputs is not None:
            check_shape("outputs", outputs, f"{self.output.mu.shape[0]} {self.output.mu.shape[1]}")
            self.output.mu.copy_(outputs)
        state = self.kernels[0](self.f2g(self.f2g.Xi))
        for index, gram in enumerate(self.grams):
            gram.set(state.ii)  # pyright: ignore[reportCallIssue]
            state, _ = gram(state)
            if self.norms is not None:
                state = self.norms[index](state)
            state = self.kernels[index + 1](state)
        return self


def convert_state_dict(state: Mapping[str, Tensor], model: SparseDKM) -> dict[str, Tensor]:
    """Return a published checkpoint with this module's names.

    Checkpoints of ``skr_cdkm`` have them already. Those of ``convdkmpaper`` number their stages: inputs, Gram of
    inputs, a kernel, then Gram layers and kernels in turn (norms between them), and the outputs.

    Args:
        state: The checkpoint.
        model: The machine that it is for.
    """
    if not any(key.split(".")[0].isdigit() for key in state):
        return dict(state)
    per_layer = 2 if model.norms is None else 3
    last, renamed = 3 + per_layer * len(model.grams), {}
    for key, value in state.items():
        place, _, name = key.partition(".")
        number = int(place)
        if number == 0:
            renamed[f"f2g.Xi{name.removeprefix('X')}"] = value
        elif number == last:
            renamed[f"output.{name}"] = value
        elif number == 2:
            renamed[f"kernels.0.{name}"] = value
        else:
            layer, within = divmod(number - 3, per_layer)
            part = ("grams", "kernels") if per_layer == 2 else ("grams", "norms", "kernels")
            index = layer + 1 if part[within] == "kernels" else layer
            renamed[f"{part[within]}.{index}.{name}"] = value
    return renamed
