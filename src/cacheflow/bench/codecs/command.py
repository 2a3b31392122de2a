"""``cacheflow bench codecs``: what a codec saves, costs and changes, on a model's own keys and values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cacheflow.bench.codecs.report import codec_tables
from cacheflow.bench.codecs.setting import CodecOptions, CodecSetting
from cacheflow.bench.environment import environment
from cacheflow.bench.options import EmbeddedFlags, option
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.suite import Suite, SuiteRun, new_progress
from cacheflow.errors import ConfigError
from cacheflow.stores.codecs import CODECS, codec_named

if TYPE_CHECKING:
    from cacheflow.engine.model import LoadedModel

NAMES = tuple(each.name for each in CODECS)


@dataclass(frozen=True, kw_only=True)
class CodecsFlags(EmbeddedFlags):
    """The options of ``bench codecs``."""

    tokens: int = option(1024, "prefix of each excerpt", metavar="N", at_least=1)
    layers_per_block: int = option(1, "attention layers of one object", metavar="N", at_least=1)
    codecs: tuple[str, ...] = option(NAMES, metavar=",".join(NAMES), known=("codec", NAMES), shown="")

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ConfigError: Names the option, or the package that a codec lacks.
        """
        super().__post_init__()
        if self.device != "cpu":
            raise ConfigError(f"--device {self.device}: codecs run on CPUs, and this measures there alone")
        if self.tokens <= 3 * self.chunk_tokens // 4:
            raise ConfigError(
                f"--tokens is {self.tokens}, must be above three quarters of a chunk of {self.chunk_tokens} tokens: "
                "other chunks are as long"
            )
        if self.chunk_tokens < 2:
            raise ConfigError(f"--chunk is {self.chunk_tokens}, must be at least 2: it is compared with shorter ones")
        for name in self.codecs:
            codec_named(name)


add_arguments = CodecsFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Measure each codec on every excerpt, taking up an earlier run in the same folder; prints the table.

    Raises:
        ConfigError: An option is wrong, or the model cannot be loaded.
    """
    flags = CodecsFlags.of(args)
    suite = Suite(out=flags.out, kind=CodecRecord, show=codec_tables, time_limit_s=flags.time_limit_s, resumes=True)
    return suite.run(partial(_work, flags))


def _work(flags: CodecsFlags, suite: SuiteRun[CodecRecord]) -> bool:
    from cacheflow.bench.codecs.study import OTHER_CHUNKS, CodecStudy, Excerpt
    from cacheflow.bench.setup import open_model

    options = CodecOptions(
        prefix_tokens=flags.tokens,
        suffix_tokens=flags.suffix,
        chunk_tokens=flags.chunk_tokens,
        layers_per_block=flags.layers_per_block,
    )
    model = open_model(flags)
    study = CodecStudy(model, options, environment(), num_excerpts=flags.repeats)
    wanted = [Excerpt(number, (OTHER_CHUNKS, *flags.codecs)) for number in range(flags.repeats)]
    left = [each for each in wanted if not set(each.policies) <= _done(model, options, each.number, suite.done)]
    with new_progress(suite.console) as progress:
        return suite.run_rounds(progress, left, study.run, lambda each: f"excerpt {each.number + 1}")


def _done(model: LoadedModel, options: CodecOptions, excerpt: int, records: Sequence[CodecRecord]) -> set[str]:
    """Codecs that an excerpt is on record with."""
    wanted = CodecSetting(model.shape.name, model.shape.dtype, model.fingerprint, options)
    return {each.codec for each in records if each.excerpt == excerpt and CodecSetting.of(each) == wanted}
