"""Expert parallelism: the requirements on real ranks, their faults, and ranks that are lost."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from moe_conformance import rank_group, ranks, worker
from moe_conformance.case import Case
from moe_conformance.check import Lane, Options, UsageError, expand, scope_of, share_of
from moe_conformance.executor import InlineExecutor, TargetLost, WorkerExecutor
from moe_conformance.faults import faults
from moe_conformance.faults.same_tokens import OneLoss
from moe_conformance.inputs.expert_parallel import on_ranks
from moe_conformance.inputs.given import Scope
from moe_conformance.judge import Violation
from moe_conformance.registry import requirement_named, requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import catch, inline_scope, noticed
from moe_conformance.target import SAME_TOKENS, Capabilities
from moe_conformance.targets import Reference

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Path(__file__).parent
ON_RANKS = requirements("expert_parallel")
FAULTS = [each for each in faults() if any(id.startswith("EP-") for id in each.catches)]
PLAN = {
    "tokens": 7, "hidden": 4, "intermediate": 3, "experts": 5, "local": 5, "top_k": 2,
    "config": {"activation": "silu", "gated": True, "alpha": 1.702, "limit": 7.0,
               "weight_on": "output"},
    "bias": False, "biases": None, "expert_map": False, "invalid_ids": False, "map": None,
    "load": "uniform", "content": "normal", "spread": "even", "weights": "positive",
    "dtype": "float32", "experts_dtype": "float32", "biases_dtype": "float32",
    "weights_dtype": None, "ids": "int64", "layout": "contiguous", "seed": 3,
    "world_size": 2, "members": [0, 1], "counts": [3, 4],
    "physical": None, "copies": None, "to_one_rank": False, "grad_mode": "recording",
    "cotangent_layout": "contiguous",
}  # fmt: skip


def planted(name):
    return f"{HERE / 'planted_ranks.py'}:{name}"


@pytest.fixture
def executor():
    """Makes executors, and ends them."""
    made = []

    def make(name, timeout=60.0):
        made.append(WorkerExecutor(name, timeout))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def reference():
    made = WorkerExecutor("reference", 60.0)
    made.prepare((2, 4), "cpu")
    yield made
    made.close()


def scope_for(executor):
    capabilities = Capabilities.from_json(executor.description["capabilities"])
    return Scope(
        capabilities, tuple(executor.description["operations"]), dtypes=capabilities.dtypes
    )


def case_of(executor, **changed):
    return Case(on_ranks().build({**PLAN, **changed}), scope_for(executor), executor)


def call(case, **more):
    given = {name: case[name] for name in ("ranks", "num_experts", "config", "placement")}
    return case.session([case.planned("expert_parallel", **given, **more)])[0]


def pids_of(executor):
    return [pid for group in executor._groups.values() for pid in group.pids]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# The requirements


@pytest.mark.parametrize("requirement", ON_RANKS, ids=lambda each: each.id)
def test_the_reference_passes_on_real_ranks(requirement, reference):
    result = run_requirement(requirement, scope_for(reference), reference, Effort(12, 1, 0), 0)
    assert (result.status, result.message) == ("pass", "")
    assert result.cases == 4
    assert reference.restarts == 0


@pytest.mark.parametrize("requirement", ON_RANKS, ids=lambda each: each.id)
def test_the_reference_passes_on_threads(requirement):
    executor = InlineExecutor(Reference())
    result = run_requirement(requirement, inline_scope(executor), executor, Effort(60, 3, 0), 0)
    assert (result.status, result.message) == ("pass", "")


@pytest.mark.parametrize("requirement", ON_RANKS, ids=lambda each: each.id)
def test_another_right_way_is_not_accused(requirement):
    gathered = requirement.operation == "expert_parallel"
    executor = InlineExecutor(worker.make(planted("Gathered" if gathered else "TheOtherWay")))
    result = run_requirement(requirement, inline_scope(executor), executor, Effort(45, 3, 0), 1)
    without = requirement.id in ("EP-14", "EP-15")
    assert (result.status, result.message) == (
        ("unsupported", "nothing of the kind lies inside the declaration")
        if without
        else ("pass", "")
    )


@pytest.mark.parametrize(
    "requirement",
    [each for each in ON_RANKS if each.operation in SAME_TOKENS],
    ids=lambda each: each.id,
)
def test_ranks_that_compute_the_same_loss_are_not_accused(requirement):
    executor = InlineExecutor(OneLoss())
    result = run_requirement(requirement, inline_scope(executor), executor, Effort(60, 3, 0), 2)
    assert (result.status, result.message) == ("pass", "")


@pytest.mark.parametrize("id", ["EP-20", "EP-22", "EP-24"])
@pytest.mark.parametrize(("is_one", "declared"), [(True, "partial"), (False, "replicate")])
def test_what_losses_are_is_told_apart(id, is_one, declared):
    right = OneLoss if is_one else Reference
    capabilities = dataclasses.replace(right.capabilities, replicated_gradients=declared)
    executor = InlineExecutor(type("Declared", (right,), {"capabilities": capabilities})())
    result = run_requirement(
        requirement_named(id), inline_scope(executor), executor, Effort(60, 1, 0), seed=0
    )
    assert result.status == "fail"


@pytest.mark.parametrize(
    ("fault", "id"),
    [(fault, id) for fault in FAULTS for id in fault.catches],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_requirement_that_a_fault_names_notices_it(fault, id):
    executor = InlineExecutor(fault.target())
    result = run_requirement(
        requirement_named(id), inline_scope(executor), executor, Effort(120, 1, 0), seed=0
    )
    assert noticed(result), (result.status, result.message)


@pytest.mark.parametrize(
    ("name", "id", "statuses", "said"),
    [
        ("ThereIsNoWayBack", "EP-01", ("fail",), "output of rank"),
        ("TheSplitsAreNotSwapped", "EP-03", ("crash", "fail", "timeout"), "rank"),
        ("ARankWithoutTokensLeaves", "EP-04", ("timeout",), "came back without waiting"),
        ("ARankWithoutTokensHasNoBackward", "EP-04", ("timeout",), "in the backward pass"),
        ("CountsAreKept", "EP-12", ("fail", "crash", "timeout"), "rank"),
        ("TheWorldIsTakenForTheGroup", "EP-18", ("crash", "timeout"), "rank"),
        ("GradientsAreMultipliedByR", "EP-07", ("fail",), "gradient of local"),
    ],
)
def test_faults_are_caught_on_real_ranks_too(name, id, statuses, said, executor, monkeypatch):
    monkeypatch.setattr(rank_group, "LEFT_SECONDS", 2.0)
    monkeypatch.setattr(rank_group, "RAISED_SECONDS", 1.0)
    made = executor(f"moe_conformance.faults.expert_parallel:{name}", timeout=20.0)
    scope = scope_for(made)
    result = run_requirement(requirement_named(id), scope, made, Effort(60, 1, 0), seed=0)
    assert result.status in statuses, result.message
    assert said in result.message
    pids = pids_of(made)
    made.close()
    assert not any(map(alive, pids))


def drawn_experts(expert_parallel, shares=None, world_sizes=(2, 3, 4), **declared):
    """What is drawn inside a declaration: pairs of ranks and experts."""
    capabilities = Capabilities(expert_parallel=expert_parallel, **declared)
    scope = Scope(capabilities, ("expert_parallel",), world_sizes=world_sizes)
    plans = (on_ranks() if shares is None else on_ranks(shares=shares)).plans(scope)
    found = set()
    if plans is None:
        return found

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=60,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plans)
    def draw(plan):
        found.add((len(plan["members"]), plan["experts"]))

    draw()
    return found


def test_shares_that_are_not_declared_are_not_drawn():
    every = drawn_experts({})
    assert every == drawn_experts({"shares": ("even", "uneven", "fewer")})
    assert any(experts % ranks and experts > ranks for ranks, experts in every)
    assert any(experts < ranks for ranks, experts in every)
    even = drawn_experts({"shares": ("even",)})
    assert {ranks for ranks, _ in even} == {2, 3, 4}
    assert not any(experts % ranks for ranks, experts in even)
    uneven = drawn_experts({"shares": ("even", "uneven")})
    assert any(experts % ranks for ranks, experts in uneven)
    assert all(experts >= ranks for ranks, experts in uneven)
    assert all(0 < e < r or r == 1 for r, e in drawn_experts({"shares": ("fewer",)}))


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_few_experts_go_to_few_ranks_where_shares_are_even(most):
    even = drawn_experts({"shares": ("even",)}, max_experts=most)
    assert {ranks for ranks, _ in even} == {ranks for ranks in (2, 3, 4) if ranks <= most}
    assert all(experts % ranks == 0 and experts <= most for ranks, experts in even)


def test_what_asks_for_other_shares_is_not_asked():
    assert not drawn_experts({"shares": ("even",)}, shares=("uneven", "fewer"))


def test_there_are_enough_faults():
    assert len(FAULTS) >= 24
    for requirement in ON_RANKS:
        assert len(requirement.faults) >= 2, requirement.id


def test_threads_and_processes_give_the_same_bits(reference):
    inline = InlineExecutor(Reference())
    for counts, size in (([3, 4], 2), ([0, 5, 0, 2], 4)):
        changed = {
            "counts": counts, "world_size": size, "members": [*range(size)], "dtype": "bfloat16"
        }  # fmt: skip
        wrt = [f"ranks.{rank}.{path}" for rank in range(size) for path in ("x", "local.down")]
        found = []
        for executor in (reference, inline):
            case = case_of(executor, **changed)
            cotangents = {
                str(r): torch.ones_like(each["x"]) for r, each in enumerate(case["ranks"])
            }
            found.append(call(case, wrt=wrt, cotangents=cotangents))
        one, other = found
        assert all(torch.equal(a, b) for a, b in zip(one.outputs, other.outputs, strict=True))
        assert one.gradients.keys() == other.gradients.keys() == set(wrt)
        assert all(torch.equal(one.gradients[path], other.gradients[path]) for path in wrt)
        assert one.kinds == other.kinds


# Ranks that are lost


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("KillsItself", "crash", "rank 1 ended with signal SIGKILL in the forward pass"),
        ("Exits", "crash", "rank 1 ended with exit code 7 in the forward pass"),
        (
            "Raises",
            "crash",
            "rank 1 raised RuntimeError: no space left on device, while others wait: rank 0 is in "
            "the forward pass, waiting in all_to_all_single",
        ),
        ("CallsExit", "crash", "rank 1 raised SystemExit: 3, while others wait: rank 0 is in"),
        (
            "Sleeps",
            "timeout",
            "no answer within 2 s: rank 0 is in the forward pass, waiting in all_to_all_single",
        ),
        (
            "Leaves",
            "timeout",
            "rank 1 came back without waiting for others: rank 0 is in the forward pass, waiting "
            "in all_to_all_single",
        ),
    ],
)
def test_a_lost_rank_ends_the_case_and_every_process(name, kind, said, executor, monkeypatch):
    monkeypatch.setattr(rank_group, "LEFT_SECONDS", 1.0)
    monkeypatch.setattr(rank_group, "RAISED_SECONDS", 0.5)
    made = executor(planted(name), timeout=2.0 if name == "Sleeps" else 20.0)
    made.prepare([2], "cpu")
    pids = pids_of(made)
    made._groups[2, "cpu"]._meet()
    folder = made._groups[2, "cpu"]._folder
    log = folder / "rank-1.log"
    children = []
    if name == "Sleeps":
        real = rank_group.RankGroup.close

        def close(self):
            children.extend(map(int, re.findall(r"^child (\d+)$", log.read_text(), re.MULTILINE)))
            real(self)

        monkeypatch.setattr(rank_group.RankGroup, "close", close)
    began = time.monotonic()
    with pytest.raises(Violation) as found:
        call(case_of(made))
    assert said in str(found.value)
    assert found.value.kind == kind
    if name == "Sleeps":
        assert "rank 1 is in the forward pass, planted_ranks.py line" in str(found.value)
        assert len(children) == 1
    assert time.monotonic() - began < 15
    assert not any(map(alive, pids + children))
    assert not folder.exists()
    assert made.restarts == 1


def test_a_rank_that_never_arrives_ends_every_process(executor, monkeypatch):
    made = executor(planted("NeverArrives"))
    made.prepare([2], "cpu")
    pids, folder = pids_of(made), made._groups[2, "cpu"]._folder
    until = time.monotonic() + 60
    logs = [(folder / "rank-0.log", "the rendezvous"), (folder / "rank-1.log", "the loading")]
    while not all(log.exists() and said in log.read_text() for log, said in logs):
        assert time.monotonic() < until
        time.sleep(0.05)
    monkeypatch.setattr(rank_group, "LOAD_SECONDS", 0.5)
    with pytest.raises(Violation) as found:
        call(case_of(made))
    assert found.value.kind == "timeout"
    assert "no answer within 0.5 s: rank 0 is in the rendezvous, waiting in init" in str(
        found.value
    )
    assert "rank 1 is in the loading of the target, planted_ranks.py line" in str(found.value)
    assert not any(map(alive, pids))
    assert not folder.exists()


def test_a_lost_rank_costs_one_case(executor):
    made = executor(planted("Right"), timeout=20.0)
    first = call(case_of(made))
    one, other = pids_of(made)
    os.kill(other, 9)
    with pytest.raises(Violation, match="rank 1 ended with signal SIGKILL"):
        call(case_of(made))
    again = call(case_of(made))
    assert all(torch.equal(a, b) for a, b in zip(first.outputs, again.outputs, strict=True))
    assert not {one, other} & set(pids_of(made))


def test_ranks_end_with_the_process_that_judges(tmp_path):
    program = (
        "import os, time\n"
        "from moe_conformance.executor import WorkerExecutor\n"
        "if __name__ == '__main__':\n"
        f"    made = WorkerExecutor({planted('Right')!r}, 20.0)\n"
        "    made.prepare([2], 'cpu')\n"
        "    made._groups[2, 'cpu']._meet()\n"
        "    print(*[p for g in made._groups.values() for p in g.pids], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    pids = list(map(int, ended.stdout.split()))
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_all_ranks_that_refuse_go_on(executor):
    made = executor(planted("Right"), timeout=20.0)
    case = case_of(made)
    pids = None
    for dtype, error in ((torch.float32, None), (torch.complex64, "TypeError")):
        given = {name: case[name] for name in ("num_experts", "config", "placement")}
        changed = [rank | {"x": rank["x"].to(dtype)} for rank in case["ranks"]]
        answer = case.attempt([case.planned("expert_parallel", ranks=changed, **given)])[0]
        assert (answer.error and answer.error["type"]) == error
        pids = pids or pids_of(made)
        assert pids_of(made) == pids
    assert answer.error["ranks"] == [0, 1]
    assert answer.error["message"].startswith("rank 0: ")


def test_ranks_that_cannot_load_the_target_are_nobodys_fault(executor, monkeypatch, tmp_path):
    source = (HERE / "planted_ranks.py").read_text()
    target = tmp_path / "gone.py"
    target.write_text(source)
    made = executor(f"{target}:Right")
    target.unlink()
    result = run_requirement(ON_RANKS[0], scope_for(made), made, Effort(6, 1, 0), 0)
    assert result.status == "inconclusive"
    assert "gone.py" in result.message


# The command line


def test_a_target_without_expert_parallelism_is_not_asked(executor):
    made = executor(planted("OnlyARouter"))
    scope = scope_of(made, Options((made.name,)))
    for requirement in ON_RANKS:
        result = run_requirement(requirement, scope, made, Effort(6, 1, 0), 0)
        assert result.status == "not_provided"
    assert not made._groups


def test_world_sizes(executor):
    made = executor(planted("OnThreeRanks"))
    assert scope_of(made, Options((made.name,))).world_sizes == (3,)
    assert scope_of(made, Options((made.name,), world_sizes=(3,))).world_sizes == (3,)
    with pytest.raises(UsageError, match="--world-size: expected any of 3"):
        scope_of(made, Options((made.name,), world_sizes=(2, 3)))
    right = executor(planted("Right"))
    assert scope_of(right, Options((right.name,))).world_sizes == (2, 4)
    options = Options((right.name,), world_sizes=(1, 3), seed=5)
    scope = scope_of(right, options)
    assert scope.world_sizes == (1, 3)
    assert options.command("x") == "moespec check x --seed 5 --profile cpu --world-size 1,3"
    result = run_requirement(ON_RANKS[0], scope, right, Effort(15, 1, 0), 0)
    assert result.status == "pass"
    assert {"1 ranks", "3 ranks"} <= result.drawn.keys()
    none = Scope(scope.capabilities, scope.operations, world_sizes=())
    assert run_requirement(ON_RANKS[0], none, right, Effort(6, 1, 0), 0).status == "unsupported"


@pytest.mark.parametrize("said", ["0", "two", "2,,4", "65"])
def test_a_world_size_that_is_none(said, inside):
    code, _ = inside("check", "reference", "--world-size", said)
    assert code == 2


def test_the_lanes_share_all_requirements_and_one_has_the_ranks():
    chosen = requirements()
    for of in (1, 2, 3):
        shares = [share_of(chosen, Lane("x", number, of)) for number in range(of)]
        together = [each.id for share in shares for each in share]
        assert sorted(together) == sorted(each.id for each in chosen)
        assert [any(each in ON_RANKS for each in share) for share in shares] == [
            number == of - 1 for number in range(of)
        ]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_failure_is_saved_and_replayed(tmp_path, inside):
    code, output = inside(
        "check", planted("SendsNothingBack"), "--requirement", "EP-01", "--world-size", "2",
        "--world-size", "3", "--seed", 1, "--examples", 12, "--report", tmp_path,
    )  # fmt: skip
    assert code == 1, output
    [saved] = tmp_path.glob("*/cases/EP-01-*")
    code, output = inside("replay", saved)
    assert code == 1
    assert "now:      the same" in output
    assert "the same bytes as the plan builds" in output
    code, output = inside("replay", saved, "--target", planted("Right"))
    assert code == 0, output
    repro = saved / "repro.py"
    assert len(repro.read_text().splitlines()) <= 20
    ran = subprocess.run([sys.executable, repro], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("expected ") or "expected tensor" in ran.stdout


# The parts


def test_answers_are_put_together():
    nothing = {"gradients": {}, "changed": [], "shared": [], "state": [], "seconds": 0.5}
    fine = {**nothing, "error": None, "outputs": torch.ones(1), "gradients": {"x": None},
            "kinds": [["", "float32", "cpu", "Tensor"]], "changed": ["x"]}  # fmt: skip
    wrong = {**nothing, "error": {"type": "ValueError", "message": "no", "unsupported": False}}
    [one] = ranks.together([[fine], [fine]])
    assert one["error"] is None
    assert one["gradients"] == {"ranks.0.x": None, "ranks.1.x": None}
    assert one["changed"] == ["rank 0: x", "rank 1: x"]
    assert [path for path, *_ in one["kinds"]] == ["0", "1"]
    first, second = ranks.together([[fine, fine, fine], [fine, wrong]])
    assert first["error"] is None
    assert second["error"]["message"] == "rank 1: no"
    assert second["error"]["ranks"] == [1]


def test_a_part_of_the_world_is_called(reference):
    case = case_of(reference, world_size=4, members=[1, 3])
    answer = call(case)
    assert [len(output) for output in answer.outputs] == [3, 4]
    alone = call(case_of(reference))
    assert all(torch.equal(a, b) for a, b in zip(answer.outputs, alone.outputs, strict=True))


def test_the_faults_of_the_self_check_are_seen_as_timeouts():
    [fault] = [each for each in FAULTS if each.name == "a-rank-without-tokens-leaves"]
    [result] = catch(fault, Effort(9, 1, 0), 0)
    assert result.status == "timeout"
    assert noticed(result)


def test_names_that_are_no_target_are_refused():
    with pytest.raises(UsageError):
        expand([planted("NoSuchClass")])


def test_a_lost_target_says_which(executor):
    made = executor(planted("KillsItself"))
    session = {"device": "cpu", "world_size": 2, "members": [0, 1], "calls": []}
    case = case_of(made)
    given = {name: case[name] for name in ("ranks", "num_experts", "config", "placement")}
    session["calls"] = [case.planned("expert_parallel", **given)]
    with pytest.raises(TargetLost) as lost:
        made.run(session)
    assert lost.value.kind == "crash"
