"""The slow ways that tests compare with."""

import torch as th


def naive_search(score, low, high):
    """The textbook's ternary search: probes at thirds, nothing remembered."""
    while high - low >= 3:
        third = (high - low) // 3
        if score(low + third) < score(high - third):
            high -= third
        else:
            low += third
    return min(range(low, high + 1), key=score)


def slow_attention(qkv: th.Tensor, heads: int) -> th.Tensor:
    """Head by head, position by position's softmax, straight from the formula."""
    n, width, *positions = qkv.shape
    q, k, v = qkv.flatten(2).chunk(3, dim=1)                            # [N,C,T]
    d = width // 3 // heads
    out = th.empty_like(v)
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        weights = th.softmax(q[:, rows].transpose(1, 2) @ k[:, rows] / d**0.5, dim=-1)   # [N,T,T]
        out[:, rows] = v[:, rows] @ weights.transpose(1, 2)
    return out.view(n, width // 3, *positions)
