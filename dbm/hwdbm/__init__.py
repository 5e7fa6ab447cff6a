"""hwdbm: which pages a virtual machine dirtied, at the speed of memory.

The state of stage-2 leaf descriptors in flat uint64 arrays, harvested in single passes of masks. `Stage2` is the
engine, `DirtyLog` puts KVM's rules over it, `walker` is the slow reference that everything is compared with.
"""

from hwdbm import errors, kernels, pte, walker
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import DirtyLog, Lease
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot
from hwdbm.stage2 import Stage2

__all__ = ["DirtyBitmap", "DirtyLog", "Granule", "Lease", "Memslot", "Stage2", "errors", "kernels", "pte", "walker"]

__version__ = "0.1.0"
