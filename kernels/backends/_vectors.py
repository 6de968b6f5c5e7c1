"""Rows of a table as values in Numba: one LLVM vector of D float32, in as many registers as that takes.

Numba's own loops over a row leave the sum of a bag in memory and test for overlap of arrays before each row; a vector
value stays in registers, and LLVM cuts it into AVX-512, AVX2 or SSE pieces for the machine it runs on.  The width is
an integer literal, so each width is compiled once.  Arrays are flat; their dtype says what a row is made of:
float32; uint16: the bits of bfloat16; int16: the bits of float16.  Indices are uint64: a signed one would be tested for
wrap-around at every element.

Imports Numba, so it is imported when the cpu backend is chosen and not before.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, register_model

F32, I32, I16, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.HalfType()
LINE = 64  # bytes


class Vector(types.Type):
    """The Numba type of D float32."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


@register_model(Vector)
class VectorModel(PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(F32, kind.lanes))


def _splat(builder, value, lanes, kind):
    one = builder.insert_element(ir.Constant(ir.VectorType(kind, lanes), ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), zeros)


def _same(value, lanes, kind=I32):
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _place(context, builder, array_type, array, index):
    """Pointer to one element of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _call(builder, name, *args, flags=()):
    """Call LLVM's own `name` on vectors of one type."""
    kind = args[-1].type
    result = F32 if name.startswith("vector.reduce") else kind
    signature = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.v{kind.count}f32")
    return builder.call(function, args, fastmath=flags)


@intrinsic(prefer_literal=True)
def zeros(typing, lanes):
    """zeros(D): D zeros."""
    kind = Vector(lanes.literal_value)

    def emit(context, builder, signature, args):
        return _same(0.0, kind.lanes, F32)

    return kind(lanes), emit


