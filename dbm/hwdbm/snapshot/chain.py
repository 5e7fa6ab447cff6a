"""Chain: a folder of snapshots, each the difference to its parent.

A snapshot is its manifest, ``NAME.json``, and the files that this names beside it: the memory file in Firecracker's
form, the bitmap of the pages that it holds, and the registers. It is there from the moment its manifest is; the
manifest comes last and goes first. So a process that is killed leaves whole snapshots, and files that no manifest
names, which the next call that writes removes. The bitmap says which pages a file holds, and not its holes.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from errno import EBUSY
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError, SnapshotError
from hwdbm.files import NewFile, naming, write
from hwdbm.snapshot.manifest import Snapshot, bitmap_size, open_beside, read_manifest
from hwdbm.snapshot.pages import Bytes, get_pages, put, put_pages, put_sparse, runs_of
from hwdbm.vm import MemoryMap, Source
from hwdbm.vm.memory import digest as digest_of

_JOURNAL = "rebase.journal"
_OURS = re.compile(r"([0-9]{6,12}-[0-9a-f]{8})\.(mem|bitmap|state)")
_NUMBER = re.compile(r"([0-9]{6,12})-")
_PATIENCE = 30.0  # seconds that a call waits for another one on the same folder
_MOST_STATE = 1 << 30  # bytes of registers and devices
_MOST_JOURNAL = 4 << 20  # bytes of the journal of a rebase


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with a chain.

    Parameters
    ----------
    kind : str
        ``unreadable``: a manifest that can't be read. ``parent``: a parent that isn't there, or can't be one.
        ``damaged``: a file that isn't what the manifest says. ``missing``: pages that are in no sound layer.
        ``digest``: the layers are sound, and yet don't give the memory. ``unfinished``: a rebase in place that was cut
        short. ``leftover``: a file that nothing needs, which the next call that writes removes.
    snapshot : str
        The id of the snapshot; empty where it is about none.
    text : str
        A sentence for people.
    pages : int
        How many pages are missing, 0 for other kinds.
    """

    kind: str
    snapshot: str
    text: str
    pages: int = 0


class Layer:
    """A snapshot's files, opened to be read; sizes and the bitmap's digest are checked.

    Attributes
    ----------
    snapshot : Snapshot
        The manifest.
    fd : int
        The memory file.
    pages : list of DirtyBitmap
        The pages that it holds, of each slot.
    """

    def __init__(self, folder: int, where: Path, snapshot: Snapshot) -> None:
        self.snapshot, self.where = snapshot, where
        self.pages = _read_pages(folder, where, snapshot)
        self.fd = open_beside(folder, snapshot.memory, where)
        size = os.fstat(self.fd).st_size
        if size != snapshot.size:
            self.close()
            raise SnapshotError(f"{where / snapshot.memory}: it has {size} bytes, and {snapshot.size} by its manifest")

    @property
    def file(self) -> tuple[int, Path]:
        """Its memory file, and the name of that."""
        return self.fd, self.where / self.snapshot.memory

    @property
    def runs(self) -> NDArray[np.int64]:
        """The runs of its pages."""
        return runs_of(self.snapshot.layout, self.snapshot.offsets, self.pages)

    def verify(self) -> None:
        """Raise `SnapshotError` if a page that it holds isn't what it was."""
        found = get_pages([self.file], self.runs)
        if found != self.snapshot.pages_digest:
            raise SnapshotError(f"{self.where / self.snapshot.memory}: its pages are damaged: their SHA-256 is {found}")

    def close(self) -> None:
        """Close the memory file."""
        fd = self.fd
        del self.fd
        os.close(fd)


def _read_pages(folder: int, where: Path, snapshot: Snapshot) -> list[DirtyBitmap]:
    layout, path = snapshot.layout, where / snapshot.bitmap
    with naming(path), os.fdopen(open_beside(folder, snapshot.bitmap, where), "rb") as file:
        size, wanted = os.fstat(file.fileno()).st_size, bitmap_size(layout)
        if size != wanted:
            raise SnapshotError(f"{path}: it has {size} bytes, and the bitmap of these slots has {wanted}")
        raw = file.read(wanted)
    if hashlib.sha256(raw).hexdigest() != snapshot.bitmap_digest:
        raise SnapshotError(f"{path}: the bitmap is damaged: its SHA-256 isn't that of the manifest")
    found, at = [], 0
    for slot in layout.slots:
        length = 8 * word_count(slot.npages)
        try:
            found.append(DirtyBitmap.from_bytes(raw[at : at + length], slot.npages))
        except BitmapError as error:
            raise SnapshotError(f"{path}: {error}") from None
        at += length
    return found


def all_pages(layout: MemoryMap) -> list[DirtyBitmap]:
    """Return bitmaps of all pages of each slot."""
    return [~DirtyBitmap(slot.npages) for slot in layout.slots]


def _offsets_of(layout: MemoryMap) -> tuple[int, ...]:
    """Return where each slot begins in a memory file, in which they lie by address."""
    at, starts = 0, {}
    for slot in layout.by_address:
        starts[slot.id] = at
        at += slot.npages * layout.page_size
    return tuple(starts[slot.id] for slot in layout.slots)


