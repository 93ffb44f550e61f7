"""Reports of a small target with a fault of every kind, made with the real runner."""

import copy
import dataclasses
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from hypothesis import strategies as st
from moe_conformance import pages
from moe_conformance import report as reports
from moe_conformance.case import routed
from moe_conformance.cases import save_case
from moe_conformance.executor import InlineExecutor, capabilities_of
from moe_conformance.findings import read_findings
from moe_conformance.inputs.given import Content, Given, Scope
from moe_conformance.judge import Violation, close, equal, impostors, within
from moe_conformance.preview import preview
from moe_conformance.registry import Requirement
from moe_conformance.runner import STATUSES, Effort, Failure, Result, run_target
from moe_conformance.target import DTYPES, OPERATIONS, Capabilities, Target
from moe_reference.config import ExpertWeights, RoutingConfig
from rich.console import Console

HOSTILE = "<script>alert('x')</script> & \x1b[31mred\x00 \ud800 [bold]"


class Small(Target):
    """Routes, wrongly at times; its names are what no page and no terminal must take for markup."""

    name, version = "small <b>target</b>", "1.0"
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16"),
        routing={"score": ("softmax",), "scale": (1.0, 16.0)},
        experts=[{"activation": ("silu",)}, {"activation": ("relu",), "bias": (False,)}],
    )

    def route(self, logits, config, bias=None, token_ids=None):
        if len(logits) > 20:
            raise RuntimeError(HOSTILE)
        weights, ids = torch.softmax(logits, -1).topk(config.top_k, -1)
        return weights * 1.001, ids

    def z_loss(self, logits, padding_mask=None):
        return torch.logsumexp(logits, -1).square().mean()


def _given(least=1, most=8):
    def build(plan):
        logits = Content(plan["seed"]).normal(plan["tokens"], 4).float()
        return {"logits": logits, "config": RoutingConfig(top_k=2)}

    drawn = {"tokens": st.integers(least, most), "seed": st.integers(0, 2**32 - 1)}
    return Given(lambda scope: st.fixed_dictionaries(drawn), build)


def _answer(case):
    return routed(case.call("route", logits=case["logits"], config=case["config"]), *_sizes(case))


def _sizes(case):
    return len(case["logits"]), case["config"].top_k


def ids_are_the_best(case):
    _, ids = _answer(case)
    best = case["logits"].topk(2, -1).indices
    case.note("one token", len(ids) == 1)
    case.judge(lambda answer: equal("expert_ids", answer, best), ids, impostors(best))


def weights_are_exact(case):
    weights, _ = _answer(case)
    expected = torch.softmax(case["logits"].double(), -1).topk(2, -1).values
    bound = torch.full_like(expected, 1e-6)
    case.judge(
        lambda answer: within("weights", answer, expected, bound), weights, impostors(expected)
    )


def weights_are_near(case):
    weights, _ = _answer(case)
    expected = torch.softmax(case["logits"].double(), -1).topk(2, -1).values
    sigma = expected * 3e-4
    case.judge(
        lambda answer: close("weights", answer, expected, sigma), weights, impostors(expected)
    )


def nothing_is_told_apart(case):
    _, ids = _answer(case)
    case.judge(lambda answer: None, ids, impostors(ids))


def order_is_seen(case):
    _answer(case)
    case.note("descending")


MADE = itertools.count(1)


def _requirement(check, level="MUST", given=None, operation="route", also=()):
    return Requirement(
        f"GATE-{900 + next(MADE)}",
        level,
        operation,
        f"An answer {level} be right.",
        "A wrong one <i>misleads</i>.",
        ("vLLM #12002", "Shazeer et al. (arXiv 1701.06538)"),
        given or _given(),
        check,
        also=also,
        references=("gating.route",),
    )


REQUIREMENTS = {
    "pass": _requirement(ids_are_the_best),
    "near": _requirement(weights_are_near),
    "fail": _requirement(weights_are_exact),
    "crash": _requirement(ids_are_the_best, given=_given(21, 24)),
    "warn": _requirement(weights_are_exact, level="SHOULD"),
    "observed": _requirement(order_is_seen, level="MAY"),
    "inconclusive": _requirement(nothing_is_told_apart),
    "unsupported": _requirement(ids_are_the_best, given=Given(lambda scope: None, dict)),
    "not_provided": _requirement(ids_are_the_best, also=("align",)),
}
MACHINE = {"platform": "Linux", "python": "3.11", "torch": "2", "triton": None, "device": "cpu"}
SUITE = {"version": "0.1.0", "commit": None, "spec": "2026.11"}


