"""The process that serves the engines of this folder's tests, one after the other."""

import pytest


@pytest.fixture(scope="package")
def rank_host(tmp_path_factory):
    from support.rank_host import RankHost

    with RankHost(tmp_path_factory.mktemp("host")) as host:
        yield host
