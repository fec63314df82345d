import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import tests.kernels.quick_interpreter  # noqa: F401
