"""Whether bits are right on this device, before any time is worth measuring."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench import setup
from cacheflow.bench.gpu.study import GpuStudy, Values
from cacheflow.bench.restore.link import PinnedStudyLink, StoreStudyLink, StudyLink
from cacheflow.bench.restore.study import Study, StudyOptions
from cacheflow.engine.families import DTYPES, FAMILIES
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.selftest import self_test
from cacheflow.errors import SelfTestError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy

EXACTNESS = 1


def check_exactness(study: GpuStudy) -> bool:
    """Part 1: every family in every dtype against its own forward; every policy over both kinds of link."""
    exact = True
    models = [(family, None) for family in FAMILIES] + [("mistral", 24)]  # the last with a window that cuts in
    for family, window in models:
        for dtype in DTYPES[study.flags.device]:
            try:
                report = self_test(tiny_model(family, dtype=dtype, device=study.flags.device, sliding_window=window))
                values: Values = {"kv_error": report.kv_error, "logits_error": report.logits_error}
                passed = report.passed
            except SelfTestError as error:
                values, passed = {"error": str(error)}, False
            name = f"{family} {dtype}" + ("" if window is None else f", window {window}")
            study.put(EXACTNESS, name, values, correct=passed)
            exact = exact and passed
    wrong = [name for name in RESTORE_POLICIES for link in _links(study) if not _is_exact(study, name, link)]
    study.put(EXACTNESS, "policies", {"wrong": ",".join(wrong) or None}, correct=not wrong)
    return exact and not wrong


def _links(study: GpuStudy) -> Iterator[StudyLink]:
    yield PinnedStudyLink()
    yield StoreStudyLink(setup.namespace_of(setup.open_model(study.flags), 64))


def _is_exact(study: GpuStudy, policy: str, link: StudyLink) -> bool:
    model = tiny_model("llama", dtype="bfloat16", device=study.flags.device)
    options = StudyOptions(num_tokens=500, suffix_tokens=40, chunk_tokens=64, cost_repeats=1)
    small = Study(model, [1 + i % 300 for i in range(540)], options=options, link=link, streams=study.streams)
    small.prepare()
    run = small.run(make_policy(policy), with_suffix=True, bytes_per_s=small.bytes_per_s(1.0))
    small.close()
    return run.correct
