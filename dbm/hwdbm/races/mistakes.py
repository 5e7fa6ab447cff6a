"""Known mistakes: real ones, of kernels, hypervisors and their reviews, each beside the protocol that is right.

An entry is a function of whether the mistake is made. With it the search must find a way to lose a page (or to whatever
else it says), and without it prove that there is none. `cites` names the source: a paragraph of the race catalogue
(5.4), a bug that happened (R7, with the commit in its summary), or what a reviewer of the series "Support stage2
hardware DBM" said (RFC patch 5).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from hwdbm import pte
from hwdbm.races.program import End, Scene, descriptor, state_name
from hwdbm.races.protocol import (
    Act,
    Actor,
    Protocol,
    View,
    again,
    copy,
    dsb,
    exchange,
    fetch_clear,
    fetch_set,
    flush,
    kept,
    load,
    store,
    swap_if,
    tlbi,
)  # fmt: skip

W, DBM, AF = pte.S2AP_W, pte.DBM, pte.AF
Acts = Generator[Act, Any, None]


class Mistake(NamedTuple):
    """A mistake, and what is right.

    Parameters
    ----------
    name : str
        What it is called.
    cites : tuple of str
        Where it is from.
    summary : str
        What is done wrong, in a sentence.
    make : callable
        Returns the `Protocol`, with the mistake or without.
    """

    name: str
    cites: tuple[str, ...]
    summary: str
    make: Callable[[bool], Protocol]


MISTAKES: Final[dict[str, Mistake]] = {}
"""All of them, by name."""

Made = tuple[Scene, Sequence[Actor], Callable[[View], str | None]]


def _mistake(name: str, summary: str, *cites: str, **options: Any) -> Callable[[Callable[[bool], Made]], None]:
    """Enter the function below, which returns the scene, the actors and the end's condition, under a name."""

    def enter(build: Callable[[bool], Made]) -> None:
        def make(wrong: bool) -> Protocol:
            scene, actors, end = build(wrong)
            return Protocol(name if wrong else f"{name}, mended", scene, actors, end, summary=summary, **options)

        MISTAKES[name] = Mistake(name, cites, summary, make)

    return enter


def _scene(programs: Sequence[str], pages: Mapping[str, str] | str = "clean", **options: Any) -> Scene:
    """Return pages with a copy each, a log, host flags and a disk, and more cells by `cells`."""
    pages = {"x": pages} if isinstance(pages, str) else pages
    frames = options.pop("frames", ())
    cells = {f"{what}:{name}": 0 for name in pages for what in ("copy", "disk")} | {"log": 0, "host": 0}
    return Scene(pages, programs, cells | options.pop("cells", {}), frames, options)


def _mark(page: int = 0, name: str = "log") -> Act:
    return fetch_set(name, 1 << page, f"sets the page's bit in {name}")


def _take(name: str = "log") -> Act:
    return exchange(name, 0, f"takes the bits of {name}")


def _harvest(page: str = "x") -> Acts:
    """Clean, flush, copy: what is right."""
    old = yield fetch_clear(f"pte:{page}", W)
    yield from flush(page)
    if old & W:
        yield copy(page)


def _read_only_stays(*pages: str) -> Callable[[View], str | None]:
    def always(view: View) -> str | None:
        for page in pages:
            if view.lets_write(page):
                return f"the guest may write page {page}, which is read-only"
        return None

    return always


def _disk_kept(view: View) -> str | None:
    """Say whether the host drops what the guest wrote: the disk is old, and nothing says that the page is dirty."""
    desc = view["pte:x"]
    if view["disk:x"] != view["frame:x"] and not view["host"] and not (desc & pte.VALID and desc & W):
        return "the host drops page x, which the guest has written: no flag says that it is dirty"
    return None


def _same(view: View) -> str | None:
    """Say whether the copy is old at the very end, when nobody will look again."""
    return None if view["copy:x"] == view["frame:x"] else "a write to page x is lost: the last copy is old"


# --- one descriptor, read and written ---------------------------------------------------------------------------


@_mistake("young-by-plain-store", "AF is set by a load and a store, and the mark in between is written over", "5.1",
          "RFC patch 5", "v2 3/8")  # fmt: skip
def _(wrong: bool) -> Made:
    def young() -> Acts:
        if not wrong:
            yield fetch_set("pte:x", AF)
            return
        old = yield load("pte:x")
        yield store("pte:x", old | AF)

    return _scene(["store x 1"], "old clean"), [Actor("S", young)], kept("x")


@_mistake("protect-by-plain-store", "a descriptor is read, and made read-only by a store of what was read "
          "(2f4b829c625e, mended by 8781bcbc5e69)", "5.3", "R1")  # fmt: skip
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        if wrong:
            old = yield load("pte:x")
            yield store("pte:x", old & ~(W | DBM))
        else:
            old = yield fetch_clear("pte:x", W | DBM)
        if old & W:
            yield _mark()

    return _scene(["store x 1"]), [Actor("S", protect)], kept("x")


@_mistake("protect-forgets", "read-only is made by a function of the value, which drops the dirty state (ff1712f953e2)",
          "5.10", "R2")  # fmt: skip
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        old = yield fetch_clear("pte:x", W | DBM)
        if old & W and not wrong:
            yield _mark()

    return _scene(["store x 1"]), [Actor("S", protect)], kept("x")


@_mistake("replace-by-plain-store", "a leaf is read, then replaced, and what was read is accounted "
          "(ba3a6120a4e7; the mremap of 5d1904204c99; pmdp_invalidate)", "5.2", "R3", "R4", "R8", "RFC patch 6",
          "v2 4/8")  # fmt: skip
def _(wrong: bool) -> Made:
    def replace() -> Acts:
        if wrong:
            old = yield load("pte:x")
            yield store("pte:x", 0)
        else:
            old = yield exchange("pte:x", 0)
        yield from flush("x")
        if old & W:
            yield _mark()

    return _scene(["store x 1"]), [Actor("S", replace)], kept("x")


@_mistake("replace-ignores", "what was removed isn't looked at (device migration, fd35ca3d12cc)", "5.2", "R12")
def _(wrong: bool) -> Made:
    def replace() -> Acts:
        old = yield exchange("pte:x", 0)
        yield from flush("x")
        if old & W and not wrong:
            yield _mark(0, "host")

    return _scene(["store x 1"]), [Actor("S", replace)], _disk_kept


