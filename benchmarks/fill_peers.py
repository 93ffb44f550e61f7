"""Fetch the peers that `gpu.py` looks for into the git-ignored folder `.peers/`.

    python benchmarks/fill_peers.py [NAME ...] [--from scattermoe=FOLDER]

Run it where there is a network; `.peers/` is then copied to the GPU box beside the checkout. Every
peer is taken in one version, the one that its adapter in `peers.py` was written for. Wheels are
unpacked, and of a repository the named folder or functions are kept.

| name | licence | from | what is kept |
|---|---|---|---|
| liger | BSD-2-Clause | PyPI | the wheel |
| moe-ops | MIT | PyPI | the wheel |
| sonicmoe | Apache-2.0 | PyPI | the wheel; it needs nvidia-cutlass-dsl and quack-kernels as well |
| scattermoe | Apache-2.0 | GitHub | the package |
| vllm | Apache-2.0 | GitHub | one kernel of `fused_moe.py`, and tiles tuned for the H200 |
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".peers"
WHEELS = {
    "liger": "liger-kernel==0.8.5",
    "moe-ops": "moe-ops==0.1.0",
    "sonicmoe": "sonic-moe==0.1.2.post1",
}
REPOSITORIES = {
    "scattermoe": (
        "https://github.com/shawntan/scattermoe",
        "47b5e1502e5a10e82c8e5945d761b877849871e7",
        "scattermoe",
    ),
    "vllm": (
        "https://github.com/vllm-project/vllm",
        "v0.9.1",
        "vllm/model_executor/layers/fused_moe",
    ),
}
VLLM_FUNCTIONS = ("write_zeros_to_output", "fused_moe_kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*WHEELS, *REPOSITORIES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--from", dest="sources", action="append", default=[],
                        metavar="NAME=URL", help="another address of a repository")  # fmt: skip
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"expected names of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    sources = dict(each.split("=", 1) for each in options.sources)
    FOLDER.mkdir(exist_ok=True)
    missing = {}
    for name in options.names or names:
        try:
            if name in WHEELS:
                unpack(WHEELS[name])
            else:
                address, commit, folder = REPOSITORIES[name]
                take(name, sources.get(name, address), commit, folder)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {missing.get(name, 'there')}")
    return 1 if missing else 0


def unpack(requirement: str) -> None:
    """Unpack a wheel of pure Python, without what it requires."""
    with tempfile.TemporaryDirectory() as made:
        # For the Python of a GPU box, which may be newer than this one.
        command = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
        subprocess.run([sys.executable, "-m", "pip", *command, "-d", made, requirement], check=True)
        [wheel] = Path(made).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(FOLDER)


def take(name: str, address: str, commit: str, folder: str) -> None:
    """Fetch one commit of a repository and keep what the peer needs."""
    with tempfile.TemporaryDirectory() as made:
        git = ["git", "-C", made]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run(
            [*git, "fetch", "-q", "--depth", "1", "--filter=blob:none", address, commit], check=True
        )
        subprocess.run([*git, "checkout", "-q", "FETCH_HEAD", "--", folder], check=True)
        found = Path(made) / folder
        if name == "vllm":
            take_vllm(found)
        else:
            shutil.copytree(found, FOLDER / name, dirs_exist_ok=True)


def take_vllm(folder: Path) -> None:
    """The kernel without the imports that only an installed vLLM has, and the tuned tiles."""
    source = (folder / "fused_moe.py").read_text()
    (FOLDER / "vllm_fused_moe.py").write_text(cut(source, VLLM_FUNCTIONS))
    tuned = FOLDER / "vllm_configs"
    tuned.mkdir(exist_ok=True)
    for path in (folder / "configs").glob("*device_name=NVIDIA_H200.json"):
        shutil.copy(path, tuned)


def cut(source: str, names: tuple[str, ...]) -> str:
    """These functions with their decorators, as a module that needs Triton alone.

    Raises:
        ValueError: one of them is not there.
    """
    parts = ["import triton\nimport triton.language as tl\n"]
    there = {node.name: node for node in ast.parse(source).body
             if isinstance(node, ast.FunctionDef)}  # fmt: skip
    lines = source.splitlines()
    for name in names:
        if name not in there:
            raise ValueError(f"expected a function {name} in fused_moe.py, found none")
        first = min(each.lineno for each in (there[name], *there[name].decorator_list))
        parts.append("\n".join(lines[first - 1 : there[name].end_lineno]) + "\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
