"""The scores of a long search on disk: after an interruption the same command resumes; a different one is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io import budget, untrusted
from cm.io.storage import write_json
from cm.logging import logger


@dataclass
class ScoreStore:
    """Every score so far, and what they depend on; written after each. To be used on all ranks together."""

    path: str
    conditions: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    network_evaluations: int = 0                                    # images through the network, all runs together

    def score(self, name: str, compute: Callable[[], tuple[float, int]]) -> float:
        """The score of that name, from memory or computed now with the network evaluations it took."""
        if name not in self.scores:
            self.scores[name], evaluations = compute()
            self.network_evaluations += evaluations
            dist.on_main(self.save)
        return self.scores[name]

    def save(self) -> None:
        """Write the file; call it on rank 0.

        :raises UserError: if it cannot be written.
        """
        content = dataclasses.asdict(self)
        del content["path"]
        write_json(self.path, content)


def open_score_store(path: str, conditions: Mapping[str, Any]) -> ScoreStore:
    """The scores at that path, or a new one; call it on rank 0.

    :param conditions: all that the scores depend on, as JSON can hold it.
    :raises UserError: if the file there is damaged, or its conditions differ.
    """
    if not os.path.exists(path):
        return ScoreStore(path, dict(conditions))
    try:
        content = budget.read_json(path, budget.SCORES)
        stored, scores = dict(content["conditions"]), {name: float(score) for name, score in content["scores"].items()}
        store = ScoreStore(path, stored, scores, int(content["network_evaluations"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not the state of a search ({type(error).__name__}: {error}); remove it to start again"
        ) from None
    differing = [name for name in {**stored, **conditions} if stored.get(name) != conditions.get(name)]
    if differing:
        facts = [
            f"{name} was {untrusted.shown(stored.get(name))} and is now {untrusted.shown(conditions.get(name))}"
            for name in differing[:10]
        ]
        raise UserError(
            f"{path} belongs to a search with other settings: {'; '.join(facts)}. Choose another --log_dir, or give "
            "the same settings to resume it"
        )
    logger.log(f"resuming with {len(scores)} scores of {path}")
    return store
