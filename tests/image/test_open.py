"""Which arguments an image takes, by the kind of its file: each set of them."""

import gzip
from itertools import product
from pathlib import Path

import numpy as np
from seen import as_seen
from synthetic import Geometry, Tables

from hwdbm.errors import ImageError
from hwdbm.image import open_image

G = Geometry(12, 1, 40, 40)


def test_which_arguments_go_with_which_file_was_looked_at(tmp_path: Path) -> None:
    tables = Tables(G)
    tables.leaf(0x8060_3000, 3, 1 << 51 | 1 << 7)
    ram_base, raw = tables.raw()
    (tmp_path / "raw").write_bytes(raw)
    np.savez(tmp_path / "capture.npz", **tables.arrays([(0, 0x80600, 64)]))
    with gzip.open(Path(__file__).parents[1] / "data" / "mapped-ram.bin.gz") as file:
        (tmp_path / "migration").write_bytes(file.read())
    every = {"ram_base": ram_base, "vttbr": G.vttbr(tables.root), "vtcr": G.vtcr, "block": "pc.ram"}
    lines = []
    for name in ("raw", "capture.npz", "migration"):
        for which in product((False, True), repeat=4):
            given = {key: value for (key, value), there in zip(every.items(), which, strict=True) if there}
            try:
                image = open_image(tmp_path / name, **given)
                answer = f"{type(image.memory).__name__}, {len(image.slots)} slots, VTTBR {image.registers.vttbr:#x}"
            except (ImageError, OSError) as error:
                answer = f"{type(error).__name__}: {error}".replace(str(tmp_path), "")
            lines.append(f"{name} {', '.join(given)}: {answer}")
    as_seen("asked/images.txt", "\n".join(lines) + "\n")
