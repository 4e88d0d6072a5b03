"""The parts of the main job, `python -m diffrax_reversible`."""
