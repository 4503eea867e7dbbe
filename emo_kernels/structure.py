"""Read an inverted residual mobile block off a module, by structure and never by import path.

The published class is pasted into many code bases. What all copies share is the names of the
children, which checkpoints fix (``norm``, ``qk``, ``v``, ``conv_local``, ``se``, ``proj``), and the
standard layers inside them.

A reading remembers every place it looked at. It is used again while all of them hold what they
held, so a changed switch, layer, mode or hook is seen at the next call; weights are fetched anew at
every call.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

from torch import nn
from torch.nn.modules import module as module_globals

from emo_kernels import backends
from emo_kernels.spec import OP_ORDERS, WINDOW_MODES, Conditions, IRMBSpec, IRMBWeights

_ACTIVATION_CLASSES = {
    "Identity": "none",
    "NoneType": "none",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Swish": "silu",
}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_ABSENT = object()
Spec = TypeVar("Spec")


class UnreadableError(Exception):
    """The module is not a block whose forward this library knows; the text says why."""


def looks_like_irmb(module: nn.Module) -> bool:
    """Whether ``module`` has the children that make a block."""
    children = module._modules
    return children.keys() >= {"norm", "v", "conv_local", "proj"} and hasattr(
        children["proj"], "conv"
    )


# Hooks on every module (profilers, FLOP counters).
_GLOBAL_HOOKS = (module_globals._global_forward_hooks, module_globals._global_forward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether hooks on every module are installed."""
    return any(_GLOBAL_HOOKS)


