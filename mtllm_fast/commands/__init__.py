"""The subcommands of `mtllm`, one dataclass each: its fields are the options and `run` does the work."""
