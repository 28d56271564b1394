"""Metrics of language modelling against PyTorch's own and by hand; sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks import build, language
from bitsmith.tasks.tokens import ByteTokenizer
from bitsmith.train.distillation import IGNORED


class Bigram(nn.Module):
    """Logits of the next token from a table (V, V): one whose probabilities are known."""

    context = 4

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return self.table[tokens]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def test_the_loss_is_torchs_cross_entropy_and_the_rest_follows(tokens: Tensor) -> None:
    model = build("byte_llama", seed=0, width=16, depth=1)
    x, y = tokens[:, :-1], tokens[:, 1:]
    found = language.evaluate(model, x, y, batch_size=2)
    with torch.no_grad():
        logits = model(x)
    expected = F.cross_entropy(logits.double().transpose(1, 2), y).item()
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-6)  # a token is a byte
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == y).double().mean().item())
    assert language.score(logits, y) == pytest.approx(found, rel=1e-6)


def test_targets_that_are_ignored_are_no_tokens(tokens: Tensor) -> None:
    model = build("byte_llama", seed=0, width=16, depth=1)
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    ignored = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.no_grad():
        logits = model(x)
    kept, wanted = logits[~ignored], y[~ignored]
    expected = F.cross_entropy(kept.double(), wanted).item()
    y[ignored] = IGNORED
    for found in (language.evaluate(model, x, y, batch_size=2), language.score(logits, y)):
        assert found["loss"] == pytest.approx(expected, abs=1e-6)
        assert found["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-6)
        assert found["accuracy"] == pytest.approx((kept.argmax(-1) == wanted).double().mean().item())
    with pytest.raises(DataError, match="nothing to predict"):
        language.evaluate(model, x, torch.full_like(y, IGNORED))


def test_a_uniform_model_needs_eight_bits_a_byte(tokens: Tensor) -> None:
    found = language.evaluate(Bigram(torch.zeros(256, 256)), tokens[:, :-1], tokens[:, 1:])
    assert found["bits_per_byte"] == pytest.approx(8.0)
    assert found["perplexity"] == pytest.approx(256.0)


def test_bits_are_shared_out_over_the_bytes_that_tokens_stand_for() -> None:
    class Doubled:
        """Every token is two bytes."""

        vocab_size = 4

        def encode(self, text: str) -> list[int]:
            raise AssertionError("bytes are counted by decoding alone")

        def decode(self, tokens) -> str:
            return "".join("abcd"[token] * 2 for token in tokens)

    x = torch.tensor([[0, 1, 2]])
    found = language.evaluate(Bigram(torch.zeros(4, 4)), x, x, Doubled())  # type: ignore[arg-type]
    assert found["loss"] == pytest.approx(math.log(4))
    assert found["bits_per_byte"] == pytest.approx(1.0)  # two bits a token, two bytes a token


def test_a_hopeless_model_has_a_perplexity_that_can_be_written_down() -> None:
    table = torch.zeros(256, 256)
    table[:, 0] = 1e6
    x = torch.ones(1, 4, dtype=torch.int64)
    found = language.evaluate(Bigram(table), x, x)
    assert found["loss"] == pytest.approx(1e6)
    assert math.isfinite(found["perplexity"])


def test_nothing_to_predict_is_an_error() -> None:
    empty = torch.zeros(0, 4, dtype=torch.int64)
    with pytest.raises(DataError, match="nothing to predict"):
        language.evaluate(Bigram(torch.zeros(4, 4)), empty, empty)


def test_evaluation_leaves_every_module_in_its_mode(tokens: Tensor) -> None:
    model = build("byte_llama", seed=0, width=16, depth=2)
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    language.evaluate(model, tokens, tokens)
    language.sample(model, ByteTokenizer(), "a", 2)
    assert [module.training for module in model.modules()] == modes


def test_temperature_zero_takes_the_likeliest_token() -> None:
    table = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    expected = [ord("q")]
    for _ in range(12):
        expected.append(int(table[expected[-1]].argmax()))
    found = language.sample(Bigram(table), ByteTokenizer(), "q", 12, temperature=0)
    assert found == ByteTokenizer().decode(expected)


def test_samples_follow_the_models_probabilities() -> None:
    table = torch.full((256, 256), -1e9)
    table[:, [97, 98]] = torch.tensor([math.log(0.8), math.log(0.2)])
    text = language.sample(
        Bigram(table), ByteTokenizer(), "a", 2000, generator=torch.Generator().manual_seed(0)
    )
    assert text.count("b") / 2000 == pytest.approx(0.2, abs=0.03)  # three standard errors
    half = language.sample(
        Bigram(table), ByteTokenizer(), "a", 2000, 0.5, generator=torch.Generator().manual_seed(0)
    )
    assert half.count("b") / 2000 == pytest.approx(0.04 / (0.04 + 0.64), abs=0.02)


def test_the_same_seed_draws_the_same_text_and_the_window_is_never_exceeded() -> None:
    model = Bigram(torch.zeros(256, 256))
    texts = {
        language.sample(model, ByteTokenizer(), "abcdefgh", 9, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    }
    assert len(texts) == 2
    assert all(text.startswith("abcdefgh") for text in texts)
    assert model.longest == 4


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt needs at least one token"):
        language.sample(Bigram(torch.zeros(4, 4)), ByteTokenizer(), "", 3)
