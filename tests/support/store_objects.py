"""Keys, payloads and blocking puts and gets for the tests of stores."""

import numpy as np

from cacheflow.stores.base import GetRequest, PutRequest
from cacheflow.stores.keys import Namespace, ObjectKey, ObjectKind

NAMESPACE = Namespace(weights_fingerprint="fake weights", dtype="bfloat16", chunk_tokens=4)
TIMEOUT_S = 20.0  # for what should take milliseconds: a hang fails, a slow machine does not


def key(number, *, layer=0, namespace=NAMESPACE):
    return ObjectKey(
        namespace=namespace.digest,
        chain_hash=f"{number:064x}",
        kind=ObjectKind.KV,
        layer_lo=layer,
        layer_hi=layer + 1,
    )


def payload(number, num_bytes=1000):
    return np.random.default_rng(number).integers(0, 256, num_bytes, dtype=np.uint8)


def put_request(number, data=None, *, replace=False):
    data = payload(number) if data is None else data
    return PutRequest(key(number), [data], data.shape, str(data.dtype), replace=replace)


def put(store, *numbers, num_bytes=1000):
    requests = [put_request(number, payload(number, num_bytes)) for number in numbers]
    return store.submit_put(requests).wait(TIMEOUT_S)


def get(store, number, num_bytes=1000, **options):
    """Outcome and buffer of one read."""
    buffer = np.zeros(num_bytes, np.uint8)
    (outcome,) = store.submit_get([GetRequest(key(number), buffer)], **options).wait(TIMEOUT_S)
    return outcome, buffer
