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
    lines = compare(results, "bbox/AP", results[0]["row"])
    table = make_table(lines, "bbox/AP")
    assert file.with_suffix(".md").read_text() == table
    assert table in TEXT


def test_sentences_are_those_of_the_runs():
    """A difference in the text, [row](results/TABLE.csv): +1.0, is that of the table.

    Of another number than AP it is [row, bbox/AP50](results/TABLE.csv): +1.0.
    """
    text = TEXT + (DOCS / "choosing.md").read_text() + (DOCS.parent / "README.md").read_text()
    said = re.findall(r"\[([^\]]+)\]\((?:docs/)?(results/[\w/]+\.csv)\): ([+-]\d+\.\d)", text)
    for name, file, difference in said:
        row, _, metric = name.partition(", bbox/")
        results = read_results(DOCS / file)
        metric = f"bbox/{metric}" if metric else "bbox/AP"
        lines = {line.row: line for line in compare(results, metric, results[0]["row"])}
        assert f"{lines[row].difference.mean:+.1f}" == difference, name
    assert said