@_mistake("unmap-untold", "the host unmaps a page, and isn't told that the guest wrote it", "5.12", "RFC problem 1")
def _(wrong: bool) -> Made:
    def unmap() -> Acts:
        old = yield exchange("pte:x", 0)
        if old & W:
            yield _mark()  # the log hears of it
            if not wrong:
                yield _mark(0, "host")
        yield from flush("x")

    return _scene(["store x 1"]), [Actor("S", unmap)], _disk_kept


@_mistake("write-back-old-copy", "an entry is read, flushed, and written anew from what was read (H_PROTECT, "
          "f064a0de1579)", "5.2", "R16")  # fmt: skip
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        if wrong:
            old = yield load("pte:x")
            yield from flush("x")
            yield store("pte:x", old | AF)
            return
        yield fetch_clear("pte:x", pte.VALID)
        yield from flush("x")
        old = yield load("pte:x")
        yield store("pte:x", old | AF | pte.VALID)

    return _scene(["store x 1"]), [Actor("S", protect)], kept("x")


@_mistake("torn-descriptor", "a descriptor of 64 bits is written as two halves", "R36")
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        if not wrong:
            yield fetch_clear("pte:x", W | DBM)
        else:
            old = yield load("pte:x")
            yield Act(
                "stores the low half",
                lambda view: view.__setitem__("pte:x", view["pte:x"] >> 32 << 32 | old & ~W & 0xFFFF_FFFF),
            )
            yield Act(
                "stores the high half",
                lambda view: view.__setitem__("pte:x", view["pte:x"] & 0xFFFF_FFFF | (old & ~DBM) >> 32 << 32),
            )
        yield from flush("x")

    def end(view: View) -> str | None:
        return _read_only_stays("x")(view)

    return _scene(["store x 1"], "dirty"), [Actor("S", protect)], end


@_mistake("age-clears-dirty", "making a page old clears more than AF", "5.20")
def _(wrong: bool) -> Made:
    def age() -> Acts:
        yield fetch_clear("pte:x", AF | (W if wrong else 0))

    return _scene(["store x 1"]), [Actor("S", age)], kept("x")


@_mistake("dbm-on-read-only", "write-protecting adds DBM to leaves that were read-only, which lets the guest write",
          "5.10", "RFC patch 2", always=_read_only_stays("x"))  # fmt: skip
def _(wrong: bool) -> Made:
    def arm() -> Acts:
        old = yield load("pte:x")
        if wrong or old & W:
            yield fetch_set("pte:x", DBM)

    return _scene(["store x 1"], "readonly"), [Actor("S", arm)], lambda _: None


@_mistake("dbm-stays", "read-only is made by clearing S2AP[1] alone: DBM is there still", "5.10")
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        old = yield fetch_clear("pte:x", W if wrong else W | DBM)
        if old & W:
            yield _mark()
        yield from flush("x")

    return _scene(["store x 1"], "dirty"), [Actor("S", protect)], _read_only_stays("x")


@_mistake("illegal-state", "the hardware sets D on an entry whose W software has just cleared: W=0, D=1 means "
          "something else (shadow stacks)", "R17")  # fmt: skip
def _(wrong: bool) -> Made:
    def hardware() -> Acts:
        old = yield load("spte")
        if old & 1:
            if wrong:
                yield fetch_set("spte", 2)
            else:
                yield swap_if("spte", old, old | 2)

    def software() -> Acts:
        old = yield load("spte")
        yield swap_if("spte", old, 0 if old & 2 == 0 else 4)  # D goes to a bit of software's

    def end(view: View) -> str | None:
        return "the entry is W=0, D=1: a shadow stack" if view["spte"] & 3 == 2 else None

    return _scene([], cells={"spte": 1}), [Actor("H", hardware), Actor("S", software)], end


# --- clean, flush, copy -----------------------------------------------------------------------------------------


def _order(name: str, summary: str, steps: str, *cites: str, start: str = "dirty") -> None:
    """Enter an order of a harvest's steps: of clean, flush, copy."""

    def harvest(order: str) -> Callable[[], Acts]:
        def actor() -> Acts:
            for step in order.split():
                if step == "clean":
                    yield fetch_clear("pte:x", W, "cleans x")
                elif step == "flush":
                    yield from flush("x")
                elif step == "copy":
                    yield copy("x")
                elif step == "tlbi":
                    yield tlbi("x")

        return actor

    @_mistake(name, summary, *cites)
    def _(wrong: bool) -> Made:
        order = steps if wrong else "clean flush copy"
        return _scene(["store x 1; store x 2"], start), [Actor("S", harvest(order))], kept("x")


_order("no-flush", "a harvest forgets its flush (soft-dirty, 912efa17e512)", "clean copy", "5.4", "R10")
_order("copy-before-flush", "a page is copied before the flush", "clean copy flush", "5.4")
_order("flush-before-clean", "the flush comes before the clean", "flush clean copy", "5.4")
_order("copy-before-clean", "a page is copied, and then cleaned", "copy clean flush", "5.5")
_order("no-completion", "a TLBI without a DSB after it", "clean tlbi copy", "5.4")


def _weak(name: str, summary: str, steps: str, right: str, *cites: str) -> None:
    """Enter a harvest whose steps are ordered by its barriers alone."""

    def end(view: View) -> str | None:
        found = End(view.protocol.scene, view.state)
        if found["c"] != found["frame:x"] and state_name(found["pte:x"]) == "clean":
            return "a write to page x is lost: the copy is old, and the descriptor says clean"
        return None

    @_mistake(name, summary, *cites, names=("vCPU", "S"))
    def _(wrong: bool) -> Made:
        return _scene(["store x 1", steps if wrong else right], "dirty"), [], end


_RIGHT: Final = "clear pte:x W; dsb; tlbi x; dsb; load frame:x -> c"
_weak("no-dsb-before-tlbi", "no DSB between the clean and the TLBI, which may overtake it",
      "clear pte:x W; tlbi x; dsb; load frame:x -> c", _RIGHT, "5.4")  # fmt: skip
_weak("dmb-before-tlbi", "a DMB where the DSB before the TLBI should be",
      "clear pte:x W; dmb; tlbi x; dsb; load frame:x -> c", _RIGHT, "5.4")  # fmt: skip
_weak("dmb-after-tlbi", "a DMB where the DSB after the TLBI should be",
      "clear pte:x W; dsb; tlbi x; dmb; load frame:x -> c", _RIGHT, "5.4")  # fmt: skip
