"""Whether two commits train and export the same, bit for bit, on one machine.

    python tests/unchanged.py measure before.json --work /tmp/before    # in a clone of the one
    python tests/unchanged.py measure after.json --work /tmp/after      # in a clone of the other
    python tests/unchanged.py compare before.json after.json

For the tiny configuration of every system it trains some steps and keeps the losses of each as
exact text, and of what the run is exported to the checksum of every array. Not a test: two commits
are needed for it, and a quarter of an hour.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "--data.train 64 --data.test 16"
CLIPS = "--data.train 64 --data.valid 16 --data.test 16"
# configuration: (steps, further options, commands that export the run); a run starts from one above
RUNS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "rooms/m3vit_tiny": (
        50,
        IMAGES,
        (
            "tools/export.py {run} --task depth --out {out}/whole",
            "tools/export.py {run} --task semseg --keep 2 --calibration 16 --out {out}/pruned",
        ),
    ),
    "text/base_tiny": (20, "", ()),
    "text/smora_tiny": (
        50,
        "--start-from {runs}/base_tiny",
        ("tools/adapter.py {run} --out {out}/adapter",),
    ),
    "sounds/ast_tiny": (20, CLIPS, ()),
    "sounds/soft_moa_tiny": (
        50,
        CLIPS + " --start-from {runs}/ast_tiny",
        ("tools/export.py {run} --task event --out {out}/event",),
    ),
    "rooms/vit_dense_tiny": (20, IMAGES, ()),
    "rooms/swin_dense_tiny": (20, IMAGES, ()),
    "rooms/conditional_moe_tiny": (
        50,
        IMAGES + " --start-from {runs}/vit_dense_tiny",
        (
            "tools/export.py {run} --task scene --out {out}/scene",
            "tools/encoders.py {run} --out {out}/encoders",
        ),
    ),
    "rooms/mod_squad_tiny": (
        20,
        IMAGES,
        ("tools/export.py {run} --task normals --keep 4 --calibration 16 --out {out}/pruned",),
    ),
    "rooms/vmoe_tiny": (20, IMAGES, ()),
    "rooms/mlore_tiny": (20, IMAGES, ()),
    "rooms/taskexpert_tiny": (20, IMAGES, ()),
}


def losses(run: Path) -> list[dict[str, str]]:
    """The losses of every step, as text that names each number exactly."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "gradient")
    return [
        {
            k: v.hex() if isinstance(v, float) else str(v)
            for k, v in row.items()
            if k.startswith(kept)
        }
        for row in rows
    ]


def arrays(folder: Path) -> dict[str, str]:
    """The checksum of every array of every safetensors file under a folder."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in sorted(file.keys()):
                value = np.ascontiguousarray(file.get_tensor(name))
                digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
                where = f"{path.relative_to(folder)}:{name}"
                found[where] = f"{value.dtype} {list(value.shape)} {digest}"
    return found


def run(words: list[str]) -> None:
    """One command, its output shown only where it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def measure(work: Path, only: list[str]) -> dict[str, dict]:
    """Train and export every configuration."""
    found = {}
    for name, (steps, options, exports) in RUNS.items():
        if only and name not in only:
            continue
        short = name.partition("/")[2]
        runs = work / "runs"
        folder, out = runs / short, work / "exports" / short
        words = f"train.py {name} --directory {runs} --name {short} --train.steps {steps}"
        words += f" --optimiser.warmup 5 --train.log-every 1 --evaluate.pictures 1 {options}"
        run(words.format(runs=runs).split())
        out.mkdir(parents=True)
        for export in exports:
            run(export.format(run=folder, out=out).split())
        found[name] = {"losses": losses(folder), "arrays": arrays(out)}
        print(f"{name}: {steps} steps, {len(found[name]['arrays'])} arrays exported", flush=True)
    return found


def compare(first: dict, second: dict) -> int:
    """Print what differs; how many configurations do."""
    wrong = 0
    for name in sorted(first.keys() | second.keys()):
        one, two = first.get(name), second.get(name)
        if one is None or two is None:
            print(f"{name}: not measured in both")
            continue
        same = one == two
        wrong += not same
        print(f"{name}: {'the same, bit for bit' if same else 'DIFFERENT'}")
        if not same:
            pairs = zip(one["losses"], two["losses"], strict=False)
            steps = [a.get("step") for a, b in pairs if a != b]
            names = [k for k in one["arrays"] if one["arrays"][k] != two["arrays"].get(k)]
            print(f"  losses differ in {len(steps)} rows, first at step {steps[:1]}")
            print(f"  arrays differ: {len(names)}, for example {names[:3]}")
    return wrong


def main() -> int:
    """Measure or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("out", type=Path)
    measured.add_argument("--work", type=Path, required=True)
    measured.add_argument("--only", nargs="*", default=[])
    compared = commands.add_parser("compare")
    compared.add_argument("first", type=Path)
    compared.add_argument("second", type=Path)
    given = parser.parse_args()
    if given.command == "measure":
        given.out.write_text(json.dumps(measure(given.work, given.only), indent=1))
        return 0
    one, two = (json.loads(path.read_text()) for path in (given.first, given.second))
    return compare(one, two)


if __name__ == "__main__":
    sys.exit(main())
