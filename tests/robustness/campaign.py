"""Faults of all kinds over runs on a disk and in an emulated object store, and what came of them.

    python -m tests.robustness.campaign --faults 60 --seed 0

A run on two devices is started again and again, as one process or as two; each time something is
done to it: it is killed at a random moment, while it saves, while it restores or while data are
made; one of its processes or both are; it is asked to stop; its disk is full; a file of its newest
checkpoint is flipped, shortened or gone; its store is away for ten seconds. After every few faults
it may end. Its parameters must then be those of a run that nobody
disturbed, to the bit; no start may fail but for the fault itself; and a checkpoint that a start
calls sound is restored by it. Prints a table for moezoo/train/README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo import storage
from moezoo.train import start
from moezoo.train.log import read
from tests.fixtures import ROOT
from tests.object_store import NotHere, emulated, new_bucket
from tests.train.test_processes import reserved_port

STEPS, EVERY = 40, 2
WORDS = ["rooms/m3vit_tiny", "--name", "run", "--data.train", "8", "--data.test", "8"]
WORDS += ["--data.resolution", "16", "16", "--model.width", "24", "--model.heads", "2"]
WORDS += ["--model.depth", "2", "--tasks", "depth", "--train.batch", "8", "--evaluate.batch", "8"]
WORDS += ["--evaluate.pictures", "1", "--optimiser.warmup", "5", "--train.steps", str(STEPS)]
WORDS += ["--train.log_every", "1", "--checkpoint.every", str(EVERY), "--log.tensorboard", "off"]
ROUND = 6  # faults until a run may end
LONGEST = 1200.0  # seconds for anything, on a machine with other work
ALONE = 60.0  # seconds in which a process ends that has lost another of its run
CAUSES = ("another process of this run", "another task died")  # ours, and of JAX itself


class Place(NamedTuple):
    """Where a run lies. door: the way to its store, None for a disk."""

    name: str
    runs: str
    door: Any

    @property
    def run(self) -> Path:
        """The run's folder."""
        return storage.place(f"{self.runs}/run")

    def step(self) -> int:
        """The last step that was measured."""
        return max((row["step"] for row in read(self.run / "metrics.jsonl")), default=0)

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints that have their last file, the oldest first."""
        folder = self.run / "checkpoints"
        if not folder.exists():
            return []
        found = [one for one in folder.iterdir() if (one / "manifest.json").exists()]
        return sorted(found, key=lambda one: int(one.name))


class Work:
    """A folder with data of its own, and one with compiled programs."""

    def __init__(self, folder: Path, compiled: Path):
        folder.mkdir()
        self.folder, self.compiled = folder, compiled

    def begin(self, place: Place, more: Sequence[str] = (), devices: int = 2) -> subprocess.Popen:
        """The run in a process of its own, or with `more` options one process of it."""
        own = {"JAX_PLATFORMS": "cpu", "MOEZOO_DATA": str(self.folder / "data")}
        own |= {"JAX_NUM_CPU_DEVICES": str(devices)}
        own |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(self.compiled)}
        own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return subprocess.Popen(
            [sys.executable, "-m", "moezoo", "train", *WORDS, "--directory", place.runs, *more],
            env=os.environ | own,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextmanager
    def pair(self, place: Place) -> Iterator[list[subprocess.Popen]]:
        """The run as two processes with a device each; none is left behind the block."""
        with reserved_port() as port:
            hosts = ["--hosts.coordinator", f"localhost:{port}", "--hosts.count", "2"]
            both = [self.begin(place, [*hosts, "--hosts.index", i], devices=1) for i in "01"]
            try:
                yield both
            finally:
                for process in both:
                    process.kill()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=LONGEST)
    return process.returncode, output


def until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """Wait until something is so, or the process is over."""
    deadline = time.monotonic() + LONGEST
    while process.poll() is None and not ready():
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"nothing happened: {ended(process)[1]}")
        time.sleep(0.02)


def further(place: Place, chance: random.Random) -> Callable[[], bool]:
    """Whether the run is a few steps further than now."""
    wanted = min(place.step() + chance.randint(1, 4), STEPS)
    return lambda: place.step() >= wanted


def killed(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL a few steps later, at a random moment."""
    process = work.begin(place)
    until(process, further(place, chance))
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    ended(process)


