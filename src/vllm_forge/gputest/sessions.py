"""Sessions of benchmarks in a kit: their plans, and the code that runs them in the image."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_forge.bench.arms import carried_plan
from vllm_forge.bench.session import write_plan
from vllm_forge.gputest import launch
from vllm_forge.host import write_json
from vllm_forge.images.prewarm import place_of

SOURCE, ROOMS = Path("src/vllm_forge"), ("host", "matrix", "bench")


def write_sessions(
    bundle: Path, plan: Mapping[str, Any], *, root: Path, paths: Sequence[Path],
    inputs: Mapping[str, Path],
) -> None:  # fmt: skip
    """Put sessions into the bundle of a suite's ``plan``; ``inputs``: see `kit.make_kit`."""
    for room in ROOMS:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / SOURCE / room, bundle / SOURCE / room, ignore=skip)
    shutil.copyfile(root / SOURCE / "errors.py", bundle / SOURCE / "errors.py")
    key = plan["caches"]["key"]
    write_json(bundle / launch.KEY, key)
    image = f"sha256:{plan['subject']['sha256']}"
    subject = {"image": image, "tree": plan["tree"], "lock_sha256": plan["lock_sha256"]}
    checkpoints = {Path(place).name: path for place, path in inputs.items()}
    for path in paths:
        session, workload = carried_plan(path, subject, checkpoints, place_of(key))
        write_plan(session, bundle / "bench" / session.session, workload)
