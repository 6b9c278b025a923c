"""The report: one file with everything in it, from whatever the workspace holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_training import tiny_plan

from autoseg.errors import PlanError
from autoseg.files import write_json, write_text
from autoseg.plan import Decision, Plan
from autoseg.report import MOST_PICTURE_BYTES, write_report
from autoseg.workspace import Workspace

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
    reader.feed(path.read_text())
    assert not reader.open, "every tag is closed"
    return reader


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with a plan that holds a decision with characters that HTML gives a meaning."""
    place = Workspace(tmp_path / "Dataset001_Tiny")
    plan = tiny_plan()
    name = plan.configurations[0].name
    replace(plan, decisions=(Decision(f"{name}.patch_size", [8, 12, 12], "rule", NASTY),)).save(place.plan)
    return place


def add_fold(place: Workspace, fold: str, dice: float, *, picture_bytes: int = 100) -> None:
    plan = Plan.load(place.plan)
    folder = place.fold(plan.configurations[0].name, fold)
    header = "step,seconds,progress,learning_rate,loss,dice,dice_ball,dice_core\n"
    write_text(folder / "history.csv", header + "5,30,0.5,1e-3,-0.4,0.6,0.6,0.6\n10,60,1,1e-5,-0.7,,,\n")
    cases = {f"case_{fold}{i}": {"ball": {"dice": dice}, "core": {"dice": None}} for i in range(4)}
    write_json(folder / "validation" / "summary.json", {"cases": cases})
    pictures = folder / "validation" / "pictures"
    pictures.mkdir()
    for rank in ("best", "median", "worst"):
        (pictures / f"{rank}.png").write_bytes(np.random.default_rng(0).bytes(picture_bytes))


def test_a_plan_alone_is_reported_with_its_reasons_in_their_own_characters(place):
    page = read(write_report(place))
    assert NASTY in "".join(page.text)
    assert all(source.startswith(("#", "data:")) for source in page.sources)


def test_nothing_is_fetched_and_scores_of_all_folds_are_joined(place, tmp_path):
    add_fold(place, "0", 0.8)
    add_fold(place, "1", 0.9)
    path = write_report(place, tmp_path / "mail" / "report.html")
    page = read(path)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    text = " ".join(page.text)
    assert "0.8500" in text and "nothing to score" in text
    assert "2 min of training in all" in text
    assert text.count("the worst held-out case") == 2 and "the best held-out case" not in text


def test_what_was_chosen_is_shown(place):
    decision = {"name": "ensemble", "value": "3d_fullres", "kind": "empirical", "because": "it is beyond noise."}
    write_json(place.root / "selection.json", {"decisions": [decision]})
    assert "it is beyond noise." in "".join(read(write_report(place)).text)


def test_the_report_stays_small_enough_to_be_mailed(place):
    for fold in range(5):
        add_fold(place, str(fold), 0.9, picture_bytes=MOST_PICTURE_BYTES // 4)
    assert write_report(place).stat().st_size < 5_000_000


def test_without_a_plan_there_is_nothing_to_report(tmp_path):
    with pytest.raises(PlanError, match="there is no plan yet"):
        write_report(Workspace(tmp_path))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_shows_it(place, tmp_path, scheme):
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium is installed")
    add_fold(place, "0", 0.8)
    path, picture = write_report(place), tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1400",
    ]
    options += ["--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")]
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", path.as_uri()], check=True, capture_output=True, timeout=120
    )
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    corner = pixels[:5, :5].mean()
    assert corner < 0.3 if scheme == "dark" else corner > 0.9
    assert pixels.std() > 0.01, "something is drawn"
