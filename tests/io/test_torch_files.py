"""Files by torch.save, within bounds: what they say of their size, and whether they match their checksums."""

import io
import zipfile

import pytest
import torch as th

from cm.io import torch_files
from support import bombs

CONTENT = {"a": th.arange(600.0), "b": {"c": [th.ones(3, dtype=th.float16)]}, "d": 5}


def saved(content, **options):
    data = io.BytesIO()
    th.save(content, data, **options)
    return data.getvalue()


def load(data, **options):
    return torch_files.load(io.BytesIO(data), len(data), **options)


@pytest.mark.parametrize("new", [True, False])
def test_both_formats_are_read(new):
    loaded = load(saved(CONTENT, _use_new_zipfile_serialization=new), verify=True)
    assert th.equal(loaded["a"], CONTENT["a"]) and th.equal(loaded["b"]["c"][0], th.ones(3).half())


def test_a_bit_of_a_part_that_differs_is_noticed_only_when_verified():
    data = bytearray(saved(CONTENT))
    place = data.index(CONTENT["a"].numpy().tobytes()) + 401
    data[place] ^= 1
    assert not th.equal(load(bytes(data))["a"], CONTENT["a"])
    with pytest.raises(zipfile.BadZipFile, match="data/0' does not match its own checksum.*--verify_weights False"):
        load(bytes(data), verify=True)


def test_shared_values_are_no_enlargement():
    values = th.arange(1000.0)
    loaded = load(saved({"x": values, "y": values.view(10, 100), "z": values[5:50]}))
    assert loaded["x"].data_ptr() == loaded["y"].data_ptr()


def test_a_repeated_view_is_refused():
    with pytest.raises(ValueError, match="would take"):
        load(saved({"a": th.ones(1).expand(10**9)}))


def test_two_members_of_one_name_are_refused():
    """torch may read another one than the one that was looked at."""
    data = io.BytesIO(saved(CONTENT))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"N.")
    with pytest.raises(zipfile.BadZipFile, match="two members of one name"):
        load(data.getvalue())


def test_an_archive_that_swells_is_refused():
    with pytest.raises(zipfile.BadZipFile, match="would expand from"):
        load(bombs.swelling_zip(["archive/data/0"], 1))


def test_an_older_file_claims_no_more_than_it_has():
    data = saved({"a": th.ones(300)}, _use_new_zipfile_serialization=False)
    forged = data.replace(b"M\x2c\x01", b"J\xff\xff\xff\x7f", 1)            # 300 numbers -> 2^31 - 1
    assert forged != data
    with pytest.raises(ValueError, match="declares 2,147,483,647 numbers"):
        load(forged)