_weak("dsb-st-after-tlbi", "a DSB ST where the DSB after the TLBI should be",
      "clear pte:x W; dsb; tlbi x; dsb st; load frame:x -> c",
      "clear pte:x W; dsb st; tlbi x; dsb; load frame:x -> c", "5.4")  # fmt: skip


@_mistake("last-pass-by-dmb", "a vCPU stops with a DMB and a flag, and its last marks are still on their way", "5.18",
          names=("vCPU", "S"))  # fmt: skip
def _(wrong: bool) -> Made:
    def end(view: View) -> str | None:
        found = End(view.protocol.scene, view.state)
        if found["s"] == 1 and state_name(found["a"]) == "clean":
            return "the last pass finds page x clean, which the vCPU had written before it stopped"
        return None

    stop = "store x 1; dmb; store stopped 1" if wrong else "store x 1; dsb; store stopped 1"
    return _scene([stop, "load stopped -> s; dsb; load pte:x -> a"], cells={"stopped": 0}), [], end


@_mistake("last-pass-too-early", "the last harvest is made before the vCPU stops", "5.18")
def _(wrong: bool) -> Made:
    def last() -> Acts:
        if not wrong:
            yield Act("waits until the vCPU has stopped", when=lambda view: view["stopped"] == 1)
        yield from _harvest()

    return _scene(["store x 1; dsb; store stopped 1"], cells={"stopped": 0}), [Actor("S", last)], _same


@_mistake("erratum-once", "one TLBI and DSB, where the CPU may complete the DSB too early (CVE-2025-10263)", "5.4",
          "R28", erratum=True)  # fmt: skip
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        yield fetch_clear("pte:x", W, "cleans x")
        for _ in range(1 if wrong else 2):
            yield tlbi("x")
            yield dsb()
        yield copy("x")

    return _scene(["store x 1"], "dirty"), [Actor("S", harvest)], kept("x")


def _combined(name: str, summary: str, stages: Sequence[str]) -> None:
    @_mistake(name, summary, "5.4", "R29")
    def _(wrong: bool) -> Made:
        def harvest() -> Acts:
            yield fetch_clear("pte:x", W, "cleans x")
            for stage in stages if wrong else ("s2", "s1"):
                yield tlbi("x", stage=stage)
                yield dsb()
            yield copy("x")

        return _scene(["store x 1; store x 2"], "dirty", combined=True), [Actor("S", harvest)], kept("x")


_combined("combined-entry", "stage 2 alone is flushed: a combined entry survives", ("s2",))
_combined("stage-1-first", "stage 1 is flushed first: its entries are refilled from the old stage 2", ("s1", "s2"))


@_mistake("level-hint", "a TLBI says the wrong level, and the block's entry stays", "R30")
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        yield fetch_clear("pte:block", W, "cleans the block")
        yield Act("tlbi x, level 3" if wrong else "tlbi x", kind="tlbi", pages=("x",), level="pte:x" if wrong else None)
        yield dsb()
        yield copy("x")

    return _block("dirty", ["store x 1; store x 2"]), [Actor("S", harvest)], _block_kept


@_mistake("skip-flush-nothing-writable", "enabling the log finds nothing writable, and skips its flush: another "
          "operation's flush is still due (b64d740ea7dd)", "5.22", "R5")  # fmt: skip
def _(wrong: bool) -> Made:
    def young() -> Acts:
        yield exchange("pte:x", descriptor("readonly", 1), "clears the young state, with no flush")

    def enable() -> Acts:
        old = yield fetch_clear("pte:x", W)
        if old & W or not wrong:
            yield from flush("x")
        yield copy("x")

    scene = _scene(["store x 1; store x 2"], "untracked")
    return scene, [Actor("S2", young), Actor("S", enable)], _logged_from_start


def _logged_from_start(view: View) -> str | None:
    """Say whether the guest wrote what the first pass hasn't, by a leaf that doesn't record: it is nowhere."""
    return kept("x")(view)


@_mistake("skip-flush-clean", "two faults install the same page, the second as clean; the harvest sees nothing to do, "
          "and skips its flush", "R6")  # fmt: skip
def _(wrong: bool) -> Made:
    def faults() -> Acts:
        for state in ("dirty", "clean"):

            def install(state: str = state) -> Acts:
                yield _mark()
                yield exchange("pte:x", descriptor(state, 1), f"installs x as {state}")

            yield from _locked(install)()

    def harvest() -> Acts:
        bits = yield _take()
        old = yield fetch_clear("pte:x", W, "cleans x")
        if old & W or not wrong:
            yield from flush("x")
        if bits or old & W:
            yield copy("x")

    scene = _scene(["store x 1; store x 2"], "clean", cells={"lock": 0})
    return scene, [Actor("F", faults), Actor("S", _locked(harvest))], kept("x")


# --- two in software ----------------------------------------------------------------------------------------------


def _locked(act: Callable[[], Acts]) -> Callable[[], Acts]:
    def actor() -> Acts:
        yield Act("takes the lock", lambda view: view.exchange("lock", 1), when=lambda view: not view["lock"])
        yield from act()
        yield store("lock", 0, "lets the lock go")

    return actor


@_mistake("unmap-versus-write-back", "an unmap moves the dirty state to the page, with its flush still to come; "
          "write-back finds no mapping, and cleans the page (1cf35d47712d; mremap, 5d1904204c99)", "5.12", "5.22", "R7",
          "R8")  # fmt: skip
def _(wrong: bool) -> Made:
    def unmap() -> Acts:
        old = yield exchange("pte:x", 0)
        if old & W:
            yield _mark(0, "host")
        if not wrong:
            yield from flush("x")

    def late() -> Acts:
        yield from _locked(unmap)()
        if wrong:
            yield from flush("x")

    def write_back() -> Acts:
        bits = yield _take("host")
        if bits:
            yield copy("x", "disk:x")

    scene = _scene(["store x 1; store x 2"], "dirty", cells={"lock": 0})
    return scene, [Actor("S", late), Actor("W", _locked(write_back))], _disk_kept


