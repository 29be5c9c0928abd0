from dataclasses import dataclass

from suite_weight import seconds_by_folder


@dataclass
class Report:
    nodeid: str
    when: str
    duration: float


def test_phases_of_a_test_are_added_up_per_folder_and_the_heaviest_is_first() -> None:
    reports = [
        Report("tests/passes/test_a.py::test_one[x/y]", "setup", 0.5),
        Report("tests/passes/test_a.py::test_one[x/y]", "call", 1.0),
        Report("tests/schedules/cpu/test_b.py::test_two", "call", 4.0),
        Report("tests/schedules/cuda/test_c.py::test_three", "call", 2.0),
        Report("tests/test_config.py::test_four", "call", 0.25),
    ]

    assert seconds_by_folder(reports) == [("tests/schedules", 2, 6.0), ("tests/passes", 1, 1.5), ("tests", 1, 0.25)]
