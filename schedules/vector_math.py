"""Elementary functions on fp32 expressions, scalar or vector, from arithmetic alone.

LLVM turns `T.exp`, `T.erf` and `T.tanh` on a vector into one libm call per lane. The functions here are
polynomials and quotients of them: they vectorise on every target and inline into the loop that calls them.

    function    error against float64             method
    exp         3e-7 relative; 0 below -87.7      2^round(x log2 e) times a degree-7 polynomial (Cephes expf)
    erf         4e-7 absolute                     odd rational 13 / 10 on [-3.84, 3.84] (Eigen)
    gelu        4e-7 max(1, |x|) absolute         x (1 + erf(x / sqrt 2)) / 2
    tanh        4e-7 absolute                     odd rational 13 / 6 on [-7.9, 7.9] (Eigen)
    gelu_tanh   4e-7 max(1, |x|) absolute         x sigmoid(2 u), which is x (1 + tanh u) / 2

Arguments beyond an interval are clamped to it, so large ones saturate and none makes a NaN. A NaN does not
propagate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

Activation = Callable[[Expr], Expr]

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times an 8-bit integer is exact

_ERF_LIMIT = 3.832506856900711  # erf rounds to 1 from here on
_ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)

_TANH_LIMIT = 7.90531110763549805
_TANH_NUMERATOR = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_DENOMINATOR = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _constant(value: float) -> Expr:
    return T.float32(value)


def _clamp(x: Expr, low: float, high: float) -> Expr:
    return T.max(T.min(x, _constant(high)), _constant(low))


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """The polynomial in `x` whose highest coefficient comes first: one FMA each."""
    total = _constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _constant(coefficient)
    return total


def exp(x: Expr) -> Expr:
    """e^x for x <= 88.

    Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits, so the power of two needs neither a
    rounding nor a conversion instruction; with 127 added along it is the exponent field, ready to be shifted.
    A clamp to -88 makes that field 0, hence the result exactly 0.
    """
    shift = _constant(1.5 * 2**23 + 127)
    x = _clamp(x, -88.0, 88.0)
    shifted = T.reinterpret(str(x.ty).replace("float", "int"), x * _constant(math.log2(math.e)) + shift)
    # Through the integer, because TVM's simplifier cancels (y + shift) - shift.
    n = T.reinterpret(x.ty, shifted) - shift
    r = x - n * _constant(_LN2_HIGH) - n * _constant(_LN2_LOW)
    power = T.reinterpret(x.ty, T.shift_left(shifted, T.int32(23)))
    return (_horner(r, _EXP) * (r * r) + r + _constant(1)) * power


def erf(x: Expr) -> Expr:
    """The error function."""
    x = _clamp(x, -_ERF_LIMIT, _ERF_LIMIT)
    return x * _horner(x * x, _ERF_NUMERATOR) / _horner(x * x, _ERF_DENOMINATOR)


def gelu(x: Expr) -> Expr:
    """GELU through erf, the exact one."""
    half = x * _constant(0.5)
    return half * erf(x * _constant(math.sqrt(0.5))) + half


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent."""
    x = _clamp(x, -_TANH_LIMIT, _TANH_LIMIT)
    return x * _horner(x * x, _TANH_NUMERATOR) / _horner(x * x, _TANH_DENOMINATOR)


def gelu_tanh(x: Expr) -> Expr:
    """GELU by its tanh approximation: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    scale = -2 * math.sqrt(2 / math.pi)
    minus_2u = x * (x * x * _constant(0.044715 * scale) + _constant(scale))
    return x / (exp(minus_2u) + _constant(1))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return T.max(x, _constant(0))


def identity(x: Expr) -> Expr:
    """x."""
    return x


_ACTIVATIONS: dict[str, Activation] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "tanh": tanh}


def activation(name: str | None) -> Activation:
    """The activation function of that name; None is the identity."""
    if name is None:
        return identity
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: use one of {', '.join(sorted(_ACTIVATIONS))} or None")
    return _ACTIVATIONS[name]
