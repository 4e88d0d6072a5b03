import ast
import inspect
import os
import re
import socket
import subprocess
import sys
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
    "undoing.md",
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


_host = """
import sys
import numpy as np

coordinator_address, num_processes, process_id = sys.argv[1], 2, int(sys.argv[2])
all_batches = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
batches_of_this_host = all_batches[:, 4 * process_id :][:, :4]
weights = np.eye(3, dtype=np.float32)
update = lambda weights, gradient: weights - 0.1 * gradient
{start}
{definitions}
sharded_gradient = jax.jit(sharded_gradient)
{training}
weights = np.asarray(weights.addressable_data(0))
true = jnp.eye(3)
for batch in all_batches:
    true = update(true, jax.grad(loss)(true, batch))
np.testing.assert_allclose(weights, true, rtol=1e-4, atol=1e-5)
print(jax.process_count(), jax.device_count())
"""


@pytest.mark.slow
def test_several_hosts(tmp_path):
    """The page's program, as two processes with two devices each."""
    text = (_docs / "devices.md").read_text()
    (several,) = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
    start, training = several.split("# `jax.device_count()`")
    (example,) = _blocks(text)
    program = tmp_path / "host.py"
    definitions = example[: example.index("print(")]
    program.write_text(
        _host.format(start=start, definitions=definitions, training="#" + training)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu", XLA_FLAGS=flags, PYTHONPATH=str(_root)
    )
    hosts = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(number)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for host in hosts:
        out, err = host.communicate(timeout=300)
        assert host.returncode == 0, err
        assert out.splitlines()[-1] == "2 4"


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
