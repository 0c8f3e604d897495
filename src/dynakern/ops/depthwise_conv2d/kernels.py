# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# Numba's intrinsics are called without their first parameter, and its settings are made at run time.
"""The Numba kernels of the depthwise convolution, forward and backward, which :mod:`.cpu` calls.

A group of planes (a sample's channel each), as many as a vector has numbers, is laid out with the planes side by side
and zeros around it, so that one vector instruction handles a pixel of all planes and no border needs a test. This is
done in strips of rows that stay in the cache. A tile of up to 16 pixels keeps its sums in registers through all taps.
The gradient of the input is the same with the kernel reversed. The gradient of the weight is the same with the roles
changed: the taps are the pixels of the tile, and the gradient of the output is the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from dynakern.ops.dispatch import numba_vector_bytes

__all__ = ["VECTOR_BYTES", "convolve", "correlate", "fold", "prepare", "relayout"]

VECTOR_BYTES = numba_vector_bytes()
# Sums that are kept in registers: half of the 32 of 512 bits, three quarters of the 16 of 256 bits.
_MOST = 16 if VECTOR_BYTES == 64 else 12

_kernel = njit(cache=True, nogil=True, error_model="numpy")


class _Vectors:
    """Emits loads and stores of whole vectors of an array's numbers; positions are counted in numbers."""

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

    def pointer(self, array: int, at: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data[array], [at]), self.vector.as_pointer())

    def load(self, array: int, at: Any, mask: Any = None) -> Any:
        pointer = self.pointer(array, at)
        if mask is None:
            return self.builder.load(pointer, align=self.align)
        return self._masked("load", [pointer, ir.Constant(self.flag, self.align), mask, self.zero], self.vector)

    def store(self, value: Any, array: int, at: Any, mask: Any = None) -> None:
        pointer = self.pointer(array, at)
        if mask is None:
            self.builder.store(value, pointer, align=self.align)
        else:
            self._masked("store", [value, pointer, ir.Constant(self.flag, self.align), mask], ir.VoidType())

    def _masked(self, name: str, arguments: list[Any], result: Any) -> Any:
        kind = ir.FunctionType(result, [x.type for x in arguments])
        name = f"llvm.masked.{name}.v{self.lanes}f{8 * self.align}.p0"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def first(self, count: Any) -> Any:
        """Return the mask of the first ``count`` lanes."""
        zero, nothing = ir.Constant(self.flag, 0), ir.Constant(ir.VectorType(self.intp, self.lanes), ir.Undefined)
        spread = ir.Constant(ir.VectorType(self.flag, self.lanes), [zero] * self.lanes)
        counts = self.builder.shuffle_vector(self.builder.insert_element(nothing, count, zero), nothing, spread)
        lanes = ir.Constant(counts.type, [self.number(j) for j in range(self.lanes)])
        return self.builder.icmp_signed("<", lanes, counts)

    def transpose(self, lines: list[Any]) -> list[Any]:
        """Transpose the square of numbers that as many vectors as a vector has lanes hold."""
        distance = 1
        while distance < self.lanes:
            low = [j if not j & distance else self.lanes + j - distance for j in range(self.lanes)]
            high = [j + distance if not j & distance else self.lanes + j for j in range(self.lanes)]
            kind = ir.VectorType(self.flag, self.lanes)
            masks = [ir.Constant(kind, [ir.Constant(self.flag, j) for j in mask]) for mask in (low, high)]
            for i in (i for i in range(self.lanes) if not i & distance):
                pair = lines[i], lines[i + distance]
                lines[i], lines[i + distance] = (self.builder.shuffle_vector(*pair, mask) for mask in masks)
            distance *= 2
        return lines

    def range(self, count: Any) -> Any:
        return cgutils.for_range(self.builder, count, intp=self.intp)


