import json

from .draw import main


def _row(problem, steps, adjoint, **others):
    return {
        "problem": problem,
        "solver": "ReversibleALF2",
        "adjoint": adjoint,
        "vmapped": False,
        "num_steps": steps,
        "gradient_seconds": 1e-5 * steps,
        "forward_seconds": 4e-6 * steps,
        "compile_seconds": 1.5,
        "temp_bytes": 4096,
        "gradient_error": 10 / steps**2,
        "evaluations": 4 * steps,
        "vjps": 2 * steps,
        "ratio": 1.25,
    } | others


def test_draw(tmp_path, capsys):
    """Also what a backend does not tell, and steps of vmapped elements' own."""
    ours, theirs = "ReversibleAdjoint", "RecursiveCheckpointAdjoint"
    rows = [
        *(_row("small", steps, x) for steps in (100, 1000) for x in (ours, theirs)),
        _row("small", 1000, f"{theirs}(8)"),
        _row("mlp", 100, ours, temp_bytes=None),
        _row("mlp", 12, "BacksolveAdjoint", vmapped=True, evaluations=None),
    ]
    results = tmp_path / "results.json"
    benchmarks = [{"extra_info": row} for row in rows]
    results.write_text(json.dumps({"benchmarks": benchmarks}))
    folder = tmp_path / "new" / "folder"
    main([str(results), "--output", str(folder)])

    lines = capsys.readouterr().out.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    header, *cells = table
    found = [dict(zip(header, row, strict=True)) for row in cells]
    assert len(found) == len(rows)
    # One problem after the other, and the vmapped cases last.
    assert found[0]["temp memory"] == "n/a"
    assert found[1]["steps"] == "PID, 12"
    assert found[1]["evaluations"] == "n/a"
    assert found[2]["gradient"] == "1 ms"
    assert found[4]["gradient"] == "10 ms"
    assert found[4]["temp memory"] == "4.1 kB"
    assert found[4]["evaluations"] == "4,000"
    assert {path.name for path in folder.iterdir()} == {
        "small_steps.png",
        "small_accuracy.png",
        "mlp_accuracy.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
