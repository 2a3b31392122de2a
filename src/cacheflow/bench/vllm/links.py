"""Rounds over links of given bandwidths, each with one server for all policies; what there is no time for is left out.

The link is set when a server starts, which takes minutes with a large model: a server a policy would take most of the
time that a lent machine has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from cacheflow.bench.records.vllm import VllmRecord
from cacheflow.bench.suite import SuiteRun
from cacheflow.bench.vllm.fleet import Fleet
from cacheflow.bench.vllm.policies import STOCK
from cacheflow.bench.vllm.study import VllmLink, VllmStudy
from cacheflow.types import Clock

START_S = 90.0
"""What a server of an 8B model is expected to take until it answers, before one was started here."""

OpenServer = Callable[[float], AbstractContextManager[Fleet]]
"""Starts a server with a link of so many bytes per second."""


class LinkRounds:
    """The rounds of one command, in the sequence of their links."""

    def __init__(
        self,
        study: VllmStudy,
        policies: Sequence[str],
        suite: SuiteRun[VllmRecord],
        *,
        time_limit_s: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Start the clock; ``policies`` must have ``STOCK``, whose answers are the reference."""
        assert STOCK in policies, "checked with the options"
        self._study, self._policies, self._suite, self._clock = study, policies, suite, clock
        self._ends_s = float("inf") if time_limit_s is None else clock() + time_limit_s
        self._start_s = START_S

    def run(self, links: Sequence[float], open_server: OpenServer) -> bool:
        """Run what is not on record and has its time; False when something was left out.

        Args:
            links: Bytes per second.
            open_server: Called for each link of which a round is to run.

        Raises:
            ServerError: A server does not start, or failed.
        """
        complete = True
        for each in links:
            complete &= self._run_link(each, open_server)
        return complete

    def _run_link(self, bytes_per_s: float, open_server: OpenServer) -> bool:
        repeats = self._open_repeats(bytes_per_s)
        if not repeats:
            return True
        needed_s = self._start_s
        if self._study.costs is not None:
            needed_s += self._study.round_s(self._study.link_of(bytes_per_s, []))
        if not self._has_time(needed_s, bytes_per_s, "a server with one repeat"):
            return False
        self._suite.say(f"{_gbps(bytes_per_s)}: starting a server, saving {len(repeats)} prefixes")
        began_s = self._clock()
        with open_server(bytes_per_s) as fleet:
            study = self._study
            if study.costs is None:
                with fleet.turn(STOCK):
                    study.prepare(fleet.client(STOCK), on_step=lambda: None)
            study.warm_up(fleet)
            study.save(fleet, repeats=repeats, on_step=lambda policy: None)
            self._start_s = self._clock() - began_s
            return self._run_rounds(fleet, study.link_of(bytes_per_s, self._records(bytes_per_s)), repeats)

    def _run_rounds(self, fleet: Fleet, link: VllmLink, repeats: Sequence[int]) -> bool:
        """Run the repeats that are not on record; a first round is expected to take what its parts should."""
        expected_s = self._study.round_s(link)
        for repeat in repeats:
            if not self._has_time(expected_s, link.bytes_per_s, f"repeat {repeat + 1}"):
                return False
            self._suite.say(f"{_gbps(link.bytes_per_s)}: repeat {repeat + 1} of {self._study.options.repeats}")
            began_s = self._clock()
            for record in self._study.round(fleet, link=link, repeat=repeat, on_step=lambda policy: None):
                self._suite.add(record)
            expected_s = self._clock() - began_s
        return True

    def _has_time(self, needed_s: float, bytes_per_s: float, what: str) -> bool:
        left_s = max(0.0, self._ends_s - self._clock())
        if needed_s > left_s:
            self._suite.say(
                f"{_gbps(bytes_per_s)} is left out from here on: {what} takes about {needed_s:.0f} s, "
                f"{left_s:.0f} s are left"
            )
        return needed_s <= left_s

    def _open_repeats(self, bytes_per_s: float) -> list[int]:
        """Those of which not every policy is on record."""
        ran: dict[int, set[str]] = {}
        for record in self._records(bytes_per_s):
            ran.setdefault(record.repeat, set()).add(record.policy)
        return [each for each in range(self._study.options.repeats) if not ran.get(each, set()) >= set(self._policies)]

    def _records(self, bytes_per_s: float) -> list[VllmRecord]:
        """What is on record of this model, prefix and link."""
        return [each for each in self._suite.records if self._study.is_of(each, bytes_per_s)]


def _gbps(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:g} Gbit/s"
