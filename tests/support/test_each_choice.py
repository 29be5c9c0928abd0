"""Every value of a sweep stays among the quick tests, and no more tests than that takes."""

from __future__ import annotations

import itertools

from each_choice import each_choice
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(SIZES, st.data())
def test_every_value_occurs_whichever_combinations_there_are(sizes, data):
    product = [dict(enumerate(values)) for values in itertools.product(*map(range, sizes))]
    some = data.draw(st.lists(st.sampled_from(product), min_size=1, unique_by=str))
    combinations = [{str(name): str(value) for name, value in one.items()} for one in some]
    chosen = each_choice(combinations)
    values = {value for one in combinations for value in one.items()}
    assert {value for place in chosen for value in combinations[place].items()} == values
    for left_out in chosen:  # each has a value that no one before it had, so none repeats another
        assert combinations[left_out] not in [combinations[other] for other in chosen if other != left_out]


@given(SIZES)
def test_a_product_needs_as_many_as_its_longest_parameter_has_values(sizes):
    names = [str(number) for number in range(len(sizes))]
    product = [dict(zip(names, map(str, values), strict=True)) for values in itertools.product(*map(range, sizes))]
    assert len(each_choice(product)) == max(sizes)


def test_no_parameters_need_one_test_at_most():
    assert each_choice([]) == [] and each_choice([{}]) == []
