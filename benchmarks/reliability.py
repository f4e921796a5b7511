"""Plant every fault in real trainings, and write down what became of them: docs/reliability.md.

    source tools/environment.sh dev
    python -m benchmarks.reliability

Ranks are killed with SIGKILL at moments that a seed draws, in trainings of the tiny model in forked
gloo processes on this machine's CPU; each death is followed by a resume whose curve must be that of
an uninterrupted run, to the bit in the same layout. Then full disks, damaged files, NaN, signals,
hangs. Exit status 1 if anything is not as it should be. About 15 minutes on two cores.
"""

import argparse
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tests.faults.campaign import Layout, Outcome, make_world, run_campaign, run_truth
from tests.faults.kills import MOMENTS, Moment, draw_kills
from tests.faults.scenarios import LAYOUT, SCENARIOS, World

MIN_KILLS = 25

ONE_LAYOUT = (LAYOUT,)
SEVERAL = (Layout(tp=2, pp=2), Layout(dp=2), Layout(pp=3), Layout(tp=2, dp=2))

TITLES: dict[Moment, str] = {
    "iteration": "during an iteration (forward, backward or update)",
    "writing": "while a checkpoint is written, training going on",
    "commit": "while a checkpoint is published and old ones are deleted",
    "export": "while a HuggingFace folder is written",
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One fault other than a death."""

    fault: str
    outcome: str
    is_right: bool


def kill_everything(folder: Path, world: Path, seeds: int, kills: int) -> Iterator[list[Outcome]]:
    """Run the campaigns: one layout for each seed, and one that changes layout at each resume."""
    truth = folder / "truth"
    for seed in range(seeds):
        for name, layouts in (("same", ONE_LAYOUT), ("several", SEVERAL))[: 2 if seed == 0 else 1]:
            smallest = min(layout.world_size for layout in layouts)
            drawn = draw_kills(kills, smallest, seed)
            yield run_campaign(world, folder / f"{name}_{seed}", drawn, layouts, truth)


def plant_everything(folder: Path, world: Path) -> Iterator[Seen]:
    """Run every scenario."""
    for scenario in SCENARIOS:
        place = World(data=world, truth=folder / "truth", folder=folder / scenario.__name__)
        place.folder.mkdir()
        fault = (scenario.__doc__ or "").strip()
        try:
            yield Seen(fault=fault, outcome=scenario(place), is_right=True)
        except Exception:
            yield Seen(fault=fault, outcome=traceback.format_exc(), is_right=False)


def as_markdown(outcomes: Sequence[Outcome], seen: Sequence[Seen]) -> str:
    """The page."""
    good = sum(not outcome.problems for outcome in outcomes)
    lines = [
        "# What a training survives",
        "",
        "Made by `python -m benchmarks.reliability` on "
        f"{platform.machine()}, Python {platform.python_version()}: faults planted in real "
        "trainings of the tiny model (gloo, several processes, fp32, asynchronous saves every "
        "second iteration, HuggingFace exports every third). How it works and what to set: "
        "[checkpoints.md](checkpoints.md), [running.md](running.md), "
        "[troubleshooting.md](troubleshooting.md).",
        "",
        "## Kills",
        "",
        f"**{len(outcomes)} ranks killed with SIGKILL, {good} without a trace.** Without a trace "
        "means: the other ranks ended by themselves, none with status 0; every complete checkpoint "
        "was still there (or deleted for newer ones, as `checkpoint.save_total_limit` says) and "
        "equal to the bit to what the uninterrupted run had saved; the same command went on from "
        "the newest of them; and loss, gradient norm, learning rate and samples of every "
        "iteration were those of the uninterrupted run, to the bit in the same layout, to 1e-6 "
        "where the layout changed at each resume. Rank, moment and depth are drawn from a seed.",
        "",
        "| killed | times | without a trace | checkpoints lost | longest until all had ended |",
        "|---|--:|--:|--:|--:|",
    ]
    for moment in MOMENTS:
        mine = [outcome for outcome in outcomes if outcome.kill.moment == moment]
        if not mine:
            continue
        lost = sum("was lost" in problem for each in mine for problem in each.problems)
        lines.append(
            f"| {TITLES[moment]} | {len(mine)} | {sum(not each.problems for each in mine)} | "
            f"{lost} | {max(each.seconds_to_end for each in mine):.1f} s |"
        )
    lines += ["", "## Other faults", "", "| fault | what happens | as it should |", "|---|---|---|"]
    for each in seen:
        outcome = each.outcome if each.is_right else each.outcome.strip().splitlines()[-1]
        verdict = "yes" if each.is_right else "**no**"
        lines.append(f"| {' '.join(each.fault.split())} | {outcome} | {verdict} |")
    lines += [
        "",
        "After each of them the run was finished by the same command and compared with the "
        "uninterrupted one, to the bit (but for the skipped update, which is another run).",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant, write the page; 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="docs/reliability.md")
    parser.add_argument("--campaigns", type=int, default=4, help="in one layout (default: 4)")
    parser.add_argument("--kills", type=int, default=6, help="of each campaign (default: 6)")
    options = parser.parse_args(arguments)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = make_world(folder / "world")
        run_truth(world, folder / "truth", LAYOUT)
        campaigns = kill_everything(folder, world, options.campaigns, options.kills)
        for found in tqdm(campaigns, total=options.campaigns + 1, desc="campaigns"):
            outcomes += found
            for outcome in found:
                for problem in outcome.problems:
                    tqdm.write(f"{outcome.kill}: {problem}")
        seen = []
        for each in tqdm(plant_everything(folder, world), total=len(SCENARIOS), desc="faults"):
            seen.append(each)
            if not each.is_right:
                tqdm.write(f"{each.fault}\n{each.outcome}")
    Path(options.output).write_text(as_markdown(outcomes, seen), encoding="utf-8")
    print(as_markdown(outcomes, seen))
    wrong = any(outcome.problems for outcome in outcomes) or not all(s.is_right for s in seen)
    return int(wrong or len(outcomes) < MIN_KILLS)


if __name__ == "__main__":
    sys.exit(main())
