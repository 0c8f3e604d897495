"""The layer FDConv: its kernels by frequency groups, and the convolution with a kernel for each image."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.layers.vision import cache_key, fuse_conv_norm, norm_scale_shift
from dynakern.vision.fdconv.bands import Activation, BandModulation
from dynakern.vision.fdconv.gates import Attention, GlobalModulation, LocalModulation

__all__ = ["FDConv", "convert_state_dict", "frequency_order"]


@functools.lru_cache(maxsize=16)
def frequency_order(rows: int, columns: int) -> Tensor:
    """Return the half-plane frequencies of a ``(rows, columns)`` matrix from low to high, as places in its spectrum.

    The order is by ``sqrt(f_h^2 + f_w^2)``, ties as they stand in memory. The official sort leaves ties open: which of
    two equal frequencies falls into which group may differ there.

    Returns:
        ``(rows * (columns // 2 + 1),)``, row-major places, int32, on the CPU.
    """
    f = torch.meshgrid(
        torch.fft.fftfreq(rows, dtype=torch.float32, device="cpu"),
        torch.fft.rfftfreq(columns, dtype=torch.float32, device="cpu"),
        indexing="ij",
    )
    return torch.stack(f, -1).norm(dim=-1).flatten().argsort(stable=True).int()


class FDConv(nn.Module):
    r"""A convolution ``(B, I, H, W) -> (B, O, H', W')`` with a kernel for each image.

    The kernel is :math:`a_s a_c a_f\, a_l \odot \sum_q a_q W_q`: :class:`GlobalModulation` gives :math:`a_c, a_f, a_s`
    and :math:`a_q`, :class:`LocalModulation` the entry-wise :math:`a_l`; it is applied to the output of
    :class:`BandModulation`. :math:`W_q` holds the q-th of K groups of frequencies of the ``(O k, I k)`` matrix of the
    kernel; the parameter is that spectrum, divided by ``min(I, O) // 2``.

    The layer is a plain convolution, with the parameter ``weight``, where ``min(I, O) <= min_channels`` or k is not one
    of ``use_fdconv_if_k_in``; ``dynamic`` says so.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k; kernels are square.
        stride: As in ``torch.nn.Conv2d``, as the next three.
        padding: Zeros on each side.
        dilation: Step between the entries of the kernel.
        groups: 1.
        bias: Whether to add one.
        padding_mode: ``"zeros"``.
        kernel_num: Number K of groups; None for O // 2 with ``kernel_temp = sqrt(K R)``.
        param_ratio: Number R of spectra. At the start the kernel is R times the converted one, as in the official code.
        param_reduction: Part of the frequencies kept, the lowest; 1 for all.
        fix_reduction: With ``param_reduction`` below 1 the official code forgets the factor
            ``(min(I, O) // 2) K R / param_reduction`` of the kernel; True applies it.
        reduction: See :class:`GlobalModulation`, as the next two.
        att_multi: Also of the local gate.
        temp: By default ``kernel_temp``.
        kernel_temp: Temperature of the attention over groups.
        ksm_only_kernel_att: Only the attention over groups.
        use_ksm_local: Whether there is a local gate.
        ksm_local_act: ``"sigmoid"`` (times ``att_multi``) or ``"tanh"`` (plus 1).
        ksm_global_act: ``"sigmoid"``, ``"tanh"`` or, with ``ksm_only_kernel_att``, ``"softmax"``.
        min_channels: The layer is dynamic above this number of channels.
        use_fdconv_if_k_in: The layer is dynamic for these kernel sizes.
        use_fbm_if_k_in: The bands are modulated for these kernel sizes.
        use_fbm_for_stride: The bands are modulated wherever the stride is above 1.
        k_list: See :class:`BandModulation`, as the next five.
        lowfreq_att: Learn the gate of the lowest band.
        fbm_act: Activation of the gates.
        spatial_group: Number of groups of channels with a gate of their own.
        spatial_kernel: Size of the gates' convolutions.
        mask: How the bands are cut.
        convert_param: False keeps the spatial ``weight`` as parameter and transforms it at every call.
        indices: Rows and columns of the frequencies of each group, ``(R, 2, K, n)``, instead of our order; for
            checkpoints whose groups broke ties in another way. It is not part of the state dict.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option cannot be: more groups than one, another padding mode, a kernel that is not square, a
            number K that does not divide the number of frequencies (the message lists what does).

    Source: Chen et al., 2025, arXiv:2503.18783, sections 3.1 to 3.3.
    """

    dft_weight: nn.Parameter
    weight: nn.Parameter
    group: Tensor
    places: Tensor | None
    output_scale: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        *,
        kernel_num: int | None = 4,
        param_ratio: int = 1,
        param_reduction: float = 1.0,
        fix_reduction: bool = False,
        reduction: float = 1 / 16,
        att_multi: float = 2.0,
        temp: float | None = None,
        kernel_temp: float = 1.0,
        ksm_only_kernel_att: bool = False,
        use_ksm_local: bool = True,
        ksm_local_act: Literal["sigmoid", "tanh"] = "sigmoid",
        ksm_global_act: Activation = "sigmoid",
        min_channels: int = 16,
        use_fdconv_if_k_in: Sequence[int] = (1, 3),
        use_fbm_if_k_in: Sequence[int] = (3,),
        use_fbm_for_stride: bool = False,
        k_list: Sequence[int] = (2, 4, 8),
        lowfreq_att: bool = False,
        fbm_act: Activation = "sigmoid",
        spatial_group: int = 1,
        spatial_kernel: int = 3,
        mask: Literal["cached64", "exact"] | tuple[int, int] = "cached64",
        convert_param: bool = True,
        indices: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(  # checks its arguments, and draws the kernel
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **at
        )
        k = conv.kernel_size[0]
        if groups != 1:
            raise ValueError(
                f"`groups` must be 1, got {groups}: a spectrum over all channels has no groups of channels."
            )
        if padding_mode != "zeros" or isinstance(padding, str):
            raise ValueError(f"`padding` must be zeros, given in pixels, got {padding!r} with mode {padding_mode!r}.")
        if conv.kernel_size != (k, k):
            raise ValueError(f"`kernel_size` must be square, got {conv.kernel_size}.")
        check_choice("ksm_local_act", ksm_local_act, ("sigmoid", "tanh"))
        check_positive("param_ratio", param_ratio, integer=True)
        if not 0 < param_reduction <= 1 or (param_reduction < 1 and not convert_param):
            raise ValueError(
                f"`param_reduction` must be in (0, 1], and 1 without convert_param, got {param_reduction!r}."
            )
        if kernel_num is None:
            kernel_num = out_channels // 2
            kernel_temp = math.sqrt(kernel_num * param_ratio)
        check_positive("kernel_num", kernel_num, integer=True)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding = (padding, padding) if isinstance(padding, int) else tuple(padding)
        self.kernel_num, self.param_ratio, self.param_reduction = kernel_num, param_ratio, param_reduction
        self.att_multi, self.ksm_local_act, self.convert_param = att_multi, ksm_local_act, convert_param
        self.bias = conv.bias
        self.register_buffer("output_scale", None)
        self._cached: tuple[Any, Tensor] | None = None
        if k not in use_fdconv_if_k_in:
            warnings.warn(
                f"FDConv is a plain convolution for a kernel of {k}; it adapts for {list(use_fdconv_if_k_in)}.",
                UserWarning,
                stacklevel=2,
            )
        self.dynamic = min(in_channels, out_channels) > min_channels and k in use_fdconv_if_k_in
        if not self.dynamic:
            self.weight = nn.Parameter(conv.weight.detach())
            return
        self._draw_groups(indices, conv.weight.device)
        if convert_param:
            self.dft_weight = nn.Parameter(self.spectrum(conv.weight.detach()))
        else:
            self.weight = nn.Parameter(conv.weight.detach())
        R, c = param_ratio, min(in_channels, out_channels) // 2
        self.alpha = 1.0 if param_reduction < 1 and not fix_reduction else c * kernel_num * R / param_reduction
        self.KSM_Global = GlobalModulation(
            in_channels, out_channels, k, kernel_num * R, reduction=reduction, att_multi=att_multi,
            temp=kernel_temp if temp is None else temp, kernel_temp=kernel_temp, act=ksm_global_act,
            only_kernel=ksm_only_kernel_att, **at,
        )  # fmt: skip
        if k in use_fbm_if_k_in or (use_fbm_for_stride and self.stride[0] > 1):
            self.FBM = BandModulation(
                in_channels, k_list=k_list, lowfreq_att=lowfreq_att, act=fbm_act, spatial_group=spatial_group,
                spatial_kernel=spatial_kernel, mask=mask, **at,
            )  # fmt: skip
        if use_ksm_local:
            self.KSM_Local = LocalModulation(in_channels, out_channels, k, **at)

    def _draw_groups(self, indices: Tensor | None, device: torch.device) -> None:
        """Set the buffer of the places of each group in the transposed spectrum, ``(R, K n)``, and its inverse."""
        rows, columns, K, R = *self._matrix(), self.kernel_num, self.param_ratio
        half = columns // 2 + 1
        n = int(self.param_reduction * rows * half)
        if n == 0 or n % K:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(math.log(d / K)))[:12])
            raise ValueError(f"`kernel_num` must divide the {n} frequencies, got {K}; near divisors: {near}.")
        if indices is None:
            places = frequency_order(rows, columns)[:n].long().expand(R, n)
        else:
            if indices.shape != (R, 2, K, n // K):
                raise ValueError(f"`indices` must have shape {(R, 2, K, n // K)}, got {tuple(indices.shape)}.")
            places = (indices[:, 0].long() * half + indices[:, 1].long()).flatten(1).cpu()
            if any(len(p.unique()) != n or p.min() < 0 or p.max() >= rows * half for p in places):
                raise ValueError("`indices` must name every frequency at most once.")
        group = torch.full((R, rows * half), K, dtype=torch.int32, device="cpu")
        group.scatter_(1, places, (torch.arange(n, device="cpu") // (n // K)).int().expand(R, n))
        group = group.view(R, rows, half).transpose(1, 2).flatten(1)  # as the spectrum is stored for the transform
        self.register_buffer("group", group.to(device), persistent=False)
        self.register_buffer("places", places.to(device) if n < rows * half else None, persistent=False)

    def _matrix(self) -> tuple[int, int]:
        k = self.kernel_size[0]
        return self.out_channels * k, self.in_channels * k

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return the parameter ``dft_weight`` of a kernel ``(O, I, k, k)``.

        Returns:
            Real and imaginary parts, ``(R, O k, I k // 2 + 1, 2)``, or ``(R, n, 2)`` of the n lowest frequencies.
        """
        wide = weight if weight.dtype == torch.float64 else weight.float()
        F_ = torch.view_as_real(torch.fft.rfft2(wide.permute(0, 2, 1, 3).reshape(self._matrix())))
        F_ = (F_ / (min(self.in_channels, self.out_channels) // 2)).to(weight.dtype)
        if self.places is None:
            return F_.expand(self.param_ratio, *F_.shape).contiguous()
        return F_.flatten(0, 1)[self.places]

    def _coefficients(self) -> Tensor:
        """Return the spectra as they are transformed, complex, ``(R, I k // 2 + 1, O k)``, contiguous."""
        D = self.dft_weight if self.convert_param else self.spectrum(self.weight)
        D = torch.view_as_complex((D if D.dtype == torch.float64 else D.float()).contiguous())
        if self.places is not None:
            rows, columns = self._matrix()
            full = D.new_zeros(len(D), rows * (columns // 2 + 1))
            D = full.scatter(1, self.places, D).view(len(D), rows, -1)
        return D.transpose(1, 2).contiguous()

    def _synthesise(self, a: Tensor, coefficients: Tensor) -> Tensor:
        """Return the kernels ``(B, O, k, I, k)`` for the attention over groups ``a``, ``(B, R K)``."""
        columns, k = self._matrix()[1], self.kernel_size[0]
        a = F.pad(a.unflatten(1, (self.param_ratio, -1)), (0, 1))  # the last group: frequencies that are left out
        S = [a[:, r].index_select(1, self.group[r]).view(len(a), *c.shape) * c for r, c in enumerate(coefficients)]
        S = functools.reduce(torch.add, S)
        # Two transforms along contiguous axes and a copy between them: faster than irfft2, which strides.
        W = torch.fft.irfft(torch.fft.ifft(S, dim=2).transpose(1, 2).contiguous(), n=columns, dim=2)
        return W.view(len(a), self.out_channels, k, self.in_channels, k)

    def _mix(self, a: Tensor) -> Tensor:
        r"""Return :math:`\sum_q a_q W_q`, ``(B, O, k, I, k)``, of ``a``, ``(B, R K)``.

        Without gradients something is kept for the next call: of few groups their kernels, of more the coefficients.
        """
        parameter = self.dft_weight if self.convert_param else self.weight
        a = a.to(torch.float64 if parameter.dtype == torch.float64 else torch.float32) * self.alpha
        key = cache_key(parameter)
        if key is None:
            return self._synthesise(a, self._coefficients())
        few = a.shape[1] <= 8
        if self._cached is None or self._cached[0] != key:
            kept = self._coefficients()
            if few:
                kept = self._synthesise(torch.eye(a.shape[1], dtype=a.dtype, device=a.device), kept)
            self._cached = key, kept
        kept = self._cached[1]
        return (a @ kept.flatten(1)).view(len(a), *kept.shape[1:]) if few else self._synthesise(a, kept)

    def _kernels(self, g: Tensor, gate: Attention, *, channel: bool, filter: bool) -> Tensor:
        """Return the kernels ``(B, O, k, I, k)``, with the gates of input and of output channels or without."""
        # Without gradients nothing needs the factors again: large products are then taken in place.
        multiply = torch.mul if torch.is_grad_enabled() else Tensor.mul_
        a = gate.kernel
        if hasattr(self, "KSM_Local"):
            z = self.KSM_Local(g)
            local = torch.sigmoid(z) if self.ksm_local_act == "sigmoid" else 1 + torch.tanh(z)
            a = a * self.att_multi if self.ksm_local_act == "sigmoid" else a
            K = multiply(self._mix(a).to(g.dtype), local)
        else:
            K = self._mix(a).to(g.dtype)
        k, I = self.kernel_size[0], self.in_channels
        if gate.spatial is not None:  # small factors first, laid out as the kernel is
            scale = gate.spatial[:, None, :, None].expand(-1, 1, k, I, k)
            scale = scale * gate.channel[:, None, None, :, None] if channel else scale.contiguous()  # pyright: ignore
            K = multiply(K, scale)
        elif channel and gate.channel is not None:
            K = multiply(K, gate.channel[:, None, None, :, None])
        return multiply(K, gate.filter[:, :, None, None, None]) if filter and gate.filter is not None else K

    def kernels(self, x: Tensor) -> Tensor:
        """Return the kernel of each image, ``(B, O, I, k, k)``, of maps ``x``, ``(B, I, H, W)``.

        Raises:
            ValueError: The layer is a plain convolution.
        """
        if not self.dynamic:
            raise ValueError("This layer is a plain convolution: its kernel is `weight`.")
        g = x.mean((2, 3), keepdim=True)
        return self._kernels(g, self.KSM_Global(g), channel=True, filter=True).permute(0, 1, 3, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each image with its own kernel.

        Args:
            x: Maps, ``(B, I, H, W)``, floating point; spectra are taken in float32 at least.

        Returns:
            ``(B, O, H', W')``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: ``x`` has another number of axes or channels.
        """
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_channels} H W")
        if not self.dynamic:
            y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation)
            return self._affine(y, None)
        k = self.kernel_size[0]
        # The gates of the channels scale either the kernel or the maps, whichever is smaller.
        pixels = x.shape[2] * x.shape[3]
        channel, filter = pixels > self.out_channels * k * k, pixels > self.in_channels * k * k
        g = x.mean((2, 3), keepdim=True)
        gate = self.KSM_Global(g)
        K = self._kernels(g, gate, channel=channel, filter=filter)
        x = self.FBM(x) if hasattr(self, "FBM") else x
        if gate.channel is not None and not channel:
            x = x * gate.channel[:, :, None, None]
        return self._affine(self._convolve(x, K), None if filter else gate.filter)

    def _affine(self, y: Tensor, filter: Tensor | None) -> Tensor:
        """Return ``filter y + bias``, scaled as a folded norm asks."""
        scale = None if filter is None else filter[:, :, None, None]
        if self.output_scale is not None:
            own = self.output_scale[:, None, None]
            scale = own if scale is None else scale * own
        if self.bias is None:
            return y if scale is None else y * scale
        bias = self.bias[:, None, None]
        return y + bias if scale is None else torch.addcmul(bias, y, scale)

    def _convolve(self, x: Tensor, K: Tensor) -> Tensor:
        """Convolve ``(B, I, H, W)`` with kernels ``(B, O, k, I, k)``, each image with its own."""
        B, O, k, I, _ = K.shape
        (ph, pw), (sh, sw), (dh, dw) = self.padding, self.stride, self.dilation
        H = (x.shape[2] + 2 * ph - dh * (k - 1) - 1) // sh + 1
        W = (x.shape[3] + 2 * pw - dw * (k - 1) - 1) // sw + 1
        if k == 1:
            x = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
            return torch.bmm(K.view(B, O, I), x[:, :, ::sh, ::sw].flatten(2)).view(B, O, H, W)
        if O * I * k * k > 16 * (I + O) * H * W:  # a small map: rather move its patches than the entries of the kernel
            patches = F.unfold(x, (k, k), self.dilation, self.padding, self.stride)
            patches = patches.view(B, I, k, k, H * W).transpose(1, 2).reshape(B, k * I * k, H * W)
            return torch.bmm(K.view(B, O, k * I * k), patches).view(B, O, H, W)
        options = (None, self.stride, self.padding, self.dilation)
        if torch.compiler.is_compiling():  # one operation in the graph
            y = F.conv2d(x.reshape(1, B * I, *x.shape[2:]), K.transpose(2, 3).reshape(B * O, I, k, k), *options, B)
            return y.view(B, O, H, W)
        K = K.transpose(3, 4).contiguous().permute(0, 1, 4, 2, 3)  # (B, O, I, k, k), channels last
        return torch.cat([F.conv2d(x_.unsqueeze(0), K_, *options) for x_, K_ in zip(x, K, strict=True)])

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> FDConv:
        """Return a layer that starts as the given convolution, to about 1e-5, or as ``param_ratio`` times it.

        Args:
            conv: Ungrouped, with zero padding, ``(B, I, H, W) -> (B, O, H', W')``.
            **options: Keyword arguments of the class.

        Raises:
            ValueError: The convolution cannot be converted.
        """
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # pyright: ignore
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode,  # pyright: ignore
            **{"device": conv.weight.device, "dtype": conv.weight.dtype, **options},
        )  # fmt: skip
        with torch.no_grad():
            if layer.dynamic and layer.convert_param:
                layer.dft_weight.copy_(layer.spectrum(conv.weight))
            else:
                layer.weight.copy_(conv.weight)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def fuse_norm(self, norm: nn.BatchNorm2d) -> FDConv:
        """Return a layer equal to ``norm(layer(x))`` in eval mode; the norm inside the attention is folded too."""
        scale, shift = norm_scale_shift(norm)
        fused = copy.deepcopy(self).requires_grad_(False)
        fused.output_scale = scale if self.output_scale is None else scale * self.output_scale
        fused.bias = nn.Parameter(shift if self.bias is None else scale * self.bias + shift, requires_grad=False)
        if self.dynamic and isinstance(fused.KSM_Global.bn, nn.BatchNorm2d):
            fused.KSM_Global.fc = fuse_conv_norm(fused.KSM_Global.fc, fused.KSM_Global.bn)
            fused.KSM_Global.bn = nn.Identity()
        return fused

    def extra_repr(self) -> str:
        """Say the sizes."""
        kind = f"kernel_num={self.kernel_num}, param_ratio={self.param_ratio}" if self.dynamic else "plain"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, {kind}"
        )


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit a checkpoint to ``model``, which may hold FDConv layers where the checkpoint has plain convolutions.

    Kernels become spectra; the gates, which a plain network has not, keep the values of ``model``. Of a detector's
    checkpoint only the backbone is read.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    state = dict(state)
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, FDConv) and layer.dynamic and layer.convert_param and prefix + "weight" in state:
            state[prefix + "dft_weight"] = layer.spectrum(state.pop(prefix + "weight"))
            own = {prefix + key: value for key, value in layer.state_dict().items()}
            gates = (prefix + "KSM_", prefix + "FBM.")
            state |= {key: value for key, value in own.items() if key.startswith(gates)}
    return state
