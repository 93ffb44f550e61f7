"""The recipe for several hosts, run by two agents of torchrun."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
RECIPE = "on_two_hosts.sh"
LINE = re.compile(
    r"rank (\d) of 4 on host (\d), gloo: (\d+) tokens, (\d) experts from (\d) on, (\d+) of (\d+) "
    r"rows leave the host; the same as one rank"
)

# Everything below `unshare` has users, networks and process ids of its own: it needs no rights,
# and when it ends nothing of it is left.
OWN = ("--user", "--map-root-user", "--net", "--mount", "--mount-proc", "--pid", "--fork")
APART = ["unshare", *OWN, "--kill-child"]
NAMESPACES = """
set -e
ip link set lo up
unshare --net sleep 300 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
inside() { nsenter --target $other --net "$@"; }
ip link add host0 type veth peer name host1
ip link set host1 netns $other
ip addr add 10.77.0.1/24 dev host0
ip link set host0 up
inside ip addr add 10.77.0.2/24 dev host1
inside ip link set host1 up
inside ip link set lo up
"""
TWO_HOSTS = """
inside sh $RECIPE 10.77.0.1 10.77.0.2 host1 &
second=$!
sh $RECIPE 10.77.0.1 10.77.0.1 host0
wait $second
"""
# Where namespaces are not permitted, two loopback addresses of one machine have to do.
TWO_ADDRESSES = """
sh $RECIPE 127.0.0.1 127.0.0.2 lo &
second=$!
sh $RECIPE 127.0.0.1 127.0.0.1 lo
wait $second
"""


def namespaces_are_permitted():
    needed = ("unshare", "nsenter", "ip")
    if sys.platform != "linux" or not all(map(shutil.which, needed)):
        return False
    tried = subprocess.run([*APART, "sh", "-c", NAMESPACES], capture_output=True, timeout=60)
    return tried.returncode == 0


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def of_this_test(mark):
    """Ids of the processes with that mark in their environment, zombies not counted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and several loopback addresses")
def test_the_recipe_for_two_hosts_computes_what_one_rank_computes():
    mark = f"MOESPEC_HOSTS_TEST={os.getpid()}-{time.monotonic_ns()}"
    name, value = mark.split("=")
    env = {
        **os.environ,
        name: value,
        "RECIPE": RECIPE,
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if namespaces_are_permitted():
        command = [*APART, "sh", "-c", NAMESPACES + TWO_HOSTS]
    else:
        command = ["sh", "-c", TWO_ADDRESSES]
    job = subprocess.Popen(
        command, cwd=EXAMPLES, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, errors = job.communicate(timeout=240)
        assert job.returncode == 0, errors
        deadline = time.monotonic() + 10
        while of_this_test(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert of_this_test(mark) == []
    finally:
        for pid in of_this_test(mark):
            os.kill(pid, signal.SIGKILL)
    ranks = {int(found[1]): [int(each) for each in found.groups()[1:]]
             for found in LINE.finditer(said)}  # fmt: skip
    assert sorted(ranks) == [0, 1, 2, 3], said + errors
    hosts, tokens, count, start, leaving, rows = zip(*(ranks[r] for r in range(4)), strict=True)
    # Ranks of one host come one after the other, whichever agent was there first.
    assert hosts in [(0, 0, 1, 1), (1, 1, 0, 0)]
    assert (tokens, rows) == ((20, 27, 34, 41), (40, 54, 68, 82))
    assert (count, start) == ((3, 3, 2, 2), (0, 3, 6, 8))
    assert all(0 < out < all_ for out, all_ in zip(leaving, rows, strict=True))
