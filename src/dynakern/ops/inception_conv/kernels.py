# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# Numba's intrinsics are called without their first parameter, and its settings are made at run time.
"""The Numba kernels of the inception convolution, which :mod:`.cpu` calls; it explains lines, places and vectors.

Of the two directions of a stencil, p is the one in which a line runs, q the other: columns of a stencil are its q in
planes, where a vector lies in a row, and its p channels last. Positions are counted in numbers. Tensors come as the
addresses of their first numbers, with an array ``like`` of their dtype: to make arrays of them would take longer than
to convolve a small image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from dynakern.ops.dispatch import numba_vector_bytes

__all__ = ["VECTOR_BYTES", "convolve_last", "convolve_planes", "correlate_last", "correlate_planes", "fold"]

VECTOR_BYTES = numba_vector_bytes()
_kernel = njit(cache=True, nogil=True, error_model="numpy")


class _Vectors:
    """Emits masked loads and stores of vectors of an array's numbers."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, arrays: tuple[int, ...]) -> None:
        self.builder, self.intp, self.flag = builder, ir.IntType(types.intp.bitwidth), ir.IntType(32)
        self.data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in arrays]
        number = self.data[0].type.pointee
        self.align = 4 if isinstance(number, ir.FloatType) else 8
        self.lanes = VECTOR_BYTES // self.align
        self.vector = ir.VectorType(number, self.lanes)
        self.zero = ir.Constant(self.vector, None)

    def number(self, n: int) -> Any:
        return ir.Constant(self.intp, n)

    def at(self, start: Any, step: Any, index: Any) -> Any:
        """Return ``start + step * index``; step and index may be Python's numbers."""
        step, index = (self.number(n) if isinstance(n, int) else n for n in (step, index))
        return self.builder.add(start, self.builder.mul(step, index))

    def load(self, array: int, at: Any, mask: Any = None) -> Any:
        if mask is None:
            return self.builder.load(self._pointer(array, at), align=self.align)
        return self._masked("load", [self._pointer(array, at), self._align(), mask, self.zero], self.vector)

    def store(self, value: Any, array: int, at: Any, mask: Any = None) -> None:
        if mask is None:
            self.builder.store(value, self._pointer(array, at), align=self.align)
        else:
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

    def totals(self, count: int, start: Any) -> list[Any]:
        places = [cgutils.alloca_once(self.builder, self.vector) for _ in range(count)]
        for place in places:
            self.builder.store(start, place)
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
def _tile(
    typing, places, x, x_at, x_p, x_q, taps, taps_at, taps_p, taps_q, p, p_end, q, q_end,
    mask_at, mask_q, size, y, y_at, y_p, store_at
):  # fmt: skip
    """Sum over the taps p .. p_end - 1 and q .. q_end - 1 for 1, 2, 4 or 8 places of a line, kept in registers.

    At ``taps_at`` is what the sums start with, a vector later is tap (0, 0), from there tap (p, q) at ``p taps_p + q
    taps_q``.
    Place r and tap (p, q) meet at ``x_at + (r + p) x_p + q x_q``. A lane l of x counts if ``mask_at + q mask_q + l`` is
    below ``size``, one of y if ``store_at + l`` is.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (1, 5, 16))
        x_at, x_p, x_q = args[2:5]
        taps_at, taps_p, taps_q, p, p_end, q, q_end, mask_at, mask_q, size = args[6:16]
        y_at, y_p, store_at = args[17:]

        def emit(count: int) -> None:
            totals = v.totals(count, v.load(1, taps_at))
            with v.range(q, q_end) as (b, _):
                mask = v.inside(v.at(mask_at, mask_q, b), size)
                x_b, taps_b = v.at(x_at, x_q, b), v.at(v.at(taps_at, v.lanes, 1), taps_q, b)
                with v.range(p, p_end) as (a, _):
                    factor, start = v.load(1, v.at(taps_b, taps_p, a)), v.at(x_b, x_p, a)
                    for r, total in enumerate(totals):
                        v.multiply_add(total, v.load(0, v.at(start, x_p, r), mask), factor)
            mask = v.inside(store_at, size)
            for r, total in enumerate(totals):
                v.store(builder.load(total), 2, v.at(y_at, y_p, r), mask)

        v.choose(args[0], (1, 2, 4, 8), emit)
        return context.get_dummy_value()

    n = types.intp
    return types.void(n, x, n, n, n, taps, *[n] * 10, y, n, n, n), codegen


@intrinsic
def _dot(typing, taps, x, x_at, x_q, x_p, dy, dy_at, dy_p, places, x_mask_at, mask_q, size, dy_mask_at, out, out_at):
    """Add ``sum_r x[x_at + r x_p + t x_q + l] dy[dy_at + r dy_p + l]`` over r < places to ``out`` for 1 to 4 taps t.

    Lane l counts if ``x_mask_at + t mask_q + l`` and ``dy_mask_at + l`` are below ``size``. Taps are a vector apart in
    ``out``. Every other place, or every fourth for one tap, has sums of its own.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (1, 5, 13))
        x_at, x_q, x_p = args[2:5]
        dy_at, dy_p, places, x_mask_at, mask_q, size, dy_mask_at = args[6:13]
        out_at = args[14]

        def emit(count: int) -> None:
            here, chains = v.inside(dy_mask_at, size), 4 if count == 1 else 2
            masks = [v.inside(v.at(x_mask_at, mask_q, t), size) for t in range(count)]
            totals = [v.totals(count, v.zero) for _ in range(chains)]

            def step(place: Any, sums: list[Any]) -> None:
                slope = v.load(1, v.at(dy_at, dy_p, place), here)
                start = v.at(x_at, x_p, place)
                for t, total in enumerate(sums):
                    v.multiply_add(total, v.load(0, v.at(start, x_q, t), masks[t]), slope)

            rounds = builder.udiv(places, v.number(chains))
            with v.range(v.number(0), rounds) as (k, _):
                for i, sums in enumerate(totals):
                    step(v.at(v.number(i), chains, k), sums)
            with v.range(v.at(v.number(0), chains, rounds), places) as (k, _):
                step(k, totals[0])
            for t in range(count):
                to = v.at(out_at, v.lanes, t)
                total = v.load(2, to)
                for sums in totals:
                    total = builder.fadd(total, builder.load(sums[t]))
                v.store(total, 2, to)

        v.choose(args[0], (1, 2, 3, 4), emit)
        return context.get_dummy_value()

    n = types.intp
    return types.void(n, x, n, n, n, dy, *[n] * 7, out, n), codegen


