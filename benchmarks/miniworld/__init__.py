"""The method against its baselines in the generated world of `mtllm_fast.miniworld`, over seeds."""
