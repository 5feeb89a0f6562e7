"""Every flag of the scripts: name, default, one sentence. Frozen; `cm.config.flags` turns them into command lines.

The choices stand here as words so that --help needs no import of torch; the tests hold them equal to the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm.config.flags import option

SAMPLER_NAMES = ("heun", "euler", "dpm", "ancestral", "onestep", "multistep", "progdist", "ddim", "pc", "sde",
                 "ito", "ablation")
OBJECTIVE_NAMES = ("edm", "cdm", "stf", "sadpm")
EDIT_NAMES = ("inpaint", "colorize", "superres", "stroke", "interpolate", "denoise")
TRAINING_MODES = ("edm", "consistency_distillation", "consistency_training", "progdist")


@dataclass(frozen=True)
class ModelConfig:
    """network (read off the checkpoint when one is given)"""

    arch: str = option(
        "unet", "unet: guided-diffusion's; EDM's: ddpmpp (DDPM++), ncsnpp (NCSN++), adm",
        choices=("unet", "ddpmpp", "ncsnpp", "adm"),
    )
    image_size: int = option(64, "side of the square images in pixels", minimum=1)
    num_channels: int = option(128, "width of the first level", minimum=1)
    num_res_blocks: int = option(2, "residual blocks per level", minimum=1)
    num_heads: int = option(4, "unet: attention heads, where num_head_channels is -1")
    num_heads_upsample: int = option(-1, "unet: attention heads of the decoder; -1 for num_heads")
    num_head_channels: int = option(
        -1, "unet: channels per attention head; -1 to set the number of heads instead; adm: -1 for 64"
    )
    attention_resolutions: str = option("32,16,8", "image sides at which the network attends, comma-separated")
    channel_mult: str = option("", "width of each level over num_channels, such as 1,2,4; empty for the size's default")
    dropout: float = option(0.0, "dropout probability", minimum=0)
    class_cond: bool = option(False, "condition on class labels")
    num_classes: int = option(0, "number of classes; 0 for as many as the data set has", minimum=0)
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(True, "unet: the time embedding scales and shifts (else: is added)")
    resblock_updown: bool = option(False, "unet: residual blocks change the resolution (else: convolutions do)")
    augment_dim: int = option(
        0, "EDM's networks: length of the labels that tell how an image was augmented; 0: none", minimum=0
    )
    use_fp16: bool = option(False, "fp16 network with fp32 master weights")
    use_new_attention_order: bool = option(
        False, "guided-diffusion weights only (their qkv weights have 3 axes): rows are q, k, v, not head by head"
    )
    learn_sigma: bool = option(False, "kept for old commands: noise levels are given here, so only False is legal")


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion"""

    sigma_min: float = option(0.002, "lowest noise level", minimum=0)
    sigma_max: float = option(80.0, "highest noise level", minimum=0)
    precond: str = option(
        "edm", "scalings around the network; all but edm: noise law and loss weight as published, too, unless given",
        choices=("edm", "vp", "ve", "iddpm", "ddpm"),
    )
    weight_schedule: str = option(
        "karras", "weight of the loss by noise level", choices=("karras", "snr", "snr+1", "truncated-snr", "uniform")
    )


