import re
import sys

import pytest

from diffrax_reversible.__main__ import main
from diffrax_reversible._examples import long_solve

from .user import as_a_user


def _loss(out, when):
    found = re.search(rf"loss {when} training: +([0-9.]+)$", out, re.M)
    assert found is not None
    return float(found[1])


def test_main(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "new" / "folder"
    monkeypatch.setattr(long_solve, "counts", (1_000,))
    with as_a_user():
        main(["--steps", "30", "--output", str(folder)])
    out, err = capsys.readouterr()

    assert _loss(out, "after") < 0.5 * _loss(out, "before")
    assert "30/30" in err  # the progress bar

    assert "3/3" in err and "1,000 steps" in out
    rows = dict(re.findall(r"^(\S+, .*?)  +(\S.*)$", out, re.M))
    assert "(reference)" in rows["Tsit5, diffrax's default"]
    for name in ("ReversibleALF4, ReversibleAdjoint", "Tsit5, SymplecticAdjoint"):
        assert re.search(r"\d m?s +([\d.]+ [KM]iB|not available) ", rows[name])
        assert float(rows[name].split()[-1]) < 1e-9

    picture = folder / "lynx_hare.png"
    assert f"Picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("steps", ("0", "-3", "2.5", "many", ""))
def test_bad_steps(steps, tmp_path, capsys):
    err = _refused(capsys, f"--steps={steps}", "--output", str(tmp_path))
    assert f"argument --steps: {steps!r} is not a positive integer" in err


def test_output_is_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    err = _refused(capsys, "--output", str(file))
    assert f"argument --output: '{file}' is a file, not a folder" in err


def test_output_below_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    err = _refused(capsys, "--output", str(file / "folder"))
    assert f"argument --output: cannot make '{file / 'folder'}'" in err


@pytest.mark.parametrize("name", ("matplotlib", "optax", "tqdm"))
def test_missing_extra(name, tmp_path, capsys, monkeypatch):
    for module in list(sys.modules):
        if module.startswith(("diffrax_reversible._examples", f"{name}.")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        main(["--steps", "1", "--output", str(tmp_path)])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert name in err and 'pip install "diffrax_reversible[examples]"' in err
