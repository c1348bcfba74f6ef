"""The examples run as they are, at small sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart() -> None:
    said = run("quickstart.py", "--seq-len", "64")
    assert "4 of 4 attention sites fused" in said and "scale 0.125, causal" in said
    assert "4 of 4 attention sites rewritten" in said


def test_quickstart_with_a_real_encoder() -> None:
    said = run("quickstart.py", "--model", "minilm", "--seq-len", "64", "--train")
    assert "6 of 6 attention sites fused" in said
    assert "gradient" in said


def test_quickstart_says_what_is_wrong() -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--model", "nowhere/to-be-found"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"HF_HUB_OFFLINE": "1", "PATH": ""})
    assert done.returncode == 1
    assert "--model nowhere/to-be-found" in done.stderr and "Traceback" not in done.stderr


def test_third_party() -> None:
    said = run("third_party.py")
    assert said.count("2/2 fused") == 3


def test_finetune(tmp_path: Path) -> None:
    said = run("finetune.py", "--steps", "3", "--seq-len", "64", "--plot", str(tmp_path / "loss.png"))
    assert "4 of 4 attention sites fused" in said and "dropout 0.1" in said
    told = " ".join(said.split())
    rewritten, others = (
        float(re.search(rf"first eager run, the {runs}: at most ([0-9.e-]+)", told)[1])  # type: ignore[index]
        for runs in ("rewritten one", "other eager ones")
    )
    assert 0 < rewritten < 3 * others
    assert (tmp_path / "loss.png").stat().st_size > 10_000