@intrinsic(prefer_literal=True)
def load(typing, array, index, lanes):
    """load(array, index, D): array[index : index + D] as float32."""
    kind = Vector(lanes.literal_value)

    def emit(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        n = kind.lanes
        if signature.args[0].dtype == types.float32:
            return builder.load(builder.bitcast(place, ir.VectorType(F32, n).as_pointer()), align=4)
        raw = builder.load(builder.bitcast(place, ir.VectorType(I16, n).as_pointer()), align=2)
        if signature.args[0].dtype == types.uint16:
            wide = builder.shl(builder.zext(raw, ir.VectorType(I32, n)), _same(16, n))
            return builder.bitcast(wide, ir.VectorType(F32, n))
        return builder.fpext(builder.bitcast(raw, ir.VectorType(HALF, n)), ir.VectorType(F32, n))

    return kind(array, index, lanes), emit


@intrinsic
def store(typing, array, index, vector):
    """array[index : index + D] = vector, rounded to nearest."""

    def emit(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        _store(builder, signature.args[0].dtype, place, args[2], vector.lanes)
        return context.get_dummy_value()

    return types.void(array, index, vector), emit


@intrinsic
def store_at_random(typing, array, index, vector, key):
    """The same, rounded up or down at random: kernels.ops.random_bits of a row whose 64-bit key is `key`."""

    def emit(context, builder, signature, args):
        dtype, n, value = signature.args[0].dtype, vector.lanes, args[2]
        place = _place(context, builder, signature.args[0], args[0], args[1])
        if dtype == types.float32:
            _store(builder, dtype, place, value, n)
            return context.get_dummy_value()
        ints, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
        each = ir.Constant(ints, [d * 0x9E3779B9 & 0xFFFFFFFF for d in range(n)])
        x = builder.add(_splat(builder, builder.trunc(args[3], I32), n, I32), each)
        x = builder.mul(builder.xor(x, builder.lshr(x, _same(16, n))), _same(0x7FEB352D, n))
        x = builder.mul(builder.xor(x, builder.lshr(x, _same(15, n))), _same(0x846CA68B, n))
        x = builder.xor(x, builder.lshr(x, _same(16, n)))
        drop = 16 if dtype == types.uint16 else 13
        mask = (1 << drop) - 1
        noise = builder.and_(x, _same(mask, n))
        raw = builder.and_(builder.add(builder.bitcast(value, ints), noise), _same(0xFFFFFFFF ^ mask, n))
        rounded = builder.bitcast(raw, floats)
        if dtype == types.int16:  # below 2**-14 float16's numbers stand 2**-24 apart, whatever the exponent
            size = _call(builder, "fabs", value)
            share = builder.fmul(builder.uitofp(noise, floats), _same(2.0**-13, n, F32))
            steps = _call(builder, "floor", builder.fadd(builder.fmul(size, _same(2.0**24, n, F32)), share))
            grid = _call(builder, "copysign", builder.fmul(steps, _same(2.0**-24, n, F32)), value)
            rounded = builder.select(builder.fcmp_ordered("<", size, _same(2.0**-14, n, F32)), grid, rounded)
        finite = builder.fcmp_ordered("<", _call(builder, "fabs", value), _same(float("inf"), n, F32))
        _store(builder, dtype, place, builder.select(finite, rounded, value), n)
        return context.get_dummy_value()

    return types.void(array, index, vector, key), emit


def _store(builder, dtype, place, value, n):
    if dtype == types.float32:
        builder.store(value, builder.bitcast(place, ir.VectorType(F32, n).as_pointer()), align=4)
        return
    if dtype == types.int16:
        raw = builder.bitcast(builder.fptrunc(value, ir.VectorType(HALF, n)), ir.VectorType(I16, n))
    else:
        bits = builder.bitcast(value, ir.VectorType(I32, n))
        odd = builder.and_(builder.lshr(bits, _same(16, n)), _same(1, n))
        even = builder.add(builder.add(bits, _same(0x7FFF, n)), odd)  # ties to even
        nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(nan, _same(0x7FC00000, n), even)
        raw = builder.trunc(builder.lshr(kept, _same(16, n)), ir.VectorType(I16, n))
    builder.store(raw, builder.bitcast(place, ir.VectorType(I16, n).as_pointer()), align=2)


def _two(emit_one):
    """An intrinsic of two vectors, or of a vector and a float32 that stands for D equal ones."""

    def typed(typing, left, right):
        def emit(context, builder, signature, args):
            other = args[1] if isinstance(right, Vector) else _splat(builder, args[1], left.lanes, F32)
            return emit_one(builder, args[0], other)

        return left(left, right), emit

    typed.__name__ = emit_one.__name__
    typed.__doc__ = emit_one.__doc__
    return intrinsic(typed)


@_two
def add(builder, a, b):
    return builder.fadd(a, b)


@_two
def multiply(builder, a, b):
    return builder.fmul(a, b)


@_two
def divide(builder, a, b):
    return builder.fdiv(a, b)


@_two
def least(builder, a, b):
    """NaN stays NaN in a: a comparison with it is false."""
    return builder.select(builder.fcmp_ordered(">", a, b), b, a)


@_two
def most(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


@intrinsic
def add_product(typing, total, a, b):
    """total + a * b, rounded once; b a vector or a float32."""

    def emit(context, builder, signature, args):
        other = args[2] if isinstance(b, Vector) else _splat(builder, args[2], total.lanes, F32)
        return _call(builder, "fma", args[1], other, args[0])

    return total(total, a, b), emit


@intrinsic
def root(typing, a):
    def emit(context, builder, signature, args):
        return _call(builder, "sqrt", args[0])

    return a(a), emit


@intrinsic
def dot(typing, a, b):
    """Sum of a * b, in the order of a tree."""

    def emit(context, builder, signature, args):
        product = builder.fmul(args[0], args[1])
        return _call(builder, "vector.reduce.fadd", ir.Constant(F32, -0.0), product, flags=("reassoc",))

    return types.float32(a, b), emit


@intrinsic(prefer_literal=True)
def prefetch(typing, array, index, count):
    """Ask for array[index : index + count], one request for each cache line; count is a literal."""

    def emit(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        size = signature.args[0].dtype.bitwidth // 8
        bytes_at = builder.bitcast(place, ir.IntType(8).as_pointer())
        signature_of_it = ir.FunctionType(ir.VoidType(), [bytes_at.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, signature_of_it, "llvm.prefetch.p0")
        for line in range(0, count.literal_value * size, LINE):
            there = builder.gep(bytes_at, [ir.Constant(ir.IntType(64), line)])
            builder.call(function, [there, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(array, index, count), emit
