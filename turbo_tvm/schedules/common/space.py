"""What a schedule leaves open: knobs, the space of their settings, and variants of a kernel by the number of rows.

A knob is a decision that changes the speed of a kernel and nothing else: how much is unrolled, how far a prefetch is
ahead, how work is cut for the threads. A family of kernels declares its knobs beside its schedule, in `space`; a tuner
tries settings; and a kernel is built in `Variant`s, each of which runs for batches of up to so many rows.

The word is AutoTVM's: Chen et al., "Learning to Optimize Tensor Programs" (arXiv 1805.08166).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tvm.ir import Expr
from tvm.script import tirx as T

Setting = Mapping[str, int]
Macro = Callable[..., None]


@dataclass(frozen=True)
class Knob:
    """A decision that a schedule leaves open."""

    name: str
    values: tuple[int, ...]  # that it may have, in order
    default: int  # the one that the schedule takes by itself
    about: str  # for who reads a log

    def __post_init__(self) -> None:
        if self.default not in self.values:
            raise ValueError(f"knob {self.name}: its default {self.default} is none of its values {self.values}")


def _anything(_: Setting) -> bool:
    """Allow every setting."""
    return True


@dataclass(frozen=True)
class Space:
    """All settings of some knobs that `valid` allows; the default is one of them."""

    knobs: tuple[Knob, ...] = ()
    valid: Callable[[Setting], bool] = field(default=_anything, compare=False)  # of complete settings

    @property
    def default(self) -> dict[str, int]:
        """The setting that the schedule has by itself."""
        return {knob.name: knob.default for knob in self.knobs}

    @property
    def most(self) -> int:
        """How many settings there are at most."""
        return math.prod(len(knob.values) for knob in self.knobs)

    def settings(self) -> Iterator[dict[str, int]]:
        """Yield every setting."""
        names = [knob.name for knob in self.knobs]
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            setting = dict(zip(names, values, strict=True))
            if self.valid(setting):
                yield setting

    def complete(self, setting: Setting) -> dict[str, int]:
        """Return the setting with defaults for what it leaves open. ValueError for one that is not in the space."""
        values = {knob.name: knob.values for knob in self.knobs}
        for name, value in setting.items():
            if name not in values:
                raise ValueError(f"there is no knob {name!r}; there are {', '.join(values) or 'none'}")
            if value not in values[name]:
                raise ValueError(f"knob {name} cannot be {value!r}; it is one of {', '.join(map(str, values[name]))}")
        complete = {**self.default, **setting}
        if not self.valid(complete):
            raise ValueError(f"the setting {complete} does not fit this kernel")
        return complete

    def features(self, setting: Setting) -> list[float]:
        """Return a number per knob for a model of costs: which of its values it has, in their order."""
        return [float(knob.values.index(setting[knob.name])) for knob in self.knobs]


@dataclass(frozen=True)
class Variant:
    """A setting for batches of up to so many rows."""

    setting: tuple[tuple[str, int], ...] = ()  # (knob, value)
    max_rows: int | None = None  # None: all that are larger


def checked(variants: Sequence[Variant], space: Space) -> list[tuple[dict[str, int], int | None]]:
    """Return (complete setting, most rows) per variant, the default alone where there are none.

    ValueError unless the bounds ascend and the last one is None.
    """
    bounds = [variant.max_rows for variant in variants] or [None]
    known = [bound for bound in bounds[:-1] if bound is not None]
    if len(known) < len(bounds) - 1 or bounds[-1] is not None or known != sorted(set(known)):
        raise ValueError(f"variants for batches of up to {bounds} rows: bounds must ascend, the last one is None")
    settings = [space.complete(dict(variant.setting)) for variant in variants] or [space.default]
    return list(zip(settings, bounds, strict=True))


def by_rows(variants: Sequence[Variant], space: Space, row_tile: int, body: Callable[[dict[str, int]], Macro]) -> Macro:
    """Return `run(t, operands)`: the body of the variant for a batch of t row tiles.

    body: makes the macro `run(t, operands)` of a setting. A setting that several variants share has its code once.
    """
    ranges: dict[tuple[tuple[str, int], ...], list[tuple[int, int | None]]] = {}
    after = 0
    for setting, bound in checked(variants, space):
        most = None if bound is None else bound // row_tile
        ranges.setdefault(tuple(setting.items()), []).append((after, most))
        after = after if most is None else most
    # the last one needs no test
    ordered = sorted(ranges.items(), key=lambda item: item[1][-1][1] is None)
    bodies = [body(dict(setting)) for setting, _ in ordered]
    conditions = [spans for _, spans in ordered]

    @T.inline
    def choose(i, again, t, operands):
        if i + 1 == len(bodies):
            bodies[i](t, operands)
        else:
            if _within(t, conditions[i]):
                bodies[i](t, operands)
            else:
                again(i + 1, again, t, operands)

    @T.inline
    def run(t: Expr, operands):
        choose(0, choose, t, operands)

    return run


def _within(t: Expr, spans: Sequence[tuple[int, int | None]]) -> Expr:
    """Say whether t lies in one of the spans (after, up to)."""
    tests = [t <= most if after == 0 else T.And(t > after, t <= most) for after, most in spans]
    return functools.reduce(T.Or, tests)
