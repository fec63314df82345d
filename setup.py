"""Maps the folder `kernels/` to `mtllm_fast.kernels`, and leaves out what only a checkout has: `benchmarks/` and the
generated world's models, which tests and `mtllm demo --world` read. The rest is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# folders of data count as packages too: setuptools warns of those that are left out
OWN = find_namespace_packages(
    include=["mtllm_fast", "mtllm_fast.*"], exclude=["*.__pycache__", "mtllm_fast.miniworld.assets*"]
)

setup(
    packages=[*OWN, "mtllm_fast.kernels"],
    package_dir={"mtllm_fast": "mtllm_fast", "mtllm_fast.kernels": "kernels"},
    package_data={
        "mtllm_fast.demo": ["assets/**/*"],
        "mtllm_fast.reporting": ["templates/*"],
        "mtllm_fast.evaluation": ["*.tsv"],
        "mtllm_fast.training": ["configs/*.yaml"],
        "mtllm_fast.recipes": ["*.yaml"],
        "mtllm_fast": ["py.typed"],
    },
)