def _results(names=tuple(REQUIREMENTS)):
    executor = InlineExecutor(Small())
    scope = Scope(capabilities_of(executor), tuple(executor.description["operations"]))
    chosen = [REQUIREMENTS[name] for name in names]
    return executor.description, run_target(chosen, scope, executor, Effort(12, 3, 300), 7)


def _report(names=tuple(REQUIREMENTS), seconds=1.0, extra=()):
    description, results = _results(names)
    return reports.target_report(
        target=description,
        machine=MACHINE,
        seed=7,
        suite=SUITE,
        effort={"profile": "smoke", "examples": 12},
        results=[*results, *extra],
        command="moespec check small.py:Small --seed 7",
        started="2026-11-21T04:00:00Z",
        seconds={"lanes": 1, "loading": 0.5, "cases": seconds},
    )


@pytest.fixture(scope="module", autouse=True)
def only_these_requirements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "requirements", lambda: list(REQUIREMENTS.values()))
        yield


@pytest.fixture(scope="module")
def report(only_these_requirements):
    return _report()


def _entry(report, name):
    return next(e for e in report["requirements"] if e["id"] == REQUIREMENTS[name].id)


def _schema():
    return json.loads(
        (resources.files("moe_conformance") / "schemas/report.schema.json").read_text()
    )


def _conforming():
    return _report(("pass", "near"))


def test_a_real_report_follows_its_schema(report, tmp_path):
    schema = _schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    reports.write_target(tmp_path, report)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(written)
    assert written == report
    statuses = {name: _entry(report, name)["status"] for name in REQUIREMENTS}
    assert statuses == {name: "pass" if name == "near" else name for name in REQUIREMENTS}
    assert report["verdict"] == "fails"
    assert report["counts"] == dict(Counter(statuses.values()))


def test_the_schema_knows_every_status_and_no_other():
    status = _schema()["$defs"]["requirement"]["properties"]["status"]
    assert tuple(status["enum"]) == STATUSES
    assert set(STATUSES) < set(pages.SIGNS)


def test_the_same_seed_gives_the_same_report_but_for_times(report):
    again = _report(seconds=2.0)
    assert again["timing"]["seconds"] != report["timing"]["seconds"]
    assert {**again, "timing": None} == {**report, "timing": None}


def test_a_failure_is_shown_with_what_was_expected(report):
    entry = _entry(report, "fail")
    failure = entry["failure"]
    assert failure["kind"] == "fail"
    assert failure["calls"] == ["route"]
    assert failure["expected"]["shape"] == failure["actual"]["shape"] == [1, 2]
    pairs = zip(failure["expected"]["values"][0], failure["actual"]["values"][0], strict=True)
    assert all(came == pytest.approx(wanted * 1.001, rel=1e-5) for wanted, came in pairs)
    by_name = {each["name"]: each for each in failure["inputs"]}
    assert by_name["config"]["text"] == "RoutingConfig(top_k=2)"
    assert by_name["logits"]["dtype"] == "float32"
    assert re.fullmatch(rf"cases/{entry['id']}-[0-9a-f]{{12}}", entry["counterexample"])
    assert entry["replay"] == f"moespec replay {entry['counterexample']}"
    assert "RuntimeError" in _entry(report, "crash")["failure"]["traceback"]
    assert _entry(report, "near")["worst"] > 3
    assert _entry(report, "pass")["drawn"]["one token"] > 0
    assert _entry(report, "pass")["counterexample"] is None


def test_a_preview_shows_the_place_that_is_wrong():
    expected = torch.zeros(3, 20, 30)
    actual = expected.clone()
    actual[2, 7, 29] = float("nan")
    violation = Violation("wrong", expected, actual)
    inputs = {"experts": ExpertWeights(torch.ones(2, 4, 3), torch.ones(2, 3, 2)), "layouts": {}}
    failure = Failure(REQUIREMENTS["fail"], {}, inputs, violation, [])
    result = Result(REQUIREMENTS["fail"], "fail", "wrong", failure=failure)
    shown = reports.target_report(
        target=InlineExecutor(Small()).description,
        machine=MACHINE, seed=0, suite=SUITE, effort={}, results=[result], command="", started="",
        seconds={"lanes": 1, "loading": 0.0, "cases": 0.0},
    )["requirements"][0]["failure"]  # fmt: skip
    assert len(shown["actual"]["rows"]) == len(shown["actual"]["columns"]) == 8
    row, column = shown["actual"]["rows"].index([2, 7]), shown["actual"]["columns"].index(29)
    assert shown["actual"]["values"][row][column] == "nan"
    assert shown["expected"]["values"][row][column] == 0.0
    names = [each["name"] for each in shown["inputs"]]
    assert names == ["experts.gate_up", "experts.down", "layouts"]
    tables = pages._comparison(shown)
    assert [table["title"] for table in tables] == ["expected", "actual", "difference"]
    assert tables[1]["rows"][row]["cells"][column]["shade"] == 4
    assert sum(cell["shade"] for row in tables[1]["rows"] for cell in row["cells"]) == 4


