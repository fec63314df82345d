"""What the project claims, measured; the library imports nothing of it.

cases/      what `mtllm bench` measures        studies/  measurements with a verdict or a table of their own
real/       real models and languages          trials/   one-off experiments that LOG.md tells of
miniworld/  the generated world                report/   results as text, page and README table

Each runs as `python -m benchmarks.<folder>.<name>`; `python -m benchmarks.gpu_suite` runs all that needs a GPU.
Records go to results/<device>/*.json in the format of `common.Record`.
"""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
DATA = Path(os.environ.get("MTLLM_DATA", REPO.parent / "shared" / "data"))  # real texts, where they are at hand
