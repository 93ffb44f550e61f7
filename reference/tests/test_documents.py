"""The page of the documents: every name leads somewhere, every verdict has its evidence."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = {path.stem: path for path in sorted((ROOT / "docs/data/documents").glob("*.toml"))}
FIELDS = {"place", "does", "here", "why", "verdict", "evidence", "note"}
VERDICTS = {"right", "wrong", "incomplete", "undefined", "not judged"}


def behaviours(name):
    return tomllib.loads(DOCUMENTS[name].read_text())["behaviour"]


def names_of_the_tests(name):
    tree = ast.parse((Path(__file__).parent / f"test_document_{name}.py").read_text())
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef)]
    return {each.name for each in functions if each.name.startswith("test_")}


def test_there_are_five():
    assert set(DOCUMENTS) == {"deepseek", "hanzo", "hyper_parallel", "marlin", "tensorcast"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_row_says_where_it_is_and_whether_it_is_right(name):
    for row in behaviours(name):
        assert set(row) <= FIELDS, row
        assert row["place"], row
        assert row["does"].endswith("."), row
        assert row["verdict"] in VERDICTS, row
        assert bool(row["here"]) != ("why" in row), row
        if row["verdict"] in ("wrong", "incomplete", "undefined"):
            assert row.get("evidence"), row


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_named_is_there(name):
    for row in behaviours(name):
        for dotted in row["here"]:
            package, module, *attributes = dotted.split(".")
            found = importlib.import_module(f"{package}.{module}")
            for attribute in attributes:
                found = getattr(found, attribute)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_evidence_is_there_and_all_of_it_is_used(name):
    used = {test for row in behaviours(name) for test in row.get("evidence", [])}
    assert used == names_of_the_tests(name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_place_is_there_twice(name):
    places = [row["place"] for row in behaviours(name)]
    assert len(set(places)) == len(places)