def _sum_taps(v: _Vectors, rows: int, columns: int, args: Any) -> None:
    """Emit the code of one tile; see :func:`_tile`. Two taps are taken at a time, so that a pixel is loaded once."""
    builder = v.builder
    x_at, x_row, _, w_at, w_row, w_column, height, width, _, add, _, out_at, out_row, out_column = args[3:]

    def step(x_k: Any, w_k: Any, taps: int) -> None:
        factors = [v.load(1, v.at(w_k, w_column, t)) for t in range(taps)]
        for line in totals:
            for u in range(columns + taps - 1):
                number = v.load(0, v.at(x_k, u, v.lanes))
                for t in range(taps):
                    if 0 <= u - t < columns:
                        product = builder.fmul(factors[t], number, flags=("contract",))
                        total = builder.fadd(builder.load(line[u - t]), product, flags=("contract",))
                        builder.store(total, line[u - t])
            x_k = builder.add(x_k, x_row)

    start = v.load(2, v.number(0))
    totals = [[cgutils.alloca_once(builder, v.vector) for _ in range(columns)] for _ in range(rows)]
    for total in (total for line in totals for total in line):
        builder.store(start, total)
    odd = builder.icmp_unsigned("!=", builder.and_(width, v.number(1)), v.number(0))
    with v.range(height) as outer:
        x_i, w_i = v.at(x_at, x_row, outer.index), v.at(w_at, w_row, outer.index)
        with v.range(builder.lshr(width, v.number(1))) as inner:
            k = builder.shl(inner.index, v.number(1))
            step(v.at(x_i, k, v.lanes), v.at(w_i, w_column, k), 2)
        with builder.if_then(odd):
            k = builder.sub(width, v.number(1))
            step(v.at(x_i, k, v.lanes), v.at(w_i, w_column, k), 1)
    add = builder.icmp_signed("!=", add, v.number(0))
    for q in range(rows):
        for r in range(columns):
            at, total = v.at(v.at(out_at, out_row, q), out_column, r), builder.load(totals[q][r])
            v.store(builder.select(add, builder.fadd(total, v.load(3, at)), total), 3, at)


@intrinsic
def _tile(
    typing, rows, columns, x, x_at, x_row, w, w_at, w_row, w_column, height, width,
    first, add, out, out_at, out_row, out_column
):  # fmt: skip
    """Sum over taps for 1 or 2 rows of pixels, at most _MOST in all, kept in registers.

    Positions count numbers, with the lanes of a vector implied:
    ``out[out_at + q out_row + r out_column] = first + sum_ik w[w_at + i w_row + k w_column]
    x[x_at + (q + i) x_row + (r + k) lanes]`` for q < rows and r < columns, summed over i < height and k < width; with
    ``add`` it is added to what was there. No loop over arrays that Numba compiles keeps such sums in registers.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (2, 5, 11, 13))
        two = builder.icmp_signed("==", args[0], ir.Constant(args[0].type, 2))
        with builder.if_else(two) as (then, otherwise):
            for branch, rows, most in ((then, 2, _MOST // 2), (otherwise, 1, _MOST)):
                with branch:
                    end = builder.append_basic_block("end")
                    switch = builder.switch(args[1], end)
                    for columns in range(1, most + 1):
                        block = builder.append_basic_block(f"tile{rows}x{columns}")
                        switch.add_case(ir.Constant(args[1].type, columns), block)
                        builder.position_at_end(block)
                        _sum_taps(v, rows, columns, args)
                        builder.branch(end)
                    builder.position_at_end(end)
        return context.get_dummy_value()

    i = types.intp
    return types.void(i, i, x, i, i, w, i, i, i, i, i, first, i, out, i, i, i), codegen


@intrinsic
def _gather_lanes(typing, x, x_at, offsets, lanes, count, out, out_at, out_step):
    """Lay ``count`` numbers of each plane, at most a vector, side by side, pixels ``out_step`` apart.

    Plane l begins at ``x_at + offsets[l]``; the planes from ``lanes`` on are zero.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, lines = _Vectors(context, builder, signature, args, (0, 5, 2)), []
        _, x_at, _, lanes, count, _, out_at, out_step = args
        for l in range(v.lanes):
            here = builder.icmp_signed("<", v.number(l), lanes)
            start = builder.add(x_at, builder.load(builder.gep(v.data[2], [v.number(l)])))
            lines.append(v.load(0, start, v.first(builder.select(here, count, v.number(0)))))
        for j, line in enumerate(v.transpose(lines)):
            with builder.if_then(builder.icmp_signed("<", v.number(j), count)):
                v.store(line, 1, v.at(out_at, out_step, j))
        return context.get_dummy_value()

    i = types.intp
    return types.void(x, i, offsets, i, i, out, i, i), codegen


@intrinsic
def _scatter_lanes(typing, x, x_at, out, out_at, offsets, lanes, count):
    """Undo :func:`_gather_lanes` for pixels side by side; x must have room for whole squares."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (0, 2, 4))
        _, x_at, _, out_at, _, lanes, count = args
        lines, mask = [v.load(0, v.at(x_at, j, v.lanes)) for j in range(v.lanes)], v.first(count)
        for l, line in enumerate(v.transpose(lines)):
            with builder.if_then(builder.icmp_signed("<", v.number(l), lanes)):
                v.store(line, 1, builder.add(out_at, builder.load(builder.gep(v.data[2], [v.number(l)]))), mask)
        return context.get_dummy_value()

    i = types.intp
    return types.void(x, i, out, i, offsets, i, i), codegen


@intrinsic
def _copy_lanes(typing, x, x_at, x_step, x_group, out, out_at, out_step, out_group, lanes, groups, count):
    """Copy ``count`` times ``groups`` runs of ``lanes`` numbers, at most a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = _Vectors(context, builder, signature, args, (0, 4))
        _, x_at, x_step, x_group, _, out_at, out_step, out_group, lanes, groups, count = args
        mask = v.first(lanes)
        with v.range(count) as outer, v.range(groups) as inner:
            at = v.at(v.at(x_at, x_step, outer.index), x_group, inner.index)
            to = v.at(v.at(out_at, out_step, outer.index), out_group, inner.index)
            v.store(v.load(0, at, mask), 1, to, mask)
        return context.get_dummy_value()

    i = types.intp
    return types.void(x, i, i, i, out, i, i, i, i, i, i), codegen


@_kernel
def _zero(x, at, count):
    for t in range(np.uint64(at), np.uint64(at + count)):
        x[t] = 0


@_kernel
def _aligned(count, like):
    """Return fresh memory and where in it ``count`` numbers begin on the border of a vector."""
    memory = np.empty(count + VECTOR_BYTES // like.itemsize, like.dtype)
    return memory, (-memory.ctypes.data // like.itemsize) % (VECTOR_BYTES // like.itemsize)


@_kernel
def _find_lanes(group, N, C, strides, offsets):
    """Set ``offsets`` to where the planes of a group begin; return how many there are."""
    first = group * offsets.shape[0]
    count = min(offsets.shape[0], N * C - first)
    for l in range(count):
        offsets[l] = (first + l) // C * strides[0] + (first + l) % C * strides[1]
    return count


@_kernel
def _run_end(offsets, start, count):
    """Return the end of the run of neighbouring channels that begins at lane ``start``."""
    end = start + 1
    while end < count and offsets[end] == offsets[end - 1] + 1:
        end += 1
    return end


@_kernel
def _fill(x, strides, offsets, count, groups, size, top, rows, H, W, border, image, at, pitch):
    """Lay out ``rows`` rows of ``pitch`` numbers from row ``top`` on, with zeros beyond the image and beside it.

    Several groups of neighbouring channels have images that lie ``size`` apart.
    """
    lanes, inside = offsets.shape[0], at + border * offsets.shape[0]
    for i in range(rows):
        for line in range(at + i * pitch, at + i * pitch + groups * size, size):
            if not 0 <= top + i < H or (count < lanes and strides[3] != 1):
                _zero(image, line, pitch)
            else:
                _zero(image, line, border * lanes)
                _zero(image, line + (border + W) * lanes, pitch - (border + W) * lanes)
    low, high = max(0, -top), min(rows, H - top)
    if strides[3] == 1:  # the pixels of a row lie side by side
        for i in range(low, high):
            for w in range(0, W, lanes):
                source, to = (top + i) * strides[2] + w, inside + i * pitch + w * lanes
                _gather_lanes(x, source, offsets, count, min(lanes, W - w), image, to, lanes)
    elif strides[1] == 1:  # channels lie side by side
        start = 0
        while start < count:
            end = _run_end(offsets, start, count)
            for i in range(low, high):
                source, to = offsets[start] + (top + i) * strides[2], inside + i * pitch + start
                _copy_lanes(x, source, strides[3], lanes, image, to, lanes, size, end - start, groups, W)
            start = end
    else:  # the pixels of a column lie side by side
        for w in range(W):
            for i in range(low, high, lanes):
                source, to = (top + i) * strides[2] + w * strides[3], inside + i * pitch + w * lanes
                _gather_lanes(x, source, offsets, count, min(lanes, high - i), image, to, pitch)


@_kernel
def _unfill(packed, at, pixels, y, y_at, strides, offsets, count):
    """Write ``pixels`` pixels of all lanes, which follow each other in ``y`` too."""
    lanes = offsets.shape[0]
    if strides[3] == 1:
        for w in range(0, pixels, lanes):
            _scatter_lanes(packed, at + w * lanes, y, y_at + w, offsets, count, min(lanes, pixels - w))
        return
    start = 0
    while start < count:
        end = _run_end(offsets, start, count)
        to = y_at + offsets[start]
        _copy_lanes(packed, at + start, lanes, lanes, y, to, strides[3], lanes, end - start, 1, pixels)
        start = end


@_kernel
def _move(image, at, size, number, distance, count):
    """Move the first ``count`` numbers of ``number`` images, ``size`` apart, by ``distance`` towards their start."""
    for start in range(at, at + number * size, size):
        for t in range(np.uint64(start), np.uint64(start + count)):
            image[t] = image[t + np.uint64(distance)]


@_kernel
def _slide(x, strides, lines, groups, h, stop, top, base, shape, image, room):
    """Complete the rows of the padded image that rows h .. stop - 1 need; return the row of it where they begin.

    There is room for ``room`` rows. Those above the first new one are kept from the rows before, which began at row
    ``base``, unless h is ``top``, where a task begins; at the end of the room they are moved to its start. ``lines``
    are the offsets of the lanes and their number.
    """
    H, W, kh, kw = shape[2], shape[3], shape[4], shape[5]
    pitch, kept = (W + kw - 1) * lines[0].shape[0], 0 if h == top else kh - 1
    size = room * pitch
    if base + stop - h + kh - 1 > room:
        _move(image[0], image[1], size, groups, base * pitch, kept * pitch)
        base = 0
    at, new = image[1] + (base + kept) * pitch, stop - h + kh - 1 - kept
    _fill(x, strides, *lines, groups, size, h - kh // 2 + kept, new, H, W, kw // 2, image[0], at, pitch)
    return base


@_kernel
def prepare(w, bias, shape, flip, out):
    """Lay the bias and the taps that can act of each class of groups side by side, reversed if ``flip``.

    Groups of the same channels make a class, a row of ``out``; ``shape`` is that of :func:`convolve`.
    """
    C, kh, kw, full_h, full_w = shape[1], shape[4], shape[5], shape[6], shape[7]
    lanes = VECTOR_BYTES // w.itemsize
    offsets = np.zeros(lanes, np.intp)
    rows, width = (1, kh * kw) if kw == full_w else (kh, kw)  # whole rows follow each other
    for group in range(out.shape[0]):
        for l in range(lanes):
            offsets[l] = (group * lanes + l) % C * full_h * full_w
            out[group, l] = bias[(group * lanes + l) % C] if bias.size else 0
        for i in range(rows):
            source = (i + (full_h - kh) // 2) * full_w + (full_w - kw) // 2
            for k in range(0, width, lanes):
                to, step = (1 + i * kw + k) * lanes, lanes
                if flip:
                    to, step = (kh * kw - i * kw - k) * lanes, -lanes
                _gather_lanes(w, source + k, offsets, lanes, min(lanes, width - k), out[group], to, step)


@_kernel
def _sum_rows(
    image, image_at, pitch, w, w_at, w_row, height, width, valid, first, add,
    rows, columns, out, out_at, out_row, out_column
):  # fmt: skip
    """Sum over taps for ``rows`` by ``columns`` pixels; see :func:`_tile`.

    ``valid`` is the range of rows and that of columns of the image that are not all zero: taps that meet only others
    are left out.
    """
    lanes, tiles, m = VECTOR_BYTES // image.itemsize, (columns + _MOST - 1) // _MOST, 0
    while m < rows:
        q = 2 if 2 * columns <= _MOST and m + 1 < rows else 1
        low, high = max(0, valid[0] - m - q + 1), min(height, valid[1] - m)
        if low < high or not add:
            for t in range(tiles):
                a, b = columns * t // tiles, columns * (t + 1) // tiles
                left = max(0, valid[2] - b + 1)
                right = max(left, min(width, valid[3] - a))
                x_at, from_w = image_at + (m + low) * pitch + (a + left) * lanes, w_at + low * w_row + left * lanes
                _tile(
                    q, b - a, image, x_at, pitch, w, from_w, w_row, lanes, high - low, right - left, first, add,
                    out, out_at + m * out_row + a * out_column, out_row, out_column,
                )  # fmt: skip
        m += q


@_kernel
def convolve(x, x_strides, kernels, y, y_strides, shape, plan, begin, end):
    """Do tasks begin .. end - 1: bands of rows of sets of groups, all bands of a set in turn.

    ``shape`` is (N, C, H, W, kh, kw, full kh, full kw), where the full kernel is the one in memory and taps beyond
    kh and kw cannot act; ``kernels`` come from :func:`prepare`. For ``plan`` see
    :class:`dynakern.ops.depthwise_conv2d.cpu.Plan`.
    """
    N, C, H, W, kh, kw = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    band, strip, room, groups = plan
    lanes = VECTOR_BYTES // x.itemsize
    pitch, width, bands = (W + kw - 1) * lanes, W * lanes, (H + band - 1) // band
    size = room * pitch
    image, (packed, packed_at) = _aligned(groups * size, x), _aligned(strip * width + lanes * lanes, x)
    sources, targets = np.zeros(lanes, np.intp), np.zeros(lanes, np.intp)
    for task in range(begin, end):
        group, top = task // bands * groups, task % bands * band
        bottom, base = min(H, top + band), 0
        count = _find_lanes(group, N, C, x_strides, sources)
        _find_lanes(group, N, C, y_strides, targets)
        direct = y_strides[3] != 1 and count == lanes and _run_end(targets, 0, lanes) == lanes
        for h in range(top, bottom, strip):
            stop = min(bottom, h + strip)
            base = _slide(x, x_strides, (sources, count), groups, h, stop, top, base, shape, image, room)
            valid = kh // 2 - h, kh // 2 - h + H, kw // 2, kw // 2 + W
            for g in range(groups):
                kernel = kernels[(group + g) % kernels.shape[0]]
                at, to = image[1] + base * pitch + g * size, h * y_strides[2] + g * lanes * y_strides[1]
                if direct:
                    _sum_rows(
                        image[0], at, pitch, kernel, lanes, kw * lanes, kh, kw, valid, kernel, 0, stop - h, W,
                        y, to + targets[0], y_strides[2], y_strides[3],
                    )  # fmt: skip
                else:
                    _sum_rows(
                        image[0], at, pitch, kernel, lanes, kw * lanes, kh, kw, valid, kernel, 0, stop - h, W,
                        packed, packed_at, width, lanes,
                    )  # fmt: skip
                    _unfill(packed, packed_at, (stop - h) * W, y, to, y_strides, targets, count)
            base += stop - h


@_kernel
def _add_pixels(dy, at, pixels, sums, total):
    """Add all pixels of each lane to ``total``, eight pixels at a time in ``sums``."""
    lanes, wide = total.shape[0], np.uint64(sums.shape[0])
    _zero(sums, 0, sums.shape[0])
    for t in range(pixels // 8):
        start = np.uint64(at + t * sums.shape[0])
        for j in range(wide):
            sums[j] += dy[start + j]
    for t in range(pixels // 8 * 8, pixels):
        for l in range(lanes):
            sums[l] += dy[at + t * lanes + l]
    for t in range(8):
        for l in range(lanes):
            total[l] += sums[t * lanes + l]


@_kernel
def correlate(x, x_strides, dy, dy_strides, shape, classes, plan, dw, db, begin, end):
    """Do tasks begin .. end - 1: the gradients of the weight and the bias by one part of the groups of a class.

    Groups whose lanes are the same channels make a class, one in every ``classes`` groups. Each of the tasks of a class
    goes over its part of them in order and leaves its sums in a row of ``dw`` (tasks, taps, lanes) and ``db``.
    """
    N, C, H, W, kh, kw = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    strip, room = plan[1], plan[2]
    lanes = VECTOR_BYTES // x.itemsize
    groups, parts, pitch = (N * C + lanes - 1) // lanes, dw.shape[0] // classes, (W + kw - 1) * lanes
    image, (dy_rows, dy_at) = _aligned(room * pitch, x), _aligned(strip * W * lanes, x)
    first, sums = np.zeros(lanes, x.dtype), np.empty(8 * lanes, x.dtype)
    sources, slopes = np.zeros(lanes, np.intp), np.zeros(lanes, np.intp)
    for task in range(begin, end):
        kind, part = task // parts, task % parts
        chain = (groups - kind + classes - 1) // classes
        _zero(dw[task], 0, dw.shape[1])
        _zero(db[task], 0, lanes)
        for link in range(chain * part // parts, chain * (part + 1) // parts):
            count, base = _find_lanes(kind + link * classes, N, C, x_strides, sources), 0
            _find_lanes(kind + link * classes, N, C, dy_strides, slopes)
            for h in range(0, H, strip):
                rows = min(strip, H - h)
                base = _slide(x, x_strides, (sources, count), 1, h, h + rows, 0, base, shape, image, room)
                _fill(dy, dy_strides, slopes, count, 1, dy_rows.size, h, rows, H, W, 0, dy_rows, dy_at, W * lanes)
                valid = kh // 2 - h, kh // 2 - h + H, kw // 2, kw // 2 + W
                _sum_rows(
                    image[0], image[1] + base * pitch, pitch, dy_rows, dy_at, W * lanes, rows, W, valid, first, 1,
                    kh, kw, dw[task], 0, kw * lanes, lanes,
                )  # fmt: skip
                _add_pixels(dy_rows, dy_at, rows * W, sums, db[task])
                base += rows


@_kernel
def fold(parts, classes, C, out):
    """Sum the parts ``(tasks, taps, lanes)`` of :func:`correlate` into ``out`` ``(C, taps)``, in a fixed order."""
    count, taps, lanes = parts.shape[0] // classes, parts.shape[1], parts.shape[2]
    for kind in range(classes):
        total = parts[kind * count].reshape(-1)
        for part in range(1, count):
            other = parts[kind * count + part].reshape(-1)
            for t in range(total.shape[0]):
                total[t] += other[t]
    out[:] = 0
    for lane in range(classes * lanes):
        line, c, l = parts[lane // lanes * count], lane % C, lane % lanes
        for t in range(taps):
            out[c, t] += line[t, l]


@_kernel
def relayout(x, x_strides, y, y_strides, shape, begin, end):
    """Copy groups begin .. end - 1 of planes ``(N, C, H, W)`` from one layout to another."""
    N, C, H, W = shape
    lanes = VECTOR_BYTES // x.itemsize
    row, at = _aligned((W + lanes) * lanes, x)
    sources, targets = np.zeros(lanes, np.intp), np.zeros(lanes, np.intp)
    for group in range(begin, end):
        count = _find_lanes(group, N, C, x_strides, sources)
        _find_lanes(group, N, C, y_strides, targets)
        for h in range(H):
            _fill(x, x_strides, sources, count, 1, row.size, h, 1, H, W, 0, row, at, W * lanes)
            _unfill(row, at, W, y, h * y_strides[2], y_strides, targets, count)
