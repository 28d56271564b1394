"""Our errors: one line in a fixed order, its parts as attributes, and an exit code."""

import pickle

import pytest

import bitsmith.errors as errors
from bitsmith.errors import BitsmithError, MissingExtra, SchemeError, SiteError, listing, matching, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BitsmithError)]
WORK_FAILED = {"RunError": 1, "TrainingDiverged": 1, "ExportMismatch": 1, "Interrupted": 130}


def make(kind: type[BitsmithError]) -> BitsmithError:
    if kind is MissingExtra:
        return MissingExtra("onnx", "onnxruntime", "verifying an export")
    return kind("does not fit", where="head.weight", got=130, expected="a multiple of 32", remedy="Choose 26")


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "does not fit."),
        ({"where": "head"}, "head: does not fit."),
        ({"got": 3}, "does not fit; got 3."),
        ({"got": "int8", "expected": "int4"}, "does not fit; got int8, expected int4."),
        ({"got": 0, "remedy": "Choose 1"}, "does not fit; got 0. Choose 1."),
        ({"remedy": "Did you mean int4?"}, "does not fit. Did you mean int4?"),
        ({"got": "two\n  lines"}, "does not fit; got two lines."),
    ],
)
def test_a_message_is_one_line_of_where_what_got_expected_remedy(parts: dict, line: str) -> None:
    assert str(BitsmithError("does not fit", **parts)) == line


def test_the_parts_are_attributes() -> None:
    error = make(SchemeError)
    assert (error.where, error.what, error.got) == ("head.weight", "does not fit", 130)
    assert (error.expected, error.remedy) == ("a multiple of 32", "Choose 26")


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert len(KINDS) > 10
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in KINDS if kind.__name__ not in errors.__doc__] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_exit_code_says_whose_fault_it_was(kind: type[BitsmithError]) -> None:
    assert make(kind).exit_code == WORK_FAILED.get(kind.__name__, 2)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_between_processes(kind: type[BitsmithError]) -> None:
    before = make(kind)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert vars(after) == vars(before)
    assert str(after) == str(before)


def test_a_missing_extra_prints_the_command_that_installs_it() -> None:
    assert str(make(MissingExtra)) == (
        "extra onnx: verifying an export needs the package onnxruntime, which is not installed. "
        "Run: pip install 'bitsmith[onnx]'."
    )


def test_nearest_names_come_best_first_and_never_from_afar() -> None:
    names = ["blocks.0.up.weight", "blocks.1.up.weight", "head.weight", "stem"]
    assert nearest("head.wieght", names)[0] == "head.weight"
    assert len(nearest("blocks.up.weight", names)) <= 3
    assert nearest("zzz", names) == []


def test_a_list_of_choices_reads_as_a_sentence() -> None:
    assert [listing(["a"]), listing("ab"), listing("abc")] == ["a", "a or b", "a, b or c"]


def test_globs_keep_the_order_of_the_names() -> None:
    assert matching("m.sites", ["fc*", "c*"], ["conv1", "fc", "head"], "site") == ["conv1", "fc"]


def test_a_glob_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(SiteError, match="matches no layer") as caught:
        matching("m.layers", ["conv1", "fx"], ["conv1", "fc", "head"], "layer")
    assert caught.value.where == "m.layers: fx"
    assert "fc" in caught.value.remedy