class Draft:
    """A snapshot that is being made in a folder, which is locked.

    Parameters
    ----------
    chain : Chain
        The chain.
    folder : int
        Its folder.
    parent : Snapshot or None
        What it is the difference to.
    layout : MemoryMap
        The slots.
    """

    def __init__(self, chain: "Chain", folder: int, parent: Snapshot | None, layout: MemoryMap) -> None:
        if parent is not None and layout != parent.layout:
            raise SnapshotError(
                f"{chain.folder / parent.name}.json is of other slots or pages than there are now: take a full snapshot"
            )
        self._chain, self._parent, self._layout = chain, parent, layout
        # A clock that was set back makes no snapshot older than those that were there: `prune` keeps the newest.
        self._times = [each.time for each in chain._read(folder).values()]
        self.id = secrets.token_hex(16)
        self.name = chain._new_name(folder, self.id)
        self.pages: list[DirtyBitmap] = []
        self._digest = ""
        self._file = NewFile(chain.folder / f"{self.name}.mem")

    def fill(self, memory: Sequence[Bytes], pages: Sequence[DirtyBitmap]) -> None:
        """Write pages to the memory file, in a place that has no name yet. The guest stands still meanwhile."""
        offsets, self.pages = _offsets_of(self._layout), list(pages)
        with naming(self._file.path):
            os.truncate(self._file.fd, self._layout.total)
            runs, page = runs_of(self._layout, offsets, pages), self._layout.page_size
            self._digest = put_pages(self._file.fd, runs, memory, page, holes=self._parent is None)

    def finish(
        self, *, when: int, epoch: int, state: bytes | None, digest: str | None, source: str, mechanism: str
    ) -> Snapshot:
        """Put all files in their places, the manifest last, and return it."""
        raw = b"".join(bitmap.to_bytes() for bitmap in self.pages)
        parent = self._parent
        snapshot = Snapshot(
            id=self.id,
            parent=None if parent is None else parent.id,
            time=max([when, *self._times]),
            epoch=epoch,
            layout=self._layout,
            offsets=_offsets_of(self._layout),
            size=self._layout.total,
            memory=f"{self.name}.mem",
            bitmap=f"{self.name}.bitmap",
            bitmap_digest=hashlib.sha256(raw).hexdigest(),
            pages_digest=self._digest,
            digest=self._digest if parent is None else digest,
            state=None if state is None else f"{self.name}.state",
            state_digest=None if state is None else hashlib.sha256(state).hexdigest(),
            source=source,
            mechanism=mechanism,
            merged=(),
            name=self.name,
        )
        where = self._chain.folder
        self._file.commit()
        write(where / snapshot.bitmap, raw)
        if state is not None:
            write(where / f"{self.name}.state", state)
        write(where / f"{self.name}.json", snapshot.to_bytes())
        return snapshot

    def discard(self) -> None:
        """Remove what there is of it, the manifest first: while that can't be removed, nothing else is."""
        self._file.close()
        with suppress(OSError):
            for suffix in ("json", "state", "bitmap", "mem"):
                (self._chain.folder / f"{self.name}.{suffix}").unlink(missing_ok=True)


def _of_slot(memory: Mapping[int, Bytes], slot: int, size: int) -> Bytes:
    if slot not in memory:
        raise ValueError(f"there is no memory of slot {slot}")
    part = memory[slot]
    check.array(part, np.uint8, "memory")
    if part.ndim != 1 or part.size != size or not part.flags.c_contiguous:
        raise ValueError(f"slot {slot} has {size} bytes in one piece, not an array of shape {part.shape}")
    return part


def _bitmap_of(pages: Mapping[int, DirtyBitmap], slot: int, npages: int) -> DirtyBitmap:
    if slot not in pages:
        raise ValueError(f"there is no bitmap of slot {slot}")
    check.instance(pages[slot], DirtyBitmap, "a bitmap")
    if pages[slot].npages != npages:
        raise ValueError(f"slot {slot} has {npages} pages, and its bitmap {pages[slot].npages}")
    return pages[slot]