class Reading(Generic[Spec]):
    """The tensors and switches of one module as they were read.

    Attributes:
        spec: the switches.
        batch_dependent: why the block does not compute as in inference now (batch statistics,
            dropout), or ``None`` if it does.
        dropout: why no kernel computes what it does now, or ``None``.
        norm, bn: the batch norms in front of the block and behind its convolution.
        drop_path: its stochastic depth, where active.

    Raises:
        UnreadableError: a part is missing, of an unknown class, or hooked.
    """

    def __init__(self, block: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._hooks: list[dict[int, Any]] = []
        self._sized: list[dict[str, Any]] = []
        self._tensors: list[tuple[dict[str, Any], str] | None] = []
        self.batch_dependent: str | None = None
        self.dropout: str | None = None
        self.norm: nn.Module | None = None
        self.bn: nn.Module | None = None
        self.drop_path: nn.Module | None = None
        try:
            self.spec = self._read(block)
        except (AttributeError, KeyError, TypeError) as error:
            raise UnreadableError(f"it lacks a part of the published block ({error!r})") from error
        self._held = self._look()

    def is_current(self) -> bool:
        """Whether a new reading of the block would give the same."""
        return self._look() == self._held and not any(self._hooks)

    def conditions(self) -> Conditions:
        """What must not change for this reading and its weights' memory to stay as they are."""
        places = [*self._places, *backends.places_of_request()]
        weights: list[tuple[dict[str, Any], str]] = []
        for place in self._tensors:
            if place is not None:
                absent = place[0].get(place[1]) is None
                (places if absent else weights).append(place)
        return Conditions(places, [*self._hooks, *_GLOBAL_HOOKS, *self._sized], weights)

    def _look(self) -> list[Any]:
        return [place.get(key, _ABSENT) for place, key in self._places]

    def _attribute(self, module: nn.Module, name: str, default: Any = _ABSENT) -> Any:
        """``module.name``, remembered."""
        self._places.append((module.__dict__, name))
        return getattr(module, name) if default is _ABSENT else getattr(module, name, default)

    def _child(self, module: nn.Module, path: str, name: str) -> Any:
        """Child ``name``, remembered; hooks on it would not be called by a kernel."""
        self._places.append((module._modules, name))
        child = module._modules.get(name)
        if child is not None:
            hooks = (
                child._forward_hooks,
                child._forward_pre_hooks,
                child._backward_hooks,
                child._backward_pre_hooks,
            )
            if any(hooks):
                _refuse(f"{path} has hooks, which only its own forward calls")
            self._hooks.extend(hooks)
        return child

    def _parameters(self, module: nn.Module | None, *names: str) -> None:
        """The next tensors of the block are these of ``module``."""
        for name in names:
            if module is None:
                self._tensors.append(None)
            else:
                held = module._buffers if name in module._buffers else module._parameters
                self._tensors.append((held, name))

    def _read_norm(self, norm: Any) -> dict[str, Any]:
        names = ("weight", "bias", "running_mean", "running_var")
        if type(norm) is nn.Identity:
            self._parameters(None, *names)
            return {"norm": "none"}
        if type(norm) in BATCH_NORMS:
            self._read_batch_norm(norm)
            self.norm = norm
            return {"norm": "batch", "norm_eps": self._attribute(norm, "eps")}
        inner = norm if isinstance(norm, nn.LayerNorm) else self._child(norm, "norm.norm", "norm")
        if not isinstance(inner, nn.LayerNorm):
            name = type(norm).__name__
            _refuse(f"norm is a {name}, not BatchNorm2d or a LayerNorm over channels")
        self._parameters(inner, *names[:2])
        self._parameters(None, *names[2:])
        return {"norm": "layer", "norm_eps": self._attribute(inner, "eps")}

    def _read_batch_norm(self, norm: Any) -> None:
        self._parameters(norm, "weight", "bias", "running_mean", "running_var")
        if self._attribute(norm, "training") or norm.running_mean is None:
            self.batch_dependent = "batch norm takes the batch's statistics"

    def _read_conv(self, layer: nn.Module, path: str, name: str) -> Any:
        conv = self._child(layer, f"{path}.{name}", name)
        if type(conv) is not nn.Conv2d:
            _refuse(f"{path}.{name} is a {type(conv).__name__}, not torch.nn.Conv2d")
        return conv

    def _read_act(self, layer: Any, path: str, name: str = "act") -> str:
        act = self._child(layer, f"{path}.{name}", name)
        found = _ACTIVATION_CLASSES.get(type(act).__name__)
        if found is None or getattr(act, "approximate", "none") != "none":
            _refuse(f"{path}.{name} is a {type(act).__name__}, which no kernel has")
        return found

    def _read(self, module: nn.Module) -> Spec:
        """The switches; tensors in the order that kernels take them."""
        raise NotImplementedError


class BlockReading(Reading[IRMBSpec]):
    """Of one inverted residual mobile block."""

    def weights(self) -> IRMBWeights:
        """The block's tensors as they are now."""
        weights = IRMBWeights._make(None if t is None else t[0].get(t[1]) for t in self._tensors)
        if weights.gamma is None or weights.gamma.dim() == 1:
            return weights
        return weights._replace(gamma=weights.gamma.flatten())

    def _read(self, block: nn.Module) -> IRMBSpec:
        """Tensors in the order of IRMBWeights."""
        norm = self._read_norm(self._child(block, "norm", "norm"))
        attention = self._read_attention(block)
        v_groups, act = self._read_v(self._child(block, "v", "v"))
        stencil = self._read_conv_local(self._child(block, "conv_local", "conv_local"))
        se_act = self._read_se(self._child(block, "se", "se"))
        proj = self._read_pointwise(self._child(block, "proj", "proj"), "proj")
        if proj.bias is not None:
            _refuse("proj.conv has a bias")
        self._parameters(proj, "weight")
        self._read_layer_scale(self._child(block, "ls", "ls"))
        self._read_dropouts(block)
        if None not in (act, se_act) and act != se_act:
            _refuse("squeeze-excite and the expansion have different activations")
        return IRMBSpec(
            act=act or se_act or "none",
            v_groups=v_groups,
            skip=bool(self._attribute(block, "has_skip")),
            **norm,
            **stencil,
            **attention,
        )

    def _read_attention(self, block: nn.Module) -> dict[str, Any]:
        if not self._attribute(block, "attn_s", "qk" in block._modules):
            self._parameters(None, "weight", "bias")
            return {"head_dim": 0}
        head_dim = self._attribute(block, "dim_head")
        scale = self._attribute(block, "scale")
        if abs(float(scale) - head_dim**-0.5) > 1e-6:
            _refuse(f"the attention scale is {scale}, not 1 / sqrt({head_dim})")
        mode = self._attribute(block, "window_mode", "grid")
        order = self._attribute(block, "op_order", "attn_conv")
        if mode not in WINDOW_MODES or order not in OP_ORDERS:
            _refuse(f"window_mode {mode!r} or op_order {order!r} is unknown")
        if self._attribute(block, "qk_proj", True):
            qk = self._read_pointwise(self._child(block, "qk", "qk"), "qk")
            self._parameters(qk, "weight", "bias")
        else:
            self._parameters(None, "weight", "bias")
        return {
            "head_dim": int(head_dim),
            "window_size": int(self._attribute(block, "window_size")),
            "attn_pre": bool(self._attribute(block, "attn_pre")),
            "window_mode": mode,
            "op_order": order,
        }

    def _read_v(self, v: Any) -> tuple[int, str | None]:
        """(groups, activation) of the expansion."""
        if type(v) is nn.Identity:
            self._parameters(None, "weight", "bias")
            return 1, None
        conv = self._read_pointwise(v, "v")
        self._parameters(conv, "weight", "bias")
        return self._attribute(conv, "groups"), self._read_act(v, "v")

    def _read_conv_local(self, layer: Any) -> dict[str, Any]:
        if type(layer) is nn.Identity:
            self._parameters(None, "weight", "weight", "bias", "running_mean", "running_var")
            return {}
        conv = self._read_conv(layer, "conv_local", "conv")
        norm = self._child(layer, "conv_local.norm", "norm")
        if type(norm) not in BATCH_NORMS:
            _refuse(f"conv_local.norm is a {type(norm).__name__}, not BatchNorm2d")
        if self._read_act(layer, "conv_local") != "silu":
            _refuse("conv_local.act is not SiLU")
        if not self._attribute(conv, "groups") == conv.in_channels == conv.out_channels:
            _refuse("conv_local.conv is not depthwise")
        if conv.bias is not None or self._attribute(conv, "padding_mode") != "zeros":
            _refuse("conv_local.conv has a bias or pads with something else than zeros")
        self._parameters(conv, "weight")
        self._read_batch_norm(norm)
        self.bn = norm
        sizes = {}
        for name in ("kernel_size", "stride", "padding", "dilation"):
            pair = self._attribute(conv, name)
            if isinstance(pair, str) or pair[0] != pair[1]:
                _refuse(f"conv_local.conv has {name} {pair}, not one number for both sides")
            sizes[name] = pair[0]
        del sizes["kernel_size"]
        return {**sizes, "bn_eps": self._attribute(norm, "eps")}

    def _read_se(self, se: Any) -> str | None:
        """The activation of squeeze-excite."""
        if se is None or type(se) is nn.Identity:
            self._parameters(None, "weight", "bias", "weight", "bias")
            return None
        for name in ("conv_reduce", "conv_expand"):
            self._parameters(self._read_conv(se, "se", name), "weight", "bias")
        return self._read_act(se, "se", "act1" if "act1" in se._modules else "act")

    def _read_layer_scale(self, scale: Any) -> None:
        if scale is None or type(scale) is nn.Identity:
            self._parameters(None, "gamma")
        elif "gamma" in scale._parameters:
            self._parameters(scale, "gamma")
        else:
            _refuse(f"ls is a {type(scale).__name__} without gamma")

    def _read_dropouts(self, block: nn.Module) -> None:
        for name in ("attn_drop", "proj_drop", "drop_path"):
            drop = self._child(block, name, name)
            if drop is None or type(drop) is nn.Identity:
                continue
            rate = self._attribute(drop, "p" if hasattr(drop, "p") else "drop_prob")
            if self._attribute(drop, "training") and rate:
                self.batch_dependent = f"{name} is active"
                if type(drop).__name__ == "DropPath":
                    self.drop_path = drop
                else:
                    self.dropout = self.batch_dependent

    def _read_pointwise(self, layer: Any, path: str) -> Any:
        """The 1x1 convolution of a conv-norm-act layer that has no norm."""
        conv = self._read_conv(layer, path, "conv")
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in (0, (0, 0)):
            _refuse(f"{path}.conv is not a plain 1x1 convolution")
        if type(self._child(layer, f"{path}.norm", "norm")) not in (nn.Identity, type(None)):
            _refuse(f"{path} has a norm")
        return conv


class OperatorReading(Reading[dict[str, Any]]):
    """Of what one operator beside the blocks computes; ``spec`` holds the operator's options."""

    def tensors(self) -> tuple[Any, ...]:
        """In the order the operator takes them, as they are now; ``None`` where absent."""
        return tuple(None if place is None else place[0].get(place[1]) for place in self._tensors)


def _refuse(reason: str) -> NoReturn:
    raise UnreadableError(reason)
