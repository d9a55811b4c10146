import pytest
from hosts import Hosts, why_not


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Three of them."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3, [tmp_path_factory.getbasetemp()]) as hosts:
        yield hosts
