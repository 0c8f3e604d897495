"""Small-kernel aggregation on the CPU, in Numba.

A work item is one kernel of one sample. A vector is a stretch of a row; the sums of eight channels stay in registers
through all taps, so that a kernel is read once for eight channels. Columns beyond the border are masked, rows beyond it
left out, hence nothing is padded or copied. The gradient of the kernels keeps the sums of a row of taps instead and
goes over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic
from torch import Tensor

from dynakern.ops.dispatch import numba_vector_bytes

__all__ = ["backward_input", "backward_kernels", "forward"]


_VECTOR_BYTES = numba_vector_bytes()
_kernel = njit(cache=True, nogil=True, error_model="numpy")


class _Vectors:
    """Emits masked loads and stores of vectors of an array's numbers; positions are counted in numbers."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, arrays: tuple[int, ...]) -> None:
        self.builder, self.intp, self.flag = builder, ir.IntType(types.intp.bitwidth), ir.IntType(32)
        self.data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in arrays]
        number = self.data[0].type.pointee
        self.align = 4 if isinstance(number, ir.FloatType) else 8
        self.lanes = _VECTOR_BYTES // self.align
        self.vector = ir.VectorType(number, self.lanes)
        self.zero = ir.Constant(self.vector, None)

    def number(self, n: int) -> Any:
        return ir.Constant(self.intp, n)

    def at(self, start: Any, step: Any, index: Any) -> Any:
        """Return ``start + step * index``; step and index may be Python's numbers."""
        step, index = (self.number(n) if isinstance(n, int) else n for n in (step, index))
        return self.builder.add(start, self.builder.mul(step, index))

    def load(self, array: int, at: Any, mask: Any) -> Any:
        return self._masked("load", [self._pointer(array, at), self._align(), mask, self.zero], self.vector)

    def store(self, value: Any, array: int, at: Any, mask: Any) -> None:
        self._masked("store", [value, self._pointer(array, at), self._align(), mask], ir.VoidType())

    def _align(self) -> Any:
        return ir.Constant(self.flag, self.align)

    def _pointer(self, array: int, at: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data[array], [at]), self.vector.as_pointer())

    def _masked(self, name: str, arguments: list[Any], result: Any) -> Any:
        kind = ir.FunctionType(result, [x.type for x in arguments])
        name = f"llvm.masked.{name}.v{self.lanes}f{8 * self.align}.p0"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def inside(self, start: Any, size: Any) -> Any:
        """Return the mask of the lanes l with ``0 <= start + l < size``."""
        kind = ir.VectorType(self.flag, self.lanes)
        zero, nothing = ir.Constant(self.flag, 0), ir.Constant(kind, ir.Undefined)

        def spread(value: Any) -> Any:
            value = self.builder.insert_element(nothing, self.builder.trunc(value, self.flag), zero)
            return self.builder.shuffle_vector(value, nothing, ir.Constant(kind, [zero] * self.lanes))

        lanes = ir.Constant(kind, [ir.Constant(self.flag, j) for j in range(self.lanes)])
        return self.builder.icmp_unsigned("<", self.builder.add(lanes, spread(start)), spread(size))

    def multiply_add(self, total: Any, a: Any, b: Any) -> None:
        product = self.builder.fmul(a, b, flags=("contract",))
        self.builder.store(self.builder.fadd(self.builder.load(total), product, flags=("contract",)), total)

    def totals(self, count: int) -> list[Any]:
        places = [cgutils.alloca_once(self.builder, self.vector) for _ in range(count)]
        for place in places:
            self.builder.store(self.zero, place)
        return places

    def range(self, start: Any, stop: Any) -> Any:
        return cgutils.for_range_slice(self.builder, start, stop, self.number(1), intp=self.intp)

    def choose(self, value: Any, counts: tuple[int, ...], emit: Callable[[int], None]) -> None:
        """Emit code for each of some numbers that ``value`` may be."""
        end = self.builder.append_basic_block("end")
        switch = self.builder.switch(value, end)
        for count in counts:
            block = self.builder.append_basic_block(f"case{count}")
            switch.add_case(self.number(count), block)
            self.builder.position_at_end(block)
            emit(count)
            self.builder.branch(end)
        self.builder.position_at_end(end)


