"""The whole miner in about two minutes, on a simulated market.

    python demo.py     # or: make demo, which makes the environment first

Runs the scripts that an operator runs, in folders of its own (`build/demo`):
train, sanity-check with fan charts, replay and score. Each command is shown
before it runs and can be repeated by hand.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from console import run_script, script_parser
from errors import MinerError

HERE: Final = Path(__file__).resolve().parent
FOLDER: Final = "build/demo"
MARKET: Final = ("--source", "simulated", "--asset", "BTC", "--asset", "XAU")
FOLDERS: Final = ("--model-dir", f"{FOLDER}/models", "--state-dir", f"{FOLDER}/state")
# The simulated market ends at 2026-01-15 18:00 UTC; its last two days are replayed.
REPLAYED: Final = ("--train-until", "2026-01-13T18:00:00Z", "--prompts", "24")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command and what it is for."""

    purpose: str
    command: tuple[str, ...]


STEPS: Final = (
    Step(
        purpose="Train BTC, which never closes, and XAU, which does, for the 1-hour and 24-hour "
        "prompts.",
        command=("train_models.py", *MARKET, *FOLDERS),
    ),
    Step(
        purpose="Ask for the next prompt of each, check the paths, draw them.",
        command=("test_miner.py", *MARKET, *FOLDERS, "--plot", f"{FOLDER}/plots"),
    ),
    Step(
        purpose="Train on less, replay prompts of the two days after, and score them like a "
        "validator, against the network's constant-sigma reference.",
        command=("backtest.py", *MARKET, *FOLDERS, *REPLAYED),
    ),
)


def main() -> int:
    """Run every step; stops at the first that fails."""
    script_parser(
        "Show the whole miner on a simulated market in about two minutes; all that it makes is in "
        f"{FOLDER}.",
        examples=["python demo.py"],
    ).parse_args()
    began = perf_counter()
    print("SIMULATED MARKET: these prices are made up. No network, no account, nothing at stake.")
    for number, step in enumerate(STEPS, start=1):
        print(f"\n{number}/{len(STEPS)} {step.purpose}\n")
        print(f"  $ python {shlex.join(step.command)}\n", flush=True)
        done = subprocess.run([sys.executable, *step.command], cwd=HERE, check=False)  # noqa: S603  # our own scripts
        if done.returncode:
            raise MinerError(f"{step.command[0]} ended with exit code {done.returncode}.")
    charts = sorted((HERE / FOLDER / "plots").glob("*.png"))
    print(f"Done in {perf_counter() - began:.0f} s. Fan charts:")
    for chart in charts:
        print(f"  {chart.relative_to(HERE)}")
    return 0


if __name__ == "__main__":
    run_script(main)
