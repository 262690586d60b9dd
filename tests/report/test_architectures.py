"""Pictures of architectures in the report of a search: drawn from data alone, and told in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa
from made_sweeps import written
from test_html import EVIL, dom_after_loading

from lightning_optcore import store_schema as tables
from lightning_optcore.jobs.sweep_reporting import sweep_page
from lightning_optcore.report.architecture_svg import cell_svg, cell_text, layers_svg
from lightning_optcore.report.architectures import PICTURE_FILE, Cell, Layer, picture_of
from lightning_optcore.report.sweep_html import write_sweep_report

CELL = {
    "name": "normal",
    "nodes": ["input", "1", "2"],
    "edges": [[0, 1, "conv3"], [0, 2, "skip"], [1, 2, "pool"]],
    "labels": ["width"],
}
LAYERS = [
    {"name": "stem", "kind": "convolution", "width": 8, "size": [8, 8]},
    {"name": "head", "kind": "linear", "width": 32, "size": []},
]


def content(cells=(), layers=()):
    return {"version": 1, "cells": list(cells), "layers": list(layers)}


def leave(page, of):
    """Write pictures into the folders of trials of the front; ``of`` returns the content, or nothing."""
    for trial in page.front:
        made = of(trial)
        if made is not None:
            folder = Path(trial.directory)
            folder.mkdir(exist_ok=True)
            (folder / PICTURE_FILE).write_text(made if isinstance(made, str) else json.dumps(made))


def pictures(text):
    """Return, of each picture of a page, what its drawings say and what stands below."""
    return [
        (re.findall(r'role="img" aria-label="([^"]*)"', figure), unescape(re.sub("<[^>]+>", "", caption)))
        for figure, caption in re.findall(r'<figure class="card">(.*?)<figcaption>(.*?)</figcaption>', text, re.DOTALL)
    ]


def test_every_point_of_the_front_has_its_picture_and_objectives(journal, make_sweep, tmp_path):
    page = sweep_page(journal, make_sweep())
    assert len(page.front) > 2
    leave(page, lambda trial: content([CELL]) if trial is page.front[0] else content(layers=LAYERS))
    text = written(journal, page.id, tmp_path)
    assert "Architectures of the front" in text
    found = pictures(text)
    assert len(found) == len(page.front)
    first, second = page.front[:2]
    (said,), below = found[0]
    assert said == "Cell normal: 1 is conv3 of input; 2 is skip of input and pool of 1"
    assert below.startswith(f"trial {first.number}, val/acc {first.objectives[0]:.5g}, size_bytes ")
    # The choices that the cell does not show.
    assert f"act={first.params['act']}" in below and "lr=" in below and "width=" not in below
    (said,), below = found[1]
    assert said == "2 layers with weights: convolution 8 wide at 8 x 8, linear 32 wide"
    assert below.startswith(f"trial {second.number}, ") and "act=" not in below
    legend = re.search(r'<p class="legend quiet">(.*?)</p>', text)[1]
    assert re.sub("<[^>]+>", "", legend) == "convolutionlinear"


def test_without_pictures_there_is_no_section(journal, make_sweep, tmp_path):
    assert "Architecture" not in written(journal, make_sweep(), tmp_path)


def test_the_best_of_one_objective_and_who_shares_a_network(journal, make_sweep, store, tmp_path):
    sweep = make_sweep(1)
    page = sweep_page(journal, sweep)
    leave(page, lambda trial: content(layers=LAYERS))
    (best,) = page.front
    with store.writing() as connection:
        # Another trial builds the same network: it was not trained, and has no folder.
        where = (tables.trials.c.sweep_id == sweep, tables.trials.c.number == 9)
        values = {
            "objectives": json.dumps([best.objectives[0] + 1]),
            "directory": None,
            "cached_from": f"trial {best.number} of sweep {sweep}",
        }
        connection.execute(sa.update(tables.trials).where(*where).values(values))
    text = written(journal, sweep, tmp_path)
    assert "Architecture of the best" in text
    (((said,), below),) = pictures(text)
    assert said.startswith("2 layers") and below.startswith("trial 9, ")


@pytest.mark.parametrize(
    "made",
    [
        "{",
        "[]",
        json.dumps({"version": 2, "cells": [], "layers": []}),
        json.dumps({"version": 1, "cells": []}),
        json.dumps(content([{**CELL, "edges": [[0, 5, "conv3"]]}])),
        json.dumps(content([{**CELL, "edges": [[1, 1, "conv3"]]}])),
        json.dumps(content([{**CELL, "edges": [[0, 1]]}])),
        json.dumps(content([{**CELL, "nodes": [1, 2]}])),
        json.dumps(content(layers=[{**LAYERS[0], "width": -1}])),
        json.dumps(content(layers=[{**LAYERS[0], "width": 1e400}])),
        json.dumps(content(layers=[{**LAYERS[0], "size": "8x8"}])),
        json.dumps(content(layers=["_target_"])),
    ],
)
def test_a_file_that_is_no_picture_is_left_out(journal, make_sweep, tmp_path, caplog, made):
    page = sweep_page(journal, make_sweep())
    leave(page, lambda trial: made if trial is page.front[0] else content(layers=LAYERS))
    assert len(pictures(written(journal, page.id, tmp_path))) == len(page.front) - 1
    assert f"{PICTURE_FILE}: not shown" in caplog.text


def test_strange_names_come_out_as_they_are(browser, journal, make_sweep, tmp_path):
    cell = {"name": EVIL, "nodes": ["input", '"><em>'], "edges": [[0, 1, EVIL]], "labels": []}
    layer = {"name": EVIL, "kind": '"><script>', "width": 3, "size": [2]}
    page = sweep_page(journal, make_sweep())
    leave(page, lambda trial: content([cell]) if trial is page.front[0] else content(layers=[layer]))
    path = write_sweep_report(sweep_page(journal, page.id), tmp_path / "page.html")
    assert "document.title='pwned'</script>" not in path.read_text()
    dom = dom_after_loading(browser, path, tmp_path)
    assert re.search(r"<title>Sweep \d+ ", dom) and '"><em>' not in dom and '"><script>' not in dom


def drawing(markup):
    return ElementTree.fromstring(str(markup))


def test_bars_are_as_high_as_layers_are_wide():
    layers = [Layer(str(i), kind, width, []) for i, (kind, width) in enumerate([("convolution", 8), ("new", 16)] * 20)]
    bars = [one for one in drawing(layers_svg(layers, 32)) if one.tag == "rect"]
    heights = [float(bar.get("height")) for bar in bars]
    assert heights == [24.0, 48.0] * 20
    assert {float(bar.get("y")) + float(bar.get("height")) for bar in bars} == {114.0}
    places = [float(bar.get("x")) for bar in bars]
    assert places == sorted(set(places))
    assert [bar.get("class") for bar in bars[:2]] == ["k0", "k6"]
    assert bars[1][0].text == "1: new 16 wide"
    assert len(drawing(layers_svg([], 1))) == 1


def test_arcs_of_a_cell_do_not_share_their_heights():
    nodes = ["input", "1", "2", "output"]
    edges = [(i, j, f"{i} to {j}") for j in range(4) for i in range(j)]
    cell = Cell("", nodes, edges)
    svg = drawing(cell_svg(cell))
    texts = {one.text: one for one in svg if one.tag == "text"}
    assert set(texts) == {*nodes, *(name for _, _, name in edges)}
    assert len({texts[name].get("y") for _, _, name in edges}) == len(edges)
    middle = float(texts["input"].get("x")), float(texts["output"].get("x"))
    assert float(texts["0 to 3"].get("x")) == pytest.approx(sum(middle) / 2)
    assert "output is 0 to 3 of input and 1 to 3 of 1 and 2 to 3 of 2" in cell_text(cell)
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert all(0 < float(one.get("x")) < width and 0 < float(one.get("y")) < height for one in texts.values())


def test_a_file_of_any_size_is_cut():
    many = picture_of(content([{**CELL, "edges": CELL["edges"] * 100}], LAYERS * 1000))
    assert (len(many.cells[0].edges), len(many.layers)) == (100, 400)
    assert len(picture_of(content(layers=[{**LAYERS[0], "kind": "x" * 10_000}])).layers[0].kind) == 100


def test_the_page_needs_no_torch(journal, make_sweep, tmp_path):
    page = sweep_page(journal, make_sweep())
    leave(page, lambda trial: content([CELL]))
    code = (
        "import sys; from lightning_optcore.jobs.sweep_reporting import write_own_report; "
        f"write_own_report({str(tmp_path / 'outputs' / 'optcore.db')!r}, {page.id}, 'done'); "
        "assert 'torch' not in sys.modules and 'nni' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert "Cell normal" in (tmp_path / "outputs" / "sweep" / "sweep_report.html").read_text()
