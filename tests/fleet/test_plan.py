"""PLAN.json: what is read, and what is refused, with the place and the value."""

import json
import os
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm.errors import PlanError
from hwdbm.fleet import Fleet, FleetVm, Host, Link, read_plan

PLAN = {
    "format": "hwdbm-fleet",
    "version": 1,
    "engine": "hwdbm",
    "links": [{"name": "a", "bandwidth": "1.25G"}, {"name": "up", "bandwidth": 5_000_000_000}],
    "racks": [{"name": "r0", "uplink": "up"}, {"name": "r1"}],
    "hosts": [
        {"name": "h0", "memory": "64G", "link": "a", "rack": "r0"},
        {"name": "h1", "memory": 4096, "link": "a", "rack": "r1"},
        {"name": "h2", "memory": "1T", "link": "up"},
    ],
    "vms": [
        {
            "name": "v0",
            "host": "h0",
            "memory": "8G",
            "max-downtime": 300,
            "trace": "t/v0.zarr",
            "start": 500,
            "rate": 2,
        },
        {
            "name": "v1",
            "host": "h0",
            "memory": "2G",
            "max-downtime": 0.5,
            "samples": "/v1.jsonl",
            "pinned": "has a GPU",
        },
    ],
}  # fmt: skip


def written(folder: Path, plan: object) -> Path:
    path = folder / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    return path


def test_a_plan(tmp_path: Path) -> None:
    gib = 1 << 30
    assert read_plan(written(tmp_path, PLAN)) == Fleet(
        (Link("a", 1.25 * gib), Link("up", 5e9)),
        (Host("h0", 64 * gib, "a", "r0"), Host("h1", 4096, "a", "r1"), Host("h2", 1 << 40, "up")),
        (
            FleetVm("v0", "h0", 8 * gib, 0.3, trace=tmp_path / "t/v0.zarr", start=0.5, rate=2.0),
            FleetVm("v1", "h0", 2 * gib, 0.0005, samples=Path("/v1.jsonl"), pinned="has a GPU"),
        ),
        (("r0", "up"),),
        "hwdbm",
    )
    assert read_plan(written(tmp_path, PLAN)).racks == ("r0", "r1")
    assert read_plan(written(tmp_path, {k: v for k, v in PLAN.items() if k != "engine"})).engine == "qemu"


