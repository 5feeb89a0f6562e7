"""Which class a number means: compared between data and checkpoints, and looked up for sampling."""

import numpy as np
import pytest

from cm.data.class_names import (
    KEPT_BYTES,
    checked,
    named,
    numbered_as,
    numbers_of,
    require_same,
    shortened,
    worth_keeping,
)
from cm.errors import UserError

PETS = ("ant", "cat", "dog")
MANY = tuple(f"n{number:04d}" for number in range(1000))


# ---- lists of names out of files ----


def test_names_out_of_a_file_are_different_words():
    assert checked(["cat", "dog"], 2) == ("cat", "dog") and checked([]) == ()
    for bad, why in ((["cat", 1], "not a list"), ("cat", "not a list"), ({"0": "cat"}, "not a list"),
                     (["cat", "cat"], "a name twice")):
        with pytest.raises(ValueError, match=why):
            checked(bad)
    with pytest.raises(ValueError, match="has 2 names, and there are 3 classes"):
        checked(["cat", "dog"], 3)


def test_names_that_would_be_most_of_a_checkpoint_are_not_kept():
    assert worth_keeping(MANY) == MANY
    assert worth_keeping(("x" * KEPT_BYTES, "y")) == ()


# ---- the same classes ----


@pytest.mark.parametrize(("known", "found"), [(PETS, PETS), ((), PETS), ((), ())])
def test_the_same_names_and_unknown_ones_go_on(known, found):
    assert require_same(known, found, "x.pt", "data") == ""


def test_data_that_do_not_name_their_classes_are_a_warning():
    """Their numbers may mean other classes, and nothing tells."""
    warning = require_same(PETS, (), "x.pt", "images")
    for part in ("images does not name its classes", "class 0 is still 'ant'", "x.pt knows ant, cat, dog"):
        assert part in warning, part


@pytest.mark.parametrize(("found", "difference"), [
    (("cat", "dog", "emu"), "Class 0 was 'ant' and is now 'cat'"),
    (("ant", "cat"), "Class 2 was 'dog' and is now no class"),
    (("ant", "cat", "dog", "emu"), "Class 3 was no class and is now 'emu'"),
    (("ant", "dog", "cat"), "Class 1 was 'cat' and is now 'dog'"),
])
def test_other_names_are_refused_with_both_lists_and_the_remedy(found, difference):
    with pytest.raises(UserError) as error:
        require_same(PETS, found, "x.pt", "images")
    for part in ("of images are not those of x.pt", "ant, cat, dog; the data: " + ", ".join(found), difference,
                 "--allow_other_classes True", "another --log_dir"):
        assert part in str(error.value), part
    warning = require_same(PETS, found, "x.pt", "images", allowed=True)
    assert difference in warning and "--allow_other_classes" in warning


def test_long_lists_are_shortened_around_the_difference():
    assert shortened(PETS) == "ant, cat, dog"
    assert shortened(MANY) == "n0000, n0001, n0002, n0003, n0004, n0005, n0006, n0007, n0008, n0009, ... (1000 classes)"
    other = (*MANY[:500], "new", *MANY[501:])
    with pytest.raises(UserError) as error:
        require_same(MANY, other, "x.pt", "images")
    assert "n0500" in str(error.value) and "new" in str(error.value) and len(str(error.value)) < 900
    assert shortened(MANY, 999).endswith("n0998, n0999 (1000 classes)")
    assert shortened(("a\x1b[31m", "")) == "a\\x1b[31m, \"\"", "names come from files"


# ---- classes for sampling ----


@pytest.mark.parametrize(("words", "numbers"), [
    ("-1", ()), ("2", (2,)), ("dog", (2,)), ("dog,ant", (2, 0)), ("dog, 1", (2, 1)), (" cat ", (1,)),
])
def test_classes_by_name_and_number(words, numbers):
    assert numbers_of(words, PETS, 3) == numbers


def test_numbers_stay_numbers_where_a_class_is_named_so_too():
    folders = ("0", "1", "10", "2")                         # in the order of their names
    assert numbers_of("2", folders, 4) == (2,), "as it was before names were known"
    assert numbers_of("10", folders, 4) == (2,), "there is no class 10, so it is a name"


def test_a_name_with_a_comma_stands_alone():
    assert numbers_of("cat, domestic", ("cat, domestic", "dog"), 2) == (0,)


@pytest.mark.parametrize(("words", "names", "message"), [
    ("kat", PETS, "--class_label kat is none of the model's classes 0 to 2: ant, cat, dog. Did you mean 'cat'?"),
    ("cat,cow", PETS, "--class_label cat,cow: 'cow' is none of the model's classes 0 to 2: ant, cat, dog"),
    ("3", PETS, "--class_label 3 is none of the model's classes 0 to 2: ant, cat, dog"),
    ("3", (), "--class_label 3: the model has classes 0 to 2"),
    ("cat", (), "this model has no class names, so give numbers"),
    ("-5", PETS, "--class_label -5: -5 is too small; the least class is 0"),
    ("-1,2", PETS, "random classes, stands alone"),
    ("", PETS, "none of the model's classes"),
    ("cat,1", PETS, "names a class twice"),
])
def test_what_is_no_class_is_refused_with_those_that_are(words, names, message):
    with pytest.raises(UserError) as error:
        numbers_of(words, names, 3)
    assert message in str(error.value)


def test_a_class_in_a_message():
    assert [named(0, PETS), named(1, ("0", "1")), named(7, ())] == ["0 (ant)", "1", "7"]


# ---- data of other numbers ----


def test_labels_are_matched_by_name():
    labels = np.array([0, 1, 1])
    assert numbered_as(labels, ("cat", "dog"), PETS, "images").tolist() == [1, 2, 2]
    assert numbered_as(labels, ("cat", "dog"), (), "images") is labels
    assert numbered_as(np.array([0, 0]), ("cat", "emu"), PETS, "images").tolist() == [1, 1], "no image of an emu"
    with pytest.raises(UserError, match="images has images of emu, but the network has the classes ant, cat, dog"):
        numbered_as(labels, ("cat", "emu"), PETS, "images")
