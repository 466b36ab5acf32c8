"""What docs/results.md says is what the runs in docs/results/ show."""

import re

import pytest
from toys import CONFIGS

from libra_d2.engine.comparison import compare, make_table, read_results

DOCS = CONFIGS.parent / "docs"
TABLES = sorted((DOCS / "results").rglob("*.csv"))
TEXT = (DOCS / "results.md").read_text()


@pytest.mark.parametrize("file", TABLES, ids=lambda f: f.stem)
def test_tables_are_those_of_the_runs(file):
    results = read_results(file)
    assert len({r["code"] for r in results}) == 1  # nothing is mixed
    metric = main_metric(results)
    table = make_table(compare(results, metric, results[0]["row"]), metric)
    assert file.with_suffix(".md").read_text() == table
    assert table in TEXT


def main_metric(results):
    """What a table compares: AP of boxes, or average recall of proposals."""
    return "bbox/AP" if "bbox/AP" in results[0] else "box_proposals/AR@100"


def test_sentences_are_those_of_the_runs():
    """A difference in the text, [row](results/TABLE.csv): +1.0, is that of the table.

    Of another number than its main one it is [row, bbox/AP50](results/TABLE.csv): +1.0.
    """
    text = TEXT + (DOCS / "choosing.md").read_text() + (DOCS.parent / "README.md").read_text()
    said = re.findall(r"\[([^\]]+)\]\((?:docs/)?(results/[\w/]+\.csv)\): ([+-]\d+\.\d)", text)
    for name, file, difference in said:
        results = read_results(DOCS / file)
        row, _, metric = name.rpartition(", ") if "/" in name else (name, "", "")
        metric = metric or main_metric(results)
        lines = {line.row: line for line in compare(results, metric, results[0]["row"])}
        assert f"{lines[row].difference.mean:+.1f}" == difference, name
    assert said