def killed_one(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL of one of two processes: the other ends by itself within a minute and says why."""
    with work.pair(place) as both:
        chance.shuffle(both)
        until(both[0], further(place, chance))
        both[0].kill()
        ended(both[0])
        output, _ = both[1].communicate(timeout=ALONE)
        last = place.step() >= STEPS  # it may have been over already
        said = any(cause in output for cause in CAUSES)
        assert last or (both[1].returncode != 0 and said), output


def killed_both(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL of two processes at once."""
    with work.pair(place) as both:
        until(both[0], further(place, chance))
        for process in both:
            process.kill()
        for process in both:
            ended(process)


def kept(work: Work, place: Place) -> None:
    """Let the run have a checkpoint, if it has none."""
    if not place.checkpoints():
        process = work.begin(place)
        until(process, lambda: bool(place.checkpoints()))
        process.kill()
        ended(process)


def unfinished(place: Place) -> set[int]:
    """Steps of checkpoints that are there without their last file."""
    folder = place.run / "checkpoints"
    found = list(folder.iterdir()) if folder.exists() else []
    named = [one for one in found if one.name.isdigit()]
    return {int(one.name) for one in named if not (one / "manifest.json").exists()}


def killed_saving(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL while a checkpoint is there without its last file."""
    left = unfinished(place)  # by an earlier kill, to be removed before it is written anew

    def saving() -> bool:
        now = unfinished(place)
        left.intersection_update(now)
        return bool(now - left)

    process = work.begin(place)
    until(process, saving)
    process.kill()
    ended(process)


def killed_restoring(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL soon after the model is there, while its arrays are read."""
    kept(work, place)
    process = work.begin(place)
    assert process.stdout is not None
    for line in process.stdout:
        if "parameters, tasks" in line:
            break
    time.sleep(chance.uniform(0, 0.5))
    process.kill()
    ended(process)


def killed_rendering(work: Work, place: Place, chance: random.Random) -> None:
    """SIGKILL while the data are made anew."""
    shutil.rmtree(work.folder / "data", ignore_errors=True)
    process = work.begin(place)
    until(process, lambda: (work.folder / "data").exists())
    time.sleep(chance.uniform(0, 2.0))
    process.kill()
    ended(process)


def terminated(work: Work, place: Place, chance: random.Random) -> None:
    """SIGTERM: it saves, says so and ends with 130."""
    process = work.begin(place)
    until(process, further(place, chance))
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code in (0, 130), output


def disk_full(work: Work, place: Place, chance: random.Random) -> None:
    """No file may grow beyond a few kilobytes: an error in a sentence, or a run that can go on."""
    size = chance.choice((200, 20_000, 100_000))
    process = work.begin(place)
    # Python ignores the signal for that, so that writing fails as on a full disk.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    code, output = ended(process)
    assert code != 0 and "Traceback" not in output, output


def a_file(work: Work, place: Place, chance: random.Random) -> Path:
    """Some file of the newest checkpoint, which has something in it."""
    kept(work, place)
    found = [file for file in place.checkpoints()[-1].rglob("*") if file.is_file()]
    return chance.choice([file for file in found if file.read_bytes()])


def flipped(work: Work, place: Place, chance: random.Random) -> None:
    """One bit of a file of the newest checkpoint is another."""
    file = a_file(work, place, chance)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


def truncated(work: Work, place: Place, chance: random.Random) -> None:
    """A file of the newest checkpoint is shorter."""
    file = a_file(work, place, chance)
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def missing(work: Work, place: Place, chance: random.Random) -> None:
    """A file of the newest checkpoint is gone."""
    a_file(work, place, chance).unlink()


def store_away(work: Work, place: Place, chance: random.Random) -> None:
    """The store answers 503 for ten seconds; the run goes on."""
    process = work.begin(place)
    until(process, further(place, chance))
    place.door.shut(10)
    until(process, lambda: time.monotonic() > place.door.opens)
    until(process, further(place, chance))
    process.kill()
    ended(process)


FAULTS = (killed, killed_one, killed_both, killed_saving, killed_restoring, killed_rendering)
FAULTS += (terminated, disk_full, flipped, truncated, missing)
ON_DISK, IN_STORE = FAULTS, (*(f for f in FAULTS if f is not disk_full), store_away)


def finish(work: Work, place: Place, wanted: Any) -> str:
    """Let the run end, compare it, and begin a new one; how the last start found it."""
    code, output = ended(work.begin(place))
    assert code == 0, output
    found = start.read(place.run)
    for group, arrays in wanted.items():
        for path, value in arrays.items():
            np.testing.assert_array_equal(np.asarray(found[group][path]), value, err_msg=path)
    storage.remove_tree(place.run)
    return "older" if "Skipping checkpoint" in output else "newest"


@contextmanager
def places(folder: Path) -> Iterator[list[tuple[Place, tuple[Any, ...]]]]:
    """A folder of this disk and, where an emulator is installed, a bucket."""
    found: list[tuple[Place, tuple[Any, ...]]]
    found = [(Place("disk", str(folder / "runs"), None), ON_DISK)]
    with ExitStack() as stack:
        try:
            door = stack.enter_context(emulated())
            found.append((Place("store", f"{new_bucket(door)}/runs", door), IN_STORE))
        except NotHere as error:
            print(f"On a disk only: {error}.")
        yield found


def at_place(
    work: Work, place: Place, order: Sequence[Any], chance: random.Random, wanted: Any
) -> None:
    """All faults of one place; of each its number, the step that was reached, and its seconds."""
    for number, fault in enumerate(order, start=1):
        began = time.monotonic()
        fault(work, place, chance)
        said = f"{fault.__name__}, step {place.step()}, {time.monotonic() - began:.0f} s"
        print(f"{place.name} {number}: {said}", flush=True)
        if number % ROUND == 0 or number == len(order) or place.step() >= STEPS - 4:
            which = finish(work, place, wanted)
            print(f"{place.name}: ended from its {which} checkpoint", flush=True)


def campaign(folder: Path, faults: int, seed: int) -> Counter[tuple[str, str]]:
    """How many faults of each kind at each place; AssertionError for anything that went wrong.

    The places take their faults side by side.
    """
    tally, compiled = Counter[tuple[str, str]](), folder / "compiled"
    whole = Place("disk", str(folder / "whole"), None)
    code, output = ended(Work(folder / "undisturbed", compiled).begin(whole))
    assert code == 0, output
    wanted = start.read(whole.run)
    with places(folder) as found, ThreadPoolExecutor() as pool:
        running = []
        for place, kinds in found:
            chance = random.Random(f"{seed} {place.name}")
            order = [kinds[i % len(kinds)] for i in range(faults // len(found))]
            chance.shuffle(order)
            tally.update((fault.__name__, place.name) for fault in order)
            work = Work(folder / f"at_{place.name}", compiled)
            running.append(pool.submit(at_place, work, place, order, chance, wanted))
        for one in running:
            one.result()
    return tally


def main() -> None:
    """Run it, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(Path(folder), given.faults, given.seed)
    print("\n| fault | on a disk | in a store |\n|---|---|---|")
    for fault in (*FAULTS, store_away):
        counts = (tally[fault.__name__, name] or "–" for name in ("disk", "store"))
        words = (fault.__doc__ or "").splitlines()[0].rstrip(".")
        print(f"| {words} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
