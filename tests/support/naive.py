"""The slow ways that tests compare with."""


def naive_search(score, low, high):
    """The textbook's ternary search: probes at thirds, nothing remembered."""
    while high - low >= 3:
        third = (high - low) // 3
        if score(low + third) < score(high - third):
            high -= third
        else:
            low += third
    return min(range(low, high + 1), key=score)
