"""What docs/results.md says is what the runs in docs/results/ show."""

import re

import pytest
from scipy import stats
from toys import CONFIGS

from libra_d2.engine.comparison import compare, make_table, read_results
from libra_d2.statistics import paired_difference

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


LINK = re.compile(
    r"\[([^\]]+)\]\((?:docs/)?(results/[\w/]+\.csv)\): ([+-]\d+\.\d)(?!\d)"
    r"(?: \[([+-]\d+\.\d), ([+-]\d+\.\d)\])?"
    r"(?: \(p = ([\d.]+), ([\d.]+) after the correction for (\d+) rows\))?"
)
MEANS = re.compile(r"Means of \[its runs\]\((results/[\w/]+\.csv)\):\n\n((?:\|.*\n)+)")


def test_sentences_are_those_of_the_runs():
    """A difference in the text, [row](results/TABLE.csv): +1.0, is that of the table.

    Of another number than its main one it is [row, bbox/AP50](results/TABLE.csv): +1.0, to another
    row than the first [row against other](results/TABLE.csv): +1.0. Its interval may follow,
    [+0.5, +1.5], and (p = 0.02, 0.10 after the correction for 5 rows).
    """
    text = TEXT + (DOCS / "choosing.md").read_text() + (DOCS.parent / "README.md").read_text()
    text = " ".join(text.split())
    said = LINK.findall(text)
    # None is passed over because it is written in another way.
    assert len(said) + len(MEANS.findall(TEXT)) == text.count(".csv)") > 50
    assert sum(bool(p) for *_, p, _, _ in said) == text.count("p =") == text.count("rows)")
    for name, file, *numbers, p, corrected, num_rows in said:
        results = read_results(DOCS / file)
        name, _, metric = name.rpartition(", ") if "/" in name else (name, "", "")
        row, _, other = name.partition(" against ")
        values = {r["row"]: {} for r in results}
        for r in results:
            values[r["row"]][r["seed"]] = r[metric or main_metric(results)]
        own, base = values[row], values[other or results[0]["row"]]
        seeds = sorted(own.keys() & base.keys())
        own, base = ([side[seed] for seed in seeds] for side in (own, base))
        found = paired_difference(own, base)
        expected = (found.mean, found.low, found.high)
        expected = [f"{round(number, 1) + 0.0:+.1f}" for number in expected]  # never -0.0
        assert all(n in ("", e) for n, e in zip(numbers, expected, strict=True)), (name, expected)
        if p:
            exact = stats.ttest_rel(own, base).pvalue
            assert int(num_rows) == len(values) - 1, name
            assert float(p) == pytest.approx(exact, abs=unit(p) / 2), (name, exact)
            assert float(corrected) == pytest.approx(
                exact * int(num_rows), abs=unit(corrected) / 2
            ), (name, exact)


def test_means_are_those_of_the_runs():
    """Of columns that no table of differences has: logs, and scores with one class for all."""
    tables = MEANS.findall(TEXT)
    assert len(tables) == TEXT.count("Means of [") > 5
    for file, table in tables:
        results = read_results(DOCS / file)
        head, _, *lines = (
            [cell.strip() for cell in x.split("|")[1:-1]] for x in table.splitlines()
        )
        assert [line[0] for line in lines] == list(dict.fromkeys(r["row"] for r in results))
        for row, *cells in lines:
            for metric, said in zip(head[1:], cells, strict=True):
                values = [r[metric] for r in results if r["row"] == row and metric in r]
                mean = (
                    f"{sum(values) / len(values):.{len(said.partition('.')[2])}f}" if values else ""
                )
                assert mean == said, (file, row, metric)


def unit(number):
    """Of its last digit."""
    return 10.0 ** -len(number.partition(".")[2])
