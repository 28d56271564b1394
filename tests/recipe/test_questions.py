"""Questions to a finished run: scores of its quantized and its float model, from Python and the terminal."""

import json
from pathlib import Path

import pytest
import torch

from bitsmith.cli.main import main
from bitsmith.errors import DataError, RecipeError
from bitsmith.export import load as load_model
from bitsmith.recipe import load_recipe, run
from bitsmith.recipe.directory import dump, load_stage
from bitsmith.recipe.reopen import ask_run, evaluate_run
from bitsmith.tasks import build, load
from bitsmith.tasks.questions import read_questions
from bitsmith.tasks.scoring import score
from bitsmith.tasks.tokens import ByteTokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"width": 16, "depth": 1, "heads": 2, "context": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on sums and differences of one digit."""
    out = tmp_path_factory.mktemp("runs") / "arithmetic"
    settings = (
        f"model.arguments={MODEL}",
        "data.arguments={largest: 9}",
        "float.epochs=20",
        "float.batch_size=16",
        "float.learning_rate=0.01",
        "train.epochs=2",
        "quantize.calibration_samples=32",
        "quantize.weights.bits=4",
    )
    run(load_recipe(ROOT / "recipes" / "arithmetic.yaml", settings), out)
    return out


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions of two choices."""
    rows = [
        {"question": f"{x}+4=", "choices": [f"{x + 4:02d}", f"{x + 5:02d}"], "answer": 0} for x in range(10)
    ]
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_both_models_are_scored_as_by_hand(finished: Path, sums: Path) -> None:
    found = ask_run(finished, sums)
    stage = load_stage(finished, "float")
    assert stage is not None
    plain = build("byte_llama", **MODEL)
    plain.load_state_dict(stage[0])
    for name, model in (("float", plain), ("quantized", load_model(finished / "model", kernels=False))):
        expected = score(model, ByteTokenizer(), read_questions(sums), context=32).metrics()
        assert found[name] | {"questions": found["questions"]} == pytest.approx(expected)
    assert found["questions"] == 10
    assert ask_run(finished, sums, limit=3)["questions"] == 3


def test_exact_match_is_a_metric_of_arithmetic(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    data = load("arithmetic", largest=9)
    asked = data.questions(data.test_x, data.test_y)  # type: ignore[attr-defined]
    packed = load_model(finished / "model", kernels=False)
    expected = score(packed, ByteTokenizer(), asked, context=32, max_tokens=3).metrics()["accuracy"]
    assert metrics["quantized"]["exact_match"] == pytest.approx(expected)
    assert evaluate_run(finished)["exact_match"] == pytest.approx(expected)
    assert {"exact_match"} <= set(metrics["float"]) & set(metrics["post_training"])
    assert 0 <= metrics["float"]["exact_match"] <= 1
    page = (finished / "report.html").read_text()
    assert "Answers right" in page
    assert "only the answers count" in page


def test_the_command_shows_a_table_or_json(
    finished: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished), "--questions", str(sums), "--limit", "4"]) == 0
    shown = capsys.readouterr().out
    for text in ("sums.jsonl: 4 questions", "float", "quantized", "normalized accuracy", "±"):
        assert text in shown
    assert main(["evaluate", str(finished), "--questions", str(sums), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ask_run(finished, sums)
    assert main(["evaluate", str(finished)]) == 0
    assert "exact match" in capsys.readouterr().out


def test_a_run_that_kept_no_float_model_is_scored_without_it(
    finished: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("recipe.yaml", "model"):
        (tmp_path / name).symlink_to(finished / name)
    found = ask_run(tmp_path, sums)
    assert found["float"] is None
    assert found["quantized"] == ask_run(finished, sums)["quantized"]
    assert main(["evaluate", str(tmp_path), "--questions", str(sums)]) == 0
    assert "float" not in capsys.readouterr().out


@pytest.mark.slow
def test_rows_are_asked_one_by_one_where_a_range_is_taken_over_the_batch(sums: Path, tmp_path: Path) -> None:
    settings = (
        f"model.arguments={MODEL}",
        "data.arguments={largest: 9}",
        "float.epochs=1",
        "train.epochs=1",
        "quantize.calibration_samples=8",
        "quantize.activations.range=dynamic",
    )
    run(load_recipe(ROOT / "recipes" / "arithmetic.yaml", settings), tmp_path / "run")
    packed = load_model(tmp_path / "run" / "model", kernels=False)
    alone = score(packed, ByteTokenizer(), read_questions(sums), context=32, batch_size=1).metrics()
    assert ask_run(tmp_path / "run", sums)["quantized"]["accuracy"] == alone["accuracy"]


def test_what_cannot_be_asked_is_one_line(
    finished: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        ask_run(finished, tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no question is left to ask; got 0"):
        ask_run(finished, sums, limit=0)
    for arguments, message in (
        (["--questions", str(tmp_path / "none.jsonl")], "there is no such file"),
        (["--questions", str(sums), "--limit", "0"], "limit"),
        (["--limit", "3"], "there are no questions; got 3. Give --questions FILE"),
        (["--questions", str(sums), "--shift", "all"], "questions know no shift"),
    ):
        assert main(["evaluate", str(finished), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_run_of_images_is_refused(sums: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe(None)))
    with pytest.raises(
        RecipeError, match=r"--questions: only language models answer questions; got a run on images"
    ):
        ask_run(tmp_path, sums)


HUB = {
    "gpt2": lambda t: t.GPT2Config(
        vocab_size=256, n_embd=16, n_head=2, n_layer=1, n_positions=16, bos_token_id=0, eos_token_id=0
    ),
    "opt": lambda t: t.OPTConfig(
        vocab_size=256, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32,
        max_position_embeddings=16, word_embed_proj_dim=16,
    ),
}  # fmt: skip
MATRICES = {
    "gpt2": {"transformer.wte", "transformer.wpe", *(
        f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )},
    "opt": {"model.decoder.embed_tokens", *(f"model.decoder.layers.0.{part}" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"
    ))},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(HUB))
def test_models_of_transformers_are_quantized_exported_and_asked(
    kind: str, sums: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(HUB[kind](transformers)).save_pretrained(tmp_path / kind)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)
    settings = (
        f"model=hf:{tmp_path}/{kind}",
        f"data={{name: 'text:{tmp_path}/text.txt', arguments: {{context: 16, tokenizer: bytes}}}}",
        "float=null",
        "train.epochs=1",
        "train.batch_size=23",
        "quantize.calibration_samples=8",
    )
    out = tmp_path / "run"
    metrics = run(load_recipe(ROOT / "recipes" / "language.yaml", settings), out)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["exports"]["native"]["passed"]
    plan = json.loads((out / "plan.json").read_text())
    weights = {name for name in plan["sites"] if name.endswith(".weight")}
    assert weights == {f"lm.{name}.weight" for name in MATRICES[kind]}  # the head is the embedding's

    into = build(f"hf:{tmp_path}/{kind}")
    loaded, data = (
        load_model(out / "model", into=into, kernels=False),
        load(f"text:{tmp_path}/text.txt", context=16),
    )
    found = data.evaluate(loaded, data.test_x, data.test_y)
    assert found["loss"] == pytest.approx(metrics["quantized"]["loss"], abs=1e-6)
    assert evaluate_run(out)["loss"] == pytest.approx(metrics["quantized"]["loss"], abs=1e-6)

    asked = ask_run(out, sums)  # the float model is that of the folder
    plain = score(build(f"hf:{tmp_path}/{kind}"), ByteTokenizer(), read_questions(sums), context=16)
    assert asked["float"]["accuracy"] == plain.metrics()["accuracy"]
