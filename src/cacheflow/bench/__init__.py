"""Benchmarks: suites that measure, records they append, and the tables and plots that read those records."""
