"""What all operators of the vocabulary have in common: named tensors, attributes, a result, a name for their kernel.

An operator is a frozen record. In a graph its tensors are Relax expressions and `out` is the type of its result; what a
kernel is built from is the same record with `Operand`s in their place (`Operator.without_graph`). A kernel takes the
tensors that are given, in the order of the fields, and then its output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from turbo_tvm.ops import formats
from turbo_tvm.ops.operand import (
    Operand,
    Role,
    Tensor,
    alike,
    dims,
    distinct,
    dtype_of,
    is_fixed,
    row_bytes,
    same_dimension,
    size_bytes,
    width,
)

Same = TypeVar("Same", bound="Operator")

OVERWRITES = "turbo_tvm.overwrites"  # of a PrimFunc: positions of parameters that may be the memory of its output


class Argument(NamedTuple):
    """One tensor of an operator."""

    name: str  # of the field
    role: Role
    tensor: Tensor
    of: str  # the operand whose rows it numbers, "" for other roles


class Stored(NamedTuple):
    """Rows or tables whose format a kernel's name spells."""

    word: str  # what they are in the name
    tensor: Tensor
    columns: int | None  # how wide they are by themselves; None if the name says that otherwise


_WIDER = {"x": "from", "extra": "plus", "out": "to"}  # words before the width of rows that are wider than their columns


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One fused operator: tensors and attributes are the fields of its class."""

    NAME: ClassVar[str]  # of the call, after "turbo.", and the first word of the kernel's name
    MAY_OVERWRITE: ClassVar[tuple[str, ...]] = ()  # tensors whose elements a task reads before it writes to their place

    out: Tensor  # the type of the result in a graph, an `Operand` in a kernel

    def arguments(self) -> list[Argument]:
        """Return the tensors that are given, in the order in which the kernel takes them."""
        found = []
        for field in dataclasses.fields(self):
            role, value = field.metadata.get("role"), getattr(self, field.name)
            if role is not None and value is not None:
                values = value if field.metadata["several"] else (value,)
                found += [Argument(field.name, role, tensor, field.metadata["of"]) for tensor in values]
        return found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are given, in order."""
        return tuple(argument.tensor for argument in self.arguments())

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that are not as by default, by name."""
        fields = [f for f in dataclasses.fields(self) if "role" not in f.metadata and f.name != "out"]
        values = {f.name: getattr(self, f.name) for f in fields}
        return {
            f.name: values[f.name] for f in fields if f.default is dataclasses.MISSING or values[f.name] != f.default
        }

    def with_tensors(self: Same, changed: Callable[[Tensor], Tensor]) -> Same:
        """Return this operator with `changed(tensor)` in the place of each tensor that is given."""
        new: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "role" in field.metadata and value is not None:
                new[field.name] = tuple(map(changed, value)) if field.metadata["several"] else changed(value)
        return dataclasses.replace(self, **new)

    def without_graph(self: Same) -> Same:
        """Return this operator as its kernel sees it: operands in place of expressions. Equal kernels are equal."""
        return dataclasses.replace(self.with_tensors(Operand.of), out=Operand.of(self.out))

    @property
    def columns_out(self) -> int:
        """How many columns of the result's rows are used; the rows may be wider."""
        return width(self.out)

    def stored(self) -> Iterator[Stored]:
        """Yield what the kernel's name says the format of."""
        return iter(())

    def shape_words(self) -> list[str]:
        """Return the words of the kernel's name that say its sizes."""
        return [str(self.columns_out)]

    def option_words(self) -> dict[str, Any]:
        """Return what else the kernel's name says: True as the key, a string as itself, a number behind the key."""
        return self.attributes()

    def extra_words(self) -> list[str]:
        """Return words that stand behind all options."""
        return []

    def kernel_name(self) -> str:
        """Return a readable name that says everything the kernel's code depends on: `linear_768x3072_gelu_bf16`."""
        options = [_option(key, value) for key, value in sorted(self.option_words().items())]
        words = [self.NAME, *self.shape_words(), *filter(None, options), *self.extra_words(), *self._format_words()]
        return "".join(c if c.isalnum() or c == "_" else "_" for c in "_".join(words))

    def _format_words(self) -> list[str]:
        """Return how rows are stored, where that is not fp32 and as wide as their columns."""
        stored = list(self.stored())
        wide = [f"{_WIDER[s.word]}{width(s.tensor)}" for s in stored if s.columns and width(s.tensor) > s.columns]
        found = {s.word: formats.of_storage(dtype_of(s.tensor)) or formats.FP32 for s in stored}
        narrow = [known.name for known in found.values() if known != formats.FP32]
        if not narrow:
            return wide
        return [*wide, narrow[0], *(f"{word}_fp32" for word, known in found.items() if known == formats.FP32)]

    def described(self) -> str:
        """Return the sizes in words, for people."""
        return str(self.columns_out)

    def flops_per_token(self) -> float:
        """Return the arithmetic operations per row of the result; a multiply-add is two."""
        return 0.0

    def flops_per_pair(self) -> float:
        """Return the arithmetic operations per pair of a query and a key."""
        return 0.0

    def bytes_weights(self) -> int:
        """Return the bytes of what does not depend on the batch."""
        return sum(size_bytes(tensor) for tensor in self.tensors if is_fixed(tensor))

    def bytes_per_token(self, tokens: Any) -> int:
        """Return what is read and written per token at least: each tensor of a row per token once.

        tokens: the first dimension of such tensors in the graph.
        """
        rows = [t for t in (*self.buffers(), self.out) if dims(t) and same_dimension(dims(t)[0], tokens)]
        return sum(row_bytes(tensor) for tensor in rows)

    def buffers(self) -> list[Tensor]:
        """Return the tensors that are given, each once."""
        return distinct(self.tensors)

    def overwritable(self) -> tuple[int, ...]:
        """Return which arguments may be the memory of the output: those of `MAY_OVERWRITE` that are stored as it is."""
        return tuple(
            i
            for i, argument in enumerate(self.arguments())
            if argument.name in self.MAY_OVERWRITE and alike(argument.tensor, self.out)
        )


def _option(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, str):
        return value
    return key if value is True else f"{key}{value:g}"