def test_folders_are_those_that_a_run_writes(tmp_path):
    for name in ("reference", "transformers/mixtral", "to/my file.py:MyMoE", "package.module:X"):
        assert "/" not in reports.folder_of(name)
    description, results = _results(("fail",))
    failure = results[0].failure
    scope = Scope(Small.capabilities, tuple(description["operations"]))
    saved = save_case(tmp_path, failure, scope, "small", {})
    assert saved.name == reports.case_name(failure)


@pytest.mark.parametrize("value", [torch.tensor(3), torch.empty(0, 4), torch.empty(2, 0, 3)])
def test_a_preview_takes_scalars_and_nothing(value):
    shown = preview("value", value)
    jsonschema.validate(shown, {**_schema()["$defs"]["preview"], "$defs": _schema()["$defs"]})
    assert sum(map(len, shown["values"])) == value.numel()
    assert pages._grid(shown)["form"].startswith(str(value.dtype).removeprefix("torch."))


def test_breadth_adds_up_fields_and_counts_what_is_declared():
    everything = reports.breadth(Capabilities(dtypes=DTYPES), OPERATIONS, [])
    assert everything["cells"]["declared"] == everything["cells"]["all"]
    assert everything["operations"] == {"provided": 22, "all": 22}
    assert everything["requirements_in_all"] == len(REQUIREMENTS)
    nothing = reports.breadth(Capabilities(), (), [])
    assert nothing["operations"]["provided"] == nothing["cells"]["declared"] == 0
    assert nothing["cells"]["all"] == everything["cells"]["all"]

    own = reports.breadth(Small.capabilities, ("route", "align", "experts", "assign_experts"), [])
    cells = own["cells"]["by_operation"]
    values = sum(map(len, reports.AXES["route"].values()))
    # Of 3 score functions 1 is declared, of 3 scales 2: one of ours and one of its own.
    assert cells["route"] == {"declared": 2 * (values - 2 - 1), "all": 4 * values}
    # Either alternative allows its activation, and the first one a bias.
    values = sum(map(len, reports.AXES["experts"].values()))
    activations = len(reports.AXES["experts"]["activation"])
    assert cells["experts"]["declared"] == 2 * (values - activations + 2)
    assert cells["align"] == {"declared": 12, "all": 12}
    assert cells["assign_experts"] == {"declared": 1, "all": 1}
    assert cells["layer"] == {"declared": 0, "all": 4}
    capacity = {"policy": ("probs",), "signed_weights": (False,)}
    dropping = reports.breadth(Capabilities(capacity=capacity), ("drop_to_capacity",), [])
    cells = dropping["cells"]["by_operation"]
    assert cells["drop_to_capacity"] == {"declared": 2, "all": 20}


def test_requirements_run_are_those_with_a_case(report):
    assert report["breadth"]["requirements_run"] == 7


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("vLLM #12002", "https://github.com/vllm-project/vllm/issues/12002"),
        ("Megatron #1421 (closed)", "https://github.com/NVIDIA/Megatron-LM/issues/1421"),
        ("owner/name#7", "https://github.com/owner/name/issues/7"),
        ("DeepSeek-V3 (arXiv 2412.19437) section 2", "https://arxiv.org/abs/2412.19437"),
        ("see https://example.org/a.", "https://example.org/a"),
    ],
)
def test_threads_and_papers_become_links(source, address):
    pieces = pages.source_links(source)
    assert "".join(text for text, _ in pieces) == source
    assert [link for _, link in pieces if link] == [address]


def test_what_is_no_known_thread_stays_text():
    for source in ("unknown-project #3", "javascript:alert(1)", "gpt-oss model code", ""):
        assert all(address is None for _, address in pages.source_links(source))
    several = pages.source_links("SGLang #1, #2 and vLLM #3")
    assert [address[-10:] for _, address in several if address] == [
        "g/issues/1", "g/issues/2", "m/issues/3"
    ]  # fmt: skip


