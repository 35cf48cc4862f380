"""What an installation brings: the package with its data, and nothing importable beside it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]


def test_an_editable_install_leaves_nothing_beside_the_package(settings: dict[str, Any]) -> None:
    """Force-included data made a second sd_erase without code in site-packages; a path to the checkout makes `tests` importable."""
    assert settings["wheel"]["dev-mode-exact"] is True
    assert "force-include" not in settings["wheel"]


def test_the_wheel_takes_the_data_from_the_checkouts_top(settings: dict[str, Any]) -> None:
    from sd_erase.resources import SUFFIXES

    sources = settings["wheel"]["sources"]
    assert sources == {kind: f"sd_erase/_data/{kind}" for kind in ("prompts", "detectors")}
    for kind in sources:
        assert kind in settings["wheel"]["only-include"] and f"/{kind}" in settings["sdist"]["include"]
        assert any(path.suffix in SUFFIXES[kind] for path in (ROOT / kind).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False])
def test_an_installation_imports_sd_erase_alone(tmp_path: Path, editable: bool) -> None:
    """Needs a package index for the build's own tools."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "editables"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *(["-e"] if editable else []), ROOT], check=True)
    code = (
        "import importlib.util as u, sd_erase.resources as r; "
        "print(*(u.find_spec(name) is None for name in ('_data', 'prompts', 'detectors', 'tests', 'docs', 'outputs'))); "
        "print(r.names('prompts')[0], r.names('detectors')[0], len(__import__('sd_erase').__path__))"
    )
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True"] * 6 + ["apple", "pocket", "1"]
    if editable:
        assert not (next((tmp_path / "venv" / "lib").iterdir()) / "site-packages" / "sd_erase").exists()


@pytest.mark.slow
def test_the_wheel_holds_the_package_whole(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "-w", "-o", tmp_path, ROOT], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    own = {path for path in (ROOT / "sd_erase").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in own} <= names
    assert {"sd_erase/_data/prompts/apple.txt", "sd_erase/_data/detectors/pocket.yaml"} <= names
