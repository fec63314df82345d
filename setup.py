"""Maps the folders `kernels/` and `benchmarks/` to `mtllm_fast.kernels` and `mtllm_fast.benchmarks`; everything else is in
pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mtllm_fast", "mtllm_fast.*"]), "mtllm_fast.kernels", "mtllm_fast.benchmarks"],
    package_dir={"mtllm_fast": "mtllm_fast", "mtllm_fast.kernels": "kernels", "mtllm_fast.benchmarks": "benchmarks"},
    package_data={
        "mtllm_fast.miniworld": ["assets/**/*"],
        "mtllm_fast.reporting": ["templates/*"],
        "mtllm_fast.evaluation": ["*.tsv"],
        "mtllm_fast": ["py.typed"],
    },
)
