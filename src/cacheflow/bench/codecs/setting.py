"""What is measured of codecs: how much text, how it is cut, and by which model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cacheflow.bench.records.codecs import CodecRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecOptions:
    """Of each excerpt; see ``CodecRecord``."""

    prefix_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    layers_per_block: int


@dataclass(frozen=True, slots=True)
class CodecSetting:
    """What all excerpts of a table have in common."""

    model: str
    dtype: str
    fingerprint: str
    options: CodecOptions

    @classmethod
    def of(cls, record: CodecRecord) -> CodecSetting:
        """The setting of one record."""
        options = CodecOptions(**{each.name: getattr(record, each.name) for each in fields(CodecOptions)})
        return cls(record.model, record.dtype, record.fingerprint, options)

    def __str__(self) -> str:
        """For the head of a table."""
        options = self.options
        return (
            f"{self.model} {self.dtype}: {options.prefix_tokens:,} tokens in chunks of {options.chunk_tokens:,}, "
            f"{options.layers_per_block} layer{'' if options.layers_per_block == 1 else 's'} an object, "
            f"{options.suffix_tokens:,} positions after them"
        )
