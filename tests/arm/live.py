"""An emulated Arm machine that never stops writing, tracked in its own tables: what is right, and what loses pages.

``make live`` runs it. The machine is migrated to another process while it writes, and the SHA-256 of all memory is
compared. Then harvests race two vCPUs for some seconds, once as it is right and once with each known mistake. It fails
if the right way loses a page, or a wrong one none in its time: a race that can't be lost shows nothing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from armjudge import Judge

from hwdbm import kernels
from hwdbm.arm import ArmVm

MEMORY = 64 << 20


def tracked(vm, s2):
    """Harvest, flush, copy; and in between unmap some pages and map them again, as a host does that reclaims memory."""
    rng = np.random.default_rng(1)

    def collect(copy):
        found = s2.harvest()
        vm.board.flush()
        copy(found)
        page = int(rng.integers(s2.npages - 2048))
        frames = s2.leaf_at(np.arange(page, page + 2048)).desc.astype(np.int64) >> 12 & (1 << 36) - 1
        s2.unmap(s2.base_gfn + page, 2048)
        vm.board.flush()
        s2.map(s2.base_gfn + page, 2048, frames, dbm=True)
        return found

    return collect


def right(vm):
    """Atomic kernels, then the flush, then the copy."""
    return tracked(vm, vm.stage2(0))


def plain(vm):
    """Loads and stores in place of atomic operations: what the MMU marks in between is undone."""
    slot = vm.slots[0]
    return tracked(vm, vm.live.stage2(slot.base_gfn, slot.npages, kernels="vector", flush=vm.board.flush))


def unflushed(vm):
    """No flush: a vCPU goes on writing by an entry of its TLB that says dirty."""
    s2 = vm.stage2(0)

    def collect(copy):
        found = s2.harvest()
        copy(found)
        return found

    return collect


def flushed_before(vm):
    """The flush before the clean: the TLB is filled again in between."""
    s2 = vm.stage2(0)

    def collect(copy):
        vm.board.flush()
        found = s2.harvest()
        copy(found)
        return found

    return collect


def copied_before(vm):
    """The copy before the flush: what is written in between, without a mark, isn't in the copy."""
    s2 = vm.stage2(0)

    def collect(copy):
        found = s2.harvest()
        copy(found)
        vm.board.flush()
        return found

    return collect


def rounds(variant, guest, seconds, until_lost):
    """Return stores and harvests, and how many pages were lost, in so many seconds at most."""
    with ArmVm(MEMORY, vcpus=2, guest=guest, window=4096) as vm:
        vm.start_log()
        judge = Judge(vm.board, vm.guests, vm.memory(0), variant(vm))
        end, number, lost = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end and not (lost and until_lost):
            # Most rounds are short, so that a page that was lost isn't written and marked once more before its end.
            content = number % 8 == 0
            missed, _, stale = judge.round(
                harvests=8 if content else 3, stores=20_000 if content else 0, content=content
            )
            number += 1
            if missed or stale:
                lost += max(missed, stale)
        return judge.stores, judge.harvests, lost


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="256M", help="of the machine that is migrated")
    parser.add_argument("--seconds", type=float, default=10, help="that the right way has, with each kind of guest")
    parser.add_argument("--patience", type=float, default=60, help="seconds in which each mistake must lose a page")
    options = parser.parse_args()
    for extra in ((), ("--thp", "--workload", "mixed")):
        command = ["migrate", "--source", "arm", "--memory", options.memory, *extra]
        print("$ hwdbm", *command, flush=True)
        subprocess.run([sys.executable, "-P", "-m", "hwdbm", *command], check=True)
    print()
    kernels.warm_up()
    failed = False
    print(f"{'':34}{'guest':12}{'seconds':>8}{'stores':>12}{'harvests':>10}{'lost pages':>12}", flush=True)

    def run(name, variant, guest, seconds, *, must_lose):
        nonlocal failed
        start = time.monotonic()
        stores, harvests, lost = rounds(variant, guest, seconds, must_lose)
        wrong = bool(lost) != must_lose
        failed |= wrong
        verdict = "" if not wrong else "  FAILED: " + ("nothing was lost" if must_lose else "pages were lost")
        took = time.monotonic() - start
        print(f"{name:34}{guest:12}{took:8.1f}{stores:12,}{harvests:10,}{lost:12,}{verdict}", flush=True)

    for guest in ("random", "window", "stage1"):
        run("atomic, flush, copy", right, guest, options.seconds, must_lose=False)
    run("plain loads and stores", plain, "random", options.patience, must_lose=True)
    run("no flush", unflushed, "window", options.patience, must_lose=True)
    run("flush before the clean", flushed_before, "window", options.patience, must_lose=True)
    run("copy before the flush", copied_before, "window", options.patience, must_lose=True)
    if failed:
        sys.exit("what is right lost pages, or what is wrong lost none")
    print("\nall memory was equal, the right way lost nothing, and each mistake was found")


if __name__ == "__main__":
    main()
