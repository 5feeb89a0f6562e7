"""Distil or train a consistency model with the calls of the original cm_train.py."""

import argparse
import copy

import torch.distributed as dist

from cm import dist_util, logger
from cm.image_datasets import load_data
from cm.resample import create_named_schedule_sampler
from cm.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    cm_train_defaults,
    create_ema_and_scales_fn,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from cm.train_util import CMTrainLoop

DEFAULTS = {
    "data_dir": "", "schedule_sampler": "uniform", "lr": 1e-4, "weight_decay": 0.0, "lr_anneal_steps": 0,
    "global_batch_size": 2048, "batch_size": -1, "microbatch": -1, "ema_rate": "0.9999", "log_interval": 10,
    "save_interval": 10000, "resume_checkpoint": "", "use_fp16": False, "fp16_scale_growth": 1e-3,
}


def copy_params(source, target) -> None:
    for dst, src in zip(target.parameters(), source.parameters()):
        dst.data.copy_(src.data)


def main() -> None:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**DEFAULTS, **model_and_diffusion_defaults(), **cm_train_defaults()})
    args = parser.parse_args()

    dist_util.setup_dist()
    logger.configure()
    ema_scale_fn = create_ema_and_scales_fn(
        target_ema_mode=args.target_ema_mode,
        start_ema=args.start_ema,
        scale_mode=args.scale_mode,
        start_scales=args.start_scales,
        end_scales=args.end_scales,
        total_steps=args.total_training_steps,
        distill_steps_per_iter=args.distill_steps_per_iter,
    )
    options = args_to_dict(args, model_and_diffusion_defaults().keys())
    options["distillation"] = "consistency" in args.training_mode
    model, diffusion = create_model_and_diffusion(**options)
    diffusion.loss_norm = args.loss_norm                    # what the original forgets; its users add this line
    model.to(dist_util.dev())
    model.train()
    if args.use_fp16:
        model.convert_to_fp16()
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)

    batch_size = args.batch_size if args.batch_size != -1 else args.global_batch_size // dist.get_world_size()
    data = load_data(
        data_dir=args.data_dir, batch_size=batch_size, image_size=args.image_size, class_cond=args.class_cond
    )

    teacher_model = teacher_diffusion = None
    if args.teacher_model_path:
        teacher_options = {**copy.deepcopy(options), "dropout": args.teacher_dropout, "distillation": False}
        teacher_model, teacher_diffusion = create_model_and_diffusion(**teacher_options)
        teacher_model.load_state_dict(dist_util.load_state_dict(args.teacher_model_path, map_location="cpu"))
        teacher_model.to(dist_util.dev())
        teacher_model.eval()
        copy_params(teacher_model, model)
        if args.use_fp16:
            teacher_model.convert_to_fp16()

    target_model, _ = create_model_and_diffusion(**options)
    target_model.to(dist_util.dev())
    target_model.train()
    dist_util.sync_params(target_model.parameters())
    dist_util.sync_params(target_model.buffers())
    copy_params(model, target_model)
    if args.use_fp16:
        target_model.convert_to_fp16()

    CMTrainLoop(
        model=model,
        target_model=target_model,
        teacher_model=teacher_model,
        teacher_diffusion=teacher_diffusion,
        training_mode=args.training_mode,
        ema_scale_fn=ema_scale_fn,
        total_training_steps=args.total_training_steps,
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
