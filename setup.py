"""Maps the folder `kernels/` to the import name `mtllm_fast.kernels`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mtllm_fast", "mtllm_fast.*"]), "mtllm_fast.kernels"],
    package_dir={"mtllm_fast": "mtllm_fast", "mtllm_fast.kernels": "kernels"},
    package_data={
        "mtllm_fast.miniworld": ["assets/**/*"],
        "mtllm_fast.reporting": ["templates/*"],
        "mtllm_fast": ["py.typed"],
    },
)
