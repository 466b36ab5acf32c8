"""The notebook of the docs, run from its first cell to its last."""

import json

from toys import CONFIGS, SMALL, toy_opts

NOTEBOOK = json.loads((CONFIGS.parent / "docs" / "first_steps.ipynb").read_text())


def test_it_runs(tmp_path, monkeypatch, tiny_coco, capsys):
    monkeypatch.chdir(tmp_path)
    # Few and small images, and a small model, as in the other tests.
    drop = "MODEL.ROI_HEADS.NUM_CLASSES"
    opts = toy_opts(*SMALL)
    opts = [o for i, o in enumerate(opts) if opts[i - i % 2] != drop]
    replaced = {
        "ITERATIONS = 300": "ITERATIONS = 21",
        '"--output"': f'"--train", "{tiny_coco}", "--val", "{tiny_coco}", "--output"',
        "options = [": f"options = [*{opts}, ",
    }
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    text = "".join("".join(cell["source"]) for cell in cells)
    assert all(text.count(old) == (2 if "output" in old else 1) for old in replaced)
    names = {}
    for cell in cells:
        assert not cell["outputs"] and cell["execution_count"] is None
        source = "".join(cell["source"])
        for old, new in replaced.items():
            source = source.replace(old, new)
        exec(compile(source, "first_steps.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "libra: AP " in printed and "plain: AP " in printed
    assert "%" in printed
    # Each run speaks once, and in its own log.
    assert printed.count("Starting training from iteration 0") == 2
    for run in ("libra", "plain"):
        log = (tmp_path / "runs" / run / "log.txt").read_text()
        assert log.count("Starting training from iteration 0") == 1
    assert names["result"].plot().shape[2] == 3
    assert (tmp_path / "runs" / "both.png").stat().st_size > 10_000
    assert (tmp_path / "runs" / "report.html").stat().st_size > 50_000


def test_its_format():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"markdown", "code"}