@intrinsic
def _pointer(typing, address, like):
    """Return the pointer to numbers of the dtype of ``like`` at an address."""
    kind = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.intp, like), codegen


@_kernel
def _view(address, size, like):
    """Return the array of ``size`` numbers at an address; empty if that is 0."""
    return carray(_pointer(address, like), (size if address else 0,))


@_kernel
def _images(address, shape, strides, like):
    """Return the memory of images from their first number to their last."""
    size = 1
    for axis in range(4):
        size += (shape[axis] - 1) * strides[axis]
    return _view(address, size, like)


@_kernel
def _stencils(addresses, sizes, g, like):
    """Return the arrays of the three weights."""
    return (
        _view(addresses[0], g * sizes[0][0] * sizes[0][1], like),
        _view(addresses[1], g * sizes[1][0] * sizes[1][1], like),
        _view(addresses[2], g * sizes[2][0] * sizes[2][1], like),
    )


@_kernel
def _biases(addresses, g, like):
    return _view(addresses[0], g, like), _view(addresses[1], g, like), _view(addresses[2], g, like)


@_kernel
def _copy_row(x, x_at, x_step, y, y_at, y_step, channels, pixels):
    for w in range(pixels):
        source, to = np.uint64(x_at + w * x_step), np.uint64(y_at + w * y_step)
        for c in range(np.uint64(channels)):
            y[to + c] = x[source + c]


@_kernel
def _convolve_line(
    x, x_at, x_p, x_q, table, at, taps_p, taps_q, places, kp, q, q_end, mask_at, mask_q, size, y, y_at, y_p, store_at
):
    """Do all places of a line; see :func:`_tile`. The first place and tap (kp // 2, 0) meet at ``x_at``."""
    half, r = kp // 2, 0
    start = x_at - half * x_p
    while r < places:
        count, p, p_end = 1, max(0, half - r), min(kp, places + half - r)
        whole = places - half - r  # places from here on that have all taps
        if p == 0 and whole >= 2:
            count = 8 if whole >= 8 else 4 if whole >= 4 else 2
        _tile(
            count, x, start + r * x_p, x_p, x_q, table, at, taps_p, taps_q, p, p_end, q, q_end,
            mask_at, mask_q, size, y, y_at + r * y_p, y_p, store_at,
        )  # fmt: skip
        r += count