class _Page(HTMLParser):
    """Checks that tags are balanced and collects what a page refers to."""

    VOID = frozenset({"meta", "wbr", "input", "br", "link", "img", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.outside, self.ids = [], Counter(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names[tag] += 1
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if "src" in attributes or tag in ("link", "img", "iframe", "object"):
            self.outside.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _pages(report, folder):
    run = folder / "run"
    reports.write_target(run / reports.folder_of(report["target"]["name"]), report)
    reports.write_index(run, [report])
    matrix = reports.write_matrix([report, _conforming()], folder)
    return [*sorted(run.rglob("*.html")), matrix]


def test_pages_are_well_formed_whole_and_escaped(report, tmp_path):
    pages = _pages(report, tmp_path)
    assert len(pages) == 3
    for path in pages:
        text = path.read_text(encoding="utf-8")
        page = _Page(text)
        assert page.names["script"] == 1, "no markup of a target came through"
        assert page.outside == []
        assert len(set(page.ids)) == len(page.ids)
        assert "@import" not in text
        assert "url(" not in text
        assert page.names["h1"] == 1
        assert "small &lt;b&gt;target&lt;/b&gt;" in text.replace("<wbr>", "")
        assert "alert(&#39;x&#39;)" in text


def test_a_page_says_every_status_in_words(report, tmp_path):
    reports.write_target(tmp_path / "my run", report)
    text = (tmp_path / "my run" / "report.html").read_text(encoding="utf-8")
    for status in report["counts"]:
        assert f"</span> {status.replace('_', ' ')}</span>" in text
    opened = re.findall(r'<details class="requirement" id="([^"]+)"[^>]* open>', text)
    assert opened == [_entry(report, name)["id"] for name in ("fail", "crash")]
    case = _entry(report, "fail")["counterexample"]
    assert f"moespec replay &#39;{tmp_path}/my run/{case}&#39;" in text
    assert "https://github.com/vllm-project/vllm/issues/12002" in text


def _contrast(one, other):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_from_its_background_in_both_schemes():
    style = (resources.files("moe_conformance") / "templates/style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        tones = [name.removesuffix("-page") for name in colours if name.endswith("-page")]
        pairs = [(tone, f"{tone}-page") for tone in tones]
        pairs += [(tone, "page") for tone in tones] + [(tone, "panel") for tone in tones]
        pairs += [("ink", f"{tone}-page") for tone in tones]
        pairs += itertools.product(("ink", "soft", "link"), ("page", "panel", "code"))
        weak = {pair for pair in pairs if _contrast(*map(colours.get, pair)) < 4.5}
        assert weak == set()


def test_index_and_junit_tell_what_became_of_each_requirement(report, tmp_path):
    good = copy.deepcopy(_conforming())
    good["target"]["name"] = "good/one"
    reports.write_index(tmp_path, [good, report])
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert index["verdict"] == "fails"
    assert index["seed"] == 7
    assert [each["report"] for each in index["targets"]] == [
        "good_one/report.json",
        "small__b_target__b_/report.json",
    ]
    first, second = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert first.attrib["name"] == "good/one"
    assert (first.get("tests"), first.get("failures"), first.get("skipped")) == ("2", "0", "0")
    assert (second.get("failures"), second.get("errors"), second.get("skipped")) == ("2", "1", "2")
    cases = {case.get("name"): case for case in second}
    failed = cases[REQUIREMENTS["fail"].id]
    assert failed.find("failure").get("message").startswith("weights[")
    properties = {p.get("name"): p.get("value") for p in failed.iter("property")}
    assert properties == {"level": "MUST", "operation": "route", "status": "fail"}
    assert cases[REQUIREMENTS["crash"].id].find("failure").get("type") == "crash"
    for name in ("unsupported", "not_provided"):
        assert cases[REQUIREMENTS[name].id].find("skipped") is not None
    assert cases[REQUIREMENTS["inconclusive"].id].find("error") is not None
    assert len(cases[REQUIREMENTS["pass"].id]) == 1


def test_an_index_without_targets_never_conforms(tmp_path):
    reports.write_index(tmp_path, [])
    assert reports.read_report(tmp_path)["verdict"] == "inconclusive"
    assert reports.reports_in(reports.read_report(tmp_path)) == []


def test_two_targets_of_one_name_are_refused(report, tmp_path):
    with pytest.raises(ValueError, match="expected targets with different names"):
        reports.write_index(tmp_path, [report, report])


def test_files_are_replaced_whole(report, tmp_path, monkeypatch):
    reports.write_target(tmp_path, report)
    before = (tmp_path / "report.json").read_text(encoding="utf-8")

    def broken(source, destination):
        raise OSError("full")

    monkeypatch.setattr(reports.os, "replace", broken)
    with pytest.raises(OSError, match="full"):
        reports.write_target(tmp_path, {**report, "seed": 8})
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "badge.svg",
        "report.html",
        "report.json",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "any"),
        ([], "none"),
        ({}, "any"),
        ([True, 2.5, "x"], "yes, 2.5, x"),
        (
            [{"bias": [False]}, {"activation": ["silu", "relu"]}],
            "bias: no or activation: silu, relu",
        ),
    ],
)
def test_a_declaration_reads_as_text(value, text):
    assert pages._brief_value(value, "any") == text


def test_numbers_that_json_lacks_become_text(tmp_path):
    odd = reports._plain({"a": float("nan"), "b": (float("-inf"), torch.float32), 3: {"x"}})
    assert odd == {"a": "nan", "b": ["-inf", "float32"], "3": ["x"]}


def test_reading_gives_back_what_was_written(report, tmp_path):
    folder = tmp_path / reports.folder_of(report["target"]["name"])
    reports.write_target(folder, report)
    reports.write_index(tmp_path, [report])
    assert reports.read_report(folder) == report
    assert reports.read_report(folder / "report.json") == report
    assert reports.reports_in(reports.read_report(str(tmp_path))) == [report]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("{", "expected JSON"),
        ("[1]", "expected a moespec report"),
        ('{"name": 1}', "expected a moespec report"),
        ('{"schema_version": 99}', "expected schema_version 1, got 99"),
        ('{"schema_version": 1}', "expected 'suite', which is missing"),
        ('{"schema_version": 1, "targets": [3]}', "expected a list of objects"),
    ],
)
def test_what_is_no_report_is_refused_in_one_sentence(content, complaint, tmp_path):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        reports.read_report(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected report\.json or index\.json"):
        reports.read_report(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("requirements", 0, "status"), "ok", r"requirements\[0\].status: expected one of pass"),
        (("requirements", 0, "cases"), -1, r"requirements\[0\].cases: expected at least 0, got -1"),
        (("seed",), True, "seed: expected integer, got bool"),
        (("breadth", "cells"), [], "breadth.cells: expected object, got list"),
    ],
)
def test_a_damaged_report_is_refused_where_it_is_damaged(report, place, value, complaint, tmp_path):
    damaged = copy.deepcopy(report)
    *way, last = place
    inner = damaged
    for step in way:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, _schema())
    (tmp_path / "report.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=complaint):
        reports.read_report(tmp_path)


def _changed(report, **statuses):
    changed = copy.deepcopy(report)
    for entry in changed["requirements"]:
        entry["status"] = statuses.get(entry["id"].replace("-", "_"), entry["status"])
    return changed


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("pass", "fail", "regressed"),
        ("pass", "inconclusive", "regressed"),
        ("warn", "crash", "regressed"),
        ("crash", "pass", "fixed"),
        ("inconclusive", "pass", "fixed"),
        ("fail", "waived", "unchanged"),
        ("fail", "inconclusive", "unchanged"),
        ("pass", "marginal", "unchanged"),
        ("not_provided", "unsupported", "unchanged"),
        ("unsupported", "fail", "new"),
        ("fail", "unsupported", "gone"),
        (None, "pass", "new"),
        ("pass", None, "gone"),
    ],
)
def test_compare_sorts_changes(old, new, kind):
    def made(status):
        entry = {"id": "GATE-901", "status": status, "message": "m"}
        return {"target": {"name": "t"}, "requirements": [entry] if status else []}

    changes = reports.compare(made(old), made(new))
    assert list(changes) == ["regressed", "fixed", "new", "gone", "unchanged"]
    assert changes.pop(kind) == [
        {"target": "t", "id": "GATE-901", "old": old, "new": new, "message": "m"}
    ]
    assert not any(changes.values())


