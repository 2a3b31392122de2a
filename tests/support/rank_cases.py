"""One prefix for several ranks: what an engine of them is asked, as a script, and what its answers are held to."""

from dataclasses import dataclass

import numpy as np

from support.v2_runner import NUM_TOKENS

CHUNK = 256
NUM_CHUNKS = 8
LAYERS = 6
TOKENS = NUM_CHUNKS * CHUNK + 37
MAX_TOKENS = 21 * 128
BYTES_PER_S = 2e7
RESTORE_TIMEOUT_S = 3.0
AUTO, LOAD, SAVE, OFF = ({"cacheflow": mode, "explain": True} for mode in ("auto", "load", "recompute", "off"))


def prompt(seed, count=TOKENS):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def request(seed, params, *, count=TOKENS, num_tokens=NUM_TOKENS):
    return {"tokens": prompt(seed, count), "num_tokens": num_tokens, "params": params}


@dataclass(frozen=True)
class Setting:
    """A model, a folder and the store that all engines share; ``patience_s`` turns a hang into a failure.

    ``host`` is the ``RankHost`` that serves them.
    """

    model: str
    folder: object
    host: object
    patience_s: float

    @property
    def store(self):
        return self.folder / "store"

    def script(self, *, pipeline=1, tensor=1, **changes):
        from support.rank_engine import Ranks, Script

        options = {
            "store_path": str(self.store), "self_test": True,
            "throttle_bytes_per_s": BYTES_PER_S, "throttle_latency_s": 2e-4,
            "restore_timeout_s": RESTORE_TIMEOUT_S, "policy": "cake",
        }  # fmt: skip
        return Script(
            model=self.model, ranks=Ranks(pipeline, tensor), chunk_tokens=CHUNK, max_tokens=MAX_TOKENS,
            num_kv_blocks=40, options={**options, **changes},
        )  # fmt: skip

    def run(self, script, name):
        return self.host.run(script, self.folder / name, patience_s=self.patience_s)


def llama_setting(folder, host, *, patience_s):
    from support.vllm_models import write_model

    return Setting(str(write_model(folder / "model", "llama", num_hidden_layers=LAYERS)), folder, host, patience_s)


def saved(script, seed, **kwargs):
    """Save a prompt; leaves nothing of it in the KV cache."""
    return script.do("ask", requests=[request(seed, SAVE, **kwargs)]).do("settle").do("evict")


def asked(script, label, one):
    """Ask with a KV cache that is full of wrong numbers."""
    return script.do("evict").do("ask", label, requests=[one])


def loaded(script, label, one):
    """Ask where no read is late before the restoration is: a rank that gets no core for a second is no failure."""
    return script.do("evict").do("ask_patiently", label, requests=[one])


def record_of(answers):
    (record,) = answers[0]["params"]["cacheflow"]
    return record


def equal(answers, own):
    """Every bit of the KV cache and every token."""
    assert np.array_equal(answers[0]["kv"], own[0]["kv"])
    assert answers[0]["tokens"] == own[0]["tokens"]


def both_ways(record):
    """A stage's or an engine's cells, some recomputed and some loaded; how many there were."""
    assert record["recomputed_cells"] > 0
    assert record["loaded_cells"] > 0
    return record["recomputed_cells"] + record["loaded_cells"]