@_kernel
def _spread(table, weight, bias, c, taps, flip):
    """Put the bias and the taps of channel c, each in all lanes of a vector, in ``table``; reversed if ``flip``."""
    lanes = np.uint64(VECTOR_BYTES // table.itemsize)
    for t in range(np.uint64(1 + taps)):
        if t == 0:
            value = bias[c] if bias.size else table.dtype.type(0)
        else:
            value = weight[c * taps + (taps - t if flip else t - 1)]
        for l in range(lanes):
            table[t * lanes + l] = value


@_kernel
def _lay_out(table, at, weight, bias, c, count, taps, flip):
    """Put the bias and the taps of ``count`` channels from c on into the lanes of vectors; further lanes are zero."""
    lanes = VECTOR_BYTES // table.itemsize
    for l in range(lanes):
        table[at + l] = bias[c + l] if l < count and bias.size else 0
        for t in range(taps):
            source = taps - 1 - t if flip else t
            table[at + (1 + t) * lanes + l] = weight[(c + l) * taps + source] if l < count else 0


@_kernel
def convolve_planes(like, x, x_strides, y, y_strides, weights, biases, sizes, shape, flip, begin, end):
    """Do planes begin .. end - 1 of those that are convolved, 3 g of each sample.

    ``shape`` is (N, C, H, W, g); weights, biases (0 for none) and sizes have an entry a branch.
    """
    _, C, H, W, g = shape
    x, y = _images(x, shape, x_strides, like), _images(y, shape, y_strides, like)
    weights, biases = _stencils(weights, sizes, g, like), _biases(biases, g, like)
    lanes = VECTOR_BYTES // x.itemsize
    most = max(sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1], sizes[2][0] * sizes[2][1])
    table = np.empty((1 + most) * lanes, x.dtype)
    for task in range(begin, end):
        n, k = task // (3 * g), task % (3 * g)
        branch, c = k // g, C - 3 * g + k
        kh, kw = sizes[branch]
        _spread(table, weights[branch], biases[branch], k % g, kh * kw, flip)
        x_at, y_at = n * x_strides[0] + c * x_strides[1], n * y_strides[0] + c * y_strides[1]
        for w in range(0, W, lanes):
            left = w - kw // 2
            _convolve_line(
                x, x_at + left, x_strides[2], 1, table, 0, kw * lanes, lanes, H, kh,
                max(0, 1 - left - lanes), min(kw, W - left), left, 1, W, y, y_at + w, y_strides[2], w,
            )  # fmt: skip


@_kernel
def convolve_last(like, x, x_strides, y, y_strides, weights, biases, sizes, shape, flip, begin, end):
    """Do rows begin .. end - 1 of all samples, channels that pass included; see :func:`convolve_planes`."""
    _, C, H, W, g = shape
    x, y = _images(x, shape, x_strides, like), _images(y, shape, y_strides, like)
    weights, biases = _stencils(weights, sizes, g, like), _biases(biases, g, like)
    lanes = VECTOR_BYTES // x.itemsize
    blocks = (g + lanes - 1) // lanes
    taps0, taps1, taps2 = sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1], sizes[2][0] * sizes[2][1]
    starts = (0, blocks * (1 + taps0) * lanes, blocks * (2 + taps0 + taps1) * lanes)
    table = np.empty(blocks * (3 + taps0 + taps1 + taps2) * lanes, x.dtype)
    for branch in range(3):
        kh, kw = sizes[branch]
        for block in range(blocks):
            at, c = starts[branch] + block * (1 + kh * kw) * lanes, block * lanes
            _lay_out(table, at, weights[branch], biases[branch], c, min(lanes, g - c), kh * kw, flip)
    for task in range(begin, end):
        n, h = task // H, task % H
        x_at, y_at = n * x_strides[0] + h * x_strides[2], n * y_strides[0] + h * y_strides[2]
        _copy_row(x, x_at, x_strides[3], y, y_at, y_strides[3], C - 3 * g, W)
        for branch in range(3):
            kh, kw = sizes[branch]
            up = h - kh // 2
            for block in range(blocks):
                c, at = block * lanes, starts[branch] + block * (1 + kh * kw) * lanes
                first = C - (3 - branch) * g + c
                _convolve_line(
                    x, x_at + first - kh // 2 * x_strides[2], x_strides[3], x_strides[2], table, at, lanes, kw * lanes,
                    W, kw, max(0, -up), min(kh, H - up), c, 0, g, y, y_at + first, y_strides[3], c,
                )  # fmt: skip


@_kernel
def _correlate_line(
    x,
    x_at,
    x_p,
    x_q,
    dy,
    dy_at,
    dy_p,
    places,
    kp,
    q,
    q_end,
    mask_at,
    mask_q,
    size,
    dy_mask_at,
    sums,
    at,
    sums_p,
    sums_q,
):
    """Add the products of a line with all taps to ``sums``; for positions see :func:`_convolve_line`."""
    half = kp // 2
    for p in range(kp):
        low, high = max(0, half - p), min(places, places + half - p)
        b = q
        while low < high and b < q_end:
            count = min(4, q_end - b) if sums_q == VECTOR_BYTES // x.itemsize else 1
            _dot(
                count, x, x_at + (low + p - half) * x_p + b * x_q, x_q, x_p, dy, dy_at + low * dy_p, dy_p, high - low,
                mask_at + b * mask_q, mask_q, size, dy_mask_at, sums, at + p * sums_p + b * sums_q,
            )  # fmt: skip
            b += count


