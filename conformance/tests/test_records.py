"""What was measured: each record says on what, when and how, of a commit that is there."""

import ast
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = sorted(path.relative_to(RESULTS).with_suffix("") for path in RESULTS.rglob("*.json"))

COMMIT = {"type": "string", "pattern": "^[0-9a-f]{40}$"}
"""Of a checkout without changes: what was changed cannot be had back."""
SCHEMA = {
    "type": "object",
    "required": ["command", "date", "commit", "machine"],
    "properties": {
        "command": {"type": "string", "pattern": r"^python benchmarks/\w+\.py( |$)"},
        "date": {"type": "string", "pattern": r"^20\d\d-\d\d-\d\d$"},
        "commit": COMMIT,
        "machine": {
            "type": "object",
            "required": ["platform", "python", "torch", "device", "cpus"],
            "properties": {"cpus": {"type": "integer", "minimum": 1}},
        },
        "rows": {"items": {"properties": {"commit": COMMIT}}},
    },
}


def git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def history():
    """The commits that lead to this one."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("an archive, or a shallow clone, has no history")
    return set(git("rev-list", "HEAD").stdout.split())


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECORDS, ids=str)
def test_a_record_says_where_it_comes_from(name):
    jsonschema.validate(read(name), SCHEMA)


@pytest.mark.parametrize("name", RECORDS, ids=str)
def test_a_record_is_of_a_commit_that_is_there(name, history):
    record = read(name)
    parts = [*record.get("rows", []), *record.get("reports", [])]
    commits = {each["commit"] for each in [record, *parts] if "commit" in each}
    assert commits <= history


@pytest.mark.parametrize("name", RECORDS, ids=str)
def test_the_command_makes_the_record_again(name):
    _, script, *arguments = read(name)["command"].split()
    source = (ROOT / script).read_text()
    starts = {str(name)[:end] for end in range(1, len(str(name))) if str(name)[end - 1] in "_/"}
    assert {str(name), *starts} & names_in(source), script
    options = {re.match("--[a-z-]+", each).group() for each in arguments if each.startswith("--")}
    unknown = {option for option in options if f'"{option}"' not in source}
    assert not unknown, f"{script} has no {unknown}"


def names_in(source):
    """The strings of a script: of a record's name the whole, or what it begins with."""
    nodes = ast.walk(ast.parse(source))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_what_does_not_say_enough_is_refused():
    whole = read("calibration")
    for change in ({"commit": whole["commit"] + "+"}, {"command": "by hand"}, {"machine": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(whole | change, SCHEMA)
