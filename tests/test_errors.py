import pytest

from cm.errors import did_you_mean


@pytest.mark.parametrize(
    "word, names, hint",
    [
        ("huen", ["euler", "heun"], " Did you mean 'heun'?"),
        ("gpu", ["auto", "cuda", "cpu"], " Did you mean 'cuda'?"),
        ("gpu", ["cpu"], " Did you mean 'cpu'?"),
        ("float16", ["fp32", "fp16", "bf16"], " Did you mean 'fp16'?"),
        ("bfloat16", ["fp32", "fp16", "bf16"], " Did you mean 'bf16'?"),
        ("nothing like it", ["euler", "heun"], ""),
        (3, {"31": None}, " Did you mean '31'?"),
        ("huen", [], ""),
    ],
)
def test_a_wrong_name_is_answered_with_a_similar_one(word, names, hint):
    assert did_you_mean(word, iter(names)) == hint
