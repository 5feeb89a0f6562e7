"""Plot the variance of training targets against the noise level, for different numbers of references.

python benchmarks/stf_targets.py --data_dir digits --image_size 8 --log_dir runs/stf_targets

This is figure 2 of Xu, Tong and Jaakkola 2023 (arXiv 2302.00670), for any data set. On a finite data set, E[x0|x] is an
average over all images, so the errors are exact. One reference is EDM's target, the image itself. The results also
contain the squared bias, which is 0 up to the sampling error: given x and the references, the target is the expectation
of the image that x was made of.

Shapes: N images of the set, M noisy images, d numbers of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from torch import Tensor
from tqdm import tqdm

from cm.config.flags import option, parse
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io.storage import write_bytes, write_json
from cm.objectives.stf import as_points, stable_target
from cm.report.plots import line_plot
from cm.types import Batch

EXACT = "donot_use_mm_for_euclid_dist"                              # differences first: no cancellation


@dataclass(frozen=True)
class TargetsConfig:
    """targets"""

    data_dir: str = option("digits", "folder, EDM zip or npz of images, or `digits`")
    image_size: int = option(8, "side of the images in pixels", minimum=1)
    max_images: int = option(5000, "maximum number of images, a random subset of the data set", minimum=2)
    references: str = option("1,64,256,1024", "numbers of references, comma-separated")
    levels: int = option(15, "number of noise levels", minimum=2)
    sigma_min: float = option(0.1, "lowest noise level", minimum=1e-6)
    sigma_max: float = option(50.0, "highest noise level")
    points: int = option(64, "noisy images per level", minimum=1)
    draws: int = option(32, "targets per noisy image", minimum=2)
    seed: int = option(0, "random seed", minimum=0)
    log_dir: str = option("stf_targets", "folder for pictures and results")


def main() -> None:
    settings = parse(__doc__, TargetsConfig)
    config = settings.section(TargetsConfig)
    counts = [int(word) for word in config.references.split(",")]
    generator = th.Generator().manual_seed(config.seed)
    images = some_images(config, generator)
    sigmas = np.geomspace(config.sigma_min, config.sigma_max, config.levels).tolist()
    rows = [
        {"sigma": sigma, "references": n, "trace": trace, "bias": bias}
        for sigma in tqdm(sigmas, desc="noise levels")
        for n, (trace, bias) in zip(counts, scatter(images, sigma, counts, config.points, config.draws, generator))
    ]
    write(rows, counts, Path(config.log_dir))


def some_images(config: TargetsConfig, generator: th.Generator) -> Tensor:
    """Images of the set as points: float64 [N,d]."""
    source = open_source(config.data_dir, config.image_size)
    kept = th.randperm(len(source), generator=generator)[: config.max_images].sort().values
    return as_points(th.from_numpy(source.images(np.asarray(kept))))


def scatter(
    images: Tensor, sigma: float, counts: Sequence[int], points: int, draws: int, generator: th.Generator
) -> list[tuple[float, float]]:
    """For each number of references the trace of the covariance of the target given x and the square of the length of
    its bias, averages over noisy images x; both as shares of the trace of the images' own covariance.

    :param images: the whole set [N,d].
    """
    if max(counts) > len(images):
        raise UserError(f"--references {max(counts)}: there are only {len(images)} images; give fewer, or more data")
    first = th.randint(len(images), (points,), generator=generator)
    x = images[first] + sigma * th.randn(points, images.shape[1], generator=generator, dtype=th.float64)
    level = th.full((points,), sigma, dtype=th.float64)
    distances = th.cdist(x, images, compute_mode=EXACT)
    posterior = (-(distances**2) / (2 * sigma**2)).softmax(1)       # of the image given x, [M,N]
    truth = posterior @ images                                      # E[x0|x], [M,d]
    whole, found = images.var(0).sum().item(), []
    for n in counts:
        targets = []
        for _ in range(draws):
            own = images[th.multinomial(posterior, 1, generator=generator)[:, 0]]
            others = images[th.randint(len(images), (n - 1,), generator=generator)]
            everybody = th.ones(points, n - 1, dtype=th.bool)
            targets.append(stable_target(x, own, level, Batch(others), everybody)[0])
        errors = th.stack(targets) - truth                          # [draws,M,d]
        trace = errors.var(0).sum(1).mean().item()
        bias = errors.mean(0).square().sum(1).mean().item() - trace / draws         # less the error of the mean
        found.append((trace / whole, bias / whole))
    return found


def write(rows: Sequence[dict], counts: Sequence[int], folder: Path) -> None:
    """Numbers, and a picture of the covariance."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stf_targets.json", rows)
    curves = {
        f"{n} references" if n > 1 else "1: the image itself (EDM)": [
            (float(np.log10(row["sigma"])), row["trace"]) for row in rows if row["references"] == n
        ]
        for n in counts
    }
    path = folder / "stf_targets.png"
    label = "variance of targets given x, as a share of the variance of the images"
    write_bytes(path, line_plot(curves, "log10 sigma", label))
    print(path)


if __name__ == "__main__":
    dist.run(main)
