"""The destination: frames into memory, and the VM's start."""

import contextlib
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwdbm.memslot import slot_name
from hwdbm.migration.channel import Channel
from hwdbm.migration.errors import DigestError, LayoutError, StreamError
from hwdbm.migration.staging import Shared
from hwdbm.migration.wire import (
    ACK,
    LIMITS,
    PASS,
    PAYLOAD,
    PROVING,
    RUN_SIZE,
    RUNNING,
    SHARING,
    VERIFIED,
    VERSION,
    Head,
    Kind,
    crc32,
)
from hwdbm.vm.memory import populate
from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.source import Provable, Source

__all__ = ["Received", "receive"]

_DIRECT_RUNS = 4  # runs of a frame up to which each is received where it belongs, without a copy in between


@dataclass(slots=True)
class Received:
    """What arrived.

    Parameters
    ----------
    destination : Source
        The VM, running if it ran at the source.
    transferred : int
        Bytes received.
    passes : int
        Passes.
    normal, duplicate : int
        Pages that came with bytes, and as zero.
    sha256 : str
        The digest of all memory, in hexadecimal; empty if the source didn't ask for it.
    proved : bool, optional
        Whether the guest was found to go on right; None if nobody asked.
    """

    destination: Source
    transferred: int = 0
    passes: int = 0
    normal: int = 0
    duplicate: int = 0
    sha256: str = ""
    proved: bool | None = None


def receive(
    channel: Channel, build: Callable[[MemoryMap], Source], *, most_memory: int | None = None, populated: bool = False
) -> Received:
    """Receive a VM, and let it run.

    Parameters
    ----------
    channel : Channel
        Where it comes from. It is left open.
    build : callable
        Returns the VM, paused, for a layout; or raises `LayoutError` where it has another. The VM is closed if the
        migration fails.
    most_memory : int, optional
        Bytes of guest memory at most; more is refused before any is allocated.
    populated : bool
        Whether what `build` returns has its memory already: it needs no pages from the system first.

    Returns
    -------
    Received
        The VM. Every page that arrived is marked imported, and so is dirty there.

    Raises
    ------
    StreamError
        If the stream is damaged, or ends, or the other side gave up (`PeerError`), or the memory differs
        (`DigestError`). The other side is told why.
    OSError
        If there is no memory, or no room in the file behind it. The other side is told that, too.
    """
    try:
        return _Receiver(channel, build, most_memory, populated=populated).run()
    except (Exception, KeyboardInterrupt) as error:
        channel.fail(f"{error}" or type(error).__name__)
        raise


class _Receiver:
    def __init__(
        self, channel: Channel, build: Callable[[MemoryMap], Source], most_memory: int | None, *, populated: bool
    ) -> None:
        self._channel, self._build, self._most_memory = channel, build, most_memory
        self._populated = populated
        self._stage = np.zeros(PAYLOAD, dtype=np.uint8)
        self._shared: Shared | None = None
        self._pages = [0, 0]  # normal and zero, of this pass

    def run(self) -> Received:
        layout, flags = self._hello(self._channel.expect(Kind.HELLO, descriptors=True))
        with ExitStack() as stack:
            if flags & SHARING:
                self._shared = stack.enter_context(Shared(self._channel.descriptors()))
            return self._receive(layout, flags)

    def _receive(self, layout: MemoryMap, flags: int) -> Received:
        vm = self._build(layout)
        try:
            MemoryMap.of(vm).require(layout)
            if not self._populated:
                for slot in vm.slots:
                    populate(vm.memory(slot.id))
            self._layout, self._vm = layout, vm
            self._rows = {slot.id: vm.memory(slot.id).reshape(-1, layout.page_size) for slot in vm.slots}
            self._got = Received(vm)
            # A byte a page, since setting bits one by one is slow.
            self._came = {slot.id: np.zeros(slot.npages, dtype=np.bool_) for slot in vm.slots}
            self._channel.send(Kind.READY)
            while not self._pass():
                pass
            self._take_over(flags)
        except BaseException:
            with contextlib.suppress(OSError):
                vm.close()
            raise
        self._got.transferred = self._channel.received
        return self._got

    def _hello(self, body: bytes) -> tuple[MemoryMap, int]:
        if len(body) < 8:
            raise StreamError(f"a HELLO of {len(body)} bytes has no version")
        version, flags = struct.unpack_from("<II", body)
        if version != VERSION:
            raise StreamError(f"the stream is of version {version}, and this side knows {VERSION}")
        layout = MemoryMap.from_bytes(body[8:])
        if self._most_memory is not None and layout.total > self._most_memory:
            raise LayoutError(
                f"{layout.total} bytes of guest memory are more than the {self._most_memory} allowed here"
            )
        return layout, flags

    # --- passes --------------------------------------------------------------------------------------------

    def _pass(self) -> bool:
        """Receive a pass; return whether it was the last."""
        self._pages = [0, 0]
        while True:
            head = self._channel.head()
            if head.kind is Kind.PAGES:
                self._receive_pages(head)
            elif head.kind is Kind.SHARED:
                self._receive_shared(head)
            elif head.kind is Kind.ZERO:
                self._receive_zeros(head)
            elif head.kind is Kind.PASS:
                break
            else:
                raise StreamError(f"frame {head.sequence} is {head.kind.name}, inside of a pass")
        number, last, normal, zero = self._channel.unpack(PASS, self._channel.body(head))
        if number != self._got.passes + 1:
            raise StreamError(f"pass {number} ends, and pass {self._got.passes + 1} was due")
        if [normal, zero] != self._pages:
            raise StreamError(f"pass {number} had {normal} pages and {zero} zero ones, and {self._pages} came")
        self._got.passes = number
        self._got.normal += normal
        self._got.duplicate += zero
        self._channel.send(Kind.ACK, ACK.pack(number))
        return bool(last)

    def _receive_pages(self, head: Head) -> None:
        table = bytearray(head.runs * RUN_SIZE)
        self._channel.read(memoryview(table))
        slot_id, runs, npages = self._runs(table)
        size = self._layout.page_size
        payload = head.length - len(table)
        if npages * size != payload or payload > PAYLOAD:
            raise StreamError(f"frame {head.sequence}: {payload} bytes are not the runs' {npages} pages")
        rows, crc = self._rows[slot_id], crc32(table)
        if len(runs) <= _DIRECT_RUNS:
            for first, count in runs.tolist():
                part = rows[first : first + count].reshape(-1).data
                self._channel.read(part)
                crc = crc32(part, crc)
                self._came[slot_id][first : first + count] = True
            self._channel.end(head, crc)
        else:  # one call, and one copy in the cache, cost less than a buffer for each run
            stage = self._stage[:payload]
            self._channel.read(stage.data)
            self._channel.end(head, crc32(stage, crc))
            self._store(slot_id, runs, stage.reshape(npages, size))
        self._pages[0] += npages

    def _receive_shared(self, head: Head) -> None:
        table = self._channel.body(head, check=False)
        if self._shared is None:
            raise StreamError(f"frame {head.sequence} is SHARED, and no memory is")
        if len(table) != head.runs * RUN_SIZE:
            raise StreamError(f"frame {head.sequence}, SHARED: {len(table)} bytes are not {head.runs} runs")
        slot_id, runs, npages = self._runs(table)
        size = self._layout.page_size
        if npages * size > PAYLOAD:
            raise StreamError(f"frame {head.sequence}: the runs' {npages} pages are more than {PAYLOAD} bytes")
        payload = self._shared.payload(npages * size)
        self._channel.end(head, crc32(payload, crc32(table)), beside=payload.nbytes)
        self._store(slot_id, runs, payload.reshape(npages, size))
        self._shared.done()
        self._pages[0] += npages

    def _store(self, slot_id: int, runs: NDArray[np.int64], pages: NDArray[np.uint8]) -> None:
        at = slice(runs[0, 0], runs[0, 0] + len(pages)) if len(runs) == 1 else _index(runs, len(pages))
        self._rows[slot_id][at] = pages
        self._came[slot_id][at] = True

    def _receive_zeros(self, head: Head) -> None:
        table = self._channel.body(head)
        if len(table) != head.runs * RUN_SIZE:
            raise StreamError(f"frame {head.sequence}, ZERO: {len(table)} bytes are not {head.runs} runs")
        slot_id, runs, npages = self._runs(table)
        rows = self._rows[slot_id]
        for first, count in runs.tolist():
            rows[first : first + count] = 0
            self._came[slot_id][first : first + count] = True
        self._pages[1] += npages

    def _runs(self, table: bytes | bytearray) -> tuple[int, NDArray[np.int64], int]:
        """Return the slot of a table's runs, the page runs, all inside of it, and how many pages they have."""
        if not table:
            raise StreamError("a frame of pages has no runs")
        rows = np.frombuffer(table, dtype="<u8").reshape(-1, 2)
        slot, runs = self._layout.find(rows[:, 0], rows[:, 1])
        return slot.id, runs, int(np.add.reduce(runs[:, 1]))

    # --- the handover --------------------------------------------------------------------------------------

    def _take_over(self, flags: int) -> None:
        """Take the state, prove the memory, and run when told to."""
        self._check_complete()
        state = self._channel.expect(Kind.STATE)
        try:
            self._vm.set_state(state)
        except ValueError as error:
            raise StreamError(f"the state doesn't fit: {error}") from error
        self._import()
        if flags & VERIFIED:
            self._channel.expect(Kind.VERIFY)
            self._got.sha256 = self._vm.digest()
            self._channel.send(Kind.DIGEST, bytes.fromhex(self._got.sha256))
        theirs = self._channel.expect(Kind.GO).hex()
        if theirs != self._got.sha256:
            raise DigestError(f"SHA-256 {self._got.sha256 or 'not asked for'} here, {theirs or 'none'} at the source")
        # Said before it is done: whoever can't say it any more doesn't run, and the source may.
        self._channel.send(Kind.RESUMED)
        if flags & RUNNING:
            self._vm.resume()
        if flags & PROVING:
            wrong = self._prove()
            self._got.proved = not wrong
            with contextlib.suppress(StreamError):  # the VM is here, and runs, whether the source hears of it or not
                self._channel.send(Kind.PROVED, wrong.encode()[: LIMITS[Kind.PROVED]])

    def _prove(self) -> str:
        """Return what is wrong with the guest, which runs."""
        if not isinstance(self._vm, Provable):
            return "it is memory, and doesn't run"
        try:
            self._vm.prove()
        except Exception as error:  # noqa: BLE001  # whatever it is, this VM is the only one, and isn't given up for it
            return str(error) or type(error).__name__
        return ""

    def _check_complete(self) -> None:
        for slot in self._layout.slots:
            missing = slot.npages - int(self._came[slot.id].sum())
            if missing:
                raise StreamError(f"{missing} of the {slot.npages} pages of {slot_name(slot.id)} never came")

    def _import(self) -> None:
        # They all came: one range a slot, whatever the order was.
        for slot in self._layout.slots:
            self._vm.mark_imported(slot.id, 0, slot.npages)


def _index(runs: NDArray[np.int64], npages: int) -> NDArray[np.int64]:
    """Return the page numbers of runs, `npages` in all, in order."""
    if len(runs) == npages:
        return runs[:, 0]
    before = np.cumsum(runs[:, 1]) - runs[:, 1]
    return np.repeat(runs[:, 0] - before, runs[:, 1]) + np.arange(npages)
