"""How long a soak is and what it draws: ``CACHEFLOW_SOAK_REQUESTS`` scales it, ``CACHEFLOW_SOAK_SEED`` changes it."""

import os

import pytest

MARKS = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]
NUM_REQUESTS = int(os.environ.get("CACHEFLOW_SOAK_REQUESTS", "300"))
SEED = int(os.environ.get("CACHEFLOW_SOAK_SEED", "0"))