@_mistake("replace-in-a-flush-window", "one cleans a page, its flush to come; another unmaps it, sees clean, and drops "
          "the frame", "5.22")  # fmt: skip
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        old = yield fetch_clear("pte:x", W, "cleans x")
        if old & W:
            yield _mark()
        yield from flush("x")

    def unmap() -> Acts:
        old = yield exchange("pte:x", 0)
        yield from flush("x")
        if old & W:
            yield _mark(0, "host")

    def write_back() -> Acts:
        yield copy("x", "disk:x")

    def all_of() -> Acts:
        yield from (harvest() if wrong else _locked(harvest)())

    def then() -> Acts:
        yield from (unmap() if wrong else _locked(unmap)())

    def cleaned() -> Acts:  # the host was told when the page was cleaned, and has written it back
        yield Act("waits for the clean", when=lambda view: not view["pte:x"] & W)
        yield from (write_back() if wrong else _locked(write_back)())

    scene = _scene(["store x 1"], "dirty", cells={"lock": 0})
    return scene, [Actor("S", all_of), Actor("S2", then), Actor("W", cleaned)], _disk_kept


@_mistake("copy-before-pending-flush", "pages are write-protected with the flush deferred; another fault copies one, "
          "and "
          "a stale translation still writes the old frame (userfaultfd, 6ce64428d620)", "5.4", "R9")  # fmt: skip
def _(wrong: bool) -> Made:
    def protect() -> Acts:
        yield fetch_clear("pte:x", W | DBM, "write-protects x, its flush deferred")
        if not wrong:
            yield from flush("x")  # pending, so it is made good before the copy
        yield copy("x", "frame:y")
        yield exchange("pte:x", descriptor("untracked", 2), "maps the copy")
        yield from flush("x")

    def end(view: View) -> str | None:
        if view["frame:x"] != view["frame:y"] and view["frame:x"]:
            return "a write to page x is lost: it went to the old frame, after the copy was made"
        return None

    return _scene(["store x 1"], "dirty", frames=("y",)), [Actor("S", protect)], end


@_mistake("shared-word", "two threads change bits of one word by load and store (mapped-ram's present bitmap)", "5.23",
          "R34")  # fmt: skip
def _(wrong: bool) -> Made:
    def change(bit: int, *, on: bool) -> Callable[[], Acts]:
        def thread() -> Acts:
            if not wrong:
                yield fetch_set("bits", bit) if on else fetch_clear("bits", bit)
                return
            old = yield load("bits")
            yield store("bits", old | bit if on else old & ~bit)

        return thread

    def end(view: View) -> str | None:
        return None if view["bits"] == 2 else "a page that is in the file isn't in the bitmap: it is restored as zeros"

    return _scene([], cells={"bits": 1}), [Actor("T1", change(1, on=False)), Actor("T2", change(2, on=True))], end


@_mistake("bitmap-swap", "the log is copied, then zeroed: bits that were set in between are gone (KVM's GET before its "
          "exchange)", "5.23")  # fmt: skip
def _(wrong: bool) -> Made:
    def get() -> Acts:
        if wrong:
            bits = yield load("log")
            yield store("log", 0)
        else:
            bits = yield _take()
        if bits:
            yield copy("x")

    def device() -> Acts:
        yield store("frame:x", 7, "the device writes x")
        yield _mark()

    return _scene([]), [Actor("S", get), Actor("D", device)], kept("x")


@_mistake("freed-twice", "two ways of teardown see the same table, and free it", "R37")
def _(wrong: bool) -> Made:
    def free() -> Acts:
        if wrong:
            table = yield load("table")
            yield store("table", 0)
        else:
            table = yield exchange("table", 0)
        if table:
            yield Act("frees it", lambda view: view.exchange("freed", view["freed"] + 1))

    def end(view: View) -> str | None:
        return "the table is freed twice" if view["freed"] > 1 else None

    return _scene([], cells={"table": 1, "freed": 0}), [Actor("S", free), Actor("S2", free)], end


@_mistake("classified-by-two-reads", "a page's frame is read, and then that frame's flags: the page has moved "
          "in between "
          "(CubeSandbox #1343)", "R31")  # fmt: skip
def _(wrong: bool) -> Made:
    def snapshot() -> Acts:
        if wrong:
            pfn = yield load("pfn")
            anonymous = yield load(f"flags{pfn}")
        else:
            anonymous = yield Act("reads the page's one word", lambda view: view[f"flags{view['pfn']}"])
        if anonymous:
            yield store("copy:x", 7, "copies x")

    def migrate() -> Acts:
        yield store("flags1", 1, "the new frame is anonymous")
        yield store("pfn", 1, "the page moves")
        yield store("flags0", 0, "the old frame is free")

    def end(view: View) -> str | None:
        return None if view["copy:x"] else "a dirty page is left out of the snapshot"

    return _scene([], cells={"pfn": 0, "flags0": 1, "flags1": 0}), [Actor("S", snapshot), Actor("host", migrate)], end


# --- masks, blocks, runs ------------------------------------------------------------------------------------------


@_mistake("range-protect", "all pages from the first to the last of a mask are cleaned, also those that aren't in it",
          "5.6", "RFC patch 4")  # fmt: skip
def _(wrong: bool) -> Made:
    def clear() -> Acts:
        bits = yield _take()
        for number, page in enumerate("xyz"):
            if bits >> number & 1 or wrong:
                yield fetch_clear(f"pte:{page}", W, f"cleans {page}")
        yield from flush("x", "y", "z")
        for number, page in enumerate("xyz"):
            if bits >> number & 1:
                yield copy(page)

    scene = _scene(["store y 1"], {"x": "clean", "y": "clean", "z": "clean"}, values={"log": 0b101})
    return scene, [Actor("S", clear)], kept("x", "y", "z")


@_mistake("clear-unknown", "a CLEAR by a mask of pages that its consumer was never shown (QEMU 9f4bf4ba)", "5.15")
def _(wrong: bool) -> Made:
    def clear() -> Acts:
        shown = yield load("log")
        mask = 1 if wrong else shown
        yield fetch_clear("log", mask, "clears the mask's bits")
        yield fetch_clear("pte:x", W if mask else 0, "cleans the mask's pages")
        yield from flush("x")
        if shown:
            yield copy("x")

    return _scene(["store x 1"]), [Actor("S", clear)], kept("x")


def _block(state: str, programs: Sequence[str], **options: Any) -> Scene:
    """Return two pages under a block, whose frames follow one another."""
    numbers = {"x": 512, "y": 513}
    scene = _scene(programs, {"x": "absent", "y": "absent"}, block={"x": 0, "y": 1}, numbers=numbers, **options)
    scene.mem[scene.cell("pte:block")] = descriptor(state, 512) & ~pte.TYPE
    return scene