class Chain:
    """A folder of snapshots.

    Parameters
    ----------
    folder : path-like
        It must exist.

    Notes
    -----
    A call that writes locks the folder for itself, one that reads for readers alone, and each waits for half a minute
    for others. `Recorder` takes snapshots of a VM into a chain.

    Examples
    --------
    >>> import tempfile
    >>> from hwdbm.memslot import Memslot
    >>> from hwdbm.snapshot import Chain, Recorder
    >>> from hwdbm.vm import MemoryMap, PlainGuest
    >>> folder = tempfile.TemporaryDirectory()
    >>> guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),)))
    >>> with Recorder(guest, folder.name, digest=True) as recorder:
    ...     full = recorder.save()
    ...     guest.write(0x4000_3000, b"a")
    ...     part = recorder.diff()
    >>> chain = Chain(folder.name)
    >>> [each.full for each in chain.snapshots()], chain.check()
    ([True, False], [])
    >>> chain.restore(f"{folder.name}/ram").digest == part.digest
    True
    >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = check.path(folder, "folder")
        self._cache: dict[str, tuple[tuple[int, ...], Snapshot]] = {}  # manifests that were read, and of which files

    def __repr__(self) -> str:
        return f"<Chain: {str(self.folder)!r}>"

    # --- reading -------------------------------------------------------------------------------------------

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots, the oldest first.

        Raises
        ------
        SnapshotError
            If a manifest can't be read, or two have one id.
        OSError
            If the folder can't be read.
        """
        with self._locked(shared=True) as folder:
            return tuple(self._read(folder).values())

    def find(self, which: str | None = None) -> Snapshot:
        """Return a snapshot by the first digits of its name or of its id; by default the newest.

        Raises
        ------
        SnapshotError
            If there is none, or more than one.
        """
        with self._locked(shared=True) as folder:
            return self._find(self._read(folder), which)

    def size(self, snapshot: Snapshot) -> int:
        """Return the bytes that a snapshot's files take on disk."""
        check.instance(snapshot, Snapshot, "snapshot")
        return sum((self.folder / name).lstat().st_blocks * 512 for name in snapshot.files)

    def pages(self, snapshot: Snapshot) -> dict[int, DirtyBitmap]:
        """Return the pages that a snapshot holds, by the slot's id.

        Raises
        ------
        SnapshotError
            If the bitmap is damaged.
        """
        check.instance(snapshot, Snapshot, "snapshot")
        with self._locked(shared=True) as folder:
            found = _read_pages(folder, self.folder, snapshot)
        return {slot.id: pages for slot, pages in zip(snapshot.layout.slots, found, strict=True)}

    def state(self, snapshot: Snapshot) -> bytes | None:
        """Return the registers and devices of a snapshot, None if it has none.

        Raises
        ------
        SnapshotError
            If they are damaged.
        """
        check.instance(snapshot, Snapshot, "snapshot")
        with self._locked(shared=True) as folder:
            return self._state(folder, snapshot)

    def _state(self, folder: int, snapshot: Snapshot) -> bytes | None:
        if snapshot.state is None:
            return None
        path = self.folder / snapshot.state
        with naming(path), os.fdopen(open_beside(folder, snapshot.state, self.folder), "rb") as file:
            raw = file.read(_MOST_STATE)
        if hashlib.sha256(raw).hexdigest() != snapshot.state_digest:
            raise SnapshotError(f"{path}: the state is damaged: its SHA-256 isn't that of the manifest")
        return raw

    def check(self, *, data: bool = True, whole: bool = False) -> list[Flaw]:
        """Look for what is wrong; nothing is changed.

        Parameters
        ----------
        data : bool
            Whether all pages are read, and their digests compared.
        whole : bool
            Whether each chain is put together up to each snapshot that has a digest of all memory, too.

        Returns
        -------
        list of Flaw
            Empty if all is well.
        """
        data, whole = check.flag(data, "data"), check.flag(whole, "whole")
        with self._locked(shared=True) as folder:
            return _Check(self, folder, data=data, whole=whole).findings

    def restore(
        self,
        target: str | os.PathLike[str] | Source,
        which: str | None = None,
    ) -> Snapshot:
        """Write the memory of a snapshot's moment to a file, or to a VM with its registers.

        Parameters
        ----------
        target : path-like or Source
            A file is a new one that takes its place when it is whole: the slots by address. A VM is paused, and has
            the same slots; if this raises, its memory is undefined.
        which : str, optional
            As for `find`; the newest by default.

        Returns
        -------
        Snapshot
            The one that was restored, with the digest of its memory. Each of its layers was compared with its own
            digest, and the whole with that of the manifest if there is one.

        Raises
        ------
        SnapshotError
            If a layer is missing or damaged, or a rebase in place was cut short.
        LayoutError
            If the VM has other slots.
        RuntimeError
            If it runs.
        """
        if not isinstance(target, Source):
            target = check.path(target, "target")
        elif target.running:
            raise RuntimeError("a snapshot is restored to a VM that is paused")
        with self._locked(shared=True) as folder, ExitStack() as stack:
            self._check_finished(folder)
            known = self._read(folder)
            snapshot = self._find(known, which)
            if isinstance(target, Source):
                MemoryMap.of(target).require(snapshot.layout)
            state = self._state(folder, snapshot)
            layers = self._open(folder, self._path(known, snapshot), stack)
            for layer in layers:
                layer.verify()
            if not isinstance(target, Source):
                file = stack.enter_context(NewFile(target))
                if file.path.resolve().parent == self.folder.resolve() and _is_ours(file.path.name):
                    raise SnapshotError(f"{file.path} would be taken for a part of the chain: choose another name")
                digest = self._write_whole(file, layers)
            else:
                memory = [target.memory(slot.id) for slot in snapshot.layout.slots]

                def use(slot: int, start: int, part: Bytes) -> None:
                    memory[slot][start : start + part.size] = part

                digest = self._assemble(layers, use)
                if state is not None:
                    target.set_state(state)
            return replace(snapshot, digest=digest)

    # --- changing ------------------------------------------------------------------------------------------

    def add(
        self,
        layout: MemoryMap,
        memory: Mapping[int, Bytes],
        *,
        full: bool = False,
        pages: Mapping[int, DirtyBitmap] | None = None,
        state: bytes | None = None,
        source: str = "memory",
    ) -> Snapshot:
        """Add memory that stands still, from wherever it is: a file of another program, as a rule.

        Parameters
        ----------
        layout : MemoryMap
            The slots.
        memory : mapping of int to (n,) uint8 array
            The bytes of each slot, by its id.
        full : bool
            Whether it is a full snapshot, and not the difference to the newest one.
        pages : mapping of int to DirtyBitmap, optional
            The pages of each slot that were dirtied since the newest snapshot; one that is missed is lost. By default
            the memory is compared with that of the newest.
        state : bytes, optional
            Registers and devices.
        source : str
            What it was made of, for the manifest.

        Returns
        -------
        Snapshot
            The new one.

        Raises
        ------
        SnapshotError
            If the newest snapshot has other slots, or can't be put together.
        ValueError
            If the memory or the bitmaps aren't of these slots.
        """
        check.instance(layout, MemoryMap, "layout")
        full = check.flag(full, "full")
        parts = [_of_slot(memory, slot.id, slot.npages * layout.page_size) for slot in layout.slots]
        given = None if pages is None else [_bitmap_of(pages, slot.id, slot.npages) for slot in layout.slots]
        if full and pages is not None:
            raise ValueError("a full snapshot has all pages: no bitmap says which")
        with self._writing() as folder:
            known = self._read(folder)
            parent = None if full else self._find(known, None)
            draft = Draft(self, folder, parent, layout)
            try:
                if parent is None:
                    given = all_pages(layout)
                elif given is None:
                    given = self._compared(folder, self._path(known, parent), parts)
                draft.fill(parts, given)
                return draft.finish(
                    when=time.time_ns() // 1_000_000,
                    epoch=0 if parent is None else parent.epoch + 1,
                    state=state,
                    digest=digest_of(parts[layout.slots.index(slot)] for slot in layout.by_address),
                    source=source,
                    mechanism="all pages" if full else "compared" if pages is None else "bitmap",
                )
            except BaseException:
                draft.discard()
                raise

    def _compared(self, folder: int, path: Sequence[Snapshot], memory: Sequence[Bytes]) -> list[DirtyBitmap]:
        """Return the pages in which memory differs from a snapshot's."""
        *_, last = path
        layout = last.layout
        flags = [np.zeros(slot.npages, dtype=np.bool_) for slot in layout.slots]
        page = layout.page_size

        def use(slot: int, start: int, part: Bytes) -> None:
            mine = memory[slot][start : start + part.size].reshape(-1, page).view(np.uint64)
            flags[slot][start // page :][: len(mine)] = (mine != part.reshape(-1, page).view(np.uint64)).any(axis=1)

        with ExitStack() as stack:
            layers = self._open(folder, path, stack)
            for layer in layers:
                layer.verify()
            self._assemble(layers, use)
        return [DirtyBitmap.from_pages(np.flatnonzero(each), each.size) for each in flags]

    def rebase(self, which: str | None = None, *, in_place: bool = False) -> Snapshot:
        """Make a snapshot a full one, and remove those that it was the difference to.

        Parameters
        ----------
        which : str, optional
            As for `find`; the newest by default.
        in_place : bool
            Whether the base's file is changed, rather than written anew: no room for another one is needed. A journal
            is kept meanwhile. If the process is killed, the next call that changes the chain finishes it.

        Returns
        -------
        Snapshot
            The full one; it has the id that it had, so that its own differences go on being that.

        Raises
        ------
        SnapshotError
            If a layer is missing or damaged: nothing is changed. In place also if the base or what lies between has
            other differences.
        OSError
            If it can't be written. The chain is what it was; in place, what was begun is finished by the next call.
        """
        in_place = check.flag(in_place, "in_place")
        with self._writing() as folder:
            known = self._read(folder)
            snapshot = self._find(known, which)
            path = self._path(known, snapshot)
            self._check_files(folder, path)
            if snapshot.full:
                return snapshot
            if in_place:
                self._check_alone(known, path)
                return self._rebase_in_place(folder, path)
            *merged, _ = path
            whole = self._rebase(folder, path, merged=tuple(each.id for each in merged))
            self._remove_merged(folder)
            self._sweep(folder)
            return whole

    def prune(self, keep: int) -> list[Snapshot]:
        """Remove all but the newest snapshots; those that stay become full where their parent goes.

        Parameters
        ----------
        keep : int
            How many stay, 1 or more.

        Returns
        -------
        list of Snapshot
            Those that were removed.

        Raises
        ------
        SnapshotError
            If a layer that is needed is missing or damaged: nothing is changed.
        """
        keep = check.integer(keep, "keep", 1)
        with self._writing() as folder:
            known = self._read(folder)
            kept = {each.id for each in list(known.values())[-keep:]}
            self._check_files(folder, known.values())
            for snapshot in list(known.values())[-keep:]:
                if snapshot.parent is not None and snapshot.parent not in kept:
                    self._rebase(folder, self._path(known, snapshot), merged=())
            gone = [each for each in known.values() if each.id not in kept]
            for each in reversed(gone):
                self._remove(folder, each)
            self._sweep(folder)
            return gone

    # --- the folder ----------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, *, shared: bool = False) -> Iterator[int]:
        """Yield the folder, opened and locked."""
        folder = os.open(self.folder, os.O_DIRECTORY)
        try:
            end = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise OSError(
                            EBUSY, "another call works on this chain for half a minute", str(self.folder)
                        ) from None
                    time.sleep(0.005)
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """Yield the folder for a call that changes it: what another one began is finished, what it left is removed."""
        with self._locked() as folder:
            self._finish(folder)
            self._remove_merged(folder)
            self._sweep(folder)
            try:
                yield folder
            except BaseException:
                # What did not become a part of the chain goes, as far as it can: the next call takes the rest.
                with suppress(OSError, SnapshotError):
                    self._sweep(folder)
                raise

    def _manifests(self, folder: int) -> list[str]:
        with naming(self.folder):
            return sorted(name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json"))

    def _new_name(self, folder: int, snapshot_id: str) -> str:
        """Return the name of the next one's files: a number beyond all, and the beginning of its id."""
        with naming(self.folder):
            numbers = [int(found[1]) for name in os.listdir(folder) if (found := _NUMBER.match(name))]
        return f"{max((number + 1 for number in numbers), default=0):06d}-{snapshot_id[:8]}"

    def _read(self, folder: int) -> dict[str, Snapshot]:
        """Return the snapshots by their ids, the oldest first."""
        found: dict[str, Snapshot] = {}
        for name in self._manifests(folder):
            each = self._manifest(folder, name)
            if each.id in found:
                raise SnapshotError(f"{self.folder / name}.json has the id of {found[each.id].name}.json")
            found[each.id] = each
        return {each.id: each for each in sorted(found.values(), key=lambda each: (each.time, each.name))}

    def _manifest(self, folder: int, name: str) -> Snapshot:
        """Return a manifest, which is read if it isn't the file that it was: one that changes is a new file here."""
        stat = os.stat(f"{name}.json", dir_fd=folder, follow_symlinks=False)
        key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        found = self._cache.get(name)
        if found is None or found[0] != key:
            found = self._cache[name] = key, read_manifest(folder, self.folder, name)
        return found[1]

    def _find(self, known: dict[str, Snapshot], which: str | None) -> Snapshot:
        if which is None:
            if not known:
                raise SnapshotError(f"{self.folder}: there is no snapshot in it")
            return list(known.values())[-1]
        check.instance(which, str, "which")
        exact = [each for each in known.values() if which in (each.name, each.id)]
        found = exact or [
            each for each in known.values() if which and (each.name.startswith(which) or each.id.startswith(which))
        ]
        if len(found) != 1:
            raise SnapshotError(f"{self.folder}: {len(found) or 'no'} snapshots are called {which!r:.60}")
        (one,) = found
        return one

    def _path(self, known: dict[str, Snapshot], snapshot: Snapshot) -> list[Snapshot]:
        """Return the snapshots that one is made of, from its base to itself."""
        path = [snapshot]
        while (child := path[-1]).parent is not None:
            parent = known.get(child.parent)
            if parent is None:
                raise SnapshotError(f"{self.folder / child.name}.json: its parent {child.parent} isn't there")
            why = _no_parent(parent, child, path)
            if why:
                raise SnapshotError(f"{self.folder / child.name}.json: {why}")
            path.append(parent)
        return path[::-1]

    def _open(self, folder: int, path: Sequence[Snapshot], stack: ExitStack) -> list[Layer]:
        layers = []
        for each in path:
            layer = Layer(folder, self.folder, each)
            stack.callback(layer.close)
            layers.append(layer)
        return layers

    def _assemble(self, layers: Sequence[Layer], use: Callable[[int, int, Bytes], object] | None) -> str:
        """Read the memory that layers give, each page once, by address, and return its SHA-256."""
        runs, missing = _composed(layers)
        *_, newest = layers
        last = newest.snapshot
        if missing:
            raise SnapshotError(f"{self.folder / last.name}.json: {missing} pages are in none of its layers")
        digest = get_pages([layer.file for layer in layers], runs, use)
        if last.digest not in (None, digest):
            where = self.folder / f"{last.name}.json"
            raise SnapshotError(f"{where}: the SHA-256 of what its layers give is {digest}, and not {last.digest}")
        return digest

    def _write_whole(self, file: NewFile, layers: Sequence[Layer]) -> str:
        """Write the memory that layers give to a new file, zeros as holes."""
        *_, newest = layers
        layout = newest.snapshot.layout
        offsets = _offsets_of(layout)
        with naming(file.path):
            os.truncate(file.fd, layout.total)

            def use(slot: int, start: int, part: Bytes) -> None:
                put_sparse(file.fd, part, offsets[slot] + start)

            return self._assemble(layers, use)

    # --- rebase --------------------------------------------------------------------------------------------

    def _rebase(self, folder: int, path: Sequence[Snapshot], *, merged: tuple[str, ...]) -> Snapshot:
        """Write a snapshot anew as a full one; its manifest is replaced by rename."""
        *_, last = path
        name = self._new_name(folder, last.id)
        raw = b"".join(pages.to_bytes() for pages in all_pages(last.layout))
        with ExitStack() as stack:
            layers = self._open(folder, path, stack)
            for layer in layers:
                layer.verify()
            with NewFile(self.folder / f"{name}.mem") as file:
                digest = self._write_whole(file, layers)
        write(self.folder / f"{name}.bitmap", raw)
        whole = replace(
            last,
            parent=None,
            offsets=_offsets_of(last.layout),
            size=last.layout.total,
            memory=f"{name}.mem",
            bitmap=f"{name}.bitmap",
            bitmap_digest=hashlib.sha256(raw).hexdigest(),
            pages_digest=digest,
            digest=digest,
            merged=merged,
        )
        write(self.folder / f"{last.name}.json", whole.to_bytes())
        return whole

    def _check_files(self, folder: int, snapshots: Iterable[Snapshot]) -> None:
        """Raise if something that is no file has the place of one: it couldn't be removed once all else is done."""
        for name in (name for each in snapshots for name in each.files):
            with suppress(FileNotFoundError):
                if not S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise SnapshotError(f"{self.folder / name}: it is no regular file")

    def _check_alone(self, known: dict[str, Snapshot], path: Sequence[Snapshot]) -> None:
        *merged, last = path
        gone = {each.id for each in merged}
        for each in known.values():
            if each.parent in gone and each.id not in gone and each is not last:
                raise SnapshotError(
                    f"{self.folder / each.name}.json is a difference to what a rebase in place would change"
                )

    def _rebase_in_place(self, folder: int, path: Sequence[Snapshot]) -> Snapshot:
        with ExitStack() as stack:
            layers = self._open(folder, path, stack)
            for layer in layers:
                layer.verify()
            digest = self._assemble(layers, None)
        journal = {"format": "hwdbm-rebase", "version": 1, "path": [each.id for each in path], "sha256": digest}
        write(self.folder / _JOURNAL, json.dumps(journal).encode())
        return self._go_on(folder, path, digest)

    def _journal(self, folder: int) -> tuple[list[str], str] | None:
        """Return what the journal says: ids, from the base on, and the digest of all memory in the end."""
        try:
            fd = open_beside(folder, _JOURNAL, self.folder)
        except FileNotFoundError:
            return None
        with naming(self.folder / _JOURNAL), os.fdopen(fd, "rb") as file:
            raw = file.read(_MOST_JOURNAL)
        try:
            found = json.loads(raw)
            path, digest = found["path"], found["sha256"]
            fine = found["format"] == "hwdbm-rebase" and found["version"] == 1 and len(path) > 1
            fine = fine and all(isinstance(each, str) for each in (*path, digest))
        except (ValueError, KeyError, TypeError, RecursionError):
            fine = False
        if not fine:
            raise SnapshotError(f"{self.folder / _JOURNAL}: it is no journal of a rebase")
        return path, digest

    def _check_finished(self, folder: int) -> None:
        if self._journal(folder) is not None:
            raise SnapshotError(
                f"{self.folder / _JOURNAL}: a rebase in place was cut short: `hwdbm snapshot rebase` finishes it"
            )

    def _finish(self, folder: int) -> None:
        """Finish the rebase in place that a journal tells of."""
        found = self._journal(folder)
        if found is None:
            return
        ids, digest = found
        known = self._read(folder)
        *_, newest = ids
        last = known.get(newest)
        if last is None:
            raise SnapshotError(f"{self.folder / _JOURNAL}: its snapshot {newest} isn't there")
        if last.parent is None:
            self._end(folder, last)
            return
        path = self._path(known, last)
        if [each.id for each in path] != ids:
            raise SnapshotError(f"{self.folder / _JOURNAL}: its snapshots aren't those of {last.name}.json")
        self._go_on(folder, path, digest)

    def _go_on(self, folder: int, path: Sequence[Snapshot], digest: str) -> Snapshot:
        """Lay the differences over the base's own file. Done twice, it is as done once."""
        base, *between, last = path
        with ExitStack() as stack:
            layers = self._open(folder, path, stack)
            _, *differences = layers
            for layer in differences:
                layer.verify()
            fd = open_beside(folder, base.memory, self.folder, os.O_RDWR)
            stack.callback(os.close, fd)
            runs, _ = _composed(layers)
            name = self.folder / base.memory
            file = fd, name
            with naming(name):
                get_pages(
                    [layer.file for layer in layers],
                    runs[runs[:, 4].nonzero()],
                    lambda slot, start, part: put(fd, part.data, base.offsets[slot] + start),
                )
                os.fsync(fd)
                found = get_pages([file], runs_of(base.layout, base.offsets, all_pages(base.layout)))
            by_address = get_pages([file], _by_address(base)) if not _in_order(base) else found
        if by_address != digest:
            raise SnapshotError(f"{name}: its SHA-256 is {by_address}, and {digest} was to be")
        whole = replace(
            last,
            parent=None,
            offsets=base.offsets,
            size=base.size,
            memory=base.memory,
            bitmap=base.bitmap,
            bitmap_digest=base.bitmap_digest,
            pages_digest=found,
            digest=digest,
            merged=tuple(each.id for each in (base, *between)),
        )
        write(self.folder / f"{last.name}.json", whole.to_bytes())
        self._end(folder, whole)
        return whole

    def _end(self, folder: int, whole: Snapshot) -> None:
        known = self._read(folder)
        for each in reversed(whole.merged):
            if each in known:
                self._remove(folder, known[each])
        self._sweep(folder)
        self._unlink(folder, _JOURNAL)
        with naming(self.folder):
            os.fsync(folder)

    # --- removing ------------------------------------------------------------------------------------------

    def _remove(self, folder: int, snapshot: Snapshot) -> None:
        """Remove a snapshot: its manifest, and by that all of it. `_sweep` takes the files."""
        self._unlink(folder, f"{snapshot.name}.json")

    def _unlink(self, folder: int, name: str) -> None:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / name)) from error

    def _remove_merged(self, folder: int) -> None:
        """Remove what a rebase put into another snapshot, unless something else is a difference to it."""
        known = self._read(folder)
        merged = {each for snapshot in known.values() for each in snapshot.merged}
        for each in reversed(list(known.values())):
            if each.id in merged and not any(other.parent == each.id for other in known.values()):
                self._remove(folder, each)
                del known[each.id]

    def _sweep(self, folder: int) -> None:
        """Remove what no manifest names, unless a manifest is missed: it may have been moved away by hand."""
        known = self._read(folder)
        if any(each.parent is not None and each.parent not in known for each in known.values()):
            return
        with naming(self.folder):
            for name in _leftovers(folder, known.values()):
                self._unlink(folder, name)
            os.fsync(folder)


