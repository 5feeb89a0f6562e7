"""The EDM networks once more, slowly, from a state dict under the published names: explicit sums, no layer of torch.

Shapes: N batch, C channels, H and W height and width, T positions (H times W). Everything is float64.
"""

import math

import torch as th


def silu(x):
    return x / (1 + (-x).exp())


def linear(state, name, x):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def group_norm(state, name, x, eps):
    n, c, h, w = x.shape
    groups = x.reshape(n, min(32, c // 4), -1)
    groups = groups - groups.mean(2, keepdim=True)
    groups = groups / (groups.square().mean(2, keepdim=True) + eps).sqrt()
    weight, bias = (state[f"{name}.{part}"].reshape(1, c, 1, 1) for part in ("weight", "bias"))
    return groups.reshape(n, c, h, w) * weight + bias


def zero_pad(x, border):
    n, c, h, w = x.shape
    out = x.new_zeros(n, c, h + 2 * border, w + 2 * border)
    out[:, :, border:border + h, border:border + w] = x
    return out


def convolve(state, name, x, border=None):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    k = weight.shape[-1]
    x = zero_pad(x, k // 2 if border is None else border)
    h, w = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = bias.reshape(1, -1, 1, 1)
    for i in range(k):
        for j in range(k):
            out = out + th.einsum("oc,nchw->nohw", weight[:, :, i, j], x[:, :, i:i + h, j:j + w])
    return out


def normalised(taps):
    taps = th.tensor(taps, dtype=th.float64)
    return taps / taps.sum()


def down_rows(x, taps, border):
    """Half as many rows [..., H, W] -> [..., H', W]: row i is the filtered neighbourhood of rows 2 i and 2 i + 1."""
    taps, rows = normalised(taps), x.shape[2]
    out = []
    for i in range((rows + 2 * border - len(taps)) // 2 + 1):
        inside = [(tap, 2 * i + k - border) for k, tap in enumerate(taps)]
        out.append(sum(tap * x[:, :, row] for tap, row in inside if 0 <= row < rows))
    return th.stack(out, 2)


def up_rows(x, taps, border):
    """Twice as many rows: each hands its light to those around its place, 2 in all."""
    taps, rows = 2 * normalised(taps), x.shape[2]
    out = x.new_zeros(*x.shape[:2], 2 * rows, x.shape[3])
    for i in range(rows):
        for k, tap in enumerate(taps):
            if 0 <= 2 * i + k - border < 2 * rows:
                out[:, :, 2 * i + k - border] += tap * x[:, :, i]
    return out


def both_ways(change, x, taps, border):
    return change(change(x, taps, border).transpose(2, 3), taps, border).transpose(2, 3)


def resample(x, direction, taps):
    change = {"down": down_rows, "up": up_rows}.get(direction)
    return x if change is None else both_ways(change, x, taps, (len(taps) - 1) // 2)


def attention(state, name, x, heads):
    """One query at a time; row 3 (h d + c) of the weights is channel c of head h of q, the next of k, the next of v."""
    n, c, height, width = x.shape
    d = c // heads
    rows = convolve(state, f"{name}.qkv", x).reshape(n, heads, d, 3, height * width)
    q, k, v = rows.unbind(3)                                        # each [N,heads,d,T]
    out = th.zeros_like(q)
    for t in range(height * width):
        logits = (q[..., t, None] * k).sum(2) / math.sqrt(d)        # [N,heads,T]
        weights = (logits - logits.amax(2, keepdim=True)).exp()
        out[..., t] = (v * (weights / weights.sum(2, keepdim=True))[:, :, None]).sum(3)
    return convolve(state, f"{name}.proj", out.reshape(x.shape))


def block(state, name, x, emb, song, taps, head_width):
    """One `UNetBlock`: song tells DDPM++ and NCSN++ from ADM."""
    eps, scale = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
    direction = {"down": "down", "up": "up"}.get(name.rpartition("_")[2], "")
    h = convolve(state, f"{name}.conv0", resample(silu(group_norm(state, f"{name}.norm0", x, eps)), direction, taps))
    told = linear(state, f"{name}.affine", emb)[:, :, None, None]
    if song:
        h = silu(group_norm(state, f"{name}.norm1", h + told, eps))
    else:
        factor, shift = told.chunk(2, 1)
        h = silu(group_norm(state, f"{name}.norm1", h, eps) * (1 + factor) + shift)
    h = convolve(state, f"{name}.conv1", h)
    x = resample(x, direction, taps)
    if f"{name}.skip.weight" in state:
        x = convolve(state, f"{name}.skip", x)
    x = (x + h) * scale
    if f"{name}.qkv.weight" in state:
        heads = 1 if song else x.shape[1] // head_width
        x = (x + attention(state, name, group_norm(state, f"{name}.norm2", x, eps), heads)) * scale
    return x


def positional(t, channels, endpoint):
    half = channels // 2
    waves = [t * 10000 ** (-i / (half - 1 if endpoint else half)) for i in range(half)]
    return th.stack([wave.cos() for wave in waves], 1), th.stack([wave.sin() for wave in waves], 1)


def embedding(state, t, labels, augment_labels, song):
    """Positional unless the state dict has frequencies."""
    width = state["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in state:
        angles = 2 * math.pi * t[:, None] * state["map_noise.freqs"]
        cosines, sines = angles.cos(), angles.sin()
    else:
        cosines, sines = positional(t, width, endpoint=song)
    emb = th.cat([sines, cosines] if song else [cosines, sines], 1)
    if song and labels is not None:
        emb = emb + linear(state, "map_label", labels * math.sqrt(labels.shape[1]))
    if augment_labels is not None:
        emb = emb + linear(state, "map_augment", augment_labels)
    emb = linear(state, "map_layer1", silu(linear(state, "map_layer0", emb)))
    if not song and labels is not None:
        emb = emb + linear(state, "map_label", labels)
    return silu(emb)


def network(state, x, t, labels=None, augment_labels=None, taps=(1, 1), head_width=64):
    """SongUNet or DhariwalUNet, as the names say; the blocks are called in the order of their names in the state."""
    song = "out_conv.weight" not in state
    emb = embedding(state, t, labels, augment_labels, song)
    names = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in state if name[:4] in ("enc.", "dec.")))
    skips, image = [], x
    for name in names:
        kind = name.split("_", 1)[1]
        if kind == "conv":
            x = convolve(state, name, x)
            skips.append(x)
        elif kind == "aux_residual":
            wide = convolve(state, name, image, border=1 + (len(taps) - 1) // 2)
            image = (x + both_ways(down_rows, wide, taps, 0)) / math.sqrt(2)
            x = skips[-1] = image
        elif kind == "aux_norm":
            x = silu(group_norm(state, name, x, 1e-6))
        elif kind == "aux_conv":
            return convolve(state, name, x)
        else:
            if name.startswith("dec.") and kind.startswith("block"):
                x = th.cat([x, skips.pop()], 1)
            x = block(state, name, x, emb, song, taps, head_width)
            if name.startswith("enc."):
                skips.append(x)
    return convolve(state, "out_conv", silu(group_norm(state, "out_norm", x, 1e-5)))
