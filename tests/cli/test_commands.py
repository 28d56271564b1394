"""What each command prints and leaves behind, on a run of two steps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitsmith.errors import FormatError
from bitsmith.report import write_report
from tests.cli.conftest import QUICK, Bitsmith

METRICS = """version seed environment float post_training quantized uniform exported shift cost budget time"""
COST = """bops bops_float weight_bytes weight_bytes_float average_weight_bits average_activation_bits
latency_us energy_uj"""
FILES = """plan.json certificate.json recipe.yaml model/model.safetensors model/config.json report.html
history.json coverage.json predictions.npz events checkpoints"""


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= set(METRICS.split())
    assert set(metrics["cost"]) >= set(COST.split())
    for stage in ("float", "post_training", "quantized"):
        assert 0 <= metrics[stage]["accuracy"] <= 1
    assert set(metrics["shift"]) == {"float", "quantized"}
    assert metrics["exported"]["native"]["agreement"] >= 0.995
    for name in FILES.split():
        assert (finished / name).exists(), name


def test_the_run_ends_with_what_was_gained_and_where_to_look(bitsmith: Bitsmith, tmp_path: Path) -> None:
    result = bitsmith("run", "--out", tmp_path / "run", *QUICK)
    assert result.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.out).split())
    for fragment in (
        "float",
        "post-training",
        "quantized",
        "exported",
        "gained",
        "average bits",
        "report.html",
    ):
        assert fragment in text
    assert "train the quantized model" in result.err


def test_json_is_the_metrics_and_nothing_else(bitsmith: Bitsmith, tmp_path: Path) -> None:
    result = bitsmith("run", "--json", "--out", tmp_path / "run", *QUICK)
    assert json.loads(result.out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result.err == ""


def test_without_out_each_run_gets_a_directory_of_its_own(
    bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    assert bitsmith("run", "--json", *QUICK).code == 0
    assert (tmp_path / "runs" / "digits-2" / "report.html").exists()


def test_a_finished_run_is_not_done_again(bitsmith: Bitsmith, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = bitsmith("run", "--resume", "--json", "--out", finished)
    assert json.loads(result.out) == json.loads((finished / "metrics.json").read_text())
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert set(changed) <= {".lock", "recipe.yaml"}


def test_a_run_that_was_refused_leaves_its_directory_free(
    bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    command = ["run", "--json", "--out", tmp_path / "run", *QUICK]
    overrides = ("--set", "quantize.overrides={conv2.*: {bits: 4}}")
    assert "matches no site" in bitsmith(*command, *overrides, "--set", "model=digits_vit").err
    again = bitsmith(*command, "--set", "model=nowhere:make")
    assert "cannot be imported" in again.err, "and not: this directory already holds a run"
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    result = bitsmith("run", "--out", unfinished, *QUICK)
    assert "already holds an unfinished run" in result.err


def test_a_dry_run_tells_sites_cost_and_time_and_writes_nothing(
    bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bitsmith("run", "--dry-run", "--json")
    found = json.loads(result.out)
    assert {site["name"] for site in found["sites"]} >= {
        "conv1.weight",
        "conv1.input",
        "fc.weight",
        "fc.input",
    }
    assert found["cost"]["bops"] < found["cost"]["bops_float"]
    assert found["time"]["total"] > 0
    assert found["steps"]["qat"] == 20 * found["steps"]["float"] // 20
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 1e8
    assert list(tmp_path.iterdir()) == []
    assert "conv3.weight" in bitsmith("run", "--dry-run").out


def test_a_plan_is_used_as_it_was_edited(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    plan["sites"]["conv3.weight"] |= {"bits": [2, 4, 4, 8] * 4, "grid": "auto"}
    plan["sites"]["fc.input"]["bits"] = 6
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    settings = ("--set", f"plan={tmp_path}/edited.json", "--set", "methods=[]")
    assert bitsmith("run", "--json", "--out", tmp_path / "run", *QUICK, *settings).code == 0
    assert "2-8, 4.5 on average" in bitsmith("inspect", tmp_path / "run").out
    assert "2-8, 4.5 on average" in bitsmith("inspect", tmp_path / "run" / "model").out
    assert "2-8, 4.5 on average" in (tmp_path / "run" / "report.html").read_text()
    used = json.loads((tmp_path / "run" / "plan.json").read_text())["sites"]
    assert {name: site["bits"] for name, site in used.items()} == {
        name: site["bits"] for name, site in plan["sites"].items()
    }


def test_inspect_accounts_for_every_parameter(bitsmith: Bitsmith, finished: Path) -> None:
    found = json.loads(bitsmith("inspect", finished, "--json").out)
    coverage = json.loads((finished / "coverage.json").read_text())
    quantized = sum(site["elements"] for site in coverage["sites"])
    assert quantized + sum(left["elements"] for left in found["leftovers"]) == found["totals"]["parameters"]
    assert all(left["reason"] for left in found["leftovers"])
    text = bitsmith("inspect", finished).out
    assert "conv2.weight" in text
    assert all(left["name"] in text for left in found["leftovers"])
    assert text.count("folded into the layer") == 1, "one reason is said once, for all BatchNorms"


def test_inspect_reads_an_exported_model(bitsmith: Bitsmith, finished: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())["sites"]
    found = json.loads(bitsmith("inspect", finished / "model", "--json").out)["sites"]
    assert {site["name"]: site["bits"] for site in found} == {
        name: site["bits"] for name, site in plan.items()
    }
    assert "conv2.weight" in bitsmith("inspect", finished / "model").out


def test_inspect_shows_the_system(bitsmith: Bitsmith) -> None:
    assert "torch" in json.loads(bitsmith("inspect", "--system", "--json").out)["system"]
    assert "processor" in bitsmith("inspect", "--system").out


def test_evaluate_finds_the_accuracy_of_the_run(bitsmith: Bitsmith, finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    found = json.loads(bitsmith("evaluate", finished, "--shift", "default", "--json").out)
    assert found["accuracy"] == metrics["quantized"]["accuracy"]
    assert found["shift"] == metrics["shift"]
    assert found["shifts"]["shifts"]["noise"]["severities"] == [1, 2, 3, 4, 5]
    assert "noise" in bitsmith("evaluate", finished, "--shift", "noise").out


def test_evaluate_shows_attacks_and_corruptions_side_by_side_and_writes_a_page(
    bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    arguments = ("--shift", "fgsm,pgd_transferred,jpeg", "--severity", 2, "--out", tmp_path / "shifts.html")
    shown = bitsmith("evaluate", finished, *arguments).out
    for word in ("float", "quantized", "FGSM", "PGD transferred", "JPEG", "Means of severity 2", "Page"):
        assert word in shown
    page = (tmp_path / "shifts.html").read_text()
    assert page.count('class="panel"') == 3
    assert page.count("data:image/png") == 3 * 6


def test_evaluate_measures_flatness(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", finished, "--flatness", "--rows", 16)
    found = json.loads(bitsmith(*arguments, "--radius", 0.1, "--json").out)
    metrics = json.loads((finished / "metrics.json").read_text())
    competitor = {"uniform"} if metrics["winner"] == "searched" else set()
    assert set(found["models"]) == {"float", "quantized"} | competitor
    assert (found["rows"], found["radius"]) == (16, 0.1)
    shown = bitsmith(*arguments, "--out", tmp_path / "page.html").out
    assert "digits: flatness on 16 training images" in shown
    assert f"{found['models']['quantized']['loss']:.2f}" in shown
    assert "within 0.5" in shown
    assert (tmp_path / "page.html").read_text().count('class="surface"') == len(found["models"])


def test_a_damaged_flatness_file_is_one_line(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "flatness.json").write_text('{"version": 1}')
    with pytest.raises(FormatError, match=r"flatness\.json: this flatness file has no figures of its models"):
        write_report(tmp_path / "run")


def test_evaluate_takes_images_of_another_size(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 12, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "larger.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    result = bitsmith("evaluate", finished, "--data", f"npz:{tmp_path / 'larger.npz'}")
    assert "larger: 20 test images, 3x16x12 to 1x8x8" in result.out
    np.savez(tmp_path / "more.npz", train_x=images, train_y=np.arange(20), test_x=images, test_y=labels)
    result = bitsmith("evaluate", finished, "--data", f"npz:{tmp_path / 'more.npz'}")
    assert result.code == 2
    assert "the classes are not those of the run; got 20" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shift", "noise", "--severity", "6"], "--severity: there is no such severity; got 6"),
        (["--severity", "2"], "--severity: there is no shift"),
        (["--out", "page.html"], "--out: there is no shift"),
        (["--shift", "typos"], "this is a shift of text; got typos for data digits, which are images"),
        (["--radius", "0.1"], "--radius: flatness is not asked for; got 0.1"),
        (["--flatness", "--radius", "2"], "this value is out of range; got 2.0"),
        (["--flatness", "--shift", "noise"], "--shift: this is not of flatness; got noise"),
        (["--shift", "domains"], "this is a suite of images with a left-out domain"),
    ],
)
def test_evaluate_says_which_shifts_there_are(
    bitsmith: Bitsmith, finished: Path, arguments: list[str], message: str
) -> None:
    result = bitsmith("evaluate", finished, *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_evaluate_refuses_a_shift_that_there_is_not(bitsmith: Bitsmith, finished: Path) -> None:
    result = bitsmith("evaluate", finished, "--shift", "nois")
    assert result.code == 2
    assert "Did you mean noise?" in result.err


def test_export_writes_the_same_codes_again(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    before = load_file(finished / "model" / "model.safetensors")
    shutil.copytree(finished, tmp_path / "run")
    result = bitsmith("export", tmp_path / "run", "--to", "onnx", "--json")
    passed = {name: entry["passed"] for name, entry in json.loads(result.out)["exports"].items()}
    assert passed == {"native": True, "onnx": True}  # what the run had verified stays in the certificate
    assert bitsmith("export", finished, "--to", "native").code == 0
    after = load_file(finished / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bitsmith("export", finished, "--to", "onxx").err.endswith("Did you mean onnx?\n")


def test_compare_shows_runs_side_by_side(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    result = bitsmith("compare", finished, finished, "--out", tmp_path / "page.html")
    assert result.out.count("finished") >= 2
    assert "</html>" in (tmp_path / "page.html").read_text()
    assert "finished" in json.loads(bitsmith("compare", finished, "--json").out)


@pytest.mark.parametrize("command", ["run", "inspect", "evaluate", "export", "compare"])
def test_help_teaches_by_examples(command: str, bitsmith: Bitsmith) -> None:
    text = bitsmith(command, "--help").out
    assert "Examples" in text
    assert text.count(f"bitsmith {command}") >= 3  # the usage, and two examples or more


def test_no_command_is_answered_with_help(bitsmith: Bitsmith) -> None:
    result = bitsmith()
    assert (result.code, result.err) == (2, "")
    assert "evaluate" in result.out


def test_the_prompt_comes_back_without_collecting_what_is_left() -> None:
    program = """
import atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))  # the first one in is the last one called
from bitsmith.cli.main import main
sys.argv[1:] = ["--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "frozen True", done.stderr


def test_help_answers_without_torch() -> None:
    program = (
        "import sys; from bitsmith.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout
