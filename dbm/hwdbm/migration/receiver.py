"""The destination: frames into memory, and the VM's start."""

import contextlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import DigestError, LayoutError, StreamError, in_words
from hwdbm.memslot import slot_name
from hwdbm.migration.channel import Channel
from hwdbm.migration.precopy import kind_of
from hwdbm.migration.staging import SharedMemory
from hwdbm.migration.wire import (
    ACK,
    LIMITS,
    PASS,
    PAYLOAD,
    PROVING,
    READY,
    RUN_SIZE,
    RUNNING,
    SHARING,
    VERIFIED,
    Head,
    Hello,
    Kind,
    crc32,
)
from hwdbm.vm import Durable, MemoryMap, PlainGuest, Provable, Source
from hwdbm.vm.memory import populate

_DIRECT_RUNS = 4  # runs of a frame up to which each is received where it belongs, without a copy in between


@dataclass(slots=True)
class Received:
    """The VM that arrived, and counts.

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
        Whether the guest was checked and found to run correctly; None without a check.
    told : bool
        Whether the source could be told that the guest runs here. If not, it stays paused there.
    """

    destination: Source
    transferred: int = 0
    passes: int = 0
    normal: int = 0
    duplicate: int = 0
    sha256: str = ""
    proved: bool | None = None
    told: bool = True


def receive(
    channel: Channel, build: Callable[[MemoryMap], Source], *, most_memory: int | None = None, populated: bool = False
) -> Received:
    """Receive a VM, and let it run.

    Parameters
    ----------
    channel : Channel
        The channel to the source. It is left open.
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
    if not isinstance(channel, Channel):
        raise TypeError(f"channel is a Channel, not {channel!r}")
    if not callable(build):
        raise TypeError(f"build is a function of a layout, not {build!r}")
    if most_memory is not None:
        most_memory = check.integer(most_memory, "most_memory")
    receiver = _Receiver(channel, build, most_memory, populated=check.flag(populated, "populated"))
    try:
        return receiver.run()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if receiver.stands:
            channel.fail(in_words(error))
        raise


class _Receiver:
    def __init__(
        self, channel: Channel, build: Callable[[MemoryMap], Source], most_memory: int | None, *, populated: bool
    ) -> None:
        self._channel, self._build, self._most_memory = channel, build, most_memory
        self._populated = populated
        self._stage = np.zeros(PAYLOAD, dtype=np.uint8)
        self._shared: SharedMemory | None = None
        self._arrived = False  # whether the guest runs here
        self.stands = True  # whether it is certain that no guest runs here: what the source takes an ERROR for

    def run(self) -> Received:
        hello = Hello.from_bytes(self._channel.expect(Kind.HELLO, descriptors=True))
        if self._most_memory is not None and hello.layout.total > self._most_memory:
            raise LayoutError(
                f"{hello.layout.total} bytes of guest memory are more than the {self._most_memory} allowed here"
            )
        with ExitStack() as stack:
            # Something between the sides that only passes bytes on loses the descriptors: then it goes without.
            if hello.flags & SHARING and (offered := self._channel.descriptors()):
                self._shared = stack.enter_context(SharedMemory(offered))
            return self._receive(hello)

    def _receive(self, hello: Hello) -> Received:
        with self._channel.alive():
            vm = self._build(hello.layout)
        try:
            self._prepare(vm, hello)
            self._ready()
            while not self._pass():
                pass
            self._take_over(hello.flags)
        except BaseException:
            self._put_away(vm)
            raise
        self._got.transferred = self._channel.received
        return self._got

    def _prepare(self, vm: Source, hello: Hello) -> None:
        layout = hello.layout
        MemoryMap.of(vm).require(layout)
        if isinstance(vm, PlainGuest):  # it runs nothing, and keeps any state
            vm.kind = hello.vm or vm.kind
        elif hello.vm and kind_of(vm) and hello.vm != kind_of(vm):
            raise LayoutError(f"the source is a VM of kind {hello.vm!r}, which doesn't fit into one of {kind_of(vm)!r}")
        if not self._populated:
            with self._channel.alive():
                for slot in vm.slots:
                    populate(vm.memory(slot.id))
        self._layout, self._vm = layout, vm
        self._rows = {slot.id: vm.memory(slot.id).reshape(-1, layout.page_size) for slot in vm.slots}
        self._got = Received(vm)
        # A byte a page, since setting bits one by one is slow.
        self._came = {slot.id: np.zeros(slot.npages, dtype=np.bool_) for slot in vm.slots}

    def _ready(self) -> None:
        """Say READY; with it goes a descriptor by which a source on this machine sees that this process is gone."""
        body = READY.pack(0 if self._shared is None else SHARING)
        if not self._channel.local or not hasattr(os, "pidfd_open"):
            self._channel.send(Kind.READY, body)
            return
        fd = os.pidfd_open(os.getpid())
        try:
            self._channel.send(Kind.READY, body, descriptors=[fd])
        finally:
            os.close(fd)

    def _put_away(self, vm: Source) -> None:
        """Close what was built; if it may have begun to run, see that it stands, or else say nothing to the source."""
        if self._arrived:  # an interrupt, say: it ran, and the source must not take an ERROR for the opposite
            vm.close()
            return
        started, self.stands = not self.stands, False
        if started:
            vm.pause()
        with contextlib.nullcontext() if started else contextlib.suppress(OSError):
            vm.close()
        self.stands = True

    # --- passes --------------------------------------------------------------------------------------------

    def _pass(self) -> bool:
        """Receive a pass; return whether it was the last."""
        self._pages = [0, 0]  # normal and zero
        while True:
            self._channel.keep_alive()
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
        at = _place(runs, len(pages))
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
            with self._channel.alive():
                self._got.sha256 = self._vm.digest()
            self._channel.send(Kind.DIGEST, bytes.fromhex(self._got.sha256))
        theirs = self._channel.expect(Kind.GO).hex()
        if theirs != self._got.sha256:
            raise DigestError(f"SHA-256 {self._got.sha256 or 'not asked for'} here, {theirs or 'none'} at the source")
        if isinstance(self._vm, Durable):
            self._vm.commit()
        if flags & RUNNING:
            self.stands = False
            self._vm.resume()
            self._arrived = True  # whether the source hears of it or not
        try:
            self._channel.send(Kind.RESUMED)
        except StreamError:
            self._got.told = False
        if flags & PROVING:
            with self._channel.alive():
                wrong = self._prove()
            self._got.proved = not wrong
            with contextlib.suppress(StreamError):
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


def _place(runs: NDArray[np.int64], npages: int) -> slice | NDArray[np.int64]:
    """Return the page numbers of runs, `npages` in all, in order: as a slice where they are one run."""
    if len(runs) == 1:
        ((first, count),) = runs.tolist()
        return slice(first, first + count)
    before = np.cumsum(runs[:, 1]) - runs[:, 1]
    return np.repeat(runs[:, 0] - before, runs[:, 1]) + np.arange(npages)
