"""Sets of latents in the layout of NVlabs/edm2."""

import io
import json
import zipfile

import numpy as np

RNG = np.random.default_rng(0)
MOMENTS = np.concatenate([RNG.normal(size=(6, 4, 8, 8)), RNG.uniform(0, 2, (6, 4, 8, 8))], 1).astype(np.float32)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def edm2_zip(path, arrays=MOMENTS, record=None, labels=True):
    """As the encoder of NVlabs/edm2 lays it out, which makes no record."""
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(arrays))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in zip(names, arrays):
            archive.writestr(name, npy(array))
        content = {"labels": [[name, i % 3] for i, name in enumerate(names)] if labels else None}
        archive.writestr("dataset.json", json.dumps(content | ({"latents": record} if record else {})))
    return str(path)
