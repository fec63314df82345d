"""A million short lines through `mtllm encode` with a tiny model: flat memory, kill -9 twice, the same bytes.

    python -m benchmarks.studies.encode_stream --lines 1000000 --json benchmarks/results/cpu/encode_stream.json

One run is left alone while its resident memory is sampled; a second one is killed with SIGKILL at two random moments
and started again each time. The verdict needs equal files and memory that does not grow after the first fifth.
"""

from __future__ import annotations

import filecmp
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import REPO
from benchmarks.common import parser_of, percentile, study_record, write
from benchmarks.studies.survive import write_lines

GROWTH = 1.05  # of the resident memory between the second and the last fifth of a run


def make_inputs(folder: Path, lines: int) -> tuple[Path, Path]:
    """(model folder, text file): a tiny stack, and lines of 3 to 10 words, each with its number."""
    from mtllm_fast.models import MTLLM
    from tests.tiny import build_encoder_folder, build_llm_folder

    model = MTLLM.stack(build_encoder_folder(folder / "encoder"), build_llm_folder(folder / "llm"), dtype=torch.float32)
    model.save_pretrained(folder / "stack")
    write_lines(folder / "lines.txt", lines, longest=10)
    return folder / "stack", folder / "lines.txt"


def start(model: Path, text: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mtllm_fast.cli", "encode", "--model", str(model), "--input", str(text)]
    return subprocess.Popen(
        [*command, "--output", str(output), "--device", "cpu"], cwd=REPO, stdout=subprocess.PIPE, text=True
    )


def resident_mib(pid: int) -> float | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watched(model: Path, text: Path, output: Path, windows: int) -> tuple[float, list[float], float]:
    """Seconds of a run that is left alone, its resident memory over time while it encodes, and its peak."""
    from mtllm_fast.jobs.parts import RECORD

    log = output.with_name(output.name + ".part") / "0.log"
    began = time.monotonic()
    process = start(model, text, output)
    samples, peak = [], 0.0
    while process.poll() is None:
        memory = resident_mib(process.pid) or 0.0
        peak = max(peak, memory)
        try:
            written = log.stat().st_size // RECORD.itemsize
        except FileNotFoundError:
            written = 0
        if 0 < written < windows:  # joining at the end is another phase
            samples.append(memory)
        time.sleep(0.1)
    out = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"mtllm encode failed with {process.returncode}")
    print(out.strip(), flush=True)
    return time.monotonic() - began, samples, peak


def killed(model: Path, text: Path, output: Path, windows: list[int]) -> list[int]:
    """Kill a run once it has written each number of windows, and start it again; the rows found after each kill."""
    from mtllm_fast.jobs.parts import RECORD

    log = output.with_name(output.name + ".part") / "0.log"
    found = []
    for wanted in windows:
        process = start(model, text, output)
        while process.poll() is None and (not log.exists() or log.stat().st_size < wanted * RECORD.itemsize):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.05))
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it had written {wanted} windows")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not output.exists()
        records = np.fromfile(log, RECORD, count=log.stat().st_size // RECORD.itemsize)
        found.append(int(records["rows"].sum()))
        print(f"killed with -9 after {found[-1]:,} rows", flush=True)
    process = start(model, text, output)
    print(process.communicate()[0].strip(), flush=True)
    if process.returncode:
        raise RuntimeError(f"the resumed run failed with {process.returncode}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run, print the verdict, write; 1 when it fails."""
    parser = parser_of("benchmarks.studies.encode_stream", __doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--format", default=".npy", choices=(".npy", ".parquet", ".safetensors"))
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments of the kills; default: another each time"
    )
    options = parser.parse_args(argv)
    if options.lines < 3 * 2048:
        parser.error("--lines: at least 6,144, three windows")
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="encode-stream-") as name:
        folder = Path(name)
        model, text = make_inputs(folder, options.lines)
        whole, broken = folder / f"whole{options.format}", folder / f"killed{options.format}"
        total = -(-options.lines // 2048)
        seconds, memory, peak = watched(model, text, whole, total)
        kills = killed(model, text, broken, sorted(random.sample(range(1, max(total - 2, 3)), 2)))
        same = filecmp.cmp(whole, broken, shallow=False)
        size = whole.stat().st_size
    fifth = max(len(memory) // 5, 1)
    early, late = percentile(memory[fifth : 2 * fifth] or memory, 0.5), percentile(memory[-fifth:], 0.5)
    flat = late <= GROWTH * early
    print(
        f"{options.lines:,} lines in {seconds:.0f} s ({options.lines / seconds:,.0f} lines/s), {size:,} bytes\n"
        f"resident memory {early:.0f} MiB in the second fifth, {late:.0f} MiB in the last, "
        f"peak of the whole run {peak:.0f} MiB: "
        f"{'flat' if flat else 'GROWS'}\n"
        f"killed with -9 at {kills[0]:,} and {kills[1]:,} rows and resumed: {'same bytes' if same else 'OTHER BYTES'}\n"
        f"{'PASS' if same and flat else 'FAIL'}"
    )
    if options.json:
        found = {"time_ms": seconds * 1e3, "killed_at_rows": kills, "same_bytes": same, "bytes": size}
        found |= {"resident_mib": {"second_fifth": early, "last_fifth": late, "peak": peak}, "format": options.format}
        write(options.json, [study_record("encode stream", {"N": options.lines}, same and flat, **found)])
    return 0 if same and flat else 1


if __name__ == "__main__":
    sys.exit(main())
