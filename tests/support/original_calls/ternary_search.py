"""Search for the best middle of three noise levels with the calls of the original ternary_search.py."""

import argparse
from functools import cache
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from cm import dist_util, logger
from cm.karras_diffusion import stochastic_iterative_sampler
from cm.random_util import get_generator
from cm.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from evaluations.th_evaluator import FIDAndIS

DEFAULTS = {
    "begin": "0", "end": "39", "training_mode": "consistency_distillation", "generator": "determ",
    "clip_denoised": True, "num_samples": 10000, "batch_size": 16, "sampler": "heun", "s_churn": 0.0, "s_tmin": 0.0,
    "s_tmax": float("inf"), "s_noise": 1.0, "steps": 40, "model_path": "", "ref_batch": "", "seed": 42,
}


def gathered(rows: th.Tensor) -> list[np.ndarray]:
    parts = [th.zeros_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return [part.cpu().numpy() for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**DEFAULTS, **model_and_diffusion_defaults()})
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(args, model_and_diffusion_defaults().keys()), distillation="consistency" in args.training_mode
    )
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    model.eval()

    fid_is = FIDAndIS()
    fid_is.set_ref_batch(args.ref_batch)
    ref_fid_stats, ref_spatial_stats, ref_clip_stats = fid_is.get_ref_batch(args.ref_batch)

    def samples(ts: tuple[int, ...]) -> np.ndarray:
        generator = get_generator(args.generator, args.num_samples, args.seed)
        features: list[np.ndarray] = []
        while len(features) * args.batch_size < args.num_samples:
            model_kwargs = {}
            if args.class_cond:
                model_kwargs["y"] = th.randint(0, NUM_CLASSES, (args.batch_size,), device=dist_util.dev())

            def denoiser(x: th.Tensor, sigma: th.Tensor, **cond: Any) -> th.Tensor:
                _, denoised = diffusion.denoise(model, x, sigma, **model_kwargs)      # noqa: B023
                return denoised.clamp(-1, 1) if args.clip_denoised else denoised

            shape = (args.batch_size, 3, args.image_size, args.image_size)
            x_T = generator.randn(*shape, device=dist_util.dev()) * args.sigma_max
            sample = stochastic_iterative_sampler(          # ts in the place of sigmas, as the original has it
                denoiser, x_T, ts, t_min=args.sigma_min, t_max=args.sigma_max, rho=diffusion.rho, steps=args.steps,
                generator=generator,
            )
            pred, spatial_pred, clip_pred, text_pred, _ = fid_is.get_preds(sample)
            features.extend(gathered(pred))
        dist.barrier()
        return np.concatenate(features)[: args.num_samples]

    @cache
    def fid_and_score(p: int, begin: tuple[int, ...], end: tuple[int, ...]) -> tuple[float, float]:
        preds = samples((*begin, p, *end))
        found = [(0.0, 0.0)]
        if dist.get_rank() == 0:
            fid = ref_fid_stats.frechet_distance(fid_is.get_statistics(preds, -1))
            found = [(fid, fid_is.get_inception_score(preds))]
        dist.broadcast_object_list(found, 0)
        return found[0]

    begin, end = (tuple(int(word) for word in text.split(",")) for text in (args.begin, args.end))
    left, right = begin[-1], end[0]
    while right - left >= 3:
        thirds = [int(left + (right - left) / 3), int(right - (right - left) / 3)]
        first, second = (fid_and_score(p, begin, end)[0] for p in thirds)
        left, right = (left, thirds[1]) if first < second else (thirds[0], right)
    best = min(range(left, right + 1), key=lambda p: fid_and_score(p, begin, end)[0])
    fid, score = fid_and_score(best, begin, end)
    if dist.get_rank() == 0:
        logger.log(f"best {best} fid {fid:.6g} score {score:.6g}")


if __name__ == "__main__":
    main()
