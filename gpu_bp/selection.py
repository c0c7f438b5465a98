"""Which line of metrics is the best: its parameters are kept, and where no better one comes, the training stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_bp.config_training import StoppingSection
from gpu_bp.network import Network


class Selection:
    """The best line of metrics so far, and the parameters of that moment.

    Args:
        section: which metric, and how patiently.
        rises: whether the metric is better where it is larger.
        networks: whose parameters are kept: the one that is trained, and perhaps its average.

    Attributes:
        step: of the best line, 0 before there is one. since: lines since then.
        last: the metric in the last line, None where it was not a number. rises: as given.
        kept: the parameters of the best line, one buffer a network.
    """

    def __init__(self, section: StoppingSection, rises: bool, networks: Sequence[Network]) -> None:
        self._section = section
        self.rises = rises
        self._networks = networks
        self.kept = [n.backend.zeros(n.parameters.shape, n.dtype) for n in networks]
        self._best: float | None = None
        self.last: float | None = None
        self.step = self.since = 0

    def observe(self, line: Mapping[str, Any]) -> bool:
        """Takes a line of metrics and keeps the parameters where it is the best; whether patience is at its end.

        A metric that is not a number is no improvement.
        """
        section = self._section
        value = float(line[section.metric])
        self.last = value if math.isfinite(value) else None
        if self.last is not None and (self._best is None or self._gain(value) > section.minimum_improvement):
            self._best, self.step, self.since = value, line["step"], 0
            for network, kept in zip(self._networks, self.kept, strict=True):
                kept[...] = network.parameters
        else:
            self.since += 1
        return section.patience is not None and self.since >= section.patience

    def restore(self) -> int:
        """Gives the networks the parameters of the best line, and returns its step; 0 where there was none."""
        if self._best is not None:
            for network, kept in zip(self._networks, self.kept, strict=True):
                network.parameters[...] = kept
        return self.step

    def state(self) -> dict[str, Any]:
        """What was made of the lines so far, fit for JSON, beside `kept`."""
        return {
            "metric": self._section.metric,
            "best": self._best,
            "step": self.step,
            "since": self.since,
            "last": self.last,
            "rises": self.rises,
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Goes on as the selection did that gave this state."""
        self._best, self.step = state["best"], state["step"]
        self.since, self.last = state["since"], state["last"]

    @property
    def best(self) -> dict[str, Any]:
        """The best line: its metric, value (None where none was a number) and step."""
        return {"metric": self._section.metric, "value": self._best, "step": self.step}

    def _gain(self, value: float) -> float:
        assert self._best is not None
        return value - self._best if self.rises else self._best - value
