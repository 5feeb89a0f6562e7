"""Measure the number of references in targets of the stable target field, for both ways to use augmentation.

python benchmarks/stf_augmented.py --data_dir digits --image_size 8 --log_dir runs/stf_augmented

With --augment_references True, references are augmented as the batch is, and all count. With False, they are not
augmented, and count only for samples without a transform. Noise levels are drawn from EDM's lognormal distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th

from cm.config.flags import option, parse
from cm.data.augment import AugmentBatch, AugmentPipe
from cm.data.sources import open_source
from cm.diffusion.noise_sampling import LogNormalSampler
from cm.io.storage import write_json
from cm.objectives.stf import peers, stable_target
from cm.random_util import SampleStreams
from cm.tensors import append_dims
from cm.types import Batch


@dataclass(frozen=True)
class AugmentedConfig:
    """references under augmentation"""

    data_dir: str = option("digits", "folder, EDM zip or npz of images, or `digits`")
    image_size: int = option(8, "side of the images in pixels", minimum=1)
    augment: float = option(0.12, "probability of each transform", minimum=1e-6, maximum=1)
    num_references: int = option(512, "number of reference images, including the batch", minimum=1)
    batch: int = option(128, "images per step", minimum=1)
    steps: int = option(20, "number of steps", minimum=1)
    seed: int = option(0, "random seed", minimum=0)
    log_dir: str = option("stf_augmented", "folder for the results")


def main() -> None:
    config = parse(__doc__ or "", AugmentedConfig).section(AugmentedConfig)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for step in range(config.steps):
        references = draw_references(config, step)
        for is_augmented, rows in found.items():
            rows.append(count(config, references, is_augmented, step))
    rows = [
        {"augment_references": way, "effective_references": round(float(np.mean([row[0] for row in rows])), 3),
         "share_with_references": round(float(np.mean([row[1] for row in rows])), 3)}
        for way, rows in found.items()
    ]
    settings = {name: getattr(config, name) for name in ("augment", "num_references", "batch", "steps", "seed")}
    write_json(Path(config.log_dir) / "stf_augmented.json", settings | {"rows": rows})
    print(*rows, sep="\n")


def draw_references(config: AugmentedConfig, step: int) -> Batch:
    """Images of the set in [-1, 1], [n,3,S,S], at positions of their own."""
    source = open_source(config.data_dir, config.image_size)
    chosen = np.random.default_rng((config.seed, step)).choice(len(source), config.num_references, replace=False)
    images = th.from_numpy(source.images(np.sort(chosen))).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Batch(images, {}, step * config.num_references + th.arange(config.num_references))


def count(config: AugmentedConfig, references: Batch, is_augmented: bool, step: int) -> tuple[float, float]:
    """The mean effective number of images in a target, and the share of samples that have any reference."""
    shown = AugmentBatch(AugmentPipe(config.augment), config.seed, th.device("cpu"))(references)
    own = shown.rows(0, config.batch)
    assert own.positions is not None
    rng = SampleStreams(config.seed, own.positions, stream="measure")
    sigma, *_ = LogNormalSampler().draw(rng, config.batch, th.device("cpu"))
    x = own.images + rng.randn_like(own.images) * append_dims(sigma, 4)
    others = shown if is_augmented else references
    allowed = peers(own, others)
    _, effective = stable_target(x, own.images, sigma, others, allowed)
    return effective.mean().item(), allowed.any(1).float().mean().item()


if __name__ == "__main__":
    main()
