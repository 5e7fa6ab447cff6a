"""The house in order: which names are public, whose they are, and what the errors have in common."""

import ast
import dataclasses
import importlib
import pkgutil
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from sources import parsed

import hwdbm
from hwdbm.errors import HwdbmError
from hwdbm.machine import Workload

ROOT = Path(hwdbm.__file__).parent
API = Path(__file__).parents[1] / "docs" / "api.md"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

INNER = [name for name, path in MODULES.items() if path.parent != ROOT and path.name != "__init__.py"]

# Rooms of which users see no names.
UNSEEN = {"__init__", "__main__", "cli", "check", "files", "process", "bench"}

# Where a module takes a private name of another, and why.
SHARED = {("kernels.atomic", "kernels.fused"): "helpers that numba compiles into both"}


def tree(name: str) -> ast.Module:
    return parsed(MODULES[name])


def exported(name: str) -> list[str] | None:
    """Return a module's `__all__`."""
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return None


@cache
def used() -> dict[tuple[str, str], set[str]]:
    """Return which modules, by name, use a name of another, given with that: imported, or through the module."""
    found = defaultdict(set)
    for name in MODULES:
        modules, through = {}, []
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hwdbm":
                for each in node.names:
                    found[node.module.removeprefix("hwdbm").lstrip("."), each.name].add(name)
                    modules[each.asname or each.name] = f"{node.module}.{each.name}".removeprefix("hwdbm.")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                through.append((node.value.id, node.attr))
        for module, attribute in through:
            if module in modules:
                found[modules[module], attribute].add(name)
    return found


@cache
def words() -> set[str]:
    """Return the words of what uses the library from outside: tests, examples, benchmarks."""
    root = Path(__file__).parents[1]
    files = [*root.glob("tests/**/*.py"), *root.glob("docs/*.md"), *root.glob("asv_bench/**/*.py")]
    return {word for path in files if path != Path(__file__) for word in re.findall(r"\w+", path.read_text())}


def test_only_rooms_export():
    """What users may use is named by the room, or by a module of the first floor; the modules inside are its parts."""
    assert not [name for name in INNER if exported(name) is not None]


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if "\n__all__ = " in path.read_text()])
def test_what_is_exported_is_there_and_documented(name):
    module = importlib.import_module(f"hwdbm.{name}" if name != "__init__" else "hwdbm")
    assert not [each for each in module.__all__ if not hasattr(module, each)]
    assert len(set(module.__all__)) == len(module.__all__)
    if name not in UNSEEN:
        assert re.search(rf"^ +hwdbm\.{name}$", API.read_text(), re.MULTILINE), f"docs/api.md has no {name}"


@pytest.mark.slow
def test_what_only_its_module_uses_is_private():
    """Functions, constants and exceptions. A class may be the type of what others are given, and an alias is one."""
    assert not [(name, each) for name in INNER for each in unshared(name) if each not in words()]


def unshared(name: str) -> list[str]:
    """Return the public names that only their module uses."""
    found = []
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            found.append(node.targets[0].id)
    own = [each for each in found if not each.startswith("_") and each not in ("T", "TYPE_CHECKING")]
    if name.startswith("cli."):  # a command, which is found by its name, with its examples
        own = [each for each in own if each not in {name.removeprefix("cli."), "EPILOG"}]
    # Guests' code, kernels and benchmarks are chosen among by name: who uses what of them is not to be seen here.
    if re.search(r"guest_\w+$|^kernels\.|^bench\.suite", name):
        return []
    return [each for each in own if not used().get((name, each), set()) - {name}]


def test_private_names_stay_where_they_are():
    assert not [
        (module, each, name)
        for (module, each), by in used().items()
        if each.startswith("_") and not each.startswith("__") and f"{module}.{each}".lstrip(".") not in MODULES
        for name in by
        if module != name and (name, module) not in SHARED
    ]  # fmt: skip


def test_no_two_classes_share_a_name():
    found = defaultdict(list)
    for name in MODULES:
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    twice = {name: where for name, where in found.items() if len(where) > 1}
    assert not twice


def test_errors_have_one_base_and_a_builtin_one():
    """Of what a caller may catch: what the command says with its exit status, nobody does."""
    for info in pkgutil.walk_packages(hwdbm.__path__, "hwdbm."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)

    def below(kind):
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    ours = {each for each in below(BaseException) if re.match(r"hwdbm\.(?!cli\b)", each.__module__)}
    assert len(ours) > 15
    for each in ours - {HwdbmError}:
        builtin = [base for base in each.__mro__ if base.__module__ == "builtins" and base not in (Exception, object)]
        assert issubclass(each, HwdbmError), each
        assert builtin[0] is not BaseException, each


# Dataclasses that change: results as they are filled in, and things that have a state.
FILLED_IN = {"FoundSlot", "LevelCount", "Record", "Pass", "Report", "Received", "Granted", "Agreement"}
STATEFUL = {"LogParts", "_Due", "Litmus", "WeakMachine", "Protocol", "Graph"}


def test_dataclasses_are_values():
    """Frozen, unless they are filled in; without room for a misspelt attribute, unless a base needs its dictionary."""
    for name in MODULES.keys() - {"__main__"}:
        module = importlib.import_module(f"hwdbm.{name}" if name != "__init__" else "hwdbm")
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef) and dataclasses.is_dataclass(cls := getattr(module, node.name)):
                assert "__dataclass_params__" in vars(cls), f"{cls} is only derived from one: others can be set, too"
                assert cls.__dataclass_params__.frozen == (node.name not in FILLED_IN | STATEFUL), cls
                if not issubclass(cls, Workload):
                    assert hasattr(cls, "__slots__"), cls


# Threads that are joined before their call returns, however it ends.
JOINED = {"hwdbm-record", "hwdbm-migration"}
DAEMONS = {"self.name", "hwdbm-until-eof", "hwdbm-meet", "hwdbm-alive", "hwdbm-elsewhere"}


def test_no_thread_keeps_a_process_from_its_end():
    found = {}
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Thread", "threading.Thread"):
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                found[given["name"].strip("'")] = given.get("daemon")
    assert found == dict.fromkeys(JOINED) | dict.fromkeys(DAEMONS, "True")


def test_no_descriptor_is_closed_by_an_attribute_that_keeps_its_number():
    """An interrupt right after `os.close` leaves the number there, and the next `close` closes a stranger's file."""
    found = [
        f"{name}:{node.lineno}"
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "os.close"
        and isinstance(node.args[0], ast.Attribute)
    ]
    assert not found