@_kernel
def _zero(x, at, count):
    for t in range(np.uint64(at), np.uint64(at + count)):
        x[t] = 0


@_kernel
def correlate_planes(like, x, x_strides, dy, dy_strides, dw, db, sizes, shape, begin, end):
    """Do channels begin .. end - 1 of the 3 g that are convolved: write the gradients of their weights and biases."""
    N, C, H, W, g = shape
    x, dy = _images(x, shape, x_strides, like), _images(dy, shape, dy_strides, like)
    dw, db = _stencils(dw, sizes, g, like), _biases(db, g, like)
    lanes = VECTOR_BYTES // x.itemsize
    most = max(sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1], sizes[2][0] * sizes[2][1])
    sums, ones = np.empty((1 + most) * lanes, x.dtype), np.ones(lanes, x.dtype)
    for task in range(begin, end):
        branch, c = task // g, C - 3 * g + task
        kh, kw = sizes[branch]
        _zero(sums, 0, (1 + kh * kw) * lanes)
        for n in range(N):
            x_at, dy_at = n * x_strides[0] + c * x_strides[1], n * dy_strides[0] + c * dy_strides[1]
            for w in range(0, W, lanes):
                left = w - kw // 2
                _dot(1, ones, 0, 0, 0, dy, dy_at + w, dy_strides[2], H, 0, 0, W, w, sums, 0)
                _correlate_line(
                    x, x_at + left, x_strides[2], 1, dy, dy_at + w, dy_strides[2], H, kh,
                    max(0, 1 - left - lanes), min(kw, W - left), left, 1, W, w, sums, lanes, kw * lanes, lanes,
                )  # fmt: skip
        for t in range(1 + kh * kw):
            total = sums[t * lanes]
            for l in range(1, lanes):
                total += sums[t * lanes + l]
            if t == 0:
                db[branch][task % g] = total
            else:
                dw[branch][task % g * kh * kw + t - 1] = total


@_kernel
def correlate_last(like, x, x_strides, dy, dy_strides, parts, sizes, shape, begin, end):
    """Do tasks begin .. end - 1, a block of channels of a sample each: leave the sums of its branches in ``parts``.

    ``parts`` is (tasks, vectors), where the vectors are, for each branch, that of the bias and those of the taps.
    """
    _, C, H, W, g = shape
    x, dy = _images(x, shape, x_strides, like), _images(dy, shape, dy_strides, like)
    lanes = VECTOR_BYTES // x.itemsize
    blocks, ones = (g + lanes - 1) // lanes, np.ones(lanes, x.dtype)
    for task in range(begin, end):
        n, first, sums, at = task // blocks, task % blocks * lanes, parts[task], 0
        _zero(sums, 0, sums.size)
        for branch in range(3):
            kh, kw = sizes[branch]
            c = C - (3 - branch) * g + first
            for h in range(H):
                x_at = n * x_strides[0] + (h - kh // 2) * x_strides[2] + c * x_strides[1]
                dy_at, up = n * dy_strides[0] + h * dy_strides[2] + c * dy_strides[1], h - kh // 2
                _dot(1, ones, 0, 0, 0, dy, dy_at, dy_strides[3], W, 0, 0, g, first, sums, at)
                _correlate_line(
                    x, x_at, x_strides[3], x_strides[2], dy, dy_at, dy_strides[3], W, kw,
                    max(0, -up), min(kh, H - up), first, 0, g, first, sums, at + lanes, lanes, kw * lanes,
                )  # fmt: skip
            at += (1 + kh * kw) * lanes


@_kernel
def fold(parts, N, g, dw, db, sizes):
    """Add the sums of all samples that :func:`correlate_last` left, in their order."""
    dw, db = _stencils(dw, sizes, g, parts), _biases(db, g, parts)
    blocks, at = parts.shape[0] // N, 0
    lanes = VECTOR_BYTES // parts.itemsize
    for branch in range(3):
        taps = sizes[branch][0] * sizes[branch][1]
        for c in range(g):
            for t in range(1 + taps):
                total = parts[c // lanes, at + t * lanes + c % lanes]
                for n in range(1, N):
                    total += parts[n * blocks + c // lanes, at + t * lanes + c % lanes]
                if t == 0:
                    db[branch][c] = total
                else:
                    dw[branch][c * taps + t - 1] = total
        at += (1 + taps) * lanes
