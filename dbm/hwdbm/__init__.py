"""hwdbm: which pages a virtual machine dirtied, at the speed of memory.

The state of stage-2 leaf descriptors in flat uint64 arrays, harvested in single passes of masks. `Stage2` is the
engine, `DirtyLog` puts KVM's rules over it, `walker` is the slow reference that everything is compared with.
"""

TYPE_CHECKING = False  # the command answers an interrupt before it imports anything that takes a while
if TYPE_CHECKING:
    from hwdbm import errors, image, kernels, kvm, machine, migration, pte, snapshot, vm, walker
    from hwdbm.bitmap import DirtyBitmap
    from hwdbm.dirtylog import DirtyLog, Lease
    from hwdbm.granule import Granule
    from hwdbm.memslot import Memslot
    from hwdbm.stage2 import Stage2

__all__ = [
    "DirtyBitmap",
    "DirtyLog",
    "Granule",
    "Lease",
    "Memslot",
    "Stage2",
    "errors",
    "image",
    "kernels",
    "kvm",
    "machine",
    "migration",
    "pte",
    "snapshot",
    "vm",
    "walker",
]

__version__ = "0.1.0"

_HOMES = {
    "DirtyBitmap": "bitmap",
    "DirtyLog": "dirtylog",
    "Granule": "granule",
    "Lease": "dirtylog",
    "Memslot": "memslot",
    "Stage2": "stage2",
}


if not TYPE_CHECKING:  # a type checker is to know the names, and to miss those that aren't there

    def __getattr__(name: str) -> object:
        from importlib import import_module  # noqa: PLC0415

        if name in _HOMES:
            value: object = getattr(import_module(f"hwdbm.{_HOMES[name]}"), name)
        elif name in __all__:
            value = import_module(f"hwdbm.{name}")
        else:
            raise AttributeError(f"module 'hwdbm' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
