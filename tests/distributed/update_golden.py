"""Write the golden losses anew, from what one process computes now: python tests/distributed/update_golden.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from cases import GOLDEN_MODELS, golden_file, run_config  # noqa: E402
from rank_pool import RankPool  # noqa: E402


def main() -> None:
    from training_runs import train

    with RankPool() as ranks:
        for name, flags in GOLDEN_MODELS.items():
            losses = ranks.run(1, train, run_config(flags))[0].losses
            lines = "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, 1))
            golden_file(name).write_text(lines)
            print(f"{golden_file(name)}: {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