def _leftovers(folder: int, known: Iterable[Snapshot]) -> list[str]:
    """Return the files of a chain's folder that no manifest names."""
    named = {name for each in known for name in each.files}
    return sorted(name for name in os.listdir(folder) if _OURS.fullmatch(name) and name not in named)


def _is_ours(name: str) -> bool:
    return bool(_OURS.fullmatch(name)) or name.endswith(".json") or name == _JOURNAL


def _no_parent(parent: Snapshot, child: Snapshot, path: Sequence[Snapshot]) -> str:
    """Return why a snapshot can't be another one's parent, and nothing if it can."""
    if parent in path:
        return f"it is among its own parents, by {parent.name}.json"
    if parent.layout != child.layout:
        return f"its parent {parent.name}.json is of other slots or pages"
    if parent.time > child.time:
        return f"its parent {parent.name}.json is younger: it was taken at {parent.time}, and this at {child.time}"
    if child.epoch > parent.epoch + 1:
        return (
            f"it is of epoch {child.epoch}, and its parent {parent.name}.json of {parent.epoch}: what was written "
            "between them is in neither"
        )
    return ""


def _composed(layers: Sequence[Layer]) -> tuple[NDArray[np.int64], int]:
    """Return the runs of pages that layers give, by address, each from the last layer that holds it.

    Returns
    -------
    (n, 5) int64 array, int
        Runs as `runs_of` has them, and how many pages no layer holds.
    """
    *_, newest = layers
    layout = newest.snapshot.layout
    needed = all_pages(layout)
    parts = []
    for number, layer in reversed(list(enumerate(layers))):
        held = [need & pages for need, pages in zip(needed, layer.pages, strict=True)]
        parts.append(runs_of(layout, layer.snapshot.offsets, held, number))
        for need, mine in zip(needed, held, strict=True):
            need -= mine  # noqa: PLW2901  # in place
    runs = np.concatenate(parts)
    rank = np.empty(len(layout.slots), dtype=np.int64)
    by_id = {slot.id: place for place, slot in enumerate(layout.by_address)}
    rank[:] = [by_id[slot.id] for slot in layout.slots]
    order = np.lexsort((runs[:, 3], rank[runs[:, 2]]))
    return runs[order], sum(need.weight() for need in needed)


