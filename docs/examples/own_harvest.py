"""A harvest that shows its pages first, and cleans them later."""

from hwdbm.races import Actor, Protocol, Scene, copy, dsb, fetch_clear, fetch_set, kept, load, tlbi

DIRTY = 1 << 7  # S2AP[1]


def harvest(flushes=True):
    shown = yield load("pte:x")  # each yield is one access to what others see too
    if shown & DIRTY:
        yield fetch_set("log", 1)
    yield fetch_clear("pte:x", DIRTY, "cleans x")
    if flushes:
        yield tlbi("x")
        yield dsb()
    if (yield fetch_clear("log", 1, "takes x out of the log")):
        yield copy("x")


scene = Scene({"x": "clean"}, ["store x 1; store x 2"], {"copy:x": 0, "log": 0})
protocol = Protocol("own", scene, [Actor("S", harvest)], kept("x"))