def _block_kept(view: View) -> str | None:
    block = view["pte:block"]
    if block & pte.TABLE == pte.TABLE:
        return kept("x", "y")(view)
    for page in "xy":
        if view[f"copy:{page}"] != view[f"frame:{page}"] and not (block & W and block & DBM) and not view["log"]:
            return f"a write to page {page} is lost: the copy is old, and nothing says that it is dirty"
    return None


def _children(state: str) -> Iterator[Act]:
    for number, page in enumerate("xy"):
        yield store(f"pte:{page}", descriptor(state, 512 + number), f"fills in {page} as {state}")


@_mistake("split-forgets", "a block is read, its pages are made from that, and the table put in its place: a mark that "
          "came in between is gone", "5.7")  # fmt: skip
def _(wrong: bool) -> Made:
    def split() -> Acts:
        old = yield load("pte:block")
        yield from _children("clean")
        if wrong:
            yield store("pte:block", pte.TABLE, "puts the table there")
        else:
            old = yield exchange("pte:block", pte.TABLE, "exchanges the table for the block")
        yield from flush("x", "y")
        if old & W:
            yield fetch_set("log", 3, "marks all its pages")

    return _block("clean", ["store x 1"]), [Actor("S", split)], _block_kept


@_mistake("split-grants", "the pages of a write-protected block that had been dirty become dirty, which on Arm is "
          "writable (0ccf7f168e17)", "5.7", "R20", always=_read_only_stays("x", "y"))  # fmt: skip
def _(wrong: bool) -> Made:
    def split() -> Acts:
        yield fetch_set("log", 3, "marks all its pages")
        yield from _children("dirty" if wrong else "readonly")
        yield exchange("pte:block", pte.TABLE, "exchanges the table for the block")
        yield from flush("x", "y")

    return _block("readonly", ["store x 1"]), [Actor("S", split)], lambda _: None


@_mistake("collapse-forgets", "pages are read, and a clean block put in their place: marks from in between are gone",
          "5.8")  # fmt: skip
def _(wrong: bool) -> Made:
    def collapse() -> Acts:
        dirty = 0
        for number, page in enumerate("xy"):
            old = yield (load(f"pte:{page}") if wrong else exchange(f"pte:{page}", 0, f"removes {page}"))
            dirty |= (1 if old & W else 0) << number
        if not wrong:
            yield from flush("x", "y")
        yield fetch_set("log", dirty, "marks the dirty ones")
        yield store("pte:block", descriptor("clean", 512) & ~pte.TYPE, "puts the block there")
        yield from flush("x", "y")

    scene = _block("clean", ["store x 1"])
    for number, page in enumerate("xy"):
        scene.mem[scene.cell(f"pte:{page}")] = descriptor("clean", 512 + number)
    scene.mem[scene.cell("pte:block")] = pte.TABLE
    return scene, [Actor("S", collapse)], _block_kept


@_mistake("block-skipped", "write-back protects the pages of level 3, and skips the block that maps them (DAX, "
          "06083a0921fd)", "5.6", "R21")  # fmt: skip
def _(wrong: bool) -> Made:
    def write_back() -> Acts:
        yield _take("host")
        for cell in ("pte:x",) if wrong else ("pte:x", "pte:block"):
            yield fetch_clear(cell, W | DBM, f"write-protects {cell}")
        yield from flush("x", "y")
        yield copy("x", "disk:x")

    def end(view: View) -> str | None:
        same = view["disk:x"] == view["frame:x"]
        return None if same else "the disk is old, the page's flag is clear, and its leaf recorded nothing"

    return _block("untracked", ["store x 1"], values={"host": 1}), [Actor("W", write_back)], end


@_mistake("block-as-one-page", "a block's entry in a log of the hardware's is taken for one page", "5.13", "R27")
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        old = yield fetch_clear("pte:block", W, "cleans the block")
        yield from flush("x", "y")
        for page in ("x",) if wrong else ("x", "y"):
            if old & W:
                yield copy(page)

    return _block("clean", ["store y 1"]), [Actor("S", harvest)], _block_kept


@_mistake("run-member-alone", "one member of a contiguous run is cleaned: a TLB may use another's dirty entry for it",
          "5.9")  # fmt: skip
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        for page in ("x",) if wrong else ("x", "y"):
            yield fetch_clear(f"pte:{page}", W, f"cleans {page}")
        yield from flush("x", "y")
        yield copy("x")
        if not wrong:
            yield copy("y")

    def end(view: View) -> str | None:
        # The MMU marks any one member, so the run is dirty if one is: the harvest takes the whole of it for that.
        dirty = not wrong and (view["pte:x"] | view["pte:y"]) & W
        return None if dirty else kept("x", "y")(view)

    scene = _scene(["store x 1"], {"x": "dirty", "y": "dirty"}, run=("x", "y"))
    return scene, [Actor("S", harvest)], end


@_mistake("run-gathered", "a fault's handler sees a contiguous run as one, finds it writable, and does nothing "
          "(97c5550b7631)", "5.24", "R18")  # fmt: skip
def _(wrong: bool) -> Made:
    def handle(page: str) -> Acts:
        gathered = 0
        for each in ("x", "y") if wrong else (page,):
            gathered |= yield load(f"pte:{each}")
        if not gathered & W:
            yield fetch_set(f"pte:{page}", W, f"lets {page} be written")

    scene = _scene(["store y 1"], {"x": "untracked", "y": "readonly"})
    return scene, [Actor("H", handle, handles=0)], lambda _: None


@_mistake("clean-taken-for-writable", "with hardware DBM off a fault finds DBM set, thinks that the page is "
          "writable, and "
          "does nothing", "5.11", "R19")  # fmt: skip
def _(wrong: bool) -> Made:
    def handle(page: str) -> Acts:
        old = yield load(f"pte:{page}")
        if not (wrong and old & DBM):
            yield _mark()
            yield fetch_set(f"pte:{page}", W, f"lets {page} be written")

    return _scene(["store x 1"], "clean", hd=False), [Actor("H", handle, handles=0)], kept("x")


