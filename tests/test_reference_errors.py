import pickle

import pytest

from loracle import reference
from loracle.reference import LoracleError

FAMILY = {
    "ShapeError": 2,
    "DTypeError": 2,
    "NonFiniteError": 2,
    "ConfigError": 2,
    "FileError": 2,
    "TargetError": 2,
    "DataError": 2,
    "CheckError": 1,
}


@pytest.mark.parametrize(("name", "exit_code"), FAMILY.items())
def test_every_error_is_of_the_family_and_knows_its_exit_code(name, exit_code):
    kind = getattr(reference, name)
    assert issubclass(kind, LoracleError)
    assert kind("m").exit_code == exit_code


@pytest.mark.parametrize("message", ["a\nb", "a\r\nb", "a\u2028b", "a\x0bb"])
def test_a_message_is_one_line(message):
    assert str(LoracleError(message)) == "a b"


def test_an_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(reference.FileError("model.safetensors: cut short")))  # noqa: S301
    assert type(error) is reference.FileError
    assert str(error) == "model.safetensors: cut short"
