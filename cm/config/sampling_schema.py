"""The flags for using a trained model: sampling, editing, search, conversion, averages of other widths."""

from __future__ import annotations

from dataclasses import dataclass

from cm.config.flags import option
from cm.config.objective_schema import TRAINING_MODES
from cm.config.schema import EDIT_NAMES, MOST_STEPS, SAMPLER_NAMES, ExtractorConfig, WeightsConfig


@dataclass(frozen=True)
class SampleConfig:
    """sampling"""

    model_path: str = option("", "checkpoint to sample from")
    training_mode: str = option(
        "edm", "training method of the checkpoint", choices=TRAINING_MODES, table="training_mode"
    )
    sampler: str = option(
        "", "sampler; see docs/samplers.md; empty: heun for diffusion models, onestep (with ts: multistep) for "
        "consistency models, flowmap for flow maps, progdist for students of progressive distillation",
        choices=("", *SAMPLER_NAMES), table="sampler",
    )
    steps: int = option(
        40, "number of sampler steps; for multistep, the number of noise levels that ts indexes", minimum=1,
        maximum=MOST_STEPS,
    )
    ts: str = option(
        "", "multistep: indices of noise levels, such as 0,22,39; must end with steps-1, which costs no evaluation"
    )
    num_samples: int = option(10000, "number of images", minimum=1)
    batch_size: int = option(16, "images per rank and forward pass; no effect on the images beyond rounding", minimum=1)
    generator: str = option(
        "determ", "determ, determ-indiv: an image depends only on seed and index; dummy: use torch's global generator",
        choices=("determ", "determ-indiv", "dummy"),
    )
    class_label: str = option(
        "-1", "generate only these classes: a number or a name, or several with commas, such as cat,dog; -1: random "
        "classes"
    )
    clip_denoised: bool = option(True, "clamp denoised images to [-1, 1] in every step")
    s_churn: float = option(0.0, "amount of stochastic churn, for heun, euler, dpm and ablation", minimum=0)
    s_tmin: float = option(0.0, "lowest noise level at which churn, sde and ito add noise", minimum=0)
    s_tmax: float = option(
        float("inf"), "highest noise level at which churn, sde and ito add noise", minimum=0,
        infinite=True,
    )
    s_noise: float = option(1.0, "churn: standard deviation of the added noise", minimum=0)
    allow_non_finite: bool = option(
        False, "write images with NaN or infinite pixels, as black, with a warning, instead of ending with an error"
    )


@dataclass(frozen=True)
class AblationConfig:
    """sampler ablation: separate choices of solver, levels and scaling; any of these flags selects it"""

    solver: str = option("heun", "ablation: ODE solver", choices=("euler", "heun"))
    disc: str = option(
        "edm", "ablation: discretisation of the noise levels", choices=("vp", "ve", "iddpm", "edm")
    )
    schedule: str = option(
        "linear", "ablation: noise level as a function of time", choices=("vp", "ve", "linear")
    )
    scaling: str = option("none", "ablation: scale of the image as a function of time", choices=("vp", "none"))
    alpha: float = option(
        1.0, "ablation, heun: position of the second evaluation within a step, from 0 to 1", minimum=0
    )


