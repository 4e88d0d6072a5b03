import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


_root = Path(__file__).parents[1]
_package = sorted(_root.glob("diffrax_reversible/**/*.py"))
_tests = sorted(_root.glob("tests/**/*.py"))


def _run(*command, cwd):
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _run(
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)),
        str(_root),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "diffrax_reversible/py.typed" in names
    assert "diffrax_reversible/_examples/lynx_hare.csv" in names
    assert {str(file.relative_to(_root)) for file in _package} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_wheel_installed(wheel, tmp_path):
    _run(
        *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-index", "--no-deps", "--target", str(tmp_path), str(wheel)),
        cwd=tmp_path,
    )
    program = (
        "import diffrax_reversible as package\n"
        "from diffrax_reversible._examples.data import load_pelts\n"
        "print(package.__file__)\n"
        "print(load_pelts().counts.shape)"
    )
    location, shape = _run("-c", program, cwd=tmp_path).splitlines()
    assert Path(location).parent.samefile(tmp_path / "diffrax_reversible")
    assert shape == "(21, 2)"


def test_private_imports():
    # Names that other packages may change without notice stay in one file.
    private = re.compile(
        r"^\s*(from|import)\s+equinox\.internal\b"
        r"|^\s*(from|import)\s+(diffrax|equinox|jax|lineax|optimistix)(\.\w+)*\._"
        r"|^\s*from\s+equinox\s+import\s.*\binternal\b",
        re.M,
    )
    assert private.search("    from jax._src.core import Primitive")
    assert private.search("import equinox.internal as eqxi")
    assert not private.search("from diffrax_reversible._solver import base")
    # This file has examples of what it forbids.
    files = set(_package + _tests) - {Path(__file__)}
    found = [file for file in files if private.search(file.read_text())]
    assert found == [_root / "diffrax_reversible" / "_compat.py"]


def test_import_without_private_names(tmp_path):
    """What other packages do not promise costs the feature that needs it, not the
    import."""
    program = (
        "import diffrax\n"
        "import jax._src.config as config, jax._src.traceback_util as traceback_util\n"
        "del config._check_vma, config.device_context\n"
        "del traceback_util.register_exclusion\n"
        "import diffrax_reversible"
    )
    _run("-c", program, cwd=tmp_path)


def test_no_postponed_annotations():
    # They would keep jaxtyping from checking shapes and types at run time.
    forbidden = "from __future__ import " + "annotations"
    files = _package + _tests
    assert [file for file in files if forbidden in file.read_text()] == []


def test_versions_agree():
    version = tomllib.loads((_root / "pyproject.toml").read_text())["project"][
        "version"
    ]
    assert f"\nversion: {version}\n" in (_root / "CITATION.cff").read_text()
    assert f"\n## [{version}] - " in (_root / "CHANGELOG.md").read_text()
