"""A timm backbone walked stage by stage, so that something can sit between its stages."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.models import hub

Fuse = Callable[[int, Tensor], tuple[Tensor, Tensor]]

_CAN_BE_WALKED = (
    "the families of Swin, ConvNeXt, ResNet, RegNet, EfficientNet, MobileNet, EfficientViT, FastViT, TinyViT, RepViT, "
    "PVT and bring-your-own-blocks can"
)


class StagedBackbone(nn.Module):
    """Any timm network whose features come from a chain of modules, with a hook between its stages.

    timm's ``FeatureListNet`` holds a network as an ordered chain and returns what some of its modules put out. The
    same chain is walked here, but each returned map is first handed to ``fuse`` and the *fused* map goes on to the
    next module.

    Args:
        name: A timm model name.
        args: Arguments for ``timm.create_model``.
        out_indices: Which stages to return.
        weights: None (random), ``"timm"`` (timm's published weights, needs a network or a filled cache), or the path
            of a state dict (``.safetensors``, or a pickle of tensors) with timm's names for that model.

    Attributes:
        channels: Width of each returned stage.
        strides: Input pixels per map pixel of each returned stage.
        normalisation: Mean and deviation of the images that the weights were trained on, as timm's configuration of
            this model states them; None for random weights.

    Raises:
        ValueError: An unknown name (close matches are offered), arguments timm refuses, a network that is not such a
            chain, or weights that do not fit.
    """

    def __init__(
        self, name: str, args: dict[str, Any], out_indices: Sequence[int], weights: str | Path | None = None
    ) -> None:
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models import FeatureListNet
        from timm.models._features import FeatureInfo

        network = _create(name, args, pretrained=weights == "timm")
        if weights not in (None, "timm"):
            unused = _load_weights(network, Path(str(weights)))
        else:
            unused = set()
        self.normalisation = None if weights is None else _normalisation(network, weights)
        info = getattr(network, "feature_info", None)
        if not info:
            raise ValueError(f"backbone {name!r} has no feature stages in timm; choose a hierarchical network")
        stages = len(info.info if isinstance(info, FeatureInfo) else info)
        if min(out_indices) < 0 or max(out_indices) >= stages:
            raise ValueError(f"out_indices={tuple(out_indices)}: backbone {name!r} has stages 0 to {stages - 1}")
        own = [n for n, _ in network.named_parameters(recurse=False)]
        if own:
            raise ValueError(
                f"backbone {name!r} cannot be walked as a chain of modules: it adds parameters of its own "
                f"({_some(own)}) between them; {_CAN_BE_WALKED}"
            )
        chain = None
        for flatten in (True, False):  # which of the two a family needs is known only to its own builder
            try:
                chain = FeatureListNet(
                    network,
                    out_indices=tuple(out_indices),
                    output_fmt=getattr(network, "output_fmt", "NCHW"),
                    flatten_sequential=flatten,
                )
                break
            except AssertionError:
                continue
        if chain is None:
            raise ValueError(
                f"backbone {name!r} cannot be walked as a chain of modules, so fusion cannot sit between its stages; "
                f"{_CAN_BE_WALKED}"
            )
        for module in chain.modules():
            if isinstance(module, PatchEmbed) and not module.strict_img_size:
                # Swin pads its windows and mergings; so the first patches as well. (Final is for torch.jit alone.)
                setattr(module, "dynamic_img_pad", True)  # noqa: B010
        takes_any = "strict_img_size" in inspect.signature(type(network)).parameters
        self._any_size = "backbone_args={'strict_img_size': False} lets it take any" if takes_any else ""
        self.blocks = nn.ModuleDict(dict(chain.items()))
        self.channels_last = str(chain.output_fmt) in ("NHWC", "Format.NHWC")
        self.channels: list[int] = list(chain.feature_info.channels())
        self.strides: list[int] = list(chain.feature_info.reduction())
        self._ends = [key for key, _ in chain.items() if key in chain.return_layers]
        kept = {id(p) for p in self.parameters()}
        lost = sorted(n for n, p in network.named_parameters() if id(p) in kept and n in unused)
        if lost:
            raise ValueError(f"{weights}: no weights for {_some(lost)} of backbone {name!r}; nothing was loaded")

    def forward(self, image: Tensor, fuse: Fuse) -> list[Tensor]:
        """The stage maps (B, C_i, H_i, W_i) as ``fuse`` hands them out.

        Args:
            image: (B, 3, H, W).
            fuse: Called with the stage's number and its map (B, C_i, H_i, W_i); returns ``(for_output, for_next)``,
                both of that shape.

        Raises:
            ValueError: An image size the backbone does not take, or a stage that gives no map.
        """
        maps: list[Tensor] = []
        x = image
        for name, block in self.blocks.items():
            try:
                x = block(x)
            except AssertionError as error:  # timm's way to say that a size does not fit
                why = [str(error).rstrip(".") or f"{name!r} works on blocks that must divide its map", self._any_size]
                raise ValueError(
                    f"the backbone does not take an image of {tuple(image.shape[-2:])}: {'; '.join(filter(None, why))}"
                ) from error
            except (RuntimeError, ValueError) as error:
                error.add_note(
                    f"Raised by {name!r} of the backbone at an image of {tuple(image.shape[-2:])}; networks with "
                    "tables of positions take only the size they were built for: give it in "
                    "backbone_args, or choose another. Networks of token sequences (LeViT) cannot be fused."
                )
                raise
            if name in self._ends:
                if not isinstance(x, Tensor) or x.dim() != 4:
                    given = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                    raise ValueError(f"stage {name!r} gives {given}, not a map: choose a hierarchical backbone")
                x = x.permute(0, 3, 1, 2) if self.channels_last else x
                out, x = fuse(len(maps), x)
                maps.append(out)
                x = x.permute(0, 2, 3, 1) if self.channels_last else x
        return maps


def _create(name: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        known = timm.list_models()
        longer = sorted((one for one in known if str(name) and str(name) in one), key=len)
        similar = difflib.get_close_matches(str(name), known, n=4, cutoff=0.4)
        close = list(dict.fromkeys([*longer, *similar]))[:4]
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"timm {timm.__version__} has no backbone {name!r}{hint}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    if args.get("blocks") and isinstance(args["blocks"][0], dict):
        from timm.models.byobnet import ByoBlockCfg

        args["blocks"] = tuple(ByoBlockCfg(**block) for block in args["blocks"])
    args.setdefault("num_classes", 0)
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:
        if pretrained and (why := hub.reason(error)):
            raise ValueError(
                f"timm's weights of {name!r} could not be fetched ({why}); or pass the file of the weights as "
                "backbone_weights"
            ) from error
        if pretrained and "No pretrained weights" in str(error):
            raise ValueError(
                f"timm publishes no weights of {name!r}: leave backbone_weights out, pass a file, or choose another"
            ) from error
        if isinstance(error, TypeError | AssertionError | ValueError | IndexError):
            raise ValueError(f"timm cannot build {name!r} with backbone_args={args}: {error}") from error
        raise


def _normalisation(network: nn.Module, weights: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation from the configuration next to a file of weights, or else from timm's of the model."""
    known: list[Any] = [getattr(network, "pretrained_cfg", None)]
    config_file = Path(str(weights)).parent / "config.json"
    if weights != "timm" and config_file.is_file():  # as in timm's folders on the hub
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
            known.insert(0, values.get("pretrained_cfg") if isinstance(values, dict) else None)
        except ValueError:
            pass  # another file of that name
    for found in known:
        mean, std = (found.get("mean"), found.get("std")) if isinstance(found, dict) else (None, None)
        if mean is not None and std is not None and len(mean) == len(std) == 3:
            return tuple(mean), tuple(std)
    return None


def _load_weights(network: nn.Module, path: Path) -> set[str]:
    """Load a timm state dict; returns the names it had nothing for (a head, dropped anyway, may be among them)."""
    import sys

    from fastkd.models.checkpoint import read_state_dict

    state = read_state_dict(path)
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        try:
            state = translate(state, network)
        except Exception as error:  # it takes the keys for granted that tell it which publication this is
            raise ValueError(
                f"{path}: timm cannot translate these keys for a {type(network).__name__} "
                f"({type(error).__name__}: {error})"
            ) from error
    own = network.state_dict()
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if wrong:
        k = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not fit, e.g. {k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        )
    foreign = sorted(k for k in state.keys() - own.keys() if not k.startswith(("head", "fc.", "classifier", "norm.")))
    if foreign:
        raise ValueError(f"{path}: keys this backbone does not have: {_some(foreign)}")
    return set(network.load_state_dict(state, strict=False).missing_keys)


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
