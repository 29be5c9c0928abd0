"""Elementary functions on fp32 expressions, scalar or vector, from arithmetic alone.

LLVM turns `T.exp`, `T.erf` and `T.tanh` on a vector into one libm call per lane. The functions here are
polynomials and quotients of them: they vectorise on every target and inline into the loop that calls them.

    function    error against float64             method
    exp         3e-7 relative; 0 below -87.7      2^round(x log2 e) times a degree-7 polynomial (Cephes expf)
    gelu        3e-7 max(1, |x|) absolute         x Phi(x), Phi - 1/2 an odd polynomial of degree 27 on [-5.3, 5.3]
    gelu_bf16   8e-5 max(1, |x|) absolute         the same with degree 13 on [-3.8, 3.8]: enough where bf16 is stored
    tanh        4e-7 absolute                     odd rational 13 / 6 on [-7.9, 7.9] (Eigen)
    gelu_tanh   4e-7 max(1, |x|) absolute         x sigmoid(2 u), which is x (1 + tanh u) / 2
    silu        4e-7 max(1, |x|) absolute         x sigmoid(x)
    quick_gelu  4e-7 max(1, |x|) absolute         x sigmoid(1.702 x)

Arguments beyond an interval are clamped to it, so large ones saturate and none makes a NaN. A NaN does not
propagate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import formats

Activation = Callable[[Expr], Expr]

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times an 8-bit integer is exact

# Phi(x) - 1/2 = x P(x^2), P the best in the weighted maximum norm of those that make it 1/2 at the limit, so that what
# is clamped there gives 0 and x. The long one is a polynomial in 2 (x / limit)^2 - 1, in powers of x^2 it would cancel.
_PHI_LIMIT = 5.3
_PHI = (
    -6.0327648e-4,
    1.64230168e-3,
    -1.56763732e-3,
    1.99031271e-3,
    -5.32256905e-3,
    9.53990594e-3,
    -1.3465805e-2,
    1.86993536e-2,
    -2.52265166e-2,
    3.21137197e-2,
    -3.95967141e-2,
    4.92622331e-2,
    -6.65182695e-2,
    1.33392587e-1,
)
_PHI_BF16_LIMIT = 3.8
_PHI_BF16 = (
    3.78477729e-8,
    -2.33098945e-6,
    6.18093763e-5,
    -9.42172715e-4,
    9.36743803e-3,
    -6.5832026e-2,
    3.98760855e-1,
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
    """Return a number as an fp32 expression."""
    return T.float32(value)


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """Return x, or the nearest number in [low, high]."""
    return T.max(T.min(x, _constant(high)), _constant(low))


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Return the polynomial in `x` whose highest coefficient comes first: one FMA each."""
    total = _constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _constant(coefficient)
    return total


def exp(x: Expr) -> Expr:
    """Return e^x for x <= 88.

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


def gelu(x: Expr) -> Expr:
    """Return GELU as it is defined, x Phi(x) with the normal distribution's Phi (by erf, not by tanh)."""
    inner = _clamp(x, -_PHI_LIMIT, _PHI_LIMIT)
    scaled = inner * inner * _constant(2 / _PHI_LIMIT**2) - _constant(1)
    return x * (inner * _horner(scaled, _PHI) + _constant(0.5))


def gelu_bf16(x: Expr) -> Expr:
    """Return GELU to the accuracy of bf16."""
    inner = _clamp(x, -_PHI_BF16_LIMIT, _PHI_BF16_LIMIT)
    return x * (inner * _horner(inner * inner, _PHI_BF16) + _constant(0.5))


def tanh(x: Expr) -> Expr:
    """Return the hyperbolic tangent."""
    x = _clamp(x, -_TANH_LIMIT, _TANH_LIMIT)
    return x * _horner(x * x, _TANH_NUMERATOR) / _horner(x * x, _TANH_DENOMINATOR)


def gelu_tanh(x: Expr) -> Expr:
    """Return GELU by its tanh approximation: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    scale = -2 * math.sqrt(2 / math.pi)
    minus_2u = x * (x * x * _constant(0.044715 * scale) + _constant(scale))
    return x / (exp(minus_2u) + _constant(1))


def silu(x: Expr) -> Expr:
    """Return x sigmoid(x), also called swish."""
    return x / (exp(-x) + _constant(1))


def quick_gelu(x: Expr) -> Expr:
    """Return GELU as CLIP has it, x sigmoid(1.702 x)."""
    return x / (exp(x * _constant(-1.702)) + _constant(1))


def relu(x: Expr) -> Expr:
    """Return max(x, 0)."""
    return T.max(x, _constant(0))


def identity(x: Expr) -> Expr:
    """Return x."""
    return x


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "tanh": tanh,
}


def activation(name: str | None, stored: formats.Format | None = formats.FP32) -> Activation:
    """Return the activation function of that name; None is the identity.

    stored: the format of the result; in bf16 fewer terms do.
    """
    if name is None:
        return identity
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: use one of {', '.join(sorted(_ACTIVATIONS))} or None")
    return gelu_bf16 if name == "gelu" and stored == formats.BF16 else _ACTIVATIONS[name]
