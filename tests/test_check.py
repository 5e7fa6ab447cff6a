"""The checks at the doors: every kind of argument that isn't what it seems."""

import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hwdbm import check


class Index:
    """An object that is an integer to Python."""

    def __index__(self) -> int:
        return 7


class Sub(int):
    """An integer of a class of its own, which says something else."""

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __lt__


@contextmanager
def cheaply() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [7, np.int8(7), np.uint64(7), Index(), Sub(7), np.array(7), np.array(7, ">u2")])
def test_integers_of_every_type_are_plain_ones(value: object) -> None:
    assert type(check.integer(value, "page")) is int
    assert check.integer(value, "page", 7, 7) == 7
    assert check.integers([value, value], "pages", 0, 7).tolist() == [7, 7]


@pytest.mark.parametrize("value", [Sub(-1), Sub(9), np.int64(-1), np.uint64(1 << 63)])
def test_a_bound_holds_for_every_type(value: object) -> None:
    with pytest.raises(ValueError, match="page is 0 to 7"):
        check.integer(value, "page", 0, 7)
    with pytest.raises(ValueError, match="pages is 0 to 7"):
        check.integers([value], "pages", 0, 7)


@pytest.mark.parametrize(
    "value",
    [
        7.0, "7", b"7", True, np.True_, 7j, None, [7], np.array([7]), np.array(7.0), np.array(True),
        np.array(7, dtype=object), np.ma.masked, np.datetime64(7, "s"), np.timedelta64(7, "s"),
    ],
)  # fmt: skip
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(TypeError, match="page is an integer, not"):
        check.integer(value, "page")


@pytest.mark.parametrize(
    "value",
    [
        np.ma.array([1, 10**6], mask=[0, 1]), np.array([1.0]), np.array([True]), np.array([1], dtype=object),
        np.array(["1"]), np.array([1], "M8[s]"), b"\1", bytearray(1), "1", {1: 2}, [True], [1, 2.0], [None], 5, None,
    ],
)  # fmt: skip
def test_what_are_no_integers(value: object) -> None:
    with pytest.raises(TypeError, match="pages are integers, not"):
        check.integers(value, "pages", 0, 10)


@pytest.mark.parametrize(
    "value", [range(2, 9, 3), (2, 5, 8), {2, 5, 8}, iter([2, 5, 8]), np.array([2, 5, 8], ">i2"), memoryview(b"\2\5\10")]
)
def test_integers_come_from_whatever_can_be_counted(value: object) -> None:
    assert sorted(check.integers(value, "pages", 0, 8).tolist()) == [2, 5, 8]


@pytest.mark.parametrize("value", [range(1 << 62), range(-1, 1 << 40), range(1 << 40, -1, -1), itertools.count()])
def test_numbers_out_of_range_are_found_out_before_they_take_memory(value: object) -> None:
    with cheaply(), pytest.raises(ValueError, match="pages is 0 to 99999, not"):
        check.integers(value, "pages", 0, 99_999)


def test_a_range_of_more_than_there_is_memory_for() -> None:
    with cheaply(), pytest.raises(MemoryError, match="pages: 1152921504606846976 numbers take more memory"):
        check.integers(range(1 << 60), "pages", 0, 1 << 60)


@pytest.mark.parametrize("count", [1 << 50, 1 << 61, 1 << 64])
def test_words_of_more_than_there_is_memory_for(count: int) -> None:
    with pytest.raises(MemoryError, match=f"a bitmap: {count} words"):
        check.zeros(count, "a bitmap")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ma.zeros(4, dtype=np.uint64), TypeError), (np.zeros(4, ">u8"), TypeError), (np.zeros(4, "i8"), TypeError),
        (bytes(32), TypeError), (np.zeros(8, np.uint64)[::2], ValueError), (np.zeros((2, 2), np.uint64), ValueError),
        (np.zeros(3, np.uint64), ValueError), (np.zeros((), np.uint64), ValueError),
        (np.zeros(33, np.uint8)[1:].view(np.uint64), ValueError), (np.broadcast_to(np.uint64(0), 4), ValueError),
        (np.frombuffer(bytes(32), np.uint64), ValueError),
    ],
)  # fmt: skip
def test_words_that_compiled_code_may_not_write(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="words"):
        check.uint64s(value, "words", 4, writable=True)


@pytest.mark.parametrize(
    "value",
    [b"abcd", bytearray(b"abcd"), memoryview(b"a-b-c-d-")[::2], np.array([0x6261, 0x6463], "<u2"), np.bytes_(b"abcd")],
)
def test_octets(value: object) -> None:
    assert bytes(check.octets(value, "data")) == b"abcd"


@pytest.mark.parametrize("value", ["abcd", 4, None, [97], np.array(["a"], dtype=object), np.ma.zeros(4, np.uint8)])
def test_what_has_no_octets(value: object) -> None:
    with pytest.raises(TypeError, match="data is bytes-like, not"):
        check.octets(value, "data")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1 << 20, "0x100000"), ((1 << 20) - 1, "1048575"), (-(1 << 20), "-0x100000"), (1 - (1 << 20), "-1048575"),
        (1 << 511, hex(1 << 511)), (1 << 512, "a number of many digits"), (-(1 << 512), "a number of many digits"),
    ],
)  # fmt: skip
def test_a_large_number_is_shown_as_an_address_and_a_huge_one_not_at_all(value: int, said: str) -> None:
    low, high = (0, None) if value < 0 else (None, 7)
    with pytest.raises(ValueError, match=f"page is {'0 or more' if value < 0 else 'at most 7'}, not {said}$"):
        check.integer(value, "page", low, high)


@pytest.mark.parametrize(("size", "said"), [(58, "'" + "x" * 58 + "'"), (59, "'" + "x" * 56 + "...")])
def test_a_long_argument_is_cut(size: int, said: str) -> None:
    with pytest.raises(TypeError) as raised:
        check.integer("x" * size, "size")
    assert str(raised.value) == f"size is an integer, not {said}"
