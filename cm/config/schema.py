"""The flags of networks and of training: name, default and help text. Those of training methods are in
`cm.config.objective_schema`, those for using a trained model in `cm.config.sampling_schema`;
`cm.config.flags` turns all into command-line parsers.

The choices are listed here as strings so that --help does not import torch; tests compare them with the tables in code.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm.config.flags import option
from cm.config.objective_schema import ConsistencyConfig, FewStepConfig, ObjectiveConfig
from cm.distributed.launchers import DEVICES
from cm.logging import FORMATS

SAMPLER_NAMES = ("heun", "euler", "dpm", "ancestral", "onestep", "multistep", "progdist", "ddim", "pc", "sde",
                 "ito", "ablation", "flowmap")
EDIT_NAMES = ("inpaint", "colorize", "superres", "stroke", "interpolate", "denoise")
LARGEST_SEED = 2**63 - 1
"""The largest seed that every random generator accepts."""
LARGEST_SIDE, LARGEST_BATCH, MOST_STEPS = 2**15, 2**24, 10**6
"""Larger values are typing errors: no machine could hold them. They are refused before anything is allocated."""
MOST_WORKERS = 256                                          # processes that read images, beside each rank
LEAST_SIGMA, LARGEST_SIGMA = 1e-12, 1e12                    # their squares are still in the range of float32
LONGEST_WAIT_S = 1e9


@dataclass(frozen=True)
class ModelConfig:
    """network (taken from the checkpoint if one is given)"""

    arch: str = option(
        "unet", "network: unet (guided-diffusion), ddpmpp (EDM's DDPM++), ncsnpp (EDM's NCSN++), adm (EDM's ADM), "
        "edm2 (EDM2's magnitude-preserving U-Net)",
        choices=("unet", "ddpmpp", "ncsnpp", "adm", "edm2"), table="arch",
    )
    image_size: int = option(
        64, "width and height of the images in pixels", minimum=1, maximum=LARGEST_SIDE
    )
    channels: int = option(
        3, "channels of the images; 3: RGB, where grey data are repeated; 1: grey, to which colour is converted; "
        "others: latents; data sets of datasets/encode.py set the number", minimum=1,
    )
    num_channels: int = option(128, "number of channels at the first resolution level", minimum=1)
    num_res_blocks: int = option(2, "residual blocks per resolution level", minimum=1)
    num_heads: int = option(4, "unet: number of attention heads; used if num_head_channels is -1")
    num_heads_upsample: int = option(-1, "unet: number of attention heads in the decoder; -1: same as num_heads")
    num_head_channels: int = option(
        -1, "channels per attention head; -1: unet uses num_heads instead, adm and edm2 use 64"
    )
    attention_resolutions: str = option("32,16,8", "resolutions with attention layers, in pixels, comma-separated")
    channel_mult: str = option("", "channel multiplier of each level, such as 1,2,4; empty: default for the image size")
    dropout: float = option(0.0, "dropout probability", minimum=0, below=1)
    dropout_resolutions: str = option(
        "", "resolutions with dropout, in pixels, comma-separated, such as 16,8; empty: all"
    )
    class_cond: bool = option(False, "condition on class labels")
    num_classes: int = option(0, "number of classes; 0: number of classes in the data set", minimum=0)
    null_class: bool = option(
        False, "the network also has a label for no class, as classifier-free guidance needs; label_dropout sets it"
    )
    second_time: bool = option(
        False, "the network also takes the time at which its step ends, as flow maps do; training_mode sets it"
    )
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(True, "unet: apply the time embedding as scale and shift; False: add it")
    resblock_updown: bool = option(False, "unet: change the resolution in residual blocks; False: in convolutions")
    augment_dim: int = option(
        0, "EDM's networks: number of augmentation labels for conditioning (9 with --augment); 0: none",
        minimum=0,
    )
    use_fp16: bool = option(False, "fp16 network with fp32 master weights")
    use_new_attention_order: bool = option(
        False, "guided-diffusion weights with 3-axis qkv weights only: rows are ordered q, k, v instead of by head"
    )
    learn_sigma: bool = option(False, "accepted for compatibility with old commands; must be False")


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion"""

    sigma_min: float = option(0.002, "lowest noise level", minimum=LEAST_SIGMA)
    sigma_max: float = option(80.0, "highest noise level", minimum=0, maximum=LARGEST_SIGMA)
    precond: str = option(
        "edm", "preconditioning of the network; all but edm also set the published noise distribution and loss weight, "
        "unless these are given",
        choices=("edm", "vp", "ve", "iddpm", "ddpm"),
    )
    weight_schedule: str = option(
        "karras", "loss weight as a function of the noise level",
        choices=("karras", "snr", "snr+1", "truncated-snr", "uniform"),
    )
    time_scale: float = option(
        0.0, "the network is conditioned on time_scale ln(sigma) / 4; 0: 1000 for unet, as in guided-diffusion, and 1 "
        "for EDM's networks; see docs/few-step.md", minimum=0,
    )


