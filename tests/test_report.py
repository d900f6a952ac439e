"""The page about a cohort: complete, self-contained, and safe against odd names."""

import base64
import io
import json
import re
import shutil
import struct
import zlib
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from focusnet import predict, report
from focusnet.checkpoint import Model, build_network, save_checkpoint
from focusnet.errors import FocusNetError
from focusnet.evaluate import evaluate
from focusnet.prepare import prepare
from tests.tiny import tiny_config, write_case, write_data

ODD = 'o\'<b>dd & "case"'


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` of three cases, one of an odd name, and `out` with their predictions and a failure."""
    root = tmp_path_factory.mktemp("report")
    config = tiny_config()
    plan = prepare(write_data(root / "data", cases=2), root / "cache", config.data)
    torch.manual_seed(0)
    save_checkpoint(root / "model.pt", Model(build_network(config, plan), config, plan, ("snet", "sol", "sos")), {})
    write_case(root / "data" / ODD, 5)
    (root / "data" / "broken").mkdir()
    (root / "data" / "broken" / "img.nrrd").write_text("<script>")
    arguments = [str(root / "model.pt"), str(root / "data"), "--out", str(root / "out"), "--device", "cpu"]
    assert predict.main(arguments) == 2
    shutil.rmtree(root / "data" / "broken")
    return root


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # two cases are compared sooner than processes start
    monkeypatch.setattr(report, "evaluate", partial(evaluate, processes=1))


class Page(HTMLParser):
    """The elements of a page with their attributes, the text of every one, and whether all are closed."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        # cells, rows and paragraphs may be left open in HTML; not here
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, text: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += text

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """The attributes of all elements of a tag, of the class `kind`."""
        return [found for name, found in self.elements if name == tag and kind in (None, found.get("class"))]


def test_the_page_loads_nothing(cohort: Path) -> None:
    html = report.make_report(cohort / "out", cohort / "data")
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = attributes.get(name) or "#"
            assert target[0] == "#" or target.startswith("data:image/webp;base64,"), (tag, target)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    (policy,) = (meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")
    assert "For research only" in html


def test_every_case_is_there_flagged_ones_first(cohort: Path) -> None:
    page = Page(report.make_report(cohort / "out"))
    cases = page.all("details", "case")
    assert [case["id"] for case in cases] == ["case-0", "case-1", "case-2"]
    statistics = {
        path.parent.name: json.loads(path.read_text()) for path in (cohort / "out").glob("[!.]*/statistics.json")
    }
    counts = {name: sum(len(organ["flags"]) for organ in table.values()) for name, table in statistics.items()}
    expected = sorted(counts, key=lambda name: (-counts[name], name))
    names = [text.rsplit(None, 2)[0] for text in page.texts["summary"]]
    assert names == expected and ODD in names
    assert [row["data-flags"] for row in page.all("tr") if "data-flags" in row] == [str(counts[name]) for name in names]
    flagged = {cell["title"] for cell in page.all("td", "flagged")}
    assert flagged == {"\n".join(o["flags"]) for table in statistics.values() for o in table.values() if o["flags"]}
    targets = {a["href"] for a in page.all("a")}
    assert {f"#case-{i}" for i in range(3)} <= targets
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert {target[1:] for target in targets if target} <= ids


def test_odd_names_are_text(cohort: Path) -> None:
    html = report.make_report(cohort / "out", cohort / "data")
    page = Page(html)
    assert "<b>dd" not in html
    assert any(ODD in text for text in page.texts["title"][1:])  # of the dots
    assert html.count("<script") == 1  # the page's own, though an error message names one


def test_pictures_are_the_cases_own(cohort: Path) -> None:
    page = Page(report.make_report(cohort / "out"))
    pictures = page.all("img")
    names = [text.rsplit(None, 2)[0] for text in page.texts["summary"]]
    assert [picture["alt"] for picture in pictures] == [f"QC picture of {name}" for name in names]
    for picture, name in zip(pictures, names, strict=True):
        data = base64.b64decode((picture["src"] or "").partition(",")[2])
        qc = cohort / "out" / name / "qc.png"
        with Image.open(io.BytesIO(data)) as inside, Image.open(qc) as original:
            assert inside.size == original.size and inside.format == "WEBP"
        assert len(data) < qc.stat().st_size
    assert not Page(report.make_report(cohort / "out", pictures="none")).all("img")


def test_scores_are_those_of_evaluate(cohort: Path) -> None:
    html = report.make_report(cohort / "out", cohort / "data")
    scores = evaluate(cohort / "data", cohort / "out", allow_missing_cases=True, processes=1).scores
    cells = {(cell.get("data-dsc"), cell.get("data-hd95")) for cell in Page(html).all("td") if "data-volume" in cell}
    for score in scores:
        known = tuple(None if value is None else str(value) for value in (score.dsc, score.hd95_mm))
        assert known in cells
    assert "Scores against the truth" in html and "Scores against the truth" not in report.make_report(cohort / "out")


def test_failures_and_settings_are_told(cohort: Path) -> None:
    page = Page(report.make_report(cohort / "out"))
    record = json.loads((cohort / "out" / "case_0" / "prediction.json").read_text())
    assert "broken" in page.texts["dt"] and any("broken/img.nrrd" in text for text in page.texts["dd"])
    assert record["made_with"]["checkpoint_sha256"] in page.texts["dd"]
    assert any(record["input"]["path"] in text for text in page.texts["p"])
    assert page.texts["dd"][page.texts["dt"].index("cases")] == "3"


def test_predictions_of_earlier_versions(cohort: Path, tmp_path: Path) -> None:
    old = {"Brainstem": {"volume_cm3": 20.0, "center_mm": [1.0, 2.0, 3.0], "confidence": 0.9}}
    old["Eye_L"] = {"volume_cm3": 0.0, "center_mm": None, "confidence": None, "heatmap_peak": 0.01}
    shutil.copytree(cohort / "out" / "case_0", tmp_path / "case_0")
    (tmp_path / "case_0" / "prediction.json").unlink()
    (tmp_path / "case_0" / "statistics.json").write_text(json.dumps(old))
    page = Page(report.make_report(tmp_path))
    assert "unknown: predicted by an earlier version" in page.texts["dd"] and "20.0" in page.texts["td"]


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_the_command(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    assert report.main([str(cohort / "out"), "--truth", str(cohort / "data"), "--out", str(out)]) == 0
    assert re.fullmatch(rf"written: {out}, 0\.\d MB\n", capsys.readouterr().out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    for folder in (".", str(tmp_path)):
        with pytest.raises(FocusNetError, match=r"^cannot write .*: it is a folder, expected a file$"):
            report.main(["no predictions that would be read", "--out", folder])
    with pytest.raises(FocusNetError, match=r"^no predictions in .*data: expected folders with statistics.json"):
        report.main([str(cohort / "data"), "--out", str(out)])
    shutil.copytree(cohort / "out", tmp_path / "damaged")
    (tmp_path / "damaged" / "case_0" / "qc.png").write_bytes(b"\x89PNG")
    with pytest.raises(FocusNetError, match=r"^cannot read .*case_0/qc.png: it is no picture, or damaged$"):
        report.main([str(tmp_path / "damaged"), "--out", str(out)])
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"".join(_chunk(*c) for c in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))
    (tmp_path / "damaged" / "case_0" / "qc.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    with pytest.raises(FocusNetError, match=r"^cannot read .*case_0/qc.png: it is no picture, or damaged$"):
        report.main([str(tmp_path / "damaged"), "--out", str(out)])
    (tmp_path / "damaged" / "case_0" / "prediction.json").write_text('{"input": {}}')
    with pytest.raises(FocusNetError, match=r"case_0/prediction.json is none that predict wrote: odd made_with$"):
        report.main([str(tmp_path / "damaged"), "--out", str(out)])
    (tmp_path / "damaged" / "case_0" / "statistics.json").write_text('{"Brainstem": 1}')
    with pytest.raises(FocusNetError, match=r"case_0/statistics.json is none that predict wrote"):
        report.main([str(tmp_path / "damaged"), "--out", str(out)])
