"""Steps in another precision or memory format."""

import json
import os
import platform
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from runs import RETINANET, at_iteration, model_of, same_weights, send
from toys import CONFIGS, SMALL, small_config

from libra_d2.config import get_key, list_keys
from libra_d2.engine import LibraTrainer, speed
from libra_d2.engine.lazy_config import load_lazy_config
from libra_d2.engine.speed import amp_dtype, fuse, settle_speed

FAST = ("SOLVER.AMP.ENABLED", True, "MODEL.CHANNELS_LAST", True, "SOLVER.FUSED", True)
# What SOLVER.FAST sets on machines of 16 cores.
ON_ANY = {"SOLVER.FUSED": True, "INPUT.RESIZE": "torch", "MODEL.CHANNELS_LAST": True}
HALF = {**ON_ANY, "SOLVER.AMP.ENABLED": True}
ON_CPU = {"MODEL.ROI_ALIGN": "sparse", "SOLVER.KEEP_MEMORY": True}
ON_CPU["DATALOADER.NUM_WORKERS"] = 2
ON_TWO_GPUS = {**HALF, "FLOAT32_PRECISION": "high", "DATALOADER.PIN_MEMORY": True}
ON_TWO_GPUS["DATALOADER.NUM_WORKERS"] = 7
BASELINE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def build(*opts):
    torch.manual_seed(0)
    return LibraTrainer.build_model(small_config(BASELINE, *SMALL, *opts))


def losses_of(out):
    records = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return {k: v for k, v in records[0].items() if "loss" in k}


class TestAmp:
    @pytest.mark.parametrize(
        ("opts", "dtype"),
        [
            ((), torch.float32),
            (("SOLVER.AMP.ENABLED", True), torch.bfloat16),
            (("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"), torch.bfloat16),
            (("SOLVER.AMP.DTYPE", "float16"), torch.float32),
        ],
    )
    def test_its_dtype(self, opts, dtype):
        assert amp_dtype(small_config(BASELINE, *opts)) == dtype

    def test_its_dtype_on_a_gpu(self):
        cfg = small_config(BASELINE, "SOLVER.AMP.ENABLED", True).clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cuda"
        assert amp_dtype(cfg) == torch.float16

    @pytest.mark.parametrize("config", [BASELINE, RETINANET])
    def test_it_computes_in_bfloat16(self, run, out, monkeypatch, config):
        dtypes = set()

        def look(trainer):
            backbone = trainer.model.backbone
            backbone.register_forward_hook(
                lambda *args: dtypes.update(x.dtype for x in args[-1].values())
            )

        at_iteration(monkeypatch, 0, look)
        assert run("SOLVER.AMP.ENABLED", True, config=config, iterations=2) == 0
        assert dtypes == {torch.bfloat16}
        assert all(
            p.dtype == torch.float32 for p in model_of(out).values() if p.is_floating_point()
        )
        in_bfloat16 = losses_of(out)
        assert run(config=config, iterations=2, output=out.with_name("plain")) == 0
        plain = losses_of(out.with_name("plain"))
        assert in_bfloat16 != plain
        for name, loss in plain.items():
            assert in_bfloat16[name] == pytest.approx(loss, rel=0.1, abs=0.05), name


class TestChannelsLast:
    def test_it_changes_how_weights_lie_alone(self):
        plain, model = build(), build("MODEL.CHANNELS_LAST", True)
        weight = model.backbone.fpn_output2.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert same_weights(plain.state_dict(), model.state_dict())
        image = [{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}]
        with torch.no_grad():
            features = model.backbone(model.preprocess_image(image).tensor)
            expected = plain.backbone(plain.preprocess_image(image).tensor)
        assert features["p2"].is_contiguous(memory_format=torch.channels_last)
        for name, level in expected.items():
            torch.testing.assert_close(features[name], level, atol=1e-4, rtol=1e-4)


