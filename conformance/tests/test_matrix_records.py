"""The public matrix: each red cell that was recorded has a finding, and each finding a red cell."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from moe_conformance.findings import explanations, read_findings
from moe_conformance.report import write_matrix
from moe_conformance.summary import restored, summarize

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "benchmarks/results/libraries").glob("*.json"))
RED = ("fail", "crash", "timeout", "inconclusive", "warn")


@pytest.fixture(scope="module")
def known():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from pictures.matrix import findings
    finally:
        sys.path.pop(0)
    return findings()


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """The script that records, with an empty folder for what it keeps."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import libraries
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(libraries, "KEPT", tmp_path)
    monkeypatch.setattr(libraries, "ROOT", tmp_path)
    return libraries


def reports_of(path):
    return json.loads(path.read_text())["reports"]


def red_cells(report):
    return [id for id, status in report["status"].items() if status in RED]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_red_cell_is_explained(path, known):
    for report in reports_of(path):
        name = report["target"]["name"]
        silent = [id for id in red_cells(report) if not explanations(known, name, id)]
        assert not silent, f"{name}: {', '.join(silent)}"


def test_every_finding_is_seen():
    cells = [
        (report["target"]["name"], id)
        for path in RECORDS
        for report in reports_of(path)
        for id in red_cells(report)
    ]
    for finding in read_findings(ROOT / "docs/data/findings.toml"):
        recorded = (
            ROOT / f"benchmarks/results/libraries/{finding.fields['library']}.json"
        ).exists()
        if finding.fields.get("rare") or not recorded:
            continue  # seen with more cases than the matrix has, or not in it yet
        assert any(finding.explains(name, id) for name, id in cells), finding.title


def test_every_library_of_the_table_was_run():
    table = tomllib.loads((ROOT / "benchmarks/libraries.toml").read_text())
    assert {path.stem for path in RECORDS} == {each["name"] for each in table["library"]}
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert not record["commit"].endswith("+"), f"{path.stem}: of no commit"
        assert record["reports"], path.stem


def test_the_tests_of_every_adapter_are_run_beside_its_library():
    table = tomllib.loads((ROOT / "benchmarks/libraries.toml").read_text())["library"]
    named = {each["name"]: each["tests"] for each in table if "tests" in each}
    files = {path.name for path in Path(__file__).parent.glob("test_*_target.py")}
    listed = [name for names in named.values() for name in names]
    assert sorted(listed) == sorted(files - {"test_interpreter_target.py"})
    for path in RECORDS:
        ends = json.loads(path.read_text()).get("tests")
        if ends is None:
            continue  # recorded before the tests were run along with the suite
        assert path.stem in named
        assert ends["passed"], path.stem
        assert not ends["failed"], path.stem
        assert not ends["skipped"], path.stem


def test_every_mutant_that_survives_is_explained():
    record = json.loads((ROOT / "benchmarks/results/mutation.json").read_text())
    lines = tomllib.loads((ROOT / "docs/data/mutants.toml").read_text())["line"]
    explained = [place for each in lines for place in each["places"]]
    assert len(set(explained)) == len(explained)
    survivors = {
        f"{row['mutant'].split(':')[0]}:{row['line'].split(':')[0]}"
        for row in record["rows"]
        if row["by"] is None
    }
    assert survivors == set(explained)


def test_a_summary_has_all_that_the_matrix_shows(tmp_path):
    [report] = reports_of(ROOT / "benchmarks/results/libraries/reference.json")
    whole = restored(report)
    assert len(whole["requirements"]) == report["breadth"]["requirements_in_all"]
    for each in whole["requirements"]:
        each["cases"] = 0
    again = restored(summarize({**whole, "requirements": whole["requirements"]}))
    pages = [write_matrix([each], tmp_path).read_text() for each in (whole, again)]
    assert pages[0] == pages[1]


def test_reports_of_other_targets_keep_their_commit(libraries, tmp_path):
    named = [{"target": {"name": name}} for name in ("a", "b", "c")]
    record = {"commit": "new", "reports": [named[0], {**named[1], "commit": "old"}, named[2]]}
    (tmp_path / "some.json").write_text(json.dumps(record))
    assert libraries.kept("some", ["c", "d"]) == [
        {**named[0], "commit": "new"},
        {**named[1], "commit": "old"},
    ]
    assert libraries.kept("another", ["a"]) == []


def test_an_earlier_run_is_not_taken_for_one_that_failed(libraries, monkeypatch, tmp_path):
    index = tmp_path / "build/libraries/some-report/index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    monkeypatch.setattr(libraries, "environment", lambda library: "false")
    with pytest.raises(ValueError, match="index"):
        libraries.check({"name": "some"}, ["no-such-target"], "smoke", 0)
