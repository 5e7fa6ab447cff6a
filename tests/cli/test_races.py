"""``hwdbm races``: what it proves and finds, how it is read, and a user's own protocol."""

import json
import xml.etree.ElementTree as ET

import pytest

from hwdbm import races

OWN = """
from hwdbm.races import Actor, Protocol, Scene, copy, exchange, fetch_clear, flush, kept, load

W = 1 << 7

def harvest():
    old = yield fetch_clear("pte:x", W)
    {flush}
    if old & W:
        yield copy("x")

scene = Scene({{"x": "clean"}}, ["store x 1; store x 2"], {{"copy:x": 0}})
protocol = Protocol("mine", scene, [Actor("S", harvest)], kept("x"))

def made():
    return protocol

number = 5
"""


@pytest.fixture
def own(tmp_path):
    def write(flush):
        path = tmp_path / "own.py"
        path.write_text(OWN.format(flush=flush))
        return path

    return write


@pytest.fixture
def few(monkeypatch):
    """Have the command know a few only, as all take longer than a test may."""
    monkeypatch.setattr(races, "MISTAKES", {name: races.MISTAKES[name] for name in ("no-flush", "device-unmarked")})
    monkeypatch.setattr(races, "PRODUCTION", {"device": races.PRODUCTION["device"]})


def test_all(run, few):
    found = run("races")
    assert found.status == 0
    assert "3 of 3 protocols proved" in found.out
    assert "2 of 2 known mistakes found" in found.out
    assert max(map(len, found.out.splitlines())) <= 80


def test_json_has_the_keys_of_the_issue(run, few):
    report = json.loads(run("races", "--json").out)
    assert set(report) == {"protocols", "mistakes", "litmus"}
    assert all(set(each) == {"name", "states", "proved"} and each["proved"] for each in report["protocols"])
    assert all(set(each) == {"name", "found", "steps"} and each["steps"] > 0 for each in report["mistakes"])
    assert report["litmus"]["agree"] == report["litmus"]["of"] >= 20


def test_a_mistake_that_is_not_found_is_a_mismatch(run, few, monkeypatch):
    right = races.MISTAKES["no-flush"]
    monkeypatch.setitem(races.MISTAKES, "no-flush", right._replace(make=lambda _wrong: right.make(False)))
    found = run("races")
    assert found.status == 3
    assert "NOT FOUND" in found.out


def test_a_protocol_that_is_not_proved_is_a_mismatch(run, few, monkeypatch):
    monkeypatch.setitem(races.PRODUCTION, "device", lambda: races.MISTAKES["no-flush"].make(True))
    assert run("races").status == 3
    assert run("races", "device").status == 3


@pytest.mark.parametrize("name", [*races.MISTAKES][::4])
def test_a_timeline_fits(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    found = run("races", name)
    assert found.status == 0
    assert max(map(len, found.out.splitlines())) <= 80
    assert "what changed" in found.out
    head = " ".join(found.out.partition("\n\n")[0].split())
    assert head == f"{name}: {races.MISTAKES[name].summary} [{', '.join(races.MISTAKES[name].cites)}]"


def test_a_timeline_says_where_the_page_is_lost(run):
    lines = run("races", "no-flush").out.splitlines()
    lost = next(at for at, line in enumerate(lines) if "the page is lost here" in line)
    assert "copies x" in lines[lost - 1]
    assert "a write to page x is lost" in lines[-1]


def test_a_diagram_is_an_image(run, tmp_path):
    path = tmp_path / "a.svg"
    found = run("races", "no-flush", "--diagram", path)
    assert found.status == 0
    root = ET.fromstring(path.read_text())
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"vCPU0", "S", "what changed", "cleans x"} <= set(texts)
    assert "prefers-color-scheme: dark" in path.read_text()


def test_no_diagram_of_what_is_proved(run, tmp_path, few):
    found = run("races", "device", "--diagram", tmp_path / "a.svg")
    assert found.status == 0
    assert "no counterexample" in found.err
    assert not (tmp_path / "a.svg").exists()


def test_a_protocol_of_ones_own(run, own):
    assert run("races", "--check", f"{own('yield from flush(' + repr('x') + ')')}:protocol").status == 0
    found = run("races", "--check", f"{own('pass')}:made")
    assert found.status == 3
    assert "a write to page x is lost" in found.out


@pytest.mark.parametrize(
    ("flush", "says"),
    [("yield load('pte:q')", "no cell 'pte:q'"), ("yield 5", "yields acts, not 5"), ("1 / 0", "ZeroDivisionError")],
)
def test_an_error_of_the_users_own_is_said_to_be(run, own, flush, says):
    found = run("races", "--check", f"{own(flush)}:protocol")
    assert found.status == 1
    assert says in found.err
    assert "report it" not in found.err


@pytest.mark.parametrize(
    ("where", "status"),
    [("nothing", 2), (":x", 2), ("own.py:", 2), ("no_such_module:x", 1), ("{own}:number", 2), ("{own}:absent", 2)],
)
def test_what_is_no_protocol_is_refused(run, own, where, status):
    found = run("races", "--check", where.format(own=own("pass")))
    assert found.status == status
    assert len(found.err.splitlines()) <= 4
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    "args",
    [
        ("no-flsh",),
        ("no-flush", "--check", "a:b"),
        ("--kinds", "k"),
        ("--ets2",),
        ("no-flush", "--no-ets2"),
        ("--diagram", "a.svg"),
        ("no-flush", "--litmus", "d"),
    ],
)
def test_wrong_usage(run, args):
    found = run("races", *args)
    assert found.status == 2
    assert found.out == ""


def test_a_name_that_is_almost_right_is_told(run):
    assert "no-flush" in run("races", "no-flsh").err


def test_a_folder_that_is_not_there(run, tmp_path):
    assert run("races", "--litmus", tmp_path / "none").status == 1
