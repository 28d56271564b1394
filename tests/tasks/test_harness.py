"""The adapter answers lm-evaluation-harness's three kinds of requests.

Most of it with a stand-in in the shape of lm_eval 0.4.13: an abstract class LM, and requests whose `args` are
a tuple. Where lm_eval is installed, the slow test at the end runs the real one.
"""

import abc
import json
import math
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from bitsmith.errors import DataError, MissingExtra
from bitsmith.tasks.harness import harness_model, windows
from bitsmith.tasks.questions import MultipleChoice
from bitsmith.tasks.scoring import multiple_choice
from tests.tasks.language import Ascii, Bigram, History, Next, log_probability, slowly


class LM(abc.ABC):
    def __init__(self) -> None:
        self._rank, self._world_size, self.cache_hook = 0, 1, None

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...


@dataclass
class Instance:
    request_type: str
    doc: dict
    arguments: tuple
    idx: int
    resps: list = field(default_factory=list)

    @property
    def args(self):
        return self.arguments


def requests(*arguments):
    return [Instance("any", {}, one, i) for i, one in enumerate(arguments)]


@pytest.fixture
def harness(monkeypatch):
    parts = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    for name in parts:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[parts[-1]].LM = LM


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"lm_eval.*pip install 'bitsmith\[lm-eval\]'"):
        harness_model(Bigram(), Ascii(), context=8)


@pytest.mark.usefixtures("harness")
class TestRequests:
    def test_it_is_a_model_of_the_harness(self):
        assert isinstance(harness_model(Bigram(), Ascii(), context=8), LM)

    def test_loglikelihood_and_whether_greedy(self):
        model = harness_model(Bigram(), Ascii(), context=64, batch_size=2)
        found = model.loglikelihood(requests(("Ice is", " cold"), ("x", "yz"), ("Ice is", " hot and dry")))
        expected = [
            log_probability(text, n)
            for text, n in (("Ice is cold", 6), ("xyz", 1), ("Ice is hot and dry", 6))
        ]
        assert [total for total, _ in found] == pytest.approx(expected, rel=1e-5)
        model = harness_model(Next(), Ascii(), context=64)
        assert [greedy for _, greedy in model.loglikelihood(requests(("a", "bc"), ("a", "bd")))] == [
            True,
            False,
        ]

    def test_without_a_context_the_prefix_stands_before_the_text(self):
        model = harness_model(Bigram(), Ascii(), context=64, prefix="\n")
        ((total, _),) = model.loglikelihood(requests(("", "cold")))
        assert total == pytest.approx(log_probability("\ncold", 1), rel=1e-5)

    @pytest.mark.parametrize("text", ["short", "exactly10!", "a text of more than three windows", ""])
    def test_rolling_counts_each_token_once_with_as_much_before_it_as_fits(self, text):
        context = 10
        history = History().eval()
        model = harness_model(history, Ascii(), context=context)
        (total,) = model.loglikelihood_rolling(requests((text,)))
        tokens = Ascii().encode("\n" + text)
        expected = 0.0
        for i in range(1, len(tokens)):
            end = min(math.ceil(i / context) * context, len(tokens) - 1)  # the last token of i's window
            expected += slowly(history, tokens[max(0, end - context) : i], [tokens[i]])
        assert total == pytest.approx(expected, rel=1e-4)
        assert history.longest <= context

    def test_generate_until_stops_as_asked(self):
        model = harness_model(Next(), Ascii(), context=64, max_tokens=5)
        found = model.generate_until(
            requests(
                ("a", {"until": ["d"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
                ("a", {"until": "f", "max_new_tokens": 9}),
                ("a", {"until": ["x"], "max_gen_toks": 2}),
                ("m", {}),
                ("", {"until": None, "max_gen_toks": 1}),
            )
        )
        assert found == ["bc", "bcde", "bc", "nopqr", chr(11)]

    @pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.8}])
    def test_drawing_at_random_is_refused(self, settings):
        model = harness_model(Next(), Ascii(), context=64)
        with pytest.raises(DataError, match=r"draws its answers at random.*Give simple_evaluate gen_kwargs"):
            model.generate_until(requests(("a", settings)))


def test_an_empty_prefix_is_refused():
    with pytest.raises(DataError, match="harness: prefix"):
        windows(Ascii(), "text", "", 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_harness_finds_what_we_find(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    words = [f"{n} and {n * n} are {n + n}" for n in range(40)]
    questions = [
        MultipleChoice(f"{word},", (f" {word}", " so", f" {word[:5]} not"), len(word) % 3) for word in words
    ]
    rows = ({"p": q.prompt, "c": [c.strip() for c in q.choices], "right": q.correct} for q in questions)
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{p}}",
        "doc_to_choice": "c",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }
    model = History(seed=4).eval()
    results = lm_eval.simple_evaluate(model=harness_model(model, Ascii(), context=24), tasks=[task])
    ours = multiple_choice(model, Ascii(), questions, context=24).metrics()
    theirs = {name.removesuffix(",none"): value for name, value in results["results"]["ours"].items()}
    assert theirs["acc"] == ours["accuracy"]
    assert theirs["acc_stderr"] == pytest.approx(ours["accuracy_standard_error"])
    assert theirs["acc_bytes"] == ours["normalized_accuracy"]
    assert 0 < theirs["acc"] < 1
