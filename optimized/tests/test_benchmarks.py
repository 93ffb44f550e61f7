"""The benchmarks: how they time, what they check and write, and what the page makes of it."""

import importlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import moe_optimized.quantized_experts
import pytest
import torch

ROOT = Path(__file__).parents[2]
KINDS = {"forward", "backward", "grouped_gemm", "topk", "align", "gather_sum", "memory", "fp8",
         "w4a16"}  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """The scripts as modules; their folder is not a package."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]
    names = ("timing", "memory", "peers", "goals", "gpu", "fill_peers", "record")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def bench(modules):
    made = modules["gpu"].Bench("cpu", tiny=True, row_seconds=0.0)
    made.ceilings = {"dense_flops": 1e9, "copy_bytes": 1e9}
    # The interpreter takes seconds; the dry run below has the kernels.
    made._interpreted = set(KINDS)
    return made


@pytest.fixture
def case(modules):
    return modules["gpu"].Case("forward", "OLMoE-1B-7B", 64)


def test_every_round_runs_everything_once_and_nothing_always_behind_the_same(modules):
    order = []

    def measure(name):
        order.append(name)
        return 1.0

    times = modules["timing"].interleaved({name: name for name in "abc"}, measure, rounds=15)
    rounds = [order[i : i + 3] for i in range(0, 45, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {each[0] for each in rounds} == set("abc")
    behind = {(name, before) for each in rounds for before, name in pairwise(each)}
    assert len(behind) == 6
    assert times == {name: [1.0] * 15 for name in "abc"}


def test_a_clock_that_slows_down_changes_no_ratio(modules):
    now = 1.0

    def measure(cost):
        nonlocal now
        now *= 1.01
        return cost * now

    times = modules["timing"].interleaved({"ours": 1.0, "theirs": 3.0}, measure, rounds=20)
    found = modules["timing"].summary(times, "ours")
    assert found["theirs"]["ratio_to_ours"] == pytest.approx(3.0, rel=0.011)
    assert found["ours"]["ratio_quartiles"] == [1.0, 1.0]
    assert found["theirs"]["us_quartiles"][0] < found["theirs"]["us"]


def test_without_ours_there_are_times_and_no_ratios(modules):
    found = modules["timing"].summary({"loop": [1e-6, 3e-6]}, "moespec")
    assert found["loop"]["us"] == 2.0
    assert "ratio_to_ours" not in found["loop"]


def test_floors_against_a_count_number_by_number(modules):
    gpu = modules["gpu"]
    T, H, I, E, K, b = 3, 4, 2, 5, 2, 2
    ids = torch.tensor([[0, 1], [0, 1], [0, 3]])
    touched, most = gpu.load(ids, E)
    assert (touched, most) == (3, 3)
    multiplications, read = 0, 0
    for e in range(E):
        rows = int((ids == e).sum())
        multiplications += rows * (2 * I * H + H * I)
        read += (2 * I * H + H * I) if rows else 0
    moved = read + T * H + T * H + 2 * T * K * I + 2 * T * K * H
    assert gpu.forward_floor(T, H, I, K, touched, b) == (2 * multiplications, b * moved)
    flops, moved_back = gpu.backward_floor(T, H, I, E, K, touched, b)
    assert flops == 4 * multiplications
    # x, the output's gradient and x's; twice I kept; I and twice I made and read; packed rows.
    rows = 3 * T * H + T * K * 2 * I + 2 * T * K * (I + 2 * I) + 2 * T * K * H
    assert moved_back == b * (read + E * 3 * H * I + rows)
    assert gpu.product_floor(T * K, H, I, touched, b)[0] == 2 * T * K * H * I
    assert gpu.gather_floor(T, H, K, b)[1] == b * (T * K * H + T * H) + 4 * T * K + 4 * T * K


def test_skew_is_counted_and_no_token_has_an_expert_twice(modules):
    gpu = modules["gpu"]
    loads = {}
    for routing in ("uniform", "zipf"):
        ids = gpu.draw_ids(2000, 64, 8, routing, "cpu")
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
        loads[routing] = gpu.load(ids, 64)[1]
    # 250 rows per expert on average.
    assert loads["uniform"] < 320
    assert loads["zipf"] > 1200


def test_a_row_checks_everything_before_it_times(bench, case, modules, monkeypatch):
    peers = modules["peers"]

    def wrong_in_one_row(given):
        run = peers.loop(given)

        def broken():
            out = run()
            out[-1] *= 1.5
            return out

        return broken

    def raising(given):
        def run():
            raise RuntimeError("no kernel for this\nand more")

        return run

    for name, make in (
        ("wrong", wrong_in_one_row),
        ("raising", raising),
        ("gone", lambda given: "absent: ModuleNotFoundError: No module named 'gone'"),
    ):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(make, True, True, "a test"))
    row = bench.row(case)
    assert set(row["ways"]["cpu"]) == {"moespec", "loop", "eager", "batched_mm", "grouped_mm"}
    assert "worst row" in row["wrong"]["wrong"]
    assert row["absent"]["raising"] == "RuntimeError: no kernel for this"
    assert row["absent"]["gone"] == "ModuleNotFoundError: No module named 'gone'"


@pytest.mark.parametrize("at", range(5))
def test_a_wrong_gradient_is_seen(bench, modules, monkeypatch, at):
    peers, gpu = modules["peers"], modules["gpu"]
    right = gpu.Backward.__call__

    def off(self):
        found = list(right(self))
        if getattr(self.forward, "spoiled", False):
            found[at] = found[at].clone()
            found[at].flatten(0, -2)[0] = 0.0 if at else float("nan")
        return tuple(found)

    def make(given):
        run = peers.loop(given)
        run.spoiled = True
        return run

    monkeypatch.setattr(gpu.Backward, "__call__", off)
    monkeypatch.setitem(peers.PEERS, "spoiled", peers.Peer(make, True, True, "a test"))
    row = bench.row(gpu.Case("backward", "OLMoE-1B-7B", 4096, "zipf"))
    assert list(row["wrong"]) == ["spoiled"]
    assert f"result {at}" in row["wrong"]["spoiled"]
    assert "loop" in row["ways"]["cpu"]


def test_a_peer_that_is_not_there_says_why(modules, monkeypatch, tmp_path):
    peers = modules["peers"]
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    given = peers.Given(*(torch.zeros(1) for _ in range(5)))
    for name, module in (("liger", "liger_kernel"), ("vllm", "vllm_fused_moe")):
        said = peers.PEERS[name].make(given)
        assert said.startswith("absent: ModuleNotFoundError")
        assert module in said


def test_first_calls_that_take_too_long_cost_a_peer_the_later_rows(bench, case, modules):
    bench._count_first_call("loop", 1000.0)
    bench._count_first_call("moespec", 1000.0)
    row = bench.row(case)
    assert "1000 s" in row["absent"]["loop"]
    assert "loop" not in row["ways"]["cpu"]
    assert "moespec" in row["ways"]["cpu"]


def test_memory_counts_what_is_kept_and_not_the_matrices(modules):
    x = torch.randn(6, 8, requires_grad=True)
    matrix = torch.randn(8, 8, requires_grad=True)
    # mm keeps both operands, sigmoid its result.
    kept = modules["memory"].kept_bytes(lambda: (x @ matrix).sigmoid(), (matrix,))
    assert kept == 2 * 6 * 8 * 4


def test_the_most_memory_is_that_of_one_moment(modules):
    def run():
        big = torch.zeros(5000)
        small = torch.zeros_like(big[:1000])
        del big
        other = torch.zeros(3000)
        return small, other

    assert modules["memory"].peak_bytes(run, "cpu") == 6000 * 4


def test_a_row_about_memory_says_what_is_kept_and_taken(bench, modules):
    row = bench.row(modules["gpu"].Case("memory", "OLMoE-1B-7B", 4096))
    ours = row["implementations"]["moespec"]
    assert 0 < ours["kept_bytes"] <= row["kept_at_most"]
    assert ours["peak_bytes"] > ours["kept_bytes"]


@pytest.mark.parametrize("kind", ["fp8", "w4a16"])
def test_rows_of_packed_experts_round_what_they_are_to_round(bench, modules, monkeypatch, kind):
    gpu, given = modules["gpu"], []

    def seen(x, packed, *rest):
        given.append(packed)
        return moe_optimized.quantized_experts.experts_quantized(x, packed, *rest)

    monkeypatch.setattr(gpu, "experts_quantized", seen)
    row = bench.row(gpu.Case(kind, "Qwen3-30B-A3B", 64))
    expected = "e4m3_block" if kind == "fp8" else None
    assert {each.activation_format for each in given} == {row["activations"]} == {expected}
    assert row["wrong"] == {}
    assert set(row["ways"]["cpu"]) == {"moespec", "unpacked"}
    assert set(row["peak_bytes"]) == {"moespec", "unpacked"}
    assert all(row["peak_bytes"].values())
    # Rounded rows are no rounding of the result: they are told from those that are not.
    work = bench._packed(gpu.Case(kind, "Qwen3-30B-A3B", 64))
    plain = work.runs["unpacked"]()
    wrong = gpu.difference((plain,), work.expected(), torch.float32, False)
    assert (wrong is None) == (kind == "w4a16")


def test_a_dry_run_writes_every_row_and_an_end(tmp_path, modules):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--dry-run"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_dry_run.json"]
    assert record["finished"]
    assert record["errors"] == {}
    assert record["not_reached"] == []
    assert {"commit", "date", "machine", "versions", "device", "peers"} <= set(record)
    assert [row["label"] for row in record["rows"]] == [c.label for c in modules["gpu"].plan()]
    assert {row["kind"] for row in record["rows"]} == KINDS
    by_kernels = set()
    for row in record["rows"]:
        if row["kind"] == "memory":
            assert row["implementations"]
            continue
        assert row["wrong"] == {}, row["label"]
        assert row["bytes"] > 0
        assert row["bound"] in ("compute", "memory")
        for name, each in row["ways"]["cpu"].items():
            assert each["us"] > 0
            assert each["of_floor"] > 0
            if name == "moespec":
                assert each["ratio_to_ours"] == 1.0
                by_kernels.add(row["kind"])
    assert by_kernels == KINDS - {"memory"}
    # Nothing of a dry run is a figure.
    rows = modules["goals"].goal_rows(record)
    assert {row[4] for row in rows} == {"not measured"}


def test_when_the_time_is_over_the_rest_is_listed(bench, modules, tmp_path, monkeypatch):
    gpu = modules["gpu"]
    monkeypatch.setattr(modules["record"], "RESULTS", tmp_path)
    monkeypatch.setattr(gpu.record, "RESULTS", tmp_path)
    log = {"rows": [], "errors": {}, "not_reached": [], "crashed": {}}
    gpu._measure(bench, gpu.plan()[:3], log, "gpu", until=0.0)
    assert log["rows"] == []
    assert log["not_reached"] == [case.label for case in gpu.plan()[:3]]


def test_an_error_in_a_row_leaves_the_next_ones(bench, modules, tmp_path, monkeypatch):
    gpu = modules["gpu"]
    monkeypatch.setattr(gpu.record, "RESULTS", tmp_path)
    right = bench.row

    def row(case):
        if case.T == 16384:
            raise ValueError("no")
        return right(case)

    monkeypatch.setattr(bench, "row", row)
    log = {"rows": [], "errors": {}, "not_reached": [], "crashed": {}}
    first, second = gpu.plan()[:2]
    gpu._measure(bench, [first, second], log, "gpu", until=float("inf"))
    assert log["errors"] == {first.label: "ValueError: no"}
    assert [each["label"] for each in log["rows"]] == [second.label]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == log["rows"]


def test_a_crash_of_the_device_starts_again_without_who_caused_it(
    bench, modules, tmp_path, monkeypatch
):
    gpu = modules["gpu"]
    monkeypatch.setattr(gpu.record, "RESULTS", tmp_path)

    class Restarted(Exception):
        pass

    def restart(until):
        raise Restarted

    def row(case):
        raise gpu.DeviceLost("liger", "CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu, "_start_again", restart)
    monkeypatch.setattr(bench, "row", row)
    log = {"rows": [], "errors": {}, "not_reached": [], "crashed": {}}
    with pytest.raises(Restarted):
        gpu._measure(bench, gpu.plan()[:1], log, "gpu", until=float("inf"))
    assert "illegal memory access" in log["crashed"]["liger"]
    assert log["errors"] == {}
    # If the row crashes without it as well, the row is given up.
    with pytest.raises(Restarted):
        gpu._measure(bench, gpu.plan()[:1], log, "gpu", until=float("inf"))
    assert list(log["errors"]) == [gpu.plan()[0].label]


@pytest.fixture
def measured(modules):
    """A record as of a GPU, with figures that are made up."""
    gpu, rows = modules["gpu"], []
    for case in gpu.plan():
        row = {"label": case.label, "kind": case.kind, "model": case.model, "T": case.T,
               "routing": case.routing}  # fmt: skip
        if case.kind == "memory":
            kept = {"moespec": {"kept_bytes": 90}, "liger": {"kept_bytes": 180}}
            rows.append({**row, "implementations": kept, "absent": {}, "kept_at_most": 100})
            continue
        ours = {"us": 100.0, "ratio_to_ours": 1.0, "ratio_quartiles": [1, 1], "of_floor": 0.5}
        peer = {"us": 150.0, "ratio_to_ours": 1.5, "ratio_quartiles": [1.4, 1.6], "of_floor": 0.3}
        both = {"moespec": ours, "liger": peer, "torch": peer, "unpacked": peer}
        H, I, E, _ = gpu.MODELS.get(case.model, (0, 0, 0, 0))
        rows.append({**row, "H": H, "I": I, "touched": E, "floor_us": 50.0, "bytes": 4e8,
                     "flops": 5e10, "wrong": {}, "absent": {"vllm": "no wheel"},
                     "ways": {"eager": both, "graph": both, "warm": both}})  # fmt: skip
    rows[0]["wrong"] = {"moe-ops": "off | by much"}
    return {
        "command": "python benchmarks/gpu.py", "date": "2026-01-01", "commit": "0" * 40,
        "machine": {"python": "3.12"}, "versions": {"torch": "2.11"}, "dry_run": False,
        "device": {"name": "A GPU", "clocks.sm": "1980 MHz"}, "finished": True,
        "ceilings": {"dense_flops": 1e15, "copy_bytes": 4e12, "read_bytes": 4e12, "side": 8192,
                     "dtype": "bfloat16", "launch_us": 2.0},
        "peers": {"liger": "its kernel", "vllm": "its kernel"}, "rows": rows,
        "errors": {"a row": "ValueError: no"}, "not_reached": ["another row"],
        "conformance": [{"target": "optimized", "operation": "align", "verdict": "conforms",
                         "counts": {"pass": 3}, "broken": []}],
    }  # fmt: skip


def test_goals_take_the_figure_furthest_from_them(modules, measured):
    goals = modules["goals"]
    found = {goal.work: goals.found(goal, measured) for goal in goals.GOALS}
    product = found["Grouped product alone"]
    # 5e10 operations in 100 µs are half of the dense rate.
    assert (product.rows, product.worst, product.reached) == (2, pytest.approx(0.5), 0)
    assert product.ratios == {}
    slower = next(row for row in measured["rows"] if row["kind"] == "backward")
    slower["ways"]["eager"] = {
        "moespec": {"us": 200.0, "ratio_to_ours": 1.0},
        "liger": {"us": 210.0, "ratio_to_ours": 1.05},
    }
    backward = goals.found(goals.GOALS[7], measured)
    assert backward.worst == pytest.approx(0.25)
    assert backward.ratios == {"liger": 1.05}
    kept = found["Kept for the backward"]
    assert (kept.worst, kept.reached, kept.ratios) == (0.9, 3, {"liger": 2.0})
    small = found["Decode, T 1, small experts"]
    assert (small.worst, small.reached) == (pytest.approx(2.0), 1)
    assert found["Decode, FP8 weights"].worst == 1.5


def test_every_goal_has_rows_in_the_plan(modules, measured):
    goals = modules["goals"]
    assert all(goals.found(goal, measured).rows for goal in goals.GOALS)


def test_the_page_has_a_figure_for_what_was_measured(modules, measured, tmp_path, monkeypatch):
    page = importlib.import_module("pictures.performance")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    for name in ("environment", "peers", "conformance", "missing", "cpu"):
        assert "Not measured." in page.part(name)
    assert page.part("goals").count("| not measured |") == len(modules["goals"].GOALS)
    assert "Not measured." in page.floors()
    assert "Not measured." in page.peers()
    assert page.cpu() == ""
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    assert "1000 TFLOP/s" in page.part("environment")
    assert "50 % of dense (missed)" in page.part("goals")
    assert "no wheel" in page.part("peers")
    assert "3 pass" in page.part("conformance")
    assert "off \\| by much" in page.part("missing")
    assert page.floors().startswith("<figure")
    assert "liger 1.50" in page.peers()


def test_the_page_shows_the_records_of_the_cpu():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        page = importlib.import_module("pictures.performance")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for record in page.cpu_records():
        for row in record["rows"]:
            assert f"{record['operation']}, T {row['tokens']}" in page.cpu()
            assert record["date"] in page.part("cpu")


def test_what_is_cut_from_vllm_is_a_module_of_its_own(modules):
    source = (
        "import vllm\n\n@triton.jit\ndef fused_moe_kernel(\n    a_ptr,\n):\n    return  # kept\n\n"
        "def write_zeros_to_output(x):\n    pass\n\ndef other():\n    vllm.call()\n"
    )
    cut = modules["fill_peers"].cut(source, modules["fill_peers"].VLLM_FUNCTIONS)
    assert "@triton.jit\ndef fused_moe_kernel(" in cut
    assert "return  # kept" in cut
    assert "vllm" not in cut
    compile(cut, "vllm_fused_moe", "exec")
    with pytest.raises(ValueError, match="found none"):
        modules["fill_peers"].cut("x = 1", ("fused_moe_kernel",))
