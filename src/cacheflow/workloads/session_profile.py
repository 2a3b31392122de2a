"""Profiles of multi-turn workloads, fitted to published figures; every constant says where it comes from.

A profile is what the generator draws from: turns of a session, tokens of the first prompt, tokens a turn adds, tokens
of an answer, pauses. Figures marked *fitted* are not published themselves: they are chosen so that the generated
requests have the published percentiles, which the tests check.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.errors import ConfigError
from cacheflow.workloads.distributions import Distribution, Geometric, LogNormal


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProfile:
    """A kind of session.

    Attributes:
        name: Opens the session ids.
        turns: Turns of a session; rounded, at least 1.
        common_tokens: Tokens every prompt of every session begins with (system prompt, tool definitions).
        first_tokens: Tokens of a session's first prompt, after the common ones.
        new_tokens: Tokens that each later turn adds (message, tool result), beside the previous answer.
        output_tokens: Tokens of an answer.
        delay_s: Think or tool time before a turn.
        context_tokens: Longest prompt of a session, drawn once for each.
        compacts: What happens where the next prompt would be longer: the session goes on with the common tokens and a
            new first prompt (True, as coding agents do), or it ends (False).
    """

    name: str
    turns: Distribution
    common_tokens: int = 0
    first_tokens: Distribution
    new_tokens: Distribution
    output_tokens: Distribution
    delay_s: Distribution
    context_tokens: Distribution
    compacts: bool = False

    def __post_init__(self) -> None:
        if self.common_tokens < 0:
            raise ConfigError(f"profile {self.name}: common_tokens {self.common_tokens} must be 0 or more")


_CHAT_PAUSE = LogNormal(median=30.0, sigma=1.0)
"""Assumed: neither chat data set publishes the time between turns."""

LMSYS_CHAT = SessionProfile(
    name="lmsys-chat",
    # LMSYS-Chat-1M (arXiv 2309.11998): about 2 turns a conversation. The shape is assumed.
    turns=Geometric(mean=2.0),
    # Prefill mean 462 and decode mean 210 tokens a request (published figures of LMSYS-Chat-1M). With geometric turns
    # of mean 2, a request has one earlier turn on average, so that the prefill mean is first + new + answer:
    # 126 + 126 + 210. Deviations are assumed: twice the mean for messages, the mean for answers.
    first_tokens=LogNormal.of_mean(126.0, deviation=252.0),
    new_tokens=LogNormal.of_mean(126.0, deviation=252.0),
    output_tokens=LogNormal.of_mean(210.0, deviation=210.0),
    delay_s=_CHAT_PAUSE,
    context_tokens=LogNormal(median=131_072.0, sigma=0.0),
)
"""Short chats with people."""

WILDCHAT = SessionProfile(
    name="wildchat",
    # WildChat (arXiv 2405.01470, table 1): 2.54 turns, 295.58 ± 1609.18 tokens a message, 441.34 ± 410.91 an answer.
    # The turns agree with the published counts of turns and conversations; the tokens were not checked on the data.
    turns=Geometric(mean=2.54),
    first_tokens=LogNormal.of_mean(295.58, deviation=1609.18),
    new_tokens=LogNormal.of_mean(295.58, deviation=1609.18),
    output_tokens=LogNormal.of_mean(441.34, deviation=410.91),
    delay_s=_CHAT_PAUSE,
    context_tokens=LogNormal(median=131_072.0, sigma=0.0),
)
"""Chats with people who paste long texts."""

SWE_BENCH = SessionProfile(
    name="swe-bench",
    # LMCache/lmcache-agent-trace, mini-swe-agent on SWE-bench: 6 to 30 calls a session, mean 19 (measured on 11
    # sessions of it at 4 characters a token, as are first prompt, answers and pauses below).
    turns=LogNormal(median=16.0, sigma=0.6),
    first_tokens=LogNormal(median=1_420.0, sigma=0.25),
    # Fitted to the whole trace's input p50 3,992, p90 13,179, p99 39,793.
    new_tokens=LogNormal(median=34.0, sigma=2.1),
    output_tokens=LogNormal(median=97.0, sigma=0.4),
    delay_s=LogNormal.of_percentiles(p50=1.1, p90=1.9),
    context_tokens=LogNormal(median=131_072.0, sigma=0.0),
)
"""Agents that solve an issue in tens of quick calls; 94 % of the prompts' tokens were seen before."""

CODING_AGENT = SessionProfile(
    name="coding-agent",
    # callanjfox/kv-cache-tester, 22,892 requests of 346 sessions: turns p50 42, p90 154; tool and system tokens 12,974
    # and 4,243 (its first session); answers p50 223, p90 889; pauses p50 10 s, p90 169 s.
    turns=LogNormal.of_percentiles(p50=42.0, p90=154.0),
    common_tokens=12_974 + 4_243,
    # Fitted: first prompts (p50 25,500), context and compaction to input p50 101,495, p90 210,539, p99 507,924.
    first_tokens=LogNormal(median=34_000.0, sigma=1.2),
    # New tokens a turn p50 734, p90 4,221; a turn's new tokens include the previous answer.
    new_tokens=LogNormal(median=430.0, sigma=1.5),
    output_tokens=LogNormal.of_percentiles(p50=223.0, p90=889.0),
    delay_s=LogNormal.of_percentiles(p50=10.0, p90=169.0),
    context_tokens=LogNormal(median=210_000.0, sigma=0.7),
    compacts=True,
)
"""People with a coding agent: long sessions of long prompts, 96 % of whose tokens were seen before."""

PROFILES = {profile.name: profile for profile in (LMSYS_CHAT, WILDCHAT, SWE_BENCH, CODING_AGENT)}
"""Every profile by its name."""
