"""Points that are alike: which of them `make test` runs."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest


@dataclass
class Point:
    """As much of a test as is looked at."""

    nodeid: str
    each: int
    marks: set[str] = field(default_factory=set)

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        if name == "alike":
            return SimpleNamespace(args=(self.each,)) if self.each else None
        return SimpleNamespace() if name in self.marks else None

    def add_marker(self, name: str) -> None:
        self.marks.add(name)


@pytest.mark.parametrize("each", [2, 3, 4, 5])
def test_one_of_so_many_stays(each: int, pytestconfig: pytest.Config) -> None:
    """The first of each test, and of those that follow as many of any kind of two or three parameters."""
    (conftest,) = (one for one in pytestconfig.pluginmanager.get_plugins() if hasattr(one, "GOLDEN"))
    points = [Point(f"a.py::test[{number}]", each) for number in range(120)]
    others = [Point("a.py::other[0]", each, {"slow"}), Point("a.py::other[1]", each), Point("a.py::third", 0)]
    conftest.pytest_collection_modifyitems([*points[:5], *others, *points[5:]])
    kept = [number for number, point in enumerate(points) if not point.marks]
    assert kept[0] == 0
    assert abs(len(kept) - 120 / each) <= 1
    for kinds in (2, 3):
        found = [sum(number % kinds == kind for number in kept) for kind in range(kinds)]
        assert min(found) >= 0.6 * len(kept) / kinds, found
    assert [sorted(point.marks) for point in others] == [["slow"], [], []]
