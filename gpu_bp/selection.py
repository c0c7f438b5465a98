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
    """

    def __init__(self, section: StoppingSection, rises: bool, networks: Sequence[Network]) -> None:
        self._section = section
        self._sign = 1.0 if rises else -1.0
        self._networks = networks
        self._kept = [n.backend.zeros(n.parameters.shape, n.dtype) for n in networks]
        self._best: float | None = None
        self.step = self.since = 0

    def observe(self, line: Mapping[str, Any]) -> bool:
        """Takes a line of metrics and keeps the parameters where it is the best; whether patience is at its end.

        A metric that is not a number is no improvement.
        """
        section = self._section
        value = float(line[section.metric])
        if math.isfinite(value) and (self._best is None or self._gain(value) > section.minimum_improvement):
            self._best, self.step, self.since = value, line["step"], 0
            for network, kept in zip(self._networks, self._kept, strict=True):
                kept[...] = network.parameters
        else:
            self.since += 1
        return section.patience is not None and self.since >= section.patience

    def restore(self) -> int:
        """Gives the networks the parameters of the best line, and returns its step; 0 where there was none."""
        if self._best is not None:
            for network, kept in zip(self._networks, self._kept, strict=True):
                network.parameters[...] = kept
        return self.step

    @property
    def best(self) -> dict[str, Any]:
        """The best line: its metric, value (None where none was a number) and step."""
        return {"metric": self._section.metric, "value": self._best, "step": self.step}

    def _gain(self, value: float) -> float:
        assert self._best is not None
        return self._sign * (value - self._best)
