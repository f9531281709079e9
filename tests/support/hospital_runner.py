"""A hospital process whose trainer learns nothing, and which may kill itself −9 at one named step.

`python -m tests.support.hospital_runner CONFIG [STEP [PASSES]]`: dies when STEP is passed for the PASSES-th time.
"""

import os
import signal
import sys
from pathlib import Path

from services.hospital_node.__main__ import run
from services.hospital_node.config import load_config
from tests.support.hospital_world import FixedTrainer


def main() -> int:
    config = load_config(Path(sys.argv[1]))
    step = sys.argv[2] if len(sys.argv) > 2 else None
    left = int(sys.argv[3]) if len(sys.argv) > 3 else 1

    def checkpoint(name: str) -> None:
        nonlocal left
        if name == step:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return run(config, lambda config: FixedTrainer(Path(config.data) / "trainer.log"), checkpoint)


if __name__ == "__main__":
    sys.exit(main())
