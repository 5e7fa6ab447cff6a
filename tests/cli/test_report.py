"""`--report` of harvests and of chains of snapshots; that of migrations is tested with them."""

from pathlib import Path

import pytest


def test_a_harvest(run, tmp_path: Path) -> None:
    plain = run("harvest", "example:4k_blocks", "--check")
    done = run("harvest", "example:4k_blocks", "--check", "--report", tmp_path / "a.html")
    assert (done.status, done.err) == (0, "")
    assert done.out.rpartition(" in ")[0] == plain.out.rpartition(" in ")[0]
    page = (tmp_path / "a.html").read_text()
    assert "<title>Harvest of example:4k_blocks: 24,064 of 49,152 pages dirty</title>" in page
    assert page.count("<svg ") == 3


def test_a_harvest_that_failed_leaves_what_was_there(run, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("an earlier one")
    assert run("harvest", tmp_path / "none.npz", "--report", tmp_path / "a.html").status == 1
    assert (tmp_path / "a.html").read_text() == "an earlier one"


def test_a_chain(run, tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(range(256)) * 4096)
    for verb, more in (("save", []), ("diff", [])):
        assert run("snapshot", verb, tmp_path / "chain", tmp_path / "ram", "--ram-base", "0", *more).status == 0
    done = run("snapshot", "list", tmp_path / "chain", "--report", tmp_path / "a.html")
    assert (done.status, done.err) == (0, "")
    names = [line.split()[0] for line in done.out.splitlines()[1:]]
    page = (tmp_path / "a.html").read_text()
    assert len(names) == 2
    assert all(
        f"<td>{name}</td><td>{kind}</td>" in page for name, kind in zip(names, ("full", "differential"), strict=True)
    )


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["harvest", "example:ram", "--report", "a.pdf"], 2, "--report a.pdf: .html"),
        (["harvest", "example:ram", "--report", ""], 2, "the path is empty"),
        (["harvest", "example:4k_blocks", "example:4k_ipa40", "--report", "a.html"], 2, "is of one image"),
        (["harvest", "example:4k_blocks", "--report", "none/a.html"], 1, "none/a.html: No such file or directory"),
        (["snapshot", "list", "chain", "--report", "a.png"], 2, "--report a.png: .html"),
    ],
)
def test_refused(run, args, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out before anything is read."""
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert (result.status, result.out) == (status, "")
    assert said in " ".join(result.err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_forecasts")
def test_a_forecast(run, tmp_path: Path) -> None:
    """Of a trace, with its write map; and of samples, without."""
    source = ["--source", "machine", "--memory", "1M", "--duration", "0.3", "--bandwidth", "10M"]
    done = run("plan", *source, "--report", tmp_path / "a.html")
    assert (done.status, done.err) == (0, "")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg ") == 5
    assert 'type="range"' in page
    samples = Path(__file__).parents[2] / "docs" / "examples" / "fleet" / "web.jsonl"
    assert run("plan", "--samples", samples, "--report", tmp_path / "b.html").status == 0
    assert (tmp_path / "b.html").read_text().count("<svg ") == 3
