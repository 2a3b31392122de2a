"""Digests of any torch module."""

import pytest
import torch

from cacheflow.tensors.fingerprint import kernel_identity, weights_fingerprint

pytestmark = pytest.mark.torch

CONFIG = {"rope_theta": 1e4, "_name_or_path": "here", "transformers_version": "5"}


def new_module(seed=0, rows=700):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(1024, rows), torch.nn.Embedding(4, 8))


@pytest.mark.parametrize("full", [True, False])
def test_weights_and_configuration_count_and_names_of_folders_do_not(full):
    own = weights_fingerprint(new_module(), CONFIG, full=full)
    assert (
        weights_fingerprint(new_module(), {**CONFIG, "_name_or_path": "x", "transformers_version": "6"}, full=full)
        == own
    )
    others = [
        weights_fingerprint(new_module(seed=1), CONFIG, full=full),
        weights_fingerprint(new_module(rows=701), CONFIG, full=full),
        weights_fingerprint(new_module().bfloat16(), CONFIG, full=full),
        weights_fingerprint(new_module(), {**CONFIG, "rope_theta": 2e4}, full=full),
    ]
    assert len({own, *others}) == 5


def test_sampled_and_full_are_told_apart():
    assert weights_fingerprint(new_module(), CONFIG, full=True) != weights_fingerprint(new_module(), CONFIG, full=False)


def test_samples_reach_both_ends_of_a_weight():
    """1024 x 700 float32 is more than what is sampled of it."""
    for row in (0, -1):
        module = new_module()
        before = weights_fingerprint(module, CONFIG, full=False)
        with torch.no_grad():
            module[0].weight[row] += 1.0
        assert weights_fingerprint(module, CONFIG, full=False) != before


def test_a_parameter_that_was_emptied_is_no_error():
    module = new_module()
    module[0].weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    assert weights_fingerprint(module, CONFIG) != weights_fingerprint(new_module(), CONFIG)


def test_the_library_whose_code_runs_is_named():
    identity = dict(kernel_identity(torch.device("cpu"), library="torch"))
    assert identity["torch"] == torch.__version__
    assert identity["device"].startswith("cpu:")
