"""Fused ops of mtllm-fast. Import as `mtllm_fast.kernels`.

Dimension legend: B sequences, T packed tokens, P aligned pairs, E encoder width, D LLM width, V vocabulary, H heads.
"""

if __name__ == "mtllm_fast.kernels":
    from .distillation_loss import DistillationTerms, distillation_loss
    from .hidden_mse import paired_mse, pooled_mse, segment_mean
    from .linear_ce import linear_ce
    from .linear_kl import LinearKL, linear_kl, teacher_moments
    from .moments import TeacherMoments
    from .packed_projection import packed_projection, with_boundaries

    __all__ = [
        "DistillationTerms",
        "LinearKL",
        "TeacherMoments",
        "distillation_loss",
        "linear_ce",
        "linear_kl",
        "packed_projection",
        "paired_mse",
        "pooled_mse",
        "segment_mean",
        "teacher_moments",
        "with_boundaries",
    ]
else:
    # In a checkout this folder is also importable as `kernels`, the name of a Hugging Face package that transformers
    # looks for. It must be able to look, and find nothing; a person who imports it gets told the right name.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"import mtllm_fast.kernels, not {__name__}: the folder kernels/ is mapped to that name")