@dataclass(frozen=True)
class LatentConfig:
    """latents; see docs/latents.md"""

    latents: str = option(
        "", "JSON: mean and standard deviation of the raw latents in each channel, the range of the pixels (unit: "
        "[0, 1]; symmetric: [-1, 1]) and the VAE; taken from the data set or the checkpoint"
    )


@dataclass(frozen=True)
class VaeConfig(LatentConfig):
    """latents; see docs/latents.md"""

    vae: str = option(
        "", "folder of the VAE that decodes latents to pictures, a diffusers AutoencoderKL; empty: latents stay latents"
    )
    vae_batch_size: int = option(8, "latents that are decoded at once on a rank; bounds the memory", minimum=1)


@dataclass(frozen=True)
class WeightsConfig:
    """reading of weights"""

    verify_weights: bool = option(
        True, "compare size and CRC-32 of weights with the manifest next to them while they are read; a damaged file "
        "is refused; False: load it anyway"
    )


@dataclass(frozen=True)
class ExtractorConfig:
    """feature extractor"""

    inception: str = option(
        "", "feature extractor: a file, or torch or tf for Inception; empty: CM_INCEPTION, or torch"
    )
    trust_extractor: bool = option(
        False, "trust the extractor and run it: a TorchScript file is a program; on the command line only"
    )


@dataclass(frozen=True)
class RunConfig(WeightsConfig):
    """run"""

    log_dir: str = option("", "folder for logs and results; empty: OPENAI_LOGDIR, or a new temporary folder")
    log_formats: str = option(
        "", "how the log is written, comma-separated; tensorboard and wandb also show the flags and the grids of "
        "samples, and need their packages; empty: OPENAI_LOG_FORMAT, or stdout,log,csv",
        choices=tuple(FORMATS), several=True, table="log format",
    )
    seed: int = option(
        0, "random seed; the same seed on the same ranks and threads gives the same run", minimum=0,
        maximum=LARGEST_SEED,
    )
    precision: str = option(
        "", "precision of the network; auto: bf16 if the hardware supports it efficiently; empty: set by use_fp16",
        choices=("", "auto", "fp32", "bf16", "fp16"),
    )
    device: str = option(
        "auto", "where each rank computes; auto: on a GPU if there is one, else on the CPU", choices=tuple(DEVICES)
    )
    tf32: bool = option(
        False, "let GPUs multiply float32 numbers in TensorFloat-32: faster, with 10 bits of mantissa instead of 23; "
        "no effect on products in fp16 or bf16, nor on a CPU"
    )
    compile: bool = option(
        False, "compile the networks before their first step: this takes seconds to minutes, later steps are faster; "
        "needs a C++ compiler (CPU) or Triton (GPU); results are the same up to rounding"
    )


@dataclass(frozen=True)
class DataConfig:
    """data"""

    data_dir: str = option(
        "", "folder, EDM zip or npz of images; shards of a WebDataset, such as set-{000..127}.tar, or a folder of "
        "them; or the word digits for scikit-learn's handwritten digits"
    )
    random_flip: bool = option(True, "mirror half of the images horizontally")
    augment: float = option(
        0.0, "EDM's non-leaky augmentation, on which the network is conditioned: probability of each transform (0.12 "
        "for CIFAR-10, 0.15 for 64x64); includes mirroring, so random_flip is off unless given; 0: none",
        minimum=0, maximum=1,
    )
    labels: str = option(
        "auto", "where classes come from without a dataset.json; auto: sub-folders where there are several, else the "
        "part of file names before the first _", choices=("auto", "folders", "names"),
    )
    label_dropout: float = option(
        0.0, "probability that a training image loses its class label, for classifier-free guidance (usually 0.1); "
        "needs class_cond", minimum=0, below=1,
    )
    random_crop: bool = option(False, "crop at a random position instead of the centre")
    cache_gib: float = option(
        0.25, "a data set that fits into this much memory per rank, in GiB, is decoded once and kept; 0: never",
        minimum=0,
    )
    shuffle_window: int = option(
        1000, "WebDataset shards: size of the buffer in which each loader process shuffles images; the order of the "
        "shards changes in every epoch", minimum=1,
    )
    num_workers: int = option(
        -1, "data loader processes per rank; -1: chosen from the format of the data", minimum=-1, maximum=MOST_WORKERS
    )