GONE = object()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (["format"], "x", "format: a plan's is 'hwdbm-fleet', not 'x'"),
        (["version"], 2, "version: this reads version 1, not 2"),
        (["version"], True, "version: this reads version 1, not True"),
        (["engine"], "xen", "engine: is one of hwdbm, qemu, not 'xen'"),
        (["links"], GONE, "there is no 'links'"),
        (["more"], 1, "more: version 1 doesn't know it"),
        (["vms"], {}, "vms: is a list, not {}"),
        (["vms", 0], 3, "vms[0]: is an object, not 3"),
        (["vms", 1, "name"], "v0", "vms[1].name: vms[0] is 'v0' already"),
        (["vms", 1, "name"], "", "vms[1].name: is a printable name of 1 to 200 letters, not ''"),
        (["vms", 1, "name"], "\x1b[2J", r"vms[1].name: is a printable name of 1 to 200 letters, not '\x1b[2J'"),
        (["vms", 1, "name"], [1], "vms[1].name: is a printable name of 1 to 200 letters, not [1]"),
        (["vms", 1, "host"], "h9", "vms[1].host: there is no host 'h9'"),
        (["vms", 1, "host"], ["h0"], "vms[1].host: there is no host ['h0']"),
        (["vms", 1, "memory"], 0, "vms[1].memory: is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not 0"),
        (["vms", 1, "memory"], 1.5, "vms[1].memory: is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not 1.5"),
        (["vms", 1, "memory"], "8 gig", "vms[1].memory: is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not '8 gig'"),
        (["vms", 1, "memory"], "0.3", "vms[1].memory: is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not '0.3'"),
        (["vms", 1, "memory"], True, "vms[1].memory: is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not True"),
        (["vms", 1, "memory"], 1 << 70, "not a number beyond 64 bits"),
        (["vms", 1, "max-downtime"], -1, "vms[1].max-downtime: is a number of ms of 0 or more, not -1"),
        (["vms", 1, "max-downtime"], "300", "vms[1].max-downtime: is a number of ms of 0 or more, not '300'"),
        (["vms", 1, "trace"], "t", "vms[1]: a VM has a trace or samples, and 'v1' has both"),
        (["vms", 1, "samples"], GONE, "vms[1]: a VM has a trace or samples, and 'v1' has neither"),
        (["vms", 1, "samples"], "", "vms[1].samples: is a path, not ''"),
        (["vms", 1, "samples"], "\ud800", r"vms[1].samples: is a path, and '\ud800' can't be one"),
        (["vms", 1, "samples"], "a\0b", r"vms[1].samples: is a path, and 'a\x00b' can't be one"),
        (["vms", 1, "max-downtime"], 10**400, "vms[1].max-downtime: is a number of ms of 0 or more, not a number"),
        (["vms", 0, "rate"], -(10**400), "vms[0].rate: is a number of 1e-06 or more, not a number beyond 64 bits"),
        (["vms", 1, "start"], 1, "vms[1].start: is for a VM with a trace"),
        (["vms", 0, "rate"], 0, "vms[0].rate: is a number of 1e-06 or more, not 0"),
        (["vms", 0, "start"], None, "vms[0].start: is a number of ms of 0 or more, not None"),
        (["vms", 1, "pinned"], True, "vms[1].pinned: is a printable name"),
        (["hosts", 0, "link"], "b", "hosts[0].link: there is no link 'b'"),
        (["hosts", 0, "memory"], GONE, "hosts[0]: there is no 'memory'"),
        (["racks", 0, "uplink"], "b", "racks[0].uplink: there is no link 'b'"),
        (["racks", 0, "name"], "r9", "racks[0].name: no host stands in rack 'r9'"),
        (["links", 0, "bandwidth"], 0, "links[0].bandwidth: is bytes"),
        (["links", 0, "x"], 0, "links[0].x: version 1 doesn't know it"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, place: list, value: object, says: str) -> None:
    plan = json.loads(json.dumps(PLAN))
    at = plan
    for key in place[:-1]:
        at = at[key]
    if value is GONE:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    path = written(tmp_path, plan)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ((1 << 64) - 1, "18446744073709551615"),
        (1 << 64, "a number beyond 64 bits"),
        (1 - (1 << 64), "-18446744073709551615"),
        (-(1 << 64), "a number beyond 64 bits"),
        ("x" * 58, "'" + "x" * 58 + "'"),
        ("x" * 59, "'" + "x" * 56 + "..."),
    ],
)
def test_a_value_is_told_in_few_letters(tmp_path: Path, value: object, shown: str) -> None:
    path = written(tmp_path, PLAN | {"format": value})
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert str(caught.value) == f"{path}: format: a plan's is 'hwdbm-fleet', not {shown}"


def test_the_first_name_that_comes_twice_is_told() -> None:
    hosts = tuple(Host(name, 1, "a") for name in ("y", "z", "x", "z", "x", "x"))
    with pytest.raises(PlanError, match=r"^hosts has 'z' twice$"):
        Fleet((Link("a", 1.0),), hosts, ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"a": "\ud800"}'.encode("utf-8", "surrogatepass").decode("latin-1"), "there is no"),
        ("7", "is an object, not 7"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        read_plan(written(tmp_path, text))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe"):
        with pytest.raises(OSError, match=str(path)):
            read_plan(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_anything_in_any_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It is read, or refused as a plan; nothing else is raised."""
    plan = json.loads(json.dumps(PLAN))
    root = {"": plan}
    at, key = root, ""
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else list(range(len(at)))))
    at[key] = data.draw(JSON)
    path = written(tmp_path_factory.mktemp("plan"), root[""])
    with suppress(PlanError):
        read_plan(path)


DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "schemas" / "inputs" / "fleet-plan.json").read_text())


def test_the_schema_says_what_is_read() -> None:
    """It takes the example and the plan above; and each text that it takes is read as one of those that are in it."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    example = DOCS / "examples" / "fleet" / "plan.json"
    for plan in (PLAN, json.loads(example.read_text())):
        jsonschema.validate(plan, SCHEMA)
    assert len(read_plan(example).guests) == 11
    for number in range(len(PLAN["vms"])):
        for key in {key for vm in PLAN["vms"] for key in vm} - {"max-downtime"}:
            assert key in SCHEMA["properties"]["vms"]["items"]["properties"], number


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_the_schema_refuses_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Not the other way: a schema doesn't know which names are there."""
    plan = json.loads(json.dumps(PLAN))
    key = data.draw(st.sampled_from(["links", "racks", "hosts", "vms"]))
    entry = data.draw(st.sampled_from(plan[key]))
    entry[data.draw(st.sampled_from([*entry, "x"]))] = data.draw(JSON)
    path = written(tmp_path_factory.mktemp("plan"), plan)
    if not jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(path.read_text())):
        with pytest.raises(PlanError):
            read_plan(path)
