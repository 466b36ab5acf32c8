"""The notebook of the docs, run from its first cell to its last."""

import nbformat
from nbclient import NotebookClient
from toys import CONFIGS

SMALL = '"INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"'
NOTEBOOK = CONFIGS.parent / "docs" / "first_steps.ipynb"


def test_it_runs(tmp_path, monkeypatch, tiny_coco):
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    (settings,) = (c for c in notebook.cells if "ITERATIONS = 300" in c.source)
    settings.source = settings.source.replace("ITERATIONS = 300", "ITERATIONS = 21")
    for cell in notebook.cells:  # few and small images, soon scored
        data = f'"--train", "{tiny_coco}", "--val", "{tiny_coco}", "--output"'
        cell.source = cell.source.replace('"--output"', data)
        cell.source = cell.source.replace('"TEST.EVAL_PERIOD"', f'{SMALL}, "TEST.EVAL_PERIOD"')
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "libra: AP " in printed and "plain: AP " in printed
    pictures = sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert pictures == 2
    assert (tmp_path / "runs" / "report.html").stat().st_size > 50_000
