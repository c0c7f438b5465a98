"""README and docs are true: their commands run, their links lead somewhere, and no key or name is left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, bike_sharing

from gpu_bp import Config, parse_config, registry
from gpu_bp.metrics import METRICS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a unit test cannot run: set-up and the test suite itself are run by .ci/run; Docker and a GPU are not here.
ELSEWHERE = re.compile(r"^(make |docker |python3 -m venv|\.venv/bin/pip |\.venv/bin/pytest |\.venv/bin/pre-commit )")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if not ELSEWHERE.match(line)]


def files(page: Path) -> dict[str, str]:
    """The files that a page has one write: the blocks that begin with `# name.py` make up that file."""
    texts: dict[str, str] = {}
    for block in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            texts[name[1]] = texts.get(name[1], "") + block
    return texts


@pytest.fixture
def like_a_clone(in_tmp: Path) -> Path:
    """A working folder with the configs and scripts of the repository."""
    for name in ("configs", "deploy"):
        shutil.copytree(ROOT / name, in_tmp / name)
    return in_tmp


@pytest.fixture
def with_files(page: Path, like_a_clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same with the files of a page, which are imported from there and forgotten afterwards."""
    for name, text in files(page).items():
        (like_a_clone / name).write_text(text)
    monkeypatch.syspath_prepend(like_a_clone)
    yield like_a_clone
    for name in files(page):
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands(page: Path, like_a_clone: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(page):
        if "bike-sharing" in command:
            (like_a_clone / "data/bike-sharing").mkdir(parents=True)
            shutil.copy(bike_sharing(), like_a_clone / "data/bike-sharing/hour.csv")
        command = command.replace(".venv/bin/", f"{binaries}/")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("with_files")
def test_python_blocks(page: Path) -> None:
    for block in blocks(page, "python"):
        if any(block in text for text in files(page).values()):
            continue
        for peer in re.findall(r"^(?:import|from) (sklearn|torch)\b", block, re.M):
            pytest.importorskip(peer, reason="a page on exchange with it")
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("with_files")
def test_toml_blocks(page: Path) -> None:
    for block in blocks(page, "toml"):
        parse_config(tomllib.loads(block))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_targets_exist() -> None:
    """Every `make ...` in the pages is a target, and every page is named in the README."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for pair in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", page.read_text(), re.M):
            assert "".join(pair) in targets, pair
        assert page.name == "README.md" or f"docs/{page.name}" in PAGES[0].read_text()


def test_config_page_names_every_key_and_record() -> None:
    page = (ROOT / "docs/config.md").read_text()
    keys: set[str] = set()

    def collect(schema: Any) -> None:
        if isinstance(schema, dict):
            keys.update(schema.get("properties", {}))
            for value in schema.values():
                collect(value)

    collect(Config.model_json_schema())
    names = {*keys, *registry.ACTIVATIONS, *registry.LOSSES, *registry.UPDATES, *METRICS}
    written = {
        *re.findall(r"`\"?([\w-]+)\"?`", page),
        *re.findall(r"[`.](\w+)`", page),
        *re.findall(r"\w+", headings(page)),
    }
    assert not names - written


def headings(page: str) -> str:
    return " ".join(re.findall(r"^#+ (.*)", page, re.M))
