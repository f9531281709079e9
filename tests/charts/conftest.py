import pytest

from tests.support.charts import Files, helms, make_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(params=helms() or ["none"], scope="session", ids=lambda path: path.rpartition("/")[2])
def helm(request: pytest.FixtureRequest) -> str:
    """Each Helm that is there."""
    return str(request.param)