@dataclass(frozen=True)
class TrainConfig:
    """training"""

    schedule_sampler: str = option(
        "lognormal", "distribution of the noise levels in training",
        choices=("lognormal", "uniform", "loss-second-moment", "vp", "ve", "iddpm", "ddpm"),
    )
    lr: float = option(1e-4, "learning rate", minimum=0)
    weight_decay: float = option(0.0, "weight decay", minimum=0)
    lr_anneal_steps: int = option(
        0, "steps over which the learning rate decreases linearly to 0; 0: constant", minimum=0
    )
    total_training_steps: int = option(
        0, "number of training steps; 0: lr_anneal_steps, or 600000 if that is 0 too", minimum=0
    )
    total_kimg: float = option(
        0.0, "length of training in thousands of images, instead of total_training_steps; 0: use steps", minimum=0
    )
    lr_rampup_kimg: float = option(
        0.0, "thousands of images over which the learning rate rises linearly from 0 (EDM: 10000); 0: no warm-up",
        minimum=0,
    )
    lr_decay_steps: int = option(
        0, "steps after which the learning rate falls as 1 / sqrt(step) (EDM2: 70000); 0: never", minimum=0
    )
    global_batch_size: int = option(
        2048, "images per step, summed over all ranks", minimum=1, maximum=LARGEST_BATCH
    )
    batch_size: int = option(
        -1, "images per step and rank; -1: global_batch_size divided by the number of ranks", minimum=-1,
        maximum=LARGEST_BATCH,
    )
    microbatch: int = option(
        -1, "images per forward pass, to save memory; -1: all at once; without dropout, the result is the same up to "
        "rounding", minimum=-1,
    )
    ema_rate: str = option(
        "0.9999", "decay rates of the weight averages per step, comma-separated; 500kimg: half-life of 500,000 images; "
        "power0.05: power-function average of relative width 0.05, see ema_snapshot_interval"
    )
    ema_snapshot_interval: int = option(
        0, "steps between snapshots of the power-function averages, from which posthoc_ema.py makes averages of any "
        "width; 0: none", minimum=0,
    )
    ema_halflife_kimg: float = option(
        0.0, "adds a weight average with this half-life in thousands of images (EDM: 500); replaces the default of "
        "ema_rate; 0: none", minimum=0,
    )
    ema_rampup_ratio: float = option(
        0.05, "warm-up of the weight averages: limits their half-lives to this fraction of the images seen so far; 0: "
        "none, as in consistency_models", minimum=0,
    )
    ema_device: str = option(
        "same", "device of the weight averages: same as the network, or cpu, which saves GPU memory and some GPU time; "
        "no effect on a run without GPUs", choices=("same", "cpu", "cuda"),
    )
    grad_clip: float = option(
        0.0, "largest L2 norm of the gradient over all parameters, of the batch over all ranks; larger gradients are "
        "scaled down to it; 0: no limit", minimum=0,
    )
    shard_ema: bool = option(False, "each rank keeps a shard of the weight averages; no effect on the result")
    shard_optimizer: bool = option(
        False, "each rank keeps a shard of the optimizer state (ZeRO-1); no effect on the result"
    )
    parallel: str = option(
        "ddp", "how several ranks share a run; ddp: each holds the networks; fsdp: networks, gradients, optimizer and "
        "averages are divided among all ranks; hsdp: among the ranks of a machine, and each machine has a copy",
        choices=("ddp", "hsdp", "fsdp"),
    )
    shard_size: int = option(
        0, "hsdp: number of ranks that the networks are divided among; 0: the ranks of a machine", minimum=0
    )
    optimizer: str = option("radam", "optimizer", choices=("radam", "adam", "adamw"))
    adam_beta1: float = option(0.9, "decay rate of the optimizer's mean of gradients", minimum=0, below=1)
    adam_beta2: float = option(0.999, "decay rate of the optimizer's mean of squared gradients", minimum=0, below=1)
    adam_eps: float = option(1e-8, "number that the optimizer adds to the square root of that mean", minimum=0)
    fp16_scale_growth: float = option(
        1e-3, "increase of log2 of the fp16 loss scale after each successful step", minimum=0
    )
    dry_run_ranks: int = option(
        0, "number of ranks with one GPU each for which --dry_run computes the memory; 0: the ranks it runs on",
        minimum=0,
        aliases=("plan_ranks",),
    )
    log_interval: int = option(10, "steps between log rows", minimum=1)
    save_interval: int = option(10000, "steps between checkpoints", minimum=1)
    tick_kimg: float = option(
        0.0, "length of a tick in thousands of images, instead of log_interval (EDM: 50); each tick writes a log row, "
        "a status line and a line of stats.jsonl; 0: use log_interval, without these", minimum=0, aliases=("tick",),
    )
    snapshot_ticks: int = option(
        0, "ticks between checkpoints, instead of save_interval (EDM: 50); 0: use save_interval", minimum=0,
        aliases=("snap",),
    )
    state_dump_ticks: int = option(
        0, "same as snapshot_ticks, for EDM's commands; every checkpoint holds averages and training state, so the "
        "more frequent of the two counts", minimum=0, aliases=("dump",),
    )
    checkpoint_dir: str = option("", "folder or blobfile URL for checkpoints; empty: log_dir")
    keep_checkpoints: int = option(
        3, "number of newest checkpoints to keep, besides the one named in best.json and the averages of milestones; "
        "0: all; if it is not given, a resumed run keeps as many as before", minimum=0
    )
    milestone_interval: int = option(
        -1, "always keep the weight averages of steps that are multiples of this number; -1: of every tenth "
        "checkpoint; 0: none", minimum=-1,
    )
    checkpoint_format: str = option(
        "files", "files: rank 0 writes each part of a checkpoint to a file; dcp: every rank writes its share into "
        "folders that torch.distributed.checkpoint reads, too; any run resumes from either", choices=("files", "dcp"),
    )
    async_save: bool = option(
        False, "dcp: train on while a checkpoint is written, with a copy of it in the memory of the CPU"
    )
    on_save_error: str = option(
        "stop", "if a checkpoint cannot be written: stop the run, or continue without it", choices=("stop", "continue")
    )
    profile: int = option(
        0, "number of steps to trace after a short warm-up: writes a table of the slowest operations to the log and "
        "profile.txt, and the trace to profile_trace.json.gz; 0: none", minimum=0,
    )
    timeout_seconds: float = option(
        600.0, "time after which a rank that waits for another ends the job, also while rank 0 saves", minimum=1,
        maximum=LONGEST_WAIT_S,
    )
    grace_seconds: float = option(
        60.0, "time for all ranks to finish their step after SIGTERM, SIGINT or SIGUSR1; saving is not counted",
        minimum=0, maximum=LONGEST_WAIT_S,
    )
    resume_checkpoint: str = option(
        "", "start from this model file, and from its optimizer and averages if they are in the same folder"
    )
    resume: str = option(
        "auto", "auto: resume from the newest checkpoint of the run; never: refuse a folder with a checkpoint; or the "
        "path of a checkpoint to resume from: its manifest, one of its files, or its folder"
    )
    allow_other_classes: bool = option(
        False, "go on from a checkpoint or a teacher, with a warning, although its list of classes is not that of the "
        "data, so that class numbers change their meaning; without this flag it is refused"
    )


