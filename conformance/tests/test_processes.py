"""No process of a check outlives it, and none imports torch's parts in the middle of a case."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FIRST_GRADIENT = """
import sys
import moe_conformance.preloaded
import torch
before = set(sys.modules)
x = torch.ones(2, requires_grad=True)
torch.autograd.grad([2 * x], [x], [torch.ones(2)])
torch.set_deterministic_debug_mode("warn")
print(sorted(set(sys.modules) - before))
"""


def test_nothing_is_imported_by_the_first_gradient():
    done = subprocess.run([sys.executable, "-c", FIRST_GRADIENT], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def parents():
    """Every process that runs, with its parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if after_name[0] != "Z":
            found[int(stat.parent.name)] = int(after_name[1])
    return found


def descendants(pid):
    above = parents()
    found = {pid}
    while more := {child for child, parent in above.items() if parent in found} - found:
        found |= more
    return found - {pid}


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc to find the processes"
)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_killed_leaves_nothing_running(how, tmp_path):
    command = [sys.executable, "-m", "moe_conformance", "check", "reference", "--profile", "cpu"]
    command += ["--operation", "align", "--report", str(tmp_path / "report")]
    ended = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # The fork server, whatever it starts, and a worker for each of those that judge.
        fewest = 2 + 2 * min(2, os.cpu_count())
        assert wait_until(lambda: len(descendants(ended.pid)) >= fewest, 60)
        started = descendants(ended.pid)
        ended.send_signal(how)
        ended.wait(30)
        assert wait_until(lambda: not started & parents().keys(), 20), started & parents().keys()
    finally:
        ended.kill()
        ended.wait()
