"""What is packed: a wheel has the package and its data, a source distribution all that git knows.

`.ci/run` installs both into an environment of their own, and runs `tests/installed.py` there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import attn_rewriter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names of the files in a wheel and in a source distribution."""
    folder = tmp_path_factory.mktemp("packed")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(source) as tarred:
        inside = {name.partition("/")[2] for name in tarred.getnames()}
        return set(zipped.namelist()), inside


def tracked(*folders: str) -> set[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    listed = subprocess.run([git, "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def test_the_wheel(packed: tuple[set[str], set[str]]) -> None:
    expected = tracked("attn_rewriter") - {"attn_rewriter/patterns"}
    expected |= {f"attn_rewriter/{name}" for name in tracked("patterns")}
    information = {name for name in packed[0] if name.split("/")[0].endswith(".dist-info")}
    assert packed[0] - information == expected
    assert any(name.endswith("/licenses/LICENSE") for name in information)


def test_the_source_distribution(packed: tuple[set[str], set[str]]) -> None:
    assert tracked() - {"attn_rewriter/patterns"} <= packed[1]


def test_the_version_is_in_the_changes() -> None:
    assert f"\n## {attn_rewriter.__version__}" in (ROOT / "attn_rewriter" / "CHANGELOG.md").read_text()