@dataclass(frozen=True)
class SolverConfig(AblationConfig):
    """options of individual samplers"""

    rho: float = option(
        7.0, "exponent of the Karras grid; larger values place more levels near sigma_min; not used by onestep, ddim "
        "and pc", minimum=1, maximum=1e6,
    )
    eta: float = option(
        -1.0, "ddim, sde, ito: amount of fresh noise, from 0 (DDIM, the ODE) to 1 (DDPM, the reverse SDE); -1: default "
        "of the sampler: 0 for ddim, 1 for sde and ito", minimum=-1,
    )
    spacing: str = option(
        "ends", "ddim: which timesteps; ends: evenly from the last to the first; uniform: as in the published code of "
        "DDIM and SA-DPM (900, 800, ..., 0 for 10 of 1000); quad: squares, more of them near the image",
        choices=("ends", "uniform", "quad"),
    )
    ito_form: str = option(
        "exp", "ito: exponential integrator with one forward-mode pass per step, or Ito-Taylor expansion in sigma",
        choices=("exp", "taylor"),
    )
    ito_laplacian: str = option(
        "hutchinson", "ito with --ito_form taylor: estimate the Laplacian with one random probe, or drop it (none), "
        "which reduces the order to 1",
        choices=("hutchinson", "none"),
    )
    pc_sde: str = option("ve", "pc: process that defines noise levels and steps", choices=("ve", "vp"))
    snr: float = option(0.16, "pc: signal-to-noise ratio of the corrector", minimum=0)
    corrector_steps: int = option(1, "pc: corrector steps at each noise level", minimum=0, maximum=MOST_STEPS)


@dataclass(frozen=True)
class GuidanceConfig:
    """guidance"""

    guide_scale: float = option(
        1.0, "strength w of guidance by a worse network, D_guide + w (D - D_guide): the model itself without its class "
        "(classifier-free), or guide_path (autoguidance); 1: none", minimum=0,
    )
    guide_path: str = option(
        "", "checkpoint of the guiding network, such as an earlier or smaller one; its flags come from its manifest"
    )
    guide_interval: str = option(
        "", "noise levels lo,hi at which guide_scale acts: lo < sigma <= hi; elsewhere the guide is not evaluated; "
        "empty: all"
    )
    classifier_path: str = option("", "classifier of noisy images, trained with classifier_train.py --noised True")
    classifier_scale: float = option(1.0, "strength of the classifier's guidance; 0: none", minimum=0)


@dataclass(frozen=True)
class ConvertConfig(WeightsConfig):
    """conversion"""

    source: str = option(
        "", "folder of a run, weights file of this toolkit or guided-diffusion, safetensors file, model folder, EDM "
        "pickle (.pkl) or diffusers folder; may be given as the first argument without the flag"
    )
    dest: str = option(
        "", "folder to write, or file for safetensors; may be given as the second argument without the flag"
    )
    format: str = option(
        "native", "native: a checkpoint of this toolkit; safetensors: one file with the flags of the network in its "
        "metadata; hf: a folder as model hubs have them, with a model card; diffusers: a ConsistencyModelPipeline; "
        "files, dcp: the complete checkpoint of a run in that checkpoint_format, to resume from",
        choices=("native", "safetensors", "hf", "diffusers", "files", "dcp"), aliases=("to",),
    )
    license: str = option("", "hf: licence for the model card, such as mit or cc-by-4.0", aliases=("licence",))
    results: str = option(
        "", "hf: results for the model card: files that evaluator.py or fid.py wrote with --json, comma-separated"
    )
    picture: str = option("", "hf: picture of samples for the model card")
    training_mode: str = option(
        "edm", "training method of the weights, if they do not contain it", choices=TRAINING_MODES,
        table="training_mode",
    )
    num_train_timesteps: int = option(
        0, "diffusers: number of noise levels the consistency model was trained with; 0: from its checkpoint, or 40 "
        "for a distilled model", minimum=0,
    )


