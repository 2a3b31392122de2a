"""Restoring inside stock vLLM, beside its own prefill and others."""
