"""`gpu-bp`, hurt at chosen steps: what test_deploy.py starts, as a rank or alone.

    PLAN="0:25:KILL 1:8:TERM" HURT=FOLDER python tests/hurt.py WORD...

In the first try rank 0 sends itself SIGKILL after its 25th step, in the second rank 1 SIGTERM after its 8th, in a third
nothing happens. With TARGET it goes to that process, or group where it is negative. A file in the folder is a hurt.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

from gpu_bp.cli import main
from gpu_bp.interruption import Signals


def plant() -> None:
    """Puts what is planned for this try into the question that a training asks after every step."""
    folder, plan = Path(os.environ["HURT"]), os.environ.get("PLAN", "").split()
    hurts = len(list(folder.iterdir()))  # no other rank steps before this one has joined it
    own = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    if hurts >= len(plan) or plan[hurts].split(":")[0] != own:
        return
    _, step, name = plan[hurts].split(":")
    steps, interrupted = itertools.count(1), Signals.interrupted

    def hurt(self: Signals) -> bool:
        if next(steps) == int(step):
            (folder / str(hurts)).touch()
            os.kill(int(os.environ.get("TARGET") or os.getpid()), signal.Signals[f"SIG{name}"])
            while not self.number:  # until it comes back to this rank: no step is taken in between
                time.sleep(0.01)
        return interrupted(self)

    Signals.interrupted = hurt  # type: ignore[method-assign]


if __name__ == "__main__":
    plant()
    main()
