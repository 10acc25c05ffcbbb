"""What a comparison itself takes: time that is neither decoding, nor a tower, a selector or the language model.

    python perf/overhead.py                      # the demo's arms on the shipped tiny model, videos made anew
    python perf/overhead.py --profile            # and which functions take it
    python perf/overhead.py --wall               # by the clock instead of processor seconds

Stages and harness are those of the records (``seconds_harness``): what is left of asking all videos when the works of
all stages are taken away. By default every clock is that of the processor time of the model's process, one thread, so
that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from measure import about, write

from xcomp.compare.records import read_run_records
from xcomp.compare.runner import Comparison, compare
from xcomp.config import load_config
from xcomp.ledger import STAGES, Ledger


def ask(folder: Path, name: str, videos: int, batch: int) -> list[dict[str, Any]]:
    """The records of the demo's arms on a few of its videos."""
    options = [f"benchmark.num_videos={videos}", f"batch_size={batch}", "trainer.enable_progress_bar=false"]
    with redirect_stdout(io.StringIO()):
        compare(load_config("demo", [*options, f"name={name}", f"output={folder}"]))
    return read_run_records(folder / name)


def shares_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by stage in the model's process, and the harness', summed over all questions."""
    found = {stage: sum(r["seconds_amortised"][stage] for r in records) for stage in STAGES if stage != "decode"}
    return found | {"harness": sum(r["seconds_harness"] for r in records)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if given.wall else time.process_time
    Ledger.clock = staticmethod(clock)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in given.batch:
            for repeat in range(given.repeats):
                profile, asked = cProfile.Profile(), Comparison._ask
                if given.profile:
                    Comparison._ask = lambda *a, p=profile, f=asked: p.runcall(f, *a)
                try:
                    records = ask(folder, f"batch_{batch}_{repeat}", given.videos, batch)
                finally:
                    Comparison._ask = asked
                if given.profile:
                    pstats.Stats(profile).sort_stats("tottime").print_stats(40)
                seconds = shares_of(records)
                share = seconds["harness"] / sum(seconds.values())
                row = {"what": "harness", "clock": clock.__name__, "batch_size": batch, "questions": len(records)}
                row |= {f"seconds_{stage}": round(value, 3) for stage, value in seconds.items()}
                rows.append(about("cpu") | row | {"share_of_harness": round(share, 4)})
                print({k: v for k, v in rows[-1].items() if k not in about("cpu")}, flush=True)
    if not given.profile:
        write("overhead-cpu", rows)


if __name__ == "__main__":
    main()
