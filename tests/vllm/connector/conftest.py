"""The engine of this folder's tests: vLLM starts once, each file starts the connector anew, on a store of its own."""

import pytest

CHUNK, LAYERS = 128, 4


@pytest.fixture(scope="package")
def llama(tmp_path_factory, _single_process_vllm):
    """An engine whose ``restart`` gives the connector other options and another store."""
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=LAYERS)
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options={}) as engine:
        yield engine
