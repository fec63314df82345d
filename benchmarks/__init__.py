"""Benchmarks: `python -m benchmarks.<name>`. Records go to results/<device>/*.json in the format of `common.Record`."""
