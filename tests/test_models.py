"""Whole models: published sizes and costs, timm's conventions, ablations, backbones, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental import _config as fx_config

from emo_kernels.models import ABLATIONS, CONFIGS, create_backbone, create_model, list_models
from emo_kernels.models.macs import count_macs
from emo_kernels.nn import DropPath

EMO_NAMES = ["emo_1m", "emo_2m", "emo_5m", "emo_6m"]

# Parameters of stage0 to stage4, norm and head; float buffers.
CHILDREN = {
    "emo_1m": ([2760, 11504, 27840, 452704, 697024, 336, 169000], 8656),
    "emo_2m": ([2760, 16432, 40896, 1062624, 1053360, 400, 201000], 12592),
    "emo_5m": ([2760, 29040, 105792, 2346384, 2335296, 576, 289000], 21296),
    "emo_6m": ([2760, 29040, 105792, 2346384, 3362880, 640, 321000], 23728),
}

# Parameters, multiply-accumulates of convolutions and of attention, published FLOPs at 224 x 224.
COSTS = {
    "emo_1m": (1_361_168, 242_699_720, 12_369_952, 260_843_664),
    "emo_2m": (2_377_472, 411_356_544, 20_360_480, 439_363_064),
    "emo_5m": (5_108_848, 864_583_808, 27_352_192, 902_583_776),
    "emo_6m": (6_168_496, 922_270_528, 27_659_520, 960_752_512),
}

# Parameters and published FLOPs in millions, to the digits that were printed.
EMO2_COSTS = {
    "emo2_1m": (1_460_844, 284.76),
    "emo2_2m": (2_384_312, 487.45),
    "emo2_5m": (5_126_440, 1035.47),
    "emo2_20m": (20_195_208, 4017.2),
    "emo2_50m": (49_815_560, 8804.2),
}

# Variants of EMO-5M: overrides, parameters (exact, or in millions to three digits), FLOPs / 1e6.
VARIANTS: list[tuple[dict[str, Any], float, float]] = [
    ({"attn_stages": False}, 4_363_760, 778.7),
    ({"attn_stages": (False, False, False, True)}, 4_696_688, 797.7),
    ({"attn_stages": (False, True, True, True)}, 5_129_872, 929.9),
    ({"attn_stages": True}, 5_139_280, 988.3),
    ({"dw_kss": (3, 3, 1, 1)}, 4.886, 871.6),
    ({"dw_kss": (3, 3, 3, 3)}, 4.960, 881.9),
    ({"dw_kss": (3, 3, 7, 7)}, 5.332, 933.6),
    ({"dw_kss": (3, 3, 9, 9)}, 5.629, 974.9),
    ({"v_group": True}, 3_863_664, 745.2),
    ({"attn_pre": False}, 5_108_848, 943.612064),
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return create_model(name, **options)


class TestSizes:
    @pytest.mark.parametrize("name", EMO_NAMES)
    def test_parameters_of_children(self, name: str) -> None:
        model = on_meta(name)
        children, buffers = CHILDREN[name]
        names = ["stage0", "stage1", "stage2", "stage3", "stage4", "norm", "head"]
        assert [n for n, _ in model.named_children()] == names
        assert [count(child) for child in model.children()] == children
        floating = [b for b in model.buffers() if b.is_floating_point()]
        assert sum(b.numel() for b in floating) == buffers
        assert len(model.state_dict()) == (217 if name == "emo_1m" else 258)

    @pytest.mark.parametrize("name", EMO_NAMES)
    def test_multiply_accumulates(self, name: str) -> None:
        parameters, conv, attention, published = COSTS[name]
        model = on_meta(name)
        macs = count_macs(model)
        assert count(model) == parameters
        assert (macs.conv, macs.attention, macs.published) == (conv, attention, published)
        assert macs.linear == model.num_features * 1000

    @pytest.mark.parametrize("name", EMO2_COSTS)
    def test_emo2(self, name: str) -> None:
        parameters, millions = EMO2_COSTS[name]
        model = on_meta(name)
        assert count(model) == parameters
        digits = len(str(millions).split(".")[1])
        assert round(count_macs(model).published / 1e6, digits) == millions

    def test_emo2_at_512_pixels(self) -> None:
        macs = count_macs(on_meta("emo2_5m", window_sizes=8), (1, 3, 512, 512))
        assert round(macs.published / 1e6, 1) == 5627.3

    @pytest.mark.parametrize(("overrides", "parameters", "millions"), VARIANTS)
    def test_variants(self, overrides: dict[str, Any], parameters: float, millions: float) -> None:
        model = on_meta("emo_5m", **overrides)
        if isinstance(parameters, int):
            assert count(model) == parameters
        else:
            assert round(count(model) / 1e6, 3) == parameters
        digits = len(str(millions).split(".")[1])
        assert round(count_macs(model).published / 1e6, digits) == millions

    @pytest.mark.parametrize("name", EMO_NAMES)
    def test_dead_and_projecting_parameters(self, name: str) -> None:
        expected = {
            "emo_1m": (204_288, 896),
            "emo_2m": (393_120, 1360),
            "emo_5m": (745_088, 1856),
            "emo_6m": (823_040, 1920),
        }
        qk = {n: p for n, p in on_meta(name).named_parameters() if ".qk." in n}
        dead = sum(p.numel() // 2 for n, p in qk.items() if n.endswith("bias"))
        assert (sum(p.numel() for p in qk.values()), dead) == expected[name]


class TestConstruction:
    @pytest.mark.parametrize("name", list_models())
    def test_on_the_meta_device(self, name: str) -> None:
        model = on_meta(name)
        assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
        assert model(torch.empty(2, 3, 96, 72, device="meta")).shape == (2, 1000)

    @pytest.mark.parametrize(
        "spelling", ["emo_5m", "EMO_5M", "EMO-5M", "emo_5M", " emo-5m", "Emo_5m"]
    )
    def test_spellings(self, spelling: str) -> None:
        assert on_meta(spelling).config == CONFIGS["emo_5m"]

    @pytest.mark.parametrize("spelling", ["emo2_1m", "EMO2_1M", "EMOv2_1M", "emov2-1m"])
    def test_spellings_of_emo2(self, spelling: str) -> None:
        assert on_meta(spelling).config == CONFIGS["emo2_1m"]

    def test_drop_path_schedule(self) -> None:
        model = on_meta("emo_5m")
        rates = [
            [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in stage]
            for stage in model.stages[1:]
        ]
        step = 0.05 / 17
        assert rates[0] == pytest.approx([0.0, 0.002941, 0.005882], abs=1e-6)
        assert rates[1] == pytest.approx([0.0, 0.011765, 0.014706], abs=1e-6)
        assert rates[2] == pytest.approx([0.0] + [step * i for i in range(7, 15)], abs=1e-9)
        assert rates[3] == pytest.approx([0.0, 0.047059, 0.05], abs=1e-6)
        last = on_meta("emo_1m").stage4[-1].drop_path.drop_prob
        assert last == pytest.approx(14 * 0.0028829, abs=1e-6)

    def test_initial_weights(self) -> None:
        model = create_model("emo_1m")
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not model.head.bias.any()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                assert module.eps == 1e-6
                assert (module.weight == 1).all() and (module.bias == 0).all()
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                bound = module.weight[0].numel() ** -0.5
                assert module.weight.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)

    @pytest.mark.parametrize("name", EMO_NAMES)
    def test_weight_decay_groups(self, name: str) -> None:
        """Every 1-D tensor and bias goes without decay; the names exempt nothing more."""
        model = on_meta(name)
        keywords = model.no_weight_decay_keywords()
        exempt, decayed = [], []
        for key, parameter in model.named_parameters():
            assert key not in model.no_weight_decay()
            assert not any(keyword in key for keyword in keywords)
            group = exempt if parameter.ndim <= 1 or key.endswith(".bias") else decayed
            group.append(parameter.numel())
        expected = {
            "emo_1m": (94, 18_048, 60, 1_343_120),
            "emo_2m": (110, 25_872, 70, 2_351_600),
            "emo_5m": (110, 41_120, 70, 5_067_728),
            "emo_6m": (110, 45_088, 70, 6_123_408),
        }
        assert (len(exempt), sum(exempt), len(decayed), sum(decayed)) == expected[name]

    def test_layer_scale_is_exempt_by_keyword(self) -> None:
        model = create_model("emo2_1m")
        gammas = {n: p for n, p in model.named_parameters() if "gamma" in n}
        assert len(gammas) == sum(model.config.depths)
        assert all((p == 1e-6).all() for p in gammas.values())


class TestConventions:
    def test_forward_is_features_then_head(self) -> None:
        model = create_model("emo_1m", num_classes=7).eval()
        x = torch.randn(2, 3, 64, 40)
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 2, 2)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        torch.testing.assert_close(model(x), model.head(pooled))

    def test_reset_classifier(self) -> None:
        model = create_model("emo_1m").double()
        assert model.get_classifier() is model.head
        model.reset_classifier(5)
        assert model.get_classifier().weight.shape == (5, 168)
        assert model.get_classifier().weight.dtype == torch.float64
        x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        assert model.eval()(x).shape == (1, 5)
        model.reset_classifier(0)
        assert model(x).shape == (1, 168) and model.num_classes == 0

    def test_forward_intermediates(self) -> None:
        model = create_model("emo_1m").eval()
        x = torch.randn(1, 3, 64, 96)
        final, maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        for stage_map, info in zip(maps, model.feature_info, strict=True):
            assert stage_map.shape[2:] == (64 // info["reduction"], 96 // info["reduction"])
        torch.testing.assert_close(final, model.forward_features(x))
        _, last_two = model.forward_intermediates(x, indices=2, norm=True)
        torch.testing.assert_close(last_two, [maps[3], final])
        picked = model.forward_intermediates(x, [-4, 2], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(picked, [maps[1], maps[2]])

    def test_stop_early_runs_no_later_stage(self) -> None:
        model = create_model("emo_1m").eval()
        model.stage4[0].register_forward_hook(lambda *args: pytest.fail("stage4 ran"))
        model.forward_intermediates(torch.randn(1, 3, 32, 32), [1], stop_early=True)

    def test_feature_info_names_the_stages(self) -> None:
        model = on_meta("emo_5m")
        assert [i["num_chs"] for i in model.feature_info] == [24, 48, 72, 160, 288]
        assert [i["reduction"] for i in model.feature_info] == [2, 4, 8, 16, 32]
        assert all(i["module"] in dict(model.named_children()) for i in model.feature_info)

    @pytest.mark.parametrize("coarse", [False, True])
    def test_group_matcher_sorts_every_parameter_once(self, coarse: bool) -> None:
        model = on_meta("emo_1m")
        matcher = model.group_matcher(coarse=coarse)
        patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
        blocks = set()
        for name, _ in model.named_parameters():
            hits = [re.match(pattern, name) for pattern in patterns]
            assert sum(hit is not None for hit in hits) == (0 if name.startswith("head.") else 1)
            if hits[1]:
                blocks.add(hits[1].groups())
        assert len(blocks) == (4 if coarse else sum(model.config.depths))

    def test_grad_checkpointing_changes_nothing(self) -> None:
        """With dropout and drop path at work, from one seed."""
        x = torch.randn(2, 3, 64, 64)
        model = create_model("emo_1m", drop=0.1, attn_drop=0.1, drop_path_rate=0.5).train()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        results = []
        for enable in (False, True):
            model.load_state_dict(state)
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            torch.manual_seed(3)
            loss = model(x).square().sum()
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            results.append((loss.detach(), grads, buffers))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    def test_batch_of_none(self) -> None:
        assert create_model("emo_1m").eval()(torch.empty(0, 3, 40, 72)).shape == (0, 1000)

    @pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 65)])
    def test_any_image_size(self, size: tuple[int, int]) -> None:
        out = create_model("emo_1m").eval()(torch.randn(1, 3, *size))
        assert out.shape == (1, 1000) and out.isfinite().all()

    def test_in_chans(self) -> None:
        model = create_model("emo_1m", in_chans=1, num_classes=2).eval()
        assert model(torch.randn(3, 1, 32, 32)).shape == (3, 2)

    @pytest.mark.slow
    def test_export_with_any_size(self) -> None:
        """One graph for cropped, uncropped and single windows, if sizes are not specialised."""
        model = create_model("emo_1m", num_classes=10).eval()
        dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):
            program = torch.export.export(
                model, (torch.randn(2, 3, 330, 300),), dynamic_shapes=(dynamic,)
            )
        for size in [(2, 3, 330, 300), (3, 3, 224, 224), (2, 3, 97, 131), (2, 3, 40, 600)]:
            x = torch.randn(size)
            with torch.no_grad():
                torch.testing.assert_close(program.module()(x), model(x))


class TestAblations:
    @pytest.mark.parametrize("name", ABLATIONS)
    def test_runs_forward_and_backward(self, name: str) -> None:
        model = create_model("emo_2m", num_classes=3, **ABLATIONS[name]).train()
        x = torch.randn(2, 3, 64, 64, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key

    def test_parameters(self) -> None:
        sizes = {name: count(on_meta("emo_5m", **over)) for name, over in ABLATIONS.items()}
        assert sizes["both"] == sizes["swapped"] == sizes["post"] == 5_108_848
        # The query and key projections are all that attention adds.
        assert sizes["dw_only"] == sizes["qkx"] == 4_363_760
        assert sizes["ew_only"] - sizes["neither"] == 745_088
        assert 5_300_000 <= sizes["metaformer"] < 5_400_000

    def test_each_is_another_function(self) -> None:
        """Same weights wherever the names agree, different logits."""
        x = torch.randn(1, 3, 96, 96)
        published = create_model("emo_5m", num_classes=5).eval()
        with torch.no_grad():
            want = published(x)
            for name in ("neither", "dw_only", "ew_only", "swapped", "qkx", "post"):
                model = create_model("emo_5m", num_classes=5, **ABLATIONS[name]).eval()
                model.load_state_dict(published.state_dict(), strict=False)
                assert (model(x) - want).norm() > 1e-3 * want.norm(), name

    def test_blocks_without_the_depthwise_convolution_keep_the_downsamplers_one(self) -> None:
        model = on_meta("emo_5m", dw_conv=False)
        for stage in model.stages[1:]:
            assert [hasattr(b.conv_local, "conv") for b in stage] == [True] + [False] * (
                len(stage) - 1
            )


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "close"),
        [("emo_5n", "emo_5m"), ("emo5m", "emo_5m"), ("EMO2_5", "emo2_5m"), ("resnet50", None)],
    )
    def test_unknown_model(self, name: str, close: str | None) -> None:
        for create in (create_model, create_backbone):
            with pytest.raises(ValueError, match="unknown model") as caught:
                create(name)
            text = str(caught.value)
            assert name in text and all(known in text for known in list_models())
            assert ("did you mean" in text) == (close is not None)
            assert close is None or f"'{close}'" in text

    def test_unknown_override(self) -> None:
        with pytest.raises(ValueError, match=r"override 'window_size'.*'window_sizes'"):
            create_model("emo_1m", window_size=7)
        with pytest.raises(ValueError, match="create_backbone: unknown override 'drop_path'"):
            create_backbone("emo_1m", drop_path=0.1)

    @pytest.mark.parametrize(
        ("overrides", "match"),
        [
            ({"depths": (1, 2, 3)}, r"depths must be one value or four.*\(1, 2, 3\)"),
            ({"window_sizes": 7.5}, "window_sizes must be of int, got 7.5"),
            ({"attn_stages": 1}, "attn_stages must be of bool, got 1"),
            ({"norm_layers": "bn2d"}, "unknown norm_layer 'bn2d'; did you mean 'bn_2d'"),
            ({"act_layers": "geluu"}, "unknown act_layer 'geluu'; did you mean 'gelu'"),
            ({"window_mode": "strided"}, "unknown window_mode 'strided'.*grid, block, both"),
            ({"op_order": "conv_first"}, "unknown op_order"),
            ({"block": "metformer"}, "did you mean 'metaformer'"),
            ({"dim_heads": 24}, "dim_in must be divisible by dim_head.*nearest divisor"),
            ({"attn_pre": False}, "588 expanded channels must be divisible by the 8 heads"),
            ({"drop_path_rate": 1.0}, r"drop_path must lie in \[0, 1\)"),
            ({"num_classes": -1}, "num_classes must be an integer >= 0"),
            ({"in_chans": 0}, "in_chans must be an integer >= 1"),
        ],
    )
    def test_overrides(self, overrides: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            on_meta("emo_1m", **overrides)

    @pytest.mark.parametrize(
        ("x", "match"),
        [
            (torch.zeros(3, 64, 64), r"4 dimensions.*\(3, 64, 64\).*x\[None\]"),
            (torch.zeros(1, 4, 64, 64), r"C = 3, got shape \(1, 4, 64, 64\)"),
            (torch.zeros(1, 64, 64, 3), "C = 3"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"torch.uint8.*x.float\(\)"),
            ("photo.jpg", "torch.Tensor, got str"),
        ],
    )
    def test_images(self, x: Any, match: str) -> None:
        for model in (create_model("emo_1m"), create_backbone("emo_1m")):
            with pytest.raises(ValueError, match=match):
                model(x)

    def test_intermediates(self) -> None:
        model, x = create_model("emo_1m"), torch.zeros(1, 3, 32, 32)
        with pytest.raises(ValueError, match="0 to 4"):
            model.forward_intermediates(x, [5])
        with pytest.raises(ValueError, match="1 to 5 stages"):
            model.forward_intermediates(x, 6)
        with pytest.raises(ValueError, match="NCHW"):
            model.forward_intermediates(x, output_fmt="NLC")
