"""Many VMs: drain a host or a rack, in which order, how many at once, and with what shares of the links."""

from hwdbm.errors import PlanError
from hwdbm.fleet.cluster import tabulate
from hwdbm.fleet.curves import Curves, Taken
from hwdbm.fleet.plan import Fleet, FleetVm, Host, Link, read_plan
from hwdbm.fleet.planner import Drained, Ending, Left, Move, Shift, drain

__all__ = [
    "Curves",
    "Drained",
    "Ending",
    "Fleet",
    "FleetVm",
    "Host",
    "Left",
    "Link",
    "Move",
    "PlanError",
    "Shift",
    "Taken",
    "drain",
    "read_plan",
    "tabulate",
]
