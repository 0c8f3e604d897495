"""The only timers and meters of the library: interleaved times, peak memory, FLOPs, parameters, environment."""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Timing",
    "count_flops",
    "count_parameters",
    "describe_environment",
    "is_counting_flops",
    "peak_memory",
    "time_interleaved",
]


@dataclass(frozen=True)
class Timing:
    """Times of one function in seconds: quartiles over the counted runs."""

    median: float
    lower: float
    upper: float
    runs: int


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1, synchronize: bool | None = None
) -> dict[str, Timing]:
    """Time several functions in turn (A B A B ...), so that a drift of the machine's speed hits all alike.

    Args:
        functions: Label to a function without arguments.
        repeats: Counted runs of each.
        warmup: Runs of each that are not counted (compilation, caches).
        synchronize: Wait for the GPU after each run; by default when CUDA is in use.

    Returns:
        Label to its :class:`Timing`. Quote ratios of medians, not absolute times.
    """
    import torch

    wait = torch.cuda.is_available() and torch.cuda.is_initialized() if synchronize is None else synchronize
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    for run in range(warmup + repeats):
        for label, function in functions.items():
            start = time.perf_counter()
            function()
            if wait:
                torch.cuda.synchronize()
            if run >= warmup:
                seconds[label].append(time.perf_counter() - start)
    return {label: _quartiles(values) for label, values in seconds.items()}


def _quartiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def peak_memory(function: Callable[[], object], *, device: str = "cpu") -> float:
    """Return how many MB (10^6 bytes) ``function`` needed at its peak beyond what was held before it.

    On a CPU this is the resident size of the whole process, as the system counts it (the kernel's high-water mark where
    there is one, else sampled every millisecond); on a GPU what PyTorch's allocator handed out. Run the function once
    before, so that compilation and caches are not counted.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    _return_free_memory()
    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the high-water mark VmHWM (Linux)
    except OSError:
        return _sampled_peak(function)
    before = _proc_status("VmRSS")
    function()
    return max(0.0, _proc_status("VmHWM") - before) / 1e6


def _return_free_memory() -> None:
    """Give freed memory back to the system (glibc), so that reusing it shows in the resident size."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _proc_status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * float(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _sampled_peak(function: Callable[[], object]) -> float:
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return (max(peak, process.memory_info().rss) - before) / 1e6


_counting_flops = False


def is_counting_flops() -> bool:
    """Whether a FLOP count runs now: operators then take their registered engine whatever the size of the input."""
    return _counting_flops


@contextlib.contextmanager
def _counting() -> Iterator[None]:
    global _counting_flops
    _counting_flops, before = True, _counting_flops
    try:
        yield
    finally:
        _counting_flops = before


def count_flops(function: Callable[[], object]) -> int | None:
    """Return the floating-point operations of ``function``: matrix products, convolutions, FFTs and our operators.

    A multiply-add counts as two. Elementwise work is not counted, as is usual. Returns None, never 0, when nothing
    countable ran or when an operator of this library without a formula ran.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    aten = torch.ops.aten
    unknown: set[str] = set()
    opaque = {aten._cudnn_rnn, aten.miopen_rnn}  # whole recurrent networks whose work is not counted

    class FindUnknown(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ours = func.namespace == "dynakern" and func._overloadpacket not in flop_registry
            if ours or func._overloadpacket in opaque:
                unknown.add(str(func))
            return func(*args, **(kwargs or {}))

    formulas = dict.fromkeys((aten._fft_r2c, aten._fft_c2r, aten._fft_c2c), _fft_flops)
    counter = FlopCounterMode(display=False, custom_mapping={**formulas, aten.mkldnn_rnn_layer: _recurrent_flops})
    with _counting(), torch.no_grad(), counter, FindUnknown():
        function()
    total = counter.get_total_flops()
    return None if unknown or total == 0 else int(total)


def _recurrent_flops(x_shape: Any, input_weight: Any, hidden_weight: Any, *args: Any, **kwargs: Any) -> int:
    """Count the matrix products of a fused LSTM layer: input ``(L, B, P)``, weights ``(4 D, P)`` and ``(4 D, D)``."""
    return 2 * x_shape[0] * x_shape[1] * input_weight[0] * (input_weight[1] + hidden_weight[1])


def _fft_flops(x_shape: Any, dim: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count an FFT: 5 n log2 n for complex to complex, half of that when one side is real (the radix-2 count)."""
    import math

    points, half = math.prod(x_shape), 1.0
    length = 1
    for axis in dim:
        length *= max(x_shape[axis], out_shape[axis])
    if tuple(x_shape) != tuple(out_shape):  # real to complex or back: one side has n // 2 + 1 entries
        last = dim[-1]
        points = points // max(1, x_shape[last]) * max(x_shape[last], out_shape[last])
        half = 0.5
    return round(half * 5 * points * math.log2(max(length, 2)))


def count_parameters(module: nn.Module) -> int:
    """Return how many trainable numbers ``module`` holds."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def describe_environment() -> dict[str, str]:
    """Return what a reader needs to judge a measurement: versions, processor, threads, GPU."""
    import importlib.metadata

    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    packages = ("dynakern", "torch", "numpy", "numba", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }
