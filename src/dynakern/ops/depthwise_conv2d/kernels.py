# pyright: reportCallIssue=false
# Numba's intrinsics are called without their first parameter, which Python's types do not know.
"""The Numba kernels of the depthwise convolution, forward and backward, which :mod:`.cpu` calls.

A work item is one group of lanes, as many planes (a sample's channel each) as a vector has numbers, and a band of rows.
Its padded image is laid out with the lanes side by side, so that one vector instruction handles a pixel of all planes
and no border needs a test. A tile of up to 16 pixels keeps its sums in registers through all taps of the kernel. The
gradient of the weight is the same tile with the roles changed: a row of taps keeps its sums in registers while the
gradient of the output is the kernel that slides over the image.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.extending import intrinsic

__all__ = ["VECTOR_BYTES", "convolve", "correlate", "fold"]


def _has_wide_vectors() -> bool:
    """Whether Numba compiles for a processor with vectors of 512 bits."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return config.CPU_NAME in (None, "host") and llvm.get_host_cpu_features().get("avx512f", False)


# Sums that are kept in registers: half of the 32 of 512 bits, three quarters of the 16 of 256 bits.
VECTOR_BYTES, _MOST = (64, 16) if _has_wide_vectors() else (32, 12)
_BLOCK_BYTES = 40_000  # of a block of rows that correlate() goes over again for each tap: the first-level cache

_kernel = njit(cache=True, nogil=True, error_model="numpy")


def _pointer(builder: Any, base: Any, at: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(base, [at]), vector.as_pointer())


def _tile(rows: int, columns: int, add: bool) -> Any:
    """Return a compiled sum over taps for ``rows`` by ``columns`` pixels, kept in registers.

    In flat elements, with the lanes of a vector implied,
    ``out[out_at + q out_row + r out_column] = first[first_at] + sum_ik w[w_at + i w_row + k w_column]
    x[x_at + (q + i) x_row + (r + k) lanes]`` over i < height and k < width; with ``add`` it is added to out instead.
    """

    @intrinsic
    def tile(
        typing, x, x_at, x_row, w, w_at, w_row, w_column, height, width, first, first_at, out, out_at, out_row, out_col
    ):
        lanes = 8 * VECTOR_BYTES // x.dtype.bitwidth
        align = x.dtype.bitwidth // 8

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 9, 11)]
            x, w, first, out = base
            _, x_at, x_row, _, w_at, w_row, w_column, height, width, _, first_at, _, out_at, out_row, out_col = args
            vector, intp = ir.VectorType(x.type.pointee, lanes), x_at.type

            def load(base: Any, at: Any) -> Any:
                return builder.load(_pointer(builder, base, at, vector), align=align)

            def constant(number: int) -> Any:
                return ir.Constant(intp, number)

            start = ir.Constant(vector, None) if add else load(first, first_at)
            totals = [[cgutils.alloca_once(builder, vector) for _ in range(columns)] for _ in range(rows)]
            for line in totals:
                for total in line:
                    builder.store(start, total)

            def accumulate(total: Any, factor: Any, number: Any) -> None:
                product = builder.fmul(factor, number, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

            def step(x_k: Any, w_k: Any, taps: int) -> None:
                factors = [load(w, builder.add(w_k, builder.mul(w_column, constant(t)))) for t in range(taps)]
                for line in totals:
                    for u in range(columns + taps - 1):
                        number = load(x, builder.add(x_k, constant(u * lanes)))
                        for t in range(taps):
                            if 0 <= u - t < columns:
                                accumulate(line[u - t], factors[t], number)
                    x_k = builder.add(x_k, x_row)

            pairs = builder.lshr(width, constant(1))
            odd = builder.icmp_unsigned("!=", builder.and_(width, constant(1)), constant(0))
            last = builder.sub(width, constant(1))
            with cgutils.for_range(builder, height, intp=intp) as rows_loop:
                x_i = builder.add(x_at, builder.mul(rows_loop.index, x_row))
                w_i = builder.add(w_at, builder.mul(rows_loop.index, w_row))
                with cgutils.for_range(builder, pairs, intp=intp) as loop:
                    k = builder.shl(loop.index, constant(1))
                    x_k = builder.add(x_i, builder.mul(k, constant(lanes)))
                    step(x_k, builder.add(w_i, builder.mul(k, w_column)), 2)
                with builder.if_then(odd):
                    x_k = builder.add(x_i, builder.mul(last, constant(lanes)))
                    step(x_k, builder.add(w_i, builder.mul(last, w_column)), 1)
            for q in range(rows):
                line = builder.add(out_at, builder.mul(out_row, constant(q)))
                for r in range(columns):
                    target = _pointer(builder, out, builder.add(line, builder.mul(out_col, constant(r))), vector)
                    value = builder.load(totals[q][r])
                    if add:
                        value = builder.fadd(value, builder.load(target, align=align))
                    builder.store(value, target, align=align)
            return context.get_dummy_value()

        index = types.intp
        parameters = (x, index, index, w, *[index] * 5, first, index, out, index, index, index)
        return types.void(*parameters), codegen

    return tile


def _transpose(builder: Any, lines: list[Any]) -> list[Any]:
    """Transpose the square of numbers that as many vectors as a vector has lanes hold."""
    lanes, index = len(lines), ir.IntType(32)
    distance = 1
    while distance < lanes:
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        masks = [ir.Constant(ir.VectorType(index, lanes), [ir.Constant(index, j) for j in m]) for m in (low, high)]
        for i in range(lanes):
            if not i & distance:
                pair = lines[i], lines[i + distance]
                lines[i], lines[i + distance] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        distance *= 2
    return lines


def _first(builder: Any, count: Any, lanes: int) -> Any:
    """Return a mask of the first ``count`` lanes."""
    nothing = ir.Constant(ir.VectorType(count.type, lanes), ir.Undefined)
    zero = ir.Constant(ir.IntType(32), 0)
    spread = ir.Constant(ir.VectorType(zero.type, lanes), [zero] * lanes)
    counts = builder.shuffle_vector(builder.insert_element(nothing, count, zero), nothing, spread)
    numbers = ir.Constant(counts.type, [ir.Constant(count.type, j) for j in range(lanes)])
    return builder.icmp_signed("<", numbers, counts)


def _masked(builder: Any, name: str, vector: Any, arguments: list[Any], result: Any) -> Any:
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    kind = ir.FunctionType(result, [x.type for x in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.{name}.{suffix}.p0")
    return builder.call(function, arguments)


@intrinsic
def _gather_lanes(typing, x, x_at, offsets, lanes, count, out, out_at, out_step):
    """Lay ``count`` <= lanes numbers of each plane side by side: ``out[out_at + j out_step + l] = x[.. + j]``.

    Plane l begins at ``x_at + offsets[l]``; the planes from ``lanes`` on are zero, and so are the numbers from
    ``count`` on, which are not stored if ``out_step`` is larger than a vector.
    """
    width, align = 8 * VECTOR_BYTES // x.dtype.bitwidth, x.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, offsets, out = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 5))
        _, x_at, _, lanes, count, _, out_at, out_step = args
        vector, intp = ir.VectorType(x.type.pointee, width), x_at.type
        lines, nothing = [], ir.Constant(vector, None)
        for l in range(width):
            here = builder.icmp_signed("<", ir.Constant(intp, l), lanes)
            mask = _first(builder, builder.select(here, count, ir.Constant(intp, 0)), width)
            start = builder.add(x_at, builder.load(builder.gep(offsets, [ir.Constant(intp, l)])))
            arguments = [_pointer(builder, x, start, vector), ir.Constant(ir.IntType(32), align), mask, nothing]
            lines.append(_masked(builder, "load", vector, arguments, vector))
        for j, line in enumerate(_transpose(builder, lines)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(intp, j), count)):
                at = builder.add(out_at, builder.mul(out_step, ir.Constant(intp, j)))
                builder.store(line, _pointer(builder, out, at, vector), align=align)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, offsets, index, index, out, index, index), codegen


@intrinsic
def _scatter_lanes(typing, x, x_at, out, out_at, offsets, lanes, count):
    """Undo :func:`_gather_lanes` for vectors that follow each other; x must have room for whole squares."""
    width, align = 8 * VECTOR_BYTES // x.dtype.bitwidth, x.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, out, offsets = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 4))
        _, x_at, _, out_at, _, lanes, count = args
        vector, intp = ir.VectorType(x.type.pointee, width), x_at.type
        starts = [builder.add(x_at, ir.Constant(intp, j * width)) for j in range(width)]
        lines = [builder.load(_pointer(builder, x, start, vector), align=align) for start in starts]
        mask = _first(builder, count, width)
        for l, line in enumerate(_transpose(builder, lines)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(intp, l), lanes)):
                at = builder.add(out_at, builder.load(builder.gep(offsets, [ir.Constant(intp, l)])))
                arguments = [line, _pointer(builder, out, at, vector), ir.Constant(ir.IntType(32), align), mask]
                _masked(builder, "store", vector, arguments, ir.VoidType())
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, out, index, offsets, index, index), codegen


@intrinsic
def _copy_lanes(typing, x, x_at, x_step, out, out_at, out_step, lanes, count):
    """Copy ``count`` runs of ``lanes`` numbers, at most a vector, ``x_step`` and ``out_step`` apart."""
    width, align = 8 * VECTOR_BYTES // x.dtype.bitwidth, x.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, out = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3))
        _, x_at, x_step, _, out_at, out_step, lanes, count = args
        vector, intp = ir.VectorType(x.type.pointee, width), x_at.type
        mask, where, nothing = _first(builder, lanes, width), ir.Constant(ir.IntType(32), align), ir.Constant(vector, None)
        with cgutils.for_range(builder, count, intp=intp) as loop:
            source = _pointer(builder, x, builder.add(x_at, builder.mul(x_step, loop.index)), vector)
            target = _pointer(builder, out, builder.add(out_at, builder.mul(out_step, loop.index)), vector)
            value = _masked(builder, "load", vector, [source, where, mask, nothing], vector)
            _masked(builder, "store", vector, [value, target, where, mask], ir.VoidType())
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, out, index, index, index, index), codegen
