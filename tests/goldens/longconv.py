"""Replay the long-convolution goldens: layers, block FFT, H3 layer and backbone of the authors' code.

The authors' kernels wrap around when they are longer than the input, so every layer is built with ``compat=True``.
"""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.ops import block_fft
from dynakern.sequence import H3Conv, LongConv, LongConvModel
from dynakern.sequence.long_conv import ButterflyFFT

# Names of the authors' options and ours; what is missing here only matters in training.
KERNEL = {
    "lam": "squash",
    "kernel_lam": "squash",
    "channels": "channels",
    "bidirectional": "bidirectional",
    "causal": "causal",
    "activation": "activation",
    "postact": "postact",
    "transposed": "transposed",
}
ACTIVATIONS = {None: "none", "id": "none", "identity": "none", "linear": "none", "swish": "silu"}


def _options(config, **defaults):
    options = {**defaults, **{ours: config[name] for name, ours in KERNEL.items() if name in config}}
    if config.get("use_ma_smoothing"):
        options["smooth"] = config.get("ma_window_len", 7)
        options["smooth_in"] = "frequency" if config.get("smooth_freq") else "time"
    options["activation"] = ACTIVATIONS.get(options.get("activation", "gelu"), options.get("activation", "gelu"))
    if options.get("postact", "glu") is not None:
        options["postact"] = ACTIVATIONS.get(options.get("postact", "glu"), options.get("postact", "glu"))
    return {**options, "init_std": 10.0, "compat": True}


def _rounded_dft(size):
    """The DFT matrix as the authors compute it: angles rounded to float32, which costs up to 2e-4 in the transform."""
    a = torch.arange(size)
    return torch.exp(-2j * torch.pi * a * a[:, None] / size)


def _layer(config, params, inputs):
    """The full layer: ``kernel.kernel``, optionally with a learned FFT."""
    options = _options(config, squash=0.1, channels=1, transposed=True)
    arguments = config.get("block_fft_conv_args", {})
    if config.get("block_fft_conv"):
        learned = arguments.get("learn_dft_matrices", True)
        options["butterfly"] = "replace"
        options["butterfly_shared"] = not learned or arguments.get("H", 1) == 1
        if not learned or arguments.get("learn_additive"):
            params = {key: value for key, value in params.items() if "dft_matrices" not in key}
            for size in (2, 4, 8, 16):
                for key in (f"block_fft_u.mat_{size}", f"block_fft_k.mat_{size}"):
                    params[key] = torch.view_as_real(_rounded_dft(size)) + params.get(key, torch.zeros(1, 1, 1, 1))
    layer = LongConv(config["d_model"], config.get("l_max", 1024), **options).eval()
    load_official(layer, params)
    return {"y": layer(inputs["u"], inputs.get("lengths")), "k": layer.kernel()}


def _stand_alone(config, params, inputs):
    """The stand-alone layer: 2 L taps, circular over 2 L."""
    options = _options(config, squash=0.1, channels=2, causal=False, transposed=True)
    layer = LongConv(config["H"], config["L"], **options).eval()
    return {"y": load_official(layer, params)(inputs["u"])}


def _model(config, params, inputs):
    options = _options(config, squash=0.1, channels=2, causal=False)
    model = LongConvModel(
        d_input=config["d_input"],
        num_classes=config.get("d_output", 10),
        d_model=config.get("d_model", 512),
        num_layers=config.get("n_layers", 6),
        prenorm=config.get("prenorm", False),
        l_max=config.get("L", 1024),
        **options,
    ).eval()
    return {"logits": load_official(model, params)(inputs["x"])}


def _h3(config, params, inputs):
    options = _options(config, squash=0.1)
    kernel = {name: options[name] for name in ("squash", "smooth", "smooth_in", "init_std") if name in options}
    layer = H3Conv(config["d_model"], config.get("l_max") or inputs["u"].shape[1], compat=True, **kernel).eval()
    return {"y": load_official(layer, params)(inputs["u"])}


def _block_fft(config, params, inputs):
    """Transforms named by the matrices they use: exact, learned (in place of the DFT's) or additive."""
    x, outputs = torch.view_as_complex(inputs["x"].contiguous()), {}
    points = 1 << (config["N"] - 1).bit_length()  # theirs pads to a power of two, but divides by N
    dft = {size: _rounded_dft(size) for size in (2, 4, 8, 16)}
    transforms = {"exact": lambda inverse: block_fft(x, n=points, matrices=dft, inverse=inverse)}
    for name in sorted({key.partition(".")[0] for key in params if "." in key}):
        state = {key.partition(".")[2]: value for key, value in params.items() if key.startswith(f"{name}.")}
        if "add" in name:
            state = {f"mat_{size}": state[f"mat_{size}"] + torch.view_as_real(dft[size]) for size in dft}
        fft = ButterflyFFT(state["mat_2"].shape[0]).eval()
        load_official(fft, state)
        transforms[name] = lambda inverse, fft=fft: fft(x, points, inverse=inverse)
    for name, transform in transforms.items():
        outputs[f"{name}.fft"] = torch.view_as_real(transform(False).resolve_conj())
        outputs[f"{name}.ifft"] = torch.view_as_real(transform(True).resolve_conj()) * (points / config["N"])
    return outputs


@torch.no_grad()
def replay(case, config, params, inputs):
    """Build what the file is about, told by its keys, and run it."""
    if "N" in config:
        return _block_fft(config, params, inputs)
    if "q_proj.weight" in params:
        return _h3(config, params, inputs)
    if "encoder.weight" in params:
        return _model(config, params, inputs)
    if "kernel.kernel" in params:
        return _layer(config, params, inputs)
    return _stand_alone(config, params, inputs)


def tolerance(key):
    """As the folder's README says: 2e-4 absolute for the block FFT."""
    return (0.0, 0.0, 2e-4) if "fft" in key else (1e-4, 1e-5, 0.0)
