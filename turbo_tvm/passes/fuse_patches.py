"""Read an image as patches: what embeds them becomes a product and a look-up, as tokens of text are embedded.

    x (b, 3, H, W) = pixels; c = conv2d(x, w) with stride = kernel = (p, q)
    h (b, s, n) = concat(class, permute(reshape(c + bias))) + positions
        --> h = matmul(patches (b, s, 3pq), permute(reshape(w, (n, 3pq)))) + take(table, position_ids (b, s))

A patch is a row of the pixels that one place of the convolution reads, a token without a patch a row of zeros. The
table holds what the arithmetic around the convolution adds: it is that arithmetic, on a convolution that gives zeros,
whatever it consists of (class tokens, positions and their interpolation, the bias). That it adds nothing else, and
which tokens are patches, is measured (see `evaluate.py`).

Runs on imported graphs of images of one size. `attention_mask` becomes an input as well, of which nothing reads a
value: it stands for the bounds of sequences until padding is removed. A graph without such a convolution is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.ops.inputs import InputKind, input_params, num_input, with_params
from turbo_tvm.passes.analysis.evaluate import evaluate, specialized
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of, with_function

# What may stand between the convolution and the tokens; what it does is measured.
_ARRANGING = ("reshape", "permute_dims", "concat", "add", "expand_dims", "squeeze", "flatten")


@dataclass(frozen=True)
class Patches:
    """The images that a graph takes, their patches, and how many tokens stand before those."""

    channels: int
    height: int
    width: int
    patch_height: int
    patch_width: int
    prefix: int


def fuse_patches(mod: ir.IRModule, function: str) -> tuple[ir.IRModule, Patches | None]:
    """Turn `f(pixels, weights...)` into `f(patches, attention_mask, position_ids, weights...)`; None: it is left alone.

    pixels: fp32 (batch, channels, height, width), batch symbolic, the only input.
    """
    found = _stem(mod[function])
    if found is None:
        return mod, None
    stem = _Stem(*found)
    rewriter = _FusePatches(_with_inputs(mod, function, stem), function, stem)
    rewritten = rewriter.run()
    if rewriter.prefix is None or stem.pixels in relax.analysis.free_vars(rewritten[function].body):
        return mod, None
    _, channels, height, width = shape_of(stem.pixels)
    patch_height, patch_width = shape_of(stem.weight)[2:]
    patches = Patches(channels, height, width, patch_height, patch_width, rewriter.prefix)
    return _without(rewritten, function, stem.pixels), patches


@dataclass(frozen=True)
class _Stem:
    """The input, the variable of the convolution and that of the tokens, and the convolution's weight."""

    pixels: relax.Var
    conv: relax.Var
    tokens: relax.Var
    weight: relax.Expr

    @property
    def columns(self) -> int:
        """Values of a patch."""
        return int(np.prod(shape_of(self.weight)[1:]))

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return shape_of(self.tokens)[1]


def _stem(main: relax.Function) -> tuple[relax.Var, relax.Var, relax.Var, relax.Expr] | None:
    """What `_Stem` holds, or None if the graph does not begin like that."""
    inputs = input_params(main)
    if len(inputs) != 1 or len(shape_of(inputs[0])) != 4 or str(inputs[0].ty.dtype) != "float32":
        return None
    batch, *pixels = shape_of(inputs[0])
    if not isinstance(batch, tirx.Var) or not all(isinstance(d, int) for d in pixels):
        return None
    readers = _readers(main)
    conv = _only(readers, inputs[0])
    if conv is None or not _cuts_patches(conv.value, inputs[0]):
        return None
    tokens = conv.var
    while (reader := _only(readers, tokens)) is not None and any(is_call(reader.value, op) for op in _ARRANGING):
        tokens = reader.var
    weight = conv.value.args[1]
    shape = shape_of(tokens)
    if len(shape) != 3 or not isinstance(shape[1], int) or shape[2] != shape_of(weight)[0]:
        return None
    return inputs[0], conv.var, tokens, weight


def _readers(main: relax.Function) -> dict[relax.Var, list[relax.Binding | None]]:
    """Who reads each variable; None stands for the function's result."""
    readers: dict[relax.Var, list[relax.Binding | None]] = {}
    for block in main.body.blocks:
        for binding in block.bindings:
            for var in relax.analysis.free_vars(binding.value):
                readers.setdefault(var, []).append(binding)
    for var in relax.analysis.free_vars(main.body.body):
        readers.setdefault(var, []).append(None)
    return readers


