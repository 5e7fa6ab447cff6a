"""The cost of the engine, measured against floors in the same run.

Times on a shared machine mean little; ratios within one run do. So each figure comes with a floor, the two are
measured in turn, the descriptors are put back before each measurement, and the smallest of several counts.
"""

from hwdbm.bench.measure import Row, smallest
from hwdbm.bench.suite import BENCHMARKS, Setup, run

__all__ = ["BENCHMARKS", "Row", "Setup", "run", "smallest"]
