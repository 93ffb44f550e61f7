"""Makes `.venv` with everything the repository's own commands need. `make setup` runs it.

Only the standard library is used, because nothing else is there yet. Run again, it brings an
existing `.venv` up to date and takes nothing out of it.
"""

import json
import subprocess
import sys
import sysconfig
import time
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = ["transformers", "triton", "notebooks", "docs", "dev"]
OLDEST, NEWEST = (3, 11), (3, 13)
LEAST_TORCH = (2, 10)


def installed():
    """What this interpreter already has of what must not be replaced."""
    # Not at the top: interpreters that are too old lack it, and have to get as far as being told.
    import importlib.metadata

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    spec = util.find_spec("torch")
    return {
        "torch": torch if spec else None,
        "torch_at": spec.origin if spec else None,
        "triton": util.find_spec("triton") is not None,
    }


def is_new_enough(torch):
    """Whether that version of torch is one that moespec runs with."""
    if torch is None:
        return False
    major, minor = torch.split(".")[:2]
    return (int(major), int(minor)) >= LEAST_TORCH


def make_venv(keep_base):
    """Make the virtual environment; `keep_base` lets it see this interpreter's packages."""
    in_venv = sys.prefix != sys.base_prefix
    sees_system = not in_venv or "include-system-site-packages = true" in (
        Path(sys.prefix, "pyvenv.cfg").read_text().lower()
    )
    flags = ["--system-site-packages"] if keep_base and sees_system else []
    print("making", VENV, *flags, flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", *flags, str(VENV)])
    if made.returncode:
        sys.exit(
            f"'{sys.executable} -m venv' failed. On Debian and Ubuntu, install python3-venv and "
            "run the same command again."
        )
    if keep_base and in_venv:
        # A venv made from a venv sees the packages of neither, so the way there is written down.
        paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        lines = [f"import site; site.addsitedir({path!r})\n" for path in paths]
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.check_output([str(PYTHON), "-c", query], text=True).strip()
        Path(own, "moespec_base.pth").write_text("".join(lines))


def pip(*arguments):
    """Run the environment's own pip."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    print("+ pip install", *arguments, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("pip could not install that (its message is above); run the same command again.")


def main():
    """Make or update `.venv`."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"moespec needs Python 3.11, 3.12 or 3.13, and '{sys.executable}' is {version}: "
            "name another one, as in: make setup PYTHON=python3.11"
        )
    start = time.monotonic()
    if not (VENV / "bin" / "pip").exists():
        make_venv(keep_base=is_new_enough(installed()["torch"]))

    probe = [str(PYTHON), str(Path(__file__).resolve()), "--installed"]
    have = json.loads(subprocess.check_output(probe, text=True))
    constraints = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    extras = list(EXTRAS)
    if is_new_enough(have["torch"]) and not have["torch_at"].startswith(str(VENV)):
        # Pins must not replace a torch that came with the machine, nor the Triton built for it.
        print(f"keeping torch {have['torch']} of {Path(have['torch_at']).parent}", flush=True)
        kept = ("torch==", "triton==") if have["triton"] else ("torch==",)
        constraints = [line for line in constraints if not line.startswith(kept)]
        if have["triton"]:
            extras.remove("triton")
    else:
        # First and alone: any other requirement that names torch would fetch the newest build.
        pinned = next(line.strip() for line in constraints if line.startswith("torch=="))
        pip(pinned)
    used = VENV / "constraints.txt"
    used.write_text("".join(constraints))
    # The build backend goes in too, so that an unchanged environment is reinstalled offline.
    pip("-c", str(used), "hatchling", "editables")
    project = f".[{','.join(extras)}]"
    pip("-c", str(used), "--no-build-isolation", "--editable", project)
    print(f"set up in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--installed"]:
        print(json.dumps(installed()))
    else:
        main()