@dataclass(frozen=True)
class EvalConfig(ExtractorConfig):
    """sampling and evaluation during training"""

    eval_interval: int = option(
        0, "steps between evaluations of the Frechet distance of samples from eval_ref; 0: none", minimum=0
    )
    eval_ref: str = option("", "npz of reference images or statistics")
    eval_samples: int = option(10000, "number of images per evaluation", minimum=2)
    sample_interval: int = option(
        0, "steps between image grids of samples in log_dir/samples; -1: at each save; 0: none", minimum=-1
    )
    eval_sampler: str = option(
        "", "sampler for evaluation and grids; empty: heun for edm, onestep for consistency models, progdist for "
        "progdist",
        choices=("", *SAMPLER_NAMES), table="sampler",
    )
    eval_steps: int = option(40, "same as --steps of image_sample.py", minimum=1, maximum=MOST_STEPS)
    eval_ts: str = option("", "same as --ts of image_sample.py")
    eval_seed: int = option(42, "same as --seed of image_sample.py", minimum=0, maximum=LARGEST_SEED)
    eval_batch_size: int = option(
        64, "images per rank and forward pass; no effect on the images beyond rounding", minimum=1
    )
    eval_ema_rate: str = option("", "entry of ema_rate that names the average to sample from; empty: the first")
    allow_non_finite: bool = option(
        False, "go on with a warning if samples have NaN or infinite pixels, instead of ending with an error"
    )


TRAINING_SECTIONS = (
    ModelConfig, DiffusionConfig, ObjectiveConfig, ConsistencyConfig, FewStepConfig, DataConfig, TrainConfig,
    EvalConfig, VaeConfig, RunConfig,
)
"""The flags of every training command."""

FIRST_OF_TRAINING = ("data_dir", "log_dir", "image_size", "class_cond", "num_channels", "global_batch_size",
                     "microbatch", "lr", "total_training_steps", "precision")
FIRST_OF_DISTILLATION = ("data_dir", "log_dir", "training_mode", "teacher_model_path", "loss_norm",
                         "global_batch_size", "microbatch", "lr", "total_training_steps", "precision")
"""The flags of each command that --help shows without `all`."""
