"""report.html: whole, offline, honest about what a run says and silent about what it does not."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.report import write_report
from bitsmith.report.metrics import read_run
from bitsmith.report.words import count, percent, size
from tests.report.runs import build_run, vit, write

VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}
S = "\u202f"


class Document(HTMLParser):
    """Checks that tags nest, and collects ids of text, attributes and elements."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> says an attribute twice: {names}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def change(run: Path, file: str, **entries: Any) -> Path:
    path = run / file
    write(path, {**json.loads(path.read_text()), **entries})
    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": vit(), "model": "digits_vit"}, {"verified": False}, {"optional": False}],
    ids=["cnn", "vit", "failed", "bare"],
)
def test_the_page_nests_and_needs_nothing_from_outside(tmp_path: Path, options: dict[str, Any]) -> None:
    page = report(build_run(tmp_path / "run", **options))
    document = Document(page)
    assert "http" not in re.sub("http-equiv", "", page)
    assert "url(" not in page
    assert "@import" not in page
    assert not {"script", "link", "iframe", "object"} & set(document.tags)
    sources = [value for _, name, value in document.attributes if name in ("src", "href", "xlink:href")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]


def test_the_report_lies_in_the_run_directory(tmp_path: Path) -> None:
    assert write_report(build_run(tmp_path / "run")) == tmp_path / "run" / "report.html"


def test_the_headline_says_what_came_out(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    cost = json.loads((run / "metrics.json").read_text())["cost"]
    text = Document(report(run)).text
    assert f"97.8{S}% in {size(cost['weight_bytes'])}" in text
    smaller = cost["weight_bytes_float"] / cost["weight_bytes"]
    fewer = cost["bops_float"] / cost["bops"]
    assert (
        f"{smaller:.1f}× smaller, {fewer:.0f}× fewer bit operations than float; 0.3 points below float"
        in text
    )
    assert "verified in ONNX Runtime." in text
    assert "digits_cnn on digits" in text


def test_the_figures_of_metrics_appear_formatted(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    text = Document(report(run)).text
    for stage in ("float", "post_training", "quantized"):
        assert percent(metrics[stage]["accuracy"]) in text
    for model in ("float", "quantized"):
        for accuracy in metrics["shift"][model].values():
            assert percent(accuracy) in text
    cost = metrics["cost"]
    for key in ("weight_bytes", "weight_bytes_float"):
        assert size(cost[key]) in text
    for value in [cost["bops"], cost["bops_float"], *(layer["bops"] for layer in cost["layers"])]:
        assert count(value) in text
    assert f"gained 4.7{' '}points" in text
    assert f"29.4{S}s in all" in text
    assert "AMD EPYC 9R14" in text


def test_two_decimals_where_the_test_set_carries_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = (generator.random((10_000, 1, 2, 2)), generator.integers(0, 10, 10_000))
    text = Document(
        report(build_run(tmp_path / "run", images=images, accuracy=(0.9219, 0.7012, 0.9187)))
    ).text
    assert f"91.87{S}% in" in text
    assert "0.32 points below float" in text


def test_strings_of_the_run_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("&")</script>'
    run = build_run(
        tmp_path / "<b>run & co", model=evil, classes=(evil, *"123456789"), layers=[(evil, evil, 9, 9, 2, 2)]
    )
    change(run, "metrics.json", environment={evil: evil}, data=evil)
    change(run, "coverage.json", leftovers=[{"name": evil, "elements": 3, "reason": evil}])
    change(run, "certificate.json", exports={evil: {"runtime": evil, "passed": False, "failure": evil}})
    (run / "recipe.yaml").write_text(evil)
    document = Document(report(run))
    assert "script" not in document.tags
    assert evil in document.text


def test_a_failed_verification_comes_first_and_names_the_site(tmp_path: Path) -> None:
    page = report(build_run(tmp_path / "run", verified=False))
    text = Document(page).text
    assert "verification failed in ONNX Runtime" in text
    assert text.index("conv4.weight: 31 of 1152") < text.index("Accuracy")
    assert 'role="alert"' in page
    assert "Verified" not in text


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    text = Document(report(build_run(tmp_path / "run"))).text
    assert "Not checkedinputs outside the test set" in text


OPTIONAL = {
    "plan.json": "for ONNX Runtime",
    "coverage.json": "7 tensors stay in float",
    "certificate.json": "Certificate",
    "history.json": "Validation accuracy",
    "predictions.npz": "Misread images",
    "recipe.yaml": "Recipe",
    "model.onnx": "model.onnx",
}


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_missing_file_leaves_out_its_part_alone(tmp_path: Path, missing: str) -> None:
    run = build_run(tmp_path / "run")
    assert OPTIONAL[missing] in Document(report(run)).text
    (run / missing).unlink()
    text = Document(report(run)).text
    assert OPTIONAL[missing] not in text
    for other in set(OPTIONAL) - {missing}:
        assert OPTIONAL[other] in text


def test_metrics_of_two_accuracies_are_a_report(tmp_path: Path) -> None:
    write(
        tmp_path / "metrics.json", {"version": 1, "float": {"accuracy": 0.9}, "quantized": {"accuracy": 0.9}}
    )
    text = Document(report(tmp_path)).text
    assert f"90.0{S}%" in text
    assert "As accurate as float; not verified." in text


def test_every_site_and_every_leftover_is_listed(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", layers=vit(), model="digits_vit")
    coverage = json.loads((run / "coverage.json").read_text())
    text = Document(report(run)).text
    for entry in [*coverage["sites"], *coverage["leftovers"]]:
        assert entry["name"] in text
        assert entry.get("reason", "") in text


def test_pictures_and_plots_have_words_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    document = Document(report(build_run(tmp_path / "run")))
    images = sum(tag == "img" for tag in document.tags)
    assert images > 0
    assert (
        sum((tag, name) == ("img", "alt") and bool(value) for tag, name, value in document.attributes)
        == images
    )
    named = sum((tag, name) == ("svg", "aria-label") for tag, name, _ in document.attributes)
    assert named == sum((tag, name) == ("svg", "role") for tag, name, _ in document.attributes) > 10


def test_what_quantization_lost_is_shown_first(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", accuracy=(0.98, 0.9, 0.95))
    found = read_run(run).predictions
    assert found is not None
    lost = [row for row in found.image_rows if found.answers["float"][row] == found.labels[row]]
    shown = [int(number) for number in re.findall(r"test image (\d+),", report(run))]
    assert sorted(shown) == sorted(found.image_rows)
    assert set(shown[: len(lost)]) == set(lost)


def test_few_misread_images_share_their_column(tmp_path: Path) -> None:
    few, many = (
        report(build_run(tmp_path / name, accuracy=(right, 0.9, right)))
        for name, right in (("few", 0.98), ("many", 0.9))
    )
    column = '<div class="stack"><section class="card"><h2>Misread images</h2>'
    assert column in few
    assert "<h2>Time</h2>" in few[few.index(column) :].split("</div></div>")[0]
    assert column not in many
    for page in (few, many):
        for title in ("Confusion", "Misread images", "Accuracy under shift", "Time", "Certificate", "Recipe"):
            assert page.count(f"<h2>{title}</h2>") == 1