class TestFast:
    """SOLVER.FAST sets what the machine is fast with, and says so."""

    @pytest.mark.parametrize(
        ("gpu", "bfloat16", "expected"),
        [
            (False, False, {**ON_ANY, **ON_CPU}),
            (False, True, {**HALF, **ON_CPU, "SOLVER.AMP.DTYPE": "bfloat16"}),
            (True, True, {**ON_TWO_GPUS, "SOLVER.AMP.DTYPE": "bfloat16"}),
            (True, False, {**ON_TWO_GPUS, "SOLVER.AMP.DTYPE": "float16"}),
        ],
    )
    def test_by_machine(self, gpu, bfloat16, expected, monkeypatch, capsys):
        monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.35"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: bfloat16)
        monkeypatch.setattr(speed, "cpu_gains_from_bfloat16", lambda: bfloat16)
        cfg = small_config(BASELINE, "SOLVER.FAST", True)
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 4  # detectron2's
        before = cfg.clone()
        cfg.MODEL.DEVICE = before.MODEL.DEVICE = "cuda" if gpu else "cpu"
        settle_speed(cfg)
        changed = {k: v for k, v in list_keys(cfg) if v != get_key(before, k)}
        assert {k: v for k, v in changed.items() if not isinstance(v, dict)} == expected
        told = capsys.readouterr().out
        assert all(f"{key} {value}" in told for key, value in expected.items())

    @pytest.mark.parametrize(
        ("cpu", "expected"),
        [
            ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
            ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
            ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
            ({"cpu_name": "AMD EPYC", "avx512_f": True}, False),
            ({}, False),
        ],
    )
    def test_cpus_that_bfloat16_is_fast_on(self, cpu, expected, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
        assert speed.cpu_gains_from_bfloat16() is expected

    def test_a_number_of_workers_that_was_chosen_stays(self):
        cfg = small_config(BASELINE, "SOLVER.FAST", True, "DATALOADER.NUM_WORKERS", 0)
        cfg.defrost()
        settle_speed(cfg)
        assert cfg.DATALOADER.NUM_WORKERS == 0

    def test_a_lazy_config_has_it_too(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        file = CONFIGS / "COCO-Detection" / "libra_faster_rcnn_R_50_FPN_1x.py"
        opts = ["train.fast=true", "train.device=cpu"]
        lazy = load_lazy_config(str(file), opts, settle=settle_speed).lazy
        assert lazy.train.fused and lazy.train.keep_memory
        assert lazy.dataloader.resize == "torch" and lazy.dataloader.train.num_workers == 2

    def test_a_run_says_it_and_its_config_has_it(self, run, out, capsys):
        assert run("SOLVER.FAST", True, iterations=2) == 0
        assert "SOLVER.FAST: SOLVER.FUSED True" in capsys.readouterr().out
        assert "FUSED: true" in (out / "config.yaml").read_text()
        assert "KEEP_MEMORY: true" in (out / "config.yaml").read_text()
        saved = torch.load(out / "model_final.pth", weights_only=True)["trainer"]["_trainer"]
        assert all(group["fused"] for group in saved["optimizer"]["param_groups"])

    @pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
    def test_a_fused_step_is_the_same_up_to_rounding(self, optimizer):
        weights = []
        for fused in (False, True):
            opts = ("SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", 0.1)
            cfg = small_config(BASELINE, *SMALL, *opts)
            model = build()
            steps = LibraTrainer.build_optimizer(cfg, model)
            if fused:
                fuse(steps)
            generator = torch.Generator().manual_seed(0)
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                steps.step()
            weights.append(model.state_dict())
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-5)


def test_a_run_goes_on_to_the_last_bit(run, tmp_path, monkeypatch):
    run = partial(run, *FAST)
    assert run(output=tmp_path / "whole") == 0
    with monkeypatch.context() as context:
        at_iteration(context, 2, send(signal.SIGTERM))
        assert run() == 143
    assert run(flags=["--resume"]) == 0
    assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "out"))


PAGES_OF_LAST_ALLOCATION = """
import resource
import torch
from libra_d2.engine.speed import keep_memory
{call}
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26, dtype=torch.uint8)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("call", "is_quick"), [("", False), ("keep_memory()", True)])
def test_kept_memory_is_not_cleared_again(call, is_quick):
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    code = PAGES_OF_LAST_ALLOCATION.format(call=call)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert (int(done.stdout) < 16) == is_quick