def test_compare_pairs_the_targets_of_two_runs_by_name(report):
    other = copy.deepcopy(_conforming())
    other["target"]["name"] = "other"
    changes = reports.compare({"reports": [report]}, {"reports": [other, report]})
    assert {each["target"] for each in changes["new"]} == {"other"}
    assert {each["target"] for each in changes["unchanged"]} == {report["target"]["name"]}
    assert len(reports.compare(report, other)["gone"]) == 5


def test_a_matrix_has_a_row_for_each_requirement_and_a_column_for_each_report(report, tmp_path):
    path = reports.write_matrix([{"reports": [_conforming(), report]}], tmp_path / "new")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "new" / "matrix.html"
    assert text.count('<tr class="requirement"') == len(REQUIREMENTS)
    assert text.count("not in this report") == len(REQUIREMENTS) - 2
    # Of those that both ran, none differs; what one of them did not run is no difference.
    assert text.count('data-differs="yes"') == 0
    broken = copy.deepcopy(report)
    both = {each["id"] for each in _conforming()["requirements"] if each["status"] == "pass"}
    for each in broken["requirements"]:
        if each["id"] in both:
            each["status"] = "fail"
    path = reports.write_matrix([{"reports": [_conforming(), broken]}], tmp_path / "other")
    assert path.read_text(encoding="utf-8").count('data-differs="yes"') == len(both) > 0
    with pytest.raises(ValueError, match="expected at least one"):
        reports.write_matrix([], tmp_path)