@_mistake(
    "shadow-unprotected", "a page is mapped twice (a nested guest's shadow table), and one mapping is cleaned", "R35"
)
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        dirty = 0
        for page in ("x",) if wrong else ("x", "z"):
            dirty |= yield fetch_clear(f"pte:{page}", W, f"cleans {page}")
        yield from flush("x", "z")
        if dirty & W:
            yield copy("x")

    def end(view: View) -> str | None:
        dirty = (view["pte:x"] | (0 if wrong else view["pte:z"])) & W
        if view["copy:x"] != view["frame:x"] and not dirty:
            return "a write to page x is lost: it went by the other mapping"
        return None

    scene = _scene(["store z 1"], {"x": "clean", "z": "clean"})
    scene.mem[scene.cell("pte:z")] = descriptor("clean", 1)
    return scene, [Actor("S", harvest)], end


# --- writers that are no vCPU, consumers, the host -----------------------------------------------------------------


@_mistake("device-unmarked", "a write that isn't the guest's own (an emulated atomic, a device) marks nothing "
          "(910c57dfa4d1)", "5.17", "R13")  # fmt: skip
def _(wrong: bool) -> Made:
    def device() -> Acts:
        yield store("frame:x", 7, "the VMM writes x")
        if not wrong:
            yield _mark()

    return _scene([]), [Actor("D", device)], kept("x")


@_mistake("device-marks-first", "a device marks its page, then writes: a harvest comes in between", "5.17")
def _(wrong: bool) -> Made:
    def device() -> Acts:
        write = store("frame:x", 7, "the device writes x")
        yield _mark() if wrong else write
        yield write if wrong else _mark()

    def get() -> Acts:
        if (yield _take()):
            yield copy("x")

    return _scene([]), [Actor("D", device), Actor("S", get)], kept("x")


@_mistake("pinned-after-write-back", "a device writes a pinned page after it was cleaned, and the file system isn't "
          "told "
          "(8ac268436e6d)", "5.17", "R22")  # fmt: skip
def _(wrong: bool) -> Made:
    def device() -> Acts:
        if not wrong:
            yield store("told", 1, "tells the file system, instead of pinning")
        yield store("frame:x", 7, "the device writes x")
        yield _mark(0, "host")

    def write_back() -> Acts:
        yield _take("host")
        yield copy("x", "disk:x")

    def end(view: View) -> str | None:
        if view["disk:x"] != view["frame:x"] and not view["told"]:
            return "the page is dirty, and the file system doesn't know: it has no room to write it to"
        return None

    return _scene([], cells={"told": 0}), [Actor("D", device), Actor("W", write_back)], end


@_mistake("drop-reads-refcount-early", "reclaim reads the reference count before the page is unmapped (MADV_FREE and "
          "direct I/O, 6c8e2a256915)", "5.17", "R11")  # fmt: skip
def _(wrong: bool) -> Made:
    def device() -> Acts:
        pins = yield Act("pins x, if it is mapped", lambda view: view.exchange("pins", view["mapped"]) + view["pins"])
        if pins:
            yield store("frame:x", 7, "writes by its pin")
            yield _mark(0, "host")
            yield store("pins", 0, "lets the pin go")

    def reclaim() -> Acts:
        pins = 0
        if wrong:
            pins = yield load("pins")
        yield store("mapped", 0, "unmaps the page")
        if not wrong:
            pins = yield load("pins")
        dirty = yield load("host")
        if not pins and not dirty:
            yield store("dropped", 1, "drops the page")

    def end(view: View) -> str | None:
        return (
            "the page is dropped with what the device wrote: it reads as zeros"
            if view["dropped"] and view["frame:x"]
            else None
        )

    return _scene([], cells={"mapped": 1, "pins": 0, "dropped": 0}), [Actor("D", device), Actor("W", reclaim)], end


@_mistake("key-read-then-cleared", "dirty state per frame is read when the page goes, and cleared by another step "
          "(s390's storage keys, abf09bed3cce)", "5.12", "R23")  # fmt: skip
def _(wrong: bool) -> Made:
    def write() -> Acts:
        yield Act(
            "the guest writes x, and its key is set",
            lambda view: view.exchange("frame:x", 1) + view.exchange("key", 1),
        )

    def write_back() -> Acts:
        if wrong:
            key = yield load("key")
            if key:
                yield copy("x", "disk:x")
            yield store("key", 0)
        elif (yield exchange("key", 0)):
            yield copy("x", "disk:x")

    def end(view: View) -> str | None:
        return None if view["disk:x"] == view["frame:x"] or view["key"] else "the host drops page x: its key is clear"

    return _scene([], cells={"key": 0}), [Actor("guest", write), Actor("W", write_back)], end


@_mistake("failed-without-rollback", "a consumer fails with the pages it took, and they are forgotten (propolis #387, "
          "Firecracker #4383)", "5.16")  # fmt: skip
def _(wrong: bool) -> Made:
    def consumer() -> Acts:
        bits = yield _take()
        failed = yield Act("the connection fails, or doesn't", lambda view: view["fails"])
        if not failed:
            if bits:
                yield copy("x")
        elif not wrong:
            yield fetch_set("log", bits, "gives the pages back")

    def network() -> Acts:
        yield store("fails", 1, "the network goes")

    scene = _scene([], values={"log": 1, "frame:x": 7}, cells={"fails": 0})
    return scene, [Actor("S", consumer), Actor("net", network)], kept("x")


@_mistake("import-unmarked", "pages that came by a migration aren't dirty, so the next hop leaves them out "
          "(propolis #232)", "5.16")  # fmt: skip
def _(wrong: bool) -> Made:
    def imported() -> Acts:
        yield store("frame:x", 7, "the page arrives")
        if not wrong:
            yield _mark()

    def onward() -> Acts:
        yield Act("waits for the arrival", when=lambda view: view["frame:x"] == 7)
        if (yield _take()):
            yield copy("x")

    return _scene([]), [Actor("in", imported), Actor("out", onward)], kept("x")


@_mistake("deleted-before-get", "a slot is deleted with its last dirty bits unread", "5.19")
def _(wrong: bool) -> Made:
    def teardown() -> Acts:
        if not wrong:
            yield from _harvest()
        yield exchange("pte:x", 0, "deletes the slot")
        yield store("log", 0, "and its bitmap")

    def end(view: View) -> str | None:
        done = view["copy:x"] == view["frame:x"] or not view["stopped"]
        return None if done else "a write to page x is lost: its bit died with the slot"

    scene = _scene(["store x 1; dsb; store stopped 1"], cells={"stopped": 0})

    def after() -> Acts:
        yield Act("waits until the vCPU has stopped", when=lambda view: view["stopped"] == 1)
        yield from teardown()

    return scene, [Actor("S", after)], end


