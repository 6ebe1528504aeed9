"""`pytest benchmarks/` measures, although the project's other tests run with benchmarks off."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Switch measuring on, unless the command line itself says otherwise."""
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False
