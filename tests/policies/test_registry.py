import pytest

from cacheflow.errors import ConfigError, UnknownPolicyError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

NAMES = ["recompute", "load", "layerwise_load", "cake", "cacheflow_v1", "cacheflow_v2", "cacheflow"]


def test_policies_are_listed_rivals_first():
    assert list(RESTORE_POLICIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_made_by_its_name(name):
    assert make_policy(name, crossover_tokens=4096).name == name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownPolicyError, match=r"'magic' .* recompute, load, .*cacheflow$"):
        make_policy("magic")


def test_a_bad_option_is_refused():
    with pytest.raises(ConfigError, match="crossover_tokens"):
        make_policy("cacheflow_v1", crossover_tokens=-1)
