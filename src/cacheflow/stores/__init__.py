"""Bytes: where KV-cache objects are kept, verified and found again. No torch."""
