"""The balanced pyramid around any other, and the checkpoints that load into it."""

import copy
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.backbone import FPN
from torch import nn
from toys import BASELINE, LIBRA, PLAIN, RETINANET, small_config, toy_config

from libra_d2.checkpoint import write_weights
from libra_d2.engine.weights import WeightsCheckpointer
from libra_d2.layers import BalancedFeaturePyramid
from libra_d2.modeling import BalancedPyramid


@BACKBONE_REGISTRY.register()
def build_uneven_backbone(cfg, input_shape):
    """A pyramid of anyone's own, whose levels differ in channels."""

    class Uneven(Backbone):
        _out_features = ("p2", "p3")
        _out_feature_channels = {"p2": 8, "p3": 16}  # noqa: RUF012
        _out_feature_strides = {"p2": 4, "p3": 8}  # noqa: RUF012

        def forward(self, x):
            raise NotImplementedError

    return Uneven()


class TestBfpBackbone:
    def build(self, *opts):
        return build_model(
            small_config(LIBRA, "MODEL.BACKBONE.NAME", "build_bfp_backbone", *opts)
        ).backbone

    def test_balances_what_the_pyramid_gives(self):
        torch.manual_seed(0)
        backbone = self.build().eval()
        for parameter in backbone.bfp.parameters():
            nn.init.normal_(parameter, std=0.1)
        image = torch.rand(2, 3, 64, 96)
        plain = backbone.pyramid(image)
        names = ["p2", "p3", "p4", "p5", "p6"]
        expected = backbone.bfp([plain[name] for name in names])
        got, called = backbone(image), backbone.forward(image)
        assert list(got) == names
        assert all(torch.equal(got[name], called[name]) for name in names)
        for name, level in zip(names, expected, strict=True):
            torch.testing.assert_close(got[name], level)
            assert not torch.equal(got[name], plain[name])

    def test_levels_not_named_pass_through(self):
        names = ["p2", "p3", "p4", "p5"]
        backbone = self.build("MODEL.BFP.IN_FEATURES", names).eval()
        image = torch.rand(1, 3, 64, 64)
        plain, got = backbone.pyramid(image), backbone(image)
        assert torch.equal(got["p6"], plain["p6"])
        assert not any(torch.equal(got[name], plain[name]) for name in names)

    def test_has_what_the_pyramid_has(self):
        backbone = self.build()
        assert isinstance(backbone, BalancedPyramid) and isinstance(backbone.pyramid, FPN)
        assert backbone.size_divisibility == 32
        assert backbone.padding_constraints == backbone.pyramid.padding_constraints
        assert backbone.output_shape() == backbone.pyramid.output_shape()
        assert backbone.bottom_up is backbone.pyramid.bottom_up
        assert "(bfp): BalancedFeaturePyramid" in str(backbone)
        with pytest.raises(AttributeError, match="nothing"):
            _ = backbone.nothing

    def test_is_switched_off_by_one_override(self):
        assert type(self.build("MODEL.BFP.ENABLED", False)) is FPN

    def test_wrapping_twice_is_refused(self):
        backbone = self.build()
        with pytest.raises(ValueError, match="got one that is balanced already"):
            BalancedPyramid(backbone, BalancedFeaturePyramid(64, 5))

    @pytest.mark.parametrize(("channels", "levels"), [(64, 4), (32, 5)])
    def test_a_bfp_that_does_not_fit(self, channels, levels):
        pyramid = self.build().pyramid
        with pytest.raises(ValueError, match="bfp must be for 5 levels, p2, p3, .*of 64 channels"):
            BalancedPyramid(pyramid, BalancedFeaturePyramid(channels, levels))

    def test_copies_and_pickles(self):
        backbone = self.build()
        copied = pickle.loads(pickle.dumps(backbone)).eval()
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(copied(image)["p2"], backbone.eval()(image)["p2"])
        copied = copy.deepcopy(backbone).eval()
        image = torch.rand(1, 3, 64, 64)
        nn.init.ones_(copied.bfp.refine.conv_out.bias)
        assert not torch.equal(copied(image)["p2"], backbone.eval()(image)["p2"])

    @pytest.mark.parametrize(
        ("opts", "match"),
        [
            (
                ("MODEL.BFP.REFINE_LEVEL", 5),
                r"MODEL.BFP.REFINE_LEVEL must be in \[0, 4\] for 5 levels, got 5",
            ),
            (("MODEL.BFP.REFINE_LEVEL", -1), "REFINE_LEVEL must be in"),
            (("MODEL.BFP.REFINE_TYPE", "nonlocal"), "did you mean 'non_local'.*conv, none"),
            (("MODEL.BFP.IN_FEATURES", ["p2", "p9"]), "some of p2, p3, p4.*got p2, p9"),
            (("MODEL.BFP.IN_FEATURES", ["p3", "p2", "p4"]), "in this order; got p3, p2, p4"),
            (("MODEL.BFP.IN_FEATURES", ["p2", "p2", "p3"]), "in this order; got p2, p2, p3"),
            (("MODEL.BFP.FPN_BUILDER", "build_bfp_backbone"), "does not exist"),
            (("MODEL.BFP.FPN_BUILDER", "build_resnet_fpn"), "did you mean 'build_resnet_fpn_back"),
            (
                ("MODEL.BFP.FPN_BUILDER", "build_uneven_backbone", "MODEL.BFP.REFINE_LEVEL", 0),
                "same channels, got .*'p2': 8, 'p3': 16",
            ),
        ],
    )
    def test_bad_options(self, opts, match):
        with pytest.raises(ValueError, match=match):
            self.build(*opts)


