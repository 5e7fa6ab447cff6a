"""What the tests of the dirty log share: a log with one slot, a guest that writes, and looks inside."""

from hwdbm import DirtyLog, pte, walker


def make(npages=200, base=0x40, flags=1, flush=None, **kwargs):
    log = DirtyLog(flush=flush, **kwargs)
    log.set_memory_region(0, flags, base << log.granule.page_shift, npages << log.granule.page_shift, 0)
    return log


def write(log, *pages, slot=0):
    """Write pages as a guest does, faults included."""
    for page in pages:
        s2 = log.stage2(slot)
        if walker.guest_write(s2, s2.base_gfn + page, hd=log.hw_dbm) is not walker.Access.DONE:
            log.write_fault(slot, s2.base_gfn + page, None if s2.mapped(page, 1) else page)
            assert walker.guest_write(s2, s2.base_gfn + page, hd=log.hw_dbm) is walker.Access.DONE


def states(log, *pages):
    return [pte.state(int(log.stage2(0).level(3)[page]), 3) for page in pages]


def pages_of(bitmap):
    return bitmap.pages().tolist()


def take(lease):
    """The pages of a lease, for good."""
    lease.commit()
    return lease.bitmap


def live(log, slot=0):
    """The slot's bitmap as it is, without a sync."""
    return log._slots[slot].live


def frozen(log, slot=0):
    """All that a failed call must leave as it was."""
    s2 = log.stage2(slot)
    bitmap = live(log, slot)
    return (
        log.memslots,
        None if bitmap is None else bitmap.to_bytes(),
        *(s2.level(level).tobytes() for level in (1, 2, 3)),
        s2.saved.bitmap.to_bytes(),
        s2.host_dirty.to_bytes(),
    )
