"""How numbers are stored: the one place that knows which dtype of a tensor means which format.

A format of rows, tables and weights is stored in a dtype that TVM's code generators can handle. TVM's LLVM code
generator has no bf16 vectors, so bf16 travels as the uint16 with its bits, and two neighbours as one int32, which is
what dot-product instructions take. Everything else asks here.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE_BYTES = 64  # of a cache line
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Format:
    """A format of numbers."""

    name: str  # what a user calls it: a precision of `compile`, a word in a kernel's name
    storage: str  # dtype of the tensors that hold it
    word: str | None = None  # dtype of a tensor that holds several neighbours in one element
    per_word: int = 1  # how many neighbours those are


FP32 = Format("fp32", "float32")
BF16 = Format("bf16", "uint16", word="int32", per_word=2)
FP16 = Format("fp16", "float16")
FORMATS = (FP32, BF16, FP16)

INDEX = "int32"  # dtype of ids, and of what says where sequences begin


def by_name(name: str) -> Format:
    """Return the format of that name. Raises KeyError for any other."""
    return {known.name: known for known in FORMATS}[name]


def of_storage(dtype: str) -> Format | None:
    """Return the format that is stored in this dtype, None if it holds no rows or weights."""
    return next((known for known in FORMATS if known.storage == dtype), None)


def of_words(dtype: str) -> Format | None:
    """Return the format of packed weights with elements of this dtype, which may hold several numbers each."""
    return next((known for known in FORMATS if dtype == known.word), of_storage(dtype))


def per_element(dtype: str) -> int:
    """Return how many numbers an element of packed weights holds."""
    found = of_words(dtype)
    return found.per_word if found is not None and dtype == found.word else 1
