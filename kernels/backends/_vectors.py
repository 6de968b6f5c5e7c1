"""Rows of a table as values in Numba: one LLVM vector of D float32, in as many registers as that takes.

Numba's own loops over a row leave the sum of a bag in memory and test for overlap of arrays before each row; a vector
value stays in registers, and LLVM cuts it into AVX-512, AVX2 or SSE pieces for the machine it runs on.  The width is
an integer literal, so each width is compiled once.  Arrays are flat; their dtype says what a row is made of:
float32; uint16: the bits of bfloat16; int16: the bits of float16; int8: numbers that are multiplied with their row's
scale (kernels/int8.py).  Indices are uint64: a signed one would be tested for wrap-around at every element.

Imports Numba, so it is imported when the cpu backend is chosen and not before.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, register_model

F32, I32, I16, I8, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.HalfType()
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
        return _load(builder, signature.args[0].dtype, place, kind.lanes)

    return kind(array, index, lanes), emit


def _load(builder, dtype, place, n):
    if dtype == types.float32:
        return builder.load(builder.bitcast(place, ir.VectorType(F32, n).as_pointer()), align=4)
    raw = builder.load(builder.bitcast(place, ir.VectorType(I16, n).as_pointer()), align=2)
    if dtype == types.uint16:
        wide = builder.shl(builder.zext(raw, ir.VectorType(I32, n)), _same(16, n))
        return builder.bitcast(wide, ir.VectorType(F32, n))
    return builder.fpext(builder.bitcast(raw, ir.VectorType(HALF, n)), ir.VectorType(F32, n))


@intrinsic(prefer_literal=True)
def load_row(typing, array, scales, index, row, lanes):
    """load(array, index, D), times scales[row] where the array is of int8; other arrays have no scales."""
    kind = Vector(lanes.literal_value)

    def emit(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[2])
        n = kind.lanes
        if signature.args[0].dtype != types.int8:
            return _load(builder, signature.args[0].dtype, place, n)
        raw = builder.load(builder.bitcast(place, ir.VectorType(I8, n).as_pointer()), align=1)
        scale = builder.load(_place(context, builder, signature.args[1], args[1], args[3]))
        return builder.fmul(builder.sitofp(raw, ir.VectorType(F32, n)), _splat(builder, scale, n, F32))

    return kind(array, scales, index, row, lanes), emit


@intrinsic
def store(typing, array, index, vector):
    """array[index : index + D] = vector, rounded to nearest."""

    def emit(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1])
        _store(builder, signature.args[0].dtype, place, args[2], vector.lanes)
        return context.get_dummy_value()

    return types.void(array, index, vector), emit


@intrinsic
def store_row(typing, array, scales, index, row, vector):
    """array[index : index + D] = vector, rounded to nearest; the scale of a row of int8 goes to scales[row]."""

    def emit(context, builder, signature, args):
        dtype, n = signature.args[0].dtype, vector.lanes
        place = _place(context, builder, signature.args[0], args[0], args[2])
        if dtype == types.int8:
            _store_scaled(builder, place, _place(context, builder, signature.args[1], args[1], args[3]), args[4], n)
        else:
            _store(builder, dtype, place, args[4], n)
        return context.get_dummy_value()

    return types.void(array, scales, index, row, vector), emit


@intrinsic
def store_row_at_random(typing, array, scales, index, row, vector, key):
    """The same, rounded up or down at random: kernels.ops.random_bits of a row whose 64-bit key is `key`."""

    def emit(context, builder, signature, args):
        dtype, n, value = signature.args[0].dtype, vector.lanes, args[4]
        place = _place(context, builder, signature.args[0], args[0], args[2])
        if dtype == types.float32:
            _store(builder, dtype, place, value, n)
            return context.get_dummy_value()
        x = _random_bits(builder, args[5], n)
        ints, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
        if dtype == types.int8:
            share = builder.fmul(builder.uitofp(builder.lshr(x, _same(8, n)), floats), _same(2.0**-24, n, F32))
            scale = _place(context, builder, signature.args[1], args[1], args[3])
            _store_scaled(builder, place, scale, value, n, share)
            return context.get_dummy_value()
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

    return types.void(array, scales, index, row, vector, key), emit


def _random_bits(builder, key, n):
    """n numbers of 32 bits from the low half of a row's key."""
    each = ir.Constant(ir.VectorType(I32, n), [d * 0x9E3779B9 & 0xFFFFFFFF for d in range(n)])
    x = builder.add(_splat(builder, builder.trunc(key, I32), n, I32), each)
    x = builder.mul(builder.xor(x, builder.lshr(x, _same(16, n))), _same(0x7FEB352D, n))
    x = builder.mul(builder.xor(x, builder.lshr(x, _same(15, n))), _same(0x846CA68B, n))
    return builder.xor(x, builder.lshr(x, _same(16, n)))


def _store_scaled(builder, place, scale_place, value, n, share=None):
    """kernels.int8.quantise of one row; share: what is added before the fraction is cut off, else to nearest."""
    ints = ir.VectorType(I32, n)
    sizes = builder.bitcast(_call(builder, "fabs", value), ints)  # as integers in the same order; NaN above infinity
    signature = ir.FunctionType(I32, [ints])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.vector.reduce.umax.v{n}i32")
    largest = builder.call(function, [sizes])
    power = builder.sub(builder.lshr(builder.add(largest, I32(0x1FFFF)), I32(23)), I32(6))
    power = builder.select(builder.icmp_signed("<", power, I32(1)), I32(1), power)
    finite = builder.icmp_unsigned("<", largest, I32(0x7F800000))
    scale = builder.select(finite, builder.shl(power, I32(23)), I32(0x7FC00000))
    builder.store(builder.bitcast(scale, F32), scale_place)
    inverse = builder.bitcast(builder.shl(builder.sub(I32(254), power), I32(23)), F32)  # 1 / scale, exactly
    x = builder.fmul(value, _splat(builder, inverse, n, F32))
    x = _call(builder, "rint", x) if share is None else _call(builder, "floor", builder.fadd(x, share))
    x = builder.select(builder.fcmp_ordered(">", x, _same(127.0, n, F32)), _same(127.0, n, F32), x)
    x = builder.select(builder.fcmp_ordered("<", x, _same(-127.0, n, F32)), _same(-127.0, n, F32), x)
    x = builder.select(_splat(builder, finite, n, ir.IntType(1)), x, _same(0.0, n, F32))
    numbers = builder.trunc(builder.fptosi(x, ints), ir.VectorType(I8, n))
    builder.store(numbers, builder.bitcast(place, ir.VectorType(I8, n).as_pointer()), align=1)


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
        bytes_at = builder.bitcast(place, I8.as_pointer())
        for line in range(0, count.literal_value * size, LINE):
            _prefetch(builder, builder.gep(bytes_at, [ir.Constant(ir.IntType(64), line)]))
        return context.get_dummy_value()

    return types.void(array, index, count), emit


@intrinsic
def prefetch_scale(typing, array, scales, row):
    """Ask for scales[row] where the array is of int8."""

    def emit(context, builder, signature, args):
        if signature.args[0].dtype == types.int8:
            place = _place(context, builder, signature.args[1], args[1], args[2])
            _prefetch(builder, builder.bitcast(place, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(array, scales, row), emit


def _prefetch(builder, place):
    signature = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [place, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])
