"""Which combinations of parameters the quick tests take: enough for every value of every parameter to occur.

The method is each-choice coverage (Ammann and Offutt, Introduction to Software Testing, chapter on input domains). A
kernel that is wrong for a value is found by it; one that is wrong for a pair of values alone is left to
`scripts/test --all`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import pytest


def each_choice(combinations: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the places of combinations that together have every value, each chosen for the most values that lack.

    combinations: the values of parameters, as text, by name.
    """
    lacking = {value for combination in combinations for value in combination.items()}
    chosen: list[int] = []
    while lacking:
        gains = [len(lacking & combination.items()) for combination in combinations]
        best = gains.index(max(gains))
        chosen.append(best)
        lacking -= combinations[best].items()
    return sorted(chosen)


def mark_the_others_slow(items: Iterable[pytest.Item]) -> None:
    """Mark tests slow whose values of parameters occur in other tests of the same function."""
    with_parameters = [item for item in items if hasattr(item, "callspec")]
    for _, tests in groupby(with_parameters, lambda item: item.nodeid.split("[")[0]):
        candidates: list[Any] = [test for test in tests if not test.get_closest_marker("slow")]
        kept = {candidates[place] for place in each_choice([_values(test) for test in candidates])}
        for test in candidates:
            if test not in kept:
                test.add_marker(pytest.mark.slow)


def _values(test: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in test.callspec.params.items()}
