"""What is found in the sets that people have: digits, photos of mixed sizes, a CIFAR-10 zip, scans, damaged files."""

import pytest

from cm.errors import UserError
from cm.quickstart import look as module
from cm.quickstart.look import describe, look, refuse_damaged
from support.photos import CLASSES, cifar_zip, grey_folder, mixed_folder


def test_digits():
    found = look("digits")
    assert (found.images, found.opened, found.one_size, found.grey, found.channels) == (1797, 1797, 8, True, 1)
    assert found.has_classes and sum(found.classes.values()) == 1797 and len(found.classes) == 10
    assert "classes: 10, from scikit-learn: 0 178, 1 182, 2 177, 3 183, 4 181 and 5 more" in describe(found)


def test_photos_of_mixed_sizes_in_folders_with_spaces(tmp_path):
    found = look(str(mixed_folder(tmp_path / "My photos")))
    assert found.images == found.opened == 60 and found.one_size == 0 and not found.grey and not found.damaged
    assert found.classes == dict.fromkeys(sorted(CLASSES), 20) and found.labels_from == "sub-folders"
    least, median, largest = found.sides
    assert 40 <= least < median < largest < 90
    text = "\n".join(describe(found))
    assert "classes: 3, from sub-folders: Aunt Mary 20, Zebra crossings 20, the dog 20" in text
    assert f"sizes: shorter sides {least} to {largest} pixels, median {median}" in text


def test_a_zip_of_cifar10(tmp_path):
    found = look(str(cifar_zip(tmp_path / "cifar10.zip")))
    assert (found.images, found.one_size, found.grey, found.labels_from) == (40, 32, False, "dataset.json")
    assert found.classes == {str(number): 4 for number in range(10)} and found.has_classes


@pytest.mark.parametrize("as_rgb", [False, True])
def test_grey_images_are_grey_whatever_their_mode(tmp_path, as_rgb):
    found = look(str(grey_folder(tmp_path / "scans", as_rgb)))
    assert found.grey and found.channels == 1 and found.one_size == 28
    assert not found.has_classes and "scan0.png" in found.why_no_classes
    assert "colour: grey" in describe(found)


def test_one_coloured_image_among_grey_ones_counts(tmp_path):
    folder = grey_folder(tmp_path / "scans", True)
    mixed_folder(folder, 1)
    assert not look(str(folder)).grey


def test_damaged_files_are_named_and_refused(tmp_path):
    folder = mixed_folder(tmp_path / "photos", 9)
    whole = (folder / "the dog" / "IMG 004.jpg").read_bytes()
    (folder / "the dog" / "IMG 004.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "the dog" / "note.png").write_text("no image")
    found = look(str(folder))
    assert found.images == 10 and len(found.damaged) == 2
    assert "note.png (it is not an image)" in found.damaged[1] and "IMG 004.jpg (" in found.damaged[0]
    with pytest.raises(UserError, match="2 of 10 images of .* cannot be read.*IMG 004.jpg.*replace or remove them"):
        refuse_damaged(found)
    (folder / "the dog" / "note.png").rename(tmp_path / "note.png")
    for path in folder.rglob("IMG*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 9 images that were opened can be read"):
        look(str(folder))


def test_a_short_look_says_how_many_it_has_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AT_LEAST", 5)
    found = look(str(mixed_folder(tmp_path, 12)), seconds=0)
    assert (found.images, found.opened) == (12, 5) and "(5 of them opened)" in describe(found)[0]


def test_names_that_make_every_image_a_class_are_no_classes(tmp_path):
    mixed_folder(tmp_path / "a", 4)
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, path in enumerate((tmp_path / "a").rglob("IMG*")):
        path.rename(folder / f"{number}_x{path.suffix}")
    found = look(str(folder))
    assert len(found.classes) == 4 and not found.has_classes
    assert "classes: left out: 4 images would be in 4 classes" in "\n".join(describe(found))


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        look(str(tmp_path))
