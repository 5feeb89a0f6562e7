"""Write samples to an npz with the calls of the original image_sample.py."""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist

from cm import dist_util, logger
from cm.karras_diffusion import karras_sample
from cm.random_util import get_generator
from cm.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

DEFAULTS = {
    "training_mode": "edm", "generator": "determ", "clip_denoised": True, "num_samples": 10000, "batch_size": 16,
    "sampler": "heun", "s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0, "steps": 40,
    "model_path": "", "seed": 42, "ts": "",
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
    if args.use_fp16:
        model.convert_to_fp16()
    model.eval()

    ts = tuple(int(word) for word in args.ts.split(",")) if args.sampler == "multistep" else None
    generator = get_generator(args.generator, args.num_samples, args.seed)
    images, labels = [], []
    while len(images) * args.batch_size < args.num_samples:
        model_kwargs = {}
        if args.class_cond:
            classes = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
            model_kwargs["y"] = classes
            labels.extend(gathered(classes))
        sample = karras_sample(
            diffusion,
            model,
            (args.batch_size, 3, args.image_size, args.image_size),
            steps=args.steps,
            model_kwargs=model_kwargs,
            device=dist_util.dev(),
            clip_denoised=args.clip_denoised,
            sampler=args.sampler,
            sigma_min=args.sigma_min,
            sigma_max=args.sigma_max,
            s_churn=args.s_churn,
            s_tmin=args.s_tmin,
            s_tmax=args.s_tmax,
            s_noise=args.s_noise,
            generator=generator,
            ts=ts,
        )
        pixels = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
        images.extend(gathered(pixels))
        logger.log(f"{len(images) * args.batch_size} samples")

    arrays = [np.concatenate(parts)[: args.num_samples] for parts in (images, labels) if parts]
    if dist.get_rank() == 0:
        np.savez(os.path.join(logger.get_dir(), f"samples_{'x'.join(map(str, arrays[0].shape))}.npz"), *arrays)
    dist.barrier()


if __name__ == "__main__":
    main()
