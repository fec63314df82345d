"""Fused ops of mtllm-fast. Import as `mtllm_fast.kernels`.

Dimension legend: B sequences, T packed tokens, P aligned pairs, E encoder width, D LLM width, V vocabulary, H heads.
"""

if __name__ != "mtllm_fast.kernels":
    raise ImportError(
        f"the folder kernels/ was imported as {__name__!r}; import it as 'mtllm_fast.kernels' "
        "(the bare name belongs to Hugging Face's 'kernels' package)"
    )

from .linear_kl import LinearKL, linear_kl

__all__ = ["LinearKL", "linear_kl"]
