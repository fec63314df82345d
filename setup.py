"""Maps the folders `kernels/` and `benchmarks/` to `mtllm_fast.kernels` and `mtllm_fast.benchmarks`; the rest is in
pyproject.toml."""

from setuptools import find_namespace_packages, setup

# folders of data count as packages too: setuptools warns of those that are left out
OWN = find_namespace_packages(include=["mtllm_fast", "mtllm_fast.*"], exclude=["*.__pycache__"])

setup(
    packages=[*OWN, "mtllm_fast.kernels", "mtllm_fast.benchmarks", "mtllm_fast.benchmarks.real"],
    package_dir={"mtllm_fast": "mtllm_fast", "mtllm_fast.kernels": "kernels", "mtllm_fast.benchmarks": "benchmarks"},
    package_data={
        "mtllm_fast.miniworld": ["assets/**/*"],
        "mtllm_fast.reporting": ["templates/*"],
        "mtllm_fast.evaluation": ["*.tsv"],
        "mtllm_fast.training": ["configs/*.yaml"],
        "mtllm_fast": ["py.typed"],
    },
)