def _in_order(snapshot: Snapshot) -> bool:
    return tuple(np.argsort(np.argsort(snapshot.offsets))) == tuple(
        np.argsort(np.argsort(_offsets_of(snapshot.layout)))
    )


def _by_address(snapshot: Snapshot) -> NDArray[np.int64]:
    runs = runs_of(snapshot.layout, snapshot.offsets, all_pages(snapshot.layout))
    wanted = np.asarray(_offsets_of(snapshot.layout))
    return runs[np.argsort(wanted[runs[:, 2]], kind="stable")]


class _Check:
    """One check of a chain's folder."""

    def __init__(self, chain: Chain, folder: int, *, data: bool, whole: bool) -> None:
        self.findings: list[Flaw] = []
        self._chain, self._folder = chain, folder
        self._known: dict[str, Snapshot] = {}
        self._pages: dict[str, list[DirtyBitmap]] = {}  # of those whose bitmap is sound
        self._sound: set[str] = set()  # those whose pages are, too
        try:
            journal = chain._journal(folder)
        except (SnapshotError, OSError) as error:
            journal = None
            self._add("unfinished", None, _text(error))
        if journal is not None:
            where = chain.folder / _JOURNAL
            self._add("unfinished", None, f"{where}: a rebase in place was cut short; the next one finishes it")
        self._read()
        changing = journal[0][:1] if journal is not None else []
        for each in self._known.values():
            self._look(each, data=data and each.id not in changing)
        self._parents()
        self._missing(changing)
        if whole and journal is None:
            self._whole()
        with suppress(OSError):
            for name in _leftovers(folder, list(self._known.values())):
                stem, _, _ = name.partition(".")
                if stem in chain._manifests(folder) and all(each.name != stem for each in self._known.values()):
                    continue  # its manifest is there, and can't be read: that was said
                why = "nothing needs it; the next call that writes removes it"
                self._add("leftover", None, f"{chain.folder / name}: {why}")

    def _add(self, kind: str, snapshot: Snapshot | None, text: str, pages: int = 0) -> None:
        self.findings.append(Flaw(kind, "" if snapshot is None else snapshot.id, text, pages))

    def _read(self) -> None:
        for name in self._chain._manifests(self._folder):
            try:
                each = read_manifest(self._folder, self._chain.folder, name)
            except (SnapshotError, OSError) as error:
                self._add("unreadable", None, _text(error))
                continue
            if each.id in self._known:
                self._add("unreadable", each, f"{name}.json has the id of {self._known[each.id].name}.json")
                continue
            self._known[each.id] = each

    def _look(self, each: Snapshot, *, data: bool) -> None:
        """Look at the files of a snapshot."""
        try:
            self._pages[each.id] = _read_pages(self._folder, self._chain.folder, each)
            layer = Layer(self._folder, self._chain.folder, each)
            try:
                if data:
                    layer.verify()
                self._sound.add(each.id)
            finally:
                layer.close()
        except (SnapshotError, OSError) as error:
            self._add("damaged", each, _text(error))
        try:
            self._chain._state(self._folder, each)
        except (SnapshotError, OSError) as error:
            self._add("damaged", each, _text(error))

    def _parents(self) -> None:
        for each in self._known.values():
            if each.parent is None:
                continue
            where, parent = self._chain.folder / f"{each.name}.json", self._known.get(each.parent)
            if parent is None:
                self._add("parent", each, f"{where}: its parent {each.parent} isn't there")
                continue
            path = [each]
            while parent is not None:
                why = _no_parent(parent, path[-1], path)
                if why:
                    if path[-1] is each or parent is each:
                        self._add("parent", each, f"{where}: {why}")
                    break
                path.append(parent)
                parent = self._known.get(parent.parent or "")

    def _missing(self, changing: Sequence[str]) -> None:
        """Say which pages of the last snapshots are in no sound layer, and since when."""
        parents = {each.parent for each in self._known.values()}
        for last in self._known.values():
            if last.id in parents:
                continue
            path, seen = [last], {last.id}
            while (parent := self._known.get(path[-1].parent or "")) is not None and parent.id not in seen:
                if parent.layout != last.layout:
                    break
                path.append(parent)
                seen.add(parent.id)
            needed = all_pages(last.layout)
            for each in path:
                held = self._pages.get(each.id)
                if held is None:  # what an older layer has may be stale: which pages this one had isn't known
                    self._say_missing(last, needed, f"since {each.name}.json, whose bitmap is damaged")
                    break
                if each.id not in self._sound and each.id not in changing:
                    lost = [need & mine for need, mine in zip(needed, held, strict=True)]
                    self._say_missing(last, lost, f"since {each.name}.json, whose pages are damaged")
                for need, mine in zip(needed, held, strict=True):
                    need -= mine  # noqa: PLW2901  # in place
            else:
                oldest = path[-1]
                orphan = "" if oldest.parent is None else ", whose parent isn't there"
                self._say_missing(last, needed, f"since before {oldest.name}.json{orphan}")

    def _say_missing(self, last: Snapshot, needed: Sequence[DirtyBitmap], why: str) -> None:
        for slot, need in zip(last.layout.slots, needed, strict=True):
            count = need.weight()
            if count:
                first = (slot.base_gfn + int(need.ranges()[0, 0])) * last.layout.page_size
                where = self._chain.folder / f"{last.name}.json"
                self._add(
                    "missing",
                    last,
                    f"{where}: {count} of {slot.npages} pages of slot {slot.id} are missing {why}; the first is at "
                    f"gpa {first:#018x}",
                    count,
                )

    def _whole(self) -> None:
        for each in self._known.values():
            if each.digest is None or each.parent is None:
                continue
            with suppress(OSError, SnapshotError):  # a layer that isn't there, or isn't sound, was said
                path = self._chain._path(self._known, each)
                if all(one.id in self._sound for one in path):
                    with ExitStack() as stack:
                        layers = self._chain._open(self._folder, path, stack)
                        try:
                            self._chain._assemble(layers, None)
                        except SnapshotError as error:
                            self._add("digest", each, _text(error))


def _text(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