@_mistake("parent-not-advanced", "a snapshot resets the epoch, and the next one still builds on the parent of that one "
          "(AgentENV #120)", "5.16", "R33")  # fmt: skip
def _(wrong: bool) -> Made:
    def chain() -> Acts:
        for number in (1, 2):
            bits = yield _take()
            parent = yield load("parent")
            for bit, page in enumerate("xy"):
                if bits >> bit & 1:
                    yield Act(f"snapshot {number} has {page}", lambda view, page=page: view[f"frame:{page}"])  # type: ignore[misc]
            yield store(f"has{number}", bits | ((yield load(f"has{parent}")) if parent else 0))
            if not wrong:
                yield store("parent", number, "the next one builds on this")

    def write() -> Acts:
        for bit in range(2):
            yield fetch_set("log", 1 << bit, f"the guest writes page {'xy'[bit]}")
            yield fetch_set("written", 1 << bit, "")

    def end(view: View) -> str | None:
        lost = view["written"] & ~(view["has2"] | view["log"])
        return f"page {'xy'[lost >> 1]} is missing from the last snapshot" if lost else None

    pages = {"x": "clean", "y": "clean"}
    cells = {"parent": 0, "has1": 0, "has2": 0, "written": 0}
    return _scene([], pages, cells=cells), [Actor("S", chain), Actor("guest", write)], end


# --- several clients of one log ------------------------------------------------------------------------------------


def _each_kept(view: View) -> str | None:
    """Say which client's copy is old, with nothing that says so: not its own bits, nor the descriptor."""
    if view["pte:x"] & W:
        return None
    for client in "AB":
        if view[f"of{client}"] != view["frame:x"] and not view[f"log{client}"] and not view["fresh"]:
            return f"a write to page x is lost for client {client}: its copy is old, and nothing says that it is dirty"
    return None


def _pour(*clients: str) -> Acts:
    """Set the bit for each client in turn, and take it out of what was published last."""
    for client in clients:
        yield fetch_set(f"log{client}", 1, f"sets the page's bit for {client}")
    yield store("fresh", 0, "takes it out of what was published")


def _taker(client: str, bitmap: str, harvest: Callable[[], Acts]) -> Actor:
    def take() -> Acts:
        yield Act("holds the page", lambda view: view.__setitem__("held", 1), when=lambda view: view["held"] == 0)
        yield from harvest()
        bits = yield exchange(bitmap, 0, f"takes the bits of {bitmap}")
        yield store("held", 0, "lets go of it")
        if bits:
            yield copy("x", f"of{client}")

    return Actor(client, take)


_CLIENTS: Final = {f"{what}{client}": 0 for what in ("of", "log") for client in "AB"} | {"fresh": 0, "held": 0}


@_mistake("client-steals", "two clients take from one bitmap, and each misses what the other has taken", "5.16")
def _(wrong: bool) -> Made:
    def harvest() -> Acts:
        old = yield fetch_clear("pte:x", W)
        yield from flush("x")
        if old & W:
            yield from _pour("A") if wrong else _pour("A", "B")

    actors = [_taker("A", "logA", harvest), _taker("B", "logA" if wrong else "logB", harvest)]
    return _scene(["store x 1"], cells=_CLIENTS), actors, _each_kept


@_mistake("published-to-one", "a client's harvest cleans the page, and publishes it to that client alone", "5.16")
def _(wrong: bool) -> Made:
    def harvest(*clients: str) -> Callable[[], Acts]:
        def acts() -> Acts:
            old = yield fetch_clear("pte:x", W)
            yield from flush("x")
            if old & W:
                yield from _pour(*clients)

        return acts

    actors = [_taker(name, f"log{name}", harvest(*(name if wrong else "AB"))) for name in "AB"]
    return _scene(["store x 1"], cells=_CLIENTS), actors, _each_kept


@_mistake("published-half-way", "an interrupt comes when a harvest has told one client, and nothing says that "
          "another is to hear of it", "5.16")  # fmt: skip
def _(wrong: bool) -> Made:
    def clean(view: View) -> int:
        old = view["pte:x"]
        view["pte:x"] = old & ~W
        if old & W and not wrong:
            view["fresh"] = 1  # in the pass that cleans
        return old & W

    def harvest() -> Acts:
        found = yield Act("cleans x, and notes what it had", clean)
        yield from flush("x")
        if found or (yield load("fresh")):
            yield fetch_set("logA", 1, "sets the page's bit for A")
            if (yield load("interrupt")):
                return
            yield fetch_set("logB", 1, "sets the page's bit for B")
            yield store("fresh", 0, "takes it out of what was published")

    def signal() -> Acts:
        yield store("interrupt", 1, "a signal comes")
        yield store("interrupt", 0, "and was seen")

    actors = [_taker("A", "logA", harvest), _taker("B", "logB", harvest), Actor("signal", signal)]
    return _scene(["store x 1"], cells=_CLIENTS | {"interrupt": 0}), actors, _each_kept


@_mistake("clear-drops-for-others", "a CLEAR re-protects a page, and drops what the leaf has recorded: its caller "
          "copies the page, another client never hears of it", "5.16")  # fmt: skip
def _(wrong: bool) -> Made:
    def clear() -> Acts:
        old = yield fetch_clear("pte:x", W)
        yield from flush("x")
        if old & W and not wrong:
            yield fetch_set("logB", 1, "sets the page's bit for B")
        yield exchange("logA", 0, "takes the bits of logA")

    def first() -> Acts:
        yield Act("holds the page", lambda view: view.__setitem__("held", 1), when=lambda view: view["held"] == 0)
        yield from clear()
        yield store("held", 0, "lets go of it")
        yield copy("x", "ofA")

    def harvest() -> Acts:
        old = yield fetch_clear("pte:x", W)
        yield from flush("x")
        if old & W:
            yield from _pour("A", "B")

    actors = [Actor("A", first), _taker("B", "logB", harvest)]
    return _scene(["store x 1"], "dirty", cells=_CLIENTS | {"logA": 1, "logB": 1}), actors, _each_kept


@_mistake("epoch-without-parent", "the epoch ends when the bits are taken, and not when the snapshot is whole: one "
          "that fails is no parent, and its pages are in no other", "5.16", "R33")  # fmt: skip