@intrinsic
def _mix(typing, channels, x, x_at, x_step, w, w_at, out, out_at, i, j, H, W, size, transposed):
    """Sum over the taps for a stretch of row i from column j on, for 1, 2, 4 or 8 channels ``x_step`` apart.

    With ``transposed`` it is the gradient of the input: x is that of the output, and tap (a, b) reaches back.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (1, 4, 6))
        channels, _, x_at, x_step, _, w_at, _, out_at, i, j, H, W, size, transposed = args
        back, plane = builder.icmp_signed("!=", transposed, v.number(0)), builder.mul(H, W)
        half = builder.lshr(size, v.number(1))
        here = v.at(j, W, i)

        def emit(count: int) -> None:
            totals, tail = v.totals(count), v.inside(j, W)
            with v.range(v.number(0), size) as (a, _):
                up = builder.select(back, builder.sub(half, a), builder.sub(a, half))
                row = builder.add(i, up)
                with builder.if_then(builder.icmp_unsigned("<", row, H)), v.range(v.number(0), size) as (b, _):
                    aside = builder.select(back, builder.sub(half, b), builder.sub(b, half))
                    column = builder.add(j, aside)
                    mask, there = v.inside(column, W), v.at(column, W, row)
                    tap = v.at(w_at, plane, v.at(b, size, a))
                    at = builder.add(tap, builder.select(back, there, here))
                    factor = v.load(1, at, builder.select(back, mask, tail))
                    for s, total in enumerate(totals):
                        place = builder.add(v.at(x_at, x_step, s), there)
                        v.multiply_add(total, v.load(0, place, mask), factor)
            for s, total in enumerate(totals):
                v.store(builder.load(total), 2, builder.add(v.at(out_at, x_step, s), here), tail)

        v.choose(channels, (1, 2, 4, 8), emit)
        return context.get_dummy_value()

    n = types.intp
    return types.void(n, x, n, n, w, n, out, *[n] * 7), codegen


@intrinsic
def _compare(typing, taps, x, x_at, dy, dy_at, step, channels, out, out_at, i, j, row, column, H, W):
    """Sum ``x dy`` over ``channels`` channels for a stretch of row i from column j on and 1, 3, 5 or 7 taps of a row.

    The pixels of x begin at ``row`` and ``column`` for the first tap, a column further for the next.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (1, 3, 7))
        taps, _, x_at, _, dy_at, step, channels, _, out_at, i, j, row, column, H, W = args
        here = v.at(j, W, i)

        def emit(count: int) -> None:
            totals, tail = v.totals(count), v.inside(j, W)
            columns = [builder.add(column, v.number(t)) for t in range(count)]
            masks = [v.inside(c, W) for c in columns]
            with builder.if_then(builder.icmp_unsigned("<", row, H)), v.range(v.number(0), channels) as (s, _):
                slope = v.load(1, builder.add(v.at(dy_at, step, s), here), tail)
                start = v.at(v.at(x_at, step, s), W, row)
                for total, c, mask in zip(totals, columns, masks, strict=True):
                    v.multiply_add(total, v.load(0, builder.add(start, c), mask), slope)
            for t, total in enumerate(totals):
                to = builder.add(v.at(out_at, builder.mul(H, W), t), here)
                v.store(builder.load(total), 2, to, tail)

        v.choose(taps, (1, 3, 5, 7), emit)
        return context.get_dummy_value()

    n = types.intp
    return types.void(n, x, n, dy, n, n, n, out, *[n] * 7), codegen


@_kernel
def _mix_all(x, w, out, shape, transposed, begin, end):
    """Do kernels begin .. end - 1 of all samples; ``shape`` is (C, kernels, H, W, size)."""
    C, kernels, H, W, size = shape
    lanes = _VECTOR_BYTES // x.itemsize
    for task in range(begin, end):
        n, q = task // kernels, task % kernels
        done, shared = 0, C // kernels
        while done < shared:
            channels = 8
            while channels > shared - done:
                channels //= 2
            at = (n * C + q + done * kernels) * H * W
            for i in range(H):
                for j in range(0, W, lanes):
                    _mix(
                        channels, x, at, kernels * H * W, w, task * size * size * H * W, out, at,
                        i, j, H, W, size, transposed,
                    )  # fmt: skip
            done += channels


@_kernel
def _compare_all(x, dy, out, shape, begin, end):
    """Do the gradients of kernels begin .. end - 1 of all samples; ``shape`` is (C, kernels, H, W, size)."""
    C, kernels, H, W, size = shape
    lanes = _VECTOR_BYTES // x.itemsize
    for task in range(begin, end):
        at = (task // kernels * C + task % kernels) * H * W
        for i in range(H):
            for j in range(0, W, lanes):
                for a in range(size):
                    b = 0
                    while b < size:
                        taps = min(7, (size - b - 1) // 2 * 2 + 1)  # the largest odd number that is left
                        to, row, column = ((task * size + a) * size + b) * H * W, i + a - size // 2, j + b - size // 2
                        step, channels = kernels * H * W, C // kernels
                        _compare(taps, x, at, dy, at, step, channels, out, to, i, j, row, column, H, W)
                        b += taps


def _run(tasks: Callable[[int, int], None], count: int, work: int) -> None:
    """Do tasks 0 .. count - 1 in ranges on PyTorch's number of threads; starting them takes 0.1 ms."""
    threads = min(torch.get_num_threads(), count) if work >= 2**23 else 1
    if threads == 1:
        tasks(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(tasks, bounds[:-1], bounds[1:]):
            pass


def _mixed(x: Tensor, w: Tensor, transposed: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (N, C, H, W), kernels, taps = x.shape, *w.shape[1:3]
    arrays = [t.detach().contiguous().view(-1).numpy() for t in (x, w, out)]
    options = *arrays, (C, kernels, H, W, math.isqrt(taps)), transposed
    _run(lambda begin, end: _mix_all(*options, begin, end), N * kernels, x.numel() * taps)
    return out


def forward(x: Tensor, w: Tensor) -> Tensor:
    """Return y ``(N, C, H, W)`` from x ``(N, C, H, W)`` and w ``(N, kernels, taps, H, W)``."""
    return _mixed(x, w, 0)


def backward_input(dy: Tensor, w: Tensor) -> Tensor:
    """Return the gradient of x from that of y."""
    return _mixed(dy, w, 1)


def backward_kernels(dy: Tensor, x: Tensor, kernels: int, taps: int) -> Tensor:
    """Return the gradient of w ``(N, kernels, taps, H, W)``."""
    N, C, H, W = x.shape
    out = x.new_empty(N, kernels, taps, H, W)
    arrays = [t.detach().contiguous().view(-1).numpy() for t in (x, dy, out)]
    options = *arrays, (C, kernels, H, W, math.isqrt(taps))
    _run(lambda begin, end: _compare_all(*options, begin, end), N * kernels, x.numel() * taps)
    return out
