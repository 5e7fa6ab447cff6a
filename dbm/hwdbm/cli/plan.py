"""``hwdbm plan``: what a migration will take, from a trace of writes or from samples of one that goes on."""

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from hwdbm import forecast as forecasts
from hwdbm import report as reports
from hwdbm.cli import guest, options, parse
from hwdbm.cli.example import label
from hwdbm.cli.guest import MemoryOption, OnLimit, RateOption, SeedOption, Vm, WorkloadOption
from hwdbm.cli.output import busy, columns
from hwdbm.cli.streams import json_text, result, width
from hwdbm.files import NewFile, scratch
from hwdbm.forecast import OWN, QEMU, Estimate, Forecast, RuleOutcome, Sample, Terms
from hwdbm.forecast.samples import MOST, read_sample_file
from hwdbm.forecast.sweep import passes, sweep
from hwdbm.trace import analyse, open_trace, record

_DURATION = 10.0  # seconds that a guest of --source is watched
_INTERVAL = 0.1
_LIMIT = 0.3  # seconds of downtime

EPILOG = """Sizes are in MiB (1024 * 1024 bytes), rates in MiB/s, times in ms; in JSON bytes, bytes a second and ms.

Examples:

  From a trace that hwdbm brings, by QEMU's passes, with the rules of others beside it:

\b
    hwdbm plan example:machine-hot --bandwidth 50M --stream qemu --rules

  A modelled machine is watched for two seconds; then what its migration would take:

\b
    hwdbm plan --source machine --memory 64M --duration 2s --bandwidth 50M

  From samples of a migration, as JSON lines: QMP's query-migrate, libvirt's job
  statistics, Cloud Hypervisor's progress, or ours:

\b
    hwdbm migrate --memory 16M --rate 500 --bandwidth 50M --json
        >samples.json
    hwdbm plan --samples samples.json --max-downtime 100
"""


class Stream(StrEnum):
    """Whose migration it is."""

    OURS = "ours"
    QEMU = "qemu"


