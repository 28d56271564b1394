"""Threads, versions and run directories: what a job depends on besides its recipe."""

from pathlib import Path

import pytest
import torch

from bitsmith.errors import RecipeError
from bitsmith.recipe import load_recipe
from bitsmith.recipe.directory import latest_directory, new_directory, open_run
from bitsmith.recipe.environment import environment
from bitsmith.recipe.threads import enough_threads, multiply_accumulates
from bitsmith.tasks import build


@pytest.fixture
def three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("model", "shape", "threads"), [("digits_cnn", (1, 1, 8, 8), 1), ("resnet20", (1, 3, 32, 32), 3)]
)
def test_a_small_model_gets_one_thread(model: str, shape: tuple[int, ...], threads: int) -> None:
    with enough_threads(build(model), torch.zeros(shape), batch_size=64):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3


def test_multiply_accumulates_are_those_of_a_hand_count() -> None:
    layers = [(1, 12, 64), (12, 12, 64), (12, 16, 16), (16, 16, 16)]  # inputs, outputs, pixels
    by_hand = sum(inputs * outputs * 9 * pixels for inputs, outputs, pixels in layers) + 16 * 10
    assert multiply_accumulates(build("digits_cnn"), torch.zeros(3, 1, 8, 8)) == by_hand


def test_the_environment_is_plain_and_names_the_versions() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str | int) and value for value in facts.values())


def test_a_new_run_gets_the_first_free_name(tmp_path: Path) -> None:
    assert new_directory("digits", tmp_path) == tmp_path / "digits"
    for name in ("digits", "digits-2"):
        (tmp_path / name).mkdir()
    assert new_directory("digits", tmp_path) == tmp_path / "digits-3"


def test_resuming_without_a_name_takes_the_latest_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run to resume"):
        latest_directory("digits", tmp_path)
    for name in ("digits", "digits-2", "digits_vit"):
        with open_run(tmp_path / name, load_recipe(), resume=False) as out:
            (out / "checkpoints").mkdir()  # begun, and not refused before that
    assert latest_directory("digits", tmp_path).name == "digits-2"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with (
        pytest.raises(RecipeError, match="this is a file"),
        open_run(tmp_path / "out", load_recipe(), resume=False),
    ):
        pass
