"""The guests' code is what it says, and the checks of their patterns find a page that is wrong."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm.kvm import PatternError, guest_arm64, guest_x86
from hwdbm.kvm.guest import check_counting, check_random, first_break, shares


def assembled(tool: list[str], objcopy: str, source: str, folder: Path) -> bytes:
    (folder / "a.s").write_text(source)
    subprocess.run([*tool, "-o", "a.o", "a.s"], cwd=folder, check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", "a.o", "a.bin"], cwd=folder, check=True)
    return (folder / "a.bin").read_bytes()


@pytest.mark.parametrize("kind", ["counting", "random"])
def test_the_bytes_are_those_of_the_listing(kind: str, tmp_path: Path) -> None:
    if shutil.which("as") and shutil.which("objcopy"):
        found = assembled(["as", "--32"], "objcopy", guest_x86.LISTING[kind], tmp_path)
        assert found.hex() == guest_x86.CODE[kind].hex()
    if shutil.which("aarch64-linux-gnu-as"):
        found = assembled(["aarch64-linux-gnu-as"], "aarch64-linux-gnu-objcopy", guest_arm64.LISTING[kind], tmp_path)
        assert found.hex() == guest_arm64.CODE[kind].hex()
    assert len(guest_x86.CODE[kind]) < 48
    assert len(guest_arm64.CODE[kind]) < 64


def test_the_address_of_the_iteration_is_in_the_code() -> None:
    address = guest_x86.CODE_GPA + 4096
    assert address.to_bytes(4, "little") in guest_x86.CODE["random"]
    assert re.search(f"{address:#x}", guest_x86.LISTING["random"])


def test_arm64_says_plainly_that_it_does_not_run() -> None:
    task = guest_arm64.Task("counting", 0, 1 << 20, 4096, 0)
    with pytest.raises(NotImplementedError, match="page tables that it needs are not written"):
        guest_arm64.boot(None, task)  # type: ignore[arg-type]


def test_arm64_exits_after_fewer_pages_from_now_on() -> None:
    """x3 is what is left of this time, x4 what the next ones are: registers of 64 bits, in units of 32."""
    registers = {0x6030_0000_0010_0000 + 2 * number: 100 * number for number in range(31)}

    class Vcpu:
        def get_one_reg(self, name: int) -> bytes:
            return registers[name].to_bytes(8, "little")

        def set_one_reg(self, name: int, value: bytes) -> None:
            assert len(value) == 8
            registers[name] = int.from_bytes(value, "little")

    before = dict(registers)
    for chunk, left in ((70, 70), (1 << 40, 70)):
        guest_arm64.set_chunk(Vcpu(), "counting", chunk)  # type: ignore[arg-type]
        there = {name: value for name, value in registers.items() if value != before[name]}
        assert there == {0x6030_0000_0010_0006: left, 0x6030_0000_0010_0008: chunk}
    registers[0x6030_0000_0010_0040] = 0x8000_1234
    assert guest_arm64.at(Vcpu()) == 0x8000_1234  # type: ignore[arg-type]


def counted(npages: int, increments: int) -> np.ndarray:
    """Return what a counting guest leaves after some increments: the slow form, one at a time."""
    counts = [0] * npages
    for number in range(increments):
        counts[number % npages] = (counts[number % npages] + 1) % 256
    return np.array(counts, dtype=np.uint8)


def plainly(counts: np.ndarray) -> bool:
    """Return whether counts can be a counting guest's: the slow form of `first_break`."""
    fallen = False
    for before, after in zip(counts.tolist(), counts.tolist()[1:], strict=False):
        if (before - after) % 256 > 1 or (before != after and fallen):
            return False
        fallen |= before != after
    return True


@pytest.mark.parametrize("npages", [1, 2, 3, 7])
def test_every_moment_of_a_guest_passes(npages: int) -> None:
    for increments in range(0, 520 * npages, 3):
        assert first_break(counted(npages, increments)) is None


@given(st.lists(st.sampled_from([0, 1, 2, 254, 255]), min_size=1, max_size=8))
def test_first_break_is_the_slow_form(counts: list[int]) -> None:
    given_ = np.array(counts, dtype=np.uint8)
    bad = first_break(given_)
    assert (bad is None) == plainly(given_)
    if bad is not None:  # it is the first
        assert plainly(given_[:bad])
        assert not plainly(given_[: bad + 1])


@pytest.mark.parametrize("lost", [0, 1, 99, 150, 199])
def test_a_lost_page_is_found(lost: int) -> None:
    """Mutant: one page arrives as it was a round earlier. Where the count falls just there, it can't be told."""
    memory = np.zeros((200, 4096), dtype=np.uint8)
    memory[:, 0] = counted(200, 200 * 300 + 100)
    check_counting(memory.reshape(-1), 4096)
    for rounds in (1, 2, 255):
        wrong = memory.copy()
        wrong[lost, 0] = (int(wrong[lost, 0]) - rounds) % 256
        if lost == 99 and rounds == 1:  # the last that was counted: its page could be the next
            check_counting(wrong.reshape(-1), 4096)
            continue
        with pytest.raises(PatternError, match=r"page \d+ counts \d+ after page"):
            check_counting(wrong.reshape(-1), 4096)


def test_each_vcpu_has_its_share() -> None:
    assert shares(7, 2) == [(0, 3), (3, 4)]
    memory = np.zeros((7, 16), dtype=np.uint8)
    memory[:, 0] = [9, 9, 8, 40, 40, 39, 39]
    check_counting(memory.reshape(-1), 16, vcpus=2)
    with pytest.raises(PatternError, match="page 3 counts 40 after page 2's 8"):
        check_counting(memory.reshape(-1), 16)
    memory[5, 0] = 41
    with pytest.raises(PatternError, match="page 5 counts 41 after page 4's 40"):
        check_counting(memory.reshape(-1), 16, vcpus=2)


def test_no_page_is_of_an_iteration_to_come() -> None:
    memory = np.zeros((5, 4096), dtype=np.uint8)
    memory[3, :2] = (0x02, 0x01)
    check_random(memory.reshape(-1), 4096, 0x102)
    with pytest.raises(PatternError, match="page 3 is of iteration 258, and this is iteration 257"):
        check_random(memory.reshape(-1), 4096, 0x101)
