"""Will it converge? Forecasts of live migrations, from traces of writes or from samples, and stop rules.

`replay` simulates a migration's passes on a trace, `from_samples` on a model that is fitted to samples of a running
migration. Both return a `Forecast`.
"""

from hwdbm.errors import SampleError
from hwdbm.forecast.compare import RuleOutcome, compare_rules
from hwdbm.forecast.outcome import Estimate, Forecast, Needs, geometric, remaining_over_bandwidth
from hwdbm.forecast.predict import from_samples, replay
from hwdbm.forecast.rules import RULES, Verdict, cloud_hypervisor, kubevirt, ours, qemu, qemu_auto_converge
from hwdbm.forecast.samples import Sample, read_samples
from hwdbm.forecast.terms import OWN, QEMU, Terms
from hwdbm.forecast.writes import MemoryWrites, Writes

__all__ = [
    "OWN",
    "QEMU",
    "RULES",
    "Estimate",
    "Forecast",
    "MemoryWrites",
    "Needs",
    "RuleOutcome",
    "Sample",
    "SampleError",
    "Terms",
    "Verdict",
    "Writes",
    "cloud_hypervisor",
    "compare_rules",
    "from_samples",
    "geometric",
    "kubevirt",
    "ours",
    "qemu",
    "qemu_auto_converge",
    "read_samples",
    "remaining_over_bandwidth",
    "replay",
]