def _only(readers: dict[relax.Var, list[relax.Binding | None]], var: relax.Var) -> relax.Binding | None:
    found = readers.get(var, [])
    return found[0] if len(found) == 1 else None


def _cuts_patches(conv: relax.Expr, pixels: relax.Var) -> bool:
    """Whether this is a convolution of the pixels in which every patch is read once."""
    if not is_call(conv, "nn.conv2d") or not conv.args[0].same_as(pixels):
        return False
    a, kernel = conv.attrs, shape_of(conv.args[1])
    plain = not any(int(p) for p in a.padding) and all(int(d) == 1 for d in a.dilation) and int(a.groups) == 1
    layouts = (a.data_layout, a.kernel_layout, a.out_layout or a.data_layout) == ("NCHW", "OIHW", "NCHW")
    known = isinstance(conv.args[1], relax.Var) and all(isinstance(d, int) for d in kernel)
    return plain and layouts and known and [int(s) for s in a.strides] == kernel[2:]


class _FusePatches(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, stem: _Stem):
        super().__init__(mod, function)
        self.stem = stem
        self.patches, _, self.position_ids = self.func.params[:3]
        self.batch = shape_of(stem.pixels)[0]
        self.prefix: int | None = None  # tokens before the patches, once they are found

    def rules(self):
        return (self._tokens,)

    def _tokens(self, call: relax.Call) -> relax.Expr | None:
        if self.current is None or not self.current.same_as(self.stem.tokens):
            return None
        conv = self._new[self.stem.conv]
        self.prefix = self._measure(call, conv)
        if self.prefix is None:
            return None
        weight = self._new.get(self.stem.weight, self.stem.weight)
        hidden = shape_of(weight)[0]
        rows = self.emit(relax.op.reshape(weight, (hidden, self.stem.columns)))
        product = self.emit(relax.op.matmul(self.patches, self.emit(relax.op.permute_dims(rows))))
        nothing = self.emit(relax.op.zeros((1, *shape_of(conv)[1:]), "float32"))
        added = self.emit(specialized(self, call, {self.batch: 1}, {conv: nothing}, at=[conv]))
        table = self.emit(relax.op.reshape(added, (self.stem.length, hidden)))
        return relax.op.add(product, self.emit(relax.op.take(table, self.position_ids, axis=0, mode="clip")))

    def _measure(self, tokens: relax.Expr, conv: relax.Var) -> int | None:
        """How many tokens stand before the patches, if all others are those, in order, and something is added to each.

        One of two images is all zeros: the difference is what the convolution gives.
        """
        rng = np.random.default_rng(0)
        given = rng.standard_normal((2, *shape_of(conv)[1:])).astype("float32")
        given[1] = 0

        def value_of(param: relax.Var) -> np.ndarray | None:
            if param.same_as(conv):
                return given
            if "float" not in str(param.ty.dtype):
                return None
            return rng.standard_normal([int(d) for d in shape_of(param)]).astype(str(param.ty.dtype))

        values = evaluate(self, tokens, {self.batch: 2}, value_of, at=[conv])
        patches = given[0].reshape(len(given[0]), -1).T
        if values is None or values.shape[1] < len(patches):
            return None
        prefix = values.shape[1] - len(patches)
        wanted = np.concatenate([np.zeros_like(values[0, :prefix]), patches])
        return prefix if np.allclose(values[0] - values[1], wanted, atol=1e-4) else None


def _with_inputs(mod: ir.IRModule, function: str, stem: _Stem) -> ir.IRModule:
    """Return the module with the inputs that tokens need in front of the function's own."""
    shape = (shape_of(stem.pixels)[0], stem.length)
    patches = relax.Var(InputKind.PATCHES.parameter, relax.TensorType((*shape, stem.columns), "float32"))
    ids = relax.TensorType(shape, "int64")
    others = [relax.Var(kind.parameter, ids) for kind in (InputKind.ATTENTION_MASK, InputKind.POSITION_IDS)]
    func = mod[function]
    return with_function(
        mod, function, with_params(func, [patches, *others, *func.params], num_input(func) + 1 + len(others))
    )


def _without(mod: ir.IRModule, function: str, given: relax.Var) -> ir.IRModule:
    """Return the module whose function does not take this input, which it does not read."""
    func = mod[function]
    params = [param for param in func.params if not param.same_as(given)]
    return with_function(mod, function, with_params(func, params, num_input(func) - 1))
