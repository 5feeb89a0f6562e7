"""Programs that call the package as the four scripts of openai/consistency_models do, in the same order.

Started by path, by `tests/system/test_original_calls.py`; the text is ours, the calls are theirs.
"""
