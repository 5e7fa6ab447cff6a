"""What an Arm machine is made of, by its numbers: which leaves map memory, which guest has which part of it."""

from types import SimpleNamespace

import pytest

from hwdbm import Granule, pte
from hwdbm.arm import vm
from hwdbm.arm.abi import GuestKind

G = 1 << 30
BLOCK = {Granule.K4: 2 << 20, Granule.K16: 32 << 20, Granule.K64: 512 << 20}


@pytest.mark.parametrize("granule", Granule)
@pytest.mark.parametrize("parts", [(0, 0, 5), (0, 1, 0), (0, 3, 0), (4, 0, 0), (7, 2, 9), (1, 1, 0)])
def test_memory_is_mapped_by_blocks_where_they_fit(granule, parts):
    """Parts are pages before 2 GiB, blocks from there on, and pages after them."""
    pages, block = granule.page_size, BLOCK[granule]
    at, want = 2 * G - parts[0] * pages, []
    for count, size, level in zip(parts, (pages, block, pages), (3, 2, 3), strict=True):
        if count:
            want.append((at, at + 64 * G, count * size, level, pte.make_leaf(0, level)))
            at += count * size
    found = vm._mapped(want[0][0], want[0][1], at - want[0][0], granule)
    assert [(each.ipa, each.pa, each.size, each.level, each.bits) for each in found] == want


def test_guests_by_name():
    assert vm._kinds("random", 2) == [GuestKind.RANDOM] * 2
    assert vm._kinds(["zero", "pairs"], 3) == [GuestKind.ZERO, GuestKind.PAIRS, GuestKind.ZERO]
    assert vm._kinds("mixed", 8) == [*list(GuestKind)[1:], GuestKind.SEQUENTIAL]
    for wrong, said in (
        ("nobody", "a guest is one of idle, sequential, .* or mixed, not 'nobody'"),
        ([], "a guest or"),
    ):
        with pytest.raises(ValueError, match=said):
            vm._kinds(wrong, 1)


def test_each_guest_has_all_memory_or_a_part_of_its_own():
    both = [GuestKind.RANDOM, GuestKind.STAGE1]
    found = vm._work([GuestKind.RANDOM] * 2, 3 * G, 1024, 4096, 7, 9)
    assert [(each.base, each.size, each.window, each.seed) for each in found] == [(3 * G, 4 << 20, 7, 9)] * 2
    found = vm._work(both, 3 * G, 1025, 4096, 7, 9)
    assert [(each.kind, each.base, each.size) for each in found] == [
        (GuestKind.RANDOM, 3 * G, 2 << 20), (GuestKind.STAGE1, 3 * G + (2 << 20), 2 << 20),
    ]  # fmt: skip
    for base, npages in ((2 * G, 128), (3 * G, 128), (4 * G - (1 << 20), 256)):  # the least, and the last there is
        assert vm._work(both, base, npages, 4096, 1, 1)
    for base, npages in (
        (2 * G - (1 << 19), 128),
        (3 * G, 126),
        (4 * G - (1 << 20), 258),
        (4 * G, 128),
        (2 * G + (1 << 20), 1 << 19),
    ):
        with pytest.raises(ValueError, match=r"a guest with a stage 1 of its own has 256K or more, in one GiB"):
            vm._work(both, base, npages, 4096, 1, 1)


@pytest.mark.parametrize(
    ("kinds", "idle"), [(["IDLE"], True), (["IDLE", "IDLE"], True), (["RANDOM"], False), (["IDLE", "ZERO"], False)]
)
def test_a_machine_is_idle_where_all_of_its_guests_are(kinds, idle, monkeypatch):
    asked = []
    monkeypatch.setattr(vm, "prove", lambda _vm, _look, *, idle: asked.append(idle))
    made = object.__new__(vm.ArmVm)
    made._closed = False
    made.guests = SimpleNamespace(tasks=[SimpleNamespace(kind=GuestKind[kind]) for kind in kinds])
    monkeypatch.setattr(made, "_check_open", lambda: None)
    made.prove()
    made._closed = True
    assert asked == [idle]
