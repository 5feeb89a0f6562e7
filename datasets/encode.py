"""Encode images to latents of a VAE, to train a latent diffusion model: means and standard deviations, as in EDM2.

python datasets/encode.py --vae sd-vae-ft-mse --source imagenet-512x512.zip --dest imagenet-512-latents.zip

The VAE is the folder of a diffusers AutoencoderKL; nothing is downloaded. With mpiexec, the ranks divide the images.
Run the same command again to resume an interrupted conversion.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cm.config.parser import Parser, add_device, positive
from cm.data.decode import centre_crop
from cm.data.destinations import output_of, write_labels, writing
from cm.data.labelled import LabelledImages, open_labelled
from cm.data.latents import EDM2, PIXELS, RECORD, LatentRecord
from cm.errors import UserError
from cm.io import atomic, storage
from cm.io.outputs import check_outputs
from cm.io.progress import progress
from cm.io.terminal import without_controls

if TYPE_CHECKING:
    from cm.generate.vae import Vae

SCALINGS = ("measured", "edm2")
PART = 200                                      # images of a part, which is the least that is kept
PARTS, RECIPE, LABELS = ".parts", "encode.json", "labels.json"
WAIT_S = 7 * 24 * 3600.0                        # ranks finish at different times, and rank 0 then writes the result


# ---- images to moments ----


@dataclass(frozen=True)
class Encoder:
    """Makes the arrays of images.

    :param side: of the images in pixels; None for that of the first image.
    :param cropped: whether larger images are cropped and resized to it.
    """

    images: LabelledImages
    vae: Vae
    side: int
    cropped: bool

    def pixels(self, indices: range) -> tuple[np.ndarray, list[Any]]:
        """uint8 [N,S,S,3] and N labels.

        :raises UserError: for an image that cannot be read or has another size.
        """
        found = [self._one(i) for i in indices]
        return np.stack([image for image, _ in found]), [label for _, label in found]

    def _one(self, i: int) -> tuple[np.ndarray, Any]:
        image, label = self.images.read(i)
        image = image.convert("RGB")
        if self.cropped:
            return centre_crop(image, self.side), label
        if image.size != (self.side, self.side):
            raise UserError(f"{self.images.name(i)} is {image.width}x{image.height}, and the first image has side "
                            f"{self.side}: give --resolution, which crops and resizes all images")
        return np.asarray(image), label

    def parts(self, parts: list[range]) -> Iterator[tuple[range, np.ndarray, list[Any]]]:
        """For each part its means and standard deviations [N,2C,H,W] and its labels; the next one is read meanwhile.

        :raises UserError: if the VAE makes no numbers of an image.
        """
        import torch as th

        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(self.pixels, part) for part in parts[:1]]
            for part, following in zip(parts, [*parts[1:], None]):
                pixels, labels = waiting.pop().result()
                if following is not None:
                    waiting.append(reader.submit(self.pixels, following))
                images = th.from_numpy(pixels).permute(0, 3, 1, 2)
                chunks = images.split(self.vae.batch_size)          # as floats, a part would be large
                moments = np.concatenate([self.vae.encode(chunk.float() / 127.5 - 1).cpu().numpy() for chunk in chunks])
                self._check(part, moments)
                yield part, moments, labels

    def _check(self, part: range, moments: np.ndarray) -> None:
        """:raises UserError: if the VAE makes no numbers of an image."""
        bad = ~np.isfinite(moments).all(axis=(1, 2, 3))
        if bad.any():
            name = self.images.name(part[int(bad.argmax())])
            raise UserError(f"the VAE makes NaN or infinite latents of {int(bad.sum())} of {len(part)} images, the "
                            f"first is {name}: its weights are damaged or too large; fetch it again")


def make_encoder(images: LabelledImages, vae: Vae, resolution: int | None) -> Encoder:
    """:raises UserError: for a size that the VAE does not take."""
    side, factor = resolution, vae.loaded.factor
    if side is None:
        first: Image.Image = images.read(0)[0]
        side = first.width
        if first.width != first.height:
            raise UserError(f"{images.name(0)} is {first.width}x{first.height}, and images must be square: give "
                            "--resolution, which crops and resizes all images")
    if side % factor:
        raise UserError(f"images of side {side}: the VAE {vae.loaded.name} takes multiples of {factor}; give "
                        f"--resolution {max(1, side // factor) * factor}")
    return Encoder(images, vae, side, cropped=resolution is not None)


# ---- parts that are kept until all are there ----


class Parts:
    """A folder next to the destination with a zip for each part that is finished."""

    def __init__(self, dest: str, count: int):
        self.folder = Path(dest.rstrip("/") + PARTS)
        self.all = [range(start, min(start + PART, count)) for start in range(0, count, PART)]

    def claim(self, recipe: dict[str, Any]) -> None:
        """Make the folder, or check that its parts were made in the same way; for one rank.

        :raises UserError: naming what differs.
        """
        path, wanted = self.folder / RECIPE, json.loads(json.dumps(recipe))
        if path.exists():
            found = json.loads(path.read_text())
            changed = [f"{name} {found.get(name)!r}, now {value!r}" for name, value in wanted.items()
                       if found.get(name) != value]
            if changed:
                raise UserError(f"{self.folder} has parts of another command ({'; '.join(changed)}): give that command "
                                "again to finish it, or remove the folder")
        storage.make_folder(self.folder)
        for name in os.listdir(self.folder):
            if atomic.written_for(name):
                atomic.remove_tree(str(self.folder / name))
        storage.write_json(path, wanted)

    def path(self, part: range) -> Path:
        """The file of a part."""
        return self.folder / f"{part.start:08d}.zip"

    def missing(self) -> list[range]:
        """The parts that are not finished."""
        return [part for part in self.all if not self.path(part).exists()]

    def write(self, part: range, moments: np.ndarray, labels: list[Any]) -> None:
        """Keep a part.

        :raises UserError: if it cannot be written.
        """
        with (
            atomic.AtomicFile(self.path(part), durable=False) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for i, array in zip(part, moments):
                content = io.BytesIO()
                np.save(content, array)
                archive.writestr(member_name(i), content.getvalue())
            archive.writestr(LABELS, json.dumps(labels))

    def read(self, part: range) -> Iterator[tuple[int, bytes, Any]]:
        """The number, the file and the label of each image of a finished part."""
        with zipfile.ZipFile(self.path(part)) as archive:
            for i, label in zip(part, json.loads(archive.read(LABELS))):
                yield i, archive.read(member_name(i)), label

    def remove(self) -> None:
        """Remove the folder."""
        atomic.remove_tree(str(self.folder))


def member_name(i: int) -> str:
    """The name of latent i, as NVlabs/edm2 has it; a folder has 1000."""
    return f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"


# ---- the result ----


class Sums:
    """The mean and the standard deviation of each channel of z = mean + std n over a set."""

    def __init__(self) -> None:
        self.count: int = 0
        self.first: Any = 0.0
        self.second: Any = 0.0

    def add(self, moments: np.ndarray) -> None:
        """Count in an array [2C,H,W]."""
        mean, std = np.split(moments.astype(np.float64), 2)
        self.count += mean[0].size
        self.first = self.first + mean.sum((1, 2))
        self.second = self.second + (mean**2 + std**2).sum((1, 2))      # E z^2 = mean^2 + std^2

    def record(self) -> LatentRecord:
        """Rounded to six digits, which is more than enough of a scale."""
        mean, square = self.first / self.count, self.second / self.count
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return LatentRecord(_rounded(mean), _rounded(std))


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())


def finish(parts: Parts, dest: str, class_names: tuple[str, ...], base: LatentRecord, scaling: str) -> LatentRecord:
    """Write the destination from all parts, and remove these; for one rank.

    :param base: the VAE and its pixels; mean and standard deviation are filled in if they are to be measured.
    """
    sums, labels = Sums(), []
    with writing(dest) as target, progress(title="writing", total=parts.all[-1].stop, unit="latent") as bar:
        for part in parts.all:
            for i, data, label in parts.read(part):
                sums.add(np.load(io.BytesIO(data)))
                target.write(member_name(i), data)
                labels.append((member_name(i), label))
            bar.update(len(part))
        found = sums.record()
        record = base if scaling == "edm2" else replace(base, mean=found.mean, std=found.std)
        known = all(label is not None for _, label in labels)
        write_labels(target, labels if known else None, class_names, {RECORD: asdict(record)})
    parts.remove()
    return record


# ---- the command ----


def encode(args: argparse.Namespace) -> None:
    """Encode as the flags say, on all ranks.

    :raises UserError: for images, a VAE or a destination that cannot be used.
    """
    from cm.distributed import setup as dist
    from cm.generate.vae import load_vae

    dist.setup_dist(WAIT_S, args.device)
    dist.on_main(check_places, args)
    images = open_labelled(args.source)
    count = min(len(images), args.max_images or len(images))
    vae = load_vae(args.vae, "vae", args.pixels, args.batch_size)
    encoder = make_encoder(images, vae, args.resolution)
    base = replace(EDM2, pixels=args.pixels, vae=vae.loaded.name, sha256=vae.loaded.sha256)
    if args.scaling == "edm2" and (vae.loaded.channels, args.pixels) != (EDM2.channels, EDM2.pixels):
        raise UserError(f"--scaling edm2 is for latents of {EDM2.channels} channels and --pixels {EDM2.pixels}; those "
                        f"of {args.vae} have {vae.loaded.channels}, and --pixels is {args.pixels}: drop it")
    parts = Parts(args.dest, count)
    recipe = {"source": os.path.abspath(args.source), "images": count, "side": encoder.side,
              "cropped": encoder.cropped, "pixels": args.pixels, "sha256": vae.loaded.sha256}
    dist.on_main(parts.claim, recipe)
    own = dist.on_main(parts.missing)[dist.get_rank() :: dist.get_world_size()]
    total = sum(map(len, own))
    with progress(title="encoding", total=total, unit="image", shown=dist.is_main()) as bar:
        for part, moments, labels in encoder.parts(own):
            parts.write(part, moments, labels)
            bar.update(len(part))
    dist.barrier()
    dist.on_main(check_places, args)                        # another command may have been faster
    record = dist.on_main(finish, parts, args.dest, images.class_names, base, args.scaling)
    if dist.is_main():
        print(without_controls(f"{args.dest}: {count} latents of {record.channels} channels and side "
                               f"{encoder.side // vae.loaded.factor}, {args.scaling}: {record.text()}"))


def check_places(args: argparse.Namespace) -> None:
    """:raises UserError: if the destination is there already, cannot be written, or is an input."""
    output, path = output_of(args.dest), Path(args.dest)
    check_outputs([output], {"--source": args.source, "--vae": args.vae})
    if path.exists() and (output.kind == "file" or any(path.iterdir())):
        raise UserError(f"--dest {args.dest} already exists: remove it, or choose another --dest")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line, by default that of this process."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, metavar="FOLDER", help="folder of a diffusers AutoencoderKL")
    parser.add_argument("--source", required=True, metavar="PATH",
                        help="images in any format that training or dataset_tool.py reads, square and of one size")
    parser.add_argument("--dest", required=True, metavar="PATH", help="a .zip, or a new or empty folder")
    parser.add_argument("--resolution", type=positive, metavar="S",
                        help="crop the central square of each image and resize it to this side [default: unchanged]")
    parser.add_argument("--pixels", choices=PIXELS, default="unit",
                        help="range of the VAE's input; unit: [0, 1], as in EDM2; symmetric: [-1, 1], as in diffusers "
                        "[default: unit]")
    parser.add_argument("--scaling", choices=SCALINGS, default="measured",
                        help="mean and standard deviation by which training normalises the latents; measured: those of "
                        "this data set; edm2: the constants of EDM2's networks, for stabilityai/sd-vae-ft-mse "
                        "[default: measured]")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N",
                        help="images per rank and pass [default: 8]")
    parser.add_argument("--max-images", type=positive, metavar="N",
                        help="encode only the first N images [default: all]")
    add_device(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    flags = parse()                             # before the imports that take seconds
    from cm.distributed import setup as distributed

    distributed.run(lambda: encode(flags))