class TestPafpn:
    @torch.no_grad()
    @pytest.mark.parametrize("bfp", [False, True])
    def test_two_stage(self, bfp):
        """Each level by hand; P6 is made from the outcome P5, as in mmdetection."""
        opts = ["MODEL.BACKBONE.NAME", "build_resnet_pafpn_backbone"]
        if bfp:
            opts = ["MODEL.BACKBONE.NAME", "build_bfp_backbone"]
            opts += ["MODEL.BFP.FPN_BUILDER", "build_resnet_pafpn_backbone"]
        torch.manual_seed(0)
        backbone = build_model(toy_config(BASELINE, *opts)).backbone.eval()
        image = torch.rand(1, 3, 64, 96)
        pyramid = backbone.pyramid if bfp else backbone
        plain, got = FPN.forward(pyramid, image), pyramid(image)
        path = plain["p2"]
        assert torch.equal(got["p2"], path)
        for i in (3, 4, 5):
            path = plain[f"p{i}"] + getattr(backbone, f"pafpn_downsample{i}")(path)
            expected = getattr(backbone, f"pafpn_output{i}")(path)
            assert torch.equal(got[f"p{i}"], expected)
            assert not torch.equal(expected, plain[f"p{i}"])
        assert torch.equal(got["p6"], got["p5"][..., ::2, ::2])
        assert list(got) == ["p2", "p3", "p4", "p5", "p6"]
        assert any(not torch.equal(backbone(image)[name], got[name]) for name in got) == bfp

    @torch.no_grad()
    def test_retinanets_p6_and_p7_come_from_the_last_stage(self):
        opts = ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"]
        torch.manual_seed(0)
        backbone = build_model(toy_config(RETINANET, *opts)).backbone.eval()
        image = torch.rand(1, 3, 128, 128)
        plain, got = FPN.forward(backbone, image), backbone(image)
        assert list(got) == ["p3", "p4", "p5", "p6", "p7"]
        assert all(torch.equal(got[name], plain[name]) for name in ("p3", "p6", "p7"))
        assert not any(torch.equal(got[name], plain[name]) for name in ("p4", "p5"))


