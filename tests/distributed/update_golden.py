"""Golden losses from what one process computes now: shown beside the kept ones, and kept in their place with --write.

python tests/distributed/update_golden.py [--write]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from cases import GOLDEN_MODELS, golden_file, run_config  # noqa: E402
from rank_pool import RankPool  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep them: the specification of every test changes")
    write = parser.parse_args().write
    from training_runs import train

    with RankPool() as ranks:
        for name, flags in GOLDEN_MODELS.items():
            losses = ranks.run(1, train, run_config(flags))[0].losses
            file = golden_file(name)
            kept = [float(line.split()[1]) for line in file.read_text().splitlines()] if file.exists() else []
            farthest = max((abs(now - before) for now, before in zip(losses, kept, strict=False)), default=float("nan"))
            print(f"{file.name}: {losses[0]:.4f} to {losses[-1]:.4f}, differs from the stored by up to {farthest:.1e}")
            if write:
                file.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, 1)))


if __name__ == "__main__":
    main()
