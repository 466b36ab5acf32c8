"""Non-local block and balanced feature pyramid: values, sizes, gradients, bad input."""

import pytest
import torch
from torch.nn import functional as F

from libra_d2.layers import BalancedFeaturePyramid, NonLocal2d

NESTED = [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
ODD = [(50, 67), (25, 34), (13, 17), (7, 9), (4, 5)]


def make_levels(sizes, channels=8, images=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, *s, generator=generator, dtype=dtype) for s in sizes]


def randomize(module):
    """Gives every parameter a value, so that no block is the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def attention_by_hand(block, x):
    """The textbook form, one image at a time, with the whole matrix of attention weights."""
    out = []
    for image in x:
        theta, phi, g = (
            conv(image[None])[0].flatten(1) for conv in (block.theta, block.phi, block.g)
        )
        weights = (theta.T @ phi).softmax(dim=-1)  # (H W, H W): position i attends to j
        y = (g @ weights.T).view_as(image)
        out.append(image + block.conv_out(y[None])[0])
    return torch.stack(out)


class TestNonLocal:
    def test_is_the_textbook_form(self):
        block = randomize(NonLocal2d(8)).double()
        x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
        torch.testing.assert_close(block(x), attention_by_hand(block, x))

    def test_new_block_is_the_identity(self):
        x = torch.randn(2, 16, 6, 5)
        assert torch.equal(NonLocal2d(16)(x), x)

    def test_parameters(self):
        shapes = {name: tuple(p.shape) for name, p in NonLocal2d(4).named_parameters()}
        convs = ("theta", "phi", "g", "conv_out")
        assert shapes == {
            **{f"{conv}.weight": (4, 4, 1, 1) for conv in convs},
            **{f"{conv}.bias": (4,) for conv in convs},
        }

    def test_gradcheck(self):
        block = randomize(NonLocal2d(3)).double()
        x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(block, x)

    def test_bfloat16(self):
        block = randomize(NonLocal2d(8)).bfloat16()
        assert block(torch.randn(1, 8, 4, 4).bfloat16()).dtype == torch.bfloat16


def balance_by_hand(levels, refine_level, refine):
    """Adaptive pooling and nearest interpolation throughout, whatever the sizes."""
    size = levels[refine_level].shape[-2:]
    resized = [
        F.adaptive_max_pool2d(x, size) if i < refine_level else F.interpolate(x, size=size)
        for i, x in enumerate(levels)
    ]
    refined = refine(torch.stack(resized).mean(0))
    return [
        x + F.interpolate(refined, size=x.shape[-2:])
        if i < refine_level
        else x + F.adaptive_max_pool2d(refined, x.shape[-2:])
        for i, x in enumerate(levels)
    ]


class TestBalancedFeaturePyramid:
    @pytest.mark.parametrize("sizes", [NESTED, ODD])
    @pytest.mark.parametrize("refine_level", range(5))
    @pytest.mark.parametrize("refine_type", ["non_local", "conv", "none"])
    def test_is_the_definition(self, sizes, refine_level, refine_type):
        bfp = randomize(BalancedFeaturePyramid(8, 5, refine_level, refine_type)).double()
        levels = make_levels(sizes, dtype=torch.float64)
        for got, expected in zip(
            bfp(levels), balance_by_hand(levels, refine_level, bfp.refine), strict=True
        ):
            torch.testing.assert_close(got, expected)

    def test_plain_pooling_where_sizes_nest_has_the_same_values(self):
        """Bit for bit: the kernel is another, the maximum is not."""
        levels = make_levels([(60, 45), (12, 9)])
        bfp = BalancedFeaturePyramid(8, 2, refine_level=1, refine_type="none")
        expected = balance_by_hand(levels, 1, torch.nn.Identity())
        assert all(torch.equal(*pair) for pair in zip(bfp(levels), expected, strict=True))

    def test_new_non_local_is_the_parameter_free_version(self):
        levels = make_levels(ODD)
        new = BalancedFeaturePyramid(8, 5)(levels)
        none = BalancedFeaturePyramid(8, 5, refine_type="none")(levels)
        assert all(torch.equal(*pair) for pair in zip(new, none, strict=True))

    def test_inputs_stay_as_they_are(self):
        levels = make_levels(NESTED)
        before = [level.clone() for level in levels]
        randomize(BalancedFeaturePyramid(8, 5))(levels)
        assert all(torch.equal(*pair) for pair in zip(levels, before, strict=True))

    @pytest.mark.parametrize("refine_type", ["non_local", "conv", "none"])
    def test_gradcheck(self, refine_type):
        bfp = randomize(BalancedFeaturePyramid(2, 3, 1, refine_type)).double()
        levels = [
            x.requires_grad_()
            for x in make_levels([(4, 6), (2, 3), (1, 2)], 2, 1, dtype=torch.float64)
        ]
        assert torch.autograd.gradcheck(lambda *x: tuple(bfp(x)), levels)

    def test_parameter_names(self):
        def names(*args):
            bfp = BalancedFeaturePyramid(32, 2, 0, *args)
            return [name for name, _ in bfp.named_parameters()]

        assert names("none") == []
        assert names("conv") == ["refine.conv.weight", "refine.conv.bias"]
        assert names("conv", "GN") == [
            "refine.conv.weight",
            "refine.norm.weight",
            "refine.norm.bias",
        ]
        assert {n.split(".")[1] for n in names("non_local")} == {"theta", "phi", "g", "conv_out"}

    def test_norm_may_be_a_function(self):
        bfp = BalancedFeaturePyramid(8, 2, 0, "conv", norm=lambda c: torch.nn.GroupNorm(2, c))
        assert isinstance(bfp.refine.norm, torch.nn.GroupNorm)

    def test_nothing_of_no_image(self):
        bfp = BalancedFeaturePyramid(8, 5, refine_type="none")
        assert [len(x) for x in bfp(make_levels(NESTED, images=0))] == [0] * 5

    def test_is_exported_without_adaptive_pooling_where_sizes_nest(self):
        class Flat(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bfp = randomize(BalancedFeaturePyramid(8, 5))

            def forward(self, a, b, c, d, e):
                return tuple(self.bfp([a, b, c, d, e]))

        levels = make_levels(NESTED)
        module = Flat().eval()
        program = torch.export.export(module, tuple(levels))
        assert "adaptive" not in str(program.graph)
        for got, expected in zip(program.module()(*levels), module(*levels), strict=True):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("refine_type", ["non_local", "conv", "none"])
    def test_is_exported_for_any_size(self, refine_type):
        """Recorded at sizes that do not nest, and held to those of eager pooling at any."""

        class Pyramid(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bfp = randomize(BalancedFeaturePyramid(8, 5, refine_type=refine_type))

            def forward(self, x):
                return tuple(self.bfp([x[..., :: 2**i, :: 2**i] for i in range(5)]))

        module = Pyramid().eval()
        dims = {"x": {2: torch.export.Dim("h", min=17), 3: torch.export.Dim("w", min=17)}}
        program = torch.export.export(module, (torch.rand(1, 8, 33, 47),), dynamic_shapes=dims)
        traced = torch.jit.trace(module, torch.rand(1, 8, 33, 47))
        for size in ((32, 48), (40, 24), (50, 67), (198, 200), (17, 230)):
            x = torch.randn(1, 8, *size)
            for recorded in (program.module(), traced):
                for got, expected in zip(recorded(x), module(x), strict=True):
                    assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        ("args", "match"),
        [
            ((8, 5, 5), r"refine_level must be in \[0, 4\]"),
            ((8, 5, -1), r"refine_level must be in \[0, 4\]"),
            ((8, 5, 2, "nonlocal"), "one of non_local, conv, none"),
            ((8, 5, 2, "conv", "LN"), "norm must be one of"),
        ],
    )
    def test_bad_options(self, args, match):
        with pytest.raises(ValueError, match=match):
            BalancedFeaturePyramid(*args)

    def test_levels_must_fit(self):
        bfp = BalancedFeaturePyramid(8, 5)
        with pytest.raises(ValueError, match="expected 5 levels, got 4"):
            bfp(make_levels(NESTED[:4]))
        levels = make_levels(NESTED)
        levels[3] = levels[3][:, :4]
        with pytest.raises(ValueError, match=r"level 3 must have shape \(N, 8, H, W\)"):
            bfp(levels)