FINDING = """
[[finding]]
title = "The last row <is> lost"
targets = ["small*"]
requirements = ["{id}"]
address = "findings.html#last-row"
whose = "theirs"
"""


def _findings(tmp_path, text):
    path = tmp_path / "findings.toml"
    path.write_text(text)
    return read_findings(path)


def test_a_red_cell_of_the_matrix_links_to_its_finding_and_says_how_to_see_it(report, tmp_path):
    failing = REQUIREMENTS["fail"].id
    [finding] = _findings(tmp_path, FINDING.format(id="GATE-01"))
    assert finding.fields == {"whose": "theirs"}
    found = [dataclasses.replace(finding, requirements=(failing,))]
    text = reports.write_matrix([_conforming(), report], tmp_path, found).read_text()
    assert text.count('<a href="findings.html#last-row">The last row &lt;is&gt; lost</a>') == 1
    assert f"{report['command']} --requirement {failing}" in text
    assert 'data-status="fail"' in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected [[finding]] tables"),
        ("[[finding", "expected a TOML file"),
        (FINDING.format(id="GATE-999"), "got 'GATE-999'"),
        (FINDING.format(id="GATE-01").replace("title", "name"), "expected title to be a string"),
        (
            FINDING.format(id="GATE-01").replace('["small*"]', "[1]"),
            "expected targets to be a list",
        ),
    ],
)
def test_findings_that_cannot_be_read_are_refused_in_one_sentence(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        _findings(tmp_path, text)
    assert "\n" not in str(raised.value) or "TOML" in said


def test_the_badge_says_the_verdict_and_what_it_rests_on(report, tmp_path):
    reports.write_target(tmp_path, report)
    badge = ElementTree.parse(tmp_path / "badge.svg").getroot()
    run, in_all = (report["breadth"][f"requirements_{name}"] for name in ("run", "in_all"))
    assert badge.get("aria-label") == f"moespec: fails ({run}/{in_all} run)"
    assert report["target"]["name"] in badge[0].text
    assert "http" not in "".join(each.get("href", "") for each in badge.iter())


def _printed(renderable):
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_terminal_shows_what_is_broken_and_how_to_run_it_again(report, tmp_path):
    text = _printed(reports.table([report], tmp_path))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x00" not in text
    assert "\x1b[31mred" not in text
    assert "[bold]" in plain, "what looks like markup is shown as it is"
    assert "fails" in plain
    assert f"2/{len(OPERATIONS)}" in plain
    for name in ("fail", "crash"):
        case = _entry(report, name)["counterexample"]
        assert f"moespec replay {tmp_path}/small__b_target__b_/{case}" in plain
    assert REQUIREMENTS["pass"].id not in plain
    assert "moespec replay cases/" in _printed(reports.table([report]))


def test_the_last_line_counts_waivers_and_names_the_page(tmp_path):
    waived = Result(REQUIREMENTS["fail"], "waived", "known", cases=1)
    report = _report(("pass",), extra=[waived])
    line = reports.last_line(report, tmp_path)
    assert f"waivers (1 waived); breadth: 2/{len(OPERATIONS)} operations, " in line
    assert line.endswith(f"report: {tmp_path}/small__b_target__b_/report.html")
    assert "2/" in line
    assert "report:" not in reports.last_line(report)
