"""The fixed width, and what the interface asks of others."""

import pytest
import torch

from bitsmith.quantization import BitWidth, FixedBits


def test_a_fixed_width_is_one_row_with_a_constant_share() -> None:
    width = FixedBits(4)
    assert width.candidates.tolist() == [4.0]
    assert width.rows.tolist() == [0]
    assert width.share is None
    assert width.expected() == 4
    assert width.expected().shape == ()


def test_a_fixed_width_among_candidates_points_to_its_row() -> None:
    width = FixedBits(4, [2, 4, 8])
    assert (width.rows.tolist(), float(width.expected())) == ([1], 4.0)
    width.commit(8)
    assert (width.rows.tolist(), float(width.expected())) == ([2], 8.0)
    assert width.candidates.tolist() == [2.0, 4.0, 8.0]


def test_what_changes_is_in_the_state_and_what_is_saved_comes_back() -> None:
    width, fresh = FixedBits(4, [2, 4, 8]), FixedBits(2, [2, 4, 8])
    width.commit(8)
    fresh.load_state_dict(width.state_dict())
    assert float(fresh.expected()) == 8
    assert list(width.state_dict()) == ["candidates", "rows"]
    assert width.rows.dtype == torch.int64


@pytest.mark.parametrize("call", [lambda w: w.expected(), lambda w: w.commit(4)])
def test_a_width_that_does_not_answer_says_which_question(call) -> None:
    class Mute(BitWidth):
        pass

    with pytest.raises(TypeError, match="Mute must say"):
        call(Mute())