class TestCheckpoints:
    def test_a_plain_models_checkpoint_lacks_only_the_bfp(self, tmp_path):
        torch.manual_seed(0)
        plain = build_model(toy_config(BASELINE, *PLAIN))
        DetectionCheckpointer(plain, str(tmp_path)).save("plain")
        libra = build_model(toy_config(LIBRA))
        incompatible = DetectionCheckpointer(libra)._load_model(
            torch.load(tmp_path / "plain.pth", weights_only=True)
        )
        own = {f"backbone.{n}" for n, _ in libra.backbone.named_parameters() if n.startswith("bfp")}
        assert set(incompatible.missing_keys) == own and len(own) == 8
        assert incompatible.unexpected_keys == []
        state = libra.state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())

    @pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
    def test_both_directions_in_every_kind_of_file(self, suffix, tmp_path):
        torch.manual_seed(0)
        plain, libra = build_model(toy_config(BASELINE)), build_model(toy_config(LIBRA))
        for source, target in ((plain, libra), (libra, plain)):
            file, state = tmp_path / f"{id(source)}{suffix}", source.state_dict()
            if suffix == ".pkl":
                arrays = {name: value.numpy() for name, value in state.items()}
                file.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
            else:
                write_weights(str(file), dict(state), {})
            loaded, found = copy.deepcopy(target), {}
            checkpointer = WeightsCheckpointer(loaded)
            load = checkpointer._load_model
            checkpointer._load_model = lambda c, load=load, found=found: found.setdefault(
                "incompatible", load(c)
            )
            checkpointer.load(str(file))
            own = {name for name in libra.state_dict() if name.startswith("backbone.bfp.")}
            missing, unexpected = own, set()
            if target is plain:
                missing, unexpected = set(), own
            assert set(found["incompatible"].missing_keys) == missing
            assert set(found["incompatible"].unexpected_keys) == unexpected
            both = plain.state_dict().keys()
            assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in both)

    def test_missing_weights_are_called_what_files_call_them(self):
        libra = build_model(toy_config(LIBRA))
        state = libra.state_dict()
        assert not any("pyramid" in name for name in state)
        state.pop("backbone.fpn_lateral2.weight")
        state["backbone.odd"] = torch.zeros(1)
        found = libra.load_state_dict(state, strict=False)
        assert found.missing_keys == ["backbone.fpn_lateral2.weight"]
        assert found.unexpected_keys == ["backbone.odd"]

    @pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
    def test_missing_statistics_are_told_and_kept(self, norm):
        """As in the plain model: torch decides by the versions that files have of modules."""
        plain = build_model(toy_config(BASELINE, "MODEL.RESNETS.NORM", norm)).state_dict()
        libra = build_model(toy_config(LIBRA, "MODEL.RESNETS.NORM", norm))
        name = "backbone.bottom_up.stem.conv1.norm.running_mean"
        statistics = libra.backbone.bottom_up.stem.conv1.norm.running_mean
        del plain[name]
        statistics.fill_(3.0)
        found = libra.load_state_dict(plain, strict=False)
        assert name in found.missing_keys and (statistics == 3.0).all()
        assert [key for key in found.missing_keys if ".bfp." not in key] == [name]

    def test_strict_loading_calls_weights_what_files_call_them(self):
        libra = build_model(toy_config(LIBRA))
        state = libra.state_dict()
        state["backbone.fpn_lateral2.weight"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match="size mismatch for backbone.fpn_lateral2.weight"):
            libra.load_state_dict(state)
        assert libra.load_state_dict(libra.state_dict()).missing_keys == []

    def test_an_imagenet_backbone_loads(self):
        """By detectron2's matching of names, as from its R-50.pkl."""
        torch.manual_seed(0)
        source = build_model(toy_config(BASELINE, *PLAIN)).backbone.bottom_up.state_dict()
        libra = build_model(toy_config(LIBRA))
        checkpoint = {"model": dict(source), "matching_heuristics": True, "__author__": "test"}
        DetectionCheckpointer(libra)._load_model(checkpoint)
        state = libra.backbone.bottom_up.state_dict()
        assert all(torch.equal(state[name], value) for name, value in source.items())
