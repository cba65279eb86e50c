"""What the documentation names exists: files, links, modules, commands and configuration groups."""

import ast
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from nxtp.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("experiments/**/*.md"),
    ]
)
FOLDERS = "nxtp|conf|tests|docs|experiments|data"
# what a command of the reader creates
WRITTEN = re.compile(r"^data/(shards|raw|features)|NAME|/mine|mine\.|birds")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page):
    text = page.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not (page.parent / target).exists():
            missing.append(f"link {target}")
    for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)", text):
        if not (WRITTEN.search(path) or any((base / path).exists() for base in (ROOT, ROOT / "nxtp"))):
            missing.append(f"file {path}")
    for module in re.findall(r"(?<![\w./-])(nxtp(?:\.[a-z0-9_]+)+)", text):
        if not known_module(module):
            missing.append(f"module {module}")
    for command in re.findall(r"(?:^ *|`)nxtp ([a-z]+)", text, re.M):
        if command not in COMMANDS:
            missing.append(f"command nxtp {command}")
    assert not missing


def known_module(name: str) -> bool:
    """A module, or a name in one."""
    while name.count(".") > 0:
        try:
            if find_spec(name) is not None:
                return True
        except ModuleNotFoundError:
            pass
        name, _, last = name.rpartition(".")
        if name != "nxtp" and (spec := find_spec(name)) is not None and spec.origin:
            return re.search(rf"\b{last}\b", Path(spec.origin).read_text()) is not None
    return False


def test_troubleshooting_quotes_messages_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [row for row in re.findall(r"^\| (`.*?) \| .* \|$", text, re.M) if not re.search(r"\(of \w+\)", row)]
    quotes = [quote for row in rows for quote in re.findall("`([^`]+)`", row)]
    assert len(quotes) > 80
    messages = "\n".join(
        spoken(node)
        for path in [*ROOT.glob("nxtp/**/*.py"), *ROOT.glob("data/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    )
    assert not [quote for quote in quotes if quote not in messages]


def spoken(node: ast.expr) -> str:
    """A string, with … for what an f-string inserts."""
    if isinstance(node, ast.JoinedStr):
        return "".join(spoken(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_the_site_builds_without_network_and_without_a_broken_link(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    file = ROOT / "mkdocs.yml"
    _, mkdocstrings = yaml.safe_load(file.read_text())["plugins"]  # no index for a search; and signatures as they are
    mkdocstrings["mkdocstrings"]["handlers"]["python"]["options"]["line_length"] = 1000
    build(load_config(str(file), site_dir=str(tmp_path), plugins=[mkdocstrings]))  # strict: a warning is an error
    page = (tmp_path / "reference/inference/index.html").read_text()
    assert "nxtp.inference.recognizer.Recognizer.predict" in page
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page)
