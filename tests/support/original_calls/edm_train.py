"""Train a diffusion model with the calls of the original edm_train.py."""

import argparse

import torch.distributed as dist

from cm import dist_util, logger
from cm.image_datasets import load_data
from cm.resample import create_named_schedule_sampler
from cm.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from cm.train_util import TrainLoop

DEFAULTS = {
    "data_dir": "", "schedule_sampler": "uniform", "lr": 1e-4, "weight_decay": 0.0, "lr_anneal_steps": 0,
    "global_batch_size": 2048, "batch_size": -1, "microbatch": -1, "ema_rate": "0.9999", "log_interval": 10,
    "save_interval": 10000, "resume_checkpoint": "", "use_fp16": False, "fp16_scale_growth": 1e-3,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**DEFAULTS, **model_and_diffusion_defaults()})
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure()
    logger.log("network and diffusion")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.to(dist_util.dev())
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)

    batch_size = args.batch_size if args.batch_size != -1 else args.global_batch_size // dist.get_world_size()
    data = load_data(
        data_dir=args.data_dir, batch_size=batch_size, image_size=args.image_size, class_cond=args.class_cond
    )
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        batch_size=batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        ema_rate=args.ema_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint,
        use_fp16=args.use_fp16,
        fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=schedule_sampler,
        weight_decay=args.weight_decay,
        lr_anneal_steps=args.lr_anneal_steps,
    ).run_loop()


if __name__ == "__main__":
    main()
