"""The newest versions of everything: `python -m tests.newest` installs them and says what breaks.

It makes an environment in `build/newest` (several GB), without any constraint, prints what is in it and how that
differs from what CI pins, and runs the tests there. Its exit status is theirs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = ROOT / "build" / "newest"
WITHOUT_DEPENDENCIES = ("open_clip_torch", "timm", "vit-pytorch")  # they would install torchvision


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.newest", description=__doc__)
    parser.add_argument("--pre", action="store_true", help="pre-releases, too")
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="arguments for pytest (-q -n 2)")
    options = parser.parse_args()
    venv.create(HERE, with_pip=True, clear=True)
    python = str(HERE / ("Scripts" if os.name == "nt" else "bin") / "python")
    install = [python, "-m", "pip", "install", "-q", "--upgrade", *(["--pre"] if options.pre else [])]
    # No constraint of this machine's configuration, either.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    subprocess.run([*install, "-e", f"{ROOT}[test,libraries]"], check=True, env=environment)
    subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES], check=True, env=environment)
    frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    newest = dict(line.split("==") for line in frozen.splitlines() if "==" in line)
    pinned = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    for name, version in (line.split("==") for line in pinned if "==" in line):
        print(f"{name}: CI has {version}, the newest is {newest.get(name, 'not installed')}", flush=True)
    return subprocess.run([python, "-m", "pytest", *(options.tests or ["-q", "-n", "2"])], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
