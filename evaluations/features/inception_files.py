"""The published files of Inception-v3's weights: names, addresses, hashes, and how one of them is found."""

from __future__ import annotations

from cm.distributed import setup as dist
from cm.errors import UserError
from cm.io.downloads import DOWNLOAD_ERRORS, WeightFile, download, has_right_hash, path_of, where_files_go
from evaluations.defaults import EXTRACTOR_VARIABLE

GRAPH = WeightFile(
    "classify_image_graph_def.pb",
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
    None,
)
PYTORCH_FID = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
)
TORCH_FIDELITY = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
)
OPENAI = WeightFile(
    "inception-2015-12-05.pt",
    "https://openaipublic.blob.core.windows.net/consistency/inception/inception-2015-12-05.pt",
    None,
)

# kind of extractor -> files that serve it, in the order in which they are looked for; the first is downloaded
FILES = {"tf": (GRAPH,), "torch": (PYTORCH_FID, TORCH_FIDELITY, OPENAI, GRAPH)}


def find_weights(kind: str) -> str:
    """Path of a file for this kind of extractor, in the cache or downloaded to it. All ranks must call it together.

    :raises UserError: on every rank, if there is none and none can be had, or the one there is not the published one.
    """
    dist.on_main(find_here, kind)                      # first, so that the others find the file
    return find_here(kind)                                  # on another machine's disk it may be missing still


def find_here(kind: str) -> str:
    """As `find_weights`, for this process alone."""
    files = FILES[kind]
    found = next((file for file in files if path_of(file).exists()), files[0])
    if not path_of(found).exists():
        try:
            download(found)
        except DOWNLOAD_ERRORS as error:
            raise UserError(
                f"no weights of Inception-v3 were found, and {found.name} cannot be downloaded ({error}). On a "
                f"machine with internet access, download one of these and put it here:\n{where_files_go(files)}\n"
                f"Or name a file with --inception PATH or {EXTRACTOR_VARIABLE}=PATH; a TorchScript extractor of "
                "your own, such as scripts/classifier_train.py writes, will do as well."
            ) from None
    if not has_right_hash(found):
        raise UserError(
            f"{path_of(found)} is not the published file: its SHA-256 does not begin with {found.sha256_prefix}. "
            f"Delete it, so that it is downloaded again from {found.url}"
        )
    return str(path_of(found))
