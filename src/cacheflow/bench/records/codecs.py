"""Records of codecs on a model's keys and values."""

from __future__ import annotations

from cacheflow.bench.records.base import Above0, BenchRecord, Count, Environment, Name, NotBelow0, Positive, Share


class CodecRecord(BenchRecord, frozen=True, kw_only=True):
    """One excerpt of text whose keys and values went through one codec, and what the model makes of them after that.

    Attributes:
        codec: Its name, or what was done instead of encoding.
        lossless: What comes back has to be what was encoded.
        excerpt: Which part of the text.
        prefix_tokens: Tokens whose keys and values were encoded, in chunks of ``chunk_tokens``.
        suffix_tokens: Positions after them that were compared, each fed with the text as it goes on.
        layers_per_block: Attention layers of one object.
        raw_bytes: Of the keys and values.
        stored_bytes: Of what is stored for them.
        encode_bytes_per_s: ``raw_bytes`` over the CPU time of the one thread that encoded; None where nothing was.
        decode_bytes_per_s: The same of decoding.
        keys_error: Norm (Frobenius) of what the keys are off by, over that of the keys.
        values_error: The same of the values.
        keys_largest_error: What one number of the keys is off by at most, over the largest of them.
        values_largest_error: The same of the values.
        same_tokens: Share of the positions whose likeliest token is the one after exact keys and values.
        divergence: Kullback-Leibler divergence from the exact distribution of the next token, mean, in nats.
        fingerprint: Of the model's weights.
    """

    suite: Name = "codecs"
    codec: Name
    lossless: bool
    model: Name
    dtype: Name
    excerpt: Count
    prefix_tokens: Positive
    suffix_tokens: Positive
    chunk_tokens: Positive
    layers_per_block: Positive
    raw_bytes: Positive
    stored_bytes: Positive
    encode_bytes_per_s: Above0 | None
    decode_bytes_per_s: Above0 | None
    keys_error: NotBelow0
    values_error: NotBelow0
    keys_largest_error: NotBelow0
    values_largest_error: NotBelow0
    same_tokens: Share
    divergence: NotBelow0
    environment: Environment
    fingerprint: str

    @property
    def is_good(self) -> bool:
        """Whether what must come back as it was did."""
        return not self.lossless or (self.keys_error, self.values_error, self.divergence) == (0, 0, 0)