@dataclass(frozen=True)
class EditConfig(SampleConfig):
    """editing"""

    task: str = option("inpaint", "editing task", choices=EDIT_NAMES)
    images: str = option("", "folder, EDM zip or npz of images, or the word digits; not used by interpolate")
    num_samples: int = option(
        0, "number of results; if larger than the number of images, they are edited repeatedly; 0: one per image; "
        "interpolate: number of noise samples", minimum=0,
    )
    sampler: str = option(
        "", "sampler; see docs/samplers.md; empty: multistep for consistency models, heun for diffusion models, "
        "flowmap for flow maps, progdist for students of progressive distillation", choices=("", *SAMPLER_NAMES),
        table="sampler",
    )
    steps: int = option(
        40, "number of noise levels, or of sampler steps; default: those that the consistency model was trained with, "
        "or 40 where they were many or are not known", minimum=1, maximum=MOST_STEPS,
    )
    ts: str = option(
        "", "multistep: indices of noise levels, such as 0,22,39; must end with steps-1, which costs no evaluation; "
        "empty: all levels, as the paper does; for interpolate and denoise one evaluation"
    )
    mask: str = option("", "inpaint: PNG or npy of the image size; white or 1 marks known pixels")
    mask_box: str = option("", "inpaint, instead of mask: box to fill in, as top,left,height,width in pixels")
    superres_factor: int = option(8, "superres: enlargement factor per side", minimum=2)
    low_resolution: bool = option(
        False, "superres: the input images have side image_size / superres_factor; False: they have full size and "
        "are first reduced by averaging"
    )
    stroke_start: int = option(
        -1, "stroke: index of the noise level to start from; lower values add more noise and change more; -1: 16 of 40 "
        "levels, and the same share of another number", minimum=-1,
    )
    interpolate_pairs: str = option(
        "", "interpolate: pairs of sample indices of image_sample.py, such as 0:1,4:7; empty: neighbouring indices "
        "below num_samples",
    )
    interpolate_weights: str = option(
        "0,0.25,0.5,0.75,1", "interpolate: positions between the two images, 0 for the first and 1 for the second"
    )
    denoise_sigma: float = option(0.5, "denoise: standard deviation of the noise, for pixels in [-1, 1]")
    add_noise: bool = option(True, "denoise: first add this noise; False: the images are already noisy")


@dataclass(frozen=True)
class SeedsConfig:
    """selection of images"""

    seeds: str = option(
        "", "indices of the samples to generate, such as 0-63,100, in this order, instead of num_samples; 0-63 are "
        "the first 64 images of any run with the same --seed",
    )


@dataclass(frozen=True)
class PngConfig:
    """one file per image"""

    outdir: str = option(
        "", "write one PNG per seed into this folder, {seed:06d}.png, instead of an npz; run the same command again "
        "to resume",
    )
    subdirs: bool = option(False, "outdir: use a subfolder for every 1000 seeds")
    rounding: str = option(
        "truncate", "conversion from [-1, 1] to grey levels: truncate (guided-diffusion, consistency_models) or "
        "nearest (EDM)", choices=("truncate", "nearest"),
    )


@dataclass(frozen=True)
class TernarySearchConfig(ExtractorConfig):
    """search for multistep schedules"""

    begin: str = option("0", "indices at the start of the schedule, such as 0 or 0,10; points are searched above them")
    end: str = option(
        "39", "upper end of the search: steps-1, or fixed later indices such as 30,39; a single index below steps-1 "
        "only limits the search",
    )
    num_ts: int = option(1, "number of points to add, one at a time", minimum=1)
    ref_batch: str = option("", "npz of reference images or statistics")
    cache_gib: float = option(
        4.0, "memory per rank for shared network evaluations, in GiB; what does not fit is recomputed", minimum=0
    )


@dataclass(frozen=True)
class PosthocConfig(ExtractorConfig):
    """weight averages of any width"""

    run: str = option("", "folder of a training run; may be given as the first argument without the flag")
    std: str = option(
        "0.05", "relative widths of the averages, comma-separated; lo:hi stands for every hundredth, lo:hi:step for "
        "other steps"
    )
    step: int = option(0, "step at which the averages end; 0: the last one with a snapshot", minimum=0)
    extrapolate: bool = option(
        False, "also make averages that the snapshots determine poorly: more than 2.5 times as wide as the widest "
        "tracked average, or with a profile error above 5 %"
    )
    ref: str = option("", "npz of reference images or statistics: measure the Frechet distance of each average")