def plan(
    trace: Annotated[
        Path | None,
        typer.Argument(
            parser=options.parser(parse.trace),
            autocompletion=options.traces,
            metavar="TRACE",
            help="A trace, as 'hwdbm record' writes them, or example:NAME.",
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="In place of a trace, samples of a migration that goes on, as JSON lines, or the texts of 'virsh "
            "domjobinfo'; - is stdin.",
        ),
    ] = None,
    source: Annotated[
        Vm | None,
        typer.Option(
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="In place of a trace, a guest that is started here and watched for a while.",
        ),
    ] = None,
    bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Bytes a second, as in 200M; with --samples as it was by default.",
        ),
    ] = None,
    max_downtime: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="MS",
            help="How long the guest may stand still; 300 by default, or the limit that the samples have.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="How long the migration may take. No limit by default.",
        ),
    ] = None,
    stream: Annotated[
        Stream | None,
        typer.Option(
            "--stream",
            parser=options.parser(parse.choice(Stream)),
            metavar="ours|qemu",
            help="Whose passes they are, and whose costs; by default ours, and those that the samples are of.",
        ),
    ] = None,
    last_bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Bytes a second while the guest stands still: QEMU lifts its max-bandwidth then.",
        ),
    ] = None,
    on_limit: Annotated[
        OnLimit | None,
        typer.Option(
            parser=options.parser(parse.choice(OnLimit)),
            metavar="abort|wait|pause",
            help="What happens after 30 passes without progress; by default abort, and wait for QEMU's.",
        ),
    ] = None,
    auto_converge: Annotated[
        bool, typer.Option("--auto-converge", help="The guest is slowed down where it writes more than is sent.")
    ] = False,
    now: Annotated[
        bool,
        typer.Option(
            "--now", help="The migration begins where the trace ends, while the guest goes on with what it did then."
        ),
    ] = False,
    memory: MemoryOption = None,
    workload: WorkloadOption = None,
    rate: RateOption = None,
    duration: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.seconds),
            metavar="TIME",
            help="How long the guest of --source is watched; 10s by default.",
        ),
    ] = None,
    seed: SeedOption = 0,
    rules: Annotated[
        bool,
        typer.Option(
            "--rules",
            help="When each of several rules would pause the guest, or give up, on the same trace, and what the pause "
            "would be: ours, QEMU's, KubeVirt's VEP 248, Cloud Hypervisor's.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.png",
            help="Draw the downtime and the total time against the bandwidth; needs the extra 'plot'.",
        ),
    ] = None,
    report: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Forecast whether a migration will converge, what it will take, and what it would need.

    A trace is replayed: the passes are simulated on the recorded intervals, at several moments, with the costs of
    harvests, pages of zeros and the handover. To samples a model of the guest is fitted, and the passes go on from the
    last one. Each number has an interval.
    """
    given = {"TRACE": trace is not None, "--samples": samples is not None, "--source": source is not None}
    if sum(given.values()) != 1:
        raise typer.BadParameter("give one of TRACE, --samples and --source")
    guest.refuse("without --source", {
        name: value is not None and source is None
        for name, value in {"--memory": memory, "--workload": workload, "--rate": rate, "--duration": duration}.items()
    })  # fmt: skip
    if samples is not None:
        guest.refuse("with --samples", {"--now": now, "--rules": rules, "--plot": plot is not None})
    if samples is None and bandwidth is None:
        raise typer.BadParameter("a forecast needs --bandwidth, as in 200M")
    for name, value in {"--bandwidth": bandwidth, "--last-bandwidth": last_bandwidth}.items():
        if value == 0:
            raise typer.BadParameter(f"{name} 0: a bandwidth is more than 0 bytes a second")
    if plot is not None:
        _check_plot(plot)
    options.check_report(report)
    how: dict[str, Any] = {
        "timeout": timeout, "auto_converge": auto_converge, "on_limit": None if on_limit is None else on_limit.value,
    }  # fmt: skip
    limit = None if max_downtime is None else max_downtime / 1e3
    if samples is not None:
        read = _read_file(samples)
        terms = _terms(stream, last_bandwidth, qemu=read[-1].source in {"qemu", "libvirt"})
        found = forecasts.from_samples(read, bandwidth=bandwidth, max_downtime=limit, terms=terms, **how)
        if report is not None:
            _report_samples(report, str(samples), read, found, bandwidth, limit, how | {"terms": terms})
        _say(found, [], as_json=as_json)
        return
    assert bandwidth is not None  # noqa: S101 - it was looked at
    terms = _terms(stream, last_bandwidth, qemu=False)
    with _writes(trace, source, memory, workload, rate, duration, seed) as writes, busy("replaying"):
        how |= {"max_downtime": _LIMIT if limit is None else limit, "terms": terms, "now": now}
        found = forecasts.replay(writes, bandwidth=bandwidth, **how)
        outcomes = []
        if rules:
            outcomes = forecasts.compare_rules(
                writes, bandwidth=bandwidth, max_downtime=limit, terms=terms, timeout=timeout, now=now
            )
        if plot is not None:
            _draw(plot, writes, bandwidth, found, how)
        if report is not None:
            _report_trace(report, label(trace) if trace else str(source), writes, found, bandwidth, how)
    _say(found, outcomes, as_json=as_json, rules=rules)


def _read_file(path: Path) -> list[Sample]:
    """Read samples from a file, or from stdin."""
    if str(path) != "-":
        return read_sample_file(path)
    text = sys.stdin.read(MOST + 1)
    if len(text) > MOST:
        raise forecasts.SampleError(f"{path}: {MOST} characters of samples are the most")
    try:
        return forecasts.read_samples(text.splitlines())
    except forecasts.SampleError as error:
        raise forecasts.SampleError(f"{path}: {error}") from error


def _terms(stream: Stream | None, last_bandwidth: int | None, *, qemu: bool) -> Terms:
    terms = QEMU if (qemu if stream is None else stream is Stream.QEMU) else OWN
    return terms if last_bandwidth is None else replace(terms, last_bandwidth=float(last_bandwidth))


@contextmanager
def _writes(
    trace: Path | None,
    source: Vm | None,
    memory: int | None,
    workload: str | None,
    rate: float | None,
    duration: float | None,
    seed: int,
) -> Iterator[Any]:
    """Yield the trace that was named, or one of a guest that is watched now."""
    if trace is not None:
        yield open_trace(trace)
        return
    memory = guest.MEMORY if memory is None else memory
    guest.check_room(memory)
    with scratch() as folder:  # an interrupt removes it too
        with busy("the guest is watched"), _started(source or Vm.MACHINE, memory, workload, rate, seed) as vm:
            vm.resume()
            length = _DURATION if duration is None else duration
            made = record(vm, folder / "trace", interval=min(_INTERVAL, length), duration=length)
        yield made


@contextmanager
def _started(source: Vm, memory: int, workload: str | None, rate: float | None, seed: int) -> Iterator[Any]:
    if source is Vm.MACHINE:
        work = guest.workload_of(workload, seed=seed, rate=rate)
        vm: Any = guest.build(memory, mode=guest.Mode.HW_DBM, thp=False, seed=seed, image=None, percent=guest.FILLED)
        vm.run(work)
    elif source is Vm.KVM:
        with guest.usage():
            how: dict[str, Any] = {"log": guest.KvmLog.BITMAP, "seed": seed, "image": None, "percent": guest.FILLED}
            vm = guest.build_kvm(memory, workload=workload, rate=rate, **how)
    else:
        with guest.usage():
            how = {"seed": seed, "blocks": False, "image": None, "percent": guest.FILLED}
            vm = guest.build_arm(memory, workload=workload, rate=rate, **how)
    with vm:
        yield vm


# --- what is said ------------------------------------------------------------------------------------------------


def _say(found: Forecast, outcomes: list[RuleOutcome], *, as_json: bool, rules: bool = False) -> None:
    if as_json:
        record_ = found.to_dict()
        if rules:
            record_["rules"] = [each.to_dict() for each in outcomes]
        result(json_text(record_))
        return
    lines = [columns(_rows(found)), "", *textwrap.wrap(found.why, min(width() - 1, 100))]
    if rules:
        lines += ["", columns(_rule_rows(outcomes), left=(0, 1))]
        lines += [f"{one.rule}: {one.why}" for one in outcomes]
    result("\n".join(lines))


def _rows(found: Forecast) -> list[tuple[str, ...]]:
    """Return a forecast as the rows of a table."""

    def row(name: str, each: Estimate, scale: float, digits: int) -> tuple[str, ...]:
        return name, *(f"{value * scale:,.{digits}f}" for value in (each.value, each.low, each.high))

    return [
        ("converges" if found.converges else "doesn't converge", "value", "low", "high"),
        row("passes", found.passes, 1, 0),
        row("total time, ms", found.total_time, 1e3, 0),
        row("downtime, ms", found.downtime, 1e3, 0),
        row("sent, MiB", found.transferred, 1 / (1 << 20), 1),
    ]


def _rule_rows(outcomes: list[RuleOutcome]) -> list[tuple[str, ...]]:
    heads = ("rule", "does", "after ms", "passes", "pause ms", "sent MiB")
    rows = [
        (
            each.rule,
            each.action,
            f"{each.time * 1e3:,.0f}",
            f"{each.passes}",
            "" if each.downtime is None else f"{each.downtime * 1e3:,.0f}",
            f"{each.transferred / (1 << 20):,.1f}",
        )
        for each in outcomes
    ]
    return [heads, *rows]


def _check_plot(plot: Path) -> None:
    if plot.suffix != ".png":
        raise typer.BadParameter(f"--plot {plot}: .png")
    from hwdbm.forecast import picture  # noqa: F401, PLC0415  # matplotlib is an extra of its own

    NewFile(plot).close()


def _asked(bandwidth: float, limit: float, terms: Terms) -> dict[str, str]:
    return {
        "bandwidth": f"{bandwidth / (1 << 20):,.4g} MiB/s",
        "limit of downtime": f"{limit * 1e3:,.4g} ms",
        "passes and costs": "QEMU's" if terms.structure == "qemu" else "this project's",
    }


def _report_trace(path: Path, name: str, writes: Any, found: Forecast, bandwidth: float, how: dict[str, Any]) -> None:
    """Write the report of a trace's forecast; the other bandwidths and limits are looked at from one moment of it."""
    limit, terms = how["max_downtime"], how["terms"]

    def one(rate: float, at_most: float) -> Forecast:
        return forecasts.replay(
            writes, **how | {"bandwidth": rate, "max_downtime": at_most, "needs": False, "starts": 1}
        )

    asked = _asked(bandwidth, limit, terms)
    sent = passes(writes, bandwidth=bandwidth, **how)
    found_ = analyse(writes, rows=24, cells=180)
    reports.write(path, reports.of_forecast(name, found, sweep(one, bandwidth, limit), sent, asked, found_))


def _report_samples(
    path: Path, name: str, read: list[Sample], found: Forecast, bandwidth: float | None, limit: float | None,
    how: dict[str, Any],
) -> None:  # fmt: skip
    """Write the report of the forecast of a migration that goes on, with the passes that there were."""
    rates = [each.bandwidth for each in read if each.bandwidth]
    if bandwidth is None and not rates:
        raise typer.BadParameter("--report needs --bandwidth: no sample has one")
    rate = float(bandwidth or median(rates[-16:]))
    said = [each.downtime_limit for each in read if each.downtime_limit is not None]
    at_most = limit if limit is not None else said[-1] if said else 0.3

    def one(rate: float, at_most: float) -> Forecast:
        return forecasts.from_samples(read, **how | {"bandwidth": rate, "max_downtime": at_most, "needs": False})

    asked = _asked(rate, at_most, how["terms"])
    reports.write(path, reports.of_forecast(name, found, sweep(one, rate, at_most), read, asked))


def _draw(plot: Path, writes: Any, bandwidth: int, found: Forecast, how: dict[str, Any]) -> None:
    from hwdbm.forecast.picture import draw  # noqa: PLC0415  # matplotlib is an extra of its own

    draw(plot, writes, bandwidth=bandwidth, found=found, **how)
