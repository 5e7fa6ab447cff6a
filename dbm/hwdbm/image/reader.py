"""Image: stage-2 tables with their registers and memslots, from whatever kind of file."""

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Literal, get_args

import numpy as np

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import flag, instance, integer, one_of
from hwdbm.check import path as check_path
from hwdbm.errors import ImageError
from hwdbm.files import open_regular
from hwdbm.image.capture import Capture, CapturedTables, is_capture
from hwdbm.image.fill import Filler
from hwdbm.image.memory import TableMemory
from hwdbm.image.ram import RamTables, extents_of, kind_of_ram
from hwdbm.image.raw import HEAD, RawTables, check_raw
from hwdbm.image.registers import Registers
from hwdbm.image.runs import RunMarker
from hwdbm.image.slots import Slot, check_page_size, check_slots, cut
from hwdbm.image.walk import Batch, walk
from hwdbm.kernels import Name
from hwdbm.stage2 import Stage2

Policy = Literal["dbm", "writable"]
"""Which leaves count as dirty: DBM = 1 and S2AP[1] = 1; or S2AP[1] = 1 whatever DBM says."""

_POLICIES = get_args(Policy)

Visitor = Callable[[Batch], object]
"""What is called with every batch of a walk."""


class Image:
    """Stage-2 tables, and what they belong to. Nothing is walked before it is asked for.

    Use `open_image` to get one from a file.

    Parameters
    ----------
    memory : TableMemory
        The memory that holds the tables.
    registers : Registers
        The registers that say where the tables are, and their shape.
    slots : iterable of Slot
        The memslots.
    capture : Capture, optional
        The capture that holds the truth, if the file carries it.

    Raises
    ------
    ImageError
        If the registers or the slots can't be.
    """

    def __init__(
        self,
        memory: TableMemory,
        registers: Registers,
        slots: Iterable[Slot],
        capture: Capture | None = None,
    ) -> None:
        instance(memory, TableMemory, "memory")
        instance(registers, Registers, "registers")
        self.memory, self.registers, self.capture = memory, registers, capture
        self.vtcr, self.vttbr = registers.decode()
        self.granule = self.vtcr.granule
        self.slots = check_slots(slots, self.vtcr.ipa_bits)

    def slot(self, number: int) -> Slot:
        """Return the slot with the id `number`.

        Raises
        ------
        ImageError
            If there is none.
        """
        number = integer(number, "a slot's id", low=None)
        for slot in self.slots:
            if slot.id == number:
                return slot
        have = ", ".join(str(slot.id) for slot in self.slots) or "none"
        raise ImageError(f"there is no slot {number} (there are: {have})")

    def read(self, *visitors: Visitor) -> dict[int, int]:
        """Walk and check all tables once, and show each batch of them to each visitor.

        Returns
        -------
        dict of int to int
            Tables read, by level.

        Raises
        ------
        ImageError
            At the first entry that can't be; see `hwdbm.image.walk.walk`.
        """
        for visitor in visitors:
            instance(visitor, Callable, "a visitor")
        tables: dict[int, int] = {}
        large = self.registers.large_blocks(self.vtcr)
        for batch in walk(self.memory, self.vtcr, self.vttbr.baddr, large_blocks=large):
            if not tables:
                self._check_root(batch)
            if isinstance(self.memory, CapturedTables):
                self.memory.check_level(batch)
            tables[batch.level] = tables.get(batch.level, 0) + batch.pa.size
            for visitor in visitors:
                visitor(batch)
        return tables

    def _check_root(self, root: Batch) -> None:
        """Raise if nothing of the slots is mapped by the start level: such tables aren't those of this guest."""
        shift = np.uint64(self.granule.shift(root.level))
        row, column = np.nonzero(root.entries & pte.VALID)
        mapped = (root.ipa[row] >> shift) + column.astype(np.uint64)
        above = [(slot.gpa >> int(shift), slot.end - 1 >> int(shift)) for slot in self.slots]
        if above:
            if any(((mapped >= first) & (mapped <= last)).any() for first, last in above):
                return
            what = "for any of the slots" if len(above) > 1 else f"for slot {self.slots[0].id}"
        elif mapped.size:
            return
        else:
            what = "at all"
        raise ImageError(
            f"the level-{root.level} table at {self.vttbr.baddr:#018x} has no valid descriptor {what}: is VTTBR_EL2 = "
            f"{self.registers.vttbr:#018x} right (--vttbr), and are the slots?"
        )

    def empty_stage2(self, slot: Slot, kernels: Name | None = None) -> Stage2:
        """Return a Stage2 for the slot, in whole granules, with nothing mapped; under `kernels`, if they are given."""
        instance(slot, Slot, "slot")
        first, npages = slot.frames(self.granule)
        return Stage2(npages, base_gfn=first, granule=self.granule, kernels=kernels)

    def stage2(self, slot: int) -> Stage2:
        """Return the leaves of the slot with the id `slot`, in whole granules.

        Raises
        ------
        ImageError
            If there is no such slot, or the tables are corrupt.
        """
        found = self.slot(slot)
        return self._filled([found])[found.id]

    def stage2s(self) -> dict[int, Stage2]:
        """Return the leaves of each slot by its id, from one walk; see `stage2`."""
        return self._filled(self.slots)

    def _filled(self, slots: Iterable[Slot]) -> dict[int, Stage2]:
        fillers = {slot.id: Filler(self.empty_stage2(slot), self.vtcr) for slot in slots}
        self.read(*fillers.values())
        for filler in fillers.values():
            filler.stage2.contiguous = filler.contiguous
        return {number: filler.stage2 for number, filler in fillers.items()}

    def dirty(
        self,
        slot: int,
        policy: Policy = "dbm",
        page_size: int | None = None,
        *,
        contiguous: bool = True,
    ) -> DirtyBitmap:
        """Return the dirty pages of a slot, as they are in the image.

        Parameters
        ----------
        slot : int
            Its id.
        policy : {"dbm", "writable"}
            Which leaves count: those that hardware marked; or all that may be written, which in
            tables kept without DBM are those that were written since they were protected.
        page_size : int, optional
            Bytes that a bit stands for; the granule by default.
        contiguous : bool
            Whether a dirty entry of a contiguous run makes all of the run dirty, as the
            architecture asks of software: hardware may mark any one of it (I_NFFSV). Without it the
            bitmap is what the entries say.

        Raises
        ------
        ImageError
            If there is no such slot, if it isn't made of whole pages of that size, or if the
            tables are corrupt.
        """
        of = self.slot(slot)
        size = check_page_size(of, self.granule, page_size)
        one_of(policy, _POLICIES, "policy", ImageError)
        contiguous = flag(contiguous, "contiguous")
        stage2 = self.empty_stage2(of)
        visitors: list[Visitor] = [Filler(stage2, self.vtcr)]
        runs = RunMarker(of, self.granule, writable=policy == "writable") if contiguous else None
        if runs is not None:
            visitors.append(runs)
        self.read(*visitors)
        return self.bitmap(of, stage2, policy, size, runs)

    def bitmap(
        self,
        slot: Slot,
        stage2: Stage2,
        policy: Policy,
        page_size: int,
        runs: RunMarker | None = None,
    ) -> DirtyBitmap:
        """Return the slot's bitmap from what a walk filled; `dirty` in its second half."""
        instance(slot, Slot, "slot")
        instance(stage2, Stage2, "stage2")
        one_of(policy, _POLICIES, "policy", ImageError)
        page_size = check_page_size(slot, self.granule, integer(page_size, "page_size", low=None))
        if runs is not None:
            instance(runs, RunMarker, "runs")
        if stage2.npages != slot.frames(self.granule)[1]:
            raise ImageError(f"the slot has {slot.frames(self.granule)[1]} pages, and the leaves {stage2.npages}")
        dirty = stage2.writable() if policy == "writable" else stage2.dirty()
        if runs is not None:
            dirty |= runs.bitmap()
        return cut(dirty, slot, self.granule, page_size)

    def truth(self, slot: Slot, policy: Policy = "dbm", *, contiguous: bool = False) -> DirtyBitmap | None:
        """Return what the file itself says is dirty, a bit for each 4 KiB; None if it doesn't.

        Raises
        ------
        ImageError
            If that is of another size than the slot.
        """
        instance(slot, Slot, "slot")
        one_of(policy, _POLICIES, "policy", ImageError)
        contiguous = flag(contiguous, "contiguous")
        if self.capture is None:
            return None
        if policy == "writable":
            return None if contiguous else self._writable_truth(self.capture, slot)
        if contiguous:
            return self.capture.truth("expected_dirty_cont", slot)
        expected = self.capture.truth("expected_dirty", slot)
        return expected if expected is not None else self.capture.truth("dbm_dirty", slot)

    @staticmethod
    def _writable_truth(capture: Capture, slot: Slot) -> DirtyBitmap | None:
        writable = capture.truth("s2w", slot)
        tracked = capture.truth("expected_dirty", slot)
        untracked = capture.truth("nodbm_writable", slot)
        if writable is None and tracked is not None and untracked is not None:
            writable = tracked | untracked
        return writable


def open_image(
    path: str | PathLike[str],
    *,
    ram_base: int | None = None,
    vttbr: int | None = None,
    vtcr: int | None = None,
    slots: Iterable[Slot] | None = None,
    block: str | None = None,
) -> Image:
    """Open a capture (``.npz``), a raw image of RAM, an ELF core, or a migration file of QEMU with mapped-ram.

    Parameters
    ----------
    path : path-like
        The file.
    ram_base : int, optional
        The physical address of a raw image's first byte, or that of `block`. An ELF core says where its memory is.
    vttbr, vtcr : int, optional
        The registers of an image, or in place of a capture's.
    slots : iterable of Slot, optional
        The memslots of an image, or in place of a capture's.
    block : str, optional
        The block of a migration file that is the RAM with the tables.

    Raises
    ------
    OSError
        If the file can't be read.
    ImageError
        If it isn't what it seems, its registers or slots can't be, or something is missing.

    Examples
    --------
    >>> image = open_image("tests/data/captures/4k_blocks/round1.npz")
    >>> image.granule, image.slots
    (<Granule.K4: 12>, (Slot(id=0, gpa=2147483648, size=201326592),))
    >>> image.dirty(0)
    <DirtyBitmap: 24064 of 49152 pages dirty>
    """
    path = check_path(path, "path")
    if block is not None:
        instance(block, str, "block")
    if ram_base is not None:
        ram_base = integer(ram_base, "the RAM's base", high=(1 << 52) - 1, error=ImageError)
    if is_capture(path):
        if block is not None:
            raise ImageError(f"{path} is a capture: a block is for migration files of QEMU only")
        if ram_base is not None:
            raise ImageError(f"{path} is a capture: a RAM base is for raw images only")
        capture = Capture(path)
        values = capture.registers() if vttbr is None or vtcr is None or "regs" in capture else []
        rest = values[2:]
        registers = Registers(values[0] if vttbr is None else vttbr, values[1] if vtcr is None else vtcr, *rest)
        tables = CapturedTables(capture, registers.decode()[0].granule)
        return Image(tables, registers, capture.slots() if slots is None else slots, capture)
    if kind_of_ram(path) != "raw":
        extents_of(path)  # what it is comes before what it needs
        if vttbr is None or vtcr is None:
            raise ImageError(f"{path} is no capture: VTTBR_EL2 and VTCR_EL2 must be given")
        registers = Registers(vttbr, vtcr)
        ram = RamTables(path, registers.decode()[0].granule, ram_base=ram_base, block=block)
        return Image(ram, registers, slots or ())
    if block is not None:
        raise ImageError(f"{path} is no migration file of QEMU: only these have blocks")
    with open_regular(path) as file:
        check_raw(path, file.read(HEAD))
    if ram_base is None or vttbr is None or vtcr is None:
        raise ImageError(
            f"{path} is no capture, and of a raw image the RAM's base, VTTBR_EL2 and VTCR_EL2 must be given"
        )
    registers = Registers(vttbr, vtcr)
    granule = registers.decode()[0].granule
    return Image(RawTables(path, ram_base, granule), registers, slots or ())