@dataclass(frozen=True)
class RunConfig:
    """run"""

    log_dir: str = option("", "folder of logs and results; empty: OPENAI_LOGDIR, or a new folder for temporary files")
    seed: int = option(0, "seed: the same seed gives the same run", minimum=0)
    precision: str = option(
        "", "arithmetic of the network; auto: bf16 where the hardware is fast at it; empty: as use_fp16 says",
        choices=("", "auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(
        False, "compile the networks before their first step: seconds to minutes at the start, faster steps where a "
        "C++ compiler (CPU) or Triton (GPU) is there; the same results to rounding"
    )


@dataclass(frozen=True)
class DataConfig:
    """data"""

    data_dir: str = option("", "folder, EDM zip or npz of images, or `digits`: scikit-learn's handwritten digits")
    random_flip: bool = option(True, "mirror half of the images, left to right")
    augment: float = option(
        0.0, "EDM's non-leaky augmentation: probability of each transform of an image, of which the network is told "
        "(0.12 for CIFAR-10, 0.15 for 64x64); it mirrors too, so random_flip is off unless asked for; 0: none",
        minimum=0,
    )
    random_crop: bool = option(False, "crop at a random place, not at the centre")
    cache_gib: float = option(
        0.25, "a set that fits into so much memory per rank is decoded once and kept; 0: none is", minimum=0
    )
    num_workers: int = option(-1, "loader processes per rank; -1 chooses by the kind of data", minimum=-1)


@dataclass(frozen=True)
class TrainConfig:
    """training"""

    schedule_sampler: str = option(
        "lognormal", "law of the noise levels in training",
        choices=("lognormal", "uniform", "loss-second-moment", "vp", "ve", "iddpm", "ddpm"),
    )
    lr: float = option(1e-4, "learning rate", minimum=0)
    weight_decay: float = option(0.0, "weight decay", minimum=0)
    lr_anneal_steps: int = option(0, "steps over which the learning rate falls linearly to 0; 0: never", minimum=0)
    total_training_steps: int = option(
        0, "training ends after so many steps; 0: after lr_anneal_steps, or 600000 where that is 0 too", minimum=0
    )
    total_kimg: float = option(
        0.0, "training ends after so many thousand images, instead of total_training_steps; 0: by steps", minimum=0
    )
    lr_rampup_kimg: float = option(
        0.0, "the learning rate rises linearly from 0 over so many thousand images (EDM: 10000); 0: no rise", minimum=0
    )
    global_batch_size: int = option(2048, "images per step over all ranks", minimum=1)
    batch_size: int = option(-1, "images per step and rank; -1 for global_batch_size over the ranks")
    microbatch: int = option(-1, "images per forward pass, to save memory; -1 for all at once; no effect on the result")
    ema_rate: str = option(
        "0.9999", "decay rates of the weight averages, comma-separated; 500kimg is a half-life of 500 thousand images"
    )
    ema_halflife_kimg: float = option(
        0.0, "a weight average with a half-life of so many thousand images (EDM: 500), beside the rates given or "
        "instead of ema_rate's default; 0: none", minimum=0,
    )
    ema_rampup_ratio: float = option(
        0.05, "half-lives are no longer than this fraction of the images seen; 0: as long as they say from the start",
        minimum=0,
    )
    ema_device: str = option(
        "same", "where the averages live: same as the network, or cpu, which saves memory of the GPU and some of its "
        "time; no effect on a run without GPUs", choices=("same", "cpu", "cuda"),
    )
    shard_ema: bool = option(False, "each rank keeps a share of the averages; no effect on the result")
    shard_optimizer: bool = option(
        False, "each rank keeps a share of the optimizer's state (ZeRO-1); no effect on the result"
    )
    optimizer: str = option("radam", "optimizer", choices=("radam", "adam", "adamw"))
    fp16_scale_growth: float = option(1e-3, "growth of log2 of the fp16 loss scale per good step", minimum=0)
    dry_run_ranks: int = option(
        0, "--dry_run plans the memory of so many ranks with a GPU each; 0: of the ranks it is started with", minimum=0,
        aliases=("plan_ranks",),
    )
    log_interval: int = option(10, "steps between two rows of the log", minimum=1)
    save_interval: int = option(10000, "steps between two checkpoints", minimum=1)
    tick_kimg: float = option(
        0.0, "thousand images of a tick, instead of log_interval (EDM: 50); each ends with a row of the log, a status "
        "line and a line of stats.jsonl; 0: rows by steps, without these", minimum=0, aliases=("tick",),
    )
    snapshot_ticks: int = option(
        0, "ticks between two checkpoints, instead of save_interval (EDM: 50); 0: by steps", minimum=0,
        aliases=("snap",),
    )
    state_dump_ticks: int = option(
        0, "as snapshot_ticks, for EDM's commands: a checkpoint holds averages and training state alike, so the more "
        "frequent of both counts", minimum=0, aliases=("dump",),
    )
    checkpoint_dir: str = option("", "where checkpoints go, a folder or a blobfile URL; empty: log_dir")
    keep_checkpoints: int = option(
        0, "how many checkpoints stay, beside the one that best.json names; 0: all", minimum=0
    )
    milestone_interval: int = option(
        0, "weight averages of steps that are multiples of it stay whatever keep_checkpoints says; 0: none", minimum=0
    )
    on_save_error: str = option(
        "stop", "a checkpoint cannot be written: stop, or continue without", choices=("stop", "continue")
    )
    profile: int = option(
        0, "trace so many steps, after a short warm-up: a table of what took longest, in the log and in "
        "log_dir/profile.txt, and the trace beside it; 0: none", minimum=0,
    )
    timeout_seconds: float = option(
        600.0, "a rank that waits so long for another, also while rank 0 saves, ends the job", minimum=1
    )
    grace_seconds: float = option(
        60.0, "after SIGTERM, SIGINT or SIGUSR1 the ranks have so long to finish their step; a save may take longer",
        minimum=0,
    )
    resume_checkpoint: str = option(
        "", "start from this model file (with its optimizer and averages, where they lie beside it)"
    )
    resume: str = option(
        "auto", "auto: go on from the newest checkpoint of the run; never: refuse one; or the path of one to go on "
        "from: its manifest, its folder or one of its files"
    )


@dataclass(frozen=True)
class EvalConfig:
    """samples and their quality during training"""

    eval_interval: int = option(
        0, "steps between two measurements of the distance of samples from eval_ref; 0: none", minimum=0
    )
    eval_ref: str = option("", "npz of reference images or statistics")
    eval_samples: int = option(10000, "how many images are measured", minimum=2)
    inception: str = option("", "feature extractor: a file, or torch or tf for Inception; empty: CM_INCEPTION or torch")
    sample_interval: int = option(
        0, "steps between two pictures of samples, in log_dir/samples; -1: at each save; 0: none", minimum=-1
    )
    eval_sampler: str = option(
        "", "sampler of both; empty: heun for edm, onestep for consistency models, progdist for progdist",
        choices=("", *SAMPLER_NAMES),
    )
    eval_steps: int = option(40, "as --steps of image_sample.py", minimum=1)
    eval_ts: str = option("", "as --ts of image_sample.py")
    eval_seed: int = option(42, "as --seed of image_sample.py", minimum=0)
    eval_batch_size: int = option(64, "images per rank and pass; no effect on the images", minimum=1)
    eval_ema_rate: str = option("", "which average of ema_rate draws the samples; empty: the first")


@dataclass(frozen=True)
class ObjectiveConfig:
    """objective"""

    objective: str = option("edm", "what to minimise", choices=OBJECTIVE_NAMES)
    martingale_lambda: float = option(10.0, "cdm: weight of the regulariser", minimum=0)
    martingale_steps: int = option(6, "cdm: noise levels of a backward walk, ends included", minimum=2)
    martingale_sde: str = option(
        "t", "cdm: the walk's steps in the noise level, or in u = t^2, which has less bias", choices=("t", "u")
    )
    num_references: int = option(
        4096, "stf: reference images, the step's own batch included", minimum=1, aliases=("rbatch",)
    )
    num_consecutive_steps: int = option(2, "sadpm: neighbouring noise levels whose errors are added up", minimum=1)
    sa_lambda: float = option(0.2, "sadpm: weight of the sum", minimum=0, aliases=("lamda",))


@dataclass(frozen=True)
class ConsistencyConfig:
    """consistency models"""

    training_mode: str = option(
        "consistency_distillation", "what to train; edm: a diffusion model, as objective says", choices=TRAINING_MODES
    )
    teacher_model_path: str = option("", "EDM checkpoint to distil and to start from")
    teacher_dropout: float = option(0.1, "dropout of the teacher", minimum=0)
    loss_norm: str = option(
        "lpips", "distance between the two denoised images", choices=("l1", "l2", "l2-32", "lpips", "pseudo-huber")
    )
    target_ema_mode: str = option("fixed", "law of the target's decay rate", choices=("fixed", "adaptive"))
    scale_mode: str = option(
        "fixed", "law of the number of noise levels N(step)", choices=("fixed", "progressive", "progdist")
    )
    start_ema: float = option(0.0, "decay rate of the target (at the start, where it is adaptive)", minimum=0)
    start_scales: int = option(40, "number of noise levels N at the start", minimum=1)
    end_scales: int = option(40, "number of noise levels N at the end", minimum=1)
    distill_steps_per_iter: int = option(50000, "steps per halving of progressive distillation", minimum=1)


@dataclass(frozen=True)
class SampleConfig:
    """sampling"""

    model_path: str = option("", "checkpoint to sample from")
    training_mode: str = option("edm", "what the checkpoint was trained as", choices=TRAINING_MODES)
    sampler: str = option("heun", "sampler", choices=SAMPLER_NAMES)
    steps: int = option(
        40, "steps of the sampler; for multistep the number of noise levels that ts points into", minimum=1
    )
    ts: str = option("", "multistep: indices into the noise levels, such as 0,22,39; the last only closes the list")
    num_samples: int = option(10000, "how many images", minimum=1)
    batch_size: int = option(16, "images per rank and pass; no effect on the images", minimum=1)
    generator: str = option(
        "determ", "determ, determ-indiv: an image depends on seed and index alone; dummy: torch's global generator",
        choices=("determ", "determ-indiv", "dummy"),
    )
    class_label: int = option(-1, "draw this class only; -1 for random classes")
    clip_denoised: bool = option(True, "clamp every denoised image to [-1, 1]")
    s_churn: float = option(0.0, "heun, dpm, ablation: amount of noise added back", minimum=0)
    s_tmin: float = option(0.0, "lowest noise level at which churn, sde and ito add noise", minimum=0)
    s_tmax: float = option(float("inf"), "highest noise level at which churn, sde and ito add noise", minimum=0)
    s_noise: float = option(1.0, "churn: standard deviation of the noise", minimum=0)


@dataclass(frozen=True)
class AblationConfig:
    """sampler ablation: the choices of other samplers, one by one; any of these flags chooses it"""

    solver: str = option("heun", "ablation: solver of the ODE", choices=("euler", "heun"))
    disc: str = option(
        "edm", "ablation: how the noise levels of the steps are chosen", choices=("vp", "ve", "iddpm", "edm")
    )
    schedule: str = option(
        "linear", "ablation: how the noise level rises in time", choices=("vp", "ve", "linear")
    )
    scaling: str = option("none", "ablation: how the image is scaled in time", choices=("vp", "none"))
    alpha: float = option(1.0, "ablation, heun: share of a step after which the second slope is taken", minimum=0)


@dataclass(frozen=True)
class SolverConfig(AblationConfig):
    """options of single samplers"""

    rho: float = option(
        7.0, "noise levels: larger crowds them near sigma_min; onestep, ddim and pc have their own", minimum=1
    )
    eta: float = option(
        -1.0, "ddim, sde, ito: fresh noise, from 0 for none (DDIM, the ODE) to 1 (DDPM, the reverse SDE); -1 for the "
        "sampler's own: ddim 0, sde and ito 1", minimum=-1,
    )
    ito_form: str = option(
        "exp", "ito: exponential integrator, one forward-mode pass a step, or Ito-Taylor in sigma",
        choices=("exp", "taylor"),
    )
    ito_laplacian: str = option(
        "hutchinson", "ito, taylor form: the Laplacian by one random probe, or none, which costs half an order",
        choices=("hutchinson", "none"),
    )
    pc_sde: str = option("ve", "pc: the process whose noise levels and steps are used", choices=("ve", "vp"))
    snr: float = option(0.16, "pc: signal-to-noise ratio of the corrector", minimum=0)
    corrector_steps: int = option(1, "pc: steps of the corrector at each noise level", minimum=0)


@dataclass(frozen=True)
class GuidanceConfig:
    """classifier guidance"""

    classifier_path: str = option("", "classifier of noisy images, made by classifier_train.py --noised True")
    classifier_scale: float = option(1.0, "how strongly it pulls towards the class; 0 for not at all", minimum=0)


@dataclass(frozen=True)
class ConvertConfig:
    """conversion"""

    source: str = option(
        "", "EDM pickle (.pkl), folder of diffusers, or file of weights of this toolkit or guided-diffusion; also the "
        "first word of the command"
    )
    dest: str = option("", "folder to write; also the second word of the command")
    format: str = option(
        "native", "native: a checkpoint of this toolkit; diffusers: a ConsistencyModelPipeline",
        choices=("native", "diffusers"),
    )
    training_mode: str = option(
        "edm", "what the weights were trained as, where they do not tell", choices=TRAINING_MODES
    )
    num_train_timesteps: int = option(
        0, "diffusers: noise levels of the grid that a consistency model was trained on; 0: as its checkpoint says, or "
        "40 for a distilled one", minimum=0,
    )


@dataclass(frozen=True)
class EditConfig(SampleConfig):
    """editing"""

    task: str = option("inpaint", "what to do with the images", choices=EDIT_NAMES)
    images: str = option("", "folder, EDM zip or npz of images, or `digits`; interpolate needs none")
    num_samples: int = option(
        0, "how many results; more than there are images edits them again; 0: one of each image; interpolate: "
        "how many noises", minimum=0,
    )
    sampler: str = option("multistep", "sampler", choices=SAMPLER_NAMES)
    ts: str = option("0,22,39", "multistep: indices into the noise levels; the last only closes the list")
    mask: str = option("", "inpaint: PNG or npy of the images' size; white or 1 where the pixels are known")
    mask_box: str = option("", "inpaint, instead of mask: top,left,height,width in pixels of what is to be filled in")
    superres_factor: int = option(8, "superres: pixels of the result per pixel of the input", minimum=2)
    low_resolution: bool = option(
        False, "superres: the images are small, image_size / superres_factor; else large, and averaged first"
    )
    stroke_start: int = option(
        16, "stroke: index into the `steps` noise levels to begin at; lower adds more noise and changes more", minimum=0
    )
    interpolate_pairs: str = option(
        "", "interpolate: pairs of sample indices of image_sample.py, such as 0:1,4:7; empty: neighbours among "
        "num_samples",
    )
    interpolate_weights: str = option(
        "0,0.25,0.5,0.75,1", "interpolate: places between the two, 0 for the first and 1 for the second"
    )
    denoise_sigma: float = option(0.5, "denoise: standard deviation of the noise, where pixels lie in [-1, 1]")
    add_noise: bool = option(True, "denoise: add that noise first; False: the images are noisy already")


@dataclass(frozen=True)
class SeedsConfig:
    """which images"""

    seeds: str = option(
        "", "draw these samples, such as 0-63,100, in this order, instead of num_samples: 0-63 are the first 64 "
        "images of any run with the same --seed",
    )


@dataclass(frozen=True)
class PngConfig:
    """images in files of their own"""

    outdir: str = option(
        "", "write one PNG per seed into this folder, {seed:06d}.png, instead of an npz; a stopped run goes on with "
        "the same command",
    )
    subdirs: bool = option(False, "outdir: a folder for each 1000 seeds")
    rounding: str = option(
        "truncate", "from [-1, 1] to grey levels: truncate, as guided-diffusion and consistency_models do, or nearest, "
        "as EDM does", choices=("truncate", "nearest"),
    )


@dataclass(frozen=True)
class TernarySearchConfig:
    """search of multistep schedules"""

    begin: str = option("0", "indices that the schedule starts with, such as 0 or 0,10; points are looked for above")
    end: str = option(
        "39", "points are looked for below: steps-1, or later indices that stay, such as 30,39; a single index below "
        "steps-1 only limits the search",
    )
    num_ts: int = option(1, "how many points to add, one at a time", minimum=1)
    ref_batch: str = option("", "npz of reference images or statistics")
    inception: str = option("", "feature extractor: a file, or torch or tf for Inception; empty: CM_INCEPTION or torch")
    cache_gib: float = option(
        4.0, "memory per rank for shared evaluations, in GiB; what does not fit is evaluated again", minimum=0
    )


TRAINING_SECTIONS = (
    ModelConfig, DiffusionConfig, ObjectiveConfig, ConsistencyConfig, DataConfig, TrainConfig, EvalConfig, RunConfig,
)
"""The flags of every training command."""
