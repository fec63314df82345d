"""What `mtllm bench` measures: kernels and pipelines, each registered as a case."""
