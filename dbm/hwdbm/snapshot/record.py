"""Recorder: snapshots of a VM, one after another, into a chain."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from errno import ENOENT
from types import TracebackType
from typing import Self

from hwdbm import check
from hwdbm.dirtylog import ClientLease
from hwdbm.errors import StaleLeaseError
from hwdbm.snapshot.chain import Chain, Draft, all_pages
from hwdbm.snapshot.manifest import Snapshot
from hwdbm.vm import Client, MemoryMap, Pages, Source, client_of
from hwdbm.vm.source import mechanism_of, roll_back
from hwdbm.vm.still import still


class Recorder:
    """Takes snapshots of a VM: a full one, and then differences, each to the one before.

    It is a client of the VM's log from its first snapshot until `close`. Epoch and parent advance in one step: a
    snapshot that fails, at any byte, leaves both as they were, and what it would have had is in the next one.

    Parameters
    ----------
    source : Source
        The VM. It is paused while pages are copied, and goes on if it ran; its log is switched on if it isn't.
    folder : path-like
        The chain's folder; it is made if it isn't there.
    name : str
        The name of the client.
    digest : bool
        Whether each difference gets the SHA-256 of all memory, too; a full snapshot always has it. All memory is read
        for it, in the pause.

    Attributes
    ----------
    chain : Chain
        The chain.
    tip : Snapshot or None
        The last one that was taken: the parent of the next difference.
    paused : float
        Seconds that the last snapshot kept the guest paused.

    Examples
    --------
    See `Chain`.
    """

    def __init__(
        self, source: Source, folder: str | os.PathLike[str], *, name: str = "snapshot", digest: bool = False
    ) -> None:
        check.instance(source, Source, "source")
        check.instance(name, str, "name")
        self._source, self._name, self._digest = source, name, check.flag(digest, "digest")
        path = check.path(folder, "folder")
        path.mkdir(parents=True, exist_ok=True)
        self.chain = Chain(path)
        self.tip: Snapshot | None = None
        self.paused = 0.0
        self._epochs: dict[int, int] = {}  # of each slot, when the last snapshot was taken
        self._client: Client | None = None
        self._open = ExitStack()

    def __repr__(self) -> str:
        return f"<Recorder of {self._source!r} in {str(self.chain.folder)!r}>"

    def save(self) -> Snapshot:
        """Take a full snapshot: the next difference is to it.

        Returns
        -------
        Snapshot
            The new one.

        Raises
        ------
        OSError
            If it can't be written, or the VM's log can't be used. Nothing has changed then.
        """
        return self._take(None)

    def diff(self) -> Snapshot:
        """Take the difference to the last snapshot.

        Returns
        -------
        Snapshot
            The new one.

        Raises
        ------
        OSError
            ENOENT if there was none, or it isn't in the folder any more: take a full one. Else as for `save`.
        SnapshotError
            If the VM has other slots than it had.
        """
        if self.tip is None:
            raise OSError(ENOENT, "a difference is to a snapshot: take a full one first", str(self.chain.folder))
        return self._take(self.tip)

    def _take(self, parent: Snapshot | None) -> Snapshot:
        source, lent = self._source, list[Pages]()
        client = self._client_of()
        with self.chain._writing() as folder:
            if parent is not None and parent.id not in self.chain._read(folder):
                gone = self.chain.folder / f"{parent.name}.json"
                raise OSError(ENOENT, "the last snapshot isn't there any more: take a full one", str(gone))
            layout = MemoryMap.of(source)
            draft = Draft(self.chain, folder, parent, layout)
            try:
                with still(source):
                    began = time.perf_counter()
                    when = time.time_ns() // 1_000_000
                    lent.extend(client.take(slot.id) for slot in layout.slots)
                    pages = all_pages(layout) if parent is None else [lease.bitmap for lease in lent]
                    state = source.state()
                    draft.fill([source.memory(slot.id) for slot in layout.slots], pages)
                    digest = source.digest() if self._digest and parent is not None else None
                    paused = time.perf_counter() - began
                leases = zip(layout.slots, lent, strict=True)
                counted = {slot.id: each for slot, each in leases if isinstance(each, ClientLease)}
                snapshot = draft.finish(
                    when=when,
                    epoch=0 if parent is None else parent.epoch + self._ended(counted),
                    state=state,
                    digest=digest,
                    source=str(getattr(source, "kind", "memory")),
                    mechanism="all pages" if parent is None else mechanism_of(source),
                )
                # The parent goes first: as long as the leases are open, their pages are in the next difference, too.
                self.tip, self.paused = snapshot, paused
                self._epochs = {slot: lease.epoch for slot, lease in counted.items()}
            except BaseException:
                if self.tip is None or self.tip.id != draft.id:
                    draft.discard()
                roll_back(lent)
                raise
        try:
            while lent:
                with suppress(StaleLeaseError):  # then the next one has all pages of that slot
                    lent[-1].commit()
                lent.pop()
        except BaseException:
            roll_back(lent)
            raise
        return snapshot

    def _ended(self, leases: Mapping[int, ClientLease]) -> int:
        """Return how many epochs ended since the last snapshot: 1, unless pages were taken that no snapshot has.

        It is the log that counts them, so that a mistake made here is in the manifest, where `check` finds it. A lease
        of all pages lacks none, whatever was taken before.
        """
        sound = [lease.epoch - self._epochs[slot] for slot, lease in leases.items() if not lease.broken]
        return max([1, *sound])

    def _client_of(self) -> Client:
        if self._client is None:
            if not all(slot.logging for slot in self._source.slots):
                self._source.start_log()
            self._client = self._open.enter_context(client_of(self._source, self._name))
        return self._client

    def close(self) -> None:
        """Let go of the log; the chain stays. A `Recorder` that goes on begins with a full snapshot."""
        self.tip, self._client = None, None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
