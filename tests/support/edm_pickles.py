"""Pickles in the format of NVlabs/edm and NVlabs/edm2: a stand-in of their persistence.

Its modules carry source code that runs.

`dump` writes what EDM's `pickle.dump(dict(ema=net, ...))` would: the same globals, calls and states. Unpickled in the
usual way, with `torch_utils` importable, the file would execute `module_src`; here that source creates a file.
"""

import io
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch as th

from cm.networks.edm import EDM_NETWORKS

# Classes of this toolkit -> EDM's, where they are called otherwise.
CLASSES = {"GroupNorm32": "GroupNorm", "Conv": "Conv2d", "ConvDown": "Conv2d", "Resample": "Conv2d",
           "EDM2Block": "Block", "EDM2UNet": "UNet"}
KWARGS = {
    "ddpmpp": dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=4, augment_dim=9, model_channels=16,
                   channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.13),
    "adm": dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=4, augment_dim=0, model_channels=64,
                channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.1),
}
KWARGS["ncsnpp"] = KWARGS["ddpmpp"] | {"embedding_type": "fourier", "channel_mult_noise": 2,
                                       "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
KWARGS["ddpmpp"] |= {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
                     "decoder_type": "standard", "resample_filter": [1, 1], "label_dropout": 0}
EDM2_KWARGS = dict(img_resolution=8, img_channels=4, label_dim=4, model_channels=16, channel_mult=[1, 2], num_blocks=1,
                   attn_resolutions=[4], dropout=0.1, channels_per_head=16)


def network(arch, **changes):
    """A tiny network of KWARGS all of whose parameters are drawn at random."""
    th.manual_seed(0)
    ours = {name: value for name, value in KWARGS[arch].items() if name not in ("decoder_type", "label_dropout")}
    model = EDM_NETWORKS[arch](**{**ours, **changes})
    with th.no_grad():
        for param in model.parameters():
            if not param.any():
                param.normal_(std=0.1)
    return model


def stand_in():
    """A module torch_utils.persistence whose one function can be pickled by its name, as EDM's can."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"], {})
        raise AssertionError("this reader ran the source code of a pickle")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    return module


class Persistent:
    """Pickles as EDM's persistent objects do: a call with the source of the class and the state of the object."""

    def __init__(self, class_name, state, source):
        self.class_name, self.state_of, self.source = class_name, state, source

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name,
                "state": self.state_of}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def module_state(module, source, **attributes):
    """A torch module's __dict__ as EDM's classes have it, with records for its children."""
    children = {name: persistent(child, source) for name, child in module.named_children()}
    return {
        "training": False, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(), "_backward_hooks": {}, "_modules": children, **attributes,
    }


def persistent(module, source, **attributes):
    if isinstance(module, th.nn.ModuleDict):
        container = th.nn.ModuleDict()
        container.__dict__["_modules"] = {name: persistent(child, source) for name, child in module.items()}
        return container
    name = type(module).__name__
    attributes = {"skip_scale": np.sqrt(0.5), "dropout": 0.13, **attributes} if name == "UNetBlock" else attributes
    return Persistent(CLASSES.get(name, name), module_state(module, source, **attributes), source)


def net_of(model, kwargs, precond="EDMPrecond", source="", args=(), **attributes):
    """A preconditioning around a network of this toolkit, which has EDM's names."""
    inner = persistent(model, source, _init_args=args, _init_kwargs=kwargs)
    constants = {
        "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
        "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.001},
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
        "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
    }[precond]
    state = {"training": False, "_parameters": {}, "_buffers": {}, "_modules": {"model": inner}, "img_channels": 3,
             "use_fp16": False, **constants, **attributes}
    return Persistent(precond, state, source)


def edm2_network():
    """A tiny network of EDM2_KWARGS, with numbers that float16 holds, as published files have them."""
    th.manual_seed(0)
    ours = {name: value for name, value in EDM2_KWARGS.items() if name != "img_channels"}
    model = EDM_NETWORKS["edm2"](in_channels=4, out_channels=4, **ours)
    with th.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("gain"):
                param.fill_(0.75)
    return model.half().float()


def edm2_net_of(model, kwargs, source="", **attributes):
    """EDM2's `Precond` around a network of this toolkit, which has EDM2's names, in float16."""
    parts = {name: persistent(child.half(), source) for name, child in model.named_children() if name != "unet"}
    parts["unet"] = persistent(model.unet.half(), source, _init_args=(), _init_kwargs=kwargs)
    state = {"training": False, "_parameters": {}, "_buffers": {}, "_modules": parts, "img_resolution": 8,
             "img_channels": 4, "label_dim": 4, "use_fp16": True, "sigma_data": 0.5,
             "_init_args": (), "_init_kwargs": kwargs, **attributes}
    return Persistent("Precond", state, source)


def latent_encoder(source=""):
    """What lies beside the network of latents: its state has numpy arrays."""
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    return Persistent("StabilityVAEEncoder", {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "_vae": None,
                                              "bias": -np.float32([5.81, 3.25, 0.12, -2.15]) * scale}, source)


def dump(path, net, source="", protocol=4, **others):
    """Write the pickle; numpy 1 and 2 name their scalars differently, and so do these files by protocol."""
    content = {"ema": net, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}, source), "augment_pipe": None,
               "dataset_kwargs": {"path": "cifar10.zip", "use_labels": True}, **others}
    saved = {name: sys.modules.get(name) for name in ("torch_utils", "torch_utils.persistence")}
    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    sys.modules["torch_utils.persistence"] = stand_in()
    try:
        buffer = io.BytesIO()
        pickle.dump(content, buffer, protocol=protocol)
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    Path(path).write_bytes(buffer.getvalue())
    return path


def creates(path):
    """Source code that leaves a trace where it runs."""
    return f"open({str(path)!r}, 'w').close()\n"
