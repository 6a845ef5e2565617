"""The core runs where there is no webui, and its import asks for neither diffusers nor the miniature."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKED = ("modules", "gradio", "fastapi", "diffusers", "transformers", "yaml", "miniature")
PROGRAM = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked in this test")

sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    __import__(name)
assert not set(sys.modules) & set({BLOCKED!r})
"""


def core_modules() -> list[str]:
    """Every module of the package except those that belong to the webui."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "loraclr").rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if "webui" not in name and not name.endswith("hosts.a1111"))


def test_the_core_imports_without_a_webui_and_without_diffusers() -> None:
    names = core_modules()
    assert {"loraclr", "loraclr.merging", "loraclr.hosts.standalone", "loraclr.report", "loraclr.cli.demo"} <= set(
        names
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_asks_for_nothing_either() -> None:
    program = PROGRAM + "from loraclr.__main__ import main; main(['merge', '--help'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--lora FILE" in done.stdout


def test_the_tab_knows_the_webui_in_three_files_only() -> None:
    """So that all of the rest runs in a page of its own."""
    pattern = re.compile(r"^\s*(from|import) (modules|networks)\b", re.MULTILINE)
    files = (ROOT / "loraclr" / "webui").rglob("*.py")
    assert {file.name for file in files if pattern.search(file.read_text("utf-8"))} == {
        "callbacks.py", "inside.py", "options.py",
    }  # fmt: skip


def test_imports_go_one_way_in_the_order_that_contributing_tells() -> None:
    table = re.findall(r"^\| (`loraclr/[^|]+)\|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    rows = [[_part(name) for name in re.findall(r"`([^`]+)`", row)] for row in table]
    place = {part: number for number, row in reversed(list(enumerate(rows))) for part in row}
    package = ROOT / "loraclr"
    parts = {_part(str(path.relative_to(package))) for path in package.rglob("*.py")} - {"__init__"}
    assert parts <= place.keys(), "a file that CONTRIBUTING.md does not place"
    back = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in package.rglob("*.py")
        if (part := _part(str(path.relative_to(package)))) != "__init__"
        for other in imported(path) & parts
        if place[other] > place[part]
    ]
    assert not back


def imported(path: Path) -> set[str]:
    """The files and folders of the package that a file imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "loraclr":
            whole = [node.module] if "." in node.module else [f"loraclr.{alias.name}" for alias in node.names]
            names |= {name.split(".")[1] for name in whole}
    return names


def _part(path: str) -> str:
    return path.removeprefix("loraclr/").partition("/")[0].removesuffix(".py")
