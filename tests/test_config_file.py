"""Config files: what is read of yaml, and what is refused in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys import BASELINE, CONFIGS, LIBRA, toy_config

from libra_d2.engine import load_config
from libra_d2.engine.arithmetic import config_files, evaluate


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "OUTPUT_DIR: !!python/object/apply:os.getcwd []\n",
            r"has the tag tag:yaml.org,2002:python/object/apply:os.getcwd \(line 1\)",
        ),
        ("_BASE_: bad.yaml\n", "_BASE_ leads back to itself"),
        ("MODEL: [unclosed\n", r"not valid yaml \(line 2\)"),
        ("- a\n- b\n", "not a mapping of config keys"),
        ("MODEL:\n  BPF:\n    NORM: BN\n", "there is no key MODEL.BPF.*'MODEL.BFP'"),
        ("_BASE_: nowhere.yaml\n", "_BASE_ '.*nowhere.yaml' does not exist"),
        ("MODEL: 3\n", "not a mapping of config keys"),
        ("SOLVER:\n  BASE_LR: fast\n", "SOLVER.BASE_LR"),
        ("SOLVER:\n  BASE_LR: {{lr}}\n", r"not valid yaml \(line 2\)"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, match):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        load_config(str(file))
    assert "\n" not in str(error.value) and "bad.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (
            "[[x, x * 2**(1.0/3)] for x in [32, 64]]",
            [[32, 32 * 2 ** (1 / 3)], [64, 64 * 2 ** (1 / 3)]],
        ),
        ("[int(x * 0.1 * 640) for x in range(5, 8)]", [320, 384, 448]),
        ("-3 + 4.5", 1.5),
    ],
)
def test_the_zoos_arithmetic_is_read(expression, value, tmp_path):
    assert evaluate(expression) == value
    file = tmp_path / "zoo.yaml"
    name = "!!python/object/apply:eval"
    text = (
        f'_BASE_: base.yaml\nMODEL:\n  ANCHOR_GENERATOR:\n    SIZES: {name} ["[[{expression}]]"]\n'
    )
    file.write_text(text)
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    cfg = load_config(str(file), ["MODEL.DEVICE", "cpu"])
    assert [[value]] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert [Path(f).name for f in config_files(str(file))] == ["zoo.yaml", "base.yaml"]


def test_several_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 3\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nSEED: 4\n")
    file = tmp_path / "c.yaml"
    file.write_text("_BASE_: [a.yaml, b.yaml]\nVERSION: 2\n")
    assert load_config(str(file)).SEED == 4
    assert [Path(f).name for f in config_files(str(file))] == ["c.yaml", "a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd()",
        "[].__class__",
        "open('/etc/passwd')",
        "[x for x in range(10**9)]",
        "[[y for y in range(10000)] for x in range(2000)]",
        "9999**9999",
        "(lambda: 1)()",
        "[x if x else 1 for x in [1]]",
        "'a' * 9",
        "1 +",
        "int",
        "x",
    ],
)
def test_what_is_no_arithmetic_is_not_run(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


def test_a_missing_file_names_its_neighbour():
    with pytest.raises(ValueError, match="does not exist.*did you mean '.*Base-RCNN-FPN.yaml'"):
        load_config(str(CONFIGS / "Base-RCN-FPN.yaml"))


def test_a_saved_config_is_read_again(tmp_path):
    cfg = toy_config(LIBRA)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = load_config(str(file))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert yaml.safe_load(cfg.dump())["MODEL"]["BFP"]["REFINE_TYPE"] == "non_local"


def test_detectron2s_own_config_is_left_alone():
    """Importing and using libra_d2 changes neither detectron2's defaults nor its global config."""
    program = (
        "from detectron2.config import get_cfg, global_cfg\n"
        "before = get_cfg().dump(), global_cfg.dump()\n"
        "from libra_d2.engine import load_config\n"
        f"load_config({str(CONFIGS / BASELINE)!r})\n"
        "assert (get_cfg().dump(), global_cfg.dump()) == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
