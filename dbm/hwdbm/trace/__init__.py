"""Write traces: which pages a VM wrote in each interval, in a Zarr group. The extra ``trace`` brings zarr."""

from hwdbm.trace.group import Trace, Writer, open_trace

__all__ = ["Trace", "Writer", "open_trace"]
