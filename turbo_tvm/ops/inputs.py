"""The inputs of a model's function: what each of them holds, and what it is called. The one place that knows both."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from tvm import relax

from turbo_tvm.ops.operand import dims

NUM_INPUT = "num_input"  # TVM's attribute of a function: how many of its parameters are inputs; weights follow


class InputKind(str, Enum):
    """What an input holds; the value is the name of the kind in a manifest (`TensorSpec.kind`)."""

    TOKEN_IDS = "token_ids"  # (batch, length); packed (tiles, row_tile)
    ATTENTION_MASK = "attention_mask"  # 1 for a token, 0 for padding; gone once the graph is packed
    TOKEN_TYPE_IDS = "token_type_ids"  # which text of a pair a token belongs to
    POSITION_IDS = "position_ids"  # rows of the tables of positions
    PATCHES = "patches"  # (batch, tokens, values): an image, cut into tokens
    PIXELS = "pixels"  # (batch, channels, height, width): of source models alone, until patches are cut
    CU_SEQLENS = "cu_seqlens"  # (sequences + 1,): where each sequence begins, and the end
    QUERY_TILES = "query_tiles"  # (tasks, 3): first row, begin and end of each task of attention
    POOLED_ROWS = "pooled_rows"  # (sequences + 1,): the row that each sequence is pooled to

    @property
    def parameter(self) -> str:
        """What transformers calls the argument, and a function of ours its parameter."""
        return _PARAMETERS.get(self, self.value)


_PARAMETERS = {InputKind.TOKEN_IDS: "input_ids", InputKind.PIXELS: "pixel_values"}  # the others: as their kind
_KINDS = {kind.parameter: kind for kind in InputKind}


def kind_of(parameter: str) -> InputKind:
    """Return what the parameter of that name holds. Raises KeyError for a name that no input has."""
    return _KINDS[parameter]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a function, by kind; None for what it does not take."""

    token_ids: relax.Var | None = None
    attention_mask: relax.Var | None = None
    token_type_ids: relax.Var | None = None
    position_ids: relax.Var | None = None
    patches: relax.Var | None = None
    pixels: relax.Var | None = None
    cu_seqlens: relax.Var | None = None
    query_tiles: relax.Var | None = None
    pooled_rows: relax.Var | None = None

    @staticmethod
    def of(func: relax.Function) -> Inputs:
        """Return the inputs of a function; inputs of other names are left out."""
        return Inputs(**{_KINDS[p.name].value: p for p in input_params(func) if p.name in _KINDS})

    @property
    def are_images(self) -> bool:
        """Whether sequences are images: all of one length, and never padded."""
        return self.patches is not None

    @property
    def are_packed(self) -> bool:
        """Whether padding has been removed."""
        return self.cu_seqlens is not None

    def given(self) -> dict[InputKind, relax.Var]:
        """Return the inputs that there are."""
        found = {InputKind(field.name): getattr(self, field.name) for field in fields(self)}
        return {kind: var for kind, var in found.items() if var is not None}

    def kind_of(self, expr: relax.Expr) -> InputKind | None:
        """Return the kind of the input that an expression is, None if it is none."""
        return next((kind for kind, var in self.given().items() if expr.same_as(var)), None)


def batch_shape(func: relax.Function) -> list:
    """Return the dimensions of token ids or patches, the first input: (batch, length, ...).

    Packed they are (tiles, row_tile, ...).
    """
    return dims(func.params[0])


def input_params(func: relax.Function) -> list[relax.Var]:
    """Return the parameters that are inputs."""
    return list(func.params[: num_input(func)])


def weight_params(func: relax.Function) -> list[relax.Var]:
    """Return the parameters behind the inputs."""
    return list(func.params[num_input(func) :])


def num_input(func: relax.Function) -> int:
    """Return how many parameters are inputs; 0 where the function does not say."""
    return int((func.attrs or {}).get(NUM_INPUT, 0))


def with_params(func: relax.Function, params: list[relax.Var], inputs: int) -> relax.Function:
    """Return the function with other parameters, of which the first are inputs."""
    changed = relax.Function(params, func.body, func.ret_ty, is_pure=True, attrs=func.attrs)
    return changed.with_attr(NUM_INPUT, inputs)
