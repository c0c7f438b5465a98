"""The package as it is installed: the wheel holds every record, and the base needs no CuPy, matplotlib or MPI."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from gpu_bp import registry

LIST_RECORDS = """
import json, sys, gpu_bp, gpu_bp.cli
from gpu_bp import ranks, registry
ranks.join({})
tables = (registry.ACTIVATIONS, registry.LOSSES, registry.UPDATES)
loaded = [name for name in ("cupy", "matplotlib", "mpi4py") if name in sys.modules]
print(json.dumps([gpu_bp.__file__, [sorted(table) for table in tables], loaded]))
"""


@pytest.mark.slow
def test_the_wheel_holds_every_record(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools would find what an earlier build left beside the original
    for folder in ("gpu_bp", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sources = {f"gpu_bp/kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
        sources |= {str(path.relative_to(ROOT)): path for path in (ROOT / "gpu_bp").rglob("*.py")}
        for name, path in sources.items():
            assert archive.read(name) == path.read_bytes(), name
        assert "gpu_bp/py.typed" in names
        assert not [name for name in names if not name.startswith(("gpu_bp/", "gpu_bp-"))]
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", LIST_RECORDS], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    place, records, _ = json.loads(done.stdout)
    assert Path(place).is_relative_to(tmp_path / "site")
    assert records == [sorted(table) for table in (registry.ACTIVATIONS, registry.LOSSES, registry.UPDATES)]


def test_imports_are_light() -> None:
    """Neither CuPy nor matplotlib nor mpi4py is imported before it is used."""
    done = subprocess.run([sys.executable, "-c", LIST_RECORDS], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[2] == []


def test_every_package_is_listed() -> None:
    """setuptools is given an explicit list; a new folder must not be forgotten in it."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "gpu_bp").rglob("__init__.py")}
    assert listed == found | {"gpu_bp.kernels"}


def test_who_imports_what() -> None:
    """kernels/ never imports CuPy; one module does; two NVIDIA's bindings, one mpi4py, one kernels; none unpickles."""
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "gpu_bp").rglob("*.py")]:
        text = path.read_text()
        if path.name != "cuda_launch.py":
            assert not re.search(r"^\s*(import|from) cupy", text, re.M), path
        if path.name != "mpi.py":
            assert not re.search(r"^\s*(import|from) mpi4py", text, re.M), path
        if path.name not in ("cublas.py", "cublaslt.py"):
            assert not re.search(r"^\s*(import|from) nvmath", text, re.M), path
        if path.parent.name != "kernels" and path.name != "registry.py":
            assert not re.search(r"^\s*(import|from) gpu_bp\.kernels", text, re.M), path
        assert not re.search(r"allow_pickle=True|import pickle|\beval\(|\bexec\(", text), path
