"""Images and traces that hwdbm brings, by name: ``example:4k_ipa40``. What is beside this file is in every install."""

from pathlib import Path

_PREFIX = "example:"
_FOLDER = Path(__file__).parent / "examples"

EXAMPLES = {
    "4k_ipa40": ("4k_ipa40.npz", "three slots of pages of 4K, marked by an emulated Arm MMU, with the truth"),
    "4k_blocks": ("4k_blocks.npz", "a slot of 2M blocks, with the truth"),
    "16k_ipa40": ("16k_ipa40.npz", "two slots of pages of 16K, with the truth"),
    "kvm-6.1": ("kvm-6.1.npz", "five slots of Linux KVM, which keeps its tables without DBM, with the truth"),
    "ram": ("4k_blocks.ram", "the tables of 4k_blocks as raw RAM from 0x41000000 on, moved together"),
}
"""The file of each example, and what it is."""

TRACES = {
    "kvm-counting": "a real guest on /dev/kvm that writes its memory from end to end",
    "kvm-random": "a real guest on /dev/kvm that writes pages at random",
    "machine-hot": "a modelled machine that writes a small part of its memory most of the time",
    "machine-zipf": "a modelled machine, some of whose pages are written far more often than others",
    "machine-bursty": "a modelled machine that writes in bursts",
    "machine-idle": "a modelled machine that writes nothing",
    "linux-build": "Linux that compiles, in QEMU, by the content of its memory",
    "linux-redis": "Linux with Redis and its benchmark, in QEMU, by the content of its memory",
    "linux-sqlite": "Linux with SQLite, in QEMU, by the content of its memory",
    "linux-zstd": "Linux that compresses, in QEMU, by the content of its memory",
}
"""The traces, each a folder in ``traces``, and what they are of."""


def find(text: str) -> Path | None:
    """Return the file that ``example:NAME`` means; None if `text` doesn't name an example.

    Raises
    ------
    ValueError
        If there is no example of that name; the text names those that there are.

    Examples
    --------
    >>> find("example:ram").name
    '4k_blocks.ram'
    >>> find("ram.img")
    """
    if not text.startswith(_PREFIX):
        return None
    name = text.removeprefix(_PREFIX)
    if name not in EXAMPLES:
        raise ValueError(f"there is no example {name!r}; there is {', '.join(EXAMPLES)}")
    return _FOLDER / EXAMPLES[name][0]


def find_trace(text: str) -> Path | None:
    """Return the folder that ``example:NAME`` means; None if `text` doesn't name an example.

    Raises
    ------
    ValueError
        If there is no trace of that name; the text names those that there are.

    Examples
    --------
    >>> find_trace("example:machine-hot").name
    'machine-hot'
    """
    if not text.startswith(_PREFIX):
        return None
    name = text.removeprefix(_PREFIX)
    if name not in TRACES:
        raise ValueError(f"there is no trace {name!r}; there is {', '.join(TRACES)}")
    return _FOLDER / "traces" / name


def label(path: Path) -> str:
    """Return how a file is called to people: an example by its name, another by its path.

    Examples
    --------
    >>> label(find("example:ram")), label(Path("ram.img"))
    ('example:ram', 'ram.img')
    """
    if path.parent == _FOLDER / "traces":
        return _PREFIX + path.name
    if path.parent == _FOLDER:
        for name, (file, _) in EXAMPLES.items():
            if path.name == file:
                return _PREFIX + name
    return str(path)
