"""A file of weights that a run starts from, read no more than once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cm import dist_util
from cm.checkpoints import diffusers_folder, state, storage


@dataclass
class WeightsFile:
    """A path, and its weights if they had to be read to know the network."""

    path: str
    training_mode: str | None = None                        # what the network was trained as, where that is known
    weights: Mapping[str, Tensor] | None = None

    def take(self) -> Mapping[str, Tensor]:
        """The weights, on every rank; only rank 0 reads the file. To be called once: no copy is kept here."""
        if self.weights is None:
            return dist_util.load_state_dict(self.path)
        weights, self.weights = self.weights, None
        return weights


def look_at(path: str) -> tuple[str, state.Checkpoint | None]:
    """What lies there, empty for nothing, and the manifest beside it; for one rank."""
    if diffusers_folder.is_folder(path):
        return "diffusers folder", None
    kind = "EDM pickle" if path.endswith(".pkl") else "file of weights"
    return kind if storage.exists(path) else "", state.beside(path)
