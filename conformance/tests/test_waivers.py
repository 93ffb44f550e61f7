"""Waivers: what they need, what they cover, and when they are an error."""

import datetime
import json
import shutil

import pytest

ISSUE = "https://example.org/issues/1"


@pytest.fixture(scope="module")
def known(planted, inside, tmp_path_factory):
    """A folder with the counterexample of a target whose weights are biased."""
    folder = tmp_path_factory.mktemp("known")
    code, said = inside(
        "check", planted("BiasedWeights"), "--requirement", "GATE-03", "--report", folder / "r"
    )
    assert code == 1, said
    [case] = (folder / "r" / "planted.py_BiasedWeights" / "cases").iterdir()
    shutil.move(case, folder / "case")
    return folder


def write(known, name="waivers.toml", **changed):
    fields = {
        "requirement": "GATE-03",
        "target": "*planted.py:*",
        "reason": "known",
        "issue": ISSUE,
        "expires": datetime.date.today(),
        "case": "case",
    } | changed
    lines = [
        f"{field} = {value.isoformat() if isinstance(value, datetime.date) else json.dumps(value)}"
        for field, value in fields.items()
        if value is not None
    ]
    path = known / name
    path.write_text("[[waiver]]\n" + "\n".join(lines) + "\n")
    return path


def run(inside, target, waivers, report, requirement="GATE-03"):
    code, said = inside(
        "check", target, "--requirement", requirement, "--waivers", waivers, "--report", report
    )
    found = next(report.glob("*/report.json"), None)
    return code, said, None if found is None else json.loads(found.read_text())


def test_a_known_failure_is_waived_and_counted(inside, planted, known, tmp_path):
    code, said, report = run(inside, planted("BiasedWeights"), write(known), tmp_path)
    assert code == 0, said
    assert report["verdict"] == "conforms_with_waivers"
    [one] = report["requirements"]
    assert one["status"] == "waived"
    assert one["message"].startswith(f"known ({ISSUE}): ")
    assert "1 waived" in said


def test_a_waiver_whose_counterexample_no_longer_fails_is_stale(inside, planted, known, tmp_path):
    code, said, report = run(inside, planted("RightThisTime"), write(known), tmp_path)
    assert code == 12, said
    assert "waiver for GATE-03 on" in said
    assert "is stale: its counterexample does not fail any more in 10 runs" in said
    assert report["verdict"] == "conforms"


def test_a_failure_of_another_kind_is_not_waived(inside, planted, known, tmp_path):
    # Wrong on the stored case, and a crash elsewhere.
    code, said, report = run(inside, planted("WrongThenRaises"), write(known), tmp_path)
    assert code == 1, said
    assert report["requirements"][0]["status"] == "crash"


def test_a_waiver_for_other_targets_or_requirements_changes_nothing(
    inside, planted, known, tmp_path
):
    other = write(known, target="transformers/*")
    assert run(inside, planted("BiasedWeights"), other, tmp_path / "a")[0] == 1
    target = planted("BiasedWeights")
    code, said, _ = run(inside, target, write(known), tmp_path / "b", requirement="GATE-01")
    assert code == 0, said


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"expires": datetime.date(2020, 1, 1)}, 12, "(GATE-03) expired on 2020-01-01"),
        ({"requirement": "GATE-99"}, 12, "expected an id that `moespec requirements` lists"),
        ({"issue": None}, 2, "expected the fields case, expires, issue"),
        ({"issue": "soon"}, 2, "issue: expected a URL, got 'soon'"),
        ({"case": None}, 2, "expected the fields case, expires, issue"),
        ({"case": "nowhere"}, 2, "case: expected a folder with case.json"),
        ({"requirement": "GATE-01"}, 2, "case: expected a case of GATE-01, got one of GATE-03"),
        ({"expires": "tomorrow"}, 2, "expires: expected a date, got 'tomorrow'"),
        ({"reason": ""}, 2, "reason: expected a text, got ''"),
        ({"who": "me"}, 2, "expected the fields"),
    ],
)
def test_what_is_wrong_with_a_waiver_is_said(
    inside, planted, known, tmp_path, changed, code, message
):
    path = write(known, "wrong.toml", **changed)
    got, said, report = run(inside, planted("BiasedWeights"), path, tmp_path)
    assert got == code, said
    assert message in " ".join(said.split())
    assert (report is None) == (code == 2)


@pytest.mark.parametrize("content", ["", "waiver = 3", "[[waiver]", "waiver = [1]", None])
def test_a_file_without_waivers_is_bad_usage(inside, planted, tmp_path, content):
    path = tmp_path / "waivers.toml"
    if content is not None:
        path.write_text(content)
    code, said, report = run(inside, planted("BiasedWeights"), path, tmp_path / "r")
    assert code == 2, said
    assert "waivers: expected" in said
    assert report is None
    assert not (tmp_path / "r").exists()
