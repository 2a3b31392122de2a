"""torch is imported inside fixtures and tests, so that collecting these files does not need it."""

import pytest


@pytest.fixture(autouse=True)
def torch_threads(request):
    """Tiny models are fastest on one thread; yields the number torch would use by itself."""
    if request.node.get_closest_marker("torch") is None:
        yield None
        return
    from support.embedded_cases import one_torch_thread

    with one_torch_thread() as usual:
        yield usual


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from support.embedded_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")
