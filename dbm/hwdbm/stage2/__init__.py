"""Stage 2: the leaf descriptors of one memslot in flat arrays, and the verbs over them.

`Stage2` is what programs use. The modules of this package are its parts: which entry maps which page (`layout`), the
only writer of descriptors (`leaves`), the dirty state of leaves that were replaced (`saved`), and the verbs (`stage2`).
"""

from hwdbm.stage2.layout import Layout
from hwdbm.stage2.leaves import LeafAt
from hwdbm.stage2.stage2 import Stage2

__all__ = ["Layout", "LeafAt", "Stage2"]
