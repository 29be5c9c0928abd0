"""The cost of a model on a machine, as an artifact keeps it: a frozen record in the manifest, by the machine's name."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from turbo_tvm.artifact.strict_json import wrong_field


@dataclass(frozen=True)
class CostSpec:
    """A fitted cost; `cost_model` says how the figures are used."""

    kind: Literal["packed", "padded"]
    # packed: seconds fixed, per sequence, per squared length, then per token in each interval between the knots
    terms: tuple[float, ...] = ()
    knots: tuple[int, ...] = ()  # packed: tokens of a batch
    lengths: tuple[int, ...] = ()  # padded: tokens of the longest sequence, the table's rows
    batches: tuple[int, ...] = ()  # padded: sequences, the table's columns
    seconds: tuple[tuple[float, ...], ...] = ()  # padded: the table
    error: float = 0.0  # the mean relative error on held-out batches
    points: int = 0  # measured batches


def check_cost(spec: CostSpec, where: str) -> None:
    """Raise ArtifactError if the figures are no cost: of the wrong number, out of order or not positive."""
    for name in ("knots", "lengths", "batches"):
        values = getattr(spec, name)
        if any(a >= b for a, b in pairwise((0, *values))):
            raise wrong_field(f"{where}.{name}", "increasing whole numbers from 1", values)
    if spec.kind == "packed":
        if len(spec.terms) != len(spec.knots) + 4:
            raise wrong_field(f"{where}.terms", f"{len(spec.knots) + 4} numbers", spec.terms)
        if min(spec.terms) < 0 or not sum(spec.terms[:4]) > 0:  # or a token would cost nothing
            raise wrong_field(f"{where}.terms", "seconds from 0, not all of the first four 0", spec.terms)
        return
    if min(len(spec.lengths), len(spec.batches)) < 2:
        raise wrong_field(where, "a table of at least two lengths and two batches", (spec.lengths, spec.batches))
    shape = [len(row) for row in spec.seconds]
    if shape != [len(spec.batches)] * len(spec.lengths):
        raise wrong_field(f"{where}.seconds", f"{len(spec.lengths)} rows of {len(spec.batches)}", shape)
    if not all(0 < value < math.inf for row in spec.seconds for value in row):
        raise wrong_field(f"{where}.seconds", "seconds above 0", spec.seconds)
