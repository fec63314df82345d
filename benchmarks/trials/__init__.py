"""One-off experiments; what they found stands in LOG.md."""
