"""A scheme that is possible is made, an impossible one is refused with the field and the choices."""

import pytest

from bitsmith.errors import SchemeError
from bitsmith.quantization import Scheme
from bitsmith.quantization.scheme import CHOICES


@pytest.mark.parametrize("bits", [*range(1, 9), 32])
def test_one_to_eight_bits_and_float_are_widths(bits: int) -> None:
    assert Scheme(bits=bits).is_float == (bits == 32)


@pytest.mark.parametrize("bits", [0, 9, 16, -1, 4.0, "4", True])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(
        SchemeError, match=r"bits: no such bit-width; got .*, expected 1 to 8, or 32"
    ) as error:
        Scheme(bits=bits)  # type: ignore[arg-type]
    assert error.value.got == bits


@pytest.mark.parametrize("field", CHOICES)
def test_every_named_field_lists_its_choices_and_the_nearest(field: str) -> None:
    assert CHOICES[field]
    close = CHOICES[field][0]
    with pytest.raises(SchemeError, match=f"{field}: no such {field}.*Did you mean {close}") as error:
        Scheme(**{field: close + "x"})
    assert all(choice in str(error.value) for choice in CHOICES[field])


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({"granularity": "group"}, "group_size", "granularity group needs a size"),
        ({"granularity": "group", "group_size": 0}, "group_size", "a positive integer"),
        ({"granularity": "group", "group_size": 2.5}, "group_size", "a positive integer"),
        ({"granularity": "channel", "group_size": 8}, "group_size", "only groups have a size"),
        ({"granularity": "token"}, "range", "expected dynamic with granularity token"),
        ({"grid": "symmetric", "bits": 1}, "grid", "seq or auto at 1 bit"),
        ({"grid": "balanced", "bits": 1}, "grid", "holds only 0"),
        ({"grid": "asymmetric", "calibration": "lsq"}, "grid", "calibration lsq has no rule"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict, where: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words) as error:
        Scheme(**fields)
    assert error.value.where == where


def test_replace_changes_some_fields_and_keeps_the_others() -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=16, estimator="ewgs")
    assert scheme.replace(bits=2) == Scheme(bits=2, granularity="group", group_size=16, estimator="ewgs")
    assert scheme.replace(granularity="channel") == Scheme(bits=4, granularity="channel", estimator="ewgs")


def test_replace_names_the_site_and_the_nearest_field() -> None:
    with pytest.raises(SchemeError, match=r"head\.weight\.bit: .*no such field.*Did you mean bits") as error:
        Scheme().replace("head.weight", bit=3)
    assert "granularity" in error.value.expected
    with pytest.raises(SchemeError, match=r"^head\.weight\.bits: no such bit-width; got 12"):
        Scheme().replace("head.weight", bits=12)
