"""Write traces: which pages a VM wrote in each interval, in a Zarr group. The extra ``trace`` brings zarr."""

from hwdbm.trace.analysis import Amount, Analysis, Period, analyse
from hwdbm.trace.group import Trace, Writer, open_trace
from hwdbm.trace.recorder import from_bitmaps, record, record_file

__all__ = [
    "Amount",
    "Analysis",
    "Period",
    "Trace",
    "Writer",
    "analyse",
    "from_bitmaps",
    "open_trace",
    "record",
    "record_file",
]