def _(wrong: bool) -> Made:
    def commit(bits: int) -> Act:
        return Act("commits: the snapshot is the next one's parent",
                   lambda view: view.__setitem__("chain", view["chain"] | bits))  # fmt: skip

    def snapshot() -> Acts:
        bits = yield _take()
        if not (yield load("full")):
            yield commit(bits)
        elif bits and not wrong:
            yield fetch_set("log", bits, "rolls back: the pages are in the next one")

    def last() -> Acts:
        yield commit((yield _take()))

    def write() -> Acts:
        for bit in range(2):
            yield fetch_set("written", 1 << bit, f"the guest writes page {'xy'[bit]}")
            yield fetch_set("log", 1 << bit, f"marks page {'xy'[bit]}")

    def disk() -> Acts:
        yield store("full", 1, "the disk is full")

    def end(view: View) -> str | None:
        lost = view["written"] & ~view["chain"]
        return f"page {'xy'[lost >> 1]} is in no snapshot of the chain" if lost else None

    scene = _scene([], {"x": "clean", "y": "clean"}, cells={"chain": 0, "written": 0, "full": 0})
    actors = [Actor("S", snapshot), Actor("guest", write), Actor("disk", disk), Actor("next", last, last=True)]
    return scene, actors, end


# --- rings, and logs that the hardware keeps -----------------------------------------------------------------------


@_mistake("ring-without-barrier", "a ring's entry is read before what it says is there (8929bc965964)", "5.14", "R14",
          names=("producer", "consumer"))  # fmt: skip
def _(wrong: bool) -> Made:
    def end(view: View) -> str | None:
        found = End(view.protocol.scene, view.state)
        if found["f"] == 1 and found["g"] != 5:
            return "the consumer harvests an old page number, and the page that was written is lost"
        return None

    cells = {"entry": 0, "flag": 0}
    programs = ["store entry 5; store flag 1", "load flag -> f; load entry -> g"]
    if not wrong:
        programs = ["store entry 5; dmb st; store flag 1", "load flag -> f; dmb ld; load entry -> g"]
    return _scene(programs, cells=cells), [], end


@_mistake("ring-reset-endless", "the kernel resets entries for as long as user space flags more (530a8ba71b4c)", "R15")
def _(wrong: bool) -> Made:
    def reset() -> Acts:
        for _ in range(2):
            flagged = yield exchange("flag", 0, "resets the entry")
            if not flagged:
                return
            if wrong:
                yield again()

    def user() -> Acts:
        stop = yield load("stop")
        if not stop:
            yield store("flag", 1, "flags it again")
            yield again()

    def signal() -> Acts:
        yield store("stop", 1, "user space has had enough")

    scene = _scene([], cells={"flag": 1, "stop": 0})
    return scene, [Actor("kernel", reset, bounded=True), Actor("user", user), Actor("signal", signal)], lambda _: None


@_mistake("ring-full", "a vCPU goes on with its ring full, and writes over an entry (86bdf3eb)", "5.14")
def _(wrong: bool) -> Made:
    def push() -> Acts:
        for page in (1, 2):
            if not wrong:
                yield Act("exits while the ring is full", when=lambda view: view["ring"] == 0)
            yield store("ring", page, f"pushes page {page}")

    def harvest() -> Acts:
        for _ in range(2):
            entry = yield Act("takes an entry", lambda view: view.exchange("ring", 0),
                              when=lambda view: view["ring"] != 0 or view["over"] == 1)  # fmt: skip
            yield fetch_set("log", entry, "notes its page")

    def producer() -> Acts:
        yield from push()
        yield store("over", 1, "stops")

    def end(view: View) -> str | None:
        return None if view["log"] | view["ring"] == 3 else "a page is lost: its entry in the ring was written over"

    return _scene([], cells={"ring": 0, "over": 0}), [Actor("vCPU", producer), Actor("S", harvest)], end


@_mistake(
    "buffer-not-awaited", "the last GET asks vCPUs to empty their buffers, and doesn't wait (HDBSS v3)", "5.13", "R24"
)
def _(wrong: bool) -> Made:
    def vcpu() -> Acts:
        yield store("frame:x", 7, "the guest writes x")
        yield store("buffer", 1, "the MMU appends x to the buffer")
        yield Act("exits, as it was asked to", when=lambda view: view["asked"] == 1)
        yield exchange("buffer", 0)
        yield _mark()
        yield store("done", 1, "says so")

    def last_get() -> Acts:
        yield store("asked", 1, "asks the vCPU to empty its buffer")
        if not wrong:
            yield Act("waits for it", when=lambda view: view["done"] == 1)
        if (yield _take()):
            yield copy("x")

    scene = _scene([], cells={"buffer": 0, "asked": 0, "done": 0})
    return scene, [Actor("vCPU", vcpu), Actor("S", last_get)], _same


@_mistake("buffer-freed", "HDBSS is switched off, and its buffer freed, with a vCPU still in it (v3)", "5.11", "5.13",
          "R25")  # fmt: skip
def _(wrong: bool) -> Made:
    def vcpu() -> Acts:
        on = yield load("on")
        if on:
            yield Act("the MMU appends to the buffer", lambda view: view.exchange("corrupt", view["freed"]))
        yield store("out", 1, "exits")

    def off() -> Acts:
        yield store("on", 0, "switches it off")
        if not wrong:
            yield Act("waits until the vCPU is out", when=lambda view: view["out"] == 1)
        yield store("freed", 1, "frees the buffer")

    def end(view: View) -> str | None:
        return "the MMU wrote into memory that was freed" if view["corrupt"] else None

    return _scene([], cells={"on": 1, "out": 0, "freed": 0, "corrupt": 0}), [Actor("vCPU", vcpu), Actor("S", off)], end


@_mistake("buffer-after-hd", "hardware DBM is on before a vCPU has its buffer: nothing is logged (v1)", "5.11",
          "R26")  # fmt: skip
def _(wrong: bool) -> Made:
    def vcpu() -> Acts:
        on = yield load("hd")
        if on:
            yield store("frame:x", 7, "the guest writes x, marked by the MMU")
            if (yield load("buffer")):
                yield _mark()
        else:
            yield store("frame:x", 7, "the write faults, and its handler marks")
            yield _mark()

    def enable() -> Acts:
        for cell in ("hd", "buffer") if wrong else ("buffer", "hd"):
            yield store(cell, 1, f"switches the {cell} on")

    def end(view: View) -> str | None:
        return None if not view["frame:x"] or view["log"] else "a write to page x is lost: it is in no buffer"

    return _scene([], cells={"hd": 0, "buffer": 0}), [Actor("vCPU", vcpu), Actor("S", enable)], end
