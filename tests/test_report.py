"""The report: one file with everything in it, from whatever the workspace holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import REGIONS, sr_configuration, stack_configuration, tiny_configuration, tiny_plan

from autoseg.charts import Row, line_chart, row_chart, scale_of
from autoseg.checkpoint import FORMAT, save_tensors
from autoseg.dataset import RawDataset
from autoseg.errors import AutosegError, PlanError
from autoseg.experiment_planning.fingerprint import extract_fingerprint, uniform_fingerprint
from autoseg.files import write_json, write_text
from autoseg.labels import Labels
from autoseg.plan import Decision, Forecast, Plan
from autoseg.report import MOST_PICTURE_BYTES, write_report
from autoseg.results import mean_over_cases
from autoseg.typed_json import to_json
from autoseg.workspace import CHECKPOINT, Workspace

NASTY = 'patch <b>8</b> & "more"'


class Reader(HTMLParser):
    """Collects tags, their balance, and where links and images point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open, "every tag is closed"
    return reader


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with a plan that holds a decision with characters that HTML gives a meaning."""
    return workspace_of(tmp_path, tiny_plan())


def workspace_of(folder: Path, plan: Plan) -> Workspace:
    place = Workspace(folder / plan.dataset)
    name = plan.configurations[0].name
    decisions = (
        Decision("budget.gpu_memory_bytes", 8 * 10**9, "rule", "it was given."),
        Decision(f"{name}.patch_size", [8, 12, 12], "rule", NASTY),
    )
    replace(plan, decisions=decisions).save(place.plan)
    return place


def add_fold(place: Workspace, fold: str, dice: float, *, picture_bytes: int = 100, cases: int = 4) -> Path:
    plan = Plan.load(place.plan)
    names = plan.labels.names
    configuration = plan.configurations[0].name
    folder = place.fold(configuration, fold)
    header = "step,seconds,progress,learning_rate,loss,dice" + "".join(f",dice_{name}" for name in names) + "\n"
    rows = "5,30,0.5,1e-3,-0.4,0.6" + ",0.6" * len(names) + "\n10,60,1,1e-5,-0.7," + "," * len(names) + "\n"
    write_text(folder / "history.csv", header + rows)
    scored = {
        f"case_{fold}{i}": {name: {"dice": dice if name == names[0] else None, "hd95": 2.5} for name in names}
        for i in range(cases)
    }
    write_json(folder / "validation" / "summary.json", {"cases": scored, "failed": {}})
    trained = {"steps": 10, "seconds": 60.0, "finished": True, "device": "cuda:0", "peak_memory_bytes": 3 * 10**9}
    header_of = {"format": FORMAT, "plan": to_json(plan), "configuration": configuration, "fold": fold}
    save_tensors(folder / CHECKPOINT, {"weight": torch.zeros(1)}, {**header_of, "summary": trained})
    pictures = folder / "validation" / "pictures"
    pictures.mkdir()
    for rank in ("best", "median", "worst"):
        (pictures / f"{rank}.png").write_bytes(np.random.default_rng(0).bytes(picture_bytes))
    return folder


def text_of(page: Reader) -> str:
    return " ".join(" ".join(page.text).split())


def test_a_plan_alone_is_reported_with_its_reasons_in_their_own_characters(place):
    page = read(write_report(place))
    assert NASTY in "".join(page.text)
    assert "8.0 GB" in text_of(page) and "8 × 12 × 12" in text_of(page)
    assert all(source.startswith(("#", "data:")) for source in page.sources)


def test_nothing_is_fetched_and_scores_of_all_folds_are_joined(place, tmp_path):
    add_fold(place, "0", 0.8)
    add_fold(place, "1", 0.9)
    path = write_report(place, tmp_path / "mail" / "report.html")
    page = read(path)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", path.read_text(encoding="utf-8"))
    text = text_of(page)
    assert "0.8500" in text and "nothing to score" in text
    assert "2 min of training in all" in text
    assert text.count("the worst held-out case") == 2 and "the best held-out case" not in text
    assert text.index("fold 0: the worst held-out case: case_00, mean Dice 0.800") < text.index("fold 1: the worst")


def test_time_memory_and_device_of_every_fold_are_told(place):
    add_fold(place, "0", 0.8)
    plan = Plan.load(place.plan)
    forecasts = {plan.configurations[0].name: Forecast(2 * 10**9, 10**6, 10**9, 6.0, 60.0, 10**6)}
    replace(plan, forecasts=forecasts).save(place.plan)
    text = text_of(read(write_report(place)))
    assert "0.02 device hours on cuda:0" in text and "Energy was not measured" in text
    assert re.search(r"0 cuda:0 10 1 min 6 3\.0 GB 2\.0 GB", text)


def test_scores_of_the_fold_that_holds_nothing_out_are_no_scores(place):
    add_fold(place, "all", 0.99)
    text = text_of(read(write_report(place)))
    assert "0.99" not in text and "1 min of training in all" in text


def test_a_fold_of_another_plan_is_left_out(place):
    folder = add_fold(place, "0", 0.8)
    plan = Plan.load(place.plan)
    replace(plan, fingerprint="another").save(place.plan)
    assert "0.8000" not in text_of(read(write_report(place)))
    assert folder.is_dir()


def selection(plan: Plan, *, rungs: bool) -> dict[str, object]:
    name = plan.configurations[0].name
    candidate = {"members": [{"configuration": name, "mirroring": True}], "weights": [1.0]}
    standing = {"contender": name, "dice": 0.8123, "difference": 0.0, "low": 0.0, "high": 0.0, "dropped": False}
    beaten = {**standing, "contender": "2d", "difference": -0.0432, "low": -0.07, "high": -0.01, "dropped": True}
    rung = {
        "number": 0, "plan": plan.id, "share": 0.25, "folds": ["0"], "lengths": {}, "cases": 7, "leader": name,
        "standings": [{**one, "trained_seconds": 90.0} for one in (standing, beaten)],
    }  # fmt: skip
    return {
        "plan": plan.id,
        "chosen": {**candidate, "temperature": 1.25, "cleaning": {}},
        "calibration_error": [0.0312, 0.0104],
        "scores": [{"candidate": candidate, "dice": 0.8321, "low": 0.8, "high": 0.86, "by_class": {"ball": 0.8321}}],
        "decisions": [{"name": "ensemble", "value": name, "kind": "empirical", "because": "it is beyond noise."}],
        "cases": 8,
        "version": 2,
        **({"rungs": [rung]} if rungs else {}),
    }


@pytest.mark.parametrize("rungs", [False, True])
def test_what_was_chosen_is_shown_with_the_rungs_where_there_are_any(place, rungs):
    write_json(place.selection, selection(Plan.load(place.plan), rungs=rungs))
    text = text_of(read(write_report(place)))
    assert "3d_fullres (mirrored) : mean Dice 0.8321 (0.8000 to 0.8600) over 8 cases" in text
    assert "it is beyond noise." in text and "0.0312 before, 0.0104 after" in text
    assert ("2d dropped 0.8123 -0.0432 (-0.0700 to -0.0100) 1 min 30 s" in text) == rungs


def test_scores_of_who_was_dropped_are_marked_as_such(place):
    add_fold(place, "0", 0.8)
    content = selection(Plan.load(place.plan), rungs=True)
    leader, beaten = content["rungs"][0]["standings"]
    swapped = [{**beaten, "contender": "3d_fullres"}, {**leader, "contender": "2d"}]
    write_json(place.selection, {**content, "rungs": [{**content["rungs"][0], "leader": "2d", "standings": swapped}]})
    assert "3d_fullres trained no further 1 4" in text_of(read(write_report(place)))


def test_names_of_cases_with_the_characters_of_html_stay_names(place):
    folder = add_fold(place, "0", 0.8)
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    nasty = "\"><script>alert('x')</script>&amp;"
    scored = next(iter(summary["cases"].values()))
    cases = {nasty: {name: {"dice": 0.1, "hd95": 2.0} for name in scored}, **summary["cases"]}
    write_json(folder / "validation" / "summary.json", {"cases": cases, "failed": {nasty: nasty}})
    report = write_report(place)
    assert report.read_text(encoding="utf-8").count("<script>") == 1  # its own, for printing
    assert text_of(read(report)).count(nasty) >= 3


def test_a_selection_of_another_plan_is_not_shown(place):
    content = selection(Plan.load(place.plan), rungs=False)
    write_json(place.selection, {**content, "plan": "another"})
    assert "beyond noise" not in text_of(read(write_report(place)))


@pytest.mark.parametrize("damage", ["selection", "summary", "history", "fingerprint"])
def test_a_damaged_artefact_is_named_and_the_report_of_before_stays(place, damage):
    folder = add_fold(place, "0", 0.8)
    before = write_report(place).read_bytes()
    path = {
        "selection": place.selection,
        "summary": folder / "validation" / "summary.json",
        "history": folder / "history.csv",
        "fingerprint": place.fingerprint,
    }[damage]
    path.write_text('{"cases": [1]}')
    with pytest.raises(AutosegError, match=path.name):
        write_report(place)
    assert place.report.read_bytes() == before


NO_LABELS = Labels((), ())


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(tiny_plan(tiny_configuration(patch_size=(1, 12, 12))), id="2d"),
        pytest.param(tiny_plan(stack_configuration(slices=3)), id="2.5d"),
        pytest.param(tiny_plan(sr_configuration()), id="super-resolution"),
        pytest.param(tiny_plan(tiny_configuration(labels=REGIONS), labels=REGIONS), id="regions"),
        pytest.param(tiny_plan(tiny_configuration(channels=3)), id="several channels"),
    ],
)
def test_datasets_of_every_kind_are_reported(plan, tmp_path, tiny_dataset):
    place = workspace_of(tmp_path, plan)
    root = tiny_dataset(cases=3, shape=(1, 16, 14) if plan.configurations[0].topology == "2d" else (12, 16, 14))
    extract_fingerprint(RawDataset.load(root), workers=1).save(place.fingerprint)
    folder = add_fold(place, "0", 0.8)
    if plan.configurations[0].super_resolves:
        summary = {"cases": {}, "images": {"cases": {"case_00": {"psnr": 21.5, "ssim": None}}}}
        write_json(folder / "validation" / "summary.json", summary)
    text = text_of(read(write_report(place)))
    assert "Size of each case after cropping" in text and plan.configurations[0].name in text
    assert ("21.500" in text) == plan.configurations[0].super_resolves


def test_a_dataset_without_labels_is_reported(tmp_path):
    plan = tiny_plan(sr_configuration(labels=NO_LABELS, segments=False), labels=NO_LABELS)
    place = workspace_of(tmp_path, plan)
    found = uniform_fingerprint("D", shape=(8, 16, 16), spacing=(4, 1, 1), cases=3, labels=NO_LABELS)
    found.save(place.fingerprint)
    text = text_of(read(write_report(place)))
    assert "Labels none" in text and "Volume of each" not in text


def test_the_report_stays_small_enough_to_be_mailed(tmp_path):
    many = Labels(tuple(f"structure_{i}" for i in range(60)), tuple((i + 1,) for i in range(60)))
    place = workspace_of(tmp_path, tiny_plan(tiny_configuration(labels=many), labels=many))
    uniform_fingerprint("D", shape=(8, 16, 16), spacing=(4, 1, 1), cases=2000, labels=many).save(place.fingerprint)
    for fold in range(5):
        add_fold(place, str(fold), 0.9, picture_bytes=MOST_PICTURE_BYTES // 4, cases=100)
    path = write_report(place)
    assert path.stat().st_size < 5_000_000
    assert "6 more pictures are in the folders of the folds" in text_of(read(path))


def test_without_a_plan_there_is_nothing_to_report(tmp_path):
    with pytest.raises(PlanError, match="there is no plan yet"):
        write_report(Workspace(tmp_path))


def test_the_mean_is_that_of_the_structures_and_its_interval_that_of_the_cases():
    one, other = np.array([0.5, 0.7, np.nan]), np.array([1.0, np.nan, np.nan])
    mean = mean_over_cases([one, other])
    assert mean.value == pytest.approx((0.6 + 1.0) / 2) and mean.cases == 2
    assert mean.low < mean.value < mean.high
    assert mean_over_cases([np.array([np.nan])]).cases == 0


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0], [-2.0, 7.5], [1e-3, 5e4]])
@pytest.mark.parametrize("log", [False, True])
def test_a_scale_shows_every_value_and_has_ticks(values, log):
    values = [v for v in values if v > 0 or not log]
    scale = scale_of(values, 0, 100, log=log)
    assert all(0 <= scale(value) <= 100 for value in values)
    assert 1 <= len(scale.ticks()) <= 12 and all(0 <= scale(tick) <= 100 for tick in scale.ticks())


def test_charts_of_nothing_are_charts():
    for drawn in (line_chart([], title="t", x="x", y="y"), row_chart([], title="t"), row_chart([Row("a")], title="t")):
        assert drawn.startswith("<svg") and drawn.endswith("</svg>")


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browse(path: Path, folder: Path, *options: str) -> None:
    """Open the page in a real browser without a network; the test is skipped where none is installed."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9", "--hide-scrollbars"]
    command = [browser, *always, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_shows_it(place, tmp_path, scheme):
    add_fold(place, "0", 0.8)
    picture = tmp_path / "page.png"
    colours = "--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")
    browse(write_report(place), tmp_path, "--window-size=1000,1400", colours, f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    corner = pixels[:5, :5].mean()
    assert corner < 0.3 if scheme == "dark" else corner > 0.9
    heading = pixels[40:80, 40:400]
    assert abs(heading - corner).max() > 0.6, "the heading stands out from the page"
    assert (pixels[:, -10:] == pixels[0, 0]).all(), "nothing runs over the right edge"


def test_on_paper_what_is_folded_is_open(place, tmp_path):
    plan = Plan.load(place.plan)
    other = replace(plan.configurations[0], name="other")  # of several configurations each is folded
    many = tuple(Decision(f"other.value_{i}", i, "rule", "for its own reason.") for i in range(60))
    replace(plan, configurations=(*plan.configurations, other), decisions=many).save(place.plan)
    path = write_report(place)
    assert "<details>" in path.read_text(encoding="utf-8")
    sizes = []
    for name, page in (
        ("whole", path.read_text(encoding="utf-8")),
        ("shut", path.read_text(encoding="utf-8").split("<details>")[0] + "</body></html>"),
    ):
        html, paper = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        html.write_text(page, encoding="utf-8")
        browse(html, tmp_path, f"--print-to-pdf={paper}")
        sizes.append(len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())))
    assert sizes[0] > sizes[1]
