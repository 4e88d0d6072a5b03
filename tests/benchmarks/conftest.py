from importlib import metadata

import jax


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the times depend on. Our own version is in pytest-benchmark's `commit_info`."""
    del config
    machine_info["devices"] = {
        "kind": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "number": jax.device_count(),
    }
    packages = ("jax", "jaxlib", "diffrax", "equinox")
    machine_info["versions"] = {name: metadata.version(name) for name in packages}
