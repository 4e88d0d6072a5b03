import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import diffrax_reversible

from .user import as_a_user


_root = Path(__file__).parents[1]
_docs = _root / "docs"
_block = re.compile(r"^( *)```python\n(.*?)^\1```$", re.M | re.S)
_slow = (
    "bouncing_ball.md",
    "cde.md",
    "cnf.md",
    "devices.md",
    "getting_started.md",
    "index.md",
    "latent_ode.md",
    "sde.md",
    "stiff.md",
    "which_adjoint.md",
)


def _blocks(text):
    return [textwrap.dedent(code) for _, code in _block.findall(text)]


_pages = {
    str(path.relative_to(_root)): blocks
    for path in [_root / "README.md", *sorted(_docs.rglob("*.md"))]
    if len(blocks := _blocks(path.read_text())) > 0
}


def test_has_examples():
    assert "README.md" in _pages and len(_pages) > 10


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.endswith(_slow) else ())
        for page in _pages
    ],
)
def test_examples(page):
    scope = {"__name__": "docs"}
    with as_a_user():
        for number, block in enumerate(_pages[page], 1):
            exec(compile(block, f"{page}, {number}", "exec"), scope)


def test_readme_links_to_files():
    links = re.findall(r"\]\((?!https://)([^)#]+)\)", (_root / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (_root / link).exists()] == []


def test_reference_is_complete():
    pages = "".join(page.read_text() for page in _docs.glob("api/*.md"))
    names = re.findall(r"^::: diffrax_reversible\.(\w+)$", pages, re.M)
    assert sorted(names) == sorted(diffrax_reversible.__all__)


@pytest.mark.parametrize("name", diffrax_reversible.__all__)
def test_docstring_has_an_example(name):
    blocks = _blocks(inspect.getdoc(getattr(diffrax_reversible, name)))
    assert len(blocks) > 0
    for block in blocks:
        ast.parse(block)
