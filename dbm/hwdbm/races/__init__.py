"""Races: the protocol's steps, interleaved with vCPUs, other software and failures in every order there is.

`check` explores a `Protocol`: vCPUs, written as programs of a `Scene`, and `Actor` functions that yield an `Act` at
each access to what others see too. It returns a `Finding`: a proof over the whole state space, or a shortest way to
what is wrong. ``hwdbm races`` does that for the protocols of this package and for every known mistake.

Examples
--------
>>> from hwdbm.races import MISTAKES, check
>>> found = check(MISTAKES["no-flush"].make(True))
>>> found.proved, found.wrong[:28], len(found.steps)
(False, 'a write to page x is lost: t', 6)
>>> check(MISTAKES["no-flush"].make(False)).proved
True
"""

# What `hwdbm races` and protocols of one's own are made of; see docs/howto/races.md. Checks of arguments are few here.
from hwdbm.races.mistakes import MISTAKES as MISTAKES
from hwdbm.races.mistakes import Mistake as Mistake
from hwdbm.races.program import End as End
from hwdbm.races.program import Scene as Scene
from hwdbm.races.program import descriptor as descriptor
from hwdbm.races.protocol import Act as Act
from hwdbm.races.protocol import Actor as Actor
from hwdbm.races.protocol import Finding as Finding
from hwdbm.races.protocol import Protocol as Protocol
from hwdbm.races.protocol import Step as Step
from hwdbm.races.protocol import View as View
from hwdbm.races.protocol import again as again
from hwdbm.races.protocol import check as check
from hwdbm.races.protocol import copy as copy
from hwdbm.races.protocol import dsb as dsb
from hwdbm.races.protocol import exchange as exchange
from hwdbm.races.protocol import fetch_clear as fetch_clear
from hwdbm.races.protocol import fetch_set as fetch_set
from hwdbm.races.protocol import flush as flush
from hwdbm.races.protocol import kept as kept
from hwdbm.races.protocol import load as load
from hwdbm.races.protocol import store as store
from hwdbm.races.protocol import swap_if as swap_if
from hwdbm.races.protocol import tlbi as tlbi
from hwdbm.races.protocols import PRODUCTION as PRODUCTION
from hwdbm.races.timeline import diagram as diagram
from hwdbm.races.timeline import timeline as timeline
