"""Stand-ins for what a pickle names: they keep contents, and a pickle cannot change them."""

import pickle

import pytest

from cm.io.pickles import Call, Record


class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        return {"a.Object": Record, "a.double": Call(lambda number: 2 * number)}[f"{module}.{name}"]


def read(content):
    import io

    return Reader(io.BytesIO(content)).load()


def test_an_object_is_a_record_of_its_state():
    record = read(b"ca\nObject\n)\x81}X\x01\x00\x00\x00wK\x07sb.")
    assert type(record) is Record and record.state == {"w": 7} and Record.state == {}


def test_a_function_is_called_and_never_changed():
    assert read(b"ca\ndouble\n(K\x04tR.") == 8
    with pytest.raises(pickle.UnpicklingError, match="tries to change <lambda>"):
        read(b"ca\ndouble\n}X\x08\x00\x00\x00functionK\x01sb.")
    with pytest.raises(TypeError):
        read(b"ca\nObject\n}X\x05\x00\x00\x00stateK\x01sb.")                  # of the class itself
