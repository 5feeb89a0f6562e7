"""What a package says of its licence, in each of the ways that metadata know."""

from email.parser import Parser
from importlib.metadata import distribution

import pytest

from tools.licences import licence_of, table


@pytest.mark.parametrize("headers, licence", [
    ("License-Expression: Apache-2.0 OR MIT\nClassifier: License :: OSI Approved :: BSD License", "Apache-2.0 OR MIT"),
    ("License: BSD\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
    ("Classifier: License :: OSI Approved\nClassifier: License :: OSI Approved :: A\nClassifier: License :: B", "A; B"),
    ("Classifier: License :: OSI Approved\nLicense: ISC", "ISC"),
    ("License: UNKNOWN", "UNKNOWN"), ("License:", "UNKNOWN"), ("Name: x", "UNKNOWN"),
    (f"License: \n  {'Copyright ' * 20}\n  and more", "Copyright " * 5 + "Copyrig..."),
])
def test_the_licence_of_metadata(headers, licence):
    assert licence_of(Parser().parsestr(headers)) == licence


def test_the_table_has_a_line_for_each_package():
    lines = table([distribution("numpy"), distribution("consistency-toolkit"), distribution("numpy")]).splitlines()
    assert [line.split()[0] for line in lines] == ["consistency-toolkit", "numpy"]
    assert lines[0].split()[-1] == "MIT" and distribution("numpy").version in lines[1]
